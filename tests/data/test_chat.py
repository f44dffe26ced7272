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
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "weight", "x", "tool_calls", "name"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=6,
)
NAMES = ["messages", "conversations", "instruction", "input", "output", "system", "prompt", "completion", "answer", "x"]
NAMES += ["history", "tools", "context", "chosen", "rejected", "label"]


@given(
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5) | VALUES,
    st.sampled_from(["", "{x}", "{x|prompt}: {y}"]),
)
def test_any_row_is_a_conversation_or_a_reason(row, template):
    turns = to_conversation(row, RowForm(prompt=template, answer=template, chosen=template == ""))
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
        ({"conversations": ["hello"]}, "an object with role and content, found 'hello'"),
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


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


ONE = [turn("user", "q"), turn("assistant", "a")]
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"q": 1}}}
FORMS = {
    "a system column": ({"system": "s", "messages": ONE}, [turn("system", "s"), *ONE]),
    "a system column of ShareGPT": (
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [turn("system", "s"), *ONE],
    ),
    "conversations with roles": ({"conversations": ONE}, ONE),
    "weights": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "train": False}]},
        [ONE[0], turn("assistant", "a", weight=0)],
    ),
    "history": (
        {"instruction": "r", "input": "i", "output": "b", "history": [["q", "a"]]},
        [*ONE, turn("user", "r\n\ni"), turn("assistant", "b")],
    ),
    "Dolly": (
        {"instruction": "q", "context": "c", "response": "a", "category": "qa"},
        [turn("user", "q\n\nc"), ONE[1]],
    ),
    "Orca": ({"id": "x", "system_prompt": "s", "question": "q", "response": "a"}, [turn("system", "s"), *ONE]),
    "query": ({"query": "q", "response": "a"}, ONE),
    "prompt and response": ({"prompt": "q", "response": "a"}, ONE),
    "input and output": ({"input": "q", "output": "a"}, ONE),
    "question and answer": ({"question": "q", "answer": "a", "difficulty": "hard", "n": 3}, ONE),
    "parts": ({"messages": [turn("user", [{"type": "text", "text": "q"}]), ONE[1]]}, ONE),
    "the prompt again": ({"prompt": "q", "prompt_id": "7f", "messages": ONE}, ONE),
    "keys without a value": ({"messages": [ONE[0] | {"tool_calls": None}, ONE[1]], "tools": "", "images": []}, ONE),
    "tool calls": (
        {"messages": [ONE[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}, turn("tool", "t"), ONE[1]]},
        [ONE[0], turn("assistant", "", tool_calls=[CALL]), turn("tool", "t"), ONE[1]],
    ),
    "arguments as JSON": (
        {"conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "look", "arguments": {"q": 1}}'},
        ]},
        [ONE[0], turn("assistant", "", tool_calls=[{k: v for k, v in CALL.items() if k != "id"}])],
    ),
    "two columns with the same turns": ({"messages": ONE, "prompt": ONE[:1]}, ONE),
    "a system column and the same turn": (
        {"system": "s", "conversations": [{"from": "system", "value": "s"}, *ONE]},
        [turn("system", "s"), *ONE],
    ),
    "an empty instruction": ({"instruction": "", "input": "q", "output": "a"}, ONE),
    "turns as JSON": (
        {"prompt": '[{"role": "user", "content": "q"}]', "completion": '[{"role": "assistant", "content": "a"}]'},
        ONE,
    ),
    "JSON that is no turns": (
        {"prompt": '[{"from": "Oslo"}]', "completion": '[{"role": "x", "content": "a"}]'},
        [turn("user", '[{"from": "Oslo"}]'), turn("assistant", '[{"role": "x", "content": "a"}]')],
    ),
    "an empty history of a CSV file": ({"instruction": "q", "input": "", "output": "a", "history": "[]"}, ONE),
    "history as JSON": (
        {"instruction": "r", "output": "b", "history": '[["q", "a"]]'},
        [*ONE, turn("user", "r"), turn("assistant", "b")],
    ),
    "blank tools": ({"messages": ONE, "tools": "  "}, ONE),
    "answers in a request are not learned": (
        {"prompt": [*ONE, turn("user", "r")], "completion": [turn("assistant", "b")]},
        [ONE[0], turn("assistant", "a", weight=0), turn("user", "r"), turn("assistant", "b")],
    ),
    "but those that say so": (
        {"system": "s", "prompt": [ONE[0], ONE[1] | {"weight": 1}, turn("user", "r")], "completion": "b"},
        [turn("system", "s"), ONE[0], turn("assistant", "a", weight=1), turn("user", "r"), turn("assistant", "b")],
    ),
    "an empty answer that is not learned": (
        {"messages": [ONE[0], turn("assistant", " ", weight=0), *ONE]},
        [ONE[0], turn("assistant", " ", weight=0), *ONE],
    ),
    "thoughts": (
        {"messages": [ONE[0], ONE[1] | {"thinking": "hm"}]},
        [ONE[0], turn("assistant", "a", reasoning_content="hm")],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "messages"), FORMS.values(), ids=FORMS)
def test_forms_that_people_have(row, messages):
    assert list(to_conversation(row).messages) == messages


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": ONE, "conversations": ONE}, "column 'conversations' is not read"),
        ({"messages": ONE, "dialog": ONE}, "column 'dialog' is not read"),
        ({"messages": ONE, "prompt": "other"}, "column 'prompt' is not read: beside messages"),
        ({"messages": ONE, "persona": "a pirate"}, "'persona' is not read"),
        ({"messages": ONE, "images": ["x.png"]}, "column 'images' is not read: text alone"),
        ({"prompt": "q", "completion": "a", "label": True}, "KTO"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "column 'chosen' is not read: a preference pair"),
        ({"prompt": "q", "completion": "a", "response": "b"}, "'completion' and 'response' both hold an answer"),
        ({"text": "a"}, "no known columns"),
        ({"messages": ONE, "history": [["q", "a"]]}, "column 'history' is not read"),
        ({"prompt": "q", "completion": "a", "text": "b"}, "column 'text' is not read"),
        ({"instruction": "q", "output": "a", "history": ["q", "a"]}, "'history' must be pairs"),
        ({"messages": [ONE[0], ONE[1] | {"weight": "0"}]}, "key 'weight' of a turn is '0'"),
        ({"messages": [ONE[0], ONE[1] | {"weight": 0.5}]}, "is 0.5; it must be 0 or 1"),
        ({"messages": [ONE[0], ONE[1] | {"weight": 1, "train": False}]}, "contradict"),
        ({"messages": [ONE[0] | {"train": True}, ONE[1]]}, "asks to learn a user turn"),
        ({"messages": [ONE[0], ONE[1] | {"prefix": True}]}, "key 'prefix' of a turn is not read"),
        ({"messages": [turn("user", [{"type": "image"}]), ONE[1]]}, "a part of type 'image'"),
        ({"messages": [turn("developer", "x"), *ONE]}, "wrong role: 'developer'"),
        ({"messages": [ONE[0], turn("tool", "t"), ONE[1]]}, "answers no tool call"),
        ({"messages": [ONE[0], ONE[1] | {"tool_calls": [{"name": "x y", "arguments": {}}]}]}, "needs a name"),
        ({"messages": ONE, "tools": "{"}, "no JSON"),
        ({"messages": "[{'role': 'user', 'content': 'q'}]"}, "Python's notation; write it by json.dumps"),
        ({"messages": [ONE[0], turn("assistant", None, function_call={"name": "f"})]}, "write it as `tool_calls`"),
        ({"messages": [ONE[0], turn("assistant", None, refusal="no")]}, "key 'refusal' of a turn is not read"),
        ({"messages": [ONE[0], ONE[1] | {"train_detail": [{"train": False}]}]}, "learned as a whole"),
        ({"prompt": "q", "completion": "a", "input_ids": [1, 2]}, "column 'input_ids' is not read: tokens"),
        ({"prompt": None, "completion": "a"}, "no request: column 'prompt' is empty"),
        ({"question": "q", "answers": "a"}, "no answer: no column of completion"),
        ({"instruction": "q", "input": ["x"], "output": "a"}, "column 'input' must be text, found list"),
        ({"prompt": ["q"], "completion": "a"}, "must be an object with role and content, found 'q'"),
        ({"prompt;completion": "q;a"}, "set `delimiter: ';'`"),
        ({"messages": [ONE[0], turn("assistant", " "), *ONE]}, "the answer in turn 2 is empty"),
        ({"conversations": [{"from": "human", "role": "user", "value": "q"}]}, "a turn has both 'role' and 'from'"),
        ({"messages": {"role": "user"}}, "column 'messages': the conversation is empty or not a list"),
        ({"system": "s", "messages": [turn("system", "t"), *ONE]}, "must come first, as the only one"),
        ({"messages": [ONE[0], ONE[1] | {"is_loss": 0}]}, "key 'is_loss' of a turn is not read"),
        ({"messages": [ONE[0], ONE[1] | {"mask": 1}]}, "key 'mask' of a turn is not read: what is learned is said by"),
        ({"messages": [ONE[0] | {"name": {"first": "x"}}, ONE[1]]}, "key 'name' of a turn is not read"),
        ({"prompt": "q", "completion": 3}, "the content of a turn (assistant) must be text, found int"),
        ({"prompt,completion": "q,a"}, "set `delimiter: ','`"),
        ({"messages": [ONE[0], ONE[1] | {"label": "false"}]}, "key 'label' of a turn is not read"),
        ({"messages": ONE, "sample_weight": 0.0}, "column 'sample_weight' is not read: what is learned is said by"),
        ({"messages": ONE, "train_on_input": True}, "column 'train_on_input' is not read"),
        ({"prompt": "q", "completion": "a", "label": "False"}, "KTO"),
        ({"instruction": "q", "query": "r", "output": "a"}, "beside instruction and output it would be read twice"),
        ({"instruction": "q", "output": "a", "history": 5}, "'history' must be pairs"),
        ({"messages": [ONE[0], ONE[1] | {"tool_calls": [CALL | {"note": "n"}]}]}, "key 'note' of a tool call"),
        (
            {"messages": [ONE[0], ONE[1] | {"tool_calls": [CALL | {"function": {**CALL["function"], "plan": "p"}}]}]},
            "key 'plan' of a tool call is not read",
        ),
        ({"messages": [ONE[0], ONE[1] | {"tool_calls": [CALL | {"type": "mcp"}]}]}, "and type function"),
        (
            {"messages": [ONE[0], ONE[1] | {"tool_calls": [{"name": "f", "arguments": '{"q": 1, "q": 2}'}]}]},
            "an object has a key twice",
        ),
        (
            {"conversations": [ONE[0], {"from": "function_call", "value": '{"name": "f"}', "tool_calls": [CALL]}]},
            "a function_call turn has its call in its text",
        ),
        ({"conversations": [ONE[0], {"from": "function_call", "value": None}, *ONE]}, "has its call in its text"),
    ],
)
def test_what_is_not_read_is_refused_by_its_name(row, reason):
    assert reason in to_conversation(row)


def test_a_template_shows_no_list():
    form = RowForm(prompt="{q}", answer="{a|b}")
    assert to_conversation({"q": "q", "a": None, "b": 3}, form).messages[1]["content"] == "3"
    assert "no column 'a|b' with a text" in to_conversation({"q": "q", "a": ["x"]}, form)


def test_a_template_names_any_column():
    """Of a table of Excel too; what stands in braces and is no column is not learned as it stands."""
    form = RowForm(prompt="{Question Text}", answer="{a.b|best-answer}")
    row = {"Question Text": "q", "best-answer": "a"}
    assert list(to_conversation(row, form).messages) == ONE
    assert "no column 'a.b|best-answer'" in to_conversation({"Question Text": "q", "a": {"b": 1}}, form)
    literal = '{"x": {}} \\boxed{}'
    assert to_conversation(row, RowForm(prompt=literal, answer="a")).messages[0]["content"] == literal


def test_numbers_as_text_say_nothing():
    """A CSV file has no numbers; its index has no name."""
    row = {"": "7", "Unnamed: 0": "7", "loss_value": "-1.5e-3", "prompt": "q", "completion": "a"}
    assert list(to_conversation(row).messages) == ONE
    assert "column '' is not read" in to_conversation(row | {"": "7 and a text"})
    assert list(to_conversation(row | {"flagged": "True"}).messages) == ONE


def test_a_recipe_maps_columns_and_turns_and_takes_the_chosen_answer():
    row = {"dialog": [{"speaker": "user", "text": "q"}, {"speaker": "assistant", "text": "a"}], "note": "n"}
    names = {"messages": "dialog", "role": "speaker", "content": "text"}
    assert list(to_conversation(row, RowForm(columns=names, ignore=("note",))).messages) == ONE
    assert "'note'" in to_conversation(row, RowForm(columns=names))
    assert "the row has a column" in to_conversation(row | {"messages": ONE}, RowForm(columns=names))
    chosen = RowForm(chosen=True)
    for pair in (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"chosen": ONE, "rejected": ONE},
        {"prompt": "q", "chosen": ONE, "rejected": ONE},
        {"prompt": ONE[:1], "chosen": ONE[1:], "rejected": ONE[1:]},
        {"conversations": ONE[:1], "chosen": ONE[1], "rejected": ONE[1]},
        {"conversations": ONE[:1], "chosen": "a", "rejected": "b"},
        {"prompt": "q", "messages": ONE, "chosen": ONE, "rejected": [ONE[0], turn("assistant", "b")]},
    ):
        assert list(to_conversation(pair, chosen).messages) == ONE
    before = [ONE[0], turn("assistant", "a", weight=0)]  # what chosen and rejected have in common is the request
    pair = {"chosen": [*ONE, *ONE], "rejected": [*ONE, ONE[0], turn("assistant", "b")]}
    assert list(to_conversation(pair, chosen).messages) == [*before, *ONE]
    any_order = RowForm(turns="any")
    turns = [turn("assistant", "hi"), ONE[0], ONE[0], ONE[1], turn("developer", "d"), ONE[1]]
    assert [turn["role"] for turn in to_conversation({"messages": turns}, any_order).messages][-2] == "developer"


def test_the_text_of_alpaca_says_nothing_new():
    text = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nq\n\n### Response:\na"
    )
    assert list(to_conversation({"instruction": "q", "input": "", "output": "a", "text": text}).messages) == ONE


@pytest.mark.parametrize("text", ['["\\ud83d"]', "[" * 500 + "]" * 500, "[1e999]", "{"])
def test_json_inside_a_text_is_looked_at_as_rows_are(text):
    for row in ({"messages": ONE, "tools": text}, {"messages": [ONE[0], ONE[1] | {"tool_calls": text}]}):
        assert "\n" not in to_conversation(row) and ("tool" in to_conversation(row))
