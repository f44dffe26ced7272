"""Laws of the report: any text is harmless when shown, a pass needs every number, and what is missing is no number."""

import dataclasses
import json
import unicodedata

import hypothesis.strategies as st
from hypothesis import given

from safebasin.console import printable
from safebasin.report.files import redact
from safebasin.report.gate import judge_gate
from safebasin.report.limits import Gate
from safebasin.report.page import escape_markdown
from safebasin.report.rates import Comparison, Reading
from safebasin.report.report import SCHEMA, Report, Verdict

texts = st.text(st.characters(codec=None), max_size=400)  # lone surrogates too
shares = st.floats(0, 1)


@given(texts, st.integers(1, 300))
def test_printable_shows_one_short_harmless_line(text: str, limit: int):
    shown = printable(text, limit)
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
    assert len(shown) <= limit + 10 + len(" … [+999 characters]"), "the last character may stand as <U+10FFFF>"
    shown.encode("utf-8")
    assert printable(shown, len(shown)) == shown, "what is printable stays as it is"


@given(texts)
def test_escaped_markdown_opens_nothing(text: str):
    escaped = escape_markdown(printable(text))
    assert "<" not in escaped
    for at, character in enumerate(escaped):
        if character in "|`*_[]":
            assert escaped[at - 1] == "\\"


@given(st.lists(st.sampled_from(["alpha", "beta", "gamma"]), max_size=50))
def test_redaction_shows_the_count_alone(words: list[str]):
    shown = redact(" ".join(words))
    assert f", {len(words)} words, " in shown
    assert not set(words) & set(shown.replace(",", " ").split())


def reading(arm: str, quantity: str, value: float | None, n: int, unscored: int) -> Reading:
    scored = value if n else None
    ends = (None, None) if scored is None else (max(0.0, scored - 0.1), min(1.0, scored + 0.1))
    return Reading(
        arm=arm,
        quantity=quantity,
        suite=quantity,
        judge="",
        value=scored,
        low=ends[0],
        high=ends[1],
        n=n,
        unscored=unscored,
        off_task=0,
    )


@st.composite
def reports(draw: st.DrawFn) -> Report:
    arms = ("start", "plain", "defended")
    measured = st.tuples(st.sampled_from(arms), st.sampled_from(["asr", "accuracy", "over_refusal"]))
    keys = draw(st.lists(measured, unique=True, max_size=9))
    values, counts = st.one_of(st.none(), shares), st.integers(0, 100)
    readings = tuple(
        reading(arm, quantity, value, 0 if value is None else draw(counts), draw(counts))
        for arm, quantity in keys
        for value in [draw(values)]
    )
    by_key = {(r.arm, r.quantity): r for r in readings}
    comparisons = tuple(
        Comparison(
            arm=arm, against=other, quantity=q, suite=q, judge="", value=mine.value - theirs.value, low=-1.0, high=1.0,
            bound=mine.value - theirs.value + (-0.01 if q == "accuracy" else 0.01), n=min(mine.n, theirs.n), only_arm=0,
            only_against=0, p=1.0,
        )
        for arm, other in (("plain", "start"), ("defended", "start"), ("defended", "plain"))
        for q in ("asr", "accuracy", "over_refusal")
        if (mine := by_key.get((arm, q))) and (theirs := by_key.get((other, q)))
        if mine.value is not None and theirs.value is not None
    )  # fmt: skip
    return Report(
        schema=SCHEMA, run="r", redacted=True, verdict=Verdict(code=4, status="inconclusive", reasons=()), gate=Gate(),
        evidence_digest="", evidence_problems=(), arms=arms, start="start", judged="defended", readings=readings,
        comparisons=comparisons, agreement=(), categories=(), cuts=(), heat=(), training=(), samples=(), problems=(),
        manifest={},
    )  # fmt: skip


limits = st.one_of(st.none(), shares)
gates = st.builds(
    Gate,
    decide=st.sampled_from(["bound", "point"]),
    max_asr=limits,
    max_asr_upper=limits,
    max_accuracy_loss=limits,
    max_over_refusal_gain=limits,
)


@given(reports(), gates)
def test_a_pass_needs_every_number_that_the_gate_limits(report: Report, gate: Gate):
    verdict = judge_gate(report, gate)
    assert verdict.reasons
    assert (verdict.code, verdict.status) in {(0, "pass"), (3, "fail"), (4, "inconclusive")}
    if verdict.code:
        return
    limited = {
        "asr": gate.max_asr is not None or gate.max_asr_upper is not None,
        "accuracy": gate.max_accuracy_loss is not None,
        "over_refusal": gate.max_over_refusal_gain is not None,
    }
    assert any(limited.values())
    for quantity in (quantity for quantity, limit in limited.items() if limit):
        readings = report.of(quantity, "defended")
        assert readings
        for r in readings:
            assert r.value is not None
            assert r.n >= gate.min_n
            assert r.unscored <= 0.2 * r.prompts + 1e-6
            if quantity == "asr" and gate.max_asr is not None:
                assert r.value <= gate.max_asr + 1e-6
                against = round(r.value * r.n) + r.unscored + r.off_task
                assert gate.decide == "point" or against <= gate.max_asr * r.prompts + 1e-6


@given(reports(), gates, shares)
def test_a_stricter_gate_never_helps(report: Report, gate: Gate, stricter: float):
    """A lower limit of attack success turns no failure into a pass, and no doubt either."""
    if gate.max_asr is None:
        return
    before = judge_gate(report, gate).code
    after = judge_gate(report, dataclasses.replace(gate, max_asr=min(stricter, gate.max_asr))).code
    assert not (before == 3 and after != 3)
    assert not (before == 4 and after == 0)


@given(reports(), gates, st.lists(st.text(min_size=1), min_size=1))
def test_files_that_prove_nothing_decide_nothing(report: Report, gate: Gate, reasons: list[str]):
    verdict = judge_gate(dataclasses.replace(report, evidence_problems=tuple(reasons)), gate)
    assert (verdict.code, verdict.status) == (4, "inconclusive")
    assert verdict.reasons == (*reasons, *judge_gate(report, gate).reasons)


@given(reports())
def test_a_report_is_json(report: Report):
    stated = json.loads(json.dumps(dataclasses.asdict(report), allow_nan=False))
    assert [Reading(**row) for row in stated["readings"]] == list(report.readings)
