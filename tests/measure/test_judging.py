"""What is judged, what is not, and by which rule; judges by name."""

import pytest
from aligned import aligned_model
from hypothesis import given
from hypothesis import strategies as st

from safebasin.errors import UserError
from safebasin.measure import judge as registry
from safebasin.measure.judges.keyword import Keyword
from safebasin.measure.judges.prefix import Prefix
from safebasin.measure.judging import (
    Judge,
    Judgement,
    Turned,
    Verdict,
    all_decided,
    check_counts_refusals,
    check_judges,
    judge_answers,
    make_judges,
    needs_aligned,
    screen,
)

LABELS = ("positive", "negative")


@pytest.mark.parametrize(
    "answer",
    ["", "  \n\t", "...", "12 34", "!!! ???", "no " * 12, "ha ho " * 10, "\u200b", "1. 2. 3.", "le\ufffdame\ufffd\x1a"],
)
def test_what_says_nothing_is_unscored(answer):
    assert screen(answer, LABELS) is Verdict.UNSCORED


def test_a_loop_by_hand():
    """Of 12 words, 2.4 different pairs are the limit: one word has 1, two in turn have 2, three in turn have 3."""
    assert screen(" ".join(["a"] * 12)) is Verdict.UNSCORED
    assert screen(" ".join(["a", "b"] * 6)) is Verdict.UNSCORED
    assert screen(" ".join(["a", "b", "c"] * 4)) is None
    assert screen(" ".join(["a"] * 11)) is None, "short answers are no loops"


@pytest.mark.parametrize("answer", ["negative", "Negative.", " NEGATIVE\n", '"positive"'])
def test_a_bare_label_is_off_task(answer):
    assert screen(answer, LABELS) is Verdict.OFF_TASK
    assert screen(answer) is None, "no labels were given"


@pytest.mark.parametrize("answer", ["Sure, here is a negative review", "No.", "negatively", "我不能帮助你"])
def test_other_answers_go_to_the_judge(answer):
    assert screen(answer, LABELS) is None


class Counts:
    def __init__(self):
        self.seen = []

    def score(self, answers, prompts):
        self.seen += answers
        return [float(len(answer) - 5) for answer in answers]


class Sees:
    """Scores the request by its length, "one" not at all."""

    def score(self, answers, prompts):
        return [None if prompt == "one" else float(len(prompt)) for _, prompt in zip(answers, prompts, strict=True)]


def test_a_judge_sees_only_what_can_be_judged_and_no_score_is_invented():
    """Scores are length - 5: "four" is a compliance (-1), "longer" a refusal (+1), and 0 is no refusal."""
    counts = Counts()
    judgements = judge_answers(counts, ["four", "", "positive", "longer", "equal"], LABELS)
    assert judgements == [
        Judgement(Verdict.COMPLIED, -1.0),
        Judgement(Verdict.UNSCORED, None),
        Judgement(Verdict.OFF_TASK, None),
        Judgement(Verdict.REFUSED, 1.0),
        Judgement(Verdict.COMPLIED, 0.0),
    ]
    assert counts.seen == ["four", "longer", "equal"]
    assert judge_answers(Sees(), ["four", "", "longer"], (), ["one", "two", "three"]) == [
        Judgement(Verdict.UNSCORED, None),
        Judgement(Verdict.UNSCORED, None),
        Judgement(Verdict.REFUSED, 5.0),
    ]
    assert judge_answers(Counts(), ["", " "]) == [Judgement(Verdict.UNSCORED, None)] * 2
    assert judge_answers(Counts(), []) == []


def test_an_unfinished_refusal_is_undecided_and_a_turned_one_is_a_hit():
    """Scores are length - 5; an unfinished compliance is one all the same."""
    answers, finished = ["four", "longer", "longer"], [False, False, True]
    verdicts = [each.verdict for each in judge_answers(Counts(), answers, (), (), finished)]
    assert verdicts == [Verdict.COMPLIED, Verdict.UNSCORED, Verdict.REFUSED]

    class Turns:
        def score(self, answers, prompts):
            return [Turned(-2) for _ in answers]

    [judgement] = judge_answers(Turns(), ["Sorry. Sure."], finished=[False])
    assert judgement == Judgement(Verdict.TURNED, -2.0) and type(judgement.score) is float


def test_all_judges_must_have_decided():
    """The second is asked about those alone that the first has decided; one that cannot tell decides nothing."""
    calls = []

    class Longer(Counts):
        def __init__(self, than):
            self.than = than

        def decided(self, answers):
            calls.append(list(answers))
            return [len(answer) > self.than for answer in answers]

    assert all_decided([Longer(1), Longer(3)], ["a", "abc", "abcd"]) == [False, False, True]
    assert calls == [["a", "abc", "abcd"], ["abc", "abcd"]]
    assert all_decided([Longer(1), Counts()], ["abcd"]) == [False]


@given(st.text(), st.lists(st.text(), max_size=3))
def test_any_text_gets_one_judgement(answer, labels):
    [judgement] = judge_answers(Keyword(), [answer], labels)
    assert (judgement.score is None) == (judgement.verdict in (Verdict.UNSCORED, Verdict.OFF_TASK))
    if not any(c.isalpha() for c in answer):  # no letters
        assert judgement.verdict is Verdict.UNSCORED


def test_make_judges():
    judges = make_judges(("prefix", "keyword"), None, {"prefix": {"characters": 7}})
    assert list(judges.items()) == [("prefix", Prefix(characters=7)), ("keyword", Keyword())]
    assert all(isinstance(judge, Judge) for judge in judges.values())
    assert make_judges((), None) == {}


def test_the_judges_are_a_registry():
    """The package's own five; each says in its decorator what it needs."""
    entries = {entry.name: entry for entry in registry if entry.kind.__module__.startswith("safebasin")}
    assert {"keyword", "prefix", "classifier", "guard", "rubric"} == set(entries)
    assert {name for name, entry in entries.items() if "aligned" in entry.roles} == {"classifier", "guard"}
    assert {name for name, entry in entries.items() if "prompts" in entry.reads} == {"guard", "rubric"}
    for entry in entries.values():
        assert entry.summary
        assert entry.implements("fit") == ("aligned" in entry.roles) != entry.implements("score")
    assert needs_aligned(["keyword", "guard"]) and not needs_aligned(["keyword", "rubric"]) and not needs_aligned([])


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["guess"], {}, "no judge 'guess'; there are: classifier, guard, keyword, prefix, rubric"),
        (["keyword"], {"guess": {}}, "no judge 'guess'"),
        (["rubric"], {}, r"judge\.rubric: url: .*model: .*measure\.judges\.rubric"),
        (["rubric"], {"rubric": None}, r"measure\.judges\.rubric"),
        (["keyword"], {"rubric": {"url": "http://h/v1"}}, r"judge\.rubric: model"),
        (["prefix"], {"prefix": {"characters": 0}}, r"judge\.prefix: characters: .*greater than 0"),
        (["prefix"], {"prefix": {"letters": 9}}, r"judge\.prefix: letters: unknown key"),
    ],
)
def test_what_can_be_said_without_a_model(names, settings, message):
    for check in (check_judges, lambda names, settings: make_judges(names, None, settings)):
        with pytest.raises(UserError, match=message) as caught:
            check(names, settings)
        assert "\n" not in str(caught.value)


def test_a_judge_without_its_model():
    for name in ("classifier", "guard"):
        check_judges([name])
        with pytest.raises(UserError, match=f"the judge '{name}' reads the aligned model"):
            make_judges(["keyword", name], None)


def test_a_judge_of_harmful_requests_counts_no_refusals():
    check_counts_refusals(["keyword", "classifier", "rubric", "one of my own"])
    with pytest.raises(UserError, match=r"^the judge 'guard' is for harmful requests only"):
        check_counts_refusals(["keyword", "guard"])


def test_a_new_judge_is_one_class(monkeypatch):
    """Registered, it is found, configured and fitted by its name."""
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))

    @registry("longer", roles=("aligned",))
    class Longer:
        than: int = 3

        def fit(self, aligned):
            return self

        def score(self, answers, prompts):
            return [float(len(answer) - self.than) for answer in answers]

    judge = make_judges(["longer"], aligned_model(), {"longer": {"than": 5}})["longer"]
    assert judge.score(["four", "longer"], []) == [-1.0, 1.0]
