"""The Python interface: the verbs of the command line as functions, for notebooks and for programs.

The examples run as they stand, on the built-in model and rows; tests/test_api.py runs them. More than 250 lines, since
more than half of them are documentation and examples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safebasin.data.example import Example, Rows, read_examples
from safebasin.data.keys import RowForm
from safebasin.errors import UserError

if TYPE_CHECKING:
    from safebasin.data.records import Measurement
    from safebasin.models.load import ModelAndTokenizer
    from safebasin.pipeline.config import Recipe
    from safebasin.pipeline.preview import Preview
    from safebasin.report.report import Report
    from safebasin.scan.cut import Cut
    from safebasin.scan.scores import Scores

ALIGNED = "builtin:smollm2-aligned"


def __getattr__(name: str) -> Any:
    if name == "Oracle":
        from safebasin.train.oracle import Oracle

        return Oracle
    raise AttributeError(f"module 'safebasin.api' has no attribute {name!r}")


def read_rows(
    source: str | Path | Iterable[Mapping[str, Any]], *, prompt: str = "", answer: str = "", **form: Any
) -> Rows:
    """Rows of a file, a built-in set, a set of the Hub, or a list of dicts, read to one form.

    Args:
        source: a path (JSONL, JSON, CSV, Parquet), ``builtin:NAME``, ``owner/name:split``, or the rows themselves.
        prompt: a template over the columns, for sets that are no chats: ``"Classify: {text}"``.
        answer: the same for the answer: ``"{label}"``.
        form: the other fields of ``safebasin.data.keys.RowForm``: ``columns``, ``ignore``, ``turns``, ...

    Returns:
        ``examples``, the usable rows in their order, and ``bad``, the others with line and reason.

    Raises:
        UserError: no such file or set, no rows, or a table that does not give its rows as dicts.

    >>> rows = read_rows([{"prompt": "Name a fruit.", "completion": "Apple."}, {"prompt": "Name a bird."}])
    >>> [example.answer for example in rows.examples], rows.bad[0].reason
    (['Apple.'], 'no answer: ...')
    """
    if isinstance(source, str | Path):
        from safebasin.data.source import Source, open_rows

        return open_rows(Source(path=str(source), prompt=prompt, answer=answer, **form))
    try:
        rows = list(source)
    except TypeError:  # no rows at all
        raise UserError(f"rows are dicts, one a row; found {type(source).__name__}") from None
    if rows and not any(isinstance(row, Mapping) for row in rows):
        raise UserError(
            f"rows are dicts, one a row; found {type(source).__name__} of {type(rows[0]).__name__}; write a table as "
            "table.to_pylist() or frame.to_dict('records'), and name a file by its path"
        )
    return read_examples(enumerate(rows, 1), RowForm(prompt=prompt, answer=answer, **form))


def load_model(
    name: str | Path = ALIGNED, *, dtype: str = "auto", adapter: str | Path | None = None
) -> ModelAndTokenizer:
    """A model with its tokenizer, from a folder, the Hub or ``builtin:smollm2-aligned``; an adapter stays
    beside its weights.

    Raises:
        UserError: it cannot be loaded, is damaged, or has no chat template.

    >>> model, tokenizer = load_model("builtin:smollm2-aligned")
    >>> model.config.num_hidden_layers
    30
    """
    from safebasin.models.load import load

    return load(str(name), dtype=dtype, adapter=adapter)


def preview_rows(rows: Rows | Sequence[Example], tokenizer: Any, *, max_length: int = 1024) -> list[Preview]:
    """The text that the model will see of every row, and which of it is learned.

    >>> rows = read_rows([{"prompt": "Name a fruit.", "completion": "Apple."}])
    >>> preview_rows(rows, load_model().tokenizer)[0].trained
    'Apple.<|im_end|>'
    """
    from safebasin.pipeline.preview import preview_rows as previews

    return previews(tokenizer, rows if isinstance(rows, Rows) else Rows(_examples(rows), []), max_length)


def scan_rows(
    rows: Rows | Sequence[Example],
    model: str | Path | ModelAndTokenizer = ALIGNED,
    *,
    scorers: Sequence[str | Mapping[str, Any]] = ("gradshield",),
    max_length: int = 1024,
    batch_size: int = 16,
) -> Scores:
    """Score every row by every scorer; high = harmful. Nothing is deleted.

    Args:
        rows: as ``read_rows`` gives them.
        model: the aligned model, by name or loaded.
        scorers: as in a recipe: ``"gradshield"`` or ``{"gradshield": {"depth": 1.0}}``.
        max_length: tokens, at most the context of the model; a longer row is scored on what fits; its id is in
            ``cut_short``.
        batch_size: rows a forward pass.

    Raises:
        UserError: an unknown scorer or field, a row that cannot be encoded, or a model that does not refuse the probe.
        DefenceError: a score that is not finite.

    >>> rows = read_rows([{"prompt": "Name a fruit.", "completion": "Apple."}])
    >>> scores = scan_rows(rows)
    >>> len(scores.columns["gradshield"])
    1
    """
    from safebasin.encode import shorten
    from safebasin.models.parts import context_length
    from safebasin.registry import split_spec
    from safebasin.scan import scorer
    from safebasin.scan.scan import score_rows
    from safebasin.scan.scores import Scores

    examples, loaded, scorers = _examples(rows), _loaded(model), _listed(scorers)
    anchors = _anchors(loaded)
    methods = {split_spec(spec, "scan")[0]: scorer.make(spec) for spec in scorers}
    if len(methods) < len(scorers):
        raise UserError(f"scorers names one scorer twice, and a column has one name: {', '.join(methods)}")
    length = min(max_length, context_length(loaded.model))
    tokenized = [shorten(row, length) for row in _encoded(loaded.tokenizer, examples)]
    scanned = score_rows(*loaded, tokenized, methods, anchors, examples=examples, batch_size=batch_size)
    ids, lines = [example.id for example in examples], [example.line for example in examples]
    return Scores(ids, lines, scanned.rows, scanned.tokens, scanned.anchors, scanned.cut_short)


def cut_rows(
    rows: Rows | Sequence[Example],
    scores: Scores,
    scorer: str | Sequence[str] = "gradshield",
    threshold: float | None = None,
    *,
    max_share: float = 0.5,
) -> Cut:
    """Keep the rows whose score is at most a threshold; without one it is found between the anchors' scores.

    Returns:
        ``remaining`` and ``removed`` rows, in their order, and the ``threshold``.

    Raises:
        UserError: no scores by this scorer, a row without one, or a larger share of the rows would go than
            ``max_share``.
        DefenceError: the scorer does not prove itself on the anchor rows.

    >>> rows = read_rows([{"prompt": "Name a fruit.", "completion": "Apple."}])
    >>> len(cut_rows(rows, scan_rows(rows)).remaining)
    1
    """
    from safebasin.scan.cut import cut_rows as cut

    return cut(_examples(rows), scores, scorer, threshold, max_share=max_share)


def read_recipe(
    recipe: str | Path | Mapping[str, Any], changes: Sequence[str] = (), sets: Mapping[str, str] | None = None
) -> Recipe:
    """A recipe from a file, a shipped one (``builtin:quickstart``), or a tree of dicts, checked.

    Raises:
        UserError: an unknown key, a value of the wrong kind or outside its bounds.

    >>> read_recipe("builtin:quickstart", changes=["seed=3"]).seed
    3
    """
    from safebasin.pipeline.config import Recipe
    from safebasin.pipeline.parse import edited, validate
    from safebasin.pipeline.recipes import read_recipe as read

    changes = _listed(changes)
    if isinstance(recipe, Mapping):
        return validate(Recipe, edited(recipe, "the recipe", changes, sets), "the recipe")
    return read(Path(recipe), changes, sets)


def train_adapter(recipe: Recipe | str | Path | Mapping[str, Any], arm: str, out: str | Path) -> Path:
    """Tune one arm of a recipe, with the scan and the cut that it needs; the folder of its adapter is returned.

    Steps that are done in ``out`` are not done again, also after a kill.

    Raises:
        UserError: the recipe is refused, has no such arm, or the arm is not tuned.
        DefenceError: a defence cannot run.

    >>> import tempfile
    >>> quick = ["data.task.take=8", "data.poison_share=0", "data.poison=null", "train.max_steps=1"]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     adapter = train_adapter(read_recipe("builtin:quickstart", quick), "plain", folder)
    ...     sorted(path.suffix for path in adapter.iterdir())
    ['.json', '.safetensors']
    """
    from safebasin.pipeline.run import Run

    recipe = _checked(recipe)
    tuned = [name for name, each in recipe.arms.items() if each.train is not None or each.repair is not None]
    if arm not in tuned:
        raise UserError(f"the recipe has no arm {arm!r} to tune; it has: {', '.join(tuned) or 'none'}")
    with Run(recipe, Path(out)) as run:
        adapter = run.ensure(arm)
    assert adapter is not None
    return adapter


def measure_model(
    model: str | Path | ModelAndTokenizer = ALIGNED,
    *,
    suites: Sequence[str | Mapping[str, Any]],
    adapter: str | Path | None = None,
    aligned: str | Path | ModelAndTokenizer = ALIGNED,
    labels: Sequence[str] = (),
    system: str | None = None,
) -> list[Measurement]:
    """Ask a model the prompts of suites and judge its answers.

    Args:
        model: by name or loaded.
        suites: as in a recipe: ``{"asr": {"prompts": "builtin:harmful-test", "take": 30}}``.
        adapter: beside the weights of a model that is named; a model that is loaded has its own.
        aligned: the model that judges such as ``classifier`` read.
        labels: answers that are only one of these are off task.
        system: the system prompt.

    Raises:
        UserError: a model, a suite or a judge that is refused.

    Returns:
        One measurement a quantity, judge and category: value, 95 % interval, n, unscored, off task.

    >>> suite = {"asr": {"prompts": "builtin:harmful-test", "take": 2, "judges": ["keyword"]}}
    >>> [measurement.n for measurement in measure_model(suites=[suite])]
    [2]
    """
    from safebasin.measure import suite
    from safebasin.measure.judging import check_judges, make_judges, needs_aligned
    from safebasin.measure.subject import Subject
    from safebasin.models.hooks import evaluating

    methods = [suite.make(spec) for spec in _listed(suites)]
    names = tuple(dict.fromkeys(name for each in methods for name in getattr(each, "judges", ())))
    check_judges(names, {})
    loaded = _loaded(model, adapter)
    reads = _loaded(aligned) if needs_aligned(names) else None
    with contextlib.ExitStack() as modes:
        for each in filter(None, (loaded, reads)):
            modes.enter_context(evaluating(each.model))
        subject = Subject(loaded, "model", make_judges(names, reads, {}), labels, system)
        return [measurement for each in methods for measurement in each.measure(subject)]


def mixed_answers(
    prompts: Sequence[str | Sequence[Mapping[str, Any]]],
    tuned: ModelAndTokenizer,
    *,
    share: float = 0.3,
    guard: str | Mapping[str, Any] | None = None,
    above: float = 0.9,
    max_new_tokens: int = 96,
) -> list[str]:
    """Greedy answers from the logits of a start and its tuned self, mixed (arXiv:2506.00166); two forwards a token.

    Args:
        prompts: requests, or whole conversations.
        tuned: a model with its adapter beside the weights: ``load_model(START, adapter=FOLDER)``.
        share: of the start's logits, above 0 and at most 1.
        guard: a scorer that gives probabilities, ``"dsa"`` or ``{"guard": {"model": ...}}``; requests that it gives no
            more than ``above`` are answered by the tuned model alone. None: every request is mixed.
        above: P(unsafe) of a request.
        max_new_tokens: of an answer.

    Raises:
        UserError: a share, a guard or a request that is refused.
        DefenceError: the model has no adapter.

    >>> import tempfile
    >>> quick = ["data.task.take=8", "data.poison_share=0", "data.poison=null", "train.max_steps=1"]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tuned = load_model(adapter=train_adapter(read_recipe("builtin:quickstart", quick), "plain", folder))
    >>> len(mixed_answers(["Name a fruit."], tuned, max_new_tokens=4))
    1
    """
    from safebasin.models.hooks import evaluating
    from safebasin.pipeline.config import Mix
    from safebasin.pipeline.mix import mixing
    from safebasin.pipeline.parse import validate
    from safebasin.scan import scorer

    settings = validate(Mix, {"share": share, "guard": guard, "above": above}, "mixed_answers")
    method = scorer.make(settings.guard) if settings.guard else None
    if method and not method.entry.probability:
        raise UserError(f"mixed_answers: {method.entry.name} gives no probability that a request is unsafe")
    tuned = _loaded(tuned)
    turns = [[{"role": "user", "content": each}] if isinstance(each, str) else each for each in _listed(prompts)]
    with evaluating(tuned.model):
        mix = mixing(settings, method, tuned, _anchors(tuned) if method else {})
        return [answer.text for answer in mix.answers(tuned, turns, max_new_tokens=max_new_tokens)]


def run_recipe(recipe: Recipe | str | Path | Mapping[str, Any], out: str | Path) -> Report | None:
    """Run a recipe: scan, cut, train and measure every arm, and write the report. None where another process writes it.

    Steps that are done in ``out`` are not done again, also after a kill. ``report.verdict`` is what ``safebasin gate``
    says.

    >>> import tempfile
    >>> quick = ["data.task.take=8", "data.poison_share=0", "data.poison=null", "arms={start: {}}", "gate={max_asr: 1}"]
    >>> suite = "measure.suites=[{asr: {prompts: builtin:harmful-test, take: 2, judges: [keyword], max_new_tokens: 4}}]"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = run_recipe(read_recipe("builtin:quickstart", [*quick, suite]), folder)
    >>> report.verdict.status
    'inconclusive'
    """
    from safebasin.pipeline.run import Run

    with Run(_checked(recipe), Path(out)) as run:
        return run.report()


def write_report(run: str | Path, *, show_text: bool = False) -> Report:
    """Write report.json, report.md, report.html and the adapters' cards of a run folder again, from its files alone.

    Raises:
        UserError: no such run folder, or a file of it is damaged.

    >>> write_report("no/such/run")
    Traceback (most recent call last):
    safebasin.errors.UserError: no such run folder: no/such/run
    """
    from safebasin.report.table import write_report as write

    return write(Path(run), show_text=show_text)


def _loaded(model: Any, adapter: str | Path | None = None) -> ModelAndTokenizer:
    """A model by name, with an adapter beside it, or as it was loaded."""
    from safebasin.models.load import ModelAndTokenizer

    if isinstance(model, str | Path):
        return load_model(model, adapter=adapter)
    if adapter is not None:
        raise UserError("adapter is for a model that is named; give this one by name, or loaded with its adapter")
    if not isinstance(model, tuple) or len(model) != 2:
        raise UserError(f"a model is a name, or a pair of model and tokenizer; found {type(model).__name__}")
    if any(p.is_meta for p in model[0].parameters()):
        raise UserError("the model is on the meta device, so it has no weights; load them: safebasin.load_model")
    return ModelAndTokenizer(*model)


def _examples(rows: Any) -> list[Example]:
    examples = list(rows.examples if isinstance(rows, Rows) else rows)
    if not all(isinstance(each, Example) for each in examples):
        raise UserError("rows are what safebasin.read_rows gives; read these first")
    return examples


def _listed(values: Any) -> list[Any]:
    """Several values as a list; one alone is refused: the letters of a text are none of them."""
    if isinstance(values, str | Mapping):
        raise UserError(f"a list is needed, found one {type(values).__name__}; write [{str(values)[:40]!r}]")
    return list(values)


def _encoded(tokenizer: Any, examples: Sequence[Example]) -> list[Any]:
    import sys

    from safebasin.encode import encode_all

    tokenized, bad = encode_all(tokenizer, examples, sys.maxsize)
    if bad:
        raise UserError(f"row {bad[0].line} cannot be encoded: {bad[0].reason}")
    return tokenized


def _anchors(loaded: ModelAndTokenizer) -> dict[str, list[Any]]:
    """The sets that scorers are fitted to where a recipe names no other."""
    from safebasin.data.source import Source, open_examples
    from safebasin.pipeline.config import Data
    from safebasin.scan.probe import cut_to_context

    data = Data(task=Source(path=""))
    sets = {
        name: _encoded(loaded.tokenizer, open_examples(getattr(data, name))) for name in ("probe", "harmful", "safe")
    }
    return {name: cut_to_context(loaded.model, rows, f"the anchor set {name}") for name, rows in sets.items()}


def _checked(recipe: Recipe | str | Path | Mapping[str, Any]) -> Recipe:
    from safebasin.pipeline.config import Recipe

    return recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
