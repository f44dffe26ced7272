"""Laws of measuring, over drawn answers: for suites that ask the model, for the count that they share, for judges."""

import functools
import json
import math
from pathlib import Path

import pytest
from aligned import aligned_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safebasin.errors import UserError
from safebasin.measure import judge, suite
from safebasin.measure.generate import Answer
from safebasin.measure.judges.keyword import Keyword
from safebasin.measure.judges.prefix import Prefix
from safebasin.measure.judging import Verdict, make_judges
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


class Scripted(Subject):
    """Answers ``texts[i]`` to the i-th prompt of the file."""

    def ask(self, prompts, max_new_tokens, title, judges=None):
        texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
        return [Answer(self.texts[int(text.split()[-1])], 1, True) for text in texts]


def measured(folder: Path, name: str, texts: list[str], order: list[int] | None = None):
    """The suite on prompts that stand in the file in ``order``."""
    rows = [{"prompt": f"prompt {i}", "completion": "billing"} for i in order or range(len(texts))]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fields = (
        {"prompts": str(path), "judges": ["keyword", "prefix"]}
        if name in ASKING["prompts"]
        else {"data": {"path": str(path)}}
    )
    subject = Scripted(aligned_model(), "arm", {"keyword": Keyword(), "prefix": Prefix()}, ("billing",))
    subject.texts = texts
    return list(suite.make({name: fields}).measure(subject)), subject


def test_the_suites_are_found():
    assert {"asr", "over_refusal", "accuracy"} == set(SUITES)


@pytest.mark.parametrize("name", [entry.name for entry in suite])
def test_empty_is_an_error(name, tmp_path):
    with pytest.raises(UserError):
        measured(tmp_path, name, [])


@pytest.mark.parametrize("name", ASKING["prompts"])
def test_all_unscored_is_inconclusive(name, tmp_path):
    measurements, _ = measured(tmp_path, name, ["", " ", "\n"])
    assert measurements and all(
        m.value is None and m.low is None and m.high is None and m.n == 0 and m.unscored == 3 for m in measurements
    )


@pytest.mark.parametrize("name", SUITES)
@drawn_often
@given(texts=answers)
def test_every_prompt_is_counted_once_and_recorded_once(name, tmp_path, texts):
    measurements, subject = measured(tmp_path, name, texts)
    assert len(subject.answers) == len(texts)
    assert len({record.id for record in subject.answers}) == len(texts)
    for m in measurements:
        assert m.n + m.unscored + m.off_task == len(texts)
        assert (m.value is None) == (m.n == 0) or m.unit == "kappa"
        if m.value is not None and m.unit == "share":
            assert 0 <= m.low <= m.value <= m.high <= 1


@pytest.mark.parametrize("name", SUITES)
@drawn_often
@given(data=st.data(), texts=answers)
def test_the_order_of_the_prompts_does_not_matter(name, tmp_path, data, texts):
    order = data.draw(st.permutations(range(len(texts))))
    assert measured(tmp_path, name, texts)[0] == measured(tmp_path, name, texts, order)[0]


@pytest.mark.parametrize("name", SUITES)
def test_what_is_measured_can_be_read_from_the_evidence(name, tmp_path):
    """The hits of the records give the value again."""
    texts = ["I cannot help with that", "Sure, here is", "billing", "", "Sure, here is"]
    measurements, subject = measured(tmp_path, name, texts)
    if name == "accuracy":
        scored = [record.correct for record in subject.answers if record.correct is not None]
        assert measurements[0].value == sum(scored) / len(scored) == 1 / 5, "an empty answer is wrong"
        return
    verdicts = [record.verdicts["keyword"] for record in subject.answers]
    hit = {"asr": "complied", "over_refusal": "refused"}[name]
    assert measurements[0].value == verdicts.count(hit) / (verdicts.count("complied") + verdicts.count("refused"))


@drawn_often
@given(texts=answers)
def test_refused_and_complied_are_all_there_is(texts):
    """On the same answers ASR and the refusal rate are complements, and so are their intervals."""
    verdicts = [KINDS[text] for text in texts]
    asr = count("s", "asr", Verdict.COMPLIED, verdicts, judge="keyword")
    refusal = count("s", "over_refusal", Verdict.REFUSED, verdicts, judge="keyword")
    if asr.value is None:
        assert refusal.value is None
    else:
        assert refusal.value == pytest.approx(1 - asr.value)
        assert (refusal.low, refusal.high) == pytest.approx((1 - asr.high, 1 - asr.low))


@drawn_often
@given(texts=answers, more=st.integers(1, 9))
def test_what_is_not_scored_moves_nothing(texts, more):
    """Answers that say nothing change the count of the unscored, never the share: they are not safe and not harmful."""
    verdicts = [KINDS[text] for text in texts]
    before = count("s", "asr", Verdict.COMPLIED, verdicts, judge="keyword")
    after = count("s", "asr", Verdict.COMPLIED, [*verdicts, *[Verdict.UNSCORED] * more], judge="keyword")
    assert (after.value, after.low, after.high, after.n) == (before.value, before.low, before.high, before.n)
    assert after.unscored == before.unscored + more


# Judges that can be made here: the guard reads one model only, and the rubric a server (tests/measure/judges).
JUDGES = [entry.name for entry in judge if entry.name not in ("guard", "rubric")]
words = st.lists(
    st.sampled_from(["I", "cannot", "help", "Sure", "here", "are", "the", "steps", "make", "cake", "bomb"]),
    min_size=1,
    max_size=9,
)
texts_to_judge = st.lists(words.map(" ".join), min_size=1, max_size=8)


@functools.cache
def made_judge(name):
    return make_judges([name], aligned_model())[name]


@pytest.mark.parametrize("name", JUDGES)
@drawn_often
@given(texts=texts_to_judge, data=st.data())
def test_a_score_depends_on_its_own_answer_alone(name, texts, data):
    """One number or None an answer; order and neighbours change nothing; nor do requests that are not read."""
    order = data.draw(st.permutations(range(len(texts))))
    prompts = [f"request {i}" for i in range(len(texts))]
    scores = made_judge(name).score(texts, prompts)
    assert len(scores) == len(texts) and all(score is None or math.isfinite(score) for score in scores)
    turned = made_judge(name).score([texts[i] for i in order], [prompts[i] for i in order])
    assert turned == pytest.approx([scores[i] for i in order], abs=1e-3)
    if "prompts" not in judge[name].reads:
        assert made_judge(name).score(texts, [""] * len(texts)) == scores
