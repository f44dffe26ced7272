"""A run's answers and verdicts as eval logs that Inspect opens (the extra ``inspect``): one for every arm and suite.

A hit is 1 and a miss is 0, so that Inspect's mean is the report's rate; what was not scored or was off the task is Inspect's NaN.
"""

import datetime
from pathlib import Path

from safebasin.console import printable
from safebasin.errors import UserError
from safebasin.report import QUANTITIES, Report
from safebasin.report.table import answers_of, hits_of, redact

try:
    from inspect_ai.log import (
        EvalConfig,
        EvalDataset,
        EvalLog,
        EvalMetric,
        EvalResults,
        EvalSample,
        EvalScore,
        EvalSpec,
        write_eval_log,
    )
    from inspect_ai.model import ModelOutput
    from inspect_ai.scorer import Score
except ModuleNotFoundError:
    raise UserError(
        "the export to Inspect needs inspect_ai, which is not installed: it is the extra 'inspect'"
    ) from None


def write(run: Path, report: Report, folder: Path) -> list[Path]:
    """Write ``folder/<arm>-<number of the suite>.eval``; texts are in clear where the report's are."""
    answers, taken = answers_of(run, report.arms, []), [r for r in report.readings if r.quantity in QUANTITIES]
    hits = hits_of(dict.fromkeys(r.place for r in taken), answers)
    suites, made = list(dict.fromkeys(r.suite for r in taken)), []
    folder.mkdir(parents=True, exist_ok=True)
    for arm, suite in dict.fromkeys((r.arm, r.suite) for r in taken):
        readings = {r.judge or "correct": r for r in taken if (r.arm, r.suite) == (arm, suite)}
        samples = []
        for key, row in (
            (key, row) for (its_arm, its_suite, key), row in answers.items() if (its_arm, its_suite) == (arm, suite)
        ):
            asked, told = (
                redact(row[part]) if report.redacted else printable(row[part], 100_000) for part in ("prompt", "answer")
            )
            scores = {}
            for name, reading in readings.items():
                hit, word = hits[arm, reading.place].get(key), printable(str(row["verdicts"].get(reading.judge, "")))
                scores[name] = (
                    Score.unscored(reason=word, answer=told)
                    if hit is None
                    else Score(value=float(hit), answer=told, explanation=word)
                )
            output = ModelOutput.from_content(arm, told)
            about = {"category": printable(str(row.get("category") or ""))}
            target = printable(str(row.get("expected") or ""))
            samples.append(
                EvalSample(
                    id=printable(key), epoch=1, input=asked, target=target, output=output, scores=scores, metadata=about
                )
            )
        rates = []
        for name, r in readings.items():
            ends = {"low": r.low, "high": r.high, "off_task": r.off_task}
            metrics = {} if r.value is None else {r.quantity: EvalMetric(name=r.quantity, value=r.value, metadata=ends)}
            rates.append(
                EvalScore(
                    name=name,
                    scorer=name,
                    scored_samples=r.n,
                    unscored_samples=r.unscored + r.off_task,
                    metrics=metrics,
                )
            )
        spec = EvalSpec(
            created=datetime.datetime.fromtimestamp(
                (run / "arms" / arm / "measurements.jsonl").stat().st_mtime, datetime.UTC
            ).isoformat(),
            task=suite,
            dataset=EvalDataset(name=suite, samples=len(samples)),
            model=f"safebasin/{arm}",
            config=EvalConfig(),
            metadata={"run": report.run, **report.manifest},
        )
        results = EvalResults(total_samples=len(samples), completed_samples=len(samples), scores=rates)
        made.append(folder / f"{arm}-{suites.index(suite)}.eval")
        write_eval_log(EvalLog(status="success", eval=spec, results=results, samples=samples), str(made[-1]))
    return made
