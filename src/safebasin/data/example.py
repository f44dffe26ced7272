"""A row in the form that the package works with, and its stable id."""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safebasin.data.chat import to_messages
from safebasin.data.tables import BadRow, read_table, shown
from safebasin.errors import UserError


@dataclasses.dataclass(frozen=True)
class Example:
    """A row: a stable id, the conversation, the original row, its line.

    ``messages`` holds dicts ``role``, ``content`` and, on assistant turns, ``weight`` (0: not trained on).
    """

    id: str
    messages: tuple[Mapping[str, Any], ...]
    row: Mapping[str, Any]
    line: int

    @property
    def prompt(self) -> str:
        """What the user says last before the last answer."""
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), "")

    @property
    def conversation(self) -> tuple[Mapping[str, Any], ...]:
        """The conversation before the last answer: what a model is asked."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages

    @property
    def answer(self) -> str:
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "assistant"), "")


class Rows(NamedTuple):
    """What was read: the usable rows in their order, and the others with their reasons."""

    examples: list[Example]
    bad: list[BadRow]


def row_id(row: Mapping[str, Any]) -> str:
    """blake2b over the canonical JSON of the row: 16 hexadecimal digits."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def read_examples(
    source: str | Path | Iterable[tuple[int, Any]], prompt: str = "", answer: str = "", *, answered: bool = True
) -> Rows:
    """Read a set to one form: a file, or rows with their line numbers.

    ``prompt`` and ``answer`` are templates over the columns. ``answered``: a row without an answer is a bad row
    (a set of prompts has none).

    Raises:
        UserError: the file cannot be read, is of an unknown kind, or holds no row at all.

    >>> read_examples(enumerate([{"prompt": "Name a fruit.", "completion": "Apple."}], 1)).examples[0].answer
    'Apple.'
    """
    table = read_table(source) if isinstance(source, str | Path) else list(source)
    examples: list[Example] = []
    bad: list[BadRow] = []
    seen: collections.Counter[str] = collections.Counter()
    for line, row in table:
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        turns = to_messages(row, prompt, answer)
        if not isinstance(turns, str) and answered and turns[-1]["role"] != "assistant":
            turns = "no answer"
        if isinstance(turns, str):
            bad.append(BadRow(line, turns))
            continue
        key = row_id(row)
        seen[key] += 1
        name = key if seen[key] == 1 else f"{key}-{seen[key]}"
        examples.append(Example(name, turns, row, line))
    if not examples and not bad:
        raise UserError(f"the set is empty: {shown(source) if isinstance(source, str | Path) else 'no rows'}")
    return Rows(examples, bad)
