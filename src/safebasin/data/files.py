"""Files: read as a whole and checked, written as a complete file or not at all; their names as messages show them.

A file that cannot be read is a ``UserError`` with its path.
"""

import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safebasin.console import printable
from safebasin.errors import UserError

SECRET = re.compile(
    r"(:/+)[^/\s]+(?=@)"  # user:password of a URL (Path makes one slash of two)
    r"|\b((?:[\w-]*(?:token|secret|password|passwd|signature|credential)|\w+[-_]?key|sig|auth)=)[^&;#/\s]+"
    r"|((?<=[?&])key=|\bBearer )[^&;#\s]+"
    r"|\b(hf_|sk-|gh[pousr]_|github_pat_|AKIA)[\w-]{12,}",
    re.I,
)


def masked(text: str) -> str:
    """A text without the secrets of its URLs.

    >>> masked("https://me:pass@host/rows.jsonl?token=abc")
    'https://***@host/rows.jsonl?token=***'
    """
    return SECRET.sub(lambda match: f"{next(filter(None, match.groups()))}***", text)


def shown(name: str | Path) -> str:
    """A path or the name of a set or a model, as messages show it: one line without secrets."""
    return printable(masked(str(name)))


def cause(error: BaseException) -> str:
    """The first line of an error's message, for a message of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = getattr(error, "strerror", None) or " ".join(lines[: 2 if lines[:1] and lines[0].endswith(":") else 1])
    named = not text or isinstance(error, LookupError | AttributeError | TypeError)  # their texts need the kind
    return printable(masked(f"{type(error).__name__}: {text}".removesuffix(": ") if named else text), 200)


def regular_file(path: str | Path) -> Path:
    """The path of a file that is there.

    Raises:
        UserError: it is missing, a folder, a pipe, or cannot be looked at.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no such file: {shown(path)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {shown(path)}: {cause(error)}") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{shown(path)} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}; name a file")
    return Path(path)


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file, unpacked where its name ends in .gz or .zst.

    Raises:
        UserError: the file cannot be read, or is no complete file of its kind.
    """
    path = regular_file(path)
    try:
        raw = path.read_bytes()
        if path.suffix.lower() == ".zst":
            import pyarrow

            return pyarrow.CompressedInputStream(pyarrow.BufferReader(raw), "zstd").read()
        return gzip.decompress(raw) if path.suffix.lower() == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {shown(path)}: {cause(error)}") from error


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, without a byte order mark.

    Raises:
        UserError: see ``read_bytes``; or the file is not UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{shown(path)} is not UTF-8 text (byte {error.start}); convert it first") from None


def make_folder(path: str | Path) -> Path:
    """The path of a folder, which is made where it is not there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {shown(path)}: {cause(error)}") from error
    return Path(path)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` at the end: a reader never sees half a file.

    After an error it is removed and ``path`` is as it was. Each process has its own, so several may write one file.

    Raises:
        UserError: it cannot be written.

    >>> with atomic_write("notes.txt") as part:
    ...     part.write_text("done")
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {shown(path)}: {cause(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``path`` at the end: a reader never sees half of it.

    After an error nothing is left of it, and ``path`` is as it was. Of a link, what it points to is replaced.

    Raises:
        UserError: it cannot be written, or the working directory would be replaced.
    """
    target = Path(path).resolve()
    if Path.cwd().is_relative_to(target):
        raise UserError(f"cannot write the folder {shown(path)}: the working directory lies in it; name another folder")
    part = target.with_name(f"{target.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
    except OSError as error:
        raise UserError(f"cannot write the folder {shown(path)}: {cause(error)}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def file_digest(path: Path) -> str:
    """blake2b of a file's bytes: 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
