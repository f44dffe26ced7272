"""The file contracts: what one line of answers.jsonl and of measurements.jsonl holds."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safebasin.data.records import AnswerRecord, Measurement

RECORD = AnswerRecord("asr", "1", "", "do it", "Sure", None, {"keyword": "complied"}, {"keyword": -1.0}, None, True)
LINE = (
    '{"suite": "asr", "id": "1", "category": "", "prompt": "do it", "answer": "Sure", "expected": null, '
    '"verdicts": {"keyword": "complied"}, "scores": {"keyword": -1.0}, "correct": null, "finished": true, '
    '"thought": ""}'
)
texts = st.text(max_size=5)
records = st.builds(
    AnswerRecord,
    *(texts,) * 5,
    st.none() | texts,
    st.dictionaries(texts, texts, max_size=3),
    st.dictionaries(texts, st.floats(allow_nan=False) | st.integers(), max_size=3),
    st.none() | st.booleans(),
    st.booleans(),
)


def test_the_format_of_a_line_is_stable():
    assert json.dumps(dataclasses.asdict(RECORD)) == LINE
    assert AnswerRecord.from_row(json.loads(LINE)) == RECORD
    assert [field.name for field in dataclasses.fields(Measurement)] == [
        *("suite", "what", "value", "low", "high", "n", "unscored", "off_task", "unit", "judge", "category", "evidence")
    ]


@given(records)
def test_what_is_written_is_read(record):
    assert AnswerRecord.from_row(json.loads(json.dumps(dataclasses.asdict(record)))) == record


def test_lines_of_older_runs_and_with_more_keys_are_read():
    short = {"suite": "asr", "id": "1", "prompt": "p", "answer": "a", "verdicts": {}, "later": 1}
    assert AnswerRecord.from_row(short) == AnswerRecord("asr", "1", "", "p", "a")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "found NoneType"),
        ([1], "found list"),
        ({"suite": "asr"}, "without id, prompt, answer, verdicts"),
        ({"id": 1}, "'id' is of the wrong type: int"),
        ({"answer": None}, "'answer'"),
        ({"expected": 3}, "'expected'"),
        ({"verdicts": ["complied"]}, "'verdicts'"),
        ({"verdicts": {"keyword": None}}, "'verdicts'"),
        ({"scores": {"keyword": "high"}}, "'scores'"),
        ({"correct": "yes"}, "'correct'"),
        ({"finished": 1}, "'finished'"),
    ],
)
def test_a_damaged_line_says_what_is_wrong(wrong, message):
    row = json.loads(LINE) | wrong if isinstance(wrong, dict) and "suite" not in wrong else wrong
    with pytest.raises(ValueError, match=message):
        AnswerRecord.from_row(row)
