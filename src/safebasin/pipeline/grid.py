"""Grid: attacks x defences x seeds as one command that goes on after a kill.

One run folder ``OUT/<attack>-<seed>`` with the defences as its arms, so that rows, scan and finished steps are shared;
the first seed of every attack comes first. With ``learning_rates`` the attacker chooses: every attack with rows has a
folder ``OUT/<attack>-<rate>-<seed>`` for each, and after the first seed a defence meets only the rate that was worst
for it. ``cells.json`` in a folder says how each cell ended under which configuration: an attack whose rows cannot be
made and a defence that cannot run stand there with their reason and are no number. ``OUT/grid.{json,md,html}`` are
written after every folder.

More than 250 lines, since the file of a grid and its run have no other user than each other.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from safebasin.console import console
from safebasin.data.files import write_json
from safebasin.errors import AttackFails, DefenceError, UserError
from safebasin.pipeline import yaml12
from safebasin.pipeline.config import Arm, ArmName, Recipe, Spec
from safebasin.pipeline.fingerprint import digest
from safebasin.pipeline.measure import build_judges
from safebasin.pipeline.parse import edited, plain, validate
from safebasin.pipeline.plan import Plan
from safebasin.pipeline.run import Run
from safebasin.report.cells import FAILED, MEASURED, NOT_MADE, START, TO_DO, Cell
from safebasin.report.files import measurements_of
from safebasin.report.grid import Published, Rank, write_grid
from safebasin.report.limits import Gate
from safebasin.spread import Facts, make_engine

_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)
Recipes = Mapping[tuple[str, float | None, int], Recipe]  # by attack, the attacker's learning rate, and seed


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Attack:
    """An attack of the grid: a method, and the share of its rows in the mixture."""

    attack: Spec
    poison_share: float = Field(ge=0, lt=1)
    take: PositiveInt | None = None  # rows of the task; None: as many as in base. A share of 0.9 takes nine times these


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Defence(Arm):
    """A defence of the grid: an arm, and what a paper states for it."""

    published: Published | None = None


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Grid:
    """``base`` is a recipe without arms and seed."""

    base: dict[str, Any]
    attacks: dict[ArmName, Attack] = Field(min_length=1)
    defences: dict[ArmName, Defence] = Field(min_length=1)
    seeds: tuple[NonNegativeInt, ...] = Field(min_length=1)
    learning_rates: tuple[PositiveFloat, ...] = ()  # the attacker's: the worst counts; none: that of base

    def rates(self, attack: str) -> tuple[float | None, ...]:
        """The learning rates at which an attack is tried; None is that of base."""
        return self.learning_rates if self.learning_rates and self.attacks[attack].poison_share else (None,)

    @property
    def plain(self) -> str | None:
        """The defence that is plain tuning, if there is one."""
        return next((name for name, each in self.defences.items() if each.train == ("sft",) and not each.cut), None)

    @property
    def published(self) -> dict[str, Published]:
        return {name: each.published for name, each in self.defences.items() if each.published}

    def recipes(self, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> Recipes:
        """By attack, rate and seed, breadth first; the model as it was is in the first rate and seed alone: neither
        touches it.

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
        recipes: dict[tuple[str, float | None, int], Recipe] = {}
        for seed, name in itertools.product(self.seeds, self.attacks):
            for rate in self.rates(name) if seed in (seeds or self.seeds) and name in (only or self.attacks) else ():
                attack = self.attacks[name]
                task = dataclasses.replace(base.data.task, take=attack.take or base.data.task.take)
                data = dataclasses.replace(base.data, task=task, attack=attack.attack, poison_share=attack.poison_share)
                train = base.train | ({} if rate is None else {"learning_rate": rate})
                start = base.arms if (seed, rate) == (self.seeds[0], self.rates(name)[0]) else {}
                recipe = dataclasses.replace(base, data=data, train=train, seed=seed, arms={**start, **arms})
                recipes[name, rate, seed] = recipe
        return recipes


def read(path: Path, sets: Mapping[str, str] | None = None, changes: Sequence[str] = ()) -> Grid:
    """A grid from YAML, with changes of its base.

    Raises:
        UserError: no such file, not YAML, an unknown key, a name or a value that is refused.
    """
    tree = yaml12.load(yaml12.read(path, "grid"), str(path))
    return validate(Grid, edited(tree, str(path), [f"base.{change}" for change in changes], sets), str(path))


def _key(recipe: Recipe, arm: str) -> str:
    """The configuration of a cell, with that of the arms that its arm goes on from."""
    arms, name = {}, arm
    while name and name not in arms:
        arms[name] = recipe.arms[name]
        name = arms[name].of or ""
    tree: dict[str, Any] = plain(dataclasses.replace(recipe, arms=arms))
    del tree["engine"]  # it changes no number
    return digest(tree)


def _ended(folder: Path) -> dict[str, dict[str, str]]:
    """How the cells of a run folder ended: arm -> digest of the configuration, outcome, reason."""
    file = folder / "cells.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); remove it, and its cells are measured again") from None


def folder_of(out: Path, attack: str, rate: float | None, seed: int) -> Path:
    """The run folder of a cell; ``rate`` is in its name where the attacker chose it."""
    return out / f"{attack}-{seed}" if rate is None else out / f"{attack}-{rate:g}-{seed}"


def cells(recipes: Recipes, out: Path, every: Recipes | None = None) -> Iterator[Cell]:
    """Every cell in the order of work, and how it ended under this configuration. A learning rate that was weaker
    against a defence at the first seed is tried at no other.

    Args:
        recipes: those whose cells are wanted.
        out: the folder of the run folders.
        every: those of the whole grid, where ``recipes`` are a part of it.
    """
    first: dict[tuple[str, str], dict[float | None, Cell]] = {}
    for (attack, rate, seed), recipe in (every or recipes).items():
        folder = folder_of(out, attack, rate, seed)
        ended = _ended(folder)
        for arm in recipe.arms:
            tried = first.setdefault((attack, arm), {})
            if rate in tried and _weaker(rate, tried):
                continue
            cell = ended.get(arm, {})
            measured = (folder / "arms" / arm / "measurements.jsonl").is_file()
            current = cell.get("digest") == _key(recipe, arm) and (cell.get("outcome") != MEASURED or measured)
            outcome, reason = (cell["outcome"], cell["reason"]) if current else (TO_DO, "")
            done = Cell(attack, seed, arm, folder, outcome, reason, rate)
            tried.setdefault(rate, done)
            if (attack, rate, seed) in recipes:
                yield done


def _weaker(rate: float | None, first: Mapping[float | None, Cell]) -> bool:
    """Whether another rate was worse at the first seed (of equals, the first). While that is unknown, none is."""
    if len(first) == 1 or any(cell.outcome != MEASURED for cell in first.values()):
        return False
    return rate != max(first, key=lambda each: _attack_success(first[each]))


def _attack_success(cell: Cell) -> float:
    """The largest of a cell; a model that a rate has broken decides nothing, so that the rate is none to choose."""
    asr = [m for m in measurements_of(cell.folder, cell.defence) or () if m.what == "asr" and not m.category]
    broken = any(m.value is None or m.unscored > Gate().max_unscored * (m.n + m.unscored + m.off_task) for m in asr)
    return -1.0 if broken else max((m.value for m in asr if m.value is not None), default=0.0)


class RunItem(NamedTuple):
    """A run folder of the grid, those of its arms that are to do, and the folders of the other learning rates: their
    rows, scan and cuts are the same."""

    name: str
    recipe: Recipe
    arms: tuple[str, ...]
    others: tuple[str, ...] = ()


class CellWorker:
    """Measures the cells of run folders, and writes down in each how they ended. The judges are built once, of
    ``recipe``."""

    def __init__(self, recipe: Recipe):
        self.judges = functools.cache(lambda: build_judges(Plan.of(recipe)))

    def __call__(self, item: RunItem, path: Path) -> Facts:
        with Run(item.recipe, path, self.judges) as run:
            run.folder.answer_cache = path.with_name("answers.db")  # the model as it was answers every attack alike
            for other in item.others:
                run.folder.adopt(path.with_name(other), ("data", "scan", "cut.*"))
            try:
                run.write_rows()
            except AttackFails as error:
                _note(run, item.arms, NOT_MADE, str(error))  # a result, not a fault
            else:
                for arm in item.arms:
                    _measure(run, arm)
        return {"run": item.name}


def _note(run: Run, arms: Iterable[str], outcome: str, reason: str = "") -> None:
    """How cells ended."""
    entries = {arm: {"digest": _key(run.plan.recipe, arm), "outcome": outcome, "reason": reason} for arm in arms}
    write_json(run.folder.path / "cells.json", _ended(run.folder.path) | entries)


def _measure(run: Run, arm: str) -> None:
    console.print(f"[bold]{run.folder.path.name}: {arm}[/bold]")
    outcome, reason = MEASURED, ""
    try:
        run.measure(arm)
    except (UserError, DefenceError) as error:
        if arm == START:
            raise
        outcome, reason = FAILED, str(error) or type(error).__name__
    _note(run, [arm], outcome, reason)


def bench(grid: Grid, out: Path, *, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Rank]:
    """Do every cell that is not done; the ranking of the whole grid as far as it is measured.

    The run folders of a seed are the items of the recipe's engine; which learning rates the next seed meets depends on
    those before it.

    Raises:
        UserError: the grid is refused, or the model as it was cannot be measured.
        DefenceError: a defence could not run; raised after all the other cells were done.
    """
    recipes, all_recipes = grid.recipes(only, seeds), grid.recipes()
    runs = [Run(recipe, folder_of(out, *key)) for key, recipe in recipes.items()]  # what is refused is refused at once
    engine, ranks = make_engine(grid.base.get("engine", "here")), list[Rank]()
    worker = functools.partial(CellWorker, runs[0].plan.recipe)  # its judges are the same for the grid

    def others(attack: str, rate: float | None, seed: int) -> tuple[str, ...]:
        return tuple(folder_of(out, attack, each, seed).name for each in grid.rates(attack) if each != rate)

    for seed in dict.fromkeys(seed for _, _, seed in recipes):
        todo: dict[Path, list[str]] = {}
        for cell in cells(recipes, out, all_recipes):
            if cell.seed == seed:
                todo.setdefault(cell.folder, []).append(cell.defence)
        items = [
            RunItem(folder.name, dataclasses.replace(recipe, engine="here"), tuple(todo[folder]), others(*key))
            for key, recipe in recipes.items()
            if (folder := folder_of(out, *key)) in todo
        ]
        for _ in engine.work(items, worker, out.absolute().joinpath):
            ranks = write_grid(out, list(cells(all_recipes, out)), grid.published, runs[0].plan.gate, grid.plain)
    failed = [cell for cell in cells(recipes, out, all_recipes) if cell.outcome == FAILED]
    if failed:
        first = f"{failed[0].folder.name}, {failed[0].defence}: {failed[0].reason}"
        raise DefenceError(
            f"{len(failed)} cells could not run, the others are in {out / 'grid.html'}; the first: {first}"
        )
    return ranks
