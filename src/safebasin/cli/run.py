"""Verbs that walk a recipe: run, train, search, bench."""

import dataclasses
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from safebasin.cli.options import (
    Changes,
    Engine,
    Events,
    RunFolderOption,
    Sets,
    ShowText,
    on_engine,
    out,
    refuse_processes,
    say,
    start_events,
    start_torch,
)
from safebasin.errors import UserError
from safebasin.events import emit


def run_verb(
    recipe: Annotated[Path, Parameter(help="A recipe's file, or builtin:quickstart, builtin:own, ...")],
    *,
    out_: Annotated[
        Path | None, Parameter(name="--out", help="Run folder; default runs/RECIPE, with --seed runs/RECIPE-SEED.")
    ] = None,
    seed: Annotated[int | None, Parameter(help="In place of the recipe's seed.")] = None,
    set_: Sets = (),
    change: Changes = (),
    dry_run: Annotated[
        bool,
        Parameter(
            help="Check everything that can be checked without a model or the network; print the resolved recipe and"
            " what tuning will take."
        ),
    ] = False,
    show_text: ShowText = False,
    engine: Engine = "",
    json_: Annotated[bool, Parameter(name="--json", help="The report as JSON on the standard output.")] = False,
    events: Events = None,
) -> int:
    """Run a recipe: scan, cut, train and measure every arm, and write the report.

    Steps that are done already are skipped: run it again after a kill, and it goes on. The exit code says whether the
    run worked; `safebasin gate` says whether the model passed. Several processes share the scan and the tuning:
    `torchrun --nproc-per-node 8 -m safebasin run ...`.
    """
    start_events(events)
    start_torch()
    from safebasin.pipeline.cost import costs
    from safebasin.pipeline.parse import dump, parse_sets
    from safebasin.pipeline.plan import Plan
    from safebasin.pipeline.read import check_column_files
    from safebasin.pipeline.recipes import read_recipe
    from safebasin.pipeline.roles import check_tuned_roles
    from safebasin.pipeline.run import Run
    from safebasin.report.table import terminal_table
    from safebasin.runtime import processes

    changes = [*change, *on_engine(engine), *([f"seed={seed}"] if seed is not None else [])]
    config = read_recipe(recipe, changes, parse_sets(set_))
    folder = out_ or _folder(recipe, f"-{seed}" if seed is not None else "")
    if dry_run:
        plan = Plan.of(config)
        plan.check_gate()
        plan.check_files()
        check_column_files(plan)
        check_tuned_roles(plan)
        out.print(dump(config), end="", markup=False)
        for text in costs(plan):
            say(f"# {text}")
        return 0
    with Run(config, folder) as run:
        report = run.report(show_text=show_text)
    processes().destroy_process_group()
    if report is None:
        return 0
    emit("verdict", **dataclasses.asdict(report.verdict))
    if json_:
        print((folder / "report.json").read_text(encoding="utf-8"))
        return 0
    out.print(terminal_table(report))
    verdict = report.verdict
    say(f"gate: {verdict.status}: {'; '.join(verdict.reasons) or 'every limit is kept'}")
    say(f"report: {folder / 'report.html'}")
    return 0


def train_verb(
    recipe: Annotated[Path, Parameter(help="A recipe's file.")],
    *,
    arm: Annotated[str, Parameter(help="The arm of the recipe to tune.")],
    out_: RunFolderOption = None,
    set_: Sets = (),
    change: Changes = (),
) -> int:
    """Tune one arm of a recipe, with the scan and the cut that it needs, and measure nothing. Processes share it as
    they share a run."""
    start_torch()
    from safebasin.api import train_adapter
    from safebasin.pipeline.parse import parse_sets
    from safebasin.pipeline.recipes import read_recipe
    from safebasin.runtime import processes

    config = read_recipe(recipe, change, parse_sets(set_))
    adapter = train_adapter(config, arm, out_ or _folder(recipe))
    processes().destroy_process_group()
    if processes().is_main_process:
        say(f"adapter: {adapter}")
    return 0


def search_verb(
    recipe: Annotated[Path, Parameter(help="A recipe's file.")],
    *,
    arm: Annotated[str, Parameter(help="The arm whose cut, or whose repair's strength, is searched.")] = "defended",
    rounds: Annotated[int, Parameter(help="Tunings at most, after the plain one.")] = 2,
    out_: RunFolderOption = None,
    set_: Sets = (),
    change: Changes = (),
    events: Events = None,
) -> int:
    """Search the cut that keeps the model safe and useful (GradShield's algorithm 1), or the strength of a repair.

    One half of the prompts chooses the cut, the gate confirms it on the other. Exit code 3 where no cut passes, 4 where
    the other half does not decide.
    """
    refuse_processes()
    start_events(events)
    start_torch()
    from safebasin.pipeline.parse import parse_sets
    from safebasin.pipeline.recipes import read_recipe
    from safebasin.pipeline.search import search, verdict

    config, folder, results = read_recipe(recipe, change, parse_sets(set_)), out_ or _folder(recipe), []
    for result in search(config, arm, folder, rounds=rounds):
        results.append(result)
        emit("round", **result._asdict())
        say(f"{result.arm}: {result.rows} rows, {result.rates}: {result.outcome}")
    say(verdict(results, folder))
    return {"passed": 0, "unconfirmed": 4}.get(results[-1].outcome, 3)


def bench_verb(
    grid: Annotated[Path, Parameter(help="A grid's file, as recipes/grid.yaml.")],
    *,
    only: Annotated[str, Parameter(help="Some of the attacks: explicit,trigger.")] = "",
    seeds: Annotated[str, Parameter(help="Some of the seeds: 0,1.")] = "",
    list_: Annotated[bool, Parameter(name="--list", help="Print the cells and how they ended; run nothing.")] = False,
    out_: Annotated[Path | None, Parameter(name="--out", help="Folder of the run folders; default runs/GRID.")] = None,
    set_: Sets = (),
    engine: Engine = "",
) -> int:
    """Run a grid of attacks, defences and seeds; rank the defences by their worst attack. Run it again after a kill,
    and it goes on."""
    refuse_processes()
    start_torch()
    from safebasin.pipeline.grid import bench, cells, read
    from safebasin.pipeline.parse import parse_sets

    if not all(part.strip().isdecimal() for part in seeds.split(",") if seeds):
        raise UserError(f"--seeds takes numbers with commas between them, found {seeds!r}")
    settings, folder = read(grid, parse_sets(set_), on_engine(engine)), out_ or _folder(grid)
    attacks = [part.strip() for part in only.split(",") if only]
    numbers = [int(part) for part in seeds.split(",") if seeds]
    if list_:
        for cell in cells(settings.recipes(attacks, numbers), folder, settings.recipes()):
            reason = f" ({cell.reason})" if cell.reason else ""
            say(f"{cell.folder.name} {cell.defence}: {cell.outcome}{reason}")
        return 0
    for place, rank in enumerate(bench(settings, folder, only=attacks, seeds=numbers), 1):
        worst = "not measured" if rank.worst is None else f"{rank.worst:.1%} ({rank.attack})"
        missing = f"; not measured under {', '.join(rank.missing)}" if rank.missing else ""
        say(f"{place}. {rank.defence}: worst attack success {worst}{missing}")
    say(f"grid: {folder / 'grid.html'}")
    return 0


def _folder(recipe: Path, ending: str = "") -> Path:
    """The default run folder of a recipe."""
    return Path("runs") / (recipe.name.removeprefix("builtin:").removesuffix(recipe.suffix) + ending)
