"""JSON as rows have it, read strictly: what no file of ours can hold again is a ``BadRow`` with line and reason."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safebasin.data.files import read_text, shown
from safebasin.errors import UserError


class BadRow(NamedTuple):
    """A row that cannot be used: its line in the file, and why."""

    line: int
    reason: str


DEEPEST = 100  # levels of objects and lists in a row: Python's own readers and writers give up at a few hundred
DIGITS = 4300  # of an integer: Python converts no longer ones


def read_json(path: str | Path) -> Any:
    """The value of a JSON file.

    Raises:
        UserError: it cannot be read, or is not JSON.
    """
    try:
        return JSON.decode(read_text(path))
    except json.JSONDecodeError as error:
        lines = "; JSON lines belong in a .jsonl" if error.msg == "Extra data" else ""
        raise UserError(f"{shown(path)}, line {error.lineno}: not JSON: {error.msg}{lines}") from None
    except RecursionError:
        raise UserError(f"{shown(path)}: not JSON that can be read: it is nested too deep") from None


class _Repeated(dict[str, Any]):
    """A JSON object that has a key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    return row if len(row) == len(pairs) else _Repeated(row)


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= DIGITS else math.inf


JSON = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)  # marks what ``flaw`` is to find in a row


class _Suspect(Exception):
    """A JSON value has what may be a flaw."""


def _plain_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise _Suspect
    return row


def _plain_float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise _Suspect
    return value


def _plain_integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise _Suspect
    return int(digits)


def _suspect(constant: str) -> None:
    raise _Suspect


PLAIN_JSON = json.JSONDecoder(
    object_pairs_hook=_plain_object, parse_float=_plain_float, parse_int=_plain_integer, parse_constant=_suspect
)


def json_line(number: int, line: str) -> Any:
    """A row of JSON. A line that needs no closer look is not walked through."""
    try:
        if line.count("{") + line.count("[") < DEEPEST and "\\ud" not in line and "\\uD" not in line:
            with contextlib.suppress(_Suspect):
                return PLAIN_JSON.decode(line)
        return checked(number, JSON.decode(line), finite=True)
    except json.JSONDecodeError as error:
        return BadRow(number, f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
    except RecursionError:
        return BadRow(number, f"nested more than {DEEPEST} levels deep")


def checked(number: int, row: Any, *, finite: bool = False) -> Any:
    """The row, or a ``BadRow`` with its flaw."""
    reason = flaw(row, finite=finite)
    return BadRow(number, reason) if reason else row


def flaw(row: Any, *, finite: bool = False) -> str:
    """Why no file of ours can hold a row, or nothing. ``finite``: NaN and infinities are flaws too: JSON has none."""
    level = [row]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, str):
                if not value.isascii() and (reason := _surrogate(value)):
                    return reason
            elif isinstance(value, Mapping):
                if isinstance(value, _Repeated):
                    return "not JSON: an object has a key twice"
                unnamed = next((key for key in value if not isinstance(key, str)), "")
                if unnamed != "":
                    return f"the names of columns must be text, found {type(unnamed).__name__}"
                inner += value
                inner += value.values()
            elif isinstance(value, list | tuple):
                inner += value
            elif isinstance(value, int) and value.bit_length() > 3 * DIGITS:
                return f"an integer of about {int(value.bit_length() * math.log10(2))} digits"
            elif finite and isinstance(value, float) and not math.isfinite(value):
                return f"not JSON: a number is not finite or has more than {DIGITS} digits"
        if not inner:
            return ""
        level = inner
    return f"nested more than {DEEPEST} levels deep"


def strings(value: Any) -> Iterator[str]:
    """Every text in a value of a row, the names of its columns too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from (key, *strings(inner))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)


def _surrogate(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"a lone surrogate (U+{ord(text[error.start]):04X}) that no encoding holds"
    return ""
