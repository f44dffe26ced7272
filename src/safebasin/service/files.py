"""Customers' files: where they lie, and whether their rows are rows that a run can take.

A name that a customer gives is text; what is stored lies under ids of ours. Nothing here holds a file in memory.
"""

import contextlib
import dataclasses
import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec

from safebasin.data.example import read_examples
from safebasin.data.json_rows import BadRow, json_line, strings
from safebasin.errors import UserError
from safebasin.service.policy import Limits

BLOCK = 1 << 20
CHUNK = 1000  # rows that are looked at together
PACKED = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, zip, bzip2, xz, zstandard


class Refused(Exception):
    """A file that is refused as it comes in: with an HTTP status."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class Storage:
    """Files and models by fsspec: a folder, ``s3://bucket/prefix``, ``memory://``.

    Raises:
        UserError: the URL is of no storage that is installed.
    """

    def __init__(self, url: str):
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"storage {url}: {error}") from None

    def path(self, tenant: str, name: str) -> str:
        """Where a tenant's file or folder of this name lies."""
        return f"{self.root}/{tenant}/{name}"

    def put(self, path: str, source: IO[bytes], most: float) -> tuple[int, str]:
        """Store what a stream holds; its size and its digest. Nothing is left of a file that is refused.

        Raises:
            Refused: it is larger than ``most`` bytes (413), or compressed (415).
        """
        self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        size, hasher, complete = 0, hashlib.blake2b(digest_size=16), False
        try:
            with self.fs.open(path, "wb") as target:
                while block := source.read(BLOCK):
                    if not size and block.startswith(PACKED):
                        raise Refused("The file is compressed; upload it as plain JSONL.", 415)
                    size += len(block)
                    if size > most:
                        raise Refused(f"The file is larger than {most / 1e6:.0f} MB.", 413)
                    hasher.update(block)
                    target.write(block)
            complete = True
        finally:
            if not complete:
                self.remove(path)
        return size, hasher.hexdigest()

    def open(self, path: str) -> IO[bytes]:
        return self.fs.open(path, "rb")

    def blocks(self, path: str) -> Iterator[bytes]:
        """The bytes of a file, ``BLOCK`` at a time."""
        with self.open(path) as source:
            while block := source.read(BLOCK):
                yield block

    def fetch(self, path: str, target: Path) -> None:
        """Copy a file to this machine."""
        with self.open(path) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, BLOCK)

    def put_folder(self, path: str, source: Path) -> None:
        """Store every file of a folder of this machine."""
        for file in sorted(each for each in source.rglob("*") if each.is_file()):
            name = f"{path}/{file.relative_to(source).as_posix()}"
            self.fs.makedirs(name.rpartition("/")[0], exist_ok=True)
            self.fs.put_file(str(file), name)

    def remove(self, path: str) -> None:
        """Remove a file or a folder; one that is not there is no error."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(path, recursive=True)


@dataclasses.dataclass(frozen=True)
class Form:
    """What was looked at: the number of rows, and those that no run can take."""

    rows: int
    bad: list[BadRow]


def check_form(file: IO[bytes], limits: Limits, special: str) -> Form:
    """Look at every row of a JSONL file, a thousand at a time.

    Args:
        special: a regular expression; a turn that holds a match would forge the turns of the chat template.
    """
    marks = re.compile(special)
    bad: list[BadRow] = []
    rows = 0
    lines = _lines(file, limits)
    while chunk := list(zip(range(CHUNK), lines)):
        rows += len(chunk)
        if rows > limits.rows:
            return Form(rows, [BadRow(chunk[-1][1][0], f"the file has more than {limits.rows} rows"), *bad])
        examples, wrong = read_examples([row for _, row in chunk])
        bad += wrong
        for example in examples:
            texts = [*strings([list(turn.values()) for turn in example.messages]), *strings(example.tools)]
            if sum(map(len, texts)) > limits.row_characters:
                bad.append(BadRow(example.line, f"the row is longer than {limits.row_characters} characters"))
            elif mark := next(filter(None, map(marks.search, texts)), None):
                bad.append(BadRow(example.line, f"a turn or a tool holds {mark[0]!r}, a mark of the chat template"))
    return Form(rows, sorted(bad))


def _lines(file: IO[bytes], limits: Limits) -> Iterator[tuple[int, Any]]:
    """The rows of a file with their line numbers; no line is read beyond what a row may have."""
    most, number = 6 * limits.row_characters + 65536, 0
    while line := file.readline(most):
        number += 1
        if len(line) == most and not line.endswith(b"\n"):
            while (rest := file.readline(most)) and not rest.endswith(b"\n"):
                pass
            yield number, BadRow(number, f"the row is longer than {limits.row_characters} characters")
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            yield number, BadRow(number, "not UTF-8 text")
            continue
        if text.strip():
            yield number, json_line(number, text)
