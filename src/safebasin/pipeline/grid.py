"""Grid: attacks x defences x seeds as one command that goes on after a kill.

One run folder ``OUT/<attack>-<seed>`` with the defences as its arms, so that rows, scan and finished steps are shared;
the first seed of every attack comes first. ``cells.json`` in it says how each cell ended under which configuration: an
attack whose rows cannot be made and a defence that cannot run stand there with their reason and are no number.
``OUT/grid.{json,md,html}`` are written after every cell.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, NonNegativeInt
from pydantic.dataclasses import dataclass

from safebasin.console import console
from safebasin.data.tables import write_json
from safebasin.errors import AttackFails, DefenceError, UserError
from safebasin.pipeline import yaml12
from safebasin.pipeline.config import Arm, ArmName, Recipe, Spec, edited, plain, validate
from safebasin.pipeline.fingerprint import digest
from safebasin.pipeline.measure import build_judges
from safebasin.pipeline.run import Run
from safebasin.report.grid import FAILED, MEASURED, NOT_MADE, START, TO_DO, Cell, Published, Rank, write_grid

_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)
Recipes = Mapping[tuple[str, int], Recipe]  # by attack and seed


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Attack:
    attack: Spec
    poison_share: float = Field(ge=0, lt=1)


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Defence(Arm):
    published: Published | None = None


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Grid:
    """``base`` is a recipe without arms and seed."""

    base: dict[str, Any]
    attacks: dict[ArmName, Attack] = Field(min_length=1)
    defences: dict[ArmName, Defence] = Field(min_length=1)
    seeds: tuple[NonNegativeInt, ...] = Field(min_length=1)

    @property
    def plain(self) -> str | None:
        """The defence that is plain tuning, if there is one."""
        return next((name for name, each in self.defences.items() if each.train == ("sft",) and not each.cut), None)

    @property
    def published(self) -> dict[str, Published]:
        return {name: each.published for name, each in self.defences.items() if each.published}

    def recipes(self, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> Recipes:
        """By attack and seed, breadth first; the model as it was is in the first seed alone: no seed touches it.

        Args:
            only: some of the attacks; none named means all of them.
            seeds: some of the seeds.

        Raises:
            UserError: an attack or a seed that the grid does not have, or a base that is refused.
        """
        for named, available in ((only, self.attacks), (seeds, self.seeds)):
            if unknown := [each for each in named if each not in available]:
                raise UserError(f"the grid has no {unknown[0]!r}; it has: {', '.join(map(str, available))}")
        if unknown := [each.attack for each in self.published.values() if each.attack not in self.attacks]:
            raise UserError(f"published.attack: {unknown[0]!r} is not among the attacks: {', '.join(self.attacks)}")
        if reserved := [*({"arms", "seed"} & self.base.keys()), *({START} & self.defences.keys())]:
            raise UserError(
                f"{reserved[0]!r} is the grid's own: base has no arms and no seed, and no defence is called {START}"
            )
        base = validate(Recipe, self.base | {"arms": {START: {}}}, "base")
        fields = [field.name for field in dataclasses.fields(Arm)]
        arms = {name: Arm(**{key: getattr(each, key) for key in fields}) for name, each in self.defences.items()}
        recipes = {}
        for seed, name in itertools.product(self.seeds, self.attacks):
            if seed in (seeds or self.seeds) and name in (only or self.attacks):
                attack = self.attacks[name]
                data = dataclasses.replace(base.data, attack=attack.attack, poison_share=attack.poison_share)
                start = base.arms if seed == self.seeds[0] else {}
                recipes[name, seed] = dataclasses.replace(base, data=data, seed=seed, arms={**start, **arms})
        return recipes


def read(path: Path, sets: Mapping[str, str] | None = None) -> Grid:
    """A grid from YAML.

    Raises:
        UserError: no such file, not YAML, an unknown key, a name or a value that is refused.
    """
    return validate(Grid, edited(yaml12.load(yaml12.read(path, "grid"), str(path)), str(path), (), sets), str(path))


def _key(recipe: Recipe, arm: str) -> str:
    """The configuration of a cell, with that of the arms that its arm goes on from."""
    arms, name = {}, arm
    while name and name not in arms:
        arms[name] = recipe.arms[name]
        name = arms[name].of or ""
    return digest(plain(dataclasses.replace(recipe, arms=arms)))


def _ended(folder: Path) -> dict[str, dict[str, str]]:
    """How the cells of a run folder ended: arm -> digest of the configuration, outcome, reason."""
    file = folder / "cells.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); remove it, and its cells are measured again") from None


def cells(recipes: Recipes, out: Path) -> Iterator[Cell]:
    """Every cell in the order of work, and how it ended under this configuration."""
    for (attack, seed), recipe in recipes.items():
        folder = out / f"{attack}-{seed}"
        ended = _ended(folder)
        for arm in recipe.arms:
            cell = ended.get(arm, {})
            measured = (folder / "arms" / arm / "measurements.jsonl").is_file()
            current = cell.get("digest") == _key(recipe, arm) and (cell.get("outcome") != MEASURED or measured)
            outcome, reason = (cell["outcome"], cell["reason"]) if current else (TO_DO, "")
            yield Cell(attack, seed, arm, folder, outcome, reason)


def bench(grid: Grid, out: Path, *, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Rank]:
    """Do every cell that is not done; the ranking of the whole grid as far as it is measured.

    Raises:
        UserError: the grid is refused, or the model as it was cannot be measured.
        DefenceError: a defence could not run; raised after all the other cells were done.
    """
    recipes, all_recipes = grid.recipes(only, seeds), grid.recipes()
    judges = functools.cache(lambda: build_judges(runs[0].plan))  # of the model as it was: the same for the whole grid
    runs = [Run(recipe, out / f"{attack}-{seed}", judges) for (attack, seed), recipe in recipes.items()]
    ranks: list[Rank] = []

    def note(run: Run, arms: Iterable[str], outcome: str, reason: str = "") -> list[Rank]:
        """How cells ended, and the grid as it now stands."""
        entries = {arm: {"digest": _key(run.plan.recipe, arm), "outcome": outcome, "reason": reason} for arm in arms}
        write_json(run.folder.path / "cells.json", _ended(run.folder.path) | entries)
        return write_grid(out, list(cells(all_recipes, out)), grid.published, run.plan.gate, grid.plain)

    for run in runs:
        with run:
            arms = run.plan.recipe.arms
            try:
                run.write_rows()
            except AttackFails as error:
                ranks = note(run, arms, NOT_MADE, str(error))  # a result, not a fault
                continue
            for arm in arms:
                console.print(f"[bold]{run.folder.path.name}: {arm}[/bold]")
                outcome, reason = MEASURED, ""
                try:
                    run.measure(arm)
                except (UserError, DefenceError) as error:
                    if arm == START:
                        raise
                    outcome, reason = FAILED, str(error) or type(error).__name__
                ranks = note(run, [arm], outcome, reason)
    failed = [cell for cell in cells(recipes, out) if cell.outcome == FAILED]
    if failed:
        first = f"{failed[0].folder.name}, {failed[0].defence}: {failed[0].reason}"
        raise DefenceError(
            f"{len(failed)} cells could not run, the others are in {out / 'grid.html'}; the first: {first}"
        )
    return ranks
