"""Where the answers of a conversation stand in its final rendering.

Every text of the conversation is replaced by a sentinel, a word that is in no row, and rendered once more: what stands
between the sentinels is the template's own. The true rendering must then be this, with each text in the place of its
sentinel. So a template may leave earlier thoughts out, move the system prompt or trim its texts, and a row costs two
renderings whatever its turns. Where that fails, the last answer alone is learned, and ``note`` says so.

More than 250 lines, since it is one algorithm: every kind of template has its way to the same places.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from safebasin.console import printable
from safebasin.data.example import Example
from safebasin.data.json_rows import strings
from safebasin.template import TemplateFails, learns_thoughts, render, template_text
from safebasin.tokens import Span

SHAPE = re.compile(r"<[|｜].*[|｜]>|\[/?[A-Z_]+\]|</?s>")  # of added tokens that delimit turns without being special
TAGS = re.compile(r"[<\[{|]")
LAST_ALONE = "the chat template rewrites its texts: only the last answer is learned"
TEXT_KEYS = {"role", "content", "weight"}  # keys of a turn that is its text alone
THOUGHTLESS = "the chat template leaves thoughts out: they are not learned"
OPENED = "the chat template asks with an open thought, which this answer has not: it is learned without"
MISSING = "the chat template leaves answers of earlier turns out: they are not learned"


class Unplaced(Exception):
    """Why a row cannot be learned as it is rendered."""


class ControlTokens(NamedTuple):
    """Tokens that mark turns: their ids, and patterns that match their texts."""

    ids: frozenset[int]
    pattern: re.Pattern[str]
    special: re.Pattern[str]  # of these, those that a tokenizer calls special


class Places(NamedTuple):
    """Spans of characters of the rendered text, each list in order."""

    answers: list[Span]  # learned, from what opens the answer to the end of the turn
    contents: list[Span]  # the texts of the row, without the white space around them
    unlearned: list[Span]  # inside answers: thoughts that are not learned
    note: str = ""


class _Piece(NamedTuple):
    turn: int
    kind: str  # "content", "thought" or "call"
    text: str


class _Place(NamedTuple):
    piece: _Piece
    start: int
    end: int
    before: str  # the template's text up to the text before it
    after: str


# --- control tokens ---------------------------------------------------------------------------------------------------


def control_tokens(tokenizer: Any) -> ControlTokens:
    """The special tokens of a tokenizer, and the added ones by which its template marks turns."""
    return _control_tokens(tokenizer, template_text(tokenizer), len(tokenizer))


@functools.lru_cache(maxsize=8)
def _control_tokens(tokenizer: Any, template: str, size: int) -> ControlTokens:
    added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    special = {i: token.content for i, token in added.items() if token.special}
    control = special | {
        i: token.content
        for i, token in added.items()
        if SHAPE.fullmatch(token.content) or (TAGS.search(token.content) and token.content in template)
    }
    ids = frozenset(control) - {tokenizer.unk_token_id}  # which any unknown text becomes
    return ControlTokens(ids, _any_of(control.values()), _any_of(special.values()))


def _any_of(texts: Any) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def check_contents(tokenizer: Any, example: Example) -> None:
    """A control token inside a text of a row would forge a turn.

    Raises:
        Unplaced: there is one; its turn and its role are named.
    """
    pattern = control_tokens(tokenizer).pattern
    for i, turn in enumerate(example.messages):
        texts = [turn["content"]]
        if not _is_plain(turn):
            rest = {key: value for key, value in turn.items() if key not in TEXT_KEYS}
            texts = [*(text for text, is_text in _parts(turn) if is_text), *strings(rest)]
        for text in texts:
            if match := pattern.search(text):
                name = printable(repr(match[0]), 60)
                raise Unplaced(f"turn {i + 1} ({turn['role']}) holds the control token {name}: a forged turn")
    if match := next((match for text in strings(example.tools) if (match := pattern.search(text))), None):
        raise Unplaced(f"'tools' holds the control token {printable(repr(match[0]), 60)}: a forged turn")


# --- places -----------------------------------------------------------------------------------------------------------


def answer_places(tokenizer: Any, example: Example, text: str) -> Places:
    """The places of the learned answers in the rendered text of a row.

    Raises:
        Unplaced: the answer is not in the text, or cannot be distinguished from the rest.
    """
    places = _plain(tokenizer, example, text)
    for roles in (("system", "developer", "user", "tool", "assistant"), ("assistant",)):
        places = _substituted(tokenizer, example, text, roles) if places is None else places
    return _last_alone(tokenizer, example, text) if places is None else _spans(tokenizer, example, text, places)


def _is_plain(turn: Mapping[str, Any]) -> bool:
    """Whether a turn is its text alone, without a thought in it."""
    return turn.keys() <= TEXT_KEYS and "</think>" not in turn["content"]


def _parts(turn: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """The content of a turn in parts, and whether each is a text of the row or the tags of a thought before it."""
    content = turn["content"]
    thinks = turn["role"] == "assistant" and "</think>" in content
    match = re.match(r"(\s*<think>\s*)?(.*?)(\s*</think>\s*)", content, re.S) if thinks else None
    if not match:
        return [(content, not content.isspace() and content != "")]
    rest = content[match.end() :]
    return [(match[1] or "", False), (match[2], bool(match[2])), (match[3], False), (rest, bool(rest.strip()))]


def _tags(turn: Mapping[str, Any], header: str) -> str:
    """The row's own tags of a thought before its first text, as they stand at the end of a header."""
    tags = "".join(text for text, _ in itertools.takewhile(lambda part: not part[1], _parts(turn)))
    return next((form for form in (tags, tags.lstrip()) if form and header.endswith(form)), "")


def _plain(tokenizer: Any, example: Example, text: str) -> list[_Place] | None:
    """``_substituted`` of a row that has no more than its texts; many rows have the same roles, and so one skeleton."""
    mark, turns = "Qz0v", example.messages
    pieces = [_Piece(i, "content", turn["content"]) for i, turn in enumerate(turns)]
    if example.tools or mark in text or not all([_is_plain(turn) and turn["content"].strip() for turn in turns]):
        return None
    try:
        split = _rendered(tokenizer, template_text(tokenizer), mark, tuple([turn["role"] for turn in turns]))
    except TemplateFails:
        return None
    return _match(text, split, pieces)


def _substituted(tokenizer: Any, example: Example, text: str, roles: Sequence[str]) -> list[_Place] | None:
    """The places of the texts of these roles, in the order of the rendering; None where they cannot be found."""
    mark = next(mark for n in range(len(text)) if (mark := f"Qz{n}v") not in text)
    pieces: list[_Piece] = []

    def sentinel(turn: int, kind: str, piece: str) -> str:
        pieces.append(_Piece(turn, kind, piece))
        return f"{mark}{len(pieces) - 1}w"

    turns = []
    for i, turn in enumerate(example.messages):
        if turn["role"] in roles:
            turn, parts = dict(turn), _parts(turn)
            if "reasoning_content" in turn and turn["reasoning_content"].strip():
                turn["reasoning_content"] = sentinel(i, "thought", turn["reasoning_content"])
            kinds = ["content"] if len(parts) == 1 else ["", "thought", "", "content"]
            turn["content"] = "".join(
                sentinel(i, kind, part) if is_text else part for kind, (part, is_text) in zip(kinds, parts, strict=True)
            )
            if "tool_calls" in turn:
                turn["tool_calls"] = [
                    {**call, "function": {**call["function"], "name": sentinel(i, "call", call["function"]["name"])}}
                    for call in turn["tool_calls"]
                ]
        turns.append(turn)
    try:
        split = _skeleton(tokenizer, mark, turns, example.tools)
    except TemplateFails:
        return None
    return _match(text, split, pieces)


def _skeleton(tokenizer: Any, mark: str, turns: Sequence[Any], tools: Sequence[Any]) -> list[str]:
    """The rendering of turns whose texts are sentinels, split at them: many rows have the same."""
    given = [list(turns), list(tools)]
    try:
        conversation = json.dumps(given)
    except TypeError:  # a value that JSON does not have
        conversation = "null"
    if json.loads(conversation) != given:
        return _split(mark, render(tokenizer, turns, tools=tools))
    return _rendered(tokenizer, template_text(tokenizer), mark, conversation)


def _split(mark: str, skeleton: str) -> list[str]:
    """The template's own texts, and between them the numbers of the sentinels."""
    return re.split(f"{mark}([0-9]+)w", skeleton)


@functools.lru_cache(maxsize=64)
def _rendered(tokenizer: Any, template: str, mark: str, conversation: str | tuple[str, ...]) -> list[str]:
    """The skeleton of turns and tools as JSON, or of plain turns of these roles."""
    if isinstance(conversation, str):
        turns, tools = json.loads(conversation)
    else:
        turns, tools = [{"role": role, "content": f"{mark}{i}w"} for i, role in enumerate(conversation)], ()
    return _split(mark, render(tokenizer, turns, tools=tools))


def _match(text: str, split: Sequence[str], pieces: Sequence[_Piece]) -> list[_Place] | None:
    """Each text in the place of its sentinel: as it is, trimmed, or as JSON writes it. ``split``: text, number, ..."""
    places: list[_Place] = []
    position = len(split[0])
    if not text.startswith(split[0]):
        return None
    for k in range(1, len(split), 2):
        piece, after = pieces[int(split[k])], split[k + 1]
        for form in _forms(piece.text):
            end = position + len(form)
            fits = text.startswith(form, position) and text.startswith(after, end)
            if fits and (k + 2 < len(split) or end + len(after) == len(text)):
                break
        else:
            return None
        places.append(_Place(piece, position, end, split[k - 1], after))
        position = end + len(after)
    twice = len(set(split[1::2])) < len(places)
    return None if twice or (len(split) == 1 and len(split[0]) != len(text)) else places


def _forms(text: str) -> Iterator[str]:
    yield text
    yield from (text.strip(), text.rstrip(), text.lstrip(), text.strip("\n"), text.lstrip("\n"), text.rstrip("\n"))
    yield from (json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))


def _spans(tokenizer: Any, example: Example, text: str, places: Sequence[_Place]) -> Places:
    """The learned spans: from what opens an answer to what ends its turn."""
    template = template_text(tokenizer)
    opening, prefix = _openings(tokenizer, template)
    by_turn: dict[int, list[_Place]] = {}
    for place in places:
        by_turn.setdefault(place.piece.turn, []).append(place)
    last = len(example.messages) - 1
    silent = {turn["role"] for i, turn in enumerate(example.messages) if turn["content"].strip() and i not in by_turn}
    # where no request is among the places, answers alone were looked for
    if (lost := silent - {"user", "assistant"}) and any(example.messages[i]["role"] == "user" for i in by_turn):
        raise Unplaced(f"the chat template leaves out what stands in turns of {min(lost)}")
    ending = places[-1].after if places and places[-1].piece.turn == last else ""
    answers, unlearned, note, learns = [], [], "", learns_thoughts(tokenizer)
    for i, turn in enumerate(example.messages):
        if turn["role"] != "assistant" or turn.get("weight", 1) == 0:
            continue
        own = by_turn.get(i, [])
        kinds = [place.piece.kind for place in own]
        if kinds.count("call") < len(turn.get("tool_calls", ())) or kinds.count("thought") == len(kinds):
            if turn.get("tool_calls") or i == last:
                raise Unplaced(f"the chat template leaves {'tool calls' if turn.get('tool_calls') else 'answers'} out")
            note = MISSING if turn["content"].strip() else note
            continue
        thinks = not _is_plain(turn) and (
            "reasoning_content" in turn or any(is_text for _, is_text in _parts(turn)[:-1])
        )
        if thinks and "thought" not in kinds:
            note = note or THOUGHTLESS
        header = own[0].before
        head = opening  # a template may open a thought, or close one, where this answer has none or another
        while head not in header and (shorter := re.sub(r"(?:\s|</?think>)\Z", "", head)) != head:
            head = shorter
        if "<think>" in opening[len(head) :] and i == last:
            note = note or OPENED
        if head and head in header:
            start = own[0].start - len(header) + header.rindex(head) + len(head)
        else:
            tags = _tags(turn, header)
            header = header.removesuffix(tags)
            start = own[0].start - len(tags) - (len(prefix) if not opening and header.endswith(prefix) else 0)
        tail = own[-1]
        size = _end(tokenizer, template, turn, tail.after, None if tail is places[-1] and i == last else ending)
        answers.append((start, tail.end + size))
        if not learns:
            stop = max((place.end for place in own if place.piece.kind == "thought"), default=start)
            content = next((place.start for place in own if place.piece.kind != "thought"), start)
            closed = re.match(r"(?s).*</think>\s*", text[start:content])
            unlearned.append(
                (start if stop > start or closed else stop, max(stop, start + closed.end() if closed else 0))
            )
    contents = [
        (place.start + len(raw) - len(raw.lstrip()), place.end - len(raw) + len(raw.rstrip()))
        for place in places
        if (raw := text[place.start : place.end]).strip()
    ]
    return Places(sorted(answers), contents, sorted(unlearned), note)


def _end(tokenizer: Any, template: str, turn: Mapping[str, Any], tail: str, ending: str | None) -> int:
    """How much of what follows an answer, behind the arguments of its tool calls, ends its turn; see ``_end_size``."""
    calls, first = turn.get("tool_calls", ()), 0
    for arguments in (call["function"]["arguments"] for call in calls[-1:]):
        forms = {json.dumps(arguments, ensure_ascii=a, separators=s) for a in (True, False) for s in (None, (",", ":"))}
        first = max((tail.find(form) + len(form) for form in forms if form in tail), default=0)
    return _end_size(tokenizer, template, tail, "" if calls and ending else ending, first)


@functools.lru_cache(maxsize=256)
def _end_size(tokenizer: Any, template: str, tail: str, ending: str | None, first: int = 0) -> int:
    """How much of a text ends a turn, without white space behind its last control token; many rows have the same.

    Args:
        ending: what ends the last turn of this conversation; None for that turn itself, which ends with all but what
            opens the next answer. Inside a conversation it is what ends the last one, else what ends one there, else
            all up to the first special token behind ``first``.
    """
    control, special = control_tokens(tokenizer).pattern, control_tokens(tokenizer).special
    inner, trailer = _endings(tokenizer, template)
    if ending is None:
        size = len(tail.removesuffix(trailer))
    elif form := next((f for f in (ending.removesuffix(trailer), inner) if f and not first and tail.startswith(f)), ""):
        size = len(form)
    else:
        match = special.search(tail, first) or control.search(tail, first)
        size = match.end() if match else first
    ends = [match.end() for match in control.finditer(tail, 0, size)]
    return ends[-1] if ends and tail[ends[-1] : size].isspace() else size


@functools.lru_cache(maxsize=8)
def _endings(tokenizer: Any, template: str) -> tuple[str, str]:
    """What ends an answer that a request follows, and what a template writes behind the last one to open the next,
    where it does so without being asked; "" where there is none, or it cannot be seen.

    >>> _endings(tokenizer, template_text(tokenizer))
    ('<|im_end|>\\n', '')
    """
    try:
        split = _rendered(tokenizer, template, "Qz", ("user", "assistant") * 2)
    except TemplateFails:
        return "", ""
    if split[1::2] != ["0", "1", "2", "3"]:
        return "", ""
    begin, between, behind, _, last = split[::2]
    pattern = f"{control_tokens(tokenizer).pattern.pattern}|[\\s\\S]"  # a header begins between two of these
    start, middle, final = (re.findall(pattern, text) for text in (begin, behind, last))
    header, shared = (
        [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))]
        for texts in ((start[::-1], middle[::-1]), (middle, final))
    )
    if tokenizer.eos_token in shared:
        inner = "".join(shared[: len(shared) - shared[::-1].index(tokenizer.eos_token)])
    elif any(map(str.isalnum, "".join(header))) and len(header) < len(middle):
        inner = "".join(middle[: -len(header)])
    else:
        match = control_tokens(tokenizer).special.search(behind)
        inner = behind[: match.end()] if match else ""
    rest = last.removeprefix(inner) if inner and not behind.startswith(last) else last
    return inner, rest if rest != last and rest.strip() and rest.strip() in between else ""


def opening_of(tokenizer: Any) -> str:
    """What the chat template opens an answer with when it asks for one; "" where it opens none."""
    return _openings(tokenizer, template_text(tokenizer))[0]


@functools.lru_cache(maxsize=8)
def _openings(tokenizer: Any, template: str) -> tuple[str, str]:
    """What the template opens an answer with when it asks for one; and without that, what it writes before an answer.

    >>> _openings(tokenizer, template_text(tokenizer))
    ('<|im_start|>assistant\\n', '')
    """
    turn, answer = {"role": "user", "content": "Qz"}, {"role": "assistant", "content": "Qzv"}
    try:
        plain, prompt = render(tokenizer, [turn]), render(tokenizer, [turn], ask=True)
        answered = render(tokenizer, [turn, answer])
    except TemplateFails:
        return "", ""
    size = min(len(plain), len(prompt))
    opening = prompt[next((k for k in range(size) if plain[k] != prompt[k]), size) :]
    prefix = answered[len(prompt) : answered.rindex("Qzv")] if answered.startswith(prompt) and "Qzv" in answered else ""
    return opening, prefix


def _last_alone(tokenizer: Any, example: Example, text: str) -> Places:
    """The last answer: what follows the rendering of the conversation before it, or else its text."""
    last = example.messages[-1]
    if last["role"] != "assistant" or last.get("weight", 1) == 0:
        raise Unplaced("the chat template rewrites its texts: the answers cannot be found in it")
    note = LAST_ALONE if len(example.learned) > 1 else ""

    def size(text: str) -> int:
        return _end_size.__wrapped__(tokenizer, template_text(tokenizer), text, None)  # a long text is not stored

    try:
        before = render(tokenizer, example.messages[:-1], ask=True, tools=example.tools)
    except TemplateFails:
        before = text
    if text.startswith(before) and len(before) < len(text):
        return Places([(len(before), len(before) + size(text[len(before) :]))], [], [], note)
    content = _parts(last)[-1][0].strip()
    if not content or last.get("tool_calls") or content not in text:
        raise Unplaced("the chat template rewrites the last answer: it cannot be found in it")
    start = text.rindex(content)
    return Places([(start, start + size(text[start:]))], [], [], note)
