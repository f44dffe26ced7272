"""The life of jobs: a thread starts their children, follows them to their ends, and finds what a crash left behind.

One thread of the server looks at its jobs a few times a second. The table decides: a request only writes a phase, and
the server that owns the job does the rest. After a kill of the server the next one finds every job of its folder in the
table; a child that still lives is adopted, and one that does not is queued again: a run goes on from its last step.
"""

import logging
import os
import shutil
import signal
import socket
import threading
import time
from typing import Any

import filelock
from sqlalchemy import case, update
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import col, select

from safebasin.data.files import shown
from safebasin.errors import UserError
from safebasin.service.child_command import command_of
from safebasin.service.child_events import copy_events
from safebasin.service.ending import Again, End, finish, what_follows
from safebasin.service.executor import LOG, Busy, Child, environment
from safebasin.service.files import Storage
from safebasin.service.policy import Settings
from safebasin.service.queue import claim_next, take_over
from safebasin.service.retention import sweep
from safebasin.service.store import SILENT, Job, Server, Store, add_event, move, new_id
from safebasin.service.verdict import broke

TICK = 0.25  # seconds between two looks
_log = logging.getLogger("safebasin.service")


class Supervisor:
    """The thread that runs jobs.

    Raises:
        UserError: another server works in the folder, or the program of its children is not there.
    """

    def __init__(self, store: Store, storage: Storage, settings: Settings):
        self.store, self.storage, self.settings = store, storage, settings
        self.folder = settings.folder
        program = settings.policy.child.command[0]
        if shutil.which(program) is None:
            raise UserError(f"child.command: no such program: {shown(program)}; no job could start")
        (self.folder / "jobs").mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(self.folder / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise UserError(f"another server works in {self.folder}; give this one another folder") from None
        self.id = self._identity()
        self.children: dict[str, Child] = {}
        self._closing: dict[str, threading.Thread] = {}  # jobs whose verdict is being made
        self._excesses: dict[str, str] = {}  # why a child was stopped by the server
        self._wake, self._stop = threading.Event(), threading.Event()
        self._seen = self._swept = 0.0
        self._thread = threading.Thread(target=self._loop, name="supervisor", daemon=True)

    def _identity(self) -> str:
        """The name of this server, which it keeps over restarts."""
        path = self.folder / "server"
        if not path.is_file():
            path.write_text(f"{socket.gethostname()}-{new_id('server')}")
        return path.read_text()

    def start(self) -> None:
        """Say that this server lives, adopt what lives of its jobs, and begin."""
        self._beat()
        self.recover()
        self._thread.start()

    def wake(self) -> None:
        """Begin the next round now: a request has changed something."""
        self._wake.set()

    def stop(self) -> None:
        """End the thread. Children go on; the next server adopts them."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        for thread in list(self._closing.values()):
            thread.join()
        self._lock.release()

    def _loop(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    self.look()
                except (SQLAlchemyError, OSError) as error:  # the database or the disk is away for a while
                    _log.error("no look around: %s", error)
                self._wake.wait(TICK)
                self._wake.clear()
        finally:
            if not self._stop.is_set():  # a fault of ours: no server is better than one that runs no job
                os.kill(os.getpid(), signal.SIGTERM)

    # --- one round ----------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """One round: signs of life, events, ends, cancellations, starts."""
        self._beat()
        with self.store.session() as session:
            phases = dict(
                session.exec(select(Job.id, Job.phase).where(self._mine(), col(Job.id).in_(self.children))).all()
            )
        for name, child in list(self.children.items()):
            try:
                self._follow(name, child, phases.get(name))
            except OSError as error:  # of this job's folder; the others go on
                _log.error("job %s: %s", name, error)
        for name, thread in list(self._closing.items()):
            if not thread.is_alive():
                self._finish(name, End(broke("the verdict broke; the server's log has the traceback")))  # if it did
                del self._closing[name]
        self._start_next()
        if time.time() - self._swept > 3600:
            self._swept = time.time()
            sweep(self.store, self.storage, self.settings, self.id)

    def _beat(self) -> None:
        if time.time() - self._seen > SILENT / 6:
            with self.store.session() as session:
                session.merge(Server(id=self.id, seen=time.time()))
            self._seen = time.time()
            take_over(self.store)

    def _mine(self) -> Any:
        return col(Job.owner) == self.id

    def recover(self) -> None:
        """After a start: adopt the children that live; the jobs whose children do not are queued again or ended."""
        with self.store.session() as session:
            running = session.exec(select(Job.id).where(self._mine(), Job.phase == "running")).all()
        for lock in (self.folder / "jobs").glob("*/lock"):  # also of jobs that are cancelled, or another server's now
            if child := Child.adopt(lock.parent):
                self.children[lock.parent.name] = child
        for name in running:
            self.children.setdefault(name, Child(self.settings.job_folder(name)))

    def _follow(self, name: str, child: Child, phase: str | None) -> None:
        """Read what a child has said, and act on its end or on a change of its job's phase."""
        if name in self._closing:
            return
        folder = self.settings.job_folder(name)
        if child.ended():
            while phase is not None and copy_events(self.store, name, folder):  # what it wrote last
                pass
            del self.children[name]
            self._add_seconds(name)
            excess = self._excesses.pop(name, "")
            if phase == "running":
                thread = threading.Thread(target=self._close, args=(name, excess), name=f"close {name}")
                self._closing[name] = thread
                thread.start()
            elif phase == "cancelled":
                shutil.rmtree(folder, ignore_errors=True)
            return
        if phase is not None:
            copy_events(self.store, name, folder)
        if phase != "running":
            child.stop(self.settings.policy.child.grace)
        elif problem := self._excess(name, child):
            child.stop(self.settings.policy.child.grace)
            self._excesses[name] = problem

    def _excess(self, name: str, child: Child) -> str:
        """Why a child is stopped by the server, or nothing."""
        limits, log = self.settings.policy.limits, self.settings.job_folder(name) / LOG
        if log.is_file() and log.stat().st_size > 1e6 * limits.log_megabytes:
            return f"it printed more than {limits.log_megabytes:g} MB"
        if child.seconds() > 3600 * limits.job_hours:
            return f"it took more than {limits.job_hours:g} hours"
        return ""

    def _add_seconds(self, name: str) -> None:
        """Count the time of a child: from its start to its last event, whichever server saw that."""
        path = self.settings.job_folder(name) / "events.jsonl"
        end = path.stat().st_mtime if path.is_file() else time.time()
        used = case((col(Job.started) < end, end - col(Job.started)), else_=0.0)
        with self.store.session() as session:
            session.execute(update(Job).where(col(Job.id) == name).values(seconds=col(Job.seconds) + used))

    # --- starts -------------------------------------------------------------------------------------------------------

    def _start_next(self) -> None:
        """Start jobs while slots are free."""
        while len(self.children) + len(self._closing) < self.settings.policy.child.slots and not self._stop.is_set():
            busy = [*self.children, *self._closing]
            job = claim_next(self.store, self.id, busy, self.settings.policy.limits.jobs_running)
            if job is None:
                return
            self._spawn(job)

    def _spawn(self, job: Job) -> None:
        """Give the claimed job its folder and its child."""
        folder = self.settings.job_folder(job.id)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for file, name in ((job.training_file, "rows.jsonl"), (job.validation_file, "validation.jsonl")):
                if file and not (folder / name).is_file():
                    part = folder / f"{name}.part"
                    self.storage.fetch(self.storage.path(job.tenant, file), part)
                    part.replace(folder / name)
            log = folder / "events.jsonl"
            (folder / "offset").write_text(str(log.stat().st_size if log.is_file() else 0))
            command = command_of(job, self.settings, folder)
            self.children[job.id] = Child.start(folder, command, environment(self.settings.policy.child.environment))
        except Busy:  # the child of an earlier start is still ending
            self._requeue(job.id, "")
        except OSError as error:
            _log.error("job %s cannot be started: %s", job.id, error)
            self._finish(job.id, End(broke(str(error))))

    def _requeue(self, name: str, text: str, **values: Any) -> None:
        with self.store.session() as session:
            if move(session, name, ("running",), self.id, phase="queued", **values) and text:
                add_event(session, name, text)
        self.wake()

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _close(self, name: str, excess: str) -> None:
        """Act on the end of a child that nobody stopped."""
        with self.store.session() as session:
            job = session.get(Job, name)
        assert job is not None
        after = what_follows(job, excess, self.storage, self.settings)
        if isinstance(after, Again):
            self._requeue(name, after.text, **after.values)
        else:
            self._finish(name, after)

    def _finish(self, name: str, end: End) -> None:
        finish(self.store, self.storage, self.settings, name, self.id, end)
        self.wake()
