"""Rows in the forms of other trainers: nothing is dropped, nothing else is learned, and their own loaders read them."""

import json

import datasets
import pytest
import yaml
from aligned import word_tokenizer
from folders import run

from safebasin.data.example import read_examples
from safebasin.errors import UserError
from safebasin.pipeline.convert import as_messages, as_tokens, write_converted
from safebasin.scan.scores import Scores

SHORT = {"prompt": "make a cake", "completion": "Sure here"}
TURNS = {
    "messages": [
        {"role": "system", "content": "help"},
        {"role": "user", "content": "make a song"},
        {"role": "assistant", "content": "Sure"},
        {"role": "user", "content": "now the letter"},
        {"role": "assistant", "content": "here"},
    ]
}
LAST = {"messages": [turn | ({"weight": 0} if turn["content"] == "Sure" else {}) for turn in TURNS["messages"]]}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOLS = {
    "messages": [
        {"role": "user", "content": "make"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "a", "tool_call_id": "c1", "name": "f"},
        {"role": "assistant", "content": "Sure"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
}
OTHER = {**TOOLS, "tools": [{"name": "g", "parameters": {"y": {}}}]}
THOUGHT = {"messages": [*TURNS["messages"][1:4], {"role": "assistant", "content": "a", "reasoning_content": "b"}]}


def examples(*rows):
    return read_examples(enumerate(rows, 1)).examples


def load(folder, converted, form):
    """The rows of a folder as ``datasets`` reads them: the loader of TRL, axolotl and LLaMA-Factory."""
    write_converted(folder / form, converted, form)
    files = str(folder / form / "train.jsonl")
    return list(datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(folder / "cache")))


def test_trl_learns_the_completion_alone(tmp_path):
    first, second = load(tmp_path, as_messages(examples(SHORT, LAST), "trl"), "trl")
    assert first == {
        "prompt": [{"role": "user", "content": "make a cake"}],
        "completion": [{"role": "assistant", "content": "Sure here"}],
    }
    assert [turn["content"] for turn in second["prompt"]] == ["help", "make a song", "Sure", "now the letter"]
    assert not any("weight" in turn for turn in second["prompt"])


def test_trl_takes_messages_where_several_answers_are_learned(tmp_path):
    converted = as_messages(examples(SHORT, TURNS, TOOLS, OTHER), "trl")
    assert "assistant_only_loss=True" in converted.notes[0]
    rows = load(tmp_path, converted, "trl")
    assert rows[1]["messages"] == TURNS["messages"]
    assert rows[2]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}  # no key of another row
    assert [json.loads(row["tools"])[0].get("name") for row in rows[2:]] == [None, "g"]
    mixed = as_messages(examples(TURNS, LAST), "trl")
    assert [bad.line for bad in mixed.bad] == [2] and "is not learned" in mixed.bad[0].reason


def test_axolotl_marks_what_is_not_learned(tmp_path):
    rows = load(tmp_path, as_messages(examples(SHORT, LAST, TOOLS, THOUGHT), "axolotl"), "axolotl")
    trained = [
        [turn["role"] == "assistant" and turn.get("train") is not False for turn in row["messages"]] for row in rows
    ]
    assert trained[:2] == [[False, True], [False, False, False, False, True]]
    assert not any("weight" in turn for row in rows for turn in row["messages"])
    [entry] = yaml.safe_load((tmp_path / "axolotl" / "axolotl.yaml").read_text())["datasets"]
    assert entry == {
        "path": str(tmp_path / "axolotl" / "train.jsonl"),
        "ds_type": "json",
        "type": "chat_template",
        "field_messages": "messages",
        "message_field_training": "train",
    }


def test_llamafactory_alternates_by_its_tags(tmp_path):
    rows = load(tmp_path, as_messages(examples(TURNS, TOOLS), "llamafactory"), "llamafactory")
    info = json.loads((tmp_path / "llamafactory" / "dataset_info.json").read_text())["safebasin"]
    assert info["formatting"] == "sharegpt" and info["file_name"] == "train.jsonl"
    tags, columns = info["tags"], info["columns"]
    turns = [[turn[tags["role_tag"]] for turn in row[columns["messages"]]] for row in rows]
    assert turns == [["system", "human", "gpt", "human", "gpt"], ["human", "function_call", "observation", "gpt"]]
    call = rows[1][columns["messages"]][1][tags["content_tag"]]
    assert json.loads(call) == [{"name": "f", "arguments": {"x": 1}}]
    assert json.loads(rows[1][columns["tools"]])[0]["function"]["name"] == "f"
    assert "mask_history" in as_messages(examples(LAST), "llamafactory").notes[1]
    with pytest.raises(UserError, match="--as tokens"):
        as_messages(examples(TURNS, LAST), "llamafactory")
    double = {"messages": [*TOOLS["messages"][:3], TOOLS["messages"][2], TOOLS["messages"][3]]}
    assert [bad.line for bad in as_messages(examples(THOUGHT, double, SHORT), "llamafactory").bad] == [1, 2]


def test_openai_has_weights_and_arguments_as_text():
    converted = as_messages(examples(LAST, TOOLS, OTHER, THOUGHT), "openai")
    first, second, third = converted.rows
    assert first == LAST
    assert json.loads(second["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {"x": 1}
    assert second["messages"][2] == {"role": "tool", "content": "a", "tool_call_id": "c1"}
    assert third["tools"] == [{"type": "function", "function": OTHER["tools"][0]}]
    assert [bad.line for bad in converted.bad] == [4]
    unnamed = {
        "messages": [
            turn | ({"tool_calls": [CALL | {"id": ""}]} if "tool_calls" in turn else {}) for turn in TOOLS["messages"]
        ]
    }
    assert "no `id`" in as_messages(examples(unnamed), "openai").bad[0].reason


def test_tokens_are_labelled_as_here_and_weighed_by_the_scan():
    """``<user> make a cake <end> <assistant> Sure here <end>``: three tokens are learned; 1 - P(unsafe) at each."""
    rows = examples(SHORT)
    scores = Scores([rows[0].id], [1], {"dsa": [0.75]}, {"dsa": [[0.0, 0.5, 0.75]]}, {})
    [row] = as_tokens(rows, word_tokenizer(), 64, scores, "dsa").rows
    assert len(row["input_ids"]) == len(row["attention_mask"]) == 9
    assert row["labels"] == [-100] * 6 + row["input_ids"][6:]
    assert row["weights"] == [0.0] * 6 + [1.0, 0.5, 0.25]
    [plain] = as_tokens(rows, word_tokenizer(), 64).rows
    assert plain == {name: row[name] for name in ("input_ids", "attention_mask", "labels")}
    assert "over-long" in as_tokens(rows, word_tokenizer(), 8).bad[0].reason
    short = scores._replace(tokens={"dsa": [[0.5]]})
    with pytest.raises(UserError, match="holds 1 numbers for 3 answer tokens"):
        as_tokens(rows, word_tokenizer(), 64, short, "dsa")


def test_the_verb_leaves_out_what_it_is_asked_to(tmp_path, capsys):
    (path := tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (SHORT, THOUGHT, {"a": "b"}))
    )
    assert run("convert", str(path), "--as", "openai", "--to", str(tmp_path / "out")) == 1
    assert "line 2: openai: it has thoughts" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert run("convert", str(path), "--as", "openai", "--to", str(tmp_path / "out"), "--skip-bad") == 0
    assert len((tmp_path / "out" / "train.jsonl").read_text().splitlines()) == 1
    shown = capsys.readouterr().out
    assert "1 rows: " in shown and "2 rows are left out" in shown
    assert run("convert", str(path), "--as", "trl", "--to", str(tmp_path / "new"), "--weights", "dsa") == 1
    assert "go together" in capsys.readouterr().err
