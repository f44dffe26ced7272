"""Whatever a row holds, it is a conversation or a reason of one line."""

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safebasin.data.chat import to_conversation
from safebasin.data.keys import RowForm

USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
VALUES = st.recursive(
    st.sampled_from([None, "", " ", "user", "assistant", "system", "q", 0, 1.5, float("nan"), b"x", True])
    | st.text(st.characters(codec=None), max_size=3)
    | st.sampled_from([USER, BOT, [USER, BOT], [], {}, {"from": "human", "value": "q"}, datetime.date(2020, 1, 1)]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "weight", "x"]), inner, max_size=4)
    ),
    max_leaves=6,
)
NAMES = ["messages", "conversations", "instruction", "input", "output", "system", "prompt", "completion", "answer", "x"]


@given(
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5) | VALUES,
    st.sampled_from(["", "{x}", "{x|prompt}: {y}"]),
)
def test_any_row_is_a_conversation_or_a_reason(row, template):
    turns = to_conversation(row, RowForm(prompt=template, answer=template))
    if isinstance(turns, str):
        assert turns and "\n" not in turns and len(turns) < 500
        turns.encode()
        return
    roles = [turn["role"] for turn in turns.messages if turn["role"] != "system"]
    assert roles == [("user", "assistant")[i % 2] for i in range(len(roles))] and roles
    assert all(isinstance(turn["content"], str) for turn in turns.messages)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": 5}, "empty or not a list"),
        ({"conversations": None}, "empty or not a list"),
        ({"conversations": "hello"}, "empty or not a list"),
        ({"conversations": ["hello"]}, "wrong role: 'hello'"),
        ({"messages": b"hello"}, "empty or not a list"),
        ({"messages": {"role": "user"}}, "empty or not a list"),
        ({"messages": [{"role": ["user"], "content": "q"}]}, "wrong role: ['user']"),
        ({"messages": [{"role": "user\x1b[2J" * 99, "content": "q"}]}, "wrong role: 'user\\x1b[2J"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "text"}]}]}, "must be text, found list"),
        ({"messages": [USER, {"role": "assistant"}]}, "no answer"),
        ({"\x1b[2J": 1}, "it has: <U+001B>[2J"),
        ({"prompt": [BOT], "completion": [USER]}, "must alternate, user first; found assistant, user"),
    ],
)
def test_reasons(row, reason):
    answer = to_conversation(row)
    assert isinstance(answer, str) and reason in answer and len(answer) < 300
