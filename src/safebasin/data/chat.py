"""Row forms to messages: turns, request and answer, Alpaca, Dolly, preference pairs, or templates over columns."""

import contextlib
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from safebasin.console import printable
from safebasin.data.fields import fill, lacking
from safebasin.data.keys import (
    ADDED,
    ANSWERS,
    PLAIN,
    REFUSED,
    REQUESTS,
    SYSTEM,
    TURN_KEYS,
    TURNS,
    RowForm,
    filled,
    harmless,
)
from safebasin.data.turns import NoConversation, checked_messages, parsed_json, quoted, unpacked

WHO, WHAT = {"role", "from"}, {"content", "value"}  # keys of a turn
ALPACA = (  # the column ``text`` of Alpaca rows: what their columns say, once more
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:\n{}"
)


class Conversation(NamedTuple):
    """The turns of a row, and the tools that it offers.

    A message has ``role`` and ``content`` (text), and where the row has them ``weight`` (0: not learned),
    ``reasoning_content``, ``tool_calls``, ``tool_call_id`` and ``name``.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()


def to_conversation(row: Any, form: RowForm = PLAIN) -> Conversation | str:
    """A row's conversation, or the reason why there is none; whatever the row holds, nothing is raised.

    >>> to_conversation({"prompt": "Name a fruit.", "completion": "Apple."}).messages
    ({'role': 'user', 'content': 'Name a fruit.'}, {'role': 'assistant', 'content': 'Apple.'})
    """
    if not isinstance(row, dict | Mapping):  # dict first: it is fast
        return f"a row must be an object, found {type(row).__name__}"
    try:
        return _filled_in(row, form) if form.prompt or form.answer else _read(row, form)
    except NoConversation as refusal:
        return str(refusal)


def columns(row: Mapping[str, Any]) -> str:
    """The names of a row's columns, for a message."""
    return printable(", ".join(row), 200)


def _filled_in(row: Mapping[str, Any], form: RowForm) -> Conversation:
    """By templates: they say what is read."""
    if missing := lacking(form.prompt + form.answer, row):
        raise NoConversation(f"no column {missing!r} with a text or a number; it has: {columns(row)}")
    turns = [{"role": "user", "content": fill(form.prompt, row)}]
    if form.answer:
        turns.append({"role": "assistant", "content": fill(form.answer, row)})
    return Conversation(checked_messages(turns, form))


def _read(row: Mapping[str, Any], form: RowForm) -> Conversation:
    """By the names of the columns; a column that is neither read nor harmless refuses the row."""
    mapped = {theirs: ours for ours, theirs in form.columns.items() if ours not in TURN_KEYS} if form.columns else {}
    names = {mapped.get(name, name): name for name in row if name not in form.ignore}  # ours -> the row's own
    both = [ours for theirs, ours in mapped.items() if ours != theirs and theirs in row and ours in row]
    if twice := next((name for name in both if name not in form.ignore), ""):
        raise NoConversation(
            f"`columns` maps {quoted(twice)}, and the row has a column of that name too; add it to `ignore`"
        )
    view = {name: row[own] for name, own in names.items()}
    for name in ("chosen", "rejected"):
        if name in view and filled(view[name]) and not form.chosen:
            raise NoConversation(f"column {quoted(names[name])} is not read: {REFUSED[name]}")
    turns, read, asking = _turn_list(view, form)
    if turns is None:
        marks = (quoted(mark) for mark in ";\t|," if len(row) == 1 and mark in next(iter(row)))
        raise NoConversation(
            "no known columns (messages, conversations, prompt, instruction, question, query, input, ...); "
            f"it has: {columns(row)}{next((f'; set `delimiter: {mark}`' for mark in marks), '')}"
        )
    tools = _tools(unpacked(view.get("tools"), "column 'tools'"))
    for name in SYSTEM:
        system, again = ({a: "system", b: view.get(name)} for a, b in (("role", "content"), ("from", "value")))
        if filled(view.get(name)) and turns[:1] not in ([system], [again]):
            turns, asking = [system, *turns], asking + 1
    messages = tuple(
        {"weight": 0, **turn} if i < asking and turn["role"] == "assistant" else turn
        for i, turn in enumerate(checked_messages(turns, form))
    )
    for name, value in view.items():
        if (
            name in (*read, *SYSTEM, "tools")
            or harmless(name, value)
            or value in _repeats(view, [message["content"] for message in messages])
            or (name in REQUESTS and isinstance(value, list) and value == turns[: len(value)])
        ):
            continue
        if name == "label":
            raise NoConversation(f"column {quoted(names[name])}: {REFUSED['kto_tag']}")
        second = (
            f"beside {' and '.join(sorted(names[key] for key in read & view.keys()))} it would be read twice"
            if name in (*TURNS, *REQUESTS)
            else ""
        )
        why = REFUSED.get(name) or second or "nothing is known of it; name it in `ignore` if no trainer renders it"
        raise NoConversation(f"column {quoted(names[name])} is not read: {why}")
    return Conversation(messages, tools)


def _repeats(view: Mapping[str, Any], texts: Sequence[str]) -> list[Any]:
    """Texts that a further column may hold, as they say nothing new: of a turn, or Alpaca's ``text``."""
    request, extra, reply = (view.get(name) for name in ("instruction", "input", "output"))
    paired = ", paired with an input that provides further context" if extra else ""
    return [*texts, ALPACA.format(paired, request, f"### Input:\n{extra}\n\n" if extra else "", reply)]


def _turn_list(view: Mapping[str, Any], form: RowForm) -> tuple[list[Any] | None, set[str], int]:
    """The turns of a row before they are checked, the columns that they were read from, and how many of the turns are
    the request, of which no answer is learned."""
    keys = [name for name in TURNS if name in view]
    if keys:
        key = next((name for name in keys if filled(view[name])), keys[0])
        turns, read = (
            _listed(view[key], next((theirs for ours, theirs in form.columns.items() if ours == key), key)),
            {key},
        )
        if form.chosen and filled(chosen := view.get("chosen")):  # the answer stands beside the turns, or follows them
            reply, read = _replies(chosen), read | {"chosen", "rejected"}
            beside = [*turns, *reply], read, len(turns)
            return (reply, read, _shared(reply, view)) if reply[: len(turns)] == turns else beside
        return turns, read, 0
    request = next((name for name in REQUESTS if view.get(name) is not None), None)
    if request is None and (empty := next((name for name in REQUESTS if name in view), "")):
        raise NoConversation(f"no request: column {quoted(empty)} is empty")
    chosen = view.get("chosen") if form.chosen else None
    if isinstance(chosen, list | tuple) and (request is None or len(chosen) > 1):
        return list(chosen), {"chosen", "rejected"}, _shared(chosen, view)
    if request is None:
        return None, set(), 0
    parts = [name for name in ADDED if name != request and filled(view.get(name))]
    asks: Any = _turns_in(view[request])
    packed = asks is not view[request]
    if isinstance(asks, list | tuple):
        turns, parts = list(asks), []
    else:
        if wrong := next((name for name in parts if not isinstance(view[name], str | int | float)), ""):
            raise NoConversation(f"column {quoted(wrong)} must be text, found {type(view[wrong]).__name__}")
        if parts and isinstance(asks, str):
            asks = "\n\n".join(filter(None, [asks, *(str(view[name]) for name in parts)]))
        turns = [*_history(unpacked(view.get("history"), "column 'history'")), {"role": "user", "content": asks}]
        parts.append("history")
    replies = ["chosen"] if chosen is not None else [name for name in ANSWERS if filled(view.get(name))]
    if len(replies) > 1:
        raise NoConversation(f"columns {' and '.join(map(quoted, replies))} both hold an answer")
    key = next(iter(replies), next((name for name in ANSWERS if name in view), ""))
    if not key:
        raise NoConversation(f"no answer: no column of {', '.join(ANSWERS)}; it has: {columns(view)}")
    read = {request, key, *parts, *(["rejected"] if form.chosen else [])}
    answer = _turns_in(view.get(key)) if packed else view.get(key)
    return [*turns, *_replies(answer)], read, len(turns) * isinstance(asks, list | tuple)


def _turns_in(text: Any) -> Any:
    """The turns that a text is as JSON, as a CSV file has them; anything else as it is."""
    if isinstance(text, str) and text.lstrip().startswith("["):
        with contextlib.suppress(NoConversation):
            turns = parsed_json(text, "")
            if turns and all(isinstance(turn, dict) and turn.keys() & WHO and turn.keys() & WHAT for turn in turns):
                return turns
    return text


def _replies(reply: Any) -> list[Any]:
    """The turns of an answer."""
    return (
        list(reply)
        if isinstance(reply, list | tuple)
        else [reply if isinstance(reply, Mapping) else {"role": "assistant", "content": reply}]
    )


def _shared(chosen: Sequence[Any], view: Mapping[str, Any]) -> int:
    """How many turns a chosen conversation has before the first that the rejected one has not."""
    return len(list(itertools.takewhile(bool, map(operator.eq, chosen[:-1], _replies(view.get("rejected"))))))


def _listed(turns: Any, name: str) -> list[Any]:
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # a CSV file has no lists
        turns = parsed_json(turns, f"column {name!r}")
    if not isinstance(turns, Sequence) or isinstance(turns, str | bytes) or not turns:
        raise NoConversation(f"column {name!r}: the conversation is empty or not a list")
    return list(turns)


def _history(pairs: Any) -> Iterator[dict[str, Any]]:
    """Alpaca's earlier rounds."""
    for pair in pairs if isinstance(pairs, list | tuple) else [pairs] * filled(pairs):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise NoConversation(f"column 'history' must be pairs of request and answer, found {quoted(pair)}")
        yield {"role": "user", "content": pair[0]}
        yield {"role": "assistant", "content": pair[1]}


def _tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    """The tools of a row: a list of objects."""
    if not filled(tools):
        return ()
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise NoConversation(f"column 'tools' must be a list of objects, found {quoted(tools)}")
    return tuple(tools)
