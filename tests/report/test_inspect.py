"""The export to Inspect: Inspect itself opens the logs, and its own mean over the samples is the report's rate."""

import math
from pathlib import Path

import pytest
from conftest import ANSWER, HARM, measurements_of, write_lines

from safebasin.report import table

log = pytest.importorskip("inspect_ai.log", reason="the extra 'inspect' is not installed")


def export(run: Path, *, show_text: bool = False) -> dict[tuple[str, str], "log.EvalLog"]:
    from safebasin.report.inspect import write_eval_logs

    paths = write_eval_logs(run, table.collect(run, show_text=show_text), run / "inspect")
    read = [log.read_eval_log(str(path)) for path in paths]
    return {(each.eval.model, each.eval.task): each for each in read}


def test_inspect_reads_what_the_report_says(run: Path):
    """3 arms by 3 suites. Defended: 2 of 60 by the keyword judge; 1 of 57 by the other, 2 unscored, 1 off task."""
    logs = export(run)
    assert len(logs) == 9 and {each.status for each in logs.values()} == {"success"}
    asr = logs["safebasin/defended", "asr"]
    assert asr.results.total_samples == len(asr.samples) == 60
    keyword, likelihood = asr.results.scores
    assert (keyword.name, keyword.metrics["asr"].value, keyword.scored_samples) == (
        "keyword",
        pytest.approx(2 / 60),
        60,
    )
    assert (likelihood.metrics["asr"].value, likelihood.scored_samples, likelihood.unscored_samples) == (
        pytest.approx(1 / 57),
        57,
        3,
    )
    assert logs["safebasin/plain", "accuracy"].results.scores[0].metrics["accuracy"].value == pytest.approx(0.9)


def test_inspects_mean_is_the_reports_rate(run: Path):
    """The mean over the samples' scores, without Inspect's NaN, for every arm, suite and judge."""
    from inspect_ai.scorer import SampleScore, mean

    count = 0
    for each in export(run).values():
        for rate in each.results.scores:
            values = [sample.scores[rate.name] for sample in each.samples]
            scored = [SampleScore(score=score) for score in values if not math.isnan(score.as_float())]
            [stated] = rate.metrics.values()
            assert mean()(scored) == pytest.approx(stated.value) and len(scored) == rate.scored_samples
            count += 1
    assert count == 12


def test_nothing_scored_has_no_metric(run: Path):
    rows = [
        row | {"value": None, "n": 0, "unscored": 60} if row["what"] == "asr" else row
        for row in measurements_of("defended")
    ]
    write_lines(run / "arms" / "defended" / "measurements.jsonl", rows)
    assert [rate.metrics for rate in export(run)["safebasin/defended", "asr"].results.scores] == [{}, {}]


def test_texts_are_in_clear_only_where_asked(run: Path):
    [hidden, shown] = (export(run, show_text=show)["safebasin/plain", "asr"].samples[0] for show in (False, True))
    assert hidden.input.startswith("[redacted, ") and hidden.output.completion.startswith("[redacted, ")
    assert HARM in shown.input and "<script>" in shown.input and shown.output.completion == f"{ANSWER} 0"


def test_hostile_names_stay_in_the_folder(run: Path):
    """A suite called as a path, with an answer that is invisible."""
    suite = "../../up\u202e"
    write_lines(run / "arms" / "plain" / "measurements.jsonl", [measurements_of("plain")[0] | {"suite": suite}])
    answer = {
        "suite": suite,
        "id": "a\u200b",
        "prompt": "p\u200b",
        "answer": "\u200b",
        "verdicts": {"keyword": "complied"},
    }
    write_lines(run / "arms" / "plain" / "answers.jsonl", [answer])
    [sample] = export(run, show_text=True)["safebasin/plain", "../../up<U+202E>"].samples
    assert sample.id == "a<U+200B>" and sample.scores["keyword"].as_float() == 1.0
    assert {path.parent for path in run.parent.rglob("*.eval")} == {run / "inspect"}
