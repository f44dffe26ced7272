"""Row forms to messages: ``messages``, prompt and completion, Alpaca, ShareGPT, or templates over columns."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


def parse(row: Any, prompt: str = "", answer: str = "") -> tuple[Mapping[str, Any], ...] | str:
    """A row's conversation, or the reason why there is none.

    ``prompt`` and ``answer`` are templates over the row's columns (``"Classify: {text}"``) for sets that are not chats.
    """
    if not isinstance(row, Mapping):
        return f"a row must be an object, found {type(row).__name__}"
    if prompt or answer:
        missing = lacking(prompt + answer, row)
        if missing:
            return f"no column {missing!r}; it has: {', '.join(map(str, row))}"
        turns: Any = [{"role": "user", "content": fill(prompt, row)}]
        if answer:
            turns.append({"role": "assistant", "content": fill(answer, row)})
    elif "messages" in row:
        turns = row["messages"]
    elif "conversations" in row:
        turns = [
            {"role": t.get("from"), "content": t.get("value")} if isinstance(t, Mapping) else t
            for t in row["conversations"] or []
        ]
    elif "instruction" in row:
        asked = "\n\n".join(str(row[key]) for key in ("instruction", "input") if row.get(key))
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row.get("output")}]
        if row.get("system"):
            turns.insert(0, {"role": "system", "content": row["system"]})
    elif "prompt" in row:
        asked, told = row["prompt"], row.get("completion", row.get("answer"))
        turns = list(asked) if isinstance(asked, list) else [{"role": "user", "content": asked}]
        turns += told if isinstance(told, list) else [{"role": "assistant", "content": told}]
    else:
        return f"no known columns (messages, prompt, instruction, conversations); it has: {', '.join(map(str, row))}"
    return _check(turns)


def _check(turns: Any) -> tuple[Mapping[str, Any], ...] | str:
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        return "the conversation is empty or not a list"
    kept = []
    for turn in turns:
        if not isinstance(turn, Mapping) or turn.get("role") not in ROLES:
            return f"wrong role: {turn.get('role') if isinstance(turn, Mapping) else turn!r}; known: {', '.join(ROLES)}"
        if turn.get("content") is None and ROLES[turn["role"]] == "assistant":
            return "no answer"
        if not isinstance(turn.get("content"), str):
            return f"the content of a turn must be text, found {type(turn.get('content')).__name__}"
        kept.append({**turn, "role": ROLES[turn["role"]]})
    roles = [turn["role"] for turn in kept]
    if "system" in roles[1:]:
        return "wrong roles: a system turn must come first"
    said = [role for role in roles if role != "system"]
    if not said or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(said)):
        return f"wrong roles: user and assistant must alternate, user first; found {', '.join(roles)}"
    if said[-1] == "assistant" and not kept[-1]["content"].strip():
        return "the answer is empty"
    return tuple(kept)


FIELD = re.compile(r"{(\w+(?:\|\w+)*)}")


def lacking(template: str, row: Mapping[str, Any]) -> str:
    """The first field of a template that the row cannot fill, or nothing."""
    return next(
        (names for names in FIELD.findall(template) if all(row.get(name) is None for name in names.split("|"))), ""
    )


def fill(template: str, row: Mapping[str, Any]) -> str:
    """``{name}`` replaced by the row's column, ``{name|other}`` by the first that it has; nothing else is interpreted."""
    return FIELD.sub(
        lambda match: str(next(row[name] for name in match[1].split("|") if row.get(name) is not None)), template
    )
