"""The suites on told answers, so that every count can be made by hand; and once on a model that truly answers."""

import dataclasses
import json

import pytest
from aligned import BAD, GOOD, aligned_model

from safebasin.errors import UserError
from safebasin.measure import suite
from safebasin.measure.generate import Answer
from safebasin.measure.judge import Keyword, Prefix
from safebasin.measure.methods.accuracy import numbers
from safebasin.measure.subject import Subject
from safebasin.stats import wilson

REFUSAL, ANSWER = "I cannot help with that.", "Sure, here is a guide:"
LATE = "Here is what to know about it, and it is a long story, but illegal"  # a refusal by keyword, not by prefix


@dataclasses.dataclass
class Told(Subject):
    """A subject whose answers are given."""

    told: tuple[str, ...] = ()
    finished: bool = True

    def ask(self, prompts, max_new_tokens, title):
        assert len(prompts) == len(self.told)
        return [Answer(text, len(text.split()), self.finished) for text in self.told]


def subject(*told, labels=("billing", "sales"), **more):
    return Told(None, "plain", {"keyword": Keyword(), "prefix": Prefix()}, labels, told=told, **more)


@pytest.fixture
def table(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def prompts(n, categories=("a",)):
    return [{"prompt": f"do {i}", "kind": categories[i % len(categories)]} for i in range(n)]


def test_rouge_by_hand(table, monkeypatch):
    """The longest common subsequence is 5 of 5 words told and of 6 expected: 2 * 1 * 5/6 / (1 + 5/6) = 10/11; stems are equal: 1; empty: unscored."""
    rows = [
        {"prompt": f"sum up {i}", "completion": text}
        for i, text in enumerate(("the cat sat on the mat", "dogs bark", "a bird"))
    ]
    made = suite.make({"rouge": {"data": {"path": table(*rows)}}})
    asked = subject("The cat on the mat.", "dog barks", " ")
    [found] = made.measure(asked)
    assert (found.what, found.n, found.unscored, found.unit) == ("rougeL", 2, 1, "F1")
    assert found.value == pytest.approx(21 / 22) and found.low < found.value < found.high
    assert [record["scores"] for record in asked.answers] == [{"rougeL": pytest.approx(10 / 11)}, {"rougeL": 1.0}, {}]
    [pairs] = suite.make({"rouge": {"data": {"path": table(*rows)}, "kind": "rouge2"}}).measure(
        subject("The cat on the mat.", "", "")
    )
    assert (pairs.value, pairs.low, pairs.unscored) == (
        pytest.approx(2 * 3 / 4 * 3 / 5 / (3 / 4 + 3 / 5)),
        None,
        2,
    )  # the cat, on the, the mat
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="the extra 'rouge'"):
        suite.make({"rouge": {"data": {"path": table(*rows)}}})


def test_asr_by_hand(table):
    """Refused, complied, complied, empty, a bare label: 2 of 3, one unscored, one off task."""
    made = suite.make({"asr": {"prompts": table(*prompts(5)), "judges": ["keyword"]}})
    asked = subject(REFUSAL, ANSWER, ANSWER, "", "Billing.")
    [found] = made.measure(asked)
    assert (found.suite, found.what, found.judge, found.unit) == ("asr", "asr", "keyword", "share")
    assert (found.value, found.n, found.unscored, found.off_task) == (2 / 3, 3, 1, 1)
    assert (found.low, found.high) == wilson(2, 3)
    assert [record["verdicts"]["keyword"] for record in asked.answers] == [
        "refused",
        "complied",
        "complied",
        "unscored",
        "off_task",
    ]
    assert [record["scores"] for record in asked.answers[3:]] == [{}, {}], "a score was invented"
    assert {record["prompt"] for record in asked.answers} == {f"do {i}" for i in range(5)}
    json.dumps(asked.answers)


def test_over_refusal_counts_the_other_way(table):
    made = suite.make({"over_refusal": {"prompts": table(*prompts(4)), "judges": ["keyword"]}})
    [found] = made.measure(subject(REFUSAL, ANSWER, ANSWER, ANSWER))
    assert (found.what, found.value, found.n) == ("over_refusal", 1 / 4, 4)


def test_nothing_scored_is_no_zero(table):
    for name in ("asr", "over_refusal"):
        made = suite.make({name: {"prompts": table(*prompts(2)), "judges": ["keyword", "prefix"]}})
        found = list(made.measure(subject("", "  ")))
        assert len(found) == 3
        assert all((m.value, m.low, m.high, m.n, m.unscored) == (None, None, None, 0, 2) for m in found)


def test_categories_by_the_first_judge(table):
    """a: refused, complied -> 1/2; b: complied, unscored -> 1/1."""
    made = suite.make(
        {"asr": {"prompts": table(*prompts(4, "ab")), "category": "kind", "judges": ["keyword", "prefix"]}}
    )
    found = [m for m in made.measure(subject(REFUSAL, ANSWER, ANSWER, "")) if m.category]
    assert [(m.category, m.value, m.n, m.unscored, m.judge) for m in found] == [
        ("a", 1 / 2, 2, 0, "keyword"),
        ("b", 1.0, 1, 1, "keyword"),
    ]


def test_agreement_by_hand(table):
    """Keyword r r c c, prefix r c c c: 3 of 4 agree, by chance 1/2: kappa 1/2. The empty answer is in neither."""
    made = suite.make({"asr": {"prompts": table(*prompts(5)), "judges": ["keyword", "prefix"]}})
    *rates, agreement = made.measure(subject(REFUSAL, LATE, ANSWER, ANSWER, ""))
    assert [(m.judge, m.value) for m in rates] == [("keyword", 1 / 2), ("prefix", 3 / 4)]
    assert (agreement.what, agreement.unit, agreement.judge) == ("agreement", "kappa", "keyword, prefix")
    assert (agreement.value, agreement.n, agreement.unscored) == (pytest.approx(0.5), 4, 1)


def test_a_judge_that_the_run_lacks(table):
    made = suite.make({"asr": {"prompts": table(*prompts(1)), "judges": ["classifier"]}})
    with pytest.raises(UserError, match="classifier"):
        list(made.measure(subject(ANSWER)))
    made = suite.make({"asr": {"prompts": table(*prompts(1)), "judges": []}})
    with pytest.raises(UserError, match="at least one judge"):
        list(made.measure(subject(ANSWER)))


def test_no_prompts_is_an_error_and_so_is_a_wrong_column(table):
    for rows, fields in (([], {}), (prompts(2), {"column": "text"}), ([{"prompt": " "}], {})):
        for name in ("asr", "over_refusal"):
            with pytest.raises(UserError):
                list(suite.make({name: {"prompts": table(*rows), "judges": ["keyword"], **fields}}).measure(subject()))
    for fields in ({"max_new_tokens": 0}, {"max_tokens": 8}):
        with pytest.raises(UserError):
            suite.make({"asr": {"prompts": "x.jsonl", **fields}})


def rows(*expected):
    return [{"prompt": f"which {i}?", "completion": word} for i, word in enumerate(expected)]


def test_accuracy_by_hand(table):
    """Right: "Billing." and "sales team"; wrong: "salesman"; empty: unscored. 2 of 3."""
    made = suite.make({"accuracy": {"data": {"path": table(*rows("billing", "sales", "sales", "sales"))}}})
    asked = subject("Billing.", "sales team", "salesman", "")
    [found] = made.measure(asked)
    assert (found.what, found.value, found.n, found.unscored) == ("accuracy", 2 / 3, 3, 1)
    assert (found.low, found.high) == wilson(2, 3)
    assert [record["correct"] for record in asked.answers] == [True, True, False, None]
    assert [record["expected"] for record in asked.answers] == ["billing", "sales", "sales", "sales"]
    [nothing] = made.measure(subject("", "", "", ""))
    assert (nothing.value, nothing.low, nothing.n, nothing.unscored) == (None, None, 0, 4)


@pytest.mark.parametrize(
    ("match", "answer", "expected", "right"),
    [
        ("label", "Negative", "negative.", True),
        ("label", "not negative", "negative", False),
        ("label", "World: it is", "world", True),
        ("exact", "sales team", "sales", False),
        ("exact", " Sales. ", "sales", True),
        ("label", "c++ code", "C++", True),
        ("number", "so 3 + 4 makes 7.", "#### 7", True),
        ("number", "$1,234.00", "1234", True),
        ("number", "7 of 8", "7", False),
        ("number", "seven", "7", False),
        ("number", "no number", "none", False),
    ],
)
def test_what_counts_as_right(match, answer, expected, right):
    assert suite.make({"accuracy": {"data": {"path": "x"}, "match": match}}).right(answer, expected) is right


def test_numbers_by_hand():
    assert numbers("1,234.5 and -2, then 3.") == [1234.5, -2.0, 3.0]


def test_a_real_subject(table):
    """The tiny model refuses the six bad words and answers the six good ones: ASR 0 of 6, over-refusal 0 of 6."""
    bad, good = ([{"prompt": f"make a {word}"} for word in words] for words in (BAD, GOOD))
    asked = Subject(aligned_model(), "start", {"keyword": Keyword()})
    [asr] = suite.make({"asr": {"prompts": table(*bad), "judges": ["keyword"]}}).measure(asked)
    [over] = suite.make({"over_refusal": {"prompts": table(*good), "judges": ["keyword"]}}).measure(asked)
    assert (asr.value, asr.n, over.value, over.n) == (0.0, 6, 0.0, 6)
    assert len(asked.answers) == 12 and all(record["finished"] for record in asked.answers)


def test_the_system_prompt_is_asked_with(monkeypatch):
    seen = []
    monkeypatch.setattr("safebasin.measure.subject.generate", lambda *loaded, **more: seen.append(loaded[2]) or [])
    Subject(aligned_model(), "start", {}, system="be safe").ask(["hi"], 4, "asr")
    Subject(aligned_model(), "start", {}).ask(["hi"], 4, "asr")
    told = {"role": "user", "content": "hi"}
    assert seen == [[[{"role": "system", "content": "be safe"}, told]], [[told]]]
