"""The records that cross a border: a row (Example), tensors (Batch), a number (Measurement), and how rows are read.

Rows come as JSONL, JSON, CSV, Parquet (each may be gzipped, Parquet aside) or from the Hub, in the field's usual shapes: ``messages``,
``prompt`` + ``completion``, ``instruction`` / ``input`` / ``output``, ShareGPT ``conversations``. They are read to one form; the
original row is kept as it came, order is never changed, and a row that cannot be used is reported with its line and reason.
"""

import collections
import csv
import dataclasses
import gzip
import hashlib
import io
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant"}


class UserError(Exception):
    """Something that the user can mend: the message says what was asked, what was found, and what to do. Exit code 1."""


class AttackFails(UserError):
    """An adaptive attack that cannot be made against this scorer, model and pool: a result in a bench, an error in a single run."""


class DefenceError(RuntimeError):
    """A defence that cannot run. It stops the run; it is never a warning. Exit code 2."""


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
    def answer(self) -> str:
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "assistant"), "")


class BadRow(NamedTuple):
    line: int
    reason: str


class Rows(NamedTuple):
    """What was read: the usable rows in their order, and the others with their reasons."""

    examples: list[Example]
    bad: list[BadRow]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A number with what one needs to trust it. ``value`` is None where nothing could be scored: never a zero."""

    suite: str
    what: str
    value: float | None
    low: float | None  # 95 % interval
    high: float | None
    n: int  # scored prompts
    unscored: int = 0
    off_task: int = 0
    unit: str = "share"
    judge: str = ""
    category: str = ""
    evidence: str = ""  # the file of answers that it was counted from


def row_id(row: Mapping[str, Any]) -> str:
    """blake2b over the canonical JSON of the row: 16 hexadecimal digits."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


# --- reading -----------------------------------------------------------------------------------------------------------------


KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")  # and .gz of all but the last


def read_table(path: str | Path) -> list[tuple[int, Any]]:
    """Rows of a file with their line numbers; a line that does not parse comes as a ``BadRow``.

    Raises:
        UserError: the file is missing or its kind is unknown.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    kind = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    if kind == ".parquet":
        import pyarrow.parquet

        return list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1))
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    if kind == ".csv":
        csv.field_size_limit(1 << 30)
        reader = csv.DictReader(io.StringIO(text, newline=""))
        return [(reader.line_num, BadRow(reader.line_num, "more fields than the header has") if None in row else row) for row in reader]
    if kind == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
        if not isinstance(rows, list):
            raise UserError(f"{path} holds a JSON {type(rows).__name__}; a list of rows is needed (or JSON lines in a .jsonl)")
        return list(enumerate(rows, 1))
    if kind in (".jsonl", ".ndjson"):
        return [(n, _json_line(n, line)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    raise UserError(f"{path}: unknown kind {kind!r}; use .jsonl, .json, .csv or .parquet")


def _json_line(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return BadRow(number, f"not JSON: {error.msg} at column {error.colno}")


def write_table(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows in the format that the name asks for; a reader never sees half a file."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    kind = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    if kind == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), part)
    else:
        out = io.StringIO(newline="")
        if kind == ".csv":
            names = list(dict.fromkeys(name for row in rows for name in row))
            writer = csv.DictWriter(out, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        elif kind == ".json":
            json.dump(list(rows), out, ensure_ascii=False, indent=1, default=str)
        else:
            out.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        raw = out.getvalue().encode("utf-8", "surrogatepass")
        part.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)
    part.replace(path)


def parse(row: Any, prompt: str = "", answer: str = "") -> tuple[Mapping[str, Any], ...] | str:
    """A row's conversation, or the reason why there is none.

    ``prompt`` and ``answer`` are templates over the row's columns (``"Classify: {text}"``) for sets that are not chats.
    """
    if not isinstance(row, Mapping):
        return f"a row must be an object, found {type(row).__name__}"
    if prompt or answer:
        missing = lacking(prompt + answer, row)
        if missing:
            return f"no column {missing!r}; it has: {', '.join(map(str, row))}"
        turns: Any = [{"role": "user", "content": fill(prompt, row)}]
        if answer:
            turns.append({"role": "assistant", "content": fill(answer, row)})
    elif "messages" in row:
        turns = row["messages"]
    elif "conversations" in row:
        turns = [{"role": t.get("from"), "content": t.get("value")} if isinstance(t, Mapping) else t for t in row["conversations"] or []]
    elif "instruction" in row:
        asked = "\n\n".join(str(row[key]) for key in ("instruction", "input") if row.get(key))
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row.get("output")}]
        if row.get("system"):
            turns.insert(0, {"role": "system", "content": row["system"]})
    elif "prompt" in row:
        asked, told = row["prompt"], row.get("completion", row.get("answer"))
        turns = list(asked) if isinstance(asked, list) else [{"role": "user", "content": asked}]
        turns += told if isinstance(told, list) else [{"role": "assistant", "content": told}]
    else:
        return f"no known columns (messages, prompt, instruction, conversations); it has: {', '.join(map(str, row))}"
    return _check(turns)


def _check(turns: Any) -> tuple[Mapping[str, Any], ...] | str:
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        return "the conversation is empty or not a list"
    kept = []
    for turn in turns:
        if not isinstance(turn, Mapping) or turn.get("role") not in ROLES:
            return f"wrong role: {turn.get('role') if isinstance(turn, Mapping) else turn!r}; known: {', '.join(ROLES)}"
        if turn.get("content") is None and ROLES[turn["role"]] == "assistant":
            return "no answer"
        if not isinstance(turn.get("content"), str):
            return f"the content of a turn must be text, found {type(turn.get('content')).__name__}"
        kept.append({**turn, "role": ROLES[turn["role"]]})
    roles = [turn["role"] for turn in kept]
    if "system" in roles[1:]:
        return "wrong roles: a system turn must come first"
    said = [role for role in roles if role != "system"]
    if not said or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(said)):
        return f"wrong roles: user and assistant must alternate, user first; found {', '.join(roles)}"
    if said[-1] == "assistant" and not kept[-1]["content"].strip():
        return "the answer is empty"
    return tuple(kept)


FIELD = re.compile(r"{(\w+(?:\|\w+)*)}")


def lacking(template: str, row: Mapping[str, Any]) -> str:
    """The first field of a template that the row cannot fill, or nothing."""
    return next((names for names in FIELD.findall(template) if all(row.get(name) is None for name in names.split("|"))), "")


def fill(template: str, row: Mapping[str, Any]) -> str:
    """``{name}`` replaced by the row's column, ``{name|other}`` by the first that it has; nothing else is interpreted."""
    return FIELD.sub(lambda match: str(next(row[name] for name in match[1].split("|") if row.get(name) is not None)), template)


def read_examples(source: str | Path | Iterable[tuple[int, Any]], prompt: str = "", answer: str = "", *, answered: bool = True) -> Rows:
    """Read a set to one form. ``answered``: a row without an answer is a bad row (a prompt set has none).

    Raises:
        UserError: the file is missing, of an unknown kind, or holds no row at all.
    """
    table = read_table(source) if isinstance(source, str | Path) else list(source)
    examples: list[Example] = []
    bad: list[BadRow] = []
    seen: collections.Counter[str] = collections.Counter()
    for line, row in table:
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        turns = parse(row, prompt, answer)
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
        raise UserError(f"the set is empty: {source if isinstance(source, str | Path) else 'no rows'}")
    return Rows(examples, bad)


def draw(rows: Sequence[Any], take: int | None, seed: int) -> list[Any]:
    """``take`` rows drawn without replacement, put back in their order; all rows if ``take`` is None."""
    if take is None or take >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), take))]


# --- files -------------------------------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    part.replace(path)


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
