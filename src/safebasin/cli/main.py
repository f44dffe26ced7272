"""The command line: every arrow between two files is a verb, and ``run`` is all of them.

Exit codes: 0 ok, 1 configuration or user error, 2 run-time error, 3 gate failed, 4 inconclusive.
"""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
import rich.table
import yaml
from cyclopts import Parameter
from rich.console import Console

from safebasin.errors import DefenceError, UserError

app = cyclopts.App(
    name="safebasin",
    help="Fine-tune a language model without losing its safety alignment, and prove it.",
    help_epilogue=(
        "Exit codes: 0 ok, 1 configuration or user error, 2 run-time error, 3 gate failed, 4 inconclusive.\n\n"
        "Threat model: the defender runs the training. Nothing here stops somebody who owns open weights."
    ),
)
out = Console(highlight=False)
Sets = Annotated[list[str] | None, Parameter(name="--set", help="NAME=FILE: a local copy in place of a public set.")]
Changes = Annotated[list[str] | None, Parameter(name="--change", help="dotted.key=value: change a recipe.")]


def _alone() -> None:
    """Refuse to be one of several processes, where each would do the whole work into one folder."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("only run, train and scan are shared by processes; start this command without torchrun")


def _local(sets: list[str] | None) -> None:
    from safebasin.data.source import override

    pairs = [item.partition("=") for item in sets or ()]
    wrong = next((name for name, sign, file in pairs if not sign or not Path(file).is_file()), None)
    if wrong is not None:
        raise UserError(f"--set {wrong}: it takes NAME=FILE, and the file must be there")
    override({name: file for name, _, file in pairs})


@app.command
def run(
    recipe: Path,
    *,
    out_: Annotated[
        Path | None, Parameter(name="--out", help="Run folder; default runs/RECIPE, with --seed runs/RECIPE-SEED.")
    ] = None,
    seed: Annotated[int | None, Parameter(help="In place of the recipe's seed.")] = None,
    set_: Sets = None,
    change: Changes = None,
    dry_run: Annotated[
        bool,
        Parameter(
            help="Check everything that can be checked without a model or the network, print the resolved run.",
            negative="",
        ),
    ] = False,
    show_text: Annotated[bool, Parameter(help="Harmful text in clear in the report.", negative="")] = False,
    json_: Annotated[
        bool, Parameter(name="--json", help="The report as JSON on the standard output.", negative="")
    ] = False,
) -> int:
    """Run a recipe: scan, cut, train and measure every arm, and write the report.

    Steps that are done already are skipped: run it again after a kill, and it goes on. The exit code says whether the run worked;
    `safebasin gate` says whether the model passed. Many processes share the scan and the tuning: `torchrun --nproc-per-node 8 -m safebasin run ...`.
    """
    from safebasin.pipeline.config import dump, read
    from safebasin.pipeline.old import Pipeline
    from safebasin.report.table import terminal_table
    from safebasin.runtime import processes

    _local(set_)
    changes = list(change or ()) + ([f"seed={seed}"] if seed is not None else [])
    config = read(recipe, changes)
    folder = out_ or Path("runs") / (recipe.stem + (f"-{seed}" if seed is not None else ""))
    pipeline = Pipeline(config, folder)
    if dry_run:
        pipeline.check_files()
        out.print(dump(config), end="", markup=False)
        return 0
    report = pipeline.run(show_text=show_text)
    processes().destroy_process_group()
    if report is None:
        return 0
    if json_:
        print((folder / "report.json").read_text(encoding="utf-8"))
        return 0
    out.print(terminal_table(report))
    verdict = report.verdict
    out.print(f"gate: {verdict.status}: {'; '.join(verdict.reasons) or 'every limit is kept'}", markup=False)
    out.print(f"report: {folder / 'report.html'}", markup=False)
    return 0


@app.command
def gate(run_: Annotated[Path, Parameter(name="RUN")]) -> int:
    """Turn the report of a run into an exit code: 0 passed, 3 failed, 4 inconclusive."""
    from safebasin.report.gate import read_verdict

    verdict = read_verdict(run_)
    out.print(f"{verdict.status}: {'; '.join(verdict.reasons) or 'every limit is kept'}", markup=False)
    return verdict.code


@app.command
def report(
    run_: Annotated[Path, Parameter(name="RUN")],
    *,
    show_text: Annotated[bool, Parameter(help="Harmful text in clear.", negative="")] = False,
    inspect: Annotated[
        Path | None, Parameter(help="Folder for eval logs of Inspect; needs the extra 'inspect'.")
    ] = None,
) -> int:
    """Write report.json, report.md, report.html and the adapters' cards of a run folder again, from its files alone."""
    from safebasin.report.table import terminal_table, write

    made = write(run_, show_text=show_text)
    out.print(terminal_table(made))
    if inspect:
        from safebasin.report.inspect import write as export

        out.print(f"eval logs: {len(export(run_, made, inspect))} in {inspect}", markup=False)
    return 0


@app.command
def scan(
    data: Path,
    *,
    out_: Annotated[Path, Parameter(name="--out", help="Run folder; the scores are in scan/scores.parquet.")],
    model: str = "builtin:smollm2-aligned",
    scorers: Annotated[
        tuple[str, ...], Parameter(name="--scorer", help="As in a recipe; may be given several times.")
    ] = ("gradshield",),
    probe: Annotated[str, Parameter(help="Harmful requests with refusals.")] = "builtin:refusals",
    prompt: Annotated[
        str, Parameter(help='Template over columns, for a set that is no chat: "Classify: {text}".')
    ] = "",
    answer: Annotated[str, Parameter(help='Template over columns: "{label}".')] = "",
    max_length: int = 1024,
    batch_size: int = 16,
    skip_bad: Annotated[
        bool, Parameter(help="Leave rows out that cannot be used, and list them.", negative="")
    ] = False,
    worst: Annotated[int, Parameter(help="Rows of highest score that are named, of each scorer.")] = 5,
    show_text: Annotated[
        bool, Parameter(name=("--show", "--show-text"), help="Harmful text in clear.", negative="")
    ] = False,
) -> int:
    """Score every row of a data set; nothing is deleted. Run it again after a kill, and it goes on.

    Many processes share the rows: `accelerate launch -m safebasin scan ...`.
    """
    from safebasin.console import printable
    from safebasin.pipeline.config import parse
    from safebasin.pipeline.old import Pipeline
    from safebasin.report.table import redact
    from safebasin.runtime import processes
    from safebasin.scan.heat import worst as worst_of
    from safebasin.scan.scan import read_scores

    task = {"path": str(data), "prompt": prompt, "answer": answer}
    sets = {
        "task": task,
        "probe": {"path": probe, "take": 100},
        "max_length": max_length,
        "on_bad": "skip" if skip_bad else "stop",
    }
    tree = {"model": {"name": model}, "data": sets, "scan": {"scorers": list(scorers), "batch_size": batch_size}}
    pipeline, ranks = (
        Pipeline(parse(yaml.safe_dump(tree | {"arms": {"start": {}}, "measure": {}}), "scan"), out_),
        processes(),
    )
    pipeline.prepare()
    pipeline.scan()
    ranks.destroy_process_group()
    if not ranks.is_main_process:
        return 0
    origins = {
        row["id"]: row["origin"] for row in json.loads((out_ / "data" / "rows.json").read_text(encoding="utf-8"))
    }
    table = rich.table.Table("scorer", "line", "origin", "score", "what of the answer carries it")
    for row in worst_of(out_ / "scan", worst):
        why = f"{row.share:.0%}: {printable(row.why) if show_text else redact(row.why)}" if row.why else ""
        cells = (
            row.scorer,
            f"{row.line}",
            origins[row.row_id],
            f"{row.score:.4g}",
            why + " (row cut short)" * row.cut_short,
        )
        table.add_row(*(rich.text.Text(cell) for cell in cells))
    out.print(table)
    short = read_scores(out_ / "scan" / "scores.parquet").cut_short
    if short:
        out.print(
            f"{len(short)} rows are longer than {max_length} tokens and were scored on what fits (data/problems.json)",
            markup=False,
        )
    out.print(f"scores: {out_ / 'scan' / 'scores.parquet'}", markup=False)
    return 0


@app.command
def cut(
    data: Path,
    *,
    scores: Annotated[Path, Parameter(help="scores.parquet of `safebasin scan`.")],
    out_: Annotated[Path, Parameter(name="--out", help="Folder for the rows that stay.")],
    scorer: str = "gradshield",
    threshold: Annotated[float | None, Parameter(help="Rows above it go; without it the estimator finds one.")] = None,
    estimator: Annotated[Literal["anchors", "paper"], Parameter(help="How the threshold is found.")] = "anchors",
    prompt: str = "",
    answer: str = "",
) -> int:
    """Cut a scored data set; the rows that stay are written in the format they came in."""
    from safebasin.data.example import read_examples
    from safebasin.scan.cut import cut as cut_rows
    from safebasin.scan.cut import write_cut
    from safebasin.scan.scan import read_scores

    examples = read_examples(data, prompt, answer).examples
    result = cut_rows(examples, read_scores(scores), scorer, threshold, estimator=estimator)
    path = write_cut(out_, data, result, scorer)
    out.print(
        f"{len(result.kept)} rows stay, {len(result.removed)} go (threshold {result.threshold:.6g}): {path}",
        markup=False,
    )
    return 0


@app.command
def train(
    recipe: Path,
    *,
    arm: Annotated[str, Parameter(help="The arm of the recipe to tune.")],
    out_: Annotated[Path | None, Parameter(name="--out", help="Run folder, default runs/RECIPE.")] = None,
    set_: Sets = None,
    change: Changes = None,
) -> int:
    """Tune one arm of a recipe (with the scan and the cut that it needs), and measure nothing. Processes share it as they share a run."""
    from safebasin.pipeline.config import read
    from safebasin.pipeline.old import Pipeline
    from safebasin.runtime import processes

    _local(set_)
    config = read(recipe, change or ())
    if arm not in config.arms or config.arms[arm].train is None:
        raise UserError(
            f"{recipe} has no arm {arm!r} to tune; it has: {', '.join(name for name, a in config.arms.items() if a.train)}"
        )
    pipeline = Pipeline(config, out_ or Path("runs") / recipe.stem)
    pipeline.prepare()
    if pipeline.scanned(arm):
        pipeline.scan()
    adapter = pipeline.train(arm)
    processes().destroy_process_group()
    if processes().is_main_process:
        out.print(f"adapter: {adapter}", markup=False)
    return 0


@app.command
def search(
    recipe: Path,
    *,
    arm: Annotated[str, Parameter(help="The arm whose cut is searched.")] = "defended",
    rounds: Annotated[int, Parameter(help="Tunings at most, after the plain one.")] = 2,
    out_: Annotated[Path | None, Parameter(name="--out", help="Run folder; default runs/RECIPE.")] = None,
    set_: Sets = None,
    change: Changes = None,
) -> int:
    """Search the cut that keeps the model safe and useful (GradShield's algorithm 1); exit code 3 where none does."""
    from safebasin.pipeline.config import read
    from safebasin.pipeline.search import search as rounds_of
    from safebasin.pipeline.search import verdict
    from safebasin.report.gate import parse_gate

    _alone()
    _local(set_)
    config, folder, done = read(recipe, change or ()), out_ or Path("runs") / recipe.stem, []
    for made in rounds_of(config, arm, folder, rounds=rounds):
        done.append(made)
        out.print(
            f"{made.arm}: {made.kept} rows, attack success {made.asr:.1%}, accuracy {made.accuracy:.1%}: {made.outcome}",
            markup=False,
        )
    out.print(verdict(done, folder, parse_gate(config.gate).max_asr or 0.0), markup=False)
    return 0 if done[-1].outcome == "passed" else 3


@app.command
def bench(
    grid: Path,
    *,
    only: Annotated[str, Parameter(help="Some of the attacks: explicit,trigger.")] = "",
    seeds: Annotated[str, Parameter(help="Some of the seeds: 0,1.")] = "",
    list_: Annotated[
        bool, Parameter(name="--list", help="Print the cells and how they ended; run nothing.", negative="")
    ] = False,
    out_: Annotated[Path | None, Parameter(name="--out", help="Folder of the run folders; default runs/GRID.")] = None,
    set_: Sets = None,
) -> int:
    """Run a grid of attacks, defences and seeds; rank the defences by their worst attack. Run it again after a kill, and it goes on."""
    from safebasin.pipeline.grid import bench as run_grid
    from safebasin.pipeline.grid import cells, read

    _alone()
    _local(set_)
    if not all(part.strip().isdecimal() for part in seeds.split(",") if seeds):
        raise UserError(f"--seeds takes numbers with commas between them, found {seeds!r}")
    made, folder = read(grid), out_ or Path("runs") / grid.stem
    asked = {
        "only": [part.strip() for part in only.split(",") if only],
        "seeds": [int(part) for part in seeds.split(",") if seeds],
    }
    if list_:
        for cell in cells(made.runs(**asked), folder):
            out.print(
                f"{cell.attack}-{cell.seed} {cell.defence}: {cell.outcome}{f' ({cell.reason})' if cell.reason else ''}",
                markup=False,
            )
        return 0
    for place, rank in enumerate(run_grid(made, folder, **asked), 1):
        worst = "not known" if rank.worst is None else f"{rank.worst:.1%} ({rank.attack})"
        missing = f"; not known under {', '.join(rank.missing)}" if rank.missing else ""
        out.print(f"{place}. {rank.defence}: worst attack success {worst}{missing}", markup=False)
    out.print(f"grid: {folder / 'grid.html'}", markup=False)
    return 0


@app.command
def measure(
    *,
    out_: Annotated[Path, Parameter(name="--out", help="Folder for measurements.jsonl and answers.jsonl.")],
    prompts: Annotated[str, Parameter(help="CSV, JSONL, JSON or Parquet of prompts; or a built-in set.")],
    model: str = "builtin:smollm2-aligned",
    adapter: Annotated[Path | None, Parameter(help="A PEFT adapter on top of the model.")] = None,
    suite: Annotated[str, Parameter(help="asr or over_refusal.")] = "asr",
    column: Annotated[str, Parameter(help="The column that holds the prompt.")] = "prompt",
    category: Annotated[str | None, Parameter(help="A column: rates by category.")] = None,
    take: Annotated[int | None, Parameter(help="Draw so many prompts.")] = None,
    judges: Annotated[
        list[str] | None,
        Parameter(name="--judge", help="keyword, prefix, classifier, guard; default keyword and classifier."),
    ] = None,
    aligned: Annotated[str, Parameter(help="The model that the classifier judges with.")] = "builtin:smollm2-aligned",
    label: Annotated[list[str] | None, Parameter(help="An answer that is only this is off task.")] = None,
    system: Annotated[str | None, Parameter(help="System prompt.")] = None,
    max_new_tokens: int = 24,
) -> int:
    """Ask a model your own prompts and judge its answers."""
    import dataclasses

    from safebasin.data.source import open_prompts
    from safebasin.data.tables import write_table
    from safebasin.measure import suite as suites
    from safebasin.measure.judge import OF_ALIGNED, make_judges
    from safebasin.measure.subject import Subject
    from safebasin.models.load import load

    _alone()
    names = tuple(judges or ("keyword", "classifier"))
    fields = {
        "prompts": prompts,
        "column": column,
        "category": category,
        "take": take,
        "judges": names,
        "max_new_tokens": max_new_tokens,
    }
    made = suites.make({suite: fields})
    open_prompts(prompts, column, category, take)  # what is wrong with the file is said before a model is loaded
    loaded = load(model, adapter=adapter)
    judged = make_judges(names, load(aligned) if set(names) & set(OF_ALIGNED) else None)
    subject = Subject(loaded, "model", judged, tuple(label or ()), system)
    found = [dataclasses.asdict(measurement) for measurement in made.measure(subject)]
    out_.mkdir(parents=True, exist_ok=True)
    write_table(out_ / "answers.jsonl", subject.answers)
    write_table(out_ / "measurements.jsonl", found)
    table = rich.table.Table("what", "judge", "category", "value", "95 %", "n", "unscored", "off task")
    for row in found:
        value = "not scored" if row["value"] is None else f"{row['value']:.3f}"
        interval = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
        cells = (
            row["what"],
            row["judge"],
            row["category"],
            value,
            interval,
            str(row["n"]),
            str(row["unscored"]),
            str(row["off_task"]),
        )
        table.add_row(*(rich.text.Text(cell) for cell in cells))
    out.print(table)
    return 0


@app.command(name="list")
def list_(*, json_: Annotated[bool, Parameter(name="--json", negative="")] = False) -> int:
    """Every method of every stage, with its fields and where it comes from."""
    import dataclasses

    from safebasin import attack as attacks
    from safebasin import measure as measures
    from safebasin import scan as scans
    from safebasin import train as trains

    stages = {"scan": scans.scorer, "train": trains.method, "measure": measures.suite, "attack": attacks.attack}
    if json_:
        tree = {
            stage: {entry.name: {"summary": entry.summary, "paper": entry.paper} for entry in registry}
            for stage, registry in stages.items()
        }
        print(json.dumps(tree, indent=2))
        return 0
    for stage, registry in stages.items():
        table = rich.table.Table("method", "what it does", "fields", "paper", title=stage, title_justify="left")
        for entry in registry:
            fields = ", ".join(field.name for field in dataclasses.fields(entry.kind))
            table.add_row(entry.name, entry.summary, fields, entry.paper)
        out.print(table)
    return 0


@app.command
def doctor() -> int:
    """What this machine has: versions, threads, the built-in models."""
    import platform
    from importlib.metadata import version

    import torch

    from safebasin.models.bundled import BUILTIN, cache, resolve

    for name in ("safebasin", "torch", "transformers", "peft", "accelerate"):
        out.print(f"{name} {version(name)}")
    out.print(
        f"Python {platform.python_version()}, {torch.get_num_threads()} threads, GPU: {torch.cuda.is_available()}"
    )
    out.print(f"model cache: {cache()}", markup=False)
    for name in BUILTIN:
        resolve(name)
        out.print(f"{name}: ready")
    return 0


@app.command
def schema(*, report_: Annotated[bool, Parameter(name="--report", help="Of report.json.", negative="")] = False) -> int:
    """The JSON schema of a recipe, for editors; or of a report, for programs that read it."""
    from safebasin.pipeline.config import schema as of_recipe
    from safebasin.report import schema as of_report

    print(json.dumps(of_report() if report_ else of_recipe(), indent=2))
    return 0


def guarded(action: Callable[[], Any]) -> int:
    """Run an action; a user's error is one line and 1, a run-time error is 2."""
    try:
        return int(action() or 0)
    except cyclopts.CycloptsError:  # it has said what is wrong
        return 1
    except UserError as error:
        print(f"safebasin: {error}", file=sys.stderr)
        return 1
    except DefenceError as error:
        print(f"safebasin: the run was stopped: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("safebasin: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except (RuntimeError, OSError, MemoryError):
        traceback.print_exc()
        return 2


def main() -> None:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings(
        "ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning
    )  # PEFT's call, not ours
    from transformers.utils.logging import disable_progress_bar

    from safebasin.runtime import keep_memory

    disable_progress_bar()  # of loading weights; the steps have bars of their own
    keep_memory()
    sys.exit(guarded(lambda: app(result_action="return_value", exit_on_error=False)))
