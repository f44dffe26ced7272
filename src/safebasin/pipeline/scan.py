"""The step that scores every training row: scan/scores.parquet, with anchors.json, heat.json, problems.json and
coverage.json beside it.

The rows are cut into shards, and every shard makes one part in scan/parts. What is done is what lies there: a scan that
was killed goes on from it, here or on other machines.
"""

import contextlib
import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safebasin.console import line, progress
from safebasin.data.example import read_examples
from safebasin.data.files import write_json
from safebasin.errors import UserError
from safebasin.pipeline.config import Recipe
from safebasin.pipeline.fingerprint import fingerprint, package_digest, versions
from safebasin.pipeline.folder import PROBLEMS, RunFolder
from safebasin.pipeline.plan import Plan
from safebasin.pipeline.read import EncodedRows, anchor_rows, fitting_rows, load_start, row_limit, training_form
from safebasin.pipeline.rows import scan_inputs
from safebasin.pipeline.token_files import TokenFiles
from safebasin.runtime import processes, resolved
from safebasin.scan.heat import HEAT, HeatRow, heat_rows
from safebasin.scan.journal import ScanJournal
from safebasin.scan.part import Notes, join_parts, write_part
from safebasin.scan.scan import fit_scorers, score_rows
from safebasin.scan.shard import Shard, cut_shards, read_shard
from safebasin.scan.source import coverage, target_weights
from safebasin.spread import Facts, make_engine
from safebasin.spread.here import Here
from safebasin.spread.parts import Parts, first_of_all

COVERAGE = "coverage.json"  # scorer -> the share of the weights in the model's blocks that it scores over
PROBES = 8  # anchor rows that every worker of several scores, to compare itself with the first
TOLERANCE = 1e-3  # between the scores of two workers, over the largest of them


def covered(plan: Plan, model: Any) -> dict[str, float]:
    """The share of the weights in the model's blocks that each gradient scorer sees."""
    weights = {
        name: target_weights(model, scorer.modules, depth=scorer.depth)
        for name, scorer in plan.scorers.items()
        if {"modules", "depth"} <= vars(scorer).keys()
    }
    return {name: coverage(model, names) for name, names in weights.items()}


def worker_stamp(plan: Plan) -> str:
    """A digest of what a worker must have in common with the process that started it."""
    dtype = resolved(plan.recipe.model.dtype)
    return fingerprint({"package": package_digest(), "versions": versions(), "scorers": plan.scorers, "dtype": dtype})


class ScanWorker:
    """Loads the start model, fits the scorers, and makes the part of every shard that it is given.

    Args:
        plan: of the run.
        parts: where parts lie; the journal of a shard lies beside its part.
        tokens: where encoded rows lie, for the arms to come.
        key: of the step.
        stamp: ``worker_stamp`` of the process that started the scan.
        cut_short: whether a long row is scored on what fits of it.
        several: whether there are other shards, and so perhaps other workers, whose scores these must agree with.
        ranks: processes that share every shard; None: this one has its own.
        advance: called with the rows of the shard that are scored.

    Raises:
        UserError: another safebasin, other versions or numbers than the first worker has.
    """

    def __init__(
        self,
        plan: Plan,
        parts: Parts,
        tokens: Path,
        key: str,
        stamp: str,
        *,
        cut_short: bool,
        several: bool,
        ranks: Any = None,
        advance: Callable[[int], None] | None = None,
    ):
        if stamp != worker_stamp(plan):
            raise UserError(
                "a worker has another safebasin, other versions or another model.dtype: auto than the process that "
                "started it; install the same on all machines, and name model.dtype"
            )
        self.plan, self.parts, self.key, self.cut_short, self.several = plan, parts, key, cut_short, several
        self.ranks, self.advance, self.loaded = ranks, advance, load_start(plan)
        self.limit, self.tokens = row_limit(plan, self.loaded.model), TokenFiles(tokens, self.loaded.tokenizer)
        self.anchors = anchor_rows(plan, self.loaded)
        self.fitted = fit_scorers(*self.loaded, plan.scorers, self.anchors)
        shares = covered(plan, self.loaded.model)
        for name, share in shares.items():
            line(f"  {name} scores over {share:.0%} of the weights in the model's blocks")
        own = {"coverage": shares, "scores": self._probe() if several else {}}
        check_agreement(own, first_of_all(parts.folder, own))

    def _probe(self) -> dict[str, list[float]]:
        rows = [row for name in sorted(self.anchors) for row in self.anchors[name]][:PROBES]
        scorers = {name: scorer for name, scorer in self.plan.scorers.items() if name in self.fitted}
        return score_rows(*self.loaded, rows, scorers, {}, batch_size=PROBES, fitted=self.fitted).rows

    def __call__(self, shard: Shard, path: Path) -> Facts:
        plan, form = self.plan, training_form(self.plan)
        table = read_shard(shard, form.delimiter)
        examples = read_examples(table, form, checked=True).examples if table else []
        examples, rows, problems = self._encoded(examples)
        journal = ScanJournal(self.parts.folder / f"{shard.name}.jsonl", self.key, self.ranks)
        scanned = score_rows(
            *self.loaded,
            rows,
            plan.scorers,
            {} if int(shard.name) else self.anchors,
            examples=examples,
            batch_size=plan.recipe.scan.batch_size,
            journal=journal,
            progress=self._progress(shard),
            fitted=self.fitted,
        )
        if self.ranks is None or self.ranks.is_main_process:
            heat = [HeatRow(**row) for row in heat_rows(self.loaded.tokenizer, examples, rows, scanned, plan.scorers)]
            write_part(path, examples, scanned, Notes(problems, heat, scanned.anchors))
            journal.clear()
        return {"rows": shard.rows}

    def _encoded(self, examples: list[Any]) -> EncodedRows:
        with self.ranks.main_process_first() if self.ranks else contextlib.nullcontext():
            coded = self.tokens.encoded(examples)
        fitting = partial(fitting_rows, self.plan, limit=self.limit, cut_short=self.cut_short)
        try:
            return fitting(examples, coded)
        except UserError:
            if not self.several:
                raise
        # a template that fails on all of these may serve the others
        rows = [fitting([example], [row]) for example, row in zip(examples, coded, strict=True)]
        return EncodedRows(*(list(itertools.chain.from_iterable(column)) for column in zip(*rows, strict=True)))

    def _progress(self, shard: Shard) -> Callable[[int, int], None] | None:
        advance, sharing = self.advance, self.ranks.num_processes if self.ranks else 1
        if advance is None:
            return None

        def show(done: int, of: int) -> None:
            """The anchors, which the first shard has beside its rows, count as a part of them."""
            advance(min(done * sharing * shard.rows // of, shard.rows))

        return show


def remote_worker(recipe: Recipe, *more: Any, **how: Any) -> ScanWorker:
    """A worker that is built where it runs: a plan may hold models, which do not travel."""
    return ScanWorker(Plan.of(recipe), *more, **how)


def check_agreement(own: Mapping[str, Any], first: Any) -> None:
    """UserError where a worker's scores are not those of the first worker."""
    for name, values in own["scores"].items():
        others = (first or {}).get("scores", {}).get(name, values)
        difference = max((abs(a - b) for a, b in zip(values, others, strict=True)), default=0.0)
        if difference > TOLERANCE * max(map(abs, (*values, *others)), default=0.0):
            raise UserError(
                f"scan.{name}: a worker's scores of the same rows differ by {difference:.3g} from those of the first "
                "worker; machines of two kinds must not make one column: use one kind of GPU and one set of versions"
            )


def write_scan(plan: Plan, folder: RunFolder, rows_file: Path) -> Path:
    """The step ``scan``: every row by every scorer. Processes of torchrun share every shard, and rank 0 writes; on
    another engine a worker has shards of its own.

    A row longer than ``max_length`` is scored on what fits, unless an arm is tuned on it and ``on_bad`` is "stop".
    """
    target = folder.scores
    cut_short = not plan.compositions or plan.recipe.data.on_bad == "skip"
    inputs = {**scan_inputs(plan), "rows": rows_file, "cut_short": cut_short}
    names = (HEAT, PROBLEMS, COVERAGE)
    outputs = [target, folder.anchors, *map(target.with_name, names)]
    ranks, place = processes(), target.with_name("parts")
    with folder.step("scan", inputs, outputs, shared=True) as work:
        if work:
            shards = cut_shards(rows_file, plan.recipe.scan.shard, training_form(plan).delimiter)
            parts = Parts(place, work, ".parquet")
            _make_parts(plan, parts, folder.tokens.absolute(), work, shards, cut_short, ranks)
            if ranks.is_main_process:
                notes = join_parts((parts.path(shard.name) for shard in shards), target)
                first: Any = first_of_all(parts.folder, {})
                write_json(folder.anchors, notes.anchors)
                write_json(target.with_name(HEAT), [row._asdict() for row in notes.heat])
                write_json(target.with_name(PROBLEMS), [bad._asdict() for bad in notes.problems])
                write_json(target.with_name(COVERAGE), (first or {}).get("coverage", {}))
    if ranks.is_main_process:  # now that the manifest has the step, a kill loses nothing
        shutil.rmtree(place, ignore_errors=True)
    return target


def _make_parts(
    plan: Plan, parts: Parts, tokens: Path, key: str, shards: Sequence[Shard], cut_short: bool, ranks: Any
) -> None:
    """All parts of a scan that are not there."""
    engine = make_engine(plan.recipe.engine)
    if ranks.is_main_process:
        parts.open()
    ranks.wait_for_everyone()
    missing = parts.missing(shards)
    ranks.wait_for_everyone()  # no rank may list the parts that another one has begun to write
    total = sum(shard.rows for shard in shards)
    done = total - sum(shard.rows for shard in missing)
    how: dict[str, Any] = {"cut_short": cut_short, "several": len(shards) > 1}
    with progress("scan", total) as advance:
        build: Any = partial(remote_worker, plan.recipe)
        if isinstance(engine, Here):
            build = partial(ScanWorker, plan, ranks=ranks, advance=lambda scored: advance(done + scored, ""))
        for facts in engine.work(missing, partial(build, parts, tokens, key, worker_stamp(plan), **how), parts.path):
            done += facts["rows"]
            advance(done, "")
