"""Score rows: every scorer over every row, in batches of like length; a column of scores.parquet each."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import pyarrow
from jaxtyping import Float
from torch import Tensor

from safebasin.batch import Batch, collate
from safebasin.data.example import Example
from safebasin.encode import TokenizedRow
from safebasin.errors import DefenceError, UserError
from safebasin.models.hooks import evaluating
from safebasin.scan.journal import BatchScores, ScanJournal, Value
from safebasin.scan.probe import cut_to_context
from safebasin.scan.scores import SCORE, SHORT, TOKENS, AnchorScores
from safebasin.tree import by_prefix

AnchorSets = Mapping[str, Sequence[TokenizedRow]]
LABELS = ("harmful", "safe")  # the anchor sets whose rows are scored along


@runtime_checkable
class Scorer(Protocol):
    """How bad is a row, by a model. High = harmful."""

    def fit(self, model: Any, tokenizer: Any, anchors: AnchorSets) -> Any:
        """What ``score`` needs of the model, computed once. UserError: an anchor set that it needs is missing."""

    def score(self, model: Any, batch: Batch, fitted: Any) -> Float[Tensor, " batch"] | Float[Tensor, "batch answers"]:
        """One number a row, or one an answer token; they depend on that row alone.

        A scorer of tokens declares in its decorator by ``tokens`` whether the row's score is their sum ("sum") or their
        maximum ("max"), and by ``probability`` whether they are probabilities. One that sees a single kind of harm may
        define ``harmful_anchors(tokenizer) -> rows``: they are scored along in the place of the anchor set ``harmful``.
        """


@runtime_checkable
class Reader(Protocol):
    """A scorer of text alone, without a model: it sees what tokens and templates may hide. High = harmful."""

    def read(self, examples: Sequence[Example]) -> list[float]:
        """One number a row, which depends on that row alone."""


class Scanned(NamedTuple):
    """Scores in the order of the rows."""

    rows: dict[str, list[float]]  # scorer -> one number a row
    tokens: dict[str, list[list[float]]]  # scorer of tokens -> one number an answer token
    anchors: AnchorScores
    cut_short: frozenset[str] = frozenset()  # ids of rows that were scored on what fits of them


def score_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[TokenizedRow],
    scorers: Mapping[str, Scorer | Reader],
    anchors: AnchorSets,
    *,
    examples: Sequence[Example] = (),
    batch_size: int,
    journal: ScanJournal | None = None,
    progress: Callable[[int, int], None] | None = None,
    fitted: Mapping[str, Any] | None = None,
) -> Scanned:
    """Scores of every row by every scorer, and of the anchor rows by the scorers that use the model.

    Args:
        model: a causal language model; it is scored in eval mode and left as it was.
        tokenizer: the model's, with a padding token.
        rows: R rows as token ids, each with an answer token.
        scorers: by the name of their column.
        anchors: rows by set ("probe", "harmful", "safe", "align"); which are needed depends on the scorers.
        examples: the same R rows as text, in the same order; only readers need them.
        batch_size: rows of a forward pass; 1 or more.
        journal: what it holds is not scored again. Where several processes share it, each scores its part of the
            batches, and only the result of rank 0 is complete.
        progress: called after every batch with the number of scored rows and of all rows, anchor rows among both.
        fitted: of ``fit_scorers``, where several sets are scored by one fit; None: the scorers are fitted here.

    Returns:
        For every scorer R numbers, high = harmful, in the scorer's own unit (see its equation); for scorers of tokens
        also the numbers of each row's answer tokens.

    Raises:
        UserError: a row without an answer token, a missing anchor set or text, or a model that a scorer refuses.
        DefenceError: a score that is not finite; it names the row.
    """
    if tokenizer.pad_token_id is None:
        raise UserError("the tokenizer has no padding token; set tokenizer.pad_token (safebasin.load_model does)")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be 1 or more")
    models = _models(scorers)
    labelled = [(label, row) for label in LABELS for row in anchors.get(label, ())]
    own = [name for name in models if labelled and models[name].entry.implements("harmful_anchors")]  # type: ignore[attr-defined]
    for name in own:
        harmful = models[name].harmful_anchors(tokenizer)  # type: ignore[attr-defined]
        labelled += [(name, row) for row in cut_to_context(model, harmful, f"the anchors of scan.{name}")]
    everything = [*rows, *(row for _, row in labelled)]
    silent = next((row.id for row in everything if not row.answer[1:].any()), None)
    if silent is not None:
        raise UserError(
            f"row {silent} has no answer token, so nothing would be learned from it; leave it out of the set"
        )
    readers = {name: reader for name, reader in scorers.items() if isinstance(reader, Reader)}
    if readers and [example.id for example in examples] != [row.id for row in rows]:
        raise UserError(f"scan.{next(iter(readers))} reads text: give `examples`, the same rows in the same order")
    scores = {name: reader.read(examples) for name, reader in readers.items()}
    if fitted is None:
        fitted = fit_scorers(model, tokenizer, scorers, anchors)
    values = _model_values(model, tokenizer.pad_token_id, everything, models, fitted, batch_size, journal, progress)
    tokens, by_label, replaced = {}, {}, {(name, "harmful") for name in own}
    for name, column in values.items():
        totals = [_total(models[name], value) for value in column]
        scores[name] = totals[: len(rows)]
        if any(isinstance(value, list) for value in column):
            tokens[name] = [value if isinstance(value, list) else [] for value in column[: len(rows)]]
        pairs = [(label, total) for (label, _), total in zip(labelled, totals[len(rows) :], strict=True)]
        by_label[name] = {
            label: [total for at, total in pairs if at == (name if (name, label) in replaced else label)]
            for label in LABELS
            if anchors.get(label) or (name, label) in replaced
        }
    short = frozenset(row.id for row in rows if row.start is not None)
    return Scanned({name: scores[name] for name in scorers}, tokens, by_label if labelled else {}, short)


def _models(scorers: Mapping[str, Scorer | Reader]) -> dict[str, Scorer]:
    """Those that use the model."""
    return {name: scorer for name, scorer in scorers.items() if isinstance(scorer, Scorer)}


def fit_scorers(
    model: Any, tokenizer: Any, scorers: Mapping[str, Scorer | Reader], anchors: AnchorSets
) -> dict[str, Any]:
    """What each scorer needs of the model, by name; the model is in eval mode meanwhile.

    Raises:
        UserError: a missing anchor set, or a model that a scorer refuses.
    """
    with evaluating(model):
        return {name: scorer.fit(model, tokenizer, anchors) for name, scorer in _models(scorers).items()}


def _total(scorer: Scorer, value: Value) -> float:
    """The score of a row."""
    if not isinstance(value, list):
        return value
    entry = scorer.entry  # type: ignore[attr-defined]  # the decorator sets it
    return math.fsum(value) if entry.tokens == "sum" else max(value)


def _model_values(
    model: Any,
    pad: int,
    rows: Sequence[TokenizedRow],
    scorers: Mapping[str, Scorer],
    fitted: Mapping[str, Any],
    batch_size: int,
    journal: ScanJournal | None,
    progress: Callable[[int, int], None] | None,
) -> dict[str, list[Value]]:
    """What each scorer gives to each row; NaN for rows that other processes score."""
    values: dict[str, list[Value]] = {name: [math.nan] * len(rows) for name in scorers}
    finished: set[int] = set()

    def enter(batch: BatchScores) -> None:
        for name, column in batch.scores.items():
            for i, value in zip(batch.rows, column, strict=True):
                if not all(map(math.isfinite, value if isinstance(value, list) else [value])):
                    raise DefenceError(f"scan.{name}: a score of row {rows[i].id} is not finite; the model is broken")
                values[name][i] = value
        finished.update(batch.rows)

    def recall() -> None:
        for batch in journal.read() if journal else ():
            if batch.fits(rows, scorers):
                enter(batch)

    recall()
    ranks, groups = journal and journal.ranks, list(by_prefix(rows, batch_size)) if scorers else []
    device = next(model.parameters()).device
    with evaluating(model):
        for indices, shared in groups[ranks.process_index :: ranks.num_processes] if ranks else groups:
            if finished.issuperset(indices):
                continue
            batch = collate([rows[i] for i in indices], pad, shared).to(device)
            scores = {name: scorer.score(model, batch, fitted[name]) for name, scorer in scorers.items()}
            done = BatchScores(indices, {name: _values(score, batch) for name, score in scores.items()})
            enter(done)
            if journal:
                journal.write(done)
            if progress is not None:
                progress(len(finished), len(rows))
    if ranks:
        ranks.wait_for_everyone()
        if ranks.is_main_process:
            recall()
            if scorers and len(finished) < len(rows):
                raise DefenceError(
                    f"{len(rows) - len(finished)} rows have no score: another process failed; scan again"
                )
    return values


def _values(scores: Tensor, batch: Batch) -> Any:
    """Of every row its score, or those of its answer tokens."""
    if scores.dim() == 1:
        return scores.tolist()
    return [row[mask].tolist() for row, mask in zip(scores, batch.mask, strict=True)]


def score_table(examples: Sequence[Example], scanned: Scanned) -> pyarrow.Table:
    """The columns row_id, line, cut_short, score_<scorer>, tokens_<scorer> (lists).

    Raises:
        UserError: a column of another length than the rows.
    """
    columns: dict[str, Any] = {"row_id": pyarrow.array([e.id for e in examples], pyarrow.string())}
    columns["line"] = pyarrow.array([e.line for e in examples], pyarrow.int64())
    columns[SHORT] = pyarrow.array([e.id in scanned.cut_short for e in examples], pyarrow.bool_())
    for name, values in scanned.rows.items():
        if len(values) != len(examples):
            raise UserError(f"{len(values)} scores by {name!r} for {len(examples)} rows")
        columns[SCORE + name] = pyarrow.array(values, type=pyarrow.float64())
    for name, parts in scanned.tokens.items():
        columns[TOKENS + name] = pyarrow.array(parts, type=pyarrow.list_(pyarrow.float32()))
    return pyarrow.table(columns)
