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
from types import TracebackType
from typing import Any

from safebasin.errors import UserError, exit_code

SECONDS = 5.0  # between two events of progress
_log: "EventLog | None" = None  # that of this process


class EventLog:
    """``with EventLog(path):`` what the run does is appended to a file; the last line has the exit code.

    One line is one write, so that a reader sees complete lines. A line that a killed run has broken off is closed.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = -1

    def __enter__(self) -> "EventLog":
        global _log
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            with contextlib.suppress(OSError):  # a pipe has no end to look at
                if (
                    os.lseek(self._file, 0, os.SEEK_END)
                    and os.pread(self._file, 1, self.path.stat().st_size - 1) != b"\n"
                ):
                    self._write(b"\n")
        except OSError as error:
            raise UserError(f"--events {self.path}: cannot write: {error.strerror}") from error
        _log = self
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        global _log
        _log = None
        try:
            self.add("end", code=exit_code(error), message="" if error is None else str(error)[:2000])
        finally:
            os.close(self._file)

    def add(self, event: str, **facts: Any) -> None:
        line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}, default=str)
        try:
            self._write(line.encode() + b"\n")
        except OSError as error:
            raise UserError(f"--events {self.path}: cannot write: {error.strerror}") from error

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._file, data) :]


def emit(event: str, **facts: Any) -> None:
    """Add an event to the log of this process, where it has one."""
    if _log is not None:
        _log.add(event, **facts)
