"""A run's answers and verdicts as eval logs that Inspect opens (the extra ``inspect``): one for every arm and suite.

A hit is 1 and a miss is 0, so that Inspect's mean is the report's rate. What was not scored or was off the task is NaN.
"""

import datetime
from collections.abc import Mapping
from pathlib import Path

from safebasin.console import printable
from safebasin.data.records import AnswerRecord
from safebasin.errors import UserError
from safebasin.report.compare import Hits, hits_of
from safebasin.report.files import answers_of, redact
from safebasin.report.rates import QUANTITIES, Reading
from safebasin.report.report import Report

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


def write_eval_logs(run: Path, report: Report, folder: Path) -> list[Path]:
    """Write ``folder/<arm>-<number of the suite>.eval``. Texts are in clear where the report's are."""
    answers = answers_of(run, report.arms, [])
    readings = [reading for reading in report.readings if reading.quantity in QUANTITIES]
    hits = hits_of(dict.fromkeys(reading.key for reading in readings), answers)
    suites, paths = list(dict.fromkeys(reading.suite for reading in readings)), []
    folder.mkdir(parents=True, exist_ok=True)
    for arm, suite in dict.fromkeys((reading.arm, reading.suite) for reading in readings):
        scorers = {r.judge or "correct": r for r in readings if (r.arm, r.suite) == (arm, suite)}
        rows = {
            prompt: row for (row_arm, row_suite, prompt), row in answers.items() if (row_arm, row_suite) == (arm, suite)
        }
        samples = [_sample(prompt, row, arm, scorers, hits, report.redacted) for prompt, row in rows.items()]
        measured = datetime.datetime.fromtimestamp(
            (run / "arms" / arm / "measurements.jsonl").stat().st_mtime, datetime.UTC
        )
        spec = EvalSpec(
            created=measured.isoformat(),
            task=suite,
            dataset=EvalDataset(name=suite, samples=len(samples)),
            model=f"safebasin/{arm}",
            config=EvalConfig(),
            metadata={"run": report.run, **report.manifest},
        )
        rates = [_rate(name, reading) for name, reading in scorers.items()]
        results = EvalResults(total_samples=len(samples), completed_samples=len(samples), scores=rates)
        paths.append(folder / f"{arm}-{suites.index(suite)}.eval")
        write_eval_log(EvalLog(status="success", eval=spec, results=results, samples=samples), str(paths[-1]))
    return paths


def _sample(
    prompt: str, row: AnswerRecord, arm: str, scorers: Mapping[str, Reading], hits: Hits, redacted: bool
) -> EvalSample:
    request, answer = (redact(text) if redacted else printable(text, 100_000) for text in (row.prompt, row.answer))
    scores = {}
    for name, reading in scorers.items():
        hit, word = hits[arm, reading.key].get(prompt), printable(row.verdicts.get(reading.judge, ""))
        if hit is None:
            scores[name] = Score.unscored(reason=word, answer=answer)
        else:
            scores[name] = Score(value=float(hit), answer=answer, explanation=word)
    return EvalSample(
        id=printable(prompt),
        epoch=1,
        input=request,
        target=printable(row.expected or ""),
        output=ModelOutput.from_content(arm, answer),
        scores=scores,
        metadata={"category": printable(row.category)},
    )


def _rate(name: str, reading: Reading) -> EvalScore:
    facts = {"low": reading.low, "high": reading.high, "off_task": reading.off_task}
    metric = (
        EvalMetric(name=reading.quantity, value=reading.value, metadata=facts) if reading.value is not None else None
    )
    return EvalScore(
        name=name,
        scorer=name,
        scored_samples=reading.n,
        unscored_samples=reading.unscored + reading.off_task,
        metrics={reading.quantity: metric} if metric else {},
    )
