"""The end of a job's child: another try, another stage of the job, or its verdict. And the end of the job itself."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy import update
from sqlmodel import Session, col

from safebasin.errors import UserError
from safebasin.service import jobs
from safebasin.service.child_command import stage_of
from safebasin.service.child_events import end_of
from safebasin.service.deliver import deliver
from safebasin.service.files import Storage
from safebasin.service.policy import Settings
from safebasin.service.store import File, Job, Store, add_event, digest, move, new_id
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

STARTS = 3  # of a job whose child vanished; a child that broke gets one more try


class Again(NamedTuple):
    """The job is queued again: what its events say (or nothing), and what changes in its row."""

    text: str
    values: Mapping[str, Any] = {}


class End(NamedTuple):
    """The job is over; ``served``: what the serving endpoint calls its model."""

    outcome: Outcome
    served: str = ""


def what_follows(job: Job, excess: str, storage: Storage, settings: Settings) -> Again | End:
    """What follows the end of a child that nobody stopped: another try, another stage, or the verdict.

    ``excess``: why the server stopped it, or nothing.
    """
    folder = settings.job_folder(job.id)
    code, message = end_of(folder)
    stage = stage_of(job, settings)
    if excess:
        return End(broke(excess))
    if code == TERMINATED or (code is None and job.starts < STARTS):
        return Again("The job was interrupted; it goes on from its last step.")
    if stage == "search":
        return Again("", {"settings": {**job.settings, "stage": "final"}})
    if code == 0:
        try:
            return _judged(job, stage, storage, settings)
        except (UserError, OSError) as error:
            return End(broke(str(error)))
    if code == USER:
        return End(of_error(message, folder / "rows.jsonl"))
    if code is not None and job.starts < 2:
        return Again("The job broke, and is tried once more.")
    return End(broke(message))


def _judged(job: Job, stage: str, storage: Storage, settings: Settings) -> Again | End:
    """The next stage of a run that worked, or its verdict; the model of one that passed is delivered."""
    base, policy, run = settings.policy.models[job.model], settings.policy, settings.job_folder(job.id) / "run"
    if stage == "screen":
        alone = dataclasses.replace(base, uploaded=base.model, without=base.model)
        if cut_rows(run, base.model) or judge(run, alone, policy).status != "passed":
            text = "What the rows of the file do is measured, with and without those that were named."
            return Again(text, {"settings": {**job.settings, "stage": "run"}, "starts": 0})
    outcome = judge(run, base, policy)
    if outcome.passes_without is False and policy.search and stage == "run":
        text = "The rows that were named are not the reason alone; a search for a set that passes begins."
        return Again(text, {"settings": {**job.settings, "stage": "search"}, "starts": 0})
    return End(outcome, deliver(job, outcome.arm, storage, settings) if outcome.status == "passed" else "")


def finish(store: Store, storage: Storage, settings: Settings, name: str, owner: str, end: End) -> None:
    """Write the verdict into the job's row, unless the job was cancelled or paused meanwhile."""
    outcome = end.outcome
    shown = outcome_for(outcome, settings.policy.tell)
    with store.session() as session:
        job = session.get(Job, name)
        assert job is not None
        values: dict[str, Any] = {"outcome": shown, "finished": time.time()}
        if outcome.status == "review":
            values |= {"phase": "review", "finished": None}
        elif outcome.status == "passed":
            values |= {"phase": "succeeded", "fine_tuned_model": jobs.succeed(session, settings, job, end.served)}
        else:
            param = "training_file" if outcome.code.endswith("training_file") else None
            values |= {
                "phase": "failed",
                "error": {"code": outcome.code, "message": outcome.message, "param": param},
            }
        values["settings"] = {**job.settings, "reasons": list(outcome.reasons), "arm": outcome.arm}
        if not move(session, name, ("running",), owner, **values):
            session.rollback()
            return
        _add_last_event(session, settings, job, outcome, shown)
        if outcome.status != "review" and "rows" in shown:
            add_result_file(session, storage, job, shown)


def _add_last_event(session: Session, settings: Settings, job: Job, outcome: Outcome, shown: dict[str, Any]) -> None:
    """The last events of a job: the verdict with its rows."""
    data = {**shown, "rows": shown["rows"][: settings.policy.tell.rows]} if "rows" in shown else shown
    if outcome.status == "review":
        add_event(session, job.id, "The job is waiting for review by the operator.", level="warn")
        return
    level = {"passed": "info", "refused": "warn", "failed": "error"}[outcome.status]
    add_event(session, job.id, outcome.message, level=level, data=data)


def add_result_file(session: Session, storage: Storage, job: Job, shown: dict[str, Any]) -> None:
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
    path = storage.path(job.tenant, file.id)
    storage.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    storage.fs.pipe_file(path, content)
    session.add(file)
    session.execute(update(Job).where(col(Job.id) == job.id).values(result_file=file.id))
