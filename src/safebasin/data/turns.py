"""The turns of a row as messages: roles, texts, thoughts, tool calls and weights, in an order that is allowed."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from safebasin.console import printable
from safebasin.data.json_rows import JSON, flaw
from safebasin.data.keys import (
    LEARNING,
    MEDIA,
    REFUSED,
    ROLES,
    THOUGHTS,
    TURN_KEYS,
    WEIGHTS,
    RowForm,
    filled,
    harmless,
    is_flag,
)

SPEAKERS = ROLES.keys() - {"function_call"}  # whose content is text
CALL_KEYS = ("id", "type", "function", "name", "arguments")
NAME = re.compile(r"[\w.:/-]{1,128}", re.ASCII)  # of a tool: what no template writes otherwise


class NoConversation(Exception):
    """Why a row is no conversation."""


def checked_messages(turns: Sequence[Any], form: RowForm) -> tuple[Mapping[str, Any], ...]:
    """The turns as messages (see ``data.chat.Conversation``), in an order that is allowed.

    Raises:
        NoConversation: a turn that cannot be read, or stands where none of its role may.
    """
    if not turns:
        raise NoConversation("the conversation is empty or not a list")
    mapped = {theirs: ours for ours, theirs in form.columns.items() if ours in TURN_KEYS} if form.columns else {}
    messages = tuple(_message(turn, mapped, form) for turn in turns)
    roles = [turn["role"] for turn in messages]
    if form.turns == "alternate":
        _check_order(messages, roles)
    elif not {"user", "assistant"} & set(roles):
        raise NoConversation("wrong roles: nobody speaks")
    for i, turn in enumerate(messages, 1):
        if (
            turn["role"] == "assistant"
            and not (turn["content"].strip() or turn.get("tool_calls"))
            and (i == len(messages) or turn.get("weight", 1))
        ):
            raise NoConversation("the answer is empty" if i == len(messages) else f"the answer in turn {i} is empty")
    return messages


def _check_order(messages: Sequence[Mapping[str, Any]], roles: list[str]) -> None:
    """User and assistant in turn; an assistant that calls tools is answered by them."""
    if "developer" in roles:
        raise NoConversation(
            "wrong role: 'developer'; `turns: any` reads it, as a system turn where the template has none"
        )
    if "system" in roles[1:]:
        raise NoConversation(
            "wrong roles: a system turn must come first, as the only one (`turns: any` reads it anywhere)"
        )
    awaited: tuple[str, ...] = ("user",)
    for turn in messages[roles[0] == "system" :]:
        if turn["role"] not in awaited:
            order = printable(", ".join(roles), 200)
            raise NoConversation(
                "wrong roles: a tool turn answers no tool call (`turns: any` reads it anywhere)"
                if turn["role"] == "tool"
                else f"wrong roles: user and assistant must alternate, user first; found {order}; or set `turns: any`"
            )
        calls = turn.get("tool_calls")
        answers = ("tool",) if calls else ("user",)
        awaited = {"user": ("assistant",), "tool": ("tool", "assistant"), "assistant": answers}[turn["role"]]
    if "user" not in roles:
        raise NoConversation("wrong roles: nobody asks")


def _message(turn: Any, mapped: Mapping[str, str], form: RowForm) -> dict[str, Any]:
    """A turn with the keys of the table. Every other key is harmless, or refuses the row."""
    if not isinstance(turn, dict | Mapping):
        raise NoConversation(f"a turn must be an object with role and content, found {quoted(turn)}")
    role, text = turn.get("role"), turn.get("content")
    if len(turn) == 2 and not mapped and isinstance(role, str) and isinstance(text, str) and role in SPEAKERS:
        return {"role": ROLES[role], "content": text}
    view = {mapped.get(key, key): value for key, value in turn.items() if value is not None}
    role = view.get("role", view.get("from"))
    if both := next((pair for pair in (("role", "from"), ("content", "value")) if {*pair} <= view.keys()), None):
        raise NoConversation(f"a turn has both {both[0]!r} and {both[1]!r}")
    if not isinstance(role, str) or role not in ROLES:
        raise NoConversation(f"wrong role: {quoted(role)}; known: {', '.join(ROLES)}")
    for key, value in view.items():
        if (
            (key not in TURN_KEYS or (key in ("tool_call_id", "name") and isinstance(value, Mapping | list | tuple)))
            and filled(value)
            and (is_flag(value) or LEARNING.search(key) or not harmless(key, value))
        ):
            raise NoConversation(
                f"key {quoted(key)} of a turn is not read: {REFUSED.get(key, 'nothing is known of it')}"
            )
    message: dict[str, Any] = {"role": ROLES[role]}
    content, calls = view.get("content", view.get("value")), view.get("tool_calls")
    if role == "function_call":
        if filled(calls) or not filled(content):
            raise NoConversation("a function_call turn has its call in its text, and no 'tool_calls'")
        content, calls = "", content
    calls = _calls(calls) if filled(calls) else []
    message["content"] = _content("" if content is None and calls else content, message["role"])
    message |= _weight(view, message["role"])
    for key in ("tool_call_id", "name"):
        if filled(view.get(key)):
            message[key] = str(view[key])
    thoughts = [view[key] for key in THOUGHTS if filled(view.get(key))]
    if (calls or thoughts) and message["role"] != "assistant":
        raise NoConversation(f"a {message['role']} turn has {'tool_calls' if calls else 'thoughts'}")
    if thoughts:
        if (len(thoughts) > 1 and thoughts[1:] != thoughts[:-1]) or not isinstance(thoughts[0], str):
            raise NoConversation("the thoughts of a turn must be one text")
        message["reasoning_content"] = thoughts[0]
    if calls:
        message["tool_calls"] = calls
    return message


def _content(content: Any, role: str) -> str:
    """The text of a turn; parts are joined."""
    if content is None and role == "assistant":
        raise NoConversation("no answer")
    if isinstance(content, list | tuple) and content and all(isinstance(part, Mapping) for part in content):
        kinds = [part.get("type", "text") for part in content]
        if wrong := next((kind for kind in kinds if kind not in ("text", "output_text", "input_text")), None):
            raise NoConversation(f"a content has a part of type {quoted(wrong)}: {MEDIA}")
        texts = [part.get("text") for part in content]
        extra = next((key for part in content for key in part if key not in ("type", "text") and filled(part[key])), "")
        if extra:
            raise NoConversation(f"key {quoted(extra)} of a part of a content is not read")
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)
    if not isinstance(content, str):
        raise NoConversation(f"the content of a turn ({role}) must be text, found {type(content).__name__}")
    return content


def _weight(view: Mapping[str, Any], role: str) -> dict[str, int]:
    """Whether a turn is learned, where it says so."""
    weights = {key: view[key] for key in WEIGHTS if view.get(key) is not None}
    for key, weight in weights.items():
        if not isinstance(weight, bool | int | float) or weight not in (0, 1):
            raise NoConversation(f"key {key!r} of a turn is {quoted(weight)}; it must be 0 or 1, false or true")
        if weight and role != "assistant":
            raise NoConversation(f"key {key!r} asks to learn a {role} turn; only answers are learned")
    if len(set(map(int, weights.values()))) > 1:
        raise NoConversation(f"the keys {' and '.join(weights)} of a turn contradict each other")
    return {"weight": int(next(iter(weights.values())))} if weights else {}


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, as chat templates read them."""
    calls, result = unpacked(calls, "a tool call"), list[dict[str, Any]]()
    for call in calls if isinstance(calls, list | tuple) else [calls]:
        function = call.get("function") if isinstance(call, Mapping) and "function" in call else call
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if isinstance(arguments, str):
            arguments = parsed_json(arguments or "{}", "the arguments of a tool call")
        name = function.get("name") if isinstance(function, Mapping) else None
        given = [*call.items(), *function.items()] if isinstance(function, Mapping) else []
        if extra := next((key for key, value in given if key not in CALL_KEYS and not harmless(key, value)), ""):
            raise NoConversation(f"key {quoted(extra)} of a tool call is not read: {quoted(call)}")
        named = isinstance(name, str) and NAME.fullmatch(name) and dict(given).get("type") in ("function", None)
        if not named or not isinstance(arguments, Mapping):
            raise NoConversation(f"a tool call needs a name and arguments, and type function; found {quoted(call)}")
        identity = {"id": str(call["id"])} if filled(call.get("id")) else {}
        result.append({**identity, "type": "function", "function": {"name": name, "arguments": arguments}})
    return result


def unpacked(value: Any, what: str) -> Any:
    """A value, or what a text holds as JSON, as a CSV file has it; a blank text holds nothing."""
    return (parsed_json(value, what) if value.strip() else None) if isinstance(value, str) else value


def parsed_json(text: str, what: str) -> Any:
    """The value of JSON inside a text of a row; ``what``: the text's place, for a message.

    Raises:
        NoConversation: it is no JSON, or no file could hold it.
    """
    try:
        value = JSON.decode(text)
    except (ValueError, RecursionError):
        hint = ", but Python's notation; write it by json.dumps" if re.match(r"\s*\[?\s*{\s*'", text) else ""
        raise NoConversation(f"{what}: text that is no JSON{hint}") from None
    if reason := flaw(value, finite=True):
        raise NoConversation(f"{what}: {reason}")
    return value


def quoted(value: Any) -> str:
    """A value of a row, for a message."""
    return printable(repr(value), 60)
