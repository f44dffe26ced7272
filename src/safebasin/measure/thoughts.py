"""Thoughts are not the answer: they are removed before a judge reads it, and judged by themselves.

The forms: a pair of tags (``<think>``, ``[THINK]``, ``<|channel>thought``, ...), the channels of gpt-oss
(``<|channel|>analysis<|message|>``), thought that the generation prompt has begun, so that only its end stands in the
answer, and two that have no tags: Granite's sentences, and channels of gpt-oss that a server has left without theirs.
"""

import re
from typing import NamedTuple

NAMES = (
    r"(?:\w+[:_])?(?:think|thinking|thoughts?|reasoning|reason|reflection|scratch_?pad|monologue|chain_of_thought|cot"
    r"|analysis)(?:_process)?"
)
BEGIN = re.compile(
    rf"<(?:{NAMES})(?:\s+\w+=[^<>]*)?\s*>|<\|(?:{NAMES})\|>|\[THINK\]|<\|begin_of_thought\|>|<\|START_THINKING\|>|◁think▷"
    r"|<\|inner_prefix\|>|<\|channel>\s*thought",
    re.IGNORECASE,
)
END = re.compile(
    rf"</(?:{NAMES})\s*>|<\|/(?:{NAMES})\|>|\[/THINK\]|<\|end_of_thought\|>|<\|END_THINKING\|>|◁/think▷"
    r"|<\|inner_suffix\|>|<channel\|>",
    re.IGNORECASE,
)
CHANNEL = re.compile(r"(?:<\|start\|>\s*\w+\s*)?<\|channel\|>\s*(\w*)(?:(?!<\|message\|>).)*(?:<\|message\|>|\Z)", re.S)
CHANNEL_END = re.compile(r"<\|(?:end|return|call)\|>")
UNTAGGED = re.compile(
    r"\s*Here(?:'s| is) my thought process:(.*?)(?:Here(?:'s| is) my response:|\Z)"
    r"|analysis(?=[A-Z])(.*?)(?:assistantfinal|\Z)",
    re.S,
)


class Parts(NamedTuple):
    """What the model thought, and what it answered; the answer is "" where the thought has no end."""

    thought: str
    answer: str


def begins_thought(prompt: str, opening: str = "") -> bool:
    """Whether a rendered prompt ends inside a thought (``<|assistant|><think>``).

    ``opening``: what the template opens an answer with; a thought that has no end in it goes on, whatever follows it.
    """
    opens = bool(opening) and prompt.endswith(opening)
    tail = opening if opens else prompt
    begins = [head for head in CHANNEL.finditer(tail) if head[1] not in ("", "final")] or [*BEGIN.finditer(tail)]
    if not begins:
        return False
    behind = tail[begins[-1].end() :]
    return not behind.strip() or (opens and not END.search(behind))


def split(text: str, *, begun: bool = False) -> Parts:
    """The parts of an answer as it was generated, special tokens included. ``begun``: the prompt ends in a thought.

    >>> split("<think>Is that safe?</think>No.")
    Parts(thought='Is that safe?', answer='No.')
    """
    if CHANNEL.search(text):
        return _channels(text, begun)
    if untagged := UNTAGGED.match(text):
        return Parts((untagged[1] or untagged[2] or "").strip(), text[untagged.end() :].lstrip())
    thoughts: list[str] = []
    begin, end = BEGIN.search(text), END.search(text)
    # an end alone: the template began the thought, and does not show it, or the thought had a thought in it
    while begun or begin or end:
        if begun or begin is None or (end and end.start() < begin.start()):
            before, inside = "", text
        else:
            before, inside = text[: begin.start()], text[begin.end() :]
        end = END.search(inside)
        thoughts.append(inside[: end.start()] if end else inside)
        text = before + (inside[end.end() :] if end else "")
        begun, begin, end = False, BEGIN.search(text), END.search(text)
    return Parts("\n".join(thoughts).strip(), text.lstrip() if thoughts else text)


def _channels(text: str, begun: bool) -> Parts:
    thoughts: list[str] = []
    answers: list[str] = []
    heads = list(CHANNEL.finditer(text))
    bodies = [("analysis" if begun else "final", text[: heads[0].start()])]  # of the channel that the prompt has opened
    for head, following in zip(heads, [*heads[1:], None], strict=True):
        bodies.append((head[1], text[head.end() : following.start() if following else len(text)]))
    for channel, body in bodies:
        end = CHANNEL_END.search(body)
        (answers if channel == "final" else thoughts).append(body[: end.start()] if end else body)
    return Parts("\n".join(filter(str.strip, thoughts)).strip(), "\n".join(filter(str.strip, answers)))
