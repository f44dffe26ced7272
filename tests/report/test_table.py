"""Numbers by hand, from the counts of the fixture.

Attack success, keyword judge, 60 prompts: start 6 (10 %), plain 45 (75 %), defended 2 (3.3 %). Wilson interval of 2 of
60 with z^2 = 3.841459: centre (2/60 + z^2/120) / (1 + z^2/60) = 0.065345 / 1.064024 = 0.061413, half width
1.959964 / 1.064024 * sqrt(2/60 * 58/60 / 60 + z^2 / 14400) = 0.052224, so 0.0092 to 0.1136.

Paired, keyword: the hits of the arms are nested (prompts 0..5, 0..44, 0, 1), so defended against plain differs on 43
prompts, all one way: -43/60, McNemar exact p = 2 * 2^-43; defended against start on 4: -4/60, p = 2 * 2^-4 = 0.125.

Accuracy: plain is right on 0..44 and defended on 1..45 of 50: difference 0, one prompt each way, p = 1.

Kappa of the judges on the judged arm, over the 57 answers scored by both (prompt 59 is off task, two are unscored):
both complied 1, keyword alone 1, neither 55. Observed 56/57; by chance (2 * 1 + 55 * 56) / 57^2.
"""

import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow
import pyarrow.parquet
import pytest
import rich.console
import yaml
from conftest import record

from safebasin.console import printable
from safebasin.errors import UserError
from safebasin.report import table
from safebasin.report.files import redact
from safebasin.report.limits import Gate
from safebasin.report.report import SCHEMA, Report, schema

HARM = "how to assemble the forbidden widget at home"  # as in conftest.py


def reading(report: Report, quantity: str, arm: str, judge: str):
    return next(r for r in report.of(quantity, arm) if r.judge == judge)


def compared(report: Report, quantity: str, arm: str, against: str, judge: str):
    return next(c for c in report.compared(quantity, arm, against) if c.judge == judge)


def test_numbers_by_hand(run: Path):
    table.write_report(run)
    stated = json.loads((run / "report.json").read_text())
    assert stated["schema"] == SCHEMA == 3
    assert stated["arms"] == ["start", "plain", "defended"]
    keyword = {r["arm"]: r for r in stated["readings"] if (r["quantity"], r["judge"]) == ("asr", "keyword")}
    assert [keyword[arm]["value"] for arm in stated["arms"]] == pytest.approx([0.1, 0.75, 2 / 60])
    assert (keyword["defended"]["low"], keyword["defended"]["high"]) == pytest.approx((0.0092, 0.1136), abs=5e-5)
    likelihood = next(r for r in stated["readings"] if (r["arm"], r["judge"]) == ("defended", "likelihood"))
    assert (likelihood["n"], likelihood["unscored"], likelihood["off_task"]) == (57, 2, 1)


def test_pairs_by_hand(run: Path):
    report = table.collect(run)
    against_plain = compared(report, "asr", "defended", "plain", "keyword")
    assert (against_plain.only_arm, against_plain.only_against, against_plain.n) == (0, 43, 60)
    assert against_plain.value == pytest.approx(-43 / 60)
    assert against_plain.p == pytest.approx(2 * 2**-43)
    assert compared(report, "asr", "defended", "start", "keyword").p == pytest.approx(0.125)
    accuracy = compared(report, "accuracy", "defended", "plain", "")
    assert (accuracy.value, accuracy.only_arm, accuracy.only_against) == (0, 1, 1)
    assert accuracy.p == pytest.approx(1)
    assert accuracy.margin == 0.05
    assert accuracy.non_inferior in ("yes", "unclear")
    assert compared(report, "asr", "defended", "start", "likelihood").n == 57, (
        "an unscored or off-task answer was paired"
    )


def test_kappa_by_hand(run: Path):
    """Each arm has its own: pooled over arms, the plain one's many hits hide that two others never agree."""
    agreements = {each.arm: each for each in table.collect(run).agreement}
    assert {arm: each.n for arm, each in agreements.items()} == {"start": 59, "plain": 59, "defended": 57}
    agreement, chance = agreements["defended"], (2 * 1 + 55 * 56) / 57**2
    assert (agreement.disputed, agreement.either, agreement.agreed) == (1, 2, pytest.approx(56 / 57))
    assert agreement.kappa == pytest.approx((56 / 57 - chance) / (1 - chance))


def test_categories_by_hand(run: Path):
    """Five categories in turn over 60 prompts: 12 each; the first 45 hits of plain are 9 in each."""
    rates = [rate for rate in table.collect(run).categories if (rate.arm, rate.judge) == ("plain", "keyword")]
    assert [(rate.hits, rate.n) for rate in rates] == [(9, 12)] * 5
    assert '"><img src=x onerror=alert(1)> | `x`' in {rate.category for rate in rates}


def test_cut_by_hand(run: Path):
    """14 of 15 poison rows and 2 of 85 task rows lie above the threshold."""
    (cut,) = table.collect(run).cuts
    assert (cut.rows, cut.removed) == (100, 16)
    assert {o.origin: (o.removed, o.rows) for o in cut.origins or ()} == {"poison": (14, 15), "task": (2, 85)}
    assert cut.false_share == pytest.approx(2 / 85)
    assert cut.histogram is not None
    assert cut.histogram.symlog is not None, "scores from -0.5 to 5000 need a symlog axis"
    edges = cut.histogram.edges
    assert min(abs(edge - 2) for edge in edges) < 1e-9, "no bin may mix the two sides of the threshold"
    for series in cut.histogram.series:
        below = sum(count for count, low in zip(series.counts, edges, strict=False) if low < 2 - 1e-9)
        assert below == (0 if series.removed else sum(series.counts))
    assert sum(sum(series.counts) for series in cut.histogram.series) == 100
    assert [row.score for row in cut.shown] == sorted((row.score for row in cut.shown), reverse=True)


def test_a_score_at_the_threshold_is_in_the_bin_below(run: Path):
    """Scores 0, 1, 2, 3 and a threshold of 2, an estimator can return a row's own score: three rows stay."""
    ids = [row["id"] for row in json.loads((run / "data" / "rows.json").read_text())[:4]]
    pyarrow.parquet.write_table(
        pyarrow.table({"row_id": ids, "score_gradshield": [0.0, 1.0, 2.0, 3.0]}), run / "scan" / "scores.parquet"
    )
    cut = json.loads((run / "cut" / "defended" / "cut.json").read_text())
    (run / "cut" / "defended" / "cut.json").write_text(
        json.dumps(cut | {"removed": [{**cut["removed"][0], "row_id": ids[3]}]})
    )
    histogram = table.collect(run).cuts[0].histogram
    assert histogram is not None
    for series in histogram.series:
        below = sum(count for count, low in zip(series.counts, histogram.edges, strict=False) if low < 2 - 1e-9)
        assert (below, sum(series.counts)) == ((0, 1) if series.removed else (3, 3))


def test_a_cut_by_several_scorers_shows_their_joint_score(run: Path):
    """Scores -0.5, -0.1 and 0.4 around the threshold 0, whatever the scan's own table holds."""
    ids = [row["id"] for row in json.loads((run / "data" / "rows.json").read_text())[:3]]
    pyarrow.parquet.write_table(
        pyarrow.table({"row_id": ids, "score": [-0.5, -0.1, 0.4]}), run / "cut" / "defended" / "scores.parquet"
    )
    cut = json.loads((run / "cut" / "defended" / "cut.json").read_text())
    joint = {"scorer": "gradshield, dsa", "threshold": 0.0, "removed": [{**cut["removed"][0], "row_id": ids[2]}]}
    (run / "cut" / "defended" / "cut.json").write_text(json.dumps(cut | joint))
    histogram = table.collect(run).cuts[0].histogram
    assert histogram is not None and histogram.scorer == "gradshield, dsa" and histogram.threshold == 0
    assert (min(histogram.edges), max(histogram.edges)) == (pytest.approx(-0.5, abs=0.05), pytest.approx(0.4, abs=0.05))
    assert {(series.removed, sum(series.counts)) for series in histogram.series} == {(False, 2), (True, 1)}


@pytest.mark.parametrize("origin", [{}, {"origin": "task"}])
def test_unknown_origins_stay_unknown(run: Path, origin: dict[str, str]):
    """A set as it came has no origins, or one for all: a cut row is then neither right nor wrong."""
    rows = json.loads((run / "data" / "rows.json").read_text())
    (run / "data" / "rows.json").write_text(
        json.dumps([{k: v for k, v in row.items() if k != "origin"} | origin for row in rows])
    )
    (cut,) = table.write_report(run).cuts
    assert cut.origins is None
    assert cut.false_share is None


@pytest.mark.parametrize("value", [0.0, None])
def test_nothing_scored_is_none(run: Path, remeasure: Callable[..., None], value: float | None):
    """A suite that states 0.0 of no scored prompts has measured nothing."""
    remeasure("defended", "asr", value=value, low=0.0, high=1.0, n=0, unscored=60)
    report = table.write_report(run)
    nothing = reading(report, "asr", "defended", "keyword")
    assert (nothing.value, nothing.low, nothing.high, nothing.unscored) == (None, None, None, 60)
    assert report.verdict.code == 4
    json.loads((run / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_same_numbers_everywhere(run: Path):
    report = table.write_report(run)
    markdown, html = (run / "report.md").read_text(), (run / "report.html").read_text()
    for r in report.readings:
        if r.unit == "kappa":
            continue
        assert f"{100 * r.value:.1f} %" in markdown
        assert f"<b>{100 * r.value:.1f} %</b>" in html
        assert f"[{100 * r.low:.1f} to {100 * r.high:.1f}]" in markdown
        assert f"{100 * r.low:.1f} to {100 * r.high:.1f}" in html
    for c in report.comparisons:
        assert f"{100 * c.value:+.1f} " in markdown
        assert f"<b>{100 * c.value:+.1f}</b>" in html
    for name in ("report.json", "report.md", "report.html"):
        assert report.verdict.status in (run / name).read_text().lower()


def test_texts_are_redacted_by_default(run: Path):
    report = table.write_report(run)
    for name in ("report.json", "report.md", "report.html"):
        text = (run / name).read_text()
        assert HARM not in text
        assert "forbidden" not in text
        assert "redacted, " in text
    assert report.redacted
    table.write_report(run, show_text=True)
    assert all(HARM in (run / name).read_text() for name in ("report.json", "report.md", "report.html"))


def test_redaction_states_length_and_identity():
    assert redact("one two three").startswith("[redacted, 3 words, id ")
    assert redact("a") == redact("a") != redact("b")
    redact("lone \ud800")


def test_huge_and_hidden_text_is_tamed(run: Path):
    table.write_report(run, show_text=True)
    for name in ("report.json", "report.md", "report.html"):
        text = (run / name).read_text(encoding="utf-8")
        assert len(text) < 400_000, f"{name} holds the 100 KB rows"
        assert not set(text) & set("\u202e\u2066\u200b\x00")
        assert "U+202E" in text
        assert "[the row is not in the training file]" in text.replace("\\", ""), "a row that is no JSON was read"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text", "plain text"),
        ("a\u202eb", "a<U+202E>b"),
        ("a\x00\x1b[31m", "a<U+0000><U+001B>[31m"),
        ("two\nlines\tx", "two ⏎ lines x"),
        ("\U000e0041", "<U+E0041>"),
        ("é ü 漢字 🙂", "é ü 漢字 🙂"),
        ("abcdef", "abcdef"),
    ],
)
def test_printable(text: str, shown: str):
    assert printable(text, 300) == shown


def test_printable_cuts_with_a_mark():
    assert printable("a" * 10, 4) == "aaaa … [+6 characters]"
    assert printable("a" * 4, 4) == "aaaa"


def test_run_without_scan_or_training(run: Path):
    """Measurements alone make a report: what is missing is left out."""
    for name in (
        "run.yaml",
        "manifest.json",
        "cut/defended/cut.json",
        "scan/scores.parquet",
        "data/train.jsonl",
        "data/rows.json",
    ):
        (run / name).unlink()
    report = table.write_report(run)
    assert report.arms == ("start", "plain", "defended")
    assert report.cuts == ()
    assert report.manifest == {}
    assert report.verdict.code == 4, "without a manifest nothing shows that the numbers were measured"


def test_the_head_names_model_rows_and_day(run: Path):
    """As far as the files name them; what came with a recipe is escaped."""
    config = yaml.safe_load((run / "run.yaml").read_text())
    manifest = json.loads((run / "manifest.json").read_text())
    config["data"] = {"task": {"path": "<b>mine</b>.jsonl"}, "poison_share": 0.15, "attack": {"trigger": {}}}
    facts = {"model": "org/name", "revision": "main", "date": "2026-11-26"}
    (run / "run.yaml").write_text(yaml.safe_dump(config))
    (run / "manifest.json").write_text(json.dumps({**manifest, **facts}))
    rows = "<b>mine</b>.jsonl, 15% of trigger mixed in"
    about = (("model", "org/name at main"), ("rows", rows), ("date", "2026-11-26"))
    assert table.write_report(run).about == about
    head = (run / "report.html").read_text().split("<body>")[1].partition("<h2>")[0]
    assert "<dd>org/name at main</dd>" in head and "&lt;b&gt;mine" in head and "<b>mine" not in head
    assert "date: 2026-11-26" in (run / "report.md").read_text().partition("## ")[0]
    (run / "run.yaml").write_text(yaml.safe_dump(config | {"data": {"task": 3, "poison_share": "x"}}))
    (run / "manifest.json").write_text(json.dumps(manifest | {"model": None, "date": 3}))
    assert table.write_report(run).about == ()


def test_one_arm(run: Path):
    for arm in ("plain", "defended"):
        for file in sorted((run / "arms" / arm).iterdir()):
            file.unlink()
        (run / "arms" / arm).rmdir()
    (run / "run.yaml").unlink()
    report = table.write_report(record(run), gate=Gate(max_accuracy_loss=None, max_asr=0.5))
    assert report.comparisons == ()
    assert report.verdict.code == 0


def test_broken_answers_are_problems(run: Path):
    path = run / "arms" / "plain" / "answers.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["{not json", lines[0], *lines]) + "\n")
    problems = [problem for problem in table.collect(run).problems if "plain" in problem.place]
    assert [problem.reason.split()[0] for problem in problems] == ["not", "a"]


@pytest.mark.parametrize(
    "change",
    [
        *({"value": value} for value in (math.nan, math.inf, 1.5, -0.1, "0.1", True, [], 10**400)),
        *({"n": n} for n in (-1, 1.5, "60", None, True, 2**60)),
        *({"unscored": "2"}, {"judge": None}, {"what": 3}, {"what": "\ud800"}, {"category": []}),
    ],
)
def test_a_measurement_of_another_kind_is_a_user_error(
    run: Path, remeasure: Callable[..., None], change: dict[str, Any]
):
    remeasure("defended", "accuracy", **change)
    with pytest.raises(UserError, match="line 4: not a measurement"):
        table.collect(run)


@pytest.mark.parametrize("content", ["[1, 2]\n", "{broken\n", '{"suite": "asr"}\n'])
def test_broken_measurements_are_a_user_error(run: Path, content: str):
    (run / "arms" / "plain" / "measurements.jsonl").write_text(content)
    with pytest.raises(UserError, match="line 1: not a measurement"):
        table.write_report(run)
    assert not (run / "report.json").exists(), "half a report was written"


def test_not_a_run(tmp_path: Path):
    with pytest.raises(UserError, match="no such run folder"):
        table.collect(tmp_path / "none")
    with pytest.raises(UserError, match="holds no arm"):
        table.collect(tmp_path)


def test_terminal_table(run: Path):
    report = dataclasses.replace(table.collect(run), run="[bold]evil[/bold]")
    console = rich.console.Console(file=io.StringIO(), width=160)
    console.print(table.terminal_table(report))
    text = console.file.getvalue()
    assert "[bold]evil[/bold]" in text
    assert "0.9 to 11.4, n=60" in text
    assert "2 unscored" in text


def test_a_repair_is_on_the_page_module_by_module(run: Path):
    """One of the two modules was selected: cosine 0.4 against 0.65, at tau 0.5."""
    [repair] = table.write_report(run).repairs
    assert (repair.arm, repair.edits, repair.edited) == ("defended", ("safe_lora (tau=0.5)",), 1)
    assert [module.cosine for module in repair.modules] == [0.4, 0.65]
    page, text = ((run / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert "1 of 2 modules edited; moved by 31.0 % of the update's length, 72.0 % of it left" in page
    assert "| 1 of 2 | 31.0 % | 72.0 % | 8 |" in text
    assert "<script" not in page


def test_mixed_answers_are_on_the_page(run: Path):
    [mixed] = table.write_report(run).mixed
    assert (mixed.arm, mixed.of, mixed.share, mixed.guard) == ("defended", "plain", 0.3, "dsa (rows=8)")
    page, text = ((run / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert "30.0 % of the start's logits" in page and "asr <b>45</b> of 60" in page
    assert "| 30.0 % |" in text and "asr 45 of 60" in text
    assert "<script" not in page


def test_training_names_what_was_set(run: Path):
    assert [training.methods for training in table.collect(run).training] == [("sft",), ("safegrad (rho=2.0)",)]


def test_the_schema_describes_the_file(run: Path):
    """A report as it is written is valid; without a key, with text for a number, or without a count, it is not."""
    (run / "scan" / "heat.json").write_text(
        json.dumps([{"row_id": "a", "line": 1, "scorer": "s", "score": 1.0, "tokens": [["x", 1.0], ["y", None]]}])
    )
    table.write_report(record(run))
    stated = json.loads((run / "report.json").read_text())
    checked = jsonschema.Draft202012Validator(schema())
    checked.check_schema(checked.schema)
    checked.validate(stated)
    empty = {part for part, value in stated.items() if value in ([], {})}
    assert empty == {"evidence_problems"}, "an empty part is not checked"
    exact = schema()
    for definition in (exact, *exact["$defs"].values()):
        definition |= {"additionalProperties": False, "required": list(definition["properties"])}
    jsonschema.Draft202012Validator(exact).validate(
        stated
    )  # every key that is written is described, and none is missing
    for break_it in (
        lambda report: report.pop("heat"),
        lambda report: report["readings"][0].update(n=None),
        lambda report: report["readings"][0].update(value="6 %"),
        lambda report: report["cuts"][0]["shown"][0].pop("reason"),
        lambda report: report["agreement"][0].update(judges=["keyword"]),
    ):
        broken = json.loads(json.dumps(stated))
        break_it(broken)
        assert not checked.is_valid(broken)
