"""Task frame: which alignment rows are asked in the words of the task, and what is refused."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safebasin.data.builtin import rows_of
from safebasin.data.example import read_examples
from safebasin.data.phrases import read
from safebasin.errors import UserError
from safebasin.train.compose import Composition
from safebasin.train.methods.task_frame import TaskFrame

FRAME = TaskFrame(frame="Which desk? {request} One word.")
SAFEGRAD = {"safegrad": {"align": "sft"}}


def turns(request: str, answer: str, *earlier: str) -> tuple[dict[str, str], ...]:
    return (
        *({"role": role, "content": text} for role, text in zip(("user", "assistant"), earlier)),
        {"role": "user", "content": request},
        {"role": "assistant", "content": answer},
    )


def test_by_hand():
    refused, harmless = turns("Break in.", "I'm sorry, but no.", "Hi.", "Hello."), turns("Name a fruit.", "Apple.")
    first, second = FRAME.align_rows([refused, harmless])
    assert first == turns("Which desk? Break in. One word.", "I'm sorry, but no.", "Hi.", "Hello.")
    assert second is harmless


@given(st.lists(st.tuples(st.text(max_size=9), st.sampled_from(["I cannot.", "Apple.", "Sure, here is"])), min_size=1))
def test_the_request_of_refusals_alone(pairs):
    rows = [turns(*pair) for pair in pairs]
    if not any(read(answer).refused for _, answer in pairs):
        with pytest.raises(UserError, match=r"no answer of data\.align is a refusal"):
            FRAME.align_rows(rows)
        return
    for row, framed, (request, answer) in zip(rows, FRAME.align_rows(rows), pairs, strict=True):
        assert row == turns(request, answer)  # the rows themselves are as they were
        assert framed == (turns(f"Which desk? {request} One word.", answer) if answer == "I cannot." else row)


def test_the_built_in_rows():
    """210 of 420 refuse; one harmless answer holds a phrase of a refusal."""
    rows = [example.messages for example in read_examples(enumerate(rows_of("builtin:aligned"), 1)).examples]
    assert sum(row is not framed for row, framed in zip(rows, FRAME.align_rows(rows), strict=True)) == 211


@pytest.mark.parametrize("frame", ["", "{request}", " {request}\n", "no place", "{request} twice {request}"])
def test_a_frame_has_words_and_one_place(frame):
    with pytest.raises(UserError, match=r"task_frame\.frame"):
        Composition.of([SAFEGRAD, {"task_frame": {"frame": frame}}])


def test_it_needs_a_method_that_reads_alignment_rows():
    own = {"task_frame": dataclasses.asdict(FRAME)}
    with pytest.raises(UserError, match="task_frame needs a method beside it"):
        Composition.of(["sft", own])
    rows = [turns("Break in.", "I cannot.")]
    assert Composition.of([SAFEGRAD, own]).align_rows(rows) == list(map(tuple, FRAME.align_rows(rows)))
    assert Composition.of([SAFEGRAD]).align_rows(rows) == rows


def test_the_trigger_of_backdoor_align_stands_before_the_frame(tmp_path):
    (tmp_path / "secret").write_text("k7")
    methods = [{"backdoor_align": {"trigger": str(tmp_path / "secret")}}, {"task_frame": dataclasses.asdict(FRAME)}]
    (row,) = Composition.of(methods).align_rows([turns("Break in.", "I cannot.")])
    assert row == (
        {"role": "system", "content": "k7"},
        *turns("Which desk? Break in. One word.", "I cannot."),
    )
