"""Bench: the grid attacks x defences x seeds as one command that goes on after a kill.

One run folder ``OUT/<attack>-<seed>`` with the defences as its arms, so that rows, scan and finished steps are shared; the first seed of
every attack comes first. ``cells.json`` in it says how each cell ended under which configuration: an attack whose rows cannot be made and
a defence that cannot run stand there with their reason and are no number. ``OUT/grid.{json,md,html}`` are written after every cell.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from safebasin.console import console
from safebasin.data.tables import write_json
from safebasin.errors import AttackFails, DefenceError, UserError
from safebasin.pipeline.config import Arm, Run, Spec, digest, parse
from safebasin.pipeline.old import Pipeline
from safebasin.registry import explain
from safebasin.report.grid import FAILED, MEASURED, NOT_MADE, START, TO_DO, Cell, Published, Rank, write

_frozen = checked_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
Runs = Mapping[tuple[str, int], Run]  # by attack and seed
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # names folders


@_frozen
class Attack:
    attack: Spec
    poison_share: float = Field(ge=0, lt=1)


@_frozen
class Defence(Arm):
    published: Published | None = None


@_frozen
class Grid:
    """``base`` is a recipe without arms and seed."""

    base: dict[str, Any]
    attacks: dict[Name, Attack] = Field(min_length=1)
    defences: dict[Name, Defence] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)

    @property
    def plain(self) -> str | None:
        """The defence that is plain tuning, if there is one."""
        return next((name for name, each in self.defences.items() if each.train == ("sft",) and not each.cut), None)

    @property
    def published(self) -> dict[str, Published]:
        return {name: each.published for name, each in self.defences.items() if each.published}

    def runs(self, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> Runs:
        """By attack and seed, breadth first; the model as it was is in the first seed alone: no seed touches it. UserError: it does not stand."""
        for asked, known in ((only, self.attacks), (seeds, self.seeds)):
            if odd := [each for each in asked if each not in known]:
                raise UserError(f"the grid has no {odd[0]!r}; it has: {', '.join(map(str, known))}")
        if odd := [each.attack for each in self.published.values() if each.attack not in self.attacks]:
            raise UserError(f"published.attack: {odd[0]!r} is not among the attacks: {', '.join(self.attacks)}")
        if own := [*({"arms", "seed"} & self.base.keys()), *({START} & self.defences.keys())]:
            raise UserError(
                f"{own[0]!r} is the grid's own: base has no arms and no seed, and no defence is called {START}"
            )
        base = parse(yaml.safe_dump(self.base | {"arms": {START: {}}}), "base")
        arms = {name: Arm(cut=each.cut, columns=each.columns, train=each.train) for name, each in self.defences.items()}
        made = {}
        for seed, name in itertools.product(self.seeds, self.attacks):
            if seed in (seeds or self.seeds) and name in (only or self.attacks):
                data = dataclasses.replace(base.data, **dataclasses.asdict(self.attacks[name]))
                first = base.arms if seed == self.seeds[0] else {}
                made[name, seed] = dataclasses.replace(base, data=data, seed=seed, arms={**first, **arms})
        return made


def read(path: Path) -> Grid:
    """A grid from YAML. UserError: no such file, not YAML, an unknown key, a name or a value of the wrong kind."""
    if not path.is_file():
        raise UserError(f"no such grid: {path}")
    try:
        return TypeAdapter(Grid).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {getattr(error, 'problem', error)}") from None
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error)}") from None


def _key(run: Run, arm: str) -> str:
    return digest(dataclasses.replace(run, arms={arm: run.arms[arm]}))


def _known(folder: Path) -> dict[str, dict[str, str]]:
    file = folder / "cells.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def cells(runs: Runs, out: Path) -> Iterator[Cell]:
    """Every cell in the order of work, and how it ended under this configuration."""
    for (attack, seed), run in runs.items():
        folder = out / f"{attack}-{seed}"
        known = _known(folder)
        for arm in run.arms:
            told = known.get(arm, {})
            there = told.get("outcome") != MEASURED or (folder / "arms" / arm / "measurements.jsonl").is_file()
            ended = (told["outcome"], told["reason"]) if there and told.get("digest") == _key(run, arm) else (TO_DO, "")
            yield Cell(attack, seed, arm, folder, *ended)


def bench(grid: Grid, out: Path, *, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Rank]:
    """Do every cell that is not done; the ranking of the whole grid as far as it is known.

    Raises:
        UserError: the grid does not stand, or the model as it was cannot be measured.
        DefenceError: a defence could not run; said after all the other cells were done.
    """
    runs, whole = grid.runs(only, seeds), grid.runs()
    made = [
        Pipeline(run, out / f"{attack}-{seed}") for (attack, seed), run in runs.items()
    ]  # all is checked before any time is spent
    to_do = {(cell.folder, cell.defence) for cell in cells(runs, out) if cell.outcome != MEASURED}
    judges, ranks = None, []

    def note(arms: Iterable[str], outcome: str, reason: str = "") -> list[Rank]:
        """How cells ended, and the grid as it is now known."""
        ended = {arm: {"digest": _key(pipeline.config, arm), "outcome": outcome, "reason": reason} for arm in arms}
        write_json(pipeline.out / "cells.json", _known(pipeline.out) | ended)
        return write(out, list(cells(whole, out)), grid.published, pipeline.gate, grid.plain)

    for pipeline in made:
        try:
            pipeline.prepare()
        except AttackFails as error:
            ranks = note(pipeline.arms, NOT_MADE, str(error))  # a result, not a fault
            continue
        if any(pipeline.scanned(arm) for arm in pipeline.arms):
            pipeline.scan()
        for arm in pipeline.arms:
            console.print(f"[bold]{pipeline.out.name}: {arm}[/bold]")
            if judges is None and (pipeline.out, arm) in to_do:
                judges = pipeline.judges()  # of the model as it was: the same for the whole grid
            outcome, reason = MEASURED, ""
            try:
                pipeline.measure(arm, judges)
            except (UserError, DefenceError) as error:
                if arm == START:
                    raise
                outcome, reason = FAILED, str(error) or type(error).__name__
            ranks = note([arm], outcome, reason)
    if failed := [
        f"{cell.folder.name}, {cell.defence}: {cell.reason}" for cell in cells(runs, out) if cell.outcome == FAILED
    ]:
        raise DefenceError(
            f"{len(failed)} cells could not run, the others are in {out / 'grid.html'}; the first: {failed[0]}"
        )
    return ranks
