"""Row forms to messages: turns, request and answer, Alpaca, Dolly, preference pairs, or templates over columns."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from safebasin.console import printable
from safebasin.data.json_rows import flaw
from safebasin.data.keys import (
    ADDED,
    ANSWERS,
    MEDIA,
    PLAIN,
    REFUSED,
    REQUESTS,
    ROLES,
    SYSTEM,
    THOUGHTS,
    TURN_KEYS,
    TURNS,
    WEIGHTS,
    RowForm,
    filled,
    harmless,
)

ALPACA = (  # the column ``text`` of Alpaca rows: what their columns say, once more
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:\n{}"
)
SPEAKERS = ROLES.keys() - {"function_call"}  # whose content is text
NAME = re.compile(r"[\w.:/-]{1,128}", re.ASCII)  # of a tool: what no template writes otherwise


class Conversation(NamedTuple):
    """The turns of a row, and the tools that it offers.

    A message has ``role`` and ``content`` (text), and where the row has them ``weight`` (0: not learned),
    ``reasoning_content``, ``tool_calls``, ``tool_call_id`` and ``name``.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()


class _Refused(Exception):
    """Why a row is no conversation."""


def to_conversation(row: Any, form: RowForm = PLAIN) -> Conversation | str:
    """A row's conversation, or the reason why there is none; whatever the row holds, nothing is raised.

    >>> to_conversation({"prompt": "Name a fruit.", "completion": "Apple."}).messages
    ({'role': 'user', 'content': 'Name a fruit.'}, {'role': 'assistant', 'content': 'Apple.'})
    """
    if not isinstance(row, dict | Mapping):  # dict first: it is fast
        return f"a row must be an object, found {type(row).__name__}"
    try:
        return _filled_in(row, form) if form.prompt or form.answer else _read(row, form)
    except _Refused as refusal:
        return str(refusal)


def columns(row: Mapping[str, Any]) -> str:
    """The names of a row's columns, for a message."""
    return printable(", ".join(row), 200)


def _name(value: Any) -> str:
    return printable(repr(value), 60)


# --- rows -------------------------------------------------------------------------------------------------------------


def _filled_in(row: Mapping[str, Any], form: RowForm) -> Conversation:
    """By templates: they say what is read."""
    missing = lacking(form.prompt + form.answer, row)
    if missing:
        raise _Refused(f"no column {missing!r}; it has: {columns(row)}")
    turns = [{"role": "user", "content": fill(form.prompt, row)}]
    if form.answer:
        turns.append({"role": "assistant", "content": fill(form.answer, row)})
    return Conversation(_checked(turns, form))


def _read(row: Mapping[str, Any], form: RowForm) -> Conversation:
    """By the names of the columns; a column that is neither read nor harmless refuses the row."""
    mapped = {theirs: ours for ours, theirs in form.columns.items() if ours not in TURN_KEYS} if form.columns else {}
    names = {mapped.get(name, name): name for name in row if name not in form.ignore}  # ours -> the row's own
    both = [ours for theirs, ours in mapped.items() if ours != theirs and theirs in row and ours in row]
    if twice := next((name for name in both if name not in form.ignore), ""):
        raise _Refused(f"`columns` maps {_name(twice)}, and the row has a column of that name too; add it to `ignore`")
    view = {name: row[own] for name, own in names.items()}
    for name in ("chosen", "rejected"):
        if name in view and filled(view[name]) and not form.chosen:
            raise _Refused(f"column {_name(names[name])} is not read: {REFUSED[name]}")
    turns, read = _turn_list(view, form)
    if turns is None:
        hint = f"; set `delimiter: {_name(mark)}`" if len(row) == 1 and (mark := _delimiter(row)) else ""
        forms = "messages, conversations, prompt, instruction, question, query, input, ..."
        raise _Refused(f"no known columns ({forms}); it has: {columns(row)}{hint}")
    tools = _tools(view.get("tools"))
    for name in SYSTEM:
        if (
            name in view
            and filled(view[name])
            and not (turns and turns[0] == {"role": "system", "content": view[name]})
        ):
            turns.insert(0, {"role": "system", "content": view[name]})
    messages = _checked(turns, form)
    for name, value in view.items():
        if name in read or name in SYSTEM or name == "tools" or harmless(name, value):
            continue
        if value in _repeats(view, [message["content"] for message in messages]):
            continue
        if name == "label":
            raise _Refused(f"column {_name(names[name])}: {REFUSED['kto_tag']}")
        second = f"beside {' and '.join(sorted(read))} it would be read twice" if name in (*TURNS, *REQUESTS) else ""
        why = REFUSED.get(name) or second or "nothing is known of it; name it in `ignore` if no trainer renders it"
        raise _Refused(f"column {_name(names[name])} is not read: {why}")
    return Conversation(messages, tools)


def _delimiter(row: Mapping[str, Any]) -> str:
    return next((mark for mark in ";\t|" if mark in next(iter(row))), "")


def _repeats(view: Mapping[str, Any], texts: Sequence[str]) -> list[Any]:
    """What a further column may hold, as it says nothing new: the text of a turn, or Alpaca's ``text``."""
    request, extra, reply = (view.get(name) for name in ("instruction", "input", "output"))
    paired = ", paired with an input that provides further context" if extra else ""
    return [*texts, ALPACA.format(paired, request, f"### Input:\n{extra}\n\n" if extra else "", reply)]


def _turn_list(view: Mapping[str, Any], form: RowForm) -> tuple[list[Any] | None, set[str]]:
    """The turns of a row before they are checked, and the columns that they were read from."""
    keys = [name for name in TURNS if name in view]
    if keys:
        key = next((name for name in keys if filled(view[name])), keys[0])
        turns, read = _listed(view[key], key), {key}
        if form.chosen and isinstance(view.get("chosen"), Mapping):  # the answer stands beside the turns
            return [*turns, view["chosen"]], read | {"chosen", "rejected"}
        return turns, read
    request = next((name for name in REQUESTS if view.get(name) is not None), None)
    if request is None and (empty := next((name for name in REQUESTS if name in view), "")):
        raise _Refused(f"no request: column {_name(empty)} is empty")
    chosen = view.get("chosen") if form.chosen else None
    if isinstance(chosen, list | tuple) and (request is None or len(chosen) > 1):
        same = request is not None and chosen and view[request] in (_text(chosen[0]), list(chosen[:-1]))
        return list(chosen), {"chosen", "rejected"} | ({request} if request and same else set())
    if request is None:
        return None, set()
    parts = [name for name in ADDED if name != request and filled(view.get(name))]
    asks: Any = view[request]
    if isinstance(asks, list | tuple):
        turns, parts = list(asks), []
    else:
        if wrong := next((name for name in parts if not isinstance(view[name], str | int | float)), ""):
            raise _Refused(f"column {_name(wrong)} must be text, found {type(view[wrong]).__name__}")
        text = "\n\n".join([asks, *(str(view[name]) for name in parts)]) if parts and isinstance(asks, str) else asks
        turns = [*_history(view.get("history")), {"role": "user", "content": text}]
        parts.append("history")
    replies = ["chosen"] if chosen is not None else [name for name in ANSWERS if filled(view.get(name))]
    if len(replies) > 1:
        raise _Refused(f"columns {' and '.join(map(_name, replies))} both hold an answer")
    key = next(iter(replies), next((name for name in ANSWERS if name in view), ""))
    if not key:
        raise _Refused(f"no answer: no column of {', '.join(ANSWERS)}; it has: {columns(view)}")
    reply = view.get(key)
    turns += reply if isinstance(reply, list | tuple) else [reply if isinstance(reply, Mapping) else _answer(reply)]
    return turns, {request, key, *parts, *(["rejected"] if form.chosen else [])}


def _answer(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _text(turn: Any) -> Any:
    return turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else turn


def _listed(turns: Any, name: str) -> list[Any]:
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # a CSV file has no lists
        turns = _parsed(turns, f"column {name!r}")
    if not isinstance(turns, Sequence) or isinstance(turns, str | bytes) or not turns:
        raise _Refused("the conversation is empty or not a list")
    return list(turns)


def _parsed(text: str, what: str) -> Any:
    """The value of JSON inside a text of a row."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        hint = ", but Python's notation; write it by json.dumps" if re.match(r"\s*\[?\s*{\s*'", text) else ""
        raise _Refused(f"{what}: text that is no JSON{hint}") from None
    if reason := flaw(value, finite=True):
        raise _Refused(f"{what}: {reason}")
    return value


def _history(pairs: Any) -> Iterator[dict[str, Any]]:
    """Alpaca's earlier rounds."""
    for pair in pairs if filled(pairs) else ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _Refused(f"column 'history' must be pairs of request and answer, found {_name(pair)}")
        yield {"role": "user", "content": pair[0]}
        yield _answer(pair[1])


def _tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    """The tools of a row: a list of objects, or its JSON."""
    if isinstance(tools, str) and tools.strip():
        tools = _parsed(tools, "column 'tools'")
    if not filled(tools) or tools == "":
        return ()
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise _Refused(f"column 'tools' must be a list of objects, found {_name(tools)}")
    return tuple(tools)


# --- turns ------------------------------------------------------------------------------------------------------------


def _checked(turns: Sequence[Any], form: RowForm) -> tuple[Mapping[str, Any], ...]:
    """The turns as messages, in an order that is allowed."""
    if not turns:
        raise _Refused("the conversation is empty or not a list")
    mapped = {theirs: ours for ours, theirs in form.columns.items() if ours in TURN_KEYS} if form.columns else {}
    messages = tuple(_message(turn, mapped, form) for turn in turns)
    roles = [turn["role"] for turn in messages]
    if form.turns == "alternate":
        _check_order(messages, roles)
    elif not {"user", "assistant"} & set(roles):
        raise _Refused("wrong roles: nobody speaks")
    last = messages[-1]
    if last["role"] == "assistant" and not last["content"].strip() and not last.get("tool_calls"):
        raise _Refused("the answer is empty")
    return messages


def _check_order(messages: Sequence[Mapping[str, Any]], roles: list[str]) -> None:
    """User and assistant in turn; an assistant that calls tools is answered by them."""
    if "developer" in roles:
        raise _Refused("wrong role: 'developer'; `turns: any` reads it, as a system turn where the template has none")
    if "system" in roles[1:]:
        raise _Refused("wrong roles: a system turn must come first (`turns: any` reads it anywhere)")
    awaited: tuple[str, ...] = ("user",)
    for turn in messages[roles[0] == "system" :]:
        if turn["role"] not in awaited:
            order = printable(", ".join(roles), 200)
            raise _Refused(
                "wrong roles: a tool turn answers no tool call"
                if turn["role"] == "tool"
                else f"wrong roles: user and assistant must alternate, user first; found {order}; or set `turns: any`"
            )
        calls = turn.get("tool_calls")
        answers = ("tool",) if calls else ("user",)
        awaited = {"user": ("assistant",), "tool": ("tool", "assistant"), "assistant": answers}[turn["role"]]
    if "user" not in roles:
        raise _Refused("wrong roles: nobody asks")


def _message(turn: Any, mapped: Mapping[str, str], form: RowForm) -> dict[str, Any]:
    """A turn with the keys of the table. Every other key is harmless, or refuses the row."""
    if not isinstance(turn, dict | Mapping):
        raise _Refused(f"a turn must be an object with role and content, found {_name(turn)}")
    role, text = turn.get("role"), turn.get("content")
    if len(turn) == 2 and not mapped and isinstance(role, str) and isinstance(text, str) and role in SPEAKERS:
        return {"role": ROLES[role], "content": text}
    view = {mapped.get(key, key): value for key, value in turn.items() if value is not None}
    role = view.get("role", view.get("from"))
    if not isinstance(role, str) or role not in ROLES or {"role", "from"} <= view.keys():
        raise _Refused(f"wrong role: {_name(role)}; known: {', '.join(ROLES)}")
    for key, value in view.items():
        if key not in TURN_KEYS and filled(value) and (isinstance(value, bool) or not harmless(key, value)):
            raise _Refused(f"key {_name(key)} of a turn is not read: {REFUSED.get(key, 'nothing is known of it')}")
    message: dict[str, Any] = {"role": ROLES[role]}
    content, calls = view.get("content", view.get("value")), view.get("tool_calls")
    if {"content", "value"} <= view.keys():
        raise _Refused("a turn has both 'content' and 'value'")
    if role == "function_call":
        content, calls = "", content
    calls = _calls(calls) if filled(calls) else []
    message["content"] = _content("" if content is None and calls else content, message["role"])
    message |= _weight(view, message["role"])
    for key in ("tool_call_id", "name"):
        if filled(view.get(key)):
            message[key] = str(view[key])
    thoughts = [view[key] for key in THOUGHTS if filled(view.get(key))]
    if (calls or thoughts) and message["role"] != "assistant":
        raise _Refused(f"a {message['role']} turn has {'tool_calls' if calls else 'thoughts'}")
    if thoughts:
        if (len(thoughts) > 1 and thoughts[1:] != thoughts[:-1]) or not isinstance(thoughts[0], str):
            raise _Refused("the thoughts of a turn must be one text")
        message["reasoning_content"] = thoughts[0]
    if calls:
        message["tool_calls"] = calls
    return message


def _content(content: Any, role: str) -> str:
    """The text of a turn; parts are joined."""
    if content is None and role == "assistant":
        raise _Refused("no answer")
    if isinstance(content, list | tuple) and content and all(isinstance(part, Mapping) for part in content):
        kinds = [part.get("type", "text") for part in content]
        if wrong := next((kind for kind in kinds if kind not in ("text", "output_text", "input_text")), None):
            raise _Refused(f"a content has a part of type {_name(wrong)}: {MEDIA}")
        texts = [part.get("text") for part in content]
        extra = next((key for part in content for key in part if key not in ("type", "text") and filled(part[key])), "")
        if extra:
            raise _Refused(f"key {_name(extra)} of a part of a content is not read")
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)
    if not isinstance(content, str):
        raise _Refused(f"the content of a turn must be text, found {type(content).__name__}")
    return content


def _weight(view: Mapping[str, Any], role: str) -> dict[str, int]:
    """Whether a turn is learned, where it says so."""
    weights = {key: view[key] for key in WEIGHTS if view.get(key) is not None}
    for key, weight in weights.items():
        if not isinstance(weight, bool | int | float) or weight not in (0, 1):
            raise _Refused(f"key {key!r} of a turn is {_name(weight)}; it must be 0 or 1, false or true")
        if weight and role != "assistant":
            raise _Refused(f"key {key!r} asks to learn a {role} turn; only answers are learned")
    if len(set(map(int, weights.values()))) > 1:
        raise _Refused(f"the keys {' and '.join(weights)} of a turn contradict each other")
    return {"weight": int(next(iter(weights.values())))} if weights else {}


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, as chat templates read them."""
    if isinstance(calls, str):
        calls = _parsed(calls, "a tool call")
    result = []
    for call in calls if isinstance(calls, list | tuple) else [calls]:
        function = call.get("function") if isinstance(call, Mapping) and "function" in call else call
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if isinstance(arguments, str):
            arguments = _parsed(arguments or "{}", "the arguments of a tool call")
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not NAME.fullmatch(name) or not isinstance(arguments, Mapping):
            raise _Refused(f"a tool call needs a name and arguments, found {_name(call)}")
        identity = {"id": str(call["id"])} if filled(call.get("id")) else {}
        result.append({**identity, "type": "function", "function": {"name": name, "arguments": arguments}})
    return result


FIELD = re.compile(r"{(\w+(?:\|\w+)*)}")


def lacking(template: str, row: Mapping[str, Any]) -> str:
    """The first field of a template that the row cannot fill, or nothing: an empty column, or one of lists or objects,
    which text would show in Python's notation."""
    return next(
        (
            names
            for names in FIELD.findall(template)
            if isinstance(first_of(names, row), list | tuple | Mapping | bytes | None)
        ),
        "",
    )


def first_of(names: str, row: Mapping[str, Any]) -> Any:
    """Of the columns ``name|other`` the first that the row has, or None."""
    return next((row[name] for name in names.split("|") if row.get(name) is not None), None)


def fill(template: str, row: Mapping[str, Any]) -> str:
    """``{name}`` replaced by the row's column, ``{name|other}`` by the first that it has; nothing else is read."""
    return FIELD.sub(lambda match: str(first_of(match[1], row)), template)
