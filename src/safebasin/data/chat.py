"""Row forms to messages: ``messages``, prompt and completion, Alpaca, ShareGPT, or templates over columns."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from safebasin.console import printable
from safebasin.data.tables import flaw

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


def to_messages(row: Any, prompt: str = "", answer: str = "") -> tuple[Mapping[str, Any], ...] | str:
    """A row's conversation, or the reason why there is none; whatever the row holds, nothing is raised.

    ``prompt`` and ``answer`` are templates over the row's columns (``"Classify: {text}"``) for sets that are not chats.

    >>> to_messages({"prompt": "Name a fruit.", "completion": "Apple."})
    ({'role': 'user', 'content': 'Name a fruit.'}, {'role': 'assistant', 'content': 'Apple.'})
    """
    if not isinstance(row, Mapping):
        return f"a row must be an object, found {type(row).__name__}"
    if reason := flaw(row):
        return reason
    if prompt or answer:
        missing = lacking(prompt + answer, row)
        if missing:
            return f"no column {missing!r}; it has: {columns(row)}"
        turns: Any = [{"role": "user", "content": fill(prompt, row)}]
        if answer:
            turns.append({"role": "assistant", "content": fill(answer, row)})
    elif "messages" in row:
        turns = row["messages"]
    elif "conversations" in row:
        turns = row["conversations"]
        if isinstance(turns, list | tuple):
            turns = [{"role": t.get("from"), "content": t.get("value")} if isinstance(t, Mapping) else t for t in turns]
    elif "instruction" in row:
        request = "\n\n".join(str(row[key]) for key in ("instruction", "input") if row.get(key))
        turns = [{"role": "user", "content": request}, {"role": "assistant", "content": row.get("output")}]
        if row.get("system"):
            turns.insert(0, {"role": "system", "content": row["system"]})
    elif "prompt" in row:
        request, reply = row["prompt"], row.get("completion", row.get("answer"))
        turns = list(request) if isinstance(request, list) else [{"role": "user", "content": request}]
        turns += reply if isinstance(reply, list) else [{"role": "assistant", "content": reply}]
    else:
        return f"no known columns (messages, prompt, instruction, conversations); it has: {columns(row)}"
    return _check(turns)


def columns(row: Mapping[str, Any]) -> str:
    """The names of a row's columns, for a message."""
    return printable(", ".join(row), 200)


def _check(turns: Any) -> tuple[Mapping[str, Any], ...] | str:
    if not isinstance(turns, Sequence) or isinstance(turns, str | bytes) or not turns:
        return "the conversation is empty or not a list"
    messages = []
    for turn in turns:
        role = turn.get("role") if isinstance(turn, Mapping) else turn
        if not isinstance(turn, Mapping) or not isinstance(role, str) or role not in ROLES:
            return f"wrong role: {printable(repr(role), 60)}; known: {', '.join(ROLES)}"
        if turn.get("content") is None and ROLES[role] == "assistant":
            return "no answer"
        if not isinstance(turn.get("content"), str):
            return f"the content of a turn must be text, found {type(turn.get('content')).__name__}"
        messages.append({**turn, "role": ROLES[role]})
    roles = [turn["role"] for turn in messages]
    if "system" in roles[1:]:
        return "wrong roles: a system turn must come first"
    spoken = [role for role in roles if role != "system"]
    if not spoken or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        return f"wrong roles: user and assistant must alternate, user first; found {printable(', '.join(roles))}"
    if spoken[-1] == "assistant" and not messages[-1]["content"].strip():
        return "the answer is empty"
    return tuple(messages)


FIELD = re.compile(r"{(\w+(?:\|\w+)*)}")


def lacking(template: str, row: Mapping[str, Any]) -> str:
    """The first field of a template that the row cannot fill, or nothing."""
    return next(
        (names for names in FIELD.findall(template) if all(row.get(name) is None for name in names.split("|"))), ""
    )


def fill(template: str, row: Mapping[str, Any]) -> str:
    """``{name}`` replaced by the row's column, ``{name|other}`` by the first that it has; nothing else is read."""
    return FIELD.sub(
        lambda match: str(next(row[name] for name in match[1].split("|") if row.get(name) is not None)), template
    )
