"""Rows in the forms of other trainers: what ``safebasin convert`` writes into a folder.

trl            train.jsonl: prompt and completion, where every row learns its last turn alone; else messages
axolotl        train.jsonl: messages, ``train: false`` at a turn that is not learned; axolotl.yaml: the set's entry
llamafactory   train.jsonl: conversations; dataset_info.json: their tags
openai         train.jsonl: messages, ``weight: 0`` at a turn that is not learned
tokens         train.jsonl: input_ids, attention_mask, labels as safebasin learns them; weights where they are asked for

A row that a form cannot say as it is learned here is refused: no text is dropped, and nothing else is learned. Names
and ids of tool turns go where the form has no place for them.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml

from safebasin.data.example import Example
from safebasin.data.files import atomic_write, make_folder, write_json
from safebasin.data.json_rows import BadRow
from safebasin.data.tables import write_table
from safebasin.encode import TokenizedRow, encode_all
from safebasin.errors import UserError
from safebasin.scan import scorer
from safebasin.scan.column import star_column
from safebasin.scan.scores import Scores
from safebasin.train.check import check_columns
from safebasin.train.weighted import WEIGHTS

MessageForm = Literal["trl", "axolotl", "llamafactory", "openai"]
FormName = Literal[MessageForm, "tokens"]
Row = dict[str, Any]
FILE, NAME = "train.jsonl", "safebasin"
ENTRY = {"axolotl": "axolotl.yaml", "llamafactory": "dataset_info.json"}
NAMES = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}  # of LLaMA-Factory
SPEAKERS = (("human", "observation"), ("gpt", "function_call"))
TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip


class Converted(NamedTuple):
    """Rows of a form, the rows that it cannot hold, and what is to be set in the trainer, a sentence each."""

    rows: list[Row]
    bad: list[BadRow]
    notes: list[str]


class _Unfit(Exception):
    """Why a form cannot hold a row."""


def as_messages(examples: Sequence[Example], form: MessageForm) -> Converted:
    """Rows as messages of a form.

    Raises:
        UserError: a form that learns all answers of a row or the last alone, and rows that learn otherwise.
    """
    last_only = all(_learned(example.messages[-1]) and len(example.learned) == 1 for example in examples)
    trl = _split if last_only else _trl
    write = {"trl": trl, "axolotl": _axolotl, "llamafactory": _llamafactory, "openai": _openai}[form]
    notes = {
        "trl": "SFTTrainer learns the completion alone, as it is"
        if last_only
        else "set assistant_only_loss=True, else the prompt is learned too; for a chat template without generation "
        "marks that TRL has no copy of with them, write --as tokens",
        "axolotl": f"the entry for `datasets` is in {ENTRY['axolotl']}",
        "llamafactory": f"dataset: {NAME}, dataset_dir: this folder, and the model's `template`",
        "openai": "an answer with weight 0 is not learned",
    }
    result = Converted([], [], [notes[form]])
    if form == "llamafactory" and any(_unlearned(example) for example in examples):
        if not last_only:
            raise UserError("LLaMA-Factory learns all answers of every row, or the last alone; write --as tokens")
        result.notes.append("set mask_history: true, else all answers are learned")
    for example in examples:
        try:
            result.rows.append(write(example))
        except _Unfit as reason:
            result.bad.append(BadRow(example.line, f"{form}: {reason}"))
    return result


def as_tokens(
    examples: Sequence[Example], tokenizer: Any, max_length: int, scores: Scores | None = None, scorer_name: str = ""
) -> Converted:
    """Rows as token ids and labels; with ``scores``, the column ``weights``: ``star`` of that scorer, at each token.

    Raises:
        UserError, DefenceError: see ``encode_all`` and ``star_column``.
    """
    rows, bad = encode_all(tokenizer, examples, max_length)
    if scores is not None:
        usable = {row.id for row in rows}
        fit = [example for example in examples if example.id in usable]
        star = star_column(scores, scorer_name, scorer.make(scorer_name), fit)
        rows = [dataclasses.replace(row, columns={WEIGHTS: star[row.id]}) for row in rows]
        check_columns(rows, (WEIGHTS,))
    notes = ["labels are as safebasin learns them; TRL: max_length=None; axolotl: an empty `type`"]
    weighed = "weights: WeightedLoss and WeightedCollator of safebasin.train.weighted, or the plugin for axolotl"
    return Converted([_tokens(row) for row in rows], bad, notes + [weighed] * (scores is not None))


def write_converted(target: Path, converted: Converted, form: FormName) -> None:
    """Write rows into a folder, and the trainer's entry for them where it has one.

    Raises:
        UserError: it cannot be written.
    """
    write_table(make_folder(target) / FILE, converted.rows)
    if form == "axolotl":
        entry = {"path": str(target / FILE), "ds_type": "json", "type": "chat_template", "field_messages": "messages"}
        text = yaml.safe_dump({"datasets": [entry | {"message_field_training": "train"}]}, sort_keys=False)
        with atomic_write(target / ENTRY[form]) as part:
            part.write_text(text, encoding="utf-8")
    elif form == "llamafactory":
        columns = {"messages": "conversations"}
        if any("tools" in row for row in converted.rows):
            columns["tools"] = "tools"
        facts = {"file_name": FILE, "formatting": "sharegpt", "columns": columns, "tags": TAGS}
        write_json(target / ENTRY[form], {NAME: facts})


def _tokens(row: TokenizedRow) -> Row:
    labels = np.where(row.answer, row.ids, -100).tolist()
    result: Row = {"input_ids": row.ids.tolist(), "attention_mask": [1] * len(row), "labels": labels}
    if WEIGHTS in row.columns:
        column = row.columns[WEIGHTS]
        weights = np.zeros(len(row))
        weights[row.answer] = column
        result[WEIGHTS] = weights.tolist()
    return result


# --- forms ------------------------------------------------------------------------------------------------------------


def _learned(turn: Mapping[str, Any]) -> bool:
    return turn["role"] == "assistant" and turn.get("weight", 1) != 0


def _unlearned(example: Example) -> bool:
    return any(turn["role"] == "assistant" and not _learned(turn) for turn in example.messages)


def _bare(turn: Mapping[str, Any]) -> Row:
    return {key: value for key, value in turn.items() if key != "weight"}


def _with_tools(row: Row, example: Example) -> Row:
    """The tools as JSON text, which no table changes."""
    return row | ({"tools": json.dumps(example.tools, ensure_ascii=False)} if example.tools else {})


def _split(example: Example) -> Row:
    turns = [_bare(turn) for turn in example.messages]
    return _with_tools({"prompt": turns[:-1], "completion": turns[-1:]}, example)


def _trl(example: Example) -> Row:
    if _unlearned(example):
        raise _Unfit("one of its answers is not learned, and TRL learns all answers of `messages`")
    return _with_tools({"messages": [_bare(turn) for turn in example.messages]}, example)


def _axolotl(example: Example) -> Row:
    turns = [
        _bare(turn) | ({} if turn["role"] != "assistant" or _learned(turn) else {"train": False})
        for turn in example.messages
    ]
    return _with_tools({"messages": turns}, example)


def _openai(example: Example) -> Row:
    turns = []
    for turn in example.messages:
        if "reasoning_content" in turn:
            raise _Unfit("it has thoughts, for which OpenAI's form has no key")
        result = dict(turn) if turn["role"] == "assistant" else _bare(turn)
        if turn["role"] == "tool":
            result.pop("name", None)
            if "tool_call_id" not in turn:
                raise _Unfit("a tool turn has no `tool_call_id`")
        if "tool_calls" in turn:
            if not all("id" in call for call in turn["tool_calls"]):
                raise _Unfit("a tool call has no `id`")
            result["tool_calls"] = [
                call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
                for call in turn["tool_calls"]
            ]
        turns.append(result)
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in example.tools]
    return {"messages": turns, **({"tools": tools} if tools else {})}


def _llamafactory(example: Example) -> Row:
    turns = []
    for turn in example.messages:
        name, text = NAMES.get(turn["role"], ""), turn["content"]
        if not name or "reasoning_content" in turn:
            raise _Unfit("it has thoughts or a developer turn, for which there is no tag")
        if "tool_calls" in turn:
            if text.strip():
                raise _Unfit("an answer has text beside a tool call")
            name, text = "function_call", json.dumps([call["function"] for call in turn["tool_calls"]])
        turns.append({"from": name, "value": text})
    speakers = turns[turns[0]["from"] == "system" :]
    alternate = all(turn["from"] in SPEAKERS[place % 2] for place, turn in enumerate(speakers))
    if not alternate or len(speakers) % 2:
        raise _Unfit("after a system turn, user or tool and assistant must alternate, and an answer must be last")
    return _with_tools({"conversations": turns}, example)
