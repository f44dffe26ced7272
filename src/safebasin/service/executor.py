"""The process of a job: a group of its own that outlives the server, writes to files, and holds a lock on its folder.

The lock is taken by the server and inherited by the child, so it is held as long as the child lives, whoever its parent
is. The child writes its process id itself, before it becomes the run: a server that is killed in between loses nothing.
"""

import contextlib
import dataclasses
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

LOG = "output.log"
_SCRIPT = 'echo $$ > "$0.part" && mv "$0.part" "$0" && exec "$@"'


class Busy(Exception):
    """A child of an earlier start still lives in the folder."""


@dataclasses.dataclass
class Child:
    """A child in its folder. ``process`` is None where another server started it."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None
    began: float = dataclasses.field(default_factory=time.monotonic)
    killed_at: float | None = None  # when SIGTERM was sent

    @classmethod
    def start(cls, folder: Path, command: Sequence[str], environment: Mapping[str, str]) -> "Child":
        """Start a command. Its standard output and error go to a file, so that it needs no server to read them.

        Raises:
            Busy: a child still lives in the folder.
            OSError: the process cannot be started.
        """
        lock = _lock(folder)
        if lock is None:
            raise Busy(folder)
        try:
            (folder / "pid").unlink(missing_ok=True)
            with (folder / LOG).open("ab") as log:
                process = subprocess.Popen(
                    ["/bin/sh", "-c", _SCRIPT, str(folder / "pid"), *command],
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=dict(environment),
                    start_new_session=True,
                    pass_fds=(lock,),
                )
        finally:
            os.close(lock)  # the child holds it now
        return cls(folder, process)

    @classmethod
    def adopt(cls, folder: Path) -> "Child | None":
        """The child that lives in a folder, or None."""
        child = cls(folder)
        return child if child.holds_lock() else None

    def seconds(self) -> float:
        """Since its start, or since this server knows it."""
        return time.monotonic() - self.began

    @property
    def pid(self) -> int | None:
        """The process and its group; None in the instant before the child has written it."""
        if self.process is not None:
            return self.process.pid
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / "pid").read_text())
        return None

    def ended(self) -> bool:
        """Whether the child is gone. What it left of its group is killed.

        Only a group of which a process is certain to live is signalled: a number from a file may be another's by now.
        """
        if self.process is not None:
            gone = self.process.poll() is not None
        elif not self.holds_lock():
            return True
        else:  # a grandchild may hold the lock when the leader is gone
            gone = self.pid is not None and not _exists(self.pid)
        if gone:
            self.send(signal.SIGKILL)
        return gone

    def holds_lock(self) -> bool:
        """Whether a process of the child's holds the lock of its folder."""
        if not (self.folder / "lock").is_file():  # the server was killed before it came to start the child
            return False
        lock = _lock(self.folder)
        if lock is not None:
            os.close(lock)
        return lock is None

    def stop(self, grace: float) -> None:
        """Ask the group to end; after ``grace`` seconds, kill it. Call it until ``ended``."""
        now = time.monotonic()
        if self.killed_at is None:
            if self.send(signal.SIGTERM):
                self.killed_at = now
        elif now - self.killed_at > grace:
            self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> bool:
        """Send a signal to the group; whether its number is there."""
        if (pid := self.pid) is None:
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, number)
        return True


def _lock(folder: Path) -> int | None:
    """The lock of a folder as a file descriptor; None where a process holds it."""
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def environment(names: Sequence[str]) -> dict[str, str]:
    """What a child inherits: no secret of the server that the policy does not name."""
    return {name: os.environ[name] for name in ("PATH", "HOME", "LANG", *names) if name in os.environ}
