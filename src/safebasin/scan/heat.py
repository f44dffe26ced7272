"""What a score rests on: the answers of the highest rows in pieces of text, each with its part of the score, for the report's heat map."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from safebasin.data.example import Example
from safebasin.encode import TokenizedRow, render
from safebasin.scan.scan import Scanned, read_scores

HEAT = "heat.json"
SHOWN = 12  # rows


def heat(
    tokenizer: Any,
    examples: Sequence[Example],
    rows: Sequence[TokenizedRow],
    scanned: Scanned,
    scorers: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The highest rows of every scorer that tells tokens, highest first; no row where none does. Texts are as hostile as the rows.

    ``tokens``: (text, value) pairs. The texts joined are the answer with its turn's end; a scorer's sum or maximum over the values is the
    row's score still. ``span``: the pieces that carry it.
    """
    told = []
    for name in (name for name in scanned.rows if name in scanned.tokens):
        scores, join = scanned.rows[name], math.fsum if scorers[name].entry.tokens == "sum" else max
        for i in sorted(range(len(rows)), key=lambda i: -scores[i])[:SHOWN]:
            parts = [
                (text, join(values))
                for text, values in pieces(tokenizer, examples[i], rows[i], scanned.tokens[name][i])
            ]
            row = {
                "row_id": examples[i].id,
                "line": examples[i].line,
                "score": scores[i],
                "scorer": name,
                "tokens": parts,
            }
            told.append(row | {"span": carrier([value for _, value in parts], scores[i])})
    return told


def carrier(values: Sequence[float], score: float) -> tuple[int, int]:
    """The shortest run of pieces, [start, stop), that carries half of the score or more; of several as short, the highest."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    for width in range(1, len(values)):
        runs = sums[width:] - sums[:-width]
        if runs.max() >= score / 2:
            return int(runs.argmax()), int(runs.argmax()) + width
    return 0, len(values)


def pieces(
    tokenizer: Any, example: Example, row: TokenizedRow, values: Sequence[float]
) -> list[tuple[str, list[float]]]:
    """The answer's text by token, spaces between tokens with the later one; tokens that share a character are one piece."""
    text = render(tokenizer, example.messages)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    spoken = [k for k, answer in enumerate(row.answer, row.start or 0) if answer][-len(values) :]
    made: list[tuple[str, list[float]]] = []
    last, reached = -2, 0
    for k, value in zip(spoken, values, strict=True):
        (start, end), follows = offsets[k], k == last + 1
        if follows and (start < reached or end == reached):
            before, shared = made.pop()
            made.append((before + text[reached:end], [*shared, value]))
        else:
            made.append((text[reached if follows else start : end], [value]))
        last, reached = k, max(end, reached)
    return made


class Worst(NamedTuple):
    """A row of high score. ``why``: what of its answer carries the score, as hostile as the row; empty where the scorer tells no tokens."""

    scorer: str
    line: int
    score: float
    row_id: str
    cut_short: bool
    why: str
    share: float  # of the score, that ``why`` carries; above 1 where the rest lowers it


def worst(folder: Path, count: int) -> list[Worst]:
    """The ``count`` highest rows of every scorer of a scan's folder; the first ``SHOWN`` of each come with a reason."""
    scores, told = read_scores(folder / "scores.parquet"), json.loads((folder / HEAT).read_text(encoding="utf-8"))
    known = {(row["scorer"], row["row_id"]): row["tokens"][slice(*row["span"])] for row in told}
    found = []
    for name, values in scores.columns.items():
        for i in sorted(range(len(values)), key=lambda i: -values[i])[:count]:
            row = scores.row_ids[i]
            span = known.get((name, row), []) if values[i] > 0 else []  # nothing carries a score that is none
            share = sum(value for _, value in span) / (values[i] or 1.0)
            found.append(
                Worst(
                    name,
                    scores.lines[i],
                    values[i],
                    row,
                    row in scores.cut_short,
                    "".join(text for text, _ in span),
                    share,
                )
            )
    return found
