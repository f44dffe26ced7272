"""What a score rests on: the answers of the highest rows in pieces of text, each with its part (heat.json)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from safebasin.data.example import Example
from safebasin.data.files import read_bytes
from safebasin.encode import TokenizedRow
from safebasin.scan.scan import Scanned
from safebasin.scan.scores import read_scores, well_formed
from safebasin.template import render

HEAT = "heat.json"
SHOWN = 12  # rows


class HeatRow(NamedTuple):
    """A row of heat.json. Its texts are as hostile as the data."""

    row_id: str
    line: int
    score: float
    scorer: str
    tokens: list[tuple[str, float]]  # the answer with its turn's end in pieces, and the part of each
    span: tuple[int, int]  # the pieces that carry the score


def heat_rows(
    tokenizer: Any,
    examples: Sequence[Example],
    rows: Sequence[TokenizedRow],
    scanned: Scanned,
    scorers: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The highest rows of every scorer of tokens, highest first, with the fields of ``HeatRow``.

    A scorer's sum or maximum over the pieces of a row is still the row's score.
    """
    table = []
    for name in (name for name in scanned.rows if name in scanned.tokens):
        scores, join = scanned.rows[name], math.fsum if scorers[name].entry.tokens == "sum" else max
        for i in sorted(range(len(rows)), key=lambda i: -scores[i])[:SHOWN]:
            values = scanned.tokens[name][i]
            parts = [(text, join(some)) for text, some in pieces(tokenizer, examples[i], rows[i], values)]
            span = carrier([value for _, value in parts], scores[i])
            table.append(HeatRow(examples[i].id, examples[i].line, scores[i], name, parts, span)._asdict())
    return table


def carrier(values: Sequence[float], score: float) -> tuple[int, int]:
    """The shortest run of pieces, [start, stop), that carries half of the score; of several as short, the highest."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    for width in range(1, len(values)):
        runs = sums[width:] - sums[:-width]
        if runs.max() >= score / 2:
            return int(runs.argmax()), int(runs.argmax()) + width
    return 0, len(values)


def pieces(
    tokenizer: Any, example: Example, row: TokenizedRow, values: Sequence[float]
) -> list[tuple[str, list[float]]]:
    """The answer's text by token, with the values of its tokens.

    Text between two tokens goes to the later one; tokens that share a character are one piece.
    """
    text = render(tokenizer, example.messages, tools=example.tools)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    answer = ((row.start or 0) + row.answer.nonzero()[0]).tolist()[-len(values) :]
    parts: list[tuple[str, list[float]]] = []
    last, reached = -2, 0
    for k, value in zip(answer, values, strict=True):
        (start, end), follows = offsets[k], k == last + 1
        if follows and (start < reached or end == reached):
            before, shared = parts.pop()
            parts.append((before + text[reached:end], [*shared, value]))
        else:
            parts.append((text[reached if follows else start : end], [value]))
        last, reached = k, max(end, reached)
    return parts


class Worst(NamedTuple):
    """A row of high score."""

    scorer: str
    line: int
    score: float
    row_id: str
    cut_short: bool
    why: str  # what of its answer carries the score, as hostile as the row; empty for a scorer without tokens
    share: float  # of the score, that ``why`` carries; above 1 where the rest lowers it


def worst_rows(folder: Path, count: int) -> list[Worst]:
    """The ``count`` highest rows of every scorer of a scan's folder; the first ``SHOWN`` of each come with a reason.

    Raises:
        UserError: a file of the folder is missing, damaged or of another shape.
    """
    scores = read_scores(folder / "scores.parquet")
    with well_formed(folder / HEAT):
        heat = TypeAdapter(list[HeatRow]).validate_json(read_bytes(folder / HEAT), strict=True)
    spans = {(row.scorer, row.line): row.tokens[slice(*row.span)] for row in heat}
    worst = []
    for name, values in scores.columns.items():
        for i in sorted(range(len(values)), key=lambda i: -values[i])[:count]:
            row, score = scores.row_ids[i], values[i]
            span = spans.get((name, scores.lines[i]), []) if score > 0 else []  # nothing carries a score that is none
            why, share = "".join(text for text, _ in span), sum(value for _, value in span) / (score or 1.0)
            worst.append(Worst(name, scores.lines[i], score, row, row in scores.cut_short, why, share))
    return worst
