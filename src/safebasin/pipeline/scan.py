"""The step that scores every training row: scan/scores.parquet, with anchors.json, heat.json, problems.json and
coverage.json beside it."""

from pathlib import Path
from typing import Any

from safebasin.console import line, progress
from safebasin.data.tables import write_json
from safebasin.pipeline.folder import PROBLEMS, RunFolder
from safebasin.pipeline.plan import Plan
from safebasin.pipeline.rows import anchor_rows, encoded_rows, load_start, scan_inputs
from safebasin.runtime import processes
from safebasin.scan.heat import HEAT, heat_rows
from safebasin.scan.scan import ScanJournal, score_rows, write_scores
from safebasin.scan.source import coverage, target_weights

COVERAGE = "coverage.json"  # scorer -> the share of the weights in the model's blocks that it scores over


def covered(plan: Plan, model: Any) -> dict[str, float]:
    """The share of the weights in the model's blocks that each gradient scorer sees."""
    weights = {
        name: target_weights(model, scorer.modules, depth=scorer.depth)
        for name, scorer in plan.scorers.items()
        if {"modules", "depth"} <= vars(scorer).keys()
    }
    return {name: coverage(model, names) for name, names in weights.items()}


def write_scan(plan: Plan, folder: RunFolder, rows_file: Path) -> Path:
    """The step ``scan``: every row by every scorer. Processes share the rows, and rank 0 writes.

    A row longer than ``max_length`` is scored on what fits, unless an arm is tuned on it and ``on_bad`` is "stop".
    After a kill, the scan goes on from its journal.
    """
    target = folder.scores
    cut_short = not plan.compositions or plan.recipe.data.on_bad == "skip"
    inputs = {**scan_inputs(plan), "rows": rows_file, "cut_short": cut_short}
    names = (HEAT, PROBLEMS, COVERAGE)
    outputs = [target, folder.anchors, *map(target.with_name, names)]
    ranks = processes()
    with folder.step("scan", inputs, outputs, shared=True) as work:
        if not work:
            return target
        loaded = load_start(plan)
        examples, rows, problems = encoded_rows(plan, rows_file, loaded, cut_short=cut_short)
        shares = covered(plan, loaded.model)
        for name, share in shares.items():
            line(f"  {name} scores over {share:.0%} of the weights in the model's blocks")
        target.parent.mkdir(parents=True, exist_ok=True)
        journal = ScanJournal(target.with_name("journal.jsonl"), work, ranks)
        with progress("scan", len(rows)) as advance:
            scanned = score_rows(
                *loaded,
                rows,
                plan.scorers,
                anchor_rows(plan, loaded.tokenizer),
                examples=examples,
                batch_size=plan.recipe.scan.batch_size,
                journal=journal,
                progress=lambda done, _: advance(min(done * ranks.num_processes, len(rows)), ""),
            )
        if ranks.is_main_process:
            write_scores(target, examples, scanned)
            write_json(target.with_name(HEAT), heat_rows(loaded.tokenizer, examples, rows, scanned, plan.scorers))
            write_json(target.with_name(PROBLEMS), [bad._asdict() for bad in problems])
            write_json(target.with_name(COVERAGE), shares)
            journal.clear()
    return target
