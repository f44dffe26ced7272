"""What requests do to jobs: create, cancel, pause, resume. A change is one transaction."""

import dataclasses
import datetime
import hashlib
import time
from typing import Any

from sqlalchemy import update
from sqlmodel import Session, col, func, select

from safebasin.data.json_rows import BadRow
from safebasin.service.errors import ApiError
from safebasin.service.files import Storage, check_form
from safebasin.service.policy import Hyperparameters, Settings
from safebasin.service.schema import CreateJob
from safebasin.service.store import File, Job, Model, Store, Tenant, add_event, count, move, new_id, own

MINUTES = 10  # within which the client's repetition of a lost request is the same request
LATE = 10  # seconds: a first try that begins so long after its repetition has made the job is given that job
SETTABLE = tuple(field.name for field in dataclasses.fields(Hyperparameters))


def create(
    store: Store, storage: Storage, settings: Settings, tenant: str, request: CreateJob, retry: int, key: str | None
) -> Job:
    """A new job, or the one that an earlier try of the same request has made.

    The client repeats a POST whose answer was lost, and says so by ``retry``. Such a repetition is given the job of the
    same body from the last minutes; the first try, should it come through later than its repetition, is given that one.

    Raises:
        ApiError: a model, file or setting that is not there or not allowed; rows that no run can take; a limit.
    """
    began, body = time.time(), hashlib.sha256(request.model_dump_json().encode()).hexdigest()
    base = settings.policy.models.get(request.model)
    if base is None:
        names = ", ".join(settings.policy.models)
        raise ApiError(
            f"The model {request.model!r} cannot be tuned; these can: {names}", code="model_not_found", param="model"
        )
    options = _options(settings.policy.hyperparameters, request)
    with store.session() as session:
        if job := _same(session, tenant, body, began, retry, key):
            return job
        training = _file(session, request.training_file, tenant, "training_file")
        validation = request.validation_file and _file(session, request.validation_file, tenant, "validation_file")
    rows = 0
    for param, file in (("validation_file", validation), ("training_file", training)):
        if file:
            with storage.open(storage.path(tenant, file.id)) as source:
                form = check_form(source, settings.policy.limits, base.special)
            _refuse_bad(form.rows, form.bad, param)
            rows = form.rows
    with store.session() as session:
        # counting up locks the tenant's row: of two creations at once the second sees the first
        session.execute(update(Tenant).where(col(Tenant.id) == tenant).values(jobs=col(Tenant.jobs) + 1))
        if job := _same(session, tenant, body, began, retry, key):
            session.expunge(job)  # a rollback would take its values away
            session.rollback()
            return job
        _check_limits(session, settings, tenant)
        job = Job(
            id=new_id("ftjob"),
            tenant=tenant,
            model=request.model,
            training_file=request.training_file,
            validation_file=request.validation_file,
            suffix=request.suffix or "",
            seed=request.seed or 0,
            settings={"hyperparameters": options, "metadata": request.metadata or {}},
            rows=rows,
            body=body,
            idempotency=key,
            retry=retry,
            created=time.time(),
        )
        session.add(job)
        session.flush()
        add_event(session, job.id, f"The file has {rows} rows and was checked. The job is queued.")
        session.refresh(job)
    return job


def _same(session: Session, tenant: str, body: str, began: float, retry: int, key: str | None) -> Job | None:
    """The job that another try of this request has made.

    Raises:
        ApiError: the key was used for another request.
    """
    if key is not None:
        job = session.exec(select(Job).where(Job.tenant == tenant, Job.idempotency == key)).first()
        if job is not None and job.body != body:
            raise ApiError("The Idempotency-Key was used for another request.", code="idempotency_error", status=400)
        if job is not None:
            return job
    same = select(Job).where(Job.tenant == tenant, Job.body == body).order_by(col(Job.created).desc())
    if retry:
        same = same.where(Job.created > began - 60 * MINUTES)
    else:
        same = same.where(Job.created >= began - LATE, Job.retry > 0)
    return session.exec(same).first()


def _file(session: Session, name: str, tenant: str, param: str) -> File:
    file = own(session, File, name, tenant)
    if file.purpose != "fine-tune":
        raise ApiError(f"The file {file.id} has the purpose {file.purpose!r}; fine-tune is needed.", param=param)
    return file


def _refuse_bad(rows: int, bad: list[BadRow], param: str) -> None:
    """ApiError where a row cannot be used; the first three are named, and how many there are."""
    if not rows:
        raise ApiError("The file holds no row.", code="invalid_training_file", param=param)
    if bad:
        listed = "; ".join(f"line {each.line}: {each.reason}" for each in bad[:3])
        more = f"; {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ApiError(f"{len(bad)} rows cannot be used: {listed}{more}", code="invalid_training_file", param=param)


def _options(allowed: Hyperparameters, request: CreateJob) -> dict[str, int | float]:
    """The hyper-parameters of a request that are not "auto"."""
    method = request.method
    options: dict[str, int | float] = {}
    if method and method.type != "supervised":
        raise ApiError(f"The method {method.type!r} is not offered; supervised is.", param="method")
    chosen = (method and method.supervised and method.supervised.hyperparameters) or request.hyperparameters
    for name in SETTABLE if chosen else ():
        value, limits = getattr(chosen, name), getattr(allowed, name)
        if value is None or value == "auto":
            continue
        if not limits.low <= value <= limits.high:
            raise ApiError(f"{name} is {value:g}; from {limits.low:g} to {limits.high:g} is allowed.", param=name)
        options[name] = value
    return options


def _check_limits(session: Session, settings: Settings, tenant: str) -> None:
    """ApiError 429 where the tenant has too many jobs, refusals or hours."""
    limits, mine, now = settings.policy.limits, Job.tenant == tenant, time.time()
    waiting = count(session, mine, col(Job.phase).in_(("queued", "paused", "review")))
    if waiting >= limits.jobs_waiting:
        raise ApiError(f"{waiting} jobs are waiting; more are accepted when one has started.", **_QUOTA)
    refused = count(session, mine, col(Job.phase) == "failed", col(Job.finished) > now - 86400, _UNSAFE)
    if refused >= limits.jobs_refused_day:
        raise ApiError(f"{refused} files were refused in 24 hours; try again tomorrow.", **_QUOTA)
    if used_hours(session, tenant) >= limits.gpu_hours_month:
        raise ApiError(f"The {limits.gpu_hours_month:g} hours of this month are used up.", **_QUOTA)


_QUOTA: dict[str, Any] = {"code": "insufficient_quota", "status": 429}
_UNSAFE = col(Job.error)["code"].as_string() == "unsafe_training_file"


def used_hours(session: Session, tenant: str) -> float:
    """Hours of the tenant's jobs that were started this month."""
    today = datetime.datetime.now(datetime.UTC)
    month = today.replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp()
    total = select(func.sum(Job.seconds)).where(Job.tenant == tenant, col(Job.started) >= month)
    return (session.exec(total).one() or 0.0) / 3600


# --- what changes a job -----------------------------------------------------------------------------------------------

# verb -> (phases it may come from, the new phase, what the event says)
CHANGES = {
    "cancel": (("queued", "running", "paused", "review"), "cancelled", "The job was cancelled."),
    "pause": (("queued", "running"), "paused", "The job is paused; resume it, and it goes on from its last step."),
    "resume": (("paused",), "queued", "The job is queued again."),
}


def change(store: Store, verb: str, name: str, tenant: str, retry: int) -> Job:
    """Cancel, pause or resume a job. The repetition of a request whose answer was lost is no error.

    Raises:
        ApiError: the job is in no phase for it.
    """
    phases, phase, text = CHANGES[verb]
    with store.session() as session:
        job = own(session, Job, name, tenant)
        values: dict[str, Any] = {"phase": phase}
        if phase == "cancelled":
            values["finished"] = time.time()
        if phase == "queued":
            values["starts"] = 0
        if move(session, job.id, phases, **values):
            add_event(session, job.id, text)
        elif not (retry and job.phase == phase):
            raise ApiError(f"The job is {job.phase}; it cannot be asked to {verb}.", code="invalid_status")
        session.refresh(job)
    return job


def succeed(session: Session, settings: Settings, job: Job, served: str) -> str:
    """The model of a job that passed, in the table; its id."""
    suffix = f":{job.suffix}" if job.suffix else ""
    name = f"ft:{job.model}:{job.tenant.removeprefix('org-')[:8]}{suffix}:{job.id.removeprefix('ftjob-')}"
    session.merge(Model(id=name, tenant=job.tenant, job=job.id, base=job.model, served=served, created=time.time()))
    return name
