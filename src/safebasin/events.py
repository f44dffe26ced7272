"""What a run does, as JSON lines for another program: ``safebasin run --events FILE``.

Every line has ``time`` (seconds since 1970) and ``event``: ``step`` (started, skipped or done), ``progress`` (every
five seconds within a step), ``loss`` (every optimizer step), ``verdict`` (of the gate), and at last ``end`` with the
exit code. A file without an ``end`` belongs to a run that goes on, or that was killed.
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from safebasin.errors import UserError

SECONDS = 5.0  # between two events of progress
_log: tuple[int, Path] | None = None  # that of this process, as it is open


def open_log(path: Path) -> None:
    """From now on what the run does is appended to a file. A line that a killed run has broken off is closed.

    Raises:
        UserError: the file cannot be written.
    """
    global _log
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _log = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666), path
        size = path.stat().st_size if path.is_file() else 0  # a pipe has none
        if size and os.pread(_log[0], 1, size - 1) != b"\n":
            os.write(_log[0], b"\n")
    except OSError as error:
        raise UserError(f"--events {path}: cannot write: {error.strerror}") from error


def emit(event: str, **facts: Any) -> None:
    """Add an event to the log of this process, where it has one; one line is one write.

    Raises:
        UserError: the disk is full, or the reader of a pipe has gone.
    """
    if _log is None:
        return
    line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}, default=str)
    try:
        os.write(_log[0], line.encode() + b"\n")
    except OSError as error:
        raise UserError(f"--events {_log[1]}: cannot write: {error.strerror}") from error


def close_log(code: int, message: str = "") -> None:
    """The last event of a run: its exit code, and what it said."""
    global _log
    if _log is not None:
        file, _log = _log[0], None
        end = {"time": round(time.time(), 3), "event": "end", "code": code, "message": message[:2000]}
        with contextlib.suppress(OSError):
            os.write(file, json.dumps(end).encode() + b"\n")
        os.close(file)
