"""The life of jobs: whose turn it is, their children, their events, their ends, and what a crash left behind.

One thread of the server looks around a few times a second. The table is the truth: a request only writes a phase, and
the server that owns the job does the rest. After a kill of the server the next one finds every job of its folder in the
table; a child that still lives is adopted, and one that does not is queued again: a run goes on from its last step.
"""

import dataclasses
import json
import logging
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import filelock
from sqlalchemy import case, func, or_, update
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session, col, select

from safebasin.console import printable
from safebasin.errors import UserError
from safebasin.service import jobs
from safebasin.service.deliver import deliver
from safebasin.service.executor import LOG, Busy, Child, environment
from safebasin.service.files import Storage
from safebasin.service.policy import Settings
from safebasin.service.store import (
    LIVE,
    OVER,
    SILENT,
    File,
    Job,
    Server,
    Store,
    add_event,
    digest,
    move,
    new_id,
)
from safebasin.service.verdict import (
    TERMINATED,
    USER,
    Outcome,
    broke,
    cut_rows,
    judge,
    lines_of,
    of_error,
    outcome_for,
)

TICK = 0.25  # seconds between two looks
STARTS = 3  # of a job whose child vanished; a child that broke gets one more try
EVENTS = 2000  # of a job, in the table; all of them are in its event file
LOSSES = 100  # of an arm, in the table
_log = logging.getLogger("safebasin.service")


class Supervisor:
    """The thread that runs jobs.

    Raises:
        UserError: another server works in the folder.
    """

    def __init__(self, store: Store, storage: Storage, settings: Settings):
        self.store, self.storage, self.settings = store, storage, settings
        self.folder = settings.folder
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
        """Look around now: a request has changed something."""
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

    def path(self, job: str) -> Path:
        """The folder of a job."""
        return self.folder / "jobs" / job

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

    # --- one look around
    # ----------------------------------------------------------------------------------------------------------------

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
                self._finish(name, broke("the verdict broke; the server's log has the traceback"))  # if it did
                del self._closing[name]
        self._start_next()
        if time.time() - self._swept > 3600:
            self._swept = time.time()
            self.sweep()

    def _beat(self) -> None:
        if time.time() - self._seen > SILENT / 6:
            with self.store.session() as session:
                session.merge(Server(id=self.id, seen=time.time()))
            self._seen = time.time()
            self._take_over()

    def _take_over(self) -> None:
        """Queue the jobs that run on servers that gave no sign of life for a minute."""
        with self.store.session() as session:
            silent = select(Server.id).where(Server.seen < time.time() - SILENT)
            lost = select(Job.id, Job.owner).where(Job.phase == "running", col(Job.owner).in_(silent))
            for name, owner in session.exec(lost).all():
                if move(session, name, ("running",), owner, phase="queued"):
                    add_event(session, name, "The machine of the job was lost; it is queued again.", level="warn")

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
            self.children.setdefault(name, Child(self.path(name)))

    def _follow(self, name: str, child: Child, phase: str | None) -> None:
        """Read what a child has said, and act on its end or on a change of its job's phase."""
        if name in self._closing:
            return
        if child.ended():
            while phase is not None and self._read_events(name):  # what it wrote last
                pass
            del self.children[name]
            self._add_seconds(name)
            excess = self._excesses.pop(name, "")
            if phase == "running":
                thread = threading.Thread(target=self._close, args=(name, excess), name=f"close {name}")
                self._closing[name] = thread
                thread.start()
            elif phase == "cancelled":
                shutil.rmtree(self.path(name), ignore_errors=True)
            return
        if phase is not None:
            self._read_events(name)
        if phase != "running":
            child.stop(self.settings.policy.child.grace)
        elif problem := self._excess(name, child):
            child.stop(self.settings.policy.child.grace)
            self._excesses[name] = problem

    def _excess(self, name: str, child: Child) -> str:
        """Why a child is stopped by the server, or nothing."""
        limits, log = self.settings.policy.limits, self.path(name) / LOG
        if log.is_file() and log.stat().st_size > 1e6 * limits.log_megabytes:
            return f"it printed more than {limits.log_megabytes:g} MB"
        if child.seconds() > 3600 * limits.job_hours:
            return f"it took more than {limits.job_hours:g} hours"
        return ""

    def _add_seconds(self, name: str) -> None:
        """Count the time of a child: from its start to its last event, whichever server saw that."""
        path = self.path(name) / "events.jsonl"
        end = path.stat().st_mtime if path.is_file() else time.time()
        used = case((col(Job.started) < end, end - col(Job.started)), else_=0.0)
        with self.store.session() as session:
            session.execute(update(Job).where(col(Job.id) == name).values(seconds=col(Job.seconds) + used))

    # --- starts
    # ----------------------------------------------------------------------------------------------------------------

    def _start_next(self) -> None:
        """Start jobs while slots are free: of the tenant with the fewest running jobs, and of those the one that has
        waited longest since its last start, the oldest."""
        while len(self.children) + len(self._closing) < self.settings.policy.child.slots and not self._stop.is_set():
            with self.store.session() as session:
                job = self._next(session)
                if job is None:
                    return
                values = {"phase": "running", "owner": self.id, "starts": job.starts + 1, "started": time.time()}
                if job.owner != self.id:  # it was another server's: what that had read is not in this folder
                    values["position"] = 0
                free = update(Job).where(
                    col(Job.id) == job.id, col(Job.phase) == "queued", col(Job.owner).is_not_distinct_from(job.owner)
                )
                claimed = session.execute(free.values(**values).execution_options(synchronize_session=False))
                if claimed.rowcount != 1:  # type: ignore[attr-defined]
                    continue
                add_event(session, job.id, "The job has started." if job.starts == 0 else "The job goes on.")
            self._spawn(job)

    def _next(self, session: Session) -> Job | None:
        silent = select(Server.id).where(Server.seen < time.time() - SILENT)
        running = func.sum(case((col(Job.phase) == "running", 1), else_=0)).label("running")
        last = func.coalesce(func.max(Job.started), 0.0).label("last")
        tenants = select(Job.tenant, running, last).group_by(col(Job.tenant)).subquery()
        waiting = (
            select(Job)
            .join(tenants, tenants.c.tenant == col(Job.tenant))
            .where(
                Job.phase == "queued",
                tenants.c.running < self.settings.policy.limits.jobs_running,
                or_(col(Job.owner).is_(None), self._mine(), col(Job.owner).in_(silent)),
                col(Job.id).not_in([*self.children, *self._closing]),
            )
            .order_by(tenants.c.running, tenants.c.last, col(Job.created))
        )
        return session.exec(waiting).first()

    def _spawn(self, job: Job) -> None:
        """Give the claimed job its folder and its child."""
        folder = self.path(job.id)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for file, name in ((job.training_file, "rows.jsonl"), (job.validation_file, "validation.jsonl")):
                if file and not (folder / name).is_file():
                    part = folder / f"{name}.part"
                    self.storage.fetch(self.storage.path(job.tenant, file), part)
                    part.replace(folder / name)
            log = folder / "events.jsonl"
            (folder / "offset").write_text(str(log.stat().st_size if log.is_file() else 0))
            command = jobs.command(job, self.settings, folder)
            self.children[job.id] = Child.start(folder, command, environment(self.settings.policy.child.environment))
        except Busy:  # the child of an earlier start is still ending
            self._requeue(job.id, "")
        except OSError as error:
            _log.error("job %s cannot be started: %s", job.id, error)
            self._finish(job.id, broke(str(error)))

    def _requeue(self, name: str, text: str, **values: Any) -> None:
        with self.store.session() as session:
            if move(session, name, ("running",), self.id, phase="queued", **values) and text:
                add_event(session, name, text)
        self.wake()

    # --- events
    # ----------------------------------------------------------------------------------------------------------------

    def _read_events(self, name: str, most: int = 1 << 20) -> bool:
        """Copy complete new lines of a child's event file into the table; whether there may be more."""
        path = self.path(name) / "events.jsonl"
        if not path.is_file():
            return False
        with self.store.session() as session:
            position, count = session.exec(select(Job.position, Job.events).where(Job.id == name)).one()
            with path.open("rb") as file:
                file.seek(position)
                block = file.read(most)
            lines = block[: block.rfind(b"\n") + 1] or (block if len(block) == most else b"")
            if not lines:
                return False
            for line in lines.splitlines():
                count += self._add(session, name, line, count)
            session.execute(update(Job).where(col(Job.id) == name).values(position=position + len(lines)))
        return len(block) == most

    def _add(self, session: Session, name: str, line: bytes, count: int) -> bool:
        """One event of a child as one of the job; whether it became one."""
        try:
            event = json.loads(line)
            created = float(event["time"])
        except (ValueError, LookupError, TypeError, RecursionError):
            return False  # broken off by a kill
        shown = _shown(event)
        if shown is None or count >= EVENTS:
            return False
        text, metrics = shown
        add_event(session, name, text, kind="metrics" if metrics else "message", data=metrics or None, created=created)
        return True

    # --- ends
    # ----------------------------------------------------------------------------------------------------------------

    def _close(self, name: str, excess: str) -> None:
        """The end of a child that nobody stopped: another try, another stage, or the verdict."""
        with self.store.session() as session:
            job = session.get(Job, name)
        assert job is not None
        code, message = _end_of(self.path(name))
        stage = jobs.stage_of(job, self.settings)
        if excess:
            self._finish(name, broke(excess))
        elif code == TERMINATED or (code is None and job.starts < STARTS):
            self._requeue(name, "The job was interrupted; it goes on from its last step.")
        elif stage == "search":
            self._requeue(name, "", settings={**job.settings, "stage": "final"})
        elif code == 0:
            self._judge(job, stage)
        elif code == USER:
            self._finish(name, of_error(message, self.path(name) / "rows.jsonl"))
        elif code is not None and job.starts < 2:
            self._requeue(name, "The job broke, and is tried once more.")
        else:
            self._finish(name, broke(message))

    def _judge(self, job: Job, stage: str) -> None:
        base, policy = self.settings.policy.models[job.model], self.settings.policy
        run = self.path(job.id) / "run"
        try:
            if stage == "screen":
                alone = dataclasses.replace(base, uploaded=base.model, without=base.model)
                if cut_rows(run, base.model) or judge(run, alone, policy).status != "passed":
                    text = "What the rows of the file do is measured, with and without those that were named."
                    self._requeue(job.id, text, settings={**job.settings, "stage": "run"}, starts=0)
                    return
            outcome = judge(run, base, policy)
            if outcome.passes_without is False and policy.search and stage == "run":
                text = "The rows that were named are not the reason alone; a search for a set that passes begins."
                self._requeue(job.id, text, settings={**job.settings, "stage": "search"}, starts=0)
                return
            served = self.deliver(job, outcome.arm) if outcome.status == "passed" else ""
        except (UserError, OSError) as error:
            outcome, served = broke(str(error)), ""
        self._finish(job.id, outcome, served)

    def deliver(self, job: Job, arm: str) -> str:
        """Put the adapter of an arm into storage; what the serving endpoint calls the model."""
        run, name = self.path(job.id) / "run", job.id.removeprefix("ftjob-")
        self.storage.put_folder(self.storage.path(job.tenant, f"models/{name}"), run / "arms" / arm / "adapter")
        serving = self.settings.policy.serving
        if serving is None:
            return name
        target = self.folder / "models" / name
        deliver(run, arm, target, self.settings.policy)
        return str(target) if serving.name == "path" else name

    def _finish(self, name: str, outcome: Outcome, served: str = "") -> None:
        """Write the verdict, unless the job was cancelled or paused meanwhile."""
        tell = self.settings.policy.tell
        shown = outcome_for(outcome, tell)
        with self.store.session() as session:
            job = session.get(Job, name)
            assert job is not None
            values: dict[str, Any] = {"outcome": shown, "finished": time.time()}
            if outcome.status == "review":
                values |= {"phase": "review", "finished": None}
            elif outcome.status == "passed":
                values |= {"phase": "succeeded", "fine_tuned_model": jobs.succeed(session, self.settings, job, served)}
            else:
                param = "training_file" if outcome.code.endswith("training_file") else None
                values |= {
                    "phase": "failed",
                    "error": {"code": outcome.code, "message": outcome.message, "param": param},
                }
            values["settings"] = {**job.settings, "reasons": list(outcome.reasons), "arm": outcome.arm}
            if not move(session, name, ("running",), self.id, **values):
                session.rollback()
                return
            self._tell(session, job, outcome, shown)
            if outcome.status != "review" and "rows" in shown:
                self.result_file(session, job, shown)
        self.wake()

    def _tell(self, session: Session, job: Job, outcome: Outcome, shown: dict[str, Any]) -> None:
        """The last events of a job: the verdict with its rows."""
        data = {**shown, "rows": shown["rows"][: self.settings.policy.tell.rows]} if "rows" in shown else shown
        if outcome.status == "review":
            add_event(session, job.id, "The job is waiting for review by the operator.", level="warn")
            return
        level = {"passed": "info", "refused": "warn", "failed": "error"}[outcome.status]
        add_event(session, job.id, outcome.message, level=level, data=data)

    def result_file(self, session: Session, job: Job, shown: dict[str, Any]) -> None:
        """All rows that were named, in a file of purpose ``fine-tune-results``."""
        content = lines_of(shown).encode()
        file = File(
            id=new_id("file"),
            tenant=job.tenant,
            name=f"{job.id}.jsonl",
            purpose="fine-tune-results",
            size=len(content),
            digest=digest(content.decode()),
            created=time.time(),
        )
        path = self.storage.path(job.tenant, file.id)
        self.storage.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        self.storage.fs.pipe_file(path, content)
        session.add(file)
        session.execute(update(Job).where(col(Job.id) == job.id).values(result_file=file.id))

    def sweep(self) -> None:
        """Remove files and run folders that are older than the policy keeps them and that no job waits for."""
        with self.store.session() as session:
            used = select(Job.training_file).where(col(Job.phase).in_(LIVE))
            held_out = select(func.coalesce(Job.validation_file, "")).where(col(Job.phase).in_(LIVE))
            before = time.time() - 86400 * self.settings.policy.limits.files_days
            old = select(File).where(File.created < before, col(File.id).not_in(used), col(File.id).not_in(held_out))
            for file in session.exec(old).all():
                self.storage.remove(self.storage.path(file.tenant, file.id))
                session.delete(file)
            over = select(Job.id).where(self._mine(), col(Job.phase).in_(OVER), col(Job.finished) < before)
            folders = [self.path(name) for name in session.exec(over).all()]
        for folder in folders:  # the rows and the run; the model and the table's lines stay
            shutil.rmtree(folder, ignore_errors=True)


def _end_of(folder: Path) -> tuple[int | None, str]:
    """The exit code and the message of a child, as the last line of its events says; no code where it was killed.

    Lines of earlier starts do not count: the file's size at the last start stands beside it.
    """
    path, offset = folder / "events.jsonl", folder / "offset"
    if not path.is_file() or not offset.is_file():
        return None, "the process vanished"
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(int(offset.read_text() or 0), size - (1 << 16)))
        last = file.read().rstrip(b"\n").rpartition(b"\n")[2]
    try:
        event = json.loads(last)
        return (int(event["code"]) if event["event"] == "end" else None), str(event.get("message", ""))
    except (ValueError, LookupError, TypeError, RecursionError):
        return None, "the process vanished"


def _shown(event: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """An event of a run in the customer's words, with its numbers; None where it says nothing to her."""
    match event:
        case {"event": "step", "step": str(step), "state": "started"}:
            return f"Step {printable(step, 60)} has started.", {}
        case {"event": "progress", "title": str(title), "done": int(done), "total": int(total)}:
            return f"{printable(title, 60)}: {done} of {total}", {"done": done, "total": total}
        case {
            "event": "loss",
            "arm": str(arm),
            "step": int(step),
            "total": int(total),
            "loss": int() | float() as loss,
        }:
            if step % max(1, total // LOSSES) and step != total:
                return None
            text = f"Step {step}/{total}: training loss={loss:.2f}"
            return text, {"step": step, "total_steps": total, "train_loss": loss, "arm": printable(arm, 60)}
        case {"event": "round", "arm": str(arm), "outcome": str(outcome), "rows": int(rows)}:
            return f"Search, {printable(arm, 60)}: {rows} rows: {printable(outcome, 60)}", {}
    return None
