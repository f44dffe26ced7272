"""Sets by name: a file, a built-in set or a set of the Hub; drawn, and filled into the one form.

A recipe names a public set by its Hub id and split (``fancyzhx/ag_news:train``, ``openai/gsm8k:main:train``). ``--set NAME=FILE`` puts a local copy in its place
(``override``): the name stays what the manifest says, the file is what is read.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safebasin.data.builtin import rows_of
from safebasin.data.chat import fill, lacking
from safebasin.data.example import Example, Rows, read_examples
from safebasin.data.tables import KINDS, BadRow, draw, read_table
from safebasin.errors import UserError

_local: dict[str, str] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A set of rows.

    ``prompt`` and ``answer`` are templates over columns, for sets that are not chats; ``skip`` and ``take`` draw with ``seed``.
    """

    path: str
    prompt: str = ""
    answer: str = ""
    take: int | None = None
    seed: int = 0
    skip: int = 0  # rows left out at the front, before drawing: a test part of the same file
    limit: int | None = None  # rows looked at, after skipping
    values: Mapping[str, Sequence[str]] = dataclasses.field(
        default_factory=dict
    )  # names of a column's numbers: {label: [World, Sports]}


@dataclasses.dataclass(frozen=True)
class Prompt:
    id: str
    text: str
    category: str = ""
    expected: str = ""


def override(local: Mapping[str, str]) -> None:
    """Local copies of public sets, by the name that recipes use."""
    _local.update(local)


def open_table(path: str) -> list[tuple[int, Any]]:
    """Rows of a set with their line numbers."""
    path = _local.get(path, path)
    if path.startswith("builtin:"):
        return list(enumerate(rows_of(path), 1))
    return _hub(path) if _remote(path) else read_table(path)


def check_file(path: str) -> None:
    """UserError where a set is to be read from a file and the file is not there; sets of the Hub are not asked for."""
    path = _local.get(path, path)
    if path.startswith("builtin:"):
        rows_of(path)
    elif not _remote(path) and not Path(path).is_file():
        raise UserError(f"no such file: {path}")


def _remote(path: str) -> bool:
    """Whether a name is a Hub id, ``owner/name``, ``owner/name:split`` or ``owner/name:configuration:split``, and no file."""
    endings = Path(path.removesuffix(".gz")).suffix in KINDS
    return (
        re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+){0,2}", path) is not None
        and not endings
        and not Path(path).exists()
    )


def _hub(name: str) -> list[tuple[int, Any]]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    repo, *told = name.split(":")
    try:
        rows = datasets.load_dataset(repo, *told[:-1], split=told[-1] if told else "train")
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot fetch {name!r} from the Hub ({reason}); name a local copy: --set {name}=FILE"
        ) from error
    return list(enumerate(rows, 1))


def open_rows(source: Source) -> Rows:
    """The examples of a set, drawn, with the rows that cannot be used."""
    table = open_table(source.path)[source.skip :][: source.limit]
    rows = read_examples([(line, _named(row, source)) for line, row in table], source.prompt, source.answer)
    return Rows(draw(rows.examples, source.take, source.seed), rows.bad)


def _named(row: Any, source: Source) -> Any:
    """The row with the numbers of its label columns replaced by their names."""
    if not source.values or not isinstance(row, Mapping):
        return row
    named = dict(row)
    for column, names in source.values.items():
        number = str(row.get(column, ""))
        if not number.isdigit() or int(number) >= len(names):
            raise UserError(f"{source.path}: column {column!r} holds {number!r}; `values` names 0 to {len(names) - 1}")
        named[column] = names[int(number)]
    return named


def open_examples(source: Source) -> list[Example]:
    """The examples of a set that must be whole.

    Raises:
        UserError: a row cannot be used; it is named with its line and reason.
    """
    examples, bad = open_rows(source)
    if bad:
        raise UserError(f"{source.path}: line {bad[0].line}: {bad[0].reason} ({len(bad)} such rows)")
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
        if isinstance(row, BadRow):
            raise UserError(f"{path}: line {row.line}: {row.reason}")
        missing = lacking(template or f"{{{column}}}", row) or (category if category and category not in row else "")
        if missing:
            raise UserError(f"{path}, line {line}: no column {missing!r}; it has: {', '.join(map(str, row))}")
        text = fill(template or f"{{{column}}}", row)
        if not text.strip():
            raise UserError(f"{path}: line {line}: the prompt is empty")
        prompts.append(Prompt(f"{line}", text, str(row[category]) if category else ""))
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return prompts
