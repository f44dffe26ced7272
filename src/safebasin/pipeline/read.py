"""How a run reads its rows and encodes them, and the model that it starts from."""

import collections
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safebasin.console import line
from safebasin.data.example import Example, Rows, read_examples
from safebasin.data.json_rows import BadRow
from safebasin.data.keys import RowForm
from safebasin.data.source import Source, open_examples, open_rows
from safebasin.encode import Refused, TokenizedRow, encode_all, encoded, fit, shorten
from safebasin.errors import UserError
from safebasin.models.load import ModelAndTokenizer, load, load_tokenizer
from safebasin.models.parts import context_length
from safebasin.models.tensors import is_model
from safebasin.pipeline.plan import Plan
from safebasin.pipeline.token_files import TokenFiles
from safebasin.runtime import processes
from safebasin.scan.column import column_from_file
from safebasin.scan.probe import cut_to_context
from safebasin.train.check import check_columns


def load_start(plan: Plan, tuned: Path | None = None, *, dtype: str = "") -> ModelAndTokenizer:
    """The model of the recipe, with an adapter beside its weights where one is given; or a full model in its place, in
    float32, as it was tuned."""
    how = plan.recipe.model.loading | ({"dtype": dtype} if dtype else {})
    if tuned is not None and is_model(tuned):
        return load(str(tuned), **how | {"dtype": "float32", "revision": None})
    open_model = plan.models.lend if plan.recipe.adapter else load  # full fine-tuning writes into the weights
    return open_model(plan.recipe.model.name, adapter=tuned, **how)


def usable_rows(plan: Plan, source: Source) -> Rows:
    """The rows of a set; those that cannot be used stop the run, or are listed and left out.

    Raises:
        UserError: a row that cannot be used, unless ``data.on_bad`` is "skip"; or no row that can.
    """
    rows = open_rows(source)
    if rows.bad and plan.recipe.data.on_bad == "stop":
        listed = "; ".join(f"line {bad.line}: {bad.reason}" for bad in rows.bad[:3])
        raise UserError(
            f"{source.path}: {len(rows.bad)} rows cannot be used ({listed}); correct them, or set data.on_bad: skip"
        )
    if not rows.examples:
        first = rows.bad[0]
        raise UserError(f"{source.path}: no row can be used (line {first.line}: {first.reason})")
    return rows


def training_examples(plan: Plan, path: Path) -> list[Example]:
    """The rows of a training file of this run that can be used: all that were written to it."""
    return training_rows(plan, path).examples


def training_rows(plan: Plan, path: Path) -> Rows:
    """The rows of a training file of this run."""
    return read_examples(path, training_form(plan))


def training_form(plan: Plan) -> RowForm:
    """How the training file of this run is read."""
    form: RowForm = plan.recipe.data.task
    return form if plan.keeps_form else RowForm(turns=form.turns)


class EncodedRows(NamedTuple):
    """Rows of a training file with their tokens, and what was left out or cut short."""

    examples: list[Example]
    rows: list[TokenizedRow]
    problems: list[BadRow]


def encoded_rows(
    plan: Plan, path: Path, loaded: ModelAndTokenizer, tokens: Path | None = None, *, cut_short: bool = False
) -> EncodedRows:
    """Rows longer than ``row_limit`` stop the run, or are left out and listed; with ``cut_short`` they are cut to what
    fits. ``tokens``: of the run folder, where rows that were encoded before are.

    Raises:
        UserError: see ``fitting_rows``; or no row can be used.
    """
    examples = training_examples(plan, path)
    with processes().main_process_first():  # the others read what it has written
        coded = (
            TokenFiles(tokens, loaded.tokenizer).encoded(examples) if tokens else encoded(loaded.tokenizer, examples)
        )
    result = fitting_rows(plan, examples, coded, row_limit(plan, loaded.model), cut_short=cut_short)
    if not result.rows:
        first = result.problems[0]
        raise UserError(f"no row can be used (line {first.line}: {first.reason})")
    return result


def row_limit(plan: Plan, model: Any) -> int:
    """How many tokens a row may have: ``max_length``, or the context of the model if that is less, which is said."""
    limit, context = plan.recipe.data.max_length, context_length(model)
    if context < limit:
        line(f"data.max_length is {limit}, and the model's context {context}: rows have at most {context} tokens")
    return min(limit, context)


def fitting_rows(
    plan: Plan,
    examples: Sequence[Example],
    coded: Sequence[TokenizedRow | Refused],
    limit: int,
    *,
    cut_short: bool = False,
) -> EncodedRows:
    """``encoded_rows`` of some rows of a file, as they are encoded at their full length; all may be bad.

    Raises:
        UserError: a row that cannot be used, unless ``data.on_bad`` is "skip".
    """
    skip = plan.recipe.data.on_bad == "skip"
    rows, bad = fit(coded, examples, sys.maxsize if cut_short else limit)
    if bad and not skip:
        raise UserError(
            f"{len(bad)} rows cannot be used (line {bad[0].line}: {bad[0].reason}); "
            "correct them, or set data.on_bad: skip"
        )
    for note, count in collections.Counter(row.note for row in rows if row.note).items():
        line(f"{count} of {len(rows)} rows: {note}")
    usable = {row.id for row in rows}
    examples = [example for example in examples if example.id in usable]
    long = {example.line: len(row) for example, row in zip(examples, rows, strict=True) if len(row) > limit}
    reasons = [f"cut short for the scan: {size} tokens, max_length is {limit}" for size in long.values()]
    return EncodedRows(examples, [shorten(row, limit) for row in rows], [*bad, *map(BadRow, long, reasons)])


def encoded_set(
    source: Source, tokenizer: Any, limit: int = sys.maxsize, format_rows: Any = list
) -> list[TokenizedRow]:
    """The rows of a set beside the task, as ``format_rows`` makes them.

    Raises:
        UserError: a row that cannot be used, or is longer than ``limit`` tokens.
    """
    rows, bad = encode_all(tokenizer, format_rows(open_examples(source)), limit)
    if bad:
        raise UserError(f"{source.path}: line {bad[0].line}: {bad[0].reason}")
    return rows


def anchor_rows(plan: Plan, loaded: ModelAndTokenizer) -> Mapping[str, list[TokenizedRow]]:
    """The anchor sets of a scan, encoded, and cut to the model's context."""
    model, tokenizer = loaded
    return {
        name: cut_to_context(model, encoded_set(source, tokenizer), f"the anchor set {name}")
        for name, source in plan.anchors.items()
    }


def check_column_files(plan: Plan) -> None:
    """UserError where a column that comes from a file of the user's has another length than its row has answer tokens.

    Rows that an attack is mixed into have their ids only when they are written, so that nothing can be said of them
    before.
    """
    pairs = {(source, column) for arm in plan.compositions for column, source in plan.column_files(arm).items()}
    if not pairs or plan.mixes:
        return
    model = plan.recipe.model
    examples = usable_rows(plan, plan.recipe.data.task).examples
    tokenizer = load_tokenizer(model.name, **model.source)
    rows, _ = encode_all(tokenizer, examples, plan.recipe.data.max_length)
    for source, column in sorted(pairs):
        values = column_from_file(source, column, examples)
        check_columns([dataclasses.replace(row, columns={column: values[row.id]}) for row in rows], (column,))
