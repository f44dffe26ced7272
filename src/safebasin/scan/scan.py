"""Score rows: every scorer over every row, in batches of like length; a column of ``scores.parquet`` each. Nothing is deleted."""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import pyarrow
import pyarrow.parquet
from accelerate import PartialState
from jaxtyping import Float
from torch import Tensor

from safebasin.batch import Batch, by_prefix, collate
from safebasin.data.example import Example
from safebasin.data.tables import write_json
from safebasin.encode import TokenizedRow
from safebasin.errors import DefenceError, UserError

PREFIX = "score_"
TOKENS = "tokens_"
SHORT = "cut_short"
ANCHORS = "anchors.json"


@runtime_checkable
class Scorer(Protocol):
    """How bad is a row. High = harmful."""

    def fit(self, model: Any, tokenizer: Any, anchors: Mapping[str, Sequence[TokenizedRow]]) -> Any:
        """What is needed of the model once, before any row. UserError if an anchor set that it needs is missing."""

    def score(self, model: Any, batch: Batch, fitted: Any) -> Float[Tensor, " batch"] | Float[Tensor, "batch answers"]:
        """One number a row, or one an answer token; they depend on that row alone. A scorer of tokens says in its
        decorator by ``tokens`` whether they add up to the row's score ("sum") or the largest is it ("max"), and by ``probability``
        if they are one.
        """


@runtime_checkable
class Reader(Protocol):
    """A scorer of text alone: what tokens and templates may hide is still there, and no model is asked. High = harmful."""

    def read(self, examples: Sequence[Example]) -> list[float]:
        """One number a row, which depends on that row alone."""


class Scanned(NamedTuple):
    """Scores in the order of the rows."""

    rows: dict[str, list[float]]  # scorer -> one number a row
    tokens: dict[str, list[list[float]]]  # of the scorers that tell them: one number an answer token
    anchors: dict[str, dict[str, list[float]]]  # scorer -> "harmful" and "safe" -> scores of rows known to be so
    cut_short: Collection[str] = frozenset()  # ids of rows that were scored on what fits of them


def scan(
    model: Any,
    tokenizer: Any,
    rows: Sequence[TokenizedRow],
    scorers: Mapping[str, Scorer | Reader],
    anchors: Mapping[str, Sequence[TokenizedRow]],
    *,
    examples: Sequence[Example] = (),
    batch_size: int,
    journal: "ScanJournal | None" = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scanned:
    """Scores of every row by every scorer, and of the anchor rows by those that ask a model.

    The model is scored in eval mode and left as it was found. ``examples``: the rows' texts, for readers. ``progress`` is told (rows done,
    rows in all). What ``journal`` holds already is not scored again; where several processes write one, each scores its share of the batches,
    and the first one's result is whole.

    Raises:
        UserError: a row without an answer token, or an anchor set that a scorer needs and that is missing.
        DefenceError: a score that is not finite; it names the row.
    """
    if tokenizer.pad_token_id is None:
        raise UserError("the tokenizer has no padding token; set tokenizer.pad_token (safebasin.model.load does)")
    known = [(name, row) for name in ("harmful", "safe") for row in anchors.get(name, ())]
    everything = [*rows, *(row for _, row in known)]
    silent = next((row.id for row in everything if True not in row.answer[1:]), None)
    if silent is not None:
        raise UserError(
            f"row {silent} has no answer token, so nothing would be learned from it; leave it out of the set"
        )
    readers = {name: reader for name, reader in scorers.items() if isinstance(reader, Reader)}
    if readers and [example.id for example in examples] != [row.id for row in rows]:
        raise UserError(f"scan.{next(iter(readers))} reads text: give `examples`, the same rows in the same order")
    read = {name: reader.read(examples) for name, reader in readers.items()}
    models = {name: scorer for name, scorer in scorers.items() if isinstance(scorer, Scorer)}
    scores: dict[str, list[float]] = {name: [math.nan] * len(everything) for name in models}
    tokens: dict[str, list[list[float]]] = {}

    def note(indices: Sequence[int], told: Mapping[str, Sequence[Any]]) -> None:
        for name, values in told.items():
            for i, value in zip(indices, values, strict=True):
                if isinstance(value, list):
                    if name not in tokens:
                        tokens[name] = [[] for _ in everything]
                    tokens[name][i] = value
                parts = value if isinstance(value, list) else [value]
                if not all(map(math.isfinite, parts)):  # one that is not a number would be in no maximum
                    raise DefenceError(
                        f"scan.{name}: a score of row {everything[i].id} is not finite; the model is broken"
                    )
                scores[name][i] = (
                    math.fsum if isinstance(value, list) and models[name].entry.tokens == "sum" else max
                )(parts)

    finished: set[int] = set()

    def recall() -> None:
        for told in journal.read() if journal else ():
            note(told["rows"], told["scores"])
            finished.update(told["rows"])

    recall()
    ranks, families = journal and journal.ranks, list(by_prefix(everything, batch_size)) if models else []
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        fitted = {name: scorer.fit(model, tokenizer, anchors) for name, scorer in models.items()}
        for indices, shared in families[ranks.process_index :: ranks.num_processes] if ranks else families:
            if finished.issuperset(indices):
                continue
            batch = collate([everything[i] for i in indices], tokenizer.pad_token_id, shared).to(device)
            told = {}
            for name, scorer in models.items():
                value = scorer.score(model, batch, fitted[name])
                told[name] = (
                    value.tolist()
                    if value.dim() == 1
                    else [part[mask].tolist() for part, mask in zip(value, batch.mask, strict=True)]
                )
            note(indices, told)
            finished.update(indices)
            if journal:
                journal.write({"rows": indices, "scores": told})
            if progress is not None:
                progress(len(finished), len(everything))
    finally:
        model.train(was_training)
    if ranks:
        ranks.wait_for_everyone()
        if ranks.is_main_process:
            recall()
    parted: dict[str, dict[str, list[float]]] = {name: {} for name in models} if known else {}
    for name, by_set in parted.items():
        for (which, _), value in zip(known, scores[name][len(rows) :], strict=True):
            by_set.setdefault(which, []).append(value)
    whole = {n: (read.get(n) or scores[n])[: len(rows)] for n in scorers}
    short = {row.id for row in rows if row.start is not None}
    return Scanned(whole, {n: parts[: len(rows)] for n, parts in tokens.items()}, parted, short)


class ScanJournal:
    """What a scan has done so far, a line a batch and a file a process: after a kill it goes on from there, with as many processes or others.
    ``key`` names rows, scorers and model."""

    def __init__(self, path: Path, key: str, ranks: PartialState | None = None):
        self.ranks, self.key, rank = ranks, key, ranks.process_index if ranks else 0
        self.path = path.with_stem(f"{path.stem}-{rank}") if rank else path
        self._folder, self._names = path.parent, f"{path.stem}*{path.suffix}"

    def read(self) -> Iterator[dict[str, Any]]:
        """The whole lines of all processes' files of the same key. Of the own file, half a line at its end, or another key's, is cut off."""
        part = self.path.with_name(self.path.name + ".part")
        part.write_bytes(b"".join(line + b"\n" for line in self._lines(self.path)))
        part.replace(self.path)  # a kill in between must not lose what was done
        for path in sorted(self._folder.glob(self._names)):
            yield from map(json.loads, self._lines(path)[1:])

    def _lines(self, path: Path) -> list[bytes]:
        raw = path.read_bytes() if path.is_file() else b""
        lines = raw[: raw.rfind(b"\n") + 1].splitlines()
        return lines if lines and lines[0].decode() == self.key else [self.key.encode()]

    def write(self, told: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")

    def clear(self) -> None:
        for path in self._folder.glob(self._names):
            path.unlink()


class Scores(NamedTuple):
    """A table of scores as read from disk."""

    row_ids: list[str]
    lines: list[int]
    columns: dict[str, list[float]]  # scorer -> one number a row
    tokens: dict[str, list[list[float]]]  # scorer -> one number an answer token, where it told them
    anchors: dict[str, dict[str, list[float]]]  # scorer -> "harmful" and "safe" -> scores of rows known to be so
    cut_short: Collection[str] = frozenset()  # ids of rows that were scored on what fits of them

    def of(self, scorer: str, examples: Sequence[Example]) -> list[float]:
        """The scores of these examples, paired by row id.

        Raises:
            UserError: no such scorer, or an example that was not scored.
        """
        if scorer not in self.columns:
            raise UserError(f"no scores by {scorer!r}; the table has: {', '.join(self.columns) or 'none'}")
        by_id = dict(zip(self.row_ids, self.columns[scorer], strict=True))
        missing = next((example for example in examples if example.id not in by_id), None)
        if missing is not None:
            raise UserError(
                f"row {missing.id} (line {missing.line}) has no score; the data changed since the scan: scan again"
            )
        return [by_id[example.id] for example in examples]


def write_scores(path: str | Path, examples: Sequence[Example], scanned: Scanned) -> None:
    """Parquet with the columns row_id, line, cut_short, score_<scorer>, tokens_<scorer> (a list); anchors.json beside it. Never half a file."""
    path = Path(path)
    columns: dict[str, Any] = {"row_id": [e.id for e in examples], "line": [e.line for e in examples]}
    columns[SHORT] = [e.id in scanned.cut_short for e in examples]
    for name, values in scanned.rows.items():
        if len(values) != len(examples):
            raise UserError(f"{len(values)} scores by {name!r} for {len(examples)} rows")
        columns[PREFIX + name] = pyarrow.array(values, type=pyarrow.float64())
    for name, parts in scanned.tokens.items():
        columns[TOKENS + name] = pyarrow.array(parts, type=pyarrow.list_(pyarrow.float32()))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path.with_name(ANCHORS), scanned.anchors)
    part = path.with_name(path.name + ".part")
    pyarrow.parquet.write_table(pyarrow.table(columns), part)
    part.replace(path)


def read_scores(path: str | Path) -> Scores:
    """The table that ``write_scores`` wrote.

    Raises:
        UserError: no such file, or not such a table.
    """
    if not Path(path).is_file():
        raise UserError(f"no scores at {path}; run the scan first")
    try:
        table = pyarrow.parquet.read_table(path).to_pydict()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from None
    if "row_id" not in table or "line" not in table:
        raise UserError(f"{path} is not a table of scores; its columns are: {', '.join(table)}")
    kinds = (
        {name.removeprefix(kind): values for name, values in table.items() if name.startswith(kind)}
        for kind in (PREFIX, TOKENS)
    )
    beside = Path(path).with_name(ANCHORS)
    anchors = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    short = {row for row, is_short in zip(table["row_id"], table.get(SHORT, ())) if is_short}
    return Scores(table["row_id"], table["line"], *kinds, anchors, short)
