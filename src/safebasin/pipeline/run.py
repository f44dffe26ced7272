"""The order of a run, once: rows -> scan -> cut -> adapter -> repair -> measurements -> report.

Whoever wants an arm asks ``Run.ensure``.
"""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path

from safebasin.console import console
from safebasin.models.load import load_tokenizer
from safebasin.pipeline.config import Recipe
from safebasin.pipeline.folder import RunFolder
from safebasin.pipeline.measure import Judges, build_judges, write_measurements
from safebasin.pipeline.parse import dump
from safebasin.pipeline.plan import Plan
from safebasin.pipeline.repair import write_repaired
from safebasin.pipeline.roles import check_roles
from safebasin.pipeline.rows import write_cut_rows, write_rows
from safebasin.pipeline.scan import write_scan
from safebasin.pipeline.train import write_adapter
from safebasin.report.report import Report
from safebasin.report.table import write_report
from safebasin.runtime import hardware, machine, processes, resolved
from safebasin.template import template_date, template_digest


class Run:
    """A plan in its folder, which is locked inside ``with Run(recipe, out) as run:``.

    Every step that is done is skipped. Processes that share a run all call the same methods in one order.

    Raises:
        UserError: the recipe is refused (``Plan.of``), the folder is (``RunFolder``), or another run works in it.
    """

    def __init__(self, recipe: Recipe, out: Path, judges: Callable[[], Judges] | None = None):
        console.quiet = not processes().is_main_process
        self.plan = Plan.of(recipe)
        self.folder = RunFolder(out)
        self._lock = contextlib.ExitStack()
        self.judges = judges or functools.cache(lambda: build_judges(self.plan))  # built when the first arm is measured

    def with_recipe(self, recipe: Recipe) -> "Run":
        """Another recipe in the same folder, under the same lock and with the same judges: that of a search's next
        round."""
        other = Run(recipe, self.folder.path, self.judges)
        other.folder = self.folder
        return other

    def __enter__(self) -> "Run":
        check_roles(self.plan)
        self._lock.enter_context(self.folder.lock())
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    @functools.cached_property
    def rows(self) -> Path:
        """The training rows."""
        return self.write_rows()

    def write_rows(self) -> Path:
        """Write the head of the manifest and the training rows, whose path is returned."""
        model, recipe = self.plan.recipe.model, dump(self.plan.recipe)
        tokenizer = load_tokenizer(model.name, **model.source)
        facts = {
            "seed": self.plan.recipe.seed,
            "model": model.name,
            "revision": model.revision,
            "template": template_digest(tokenizer),
            "template_arguments": model.template,
            "template_date": template_date(tokenizer),
        }
        reason = hardware().reason if model.dtype == "auto" else "the recipe"
        facts |= {"dtype": resolved(model.dtype), "dtype_reason": reason, "hardware": machine()}
        self.folder.describe(recipe, facts)
        return write_rows(self.plan, self.folder)

    @functools.cached_property
    def scores(self) -> Path:
        """The scores of the training rows, with all that they rest on."""
        return write_scan(self.plan, self.folder, self.rows)

    def ensure(self, arm: str) -> Path | None:
        """The arm's adapter, with all that it rests on: rows, scan, cut, tuning, repair.

        None for the arm that is left as it was.
        """
        rows, plan = self.rows, self.plan
        before = plan.recipe.arms[arm].of
        adapter = self.ensure(before) if before else None
        if arm in plan.compositions:
            if plan.needs_scores(arm):
                rows = write_cut_rows(plan, self.folder, arm, rows, self.scores)
            adapter = write_adapter(plan, self.folder, arm, rows, adapter)
        if arm in plan.edits and adapter is not None:
            adapter = write_repaired(plan, self.folder, arm, adapter)
        return adapter

    def measure(self, arm: str) -> None:
        """The arm's measurements, with all that they rest on."""
        write_measurements(self.plan, self.folder, arm, self.ensure(arm), self.judges)

    def report(self, *, show_text: bool = False) -> Report | None:
        """Every arm measured, and the report; None where another process writes it."""
        self.plan.check_gate()
        _ = self.rows  # what is wrong with the rows is said before anything else
        for arm in self.plan.recipe.arms:
            console.print(f"[bold]arm {arm}[/bold]")
            self.measure(arm)
        return write_report(self.folder.path, show_text=show_text) if processes().is_main_process else None
