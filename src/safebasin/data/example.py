"""A row in the form that the package works with, and its stable id."""

import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safebasin.data.chat import to_conversation
from safebasin.data.files import shown
from safebasin.data.json_rows import BadRow, flaw
from safebasin.data.keys import PLAIN, RowForm
from safebasin.data.tables import read_table
from safebasin.errors import UserError


@dataclasses.dataclass(frozen=True)
class Example:
    """A row: a stable id, the conversation (see ``data.chat.Conversation``), the original row, its line, its tools."""

    id: str
    messages: tuple[Mapping[str, Any], ...]
    row: Mapping[str, Any]
    line: int
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def learned(self) -> list[Mapping[str, Any]]:
        """The assistant turns that are learned."""
        return [m for m in self.messages if m["role"] == "assistant" and m.get("weight", 1) != 0]

    @property
    def as_messages(self) -> dict[str, Any]:
        """The row in the one form that holds every other."""
        return {"messages": list(self.messages), **({"tools": list(self.tools)} if self.tools else {})}

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


UNLEARNED = "every answer has weight 0: nothing is learned"
CONTENT_ID = re.compile("[0-9a-f]{16}")  # what ``row_id`` gives
CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str)


def row_id(row: Mapping[str, Any]) -> str:
    """blake2b over the canonical JSON of the row: 16 hexadecimal digits."""
    text = CANONICAL.encode(row)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def content_id(row_id: str) -> str:
    """The id without the number of a copy.

    >>> content_id("0123456789abcdef-2")
    '0123456789abcdef'
    """
    return re.sub(r"(?<=^[0-9a-f]{16})-\d+$", "", row_id)


def numbered_copies(row_ids: Iterable[str], seen: collections.Counter[str] | None = None) -> list[str]:
    """Ids of all rows of a set in their order, from those of their content: the second copy of a row is ``<id>-2``.

    ``seen``: of the rows before these; it is counted on.

    >>> numbered_copies(["0123456789abcdef", "0123456789abcdef", "mine", "mine"])
    ['0123456789abcdef', '0123456789abcdef-2', 'mine', 'mine']
    """
    seen, numbered = collections.Counter() if seen is None else seen, []
    for row in row_ids:
        seen[row] += 1
        numbered.append(row if seen[row] == 1 or not CONTENT_ID.fullmatch(row) else f"{row}-{seen[row]}")
    return numbered


def read_examples(
    source: str | Path | Iterable[tuple[int, Any]],
    form: RowForm = PLAIN,
    *,
    checked: bool = False,
) -> Rows:
    """Read a set to one form: a file, or rows with their line numbers.

    Args:
        source: the file or the rows.
        form: how rows are read.
        checked: the rows come from ``read_table``, which has looked for what no file can hold.

    Raises:
        UserError: the file cannot be read, is of an unknown kind, or holds no row at all.

    >>> read_examples(enumerate([{"prompt": "Name a fruit.", "completion": "Apple."}], 1)).examples[0].answer
    'Apple.'
    """
    is_file = isinstance(source, str | Path)
    table = read_table(source, form.delimiter) if isinstance(source, str | Path) else list(source)
    examples: list[Example] = []
    bad: list[BadRow] = []
    seen: collections.Counter[str] = collections.Counter()
    for line, row in table:
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        reason = "" if checked or is_file else flaw(row)
        conversation = reason or to_conversation(row, form)
        if isinstance(conversation, str):
            bad.append(BadRow(line, conversation))
            continue
        key = row_id(row)
        example = Example(key, conversation.messages, row, line, conversation.tools)
        if example.messages[-1]["role"] != "assistant" or not example.learned:
            bad.append(BadRow(line, UNLEARNED if example.messages[-1]["role"] == "assistant" else "no answer"))
            continue
        seen[key] += 1
        examples.append(example if seen[key] == 1 else dataclasses.replace(example, id=f"{key}-{seen[key]}"))
    if not examples and not bad:
        raise UserError(f"the set is empty: {shown(source) if isinstance(source, str | Path) else 'no rows'}")
    return Rows(examples, bad)
