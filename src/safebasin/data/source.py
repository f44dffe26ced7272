"""Sets of rows by name: a file, a built-in set or a set of the Hub, drawn and brought to one form.

A recipe names a public set by its Hub id, with its configuration and split where it has several:
``fancyzhx/ag_news:train``, ``openai/gsm8k:main:train``.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import NonNegativeInt, PositiveInt

from safebasin.console import printable
from safebasin.data.builtin import rows_of
from safebasin.data.chat import columns
from safebasin.data.example import Example, Rows, read_examples
from safebasin.data.fields import fill, lacking
from safebasin.data.files import cause, shown
from safebasin.data.json_rows import BadRow, checked
from safebasin.data.keys import TURN_KEYS, RowForm
from safebasin.data.parquet import without_nothing
from safebasin.data.tables import KINDS, draw, kind_of, read_table, row_file
from safebasin.errors import UserError

SetName = Annotated[str, "the name of a set"]  # in a method's fields: a file, a built-in set or a Hub id


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source(RowForm):
    """A set of rows, and how they are read (``data.keys.RowForm``). Its bounds are checked where a recipe is read.

    ``seed`` draws ``take`` rows.
    """

    path: str
    revision: str | None = None  # of a set of the Hub: a branch, a tag or a commit
    take: PositiveInt | None = None
    seed: NonNegativeInt = 0
    skip: NonNegativeInt = 0  # rows left out at the front, before drawing: a test part of the same file
    limit: PositiveInt | None = None  # rows looked at, after skipping
    # names of a column's numbers: {label: [World, Sports]}
    values: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, and where its set says so, its category and the expected answer."""

    id: str
    text: str
    category: str = ""
    expected: str = ""


def open_table(path: str, delimiter: str = "", revision: str | None = None) -> list[tuple[int, Any]]:
    """Rows of a set with their line numbers; one that no file could hold is a ``BadRow``.

    Raises:
        UserError: the file cannot be read, or there is no such set.
    """
    if path.startswith("builtin:") and revision is None:
        return list(enumerate(rows_of(path), 1))
    if is_remote(path):
        return _hub(path, revision)
    if revision is not None:
        raise UserError(f"{shown(path)} is on this machine and has no revision {shown(revision)!r}; leave it out")
    return read_table(path, delimiter)


def check_file(path: str) -> None:
    """UserError where a set is to be read from a file and the file is not there; the Hub is not asked for its sets."""
    if path.startswith("builtin:"):
        rows_of(path)
    elif not is_remote(path):
        row_file(path)


def is_remote(path: str) -> bool:
    """Whether a name is a Hub id and no file: ``owner/name``, then ``:split`` or ``:configuration:split``, or not."""
    endings = kind_of(path) in KINDS
    return (
        re.fullmatch(r"[\w-][\w.-]{0,95}/[\w.-]{1,96}(:[\w.-]{1,96}){0,2}", path) is not None
        and not endings
        and not Path(path).exists()
    )


def _hub(name: str, revision: str | None) -> list[tuple[int, Any]]:
    import datasets
    from datasets.exceptions import DatasetsError

    repo, *parts = name.split(":")
    try:
        rows = datasets.load_dataset(repo, *parts[:-1], split=parts[-1] if parts else "train", revision=revision)
        return [(n, checked(n, without_nothing(row))) for n, row in enumerate(rows, 1)]
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise UserError(
            f"cannot fetch {name!r} from the Hub ({cause(error)}); name a local copy: --set {name}=FILE"
        ) from error


def open_rows(source: Source) -> Rows:
    """The examples of a set, drawn, with the rows that cannot be used.

    Raises:
        UserError: see ``open_table``; or the set is empty.
    """
    table = open_table(source.path, source.delimiter, source.revision)[source.skip :][: source.limit]
    if not table:
        raise UserError(f"{shown(source.path)}: the set is empty{f' after {source.skip} rows' if source.skip else ''}")
    mapped = {theirs: ours for ours, theirs in source.columns.items() if ours not in TURN_KEYS}
    if unread := mapped.keys() - {name for _, row in table if isinstance(row, Mapping) for name in row}:
        name = min(unread)
        raise UserError(f"{shown(source.path)}: columns.{mapped[name]}: no row has the column {printable(name, 60)!r}")
    rows = read_examples([(line, _named(line, row, source)) for line, row in table], source, checked=True)
    return Rows(draw(rows.examples, source.take, source.seed), rows.bad)


def _named(line: int, row: Any, source: Source) -> Any:
    """The row with the numbers of its label columns replaced by their names."""
    if not source.values or not isinstance(row, Mapping):
        return row
    named = dict(row)
    for column, names in source.values.items():
        number = str(row.get(column, ""))
        index = int(number) if number.isdecimal() and len(number) < 10 else len(names)
        if index >= len(names):
            return BadRow(
                line, f"column {column!r} holds {printable(number, 60)!r}; `values` names 0 to {len(names) - 1}"
            )
        named[column] = names[index]
    return named


def open_examples(source: Source) -> list[Example]:
    """The examples of a set of which every row is needed.

    Raises:
        UserError: a row cannot be used; it is named with its line and reason.
    """
    examples, bad = open_rows(source)
    if bad:
        raise UserError(f"{shown(source.path)}: line {bad[0].line}: {bad[0].reason} ({len(bad)} such rows)")
    return examples


def open_prompts(
    path: str,
    column: str = "prompt",
    category: str | None = None,
    take: int | None = None,
    seed: int = 0,
    template: str = "",
    limit: int | None = None,
) -> list[Prompt]:
    """Prompts of any table: one column of it, or a template over its columns.

    Raises:
        UserError: no rows, no such column, an empty prompt.
    """
    prompts = []
    for line, row in draw(open_table(path)[:limit], take, seed):
        where = f"{shown(path)}: line {line}"
        if isinstance(row, BadRow):
            raise UserError(f"{where}: {row.reason}")
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: a row must be an object, found {type(row).__name__}")
        missing = lacking(template or f"{{{column}}}", row) or (category if category and category not in row else "")
        if missing:
            raise UserError(f"{where}: no column {missing!r}; it has: {columns(row)}")
        text = fill(template or f"{{{column}}}", row)
        if not text.strip():
            raise UserError(f"{where}: the prompt is empty")
        prompts.append(Prompt(f"{line}", text, str(row[category]) if category else ""))
    if not prompts:
        raise UserError(f"{shown(path)} holds no prompts")
    return prompts
