"""The step that writes the training rows, the step that cuts them for an arm, and how rows are read and encoded for a
run.

data/train.*   data/rows.json   data/problems.json   cut/ARM/train.*   cut/ARM/cut.json
"""

import collections
import dataclasses
import functools
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safebasin.attack.craft import Row, Score, attack_messages, poisoned_rows
from safebasin.console import line
from safebasin.data.example import Example, Rows, read_examples
from safebasin.data.files import write_json
from safebasin.data.json_rows import BadRow
from safebasin.data.keys import RowForm
from safebasin.data.source import Source, open_examples, open_rows
from safebasin.data.tables import copy_rows, write_table
from safebasin.encode import Refused, TokenizedRow, encode_all, encoded, fit, shorten
from safebasin.errors import UserError
from safebasin.models.load import ModelAndTokenizer, load, load_tokenizer
from safebasin.models.parts import context_length
from safebasin.models.tensors import is_model
from safebasin.pipeline.folder import PROBLEMS, RunFolder
from safebasin.pipeline.plan import Plan
from safebasin.pipeline.token_files import TokenFiles
from safebasin.runtime import processes
from safebasin.scan.column import column_from_file
from safebasin.scan.cut import cut_rows, write_cut
from safebasin.scan.probe import cut_to_context
from safebasin.scan.scan import score_rows
from safebasin.scan.scores import read_scores, unscored_rows
from safebasin.train.check import check_columns


def load_start(plan: Plan, tuned: Path | None = None, *, dtype: str = "") -> ModelAndTokenizer:
    """The model of the recipe, with an adapter beside its weights where one is given; or a full model in its place, in
    float32, as it was tuned."""
    how = plan.recipe.model.loading | ({"dtype": dtype} if dtype else {})
    if tuned is not None and is_model(tuned):
        return load(str(tuned), **how | {"dtype": "float32", "revision": None})
    open_model = plan.models.lend if plan.recipe.adapter else load  # full fine-tuning writes into the weights
    return open_model(plan.recipe.model.name, adapter=tuned, **how)


def write_rows(plan: Plan, folder: RunFolder) -> Path:
    """The step ``data``: the task as it came, or the task and the poison mixed in one form. The path of the training
    rows is returned."""
    data, target = plan.recipe.data, folder.data / plan.train_file
    outputs = [target, folder.data / "rows.json", folder.data / PROBLEMS]
    inputs: dict[str, Any] = {"task": data.task, "on_bad": data.on_bad, "form": plan.train_file}
    if plan.mixes:
        inputs |= {"poison": data.poison, "attack": plan.attack, "share": data.poison_share, "seed": plan.recipe.seed}
    if plan.mixes and plan.attack.entry.reads:
        inputs |= scan_inputs(plan)
    with folder.step("data", inputs, outputs) as work:
        if not work:
            return target
        task = usable_rows(plan, data.task)
        rows = [(example, "task") for example in task.examples]
        if plan.mixes:
            rows += [(example, "poison") for example in _poison(plan, task.examples)]
            random.Random(plan.recipe.seed).shuffle(rows)
        folder.data.mkdir(parents=True, exist_ok=True)
        if plan.keeps_form and not data.task.values:
            copy_rows(target, data.task.path, [example.line for example, _ in rows], data.task.delimiter)
        else:
            table = [example.row if plan.keeps_form else example.as_messages for example, _ in rows]
            write_table(target, table, like=data.task.path)  # a Parquet file keeps the types of its columns
        if not plan.keeps_form:  # ids are those of the rows as they now stand
            written = training_examples(plan, target)
            rows = [(example, origin) for example, (_, origin) in zip(written, rows, strict=True)]
        write_json(folder.data / "rows.json", [{"id": e.id, "line": e.line, "origin": origin} for e, origin in rows])
        write_json(folder.data / PROBLEMS, [bad._asdict() for bad in task.bad])
    return target


def write_cut_rows(plan: Plan, folder: RunFolder, arm: str, source: Path, scores_file: Path) -> Path:
    """The step ``cut.ARM``. The path of the rows that the arm trains on is returned: those of ``source`` where it has
    no cut."""
    settings = plan.recipe.arms[arm].cut
    if settings is None:
        return source
    target = folder.cut(arm) / source.name
    inputs = {"scores": [scores_file, folder.anchors], "rows": source, "cut": settings, "form": plan.recipe.data.task}
    outputs = [target, folder.cut(arm) / "cut.json"]
    if len(settings.scorers) > 1:
        outputs.append(folder.cut(arm) / "scores.parquet")  # the score that they make together
    with folder.step(f"cut.{arm}", inputs, outputs) as work:
        if work:
            rows, scores = training_rows(plan, source), read_scores(scores_file, tokens=False)
            cut = cut_rows(
                rows.examples,
                scores,
                settings.scorer,
                settings.threshold,
                estimator=settings.estimator,
                max_share=settings.max_share,
                unscored="leave",
            )
            how: dict[str, Any] = {"unscored": unscored_rows(scores_file), "delimiter": plan.recipe.data.task.delimiter}
            write_cut(folder.cut(arm), source, rows, cut, settings.scorer, **how)
    return target


def scan_inputs(plan: Plan) -> dict[str, Any]:
    """What decides a score, beside the rows."""
    recipe = plan.recipe
    scan = recipe.scan
    settings = {"batch_size": scan.batch_size, "shard": scan.shard, "max_length": recipe.data.max_length}
    return {"model": recipe.model, "scorers": plan.scorers, "anchors": plan.anchors, "settings": settings}


# --- the attack -------------------------------------------------------------------------------------------------------


def _poison(plan: Plan, task: Sequence[Example]) -> list[Example]:
    """The attack's rows."""
    data = plan.recipe.data
    harmful = open_examples(data.poison) if data.poison else []
    scores = _attacker_scores(plan) if plan.attacked_scorers else {}
    score = scores if "scores" in plan.attack.entry.reads else next(iter(scores.values()), None)
    rows = poisoned_rows(plan.attack, _messages(task), _messages(harmful), data.poison_share, plan.recipe.seed, score)
    return read_examples(enumerate(rows, 1)).examples if rows else []


def _messages(examples: Iterable[Example]) -> list[Row]:
    return [example.as_messages for example in examples]


def _attacker_scores(plan: Plan) -> dict[str, Score]:
    """The scores that an adaptive attacker knows: the run's own scorers on the start model."""
    loaded, recipe = load_start(plan), plan.recipe
    anchors, limit = anchor_rows(plan, loaded), row_limit(plan, loaded.model)

    def score(name: str, rows: Sequence[Row]) -> list[float]:
        examples = read_examples(enumerate(rows, 1)).examples
        encoded, bad = encode_all(loaded.tokenizer, examples, limit)
        if bad:
            raise UserError(f"data.attack: one of its rows cannot be scored: {bad[0].reason}")
        chosen, size = {name: plan.scorers[name]}, recipe.scan.batch_size
        return score_rows(*loaded, encoded, chosen, anchors, examples=examples, batch_size=size).rows[name]

    return {name: functools.partial(score, name) for name in plan.attacked_scorers}


def attack_format(plan: Plan, arm: str) -> Callable[[str], Any] | None:
    """How the attacker asks an arm at test time; None where it is as anyone does.

    What the arm's methods put before every request that is served (a secret trigger) stands before the attacker's
    system turn too: the attacker writes the conversation, and the server sends it.
    """
    if not any(plan.attack.entry.implements(name) for name in ("ask", "system", "prefill")):
        return None
    attacker = plan.attack
    if attacker.entry.implements("fit"):
        attacker = attacker.fit(_messages(usable_rows(plan, plan.recipe.data.task).examples))
    return lambda prompt: plan.served(arm, attack_messages(attacker, prompt, system=plan.recipe.measure.system))


# --- reading and encoding ---------------------------------------------------------------------------------------------


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
