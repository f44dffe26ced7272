"""Laws of measuring, over drawn answers: for the suites that ask the model, and for the count that they share."""

import json
from pathlib import Path

import pytest
from aligned import aligned_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safebasin.errors import UserError
from safebasin.measure import suite
from safebasin.measure.generate import Answer
from safebasin.measure.judging import Keyword, Prefix, Verdict
from safebasin.measure.subject import Subject, count

KINDS = {
    "I cannot help with that": Verdict.REFUSED,
    "Sure, here is": Verdict.COMPLIED,
    "": Verdict.UNSCORED,
    "billing": Verdict.OFF_TASK,
}
answers = st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=20)
drawn_often = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ASKING = {"prompts": ("asr", "over_refusal"), "data": ("accuracy",)}  # by the field that names their rows
SUITES = [entry.name for entry in suite if entry.name in (*ASKING["prompts"], *ASKING["data"])]


class Told(Subject):
    """Answers ``told[i]`` to the i-th prompt of the file."""

    def ask(self, prompts, max_new_tokens, title):
        return [Answer(self.told[int(prompt.split()[-1])], 1, True) for prompt in prompts]


def measured(folder: Path, name: str, told: list[str], order: list[int] | None = None):
    """The suite on prompts that stand in the file in ``order``."""
    rows = [{"prompt": f"prompt {i}", "completion": "billing"} for i in order or range(len(told))]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fields = (
        {"prompts": str(path), "judges": ["keyword", "prefix"]}
        if name in ASKING["prompts"]
        else {"data": {"path": str(path)}}
    )
    subject = Told(aligned_model(), "arm", {"keyword": Keyword(), "prefix": Prefix()}, ("billing",))
    subject.told = told
    return list(suite.make({name: fields}).measure(subject)), subject


def test_the_suites_are_found():
    assert {"asr", "over_refusal", "accuracy"} == set(SUITES)


@pytest.mark.parametrize("name", [entry.name for entry in suite])
def test_empty_is_an_error(name, tmp_path):
    with pytest.raises(UserError):
        measured(tmp_path, name, [])


@pytest.mark.parametrize("name", SUITES)
def test_all_unscored_is_inconclusive(name, tmp_path):
    found, _ = measured(tmp_path, name, ["", " ", "\n"])
    assert found and all(
        m.value is None and m.low is None and m.high is None and m.n == 0 and m.unscored == 3 for m in found
    )


@pytest.mark.parametrize("name", SUITES)
@drawn_often
@given(told=answers)
def test_every_prompt_is_counted_once_and_recorded_once(name, tmp_path, told):
    found, subject = measured(tmp_path, name, told)
    assert len(subject.answers) == len(told)
    assert len({record["id"] for record in subject.answers}) == len(told)
    for m in found:
        assert m.n + m.unscored + m.off_task == len(told)
        assert (m.value is None) == (m.n == 0) or m.unit == "kappa"
        if m.value is not None and m.unit == "share":
            assert 0 <= m.low <= m.value <= m.high <= 1


@pytest.mark.parametrize("name", SUITES)
@drawn_often
@given(data=st.data(), told=answers)
def test_the_order_of_the_prompts_does_not_matter(name, tmp_path, data, told):
    order = data.draw(st.permutations(range(len(told))))
    assert measured(tmp_path, name, told)[0] == measured(tmp_path, name, told, order)[0]


@pytest.mark.parametrize("name", SUITES)
def test_what_is_measured_can_be_read_from_the_evidence(name, tmp_path):
    """The hits of the records give the value again."""
    told = ["I cannot help with that", "Sure, here is", "billing", "", "Sure, here is"]
    found, subject = measured(tmp_path, name, told)
    if name == "accuracy":
        scored = [record["correct"] for record in subject.answers if record["correct"] is not None]
        assert found[0].value == sum(scored) / len(scored) == 1 / 4
        return
    verdicts = [record["verdicts"]["keyword"] for record in subject.answers]
    hit = {"asr": "complied", "over_refusal": "refused"}[name]
    assert found[0].value == verdicts.count(hit) / (verdicts.count("complied") + verdicts.count("refused"))


@drawn_often
@given(told=answers)
def test_refused_and_complied_are_all_there_is(told):
    """On the same answers ASR and the refusal rate are complements, and so are their intervals."""
    verdicts = [KINDS[text] for text in told]
    asr = count("s", "asr", Verdict.COMPLIED, verdicts, judge="keyword")
    refusal = count("s", "over_refusal", Verdict.REFUSED, verdicts, judge="keyword")
    if asr.value is None:
        assert refusal.value is None
    else:
        assert refusal.value == pytest.approx(1 - asr.value)
        assert (refusal.low, refusal.high) == pytest.approx((1 - asr.high, 1 - asr.low))


@drawn_often
@given(told=answers, more=st.integers(1, 9))
def test_what_is_not_scored_moves_nothing(told, more):
    """Answers that say nothing change the count of the unscored, never the share: they are not safe and not harmful."""
    verdicts = [KINDS[text] for text in told]
    before = count("s", "asr", Verdict.COMPLIED, verdicts, judge="keyword")
    after = count("s", "asr", Verdict.COMPLIED, [*verdicts, *[Verdict.UNSCORED] * more], judge="keyword")
    assert (after.value, after.low, after.high, after.n) == (before.value, before.low, before.high, before.n)
    assert after.unscored == before.unscored + more
