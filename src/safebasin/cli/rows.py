"""Verbs on a data set: preview, scan, cut, convert."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import rich.table
from cyclopts import Parameter
from rich.text import Text

from safebasin.cli.options import Dtype, Engine, MaxLength, Model, cells, out, say, start_torch
from safebasin.console import printable
from safebasin.data.keys import RowForm
from safebasin.errors import UserError
from safebasin.pipeline import yaml12


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandForm(RowForm):
    """``RowForm`` with a mapping that a command line can write."""

    columns: Annotated[
        dict[str, str],
        Parameter(
            help="--columns.KEY NAME: how these rows call a key of the table; {messages: dialog} of a recipe is "
            "--columns.messages dialog."
        ),
    ] = dataclasses.field(default_factory=dict)  # type: ignore[assignment]


Data = Annotated[Path, Parameter(help="Rows: JSONL, JSON, CSV or Parquet.")]
PLAIN = CommandForm()
Form = Annotated[CommandForm, Parameter(name="*", help="How the rows are read.")]
TemplateArguments = Annotated[
    tuple[str, ...],
    Parameter(name="--template", help="NAME=VALUE: a variable of the chat template, as in model.template."),
]


def arguments_of(items: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE of the command line, the value in YAML.

    Raises:
        UserError: no ``=``.
    """
    if wrong := next((item for item in items if "=" not in item), ""):
        raise UserError(f"--template takes NAME=VALUE, found {wrong!r}")
    return {name: yaml12.load(value, "--template") for name, _, value in (item.partition("=") for item in items)}


def preview_verb(
    data: Data,
    *,
    model: Model = "builtin:smollm2-aligned",
    form: Form = PLAIN,
    template: TemplateArguments = (),
    max_length: MaxLength = 1024,
    take: Annotated[int, Parameter(help="Rows that are shown; with --json all of them are.")] = 5,
    json_: Annotated[bool, Parameter(name="--json", help="Every row as one JSON object a line.")] = False,
) -> int:
    """Show the text that the model will see of every row, and which of it is learned."""
    start_torch()
    from safebasin.data.example import read_examples
    from safebasin.models.load import load_tokenizer
    from safebasin.pipeline.preview import preview_rows

    rows = read_examples(data, form)
    shown = preview_rows(load_tokenizer(model, template=arguments_of(template)), rows, max_length)
    if json_:
        for row in shown:
            utf8 = (sys.stdout.encoding or "utf-8").lower() in ("utf-8", "utf8")  # JSON has escapes of its own
            sys.stdout.write(json.dumps(row.as_json(), ensure_ascii=not utf8) + "\n")
        return 0
    for row in shown[:take]:
        out.print(Text(f"line {row.line}", style="bold"))
        if row.bad:
            out.print(Text(f"  not used: {printable(row.bad)}"))
            continue
        text = Text("  ")
        for part, learned in row.parts:
            text.append(printable(part, 2000), style="bold green" if learned else "dim")
        out.print(text)
        if row.note:
            out.print(Text(f"  {printable(row.note)}"))
    usable = sum(not row.bad for row in shown)
    say(f"{usable} of {len(shown)} rows are used; what is learned is bold and green")
    return 0


def scan_verb(
    data: Data,
    *,
    out_: Annotated[Path, Parameter(name="--out", help="Run folder; the scores are in scan/scores.parquet.")],
    model: Model = "builtin:smollm2-aligned",
    dtype: Dtype = "auto",
    scorers: Annotated[
        tuple[str, ...], Parameter(name="--scorer", help="As in a recipe; may be given several times.")
    ] = ("gradshield",),
    probe: Annotated[str, Parameter(help="Harmful requests with refusals.")] = "builtin:refusals",
    form: Form = PLAIN,
    template: TemplateArguments = (),
    max_length: MaxLength = 1024,
    batch_size: Annotated[int, Parameter(help="Rows that are scored at once.")] = 16,
    engine: Engine = "here",
    skip_bad: Annotated[bool, Parameter(help="Leave rows out that cannot be used, and list them.")] = False,
    worst: Annotated[int, Parameter(help="Rows of highest score that are named, of each scorer.")] = 5,
    show_text: Annotated[bool, Parameter(name=("--show", "--show-text"), help="Harmful text in clear.")] = False,
) -> int:
    """Score every row of a data set; nothing is deleted. Run it again after a kill, and it goes on.

    Several processes share the rows: `accelerate launch -m safebasin scan ...`.
    """
    start_torch()
    from safebasin.pipeline.config import Recipe
    from safebasin.pipeline.parse import plain, validate
    from safebasin.pipeline.run import Run
    from safebasin.report.files import redact
    from safebasin.runtime import processes
    from safebasin.scan.heat import worst_rows
    from safebasin.scan.scores import read_scores

    task = {"path": str(data), **plain(form)}
    sets = {"task": task, "probe": {"path": probe, "take": 100}, "max_length": max_length}
    tree = {
        "model": {"name": model, "dtype": dtype, "template": arguments_of(template)},
        "data": {**sets, "on_bad": "skip" if skip_bad else "stop"},
        "scan": {"scorers": list(scorers), "batch_size": batch_size},
        "arms": {"start": {}},
        "measure": {},
        "engine": yaml12.load(engine, "--engine"),
    }
    with Run(validate(Recipe, tree, "scan"), out_) as run:
        path = run.scores
    processes().destroy_process_group()
    if not processes().is_main_process:
        return 0
    origins = {
        row["id"]: row["origin"] for row in json.loads((out_ / "data" / "rows.json").read_text(encoding="utf-8"))
    }
    table = rich.table.Table("scorer", "line", "origin", "score", "what of the answer carries it")
    for row in worst_rows(path.parent, worst):
        why = f"{row.share:.0%}: {row.why if show_text else redact(row.why)}" if row.why else ""
        cut_short = " (row cut short)" if row.cut_short else ""
        cells(table, row.scorer, str(row.line), origins[row.row_id], f"{row.score:.4g}", why + cut_short)
    out.print(table)
    cut_short_rows = read_scores(path, tokens=False).cut_short
    if cut_short_rows:
        long = f"{len(cut_short_rows)} rows are longer than {max_length} tokens"
        say(f"{long} and were scored on what fits (scan/problems.json)")
    say(f"scores: {path}")
    return 0


def cut_verb(
    data: Data,
    *,
    scores: Annotated[Path, Parameter(help="scores.parquet of `safebasin scan`.")],
    out_: Annotated[Path, Parameter(name="--out", help="Folder for the rows that stay.")],
    scorer: Annotated[str, Parameter(help="The column of scores to cut by.")] = "gradshield",
    threshold: Annotated[float | None, Parameter(help="Rows above it go; without it the estimator finds one.")] = None,
    estimator: Annotated[Literal["anchors", "paper"], Parameter(help="How the threshold is found.")] = "anchors",
    max_share: Annotated[float, Parameter(help="Of the rows, that may go; where more would, it stops.")] = 0.5,
    form: Form = PLAIN,
) -> int:
    """Cut a scored data set; the rows that stay are written in the format they came in."""
    from safebasin.data.example import read_examples
    from safebasin.data.files import shown
    from safebasin.scan.cut import cut_rows, write_cut
    from safebasin.scan.scores import read_scores, unscored_rows

    rows = read_examples(data, form)
    if not rows.examples:
        raise UserError(f"{shown(data)}: no row can be used (line {rows.bad[0].line}: {rows.bad[0].reason})")
    how: dict[str, Any] = {"estimator": estimator, "max_share": max_share, "unscored": "leave"}
    result = cut_rows(rows.examples, read_scores(scores, tokens=False), scorer, threshold, **how)
    path = write_cut(out_, data, rows, result, scorer, unscored=unscored_rows(scores), delimiter=form.delimiter)
    stay, go = len(result.remaining), len(result.removed)
    say(f"{stay} rows stay, {go} go (threshold {result.threshold:.6g}): {path}")
    if refused := len(rows.examples) + len(rows.bad) - stay - go:
        say(f"{refused} rows are refused and left out: they cannot be used; cut.json has their lines and reasons")
    return 0


def convert_verb(
    data: Data,
    *,
    as_: Annotated[
        Literal["trl", "axolotl", "llamafactory", "openai", "tokens"],
        Parameter(name="--as", help="The trainer; tokens: ids and labels, for any of them."),
    ],
    to: Annotated[Path, Parameter(help="Folder for the rows and the trainer's entry for them.")],
    scores: Annotated[Path | None, Parameter(help="scores.parquet of `safebasin scan`, for --weights.")] = None,
    weights: Annotated[str, Parameter(help="The scorer whose numbers weigh each token; with --as tokens.")] = "",
    model: Annotated[str, Parameter(help="Whose tokenizer and template write tokens.")] = "builtin:smollm2-aligned",
    form: Form = PLAIN,
    template: TemplateArguments = (),
    max_length: MaxLength = 1024,
    skip_bad: Annotated[
        bool, Parameter(help="Leave rows out that cannot be used, or that the form cannot hold.")
    ] = False,
) -> int:
    """Write a data set in the form of another trainer, with no answer learned that is not learned here."""
    if bool(weights) != (scores is not None) or (weights and as_ != "tokens"):
        raise UserError("--weights and --scores go together, with --as tokens: no other form holds a number a token")
    start_torch()
    from safebasin.data.example import read_examples
    from safebasin.models.load import load_tokenizer
    from safebasin.pipeline.convert import as_messages, as_tokens, write_converted
    from safebasin.scan.scores import read_scores

    rows = read_examples(data, form)
    if as_ == "tokens":
        tokenizer = load_tokenizer(model, template=arguments_of(template))
        table = read_scores(scores) if scores is not None else None
        converted = as_tokens(rows.examples, tokenizer, max_length, table, weights)
    else:
        converted = as_messages(rows.examples, as_)
    bad = sorted([*rows.bad, *converted.bad])
    listed = "; ".join(f"line {each.line}: {each.reason}" for each in bad[:3])
    if not converted.rows or (bad and not skip_bad):
        raise UserError(f"{len(bad)} rows cannot be converted ({listed}); correct them, or --skip-bad")
    write_converted(to, converted, as_)
    say(f"{len(converted.rows)} rows: {to / 'train.jsonl'}")
    if bad:
        say(f"{len(bad)} rows are left out ({listed})")
    for note in converted.notes:
        say(f"{as_}: {note}")
    return 0
