"""Thoughts are not the answer: they are taken off before any judge looks, and judged apart.

The forms: a pair of tags (``<think>``, ``[THINK]``, ...), the channels of gpt-oss (``<|channel|>analysis<|message|>``),
and thought that the generation prompt has begun, so that only its end stands in the answer.
"""

import re
from typing import NamedTuple

NAMES = "think|thinking|thought|thoughts|reasoning|reflection|scratchpad|analysis|seed:think"
BEGIN = re.compile(rf"<(?:{NAMES})>|\[THINK\]|<\|begin_of_thought\|>|<\|START_THINKING\|>|◁think▷", re.IGNORECASE)
END = re.compile(rf"</(?:{NAMES})>|\[/THINK\]|<\|end_of_thought\|>|<\|END_THINKING\|>|◁/think▷", re.IGNORECASE)
CHANNEL = re.compile(r"(?:<\|start\|>\s*\w+\s*)?<\|channel\|>\s*(\w+)[^<]*<\|message\|>")
CHANNEL_END = re.compile(r"<\|(?:end|return|call)\|>")


class Parts(NamedTuple):
    """What the model thought, and what it answered; the answer is "" where the thought has no end."""

    thought: str
    answer: str


def begins_thought(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a thought (``<|assistant|><think>``)."""
    begins = list(BEGIN.finditer(prompt))
    return bool(begins) and not prompt[begins[-1].end() :].strip()


def split(text: str, *, begun: bool = False) -> Parts:
    """The parts of an answer as it was generated, special tokens included. ``begun``: the prompt ends in a thought.

    >>> split("<think>Is that safe?</think>No.")
    Parts(thought='Is that safe?', answer='No.')
    """
    if CHANNEL.search(text):
        return _channels(text)
    thoughts: list[str] = []
    begin, end = BEGIN.search(text), END.search(text)
    # an end alone: the template began the thought, and does not show it
    begun = begun or (end is not None and (begin is None or begin.start() > end.start()))
    while begun or begin:
        before, inside = ("", text) if begun or begin is None else (text[: begin.start()], text[begin.end() :])
        end = END.search(inside)
        thoughts.append(inside[: end.start()] if end else inside)
        text = before + (inside[end.end() :] if end else "")
        begun, begin = False, BEGIN.search(text)
    return Parts("\n".join(thoughts).strip(), text.lstrip() if thoughts else text)


def _channels(text: str) -> Parts:
    thoughts: list[str] = []
    answers: list[str] = []
    heads = list(CHANNEL.finditer(text))
    for head, following in zip(heads, [*heads[1:], None], strict=True):
        body = text[head.end() : following.start() if following else len(text)]
        end = CHANNEL_END.search(body)
        (answers if head[1] == "final" else thoughts).append(body[: end.start()] if end else body)
    return Parts("\n".join(thoughts).strip(), "\n".join(answers))
