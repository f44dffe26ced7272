"""Jobs: create, list, retrieve, cancel, pause, resume, and their checkpoints."""

import re
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from sqlmodel import col

from safebasin.service import jobs
from safebasin.service.errors import ApiError
from safebasin.service.lists import After, Limit, listed, newest
from safebasin.service.schema import CreateJob, job_object
from safebasin.service.state import Retry, State, TenantId, TheState
from safebasin.service.store import Job, NotOwned

router = APIRouter()


@router.post("/v1/fine_tuning/jobs")
def create_job(
    body: CreateJob,
    tenant: TenantId,
    state: TheState,
    retry: Retry = 0,
    idempotency_key: Annotated[str | None, Header(max_length=255, pattern=r"^[!-~]+$")] = None,
) -> dict[str, Any]:
    job = jobs.create(state.store, state.storage, state.settings, tenant, body, retry, idempotency_key)
    state.supervisor.wake()
    return job_object(job)


@router.get("/v1/fine_tuning/jobs")
def list_jobs(
    request: Request, tenant: TenantId, state: TheState, after: After = None, limit: Limit = 20
) -> dict[str, Any]:
    conditions = []
    for key, value in request.query_params.multi_items():
        if key.startswith("metadata"):
            match = re.fullmatch(r"metadata\[([\w. -]{1,64})\]", key)
            if match is None or not value.isprintable():  # a filter that is not applied would list every job
                text = "A filter is metadata[KEY]=VALUE: a key of letters, digits, '_', '.', '-' and spaces, printable."
                raise ApiError(text, param="metadata")
            conditions.append(col(Job.settings)["metadata"][match[1]].as_string() == value)
    with state.store.session() as session:
        return listed(newest(session, Job, tenant, after, limit, *conditions), limit, job_object)


@router.get("/v1/fine_tuning/jobs/{name}")
def retrieve_job(name: str, tenant: TenantId, state: TheState) -> dict[str, Any]:
    return job_object(state.own(Job, name, tenant))


def _change(state: State, verb: str, name: str, tenant: str, retry: int) -> dict[str, Any]:
    job = jobs.change(state.store, verb, name, tenant, retry)
    state.supervisor.wake()
    return job_object(job)


@router.post("/v1/fine_tuning/jobs/{name}/cancel")
def cancel_job(name: str, tenant: TenantId, state: TheState, retry: Retry = 0) -> dict[str, Any]:
    return _change(state, "cancel", name, tenant, retry)


@router.post("/v1/fine_tuning/jobs/{name}/pause")
def pause_job(name: str, tenant: TenantId, state: TheState, retry: Retry = 0) -> dict[str, Any]:
    return _change(state, "pause", name, tenant, retry)


@router.post("/v1/fine_tuning/jobs/{name}/resume")
def resume_job(name: str, tenant: TenantId, state: TheState, retry: Retry = 0) -> dict[str, Any]:
    return _change(state, "resume", name, tenant, retry)


@router.get("/v1/fine_tuning/jobs/{name}/checkpoints")
def list_checkpoints(
    name: str, tenant: TenantId, state: TheState, after: After = None, limit: Limit = 10
) -> dict[str, Any]:
    job = state.own(Job, name, tenant)
    base = state.settings.policy.models.get(job.model)
    arm = job.settings.get("arm") or ((base.model or base.uploaded) if base else "")
    folders = state.settings.job_folder(job.id).glob(f"run/arms/{arm}/checkpoints/*/checkpoint-*") if arm else ()
    steps = {int(path.name.rpartition("-")[2]): path.stat().st_mtime for path in folders if path.name[-1].isdigit()}
    short = job.id.removeprefix("ftjob-")
    rows = [_checkpoint(job.id, short, step, steps[step]) for step in sorted(steps, reverse=True)]
    if after:
        ids = [row["id"] for row in rows]
        if after not in ids:
            raise NotOwned("checkpoint", after)
        rows = rows[ids.index(after) + 1 :]
    return listed(rows, limit, lambda row: row)


def _checkpoint(job: str, short: str, step: int, created: float) -> dict[str, Any]:
    return {
        "id": f"ftckpt-{short}-{step}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(created),
        "fine_tuning_job_id": job,
        "fine_tuned_model_checkpoint": f"{short}:step-{step}",
        "metrics": {"step": step},
        "step_number": step,
    }
