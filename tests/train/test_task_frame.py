"""Task frame: which alignment rows are asked in the words of the task, and what is refused."""

import dataclasses
from itertools import cycle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safebasin.data.builtin import rows_of
from safebasin.data.example import Example, read_examples
from safebasin.errors import UserError
from safebasin.train.compose import Composition
from safebasin.train.methods.task_frame import TaskFrame

FRAME = TaskFrame(frame="Which desk? {request} One word.")
SAFEGRAD = {"safegrad": {"align": "sft"}}


def row(request: str, answer: str, *earlier: str) -> Example:
    """A conversation of one request and its answer, and of an earlier pair."""
    texts = (*earlier, request, answer)
    turns = [{"role": role, "content": text} for role, text in zip(cycle(("user", "assistant")), texts)]
    return Example("id", tuple(turns), {}, 1)


def test_by_hand():
    refused, harmless = row("Break in.", "I'm sorry, but no.", "Hi.", "Hello."), row("Name a fruit.", "Apple.")
    framed = row("Which desk? Break in. One word.", "I'm sorry, but no.", "Hi.", "Hello.")
    assert FRAME.align_rows([refused, harmless]) == [refused, harmless, framed]


@given(
    st.lists(
        st.tuples(st.text(min_size=1, max_size=9), st.sampled_from(["I cannot.", "Apple.", "Sure, here is"])),
        min_size=1,
    )
)
def test_a_copy_of_every_refusal(pairs):
    rows = [row(*pair) for pair in pairs]
    framed = [row(f"Which desk? {request} One word.", answer) for request, answer in pairs if answer == "I cannot."]
    if framed:
        assert FRAME.align_rows(rows) == rows + framed
    else:
        with pytest.raises(UserError, match=r"no answer of data\.align holds a phrase"):
            FRAME.align_rows(rows)


def test_the_built_in_rows():
    """210 of 420 refuse; one harmless answer holds a phrase of a refusal."""
    rows = read_examples(enumerate(rows_of("builtin:aligned"), 1)).examples
    assert (len(rows), len(FRAME.align_rows(rows))) == (420, 420 + 211)


@pytest.mark.parametrize("frame", ["", "{request}", " {request}\n", "no place", "{request} twice {request}"])
def test_a_frame_has_words_and_one_place(frame):
    with pytest.raises(UserError, match=r"task_frame\.frame"):
        Composition.of([SAFEGRAD, {"task_frame": {"frame": frame}}])


def test_it_needs_a_method_that_reads_alignment_rows():
    own = {"task_frame": dataclasses.asdict(FRAME)}
    with pytest.raises(UserError, match="task_frame needs a method beside it"):
        Composition.of(["sft", own])
    rows = [row("Break in.", "I cannot.")]
    assert Composition.of([SAFEGRAD, own]).align_rows(rows) == FRAME.align_rows(rows)
    assert Composition.of([SAFEGRAD]).align_rows(rows) == rows


def test_the_trigger_of_backdoor_align_stands_before_the_frame(tmp_path):
    (tmp_path / "secret").write_text("k7")
    methods = [{"backdoor_align": {"trigger": str(tmp_path / "secret")}}, {"task_frame": dataclasses.asdict(FRAME)}]
    plain, framed = Composition.of(methods).align_rows([row("Break in.", "I cannot.")])
    secret = {"role": "system", "content": "k7"}
    assert plain.messages == (secret, *row("Break in.", "I cannot.").messages)
    assert framed.messages == (secret, *row("Which desk? Break in. One word.", "I cannot.").messages)
