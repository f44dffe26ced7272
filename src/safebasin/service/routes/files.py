"""Files: upload, list, retrieve, download, delete."""

import re
import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from sqlalchemy import func
from sqlmodel import col, select
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from safebasin.service import jobs
from safebasin.service.errors import ApiError
from safebasin.service.lists import After, Limit, listed, newest
from safebasin.service.schema import file_object
from safebasin.service.state import Retry, State, TenantId, TheState
from safebasin.service.store import LIVE, File, Job, NotOwned, count, new_id, own

_FIELDS = {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "enum": ["fine-tune"]}}
_UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "required": ["file", "purpose"], "properties": _FIELDS}
            }
        },
    }
}

router = APIRouter()


@router.post("/v1/files", openapi_extra=_UPLOAD)
async def upload(request: Request, tenant: TenantId, state: TheState, retry: Retry = 0) -> dict[str, Any]:
    async with request.form(max_files=1, max_fields=8) as form:
        part, purpose = form.get("file"), form.get("purpose")
        if not isinstance(part, UploadFile):
            raise ApiError("A file is needed.", param="file")
        if purpose != "fine-tune":
            raise ApiError("The purpose must be fine-tune.", param="purpose")
        name = _name(part.filename or "")
        return _shown(state, await run_in_threadpool(_store_file, state, part.file, name, tenant, retry))


def _store_file(state: State, stream: Any, name: str, tenant: str, retry: int) -> File:
    limits = state.settings.policy.limits
    with state.store.session() as session:
        used = session.exec(select(func.coalesce(func.sum(File.size), 0)).where(File.tenant == tenant)).one()
    left = 1e6 * limits.files_megabytes - float(used)
    if left <= 0:
        raise ApiError("The files of this account fill its quota; delete some.", code="quota", status=429)
    file = File(id=new_id("file"), tenant=tenant, name=name, purpose="fine-tune", size=0, digest="", created=0)
    path = state.storage.path(tenant, file.id)
    file.size, file.digest = state.storage.put(path, stream, min(1e6 * limits.file_megabytes, left))
    if not file.size:
        state.storage.remove(path)
        raise ApiError("The file is empty.", param="file")
    file.created, file.retry = time.time(), retry
    with state.store.session() as session:
        same = select(File).where(
            File.tenant == tenant, File.digest == file.digest, File.name == name, File.size == file.size
        )
        recent = same.where(File.created > time.time() - 60 * jobs.MINUTES)
        if retry and (first := session.exec(recent).first()):  # the answer to an earlier try was lost
            state.storage.remove(path)
            return first
        session.add(file)
    return file


@router.get("/v1/files")
def list_files(
    tenant: TenantId,
    state: TheState,
    after: After = None,
    limit: Limit = 100,
    purpose: Annotated[str | None, Query(max_length=40, pattern=r"^[a-z-]*$")] = None,
) -> dict[str, Any]:
    with state.store.session() as session:
        conditions = [File.purpose == purpose] if purpose else []
        return listed(newest(session, File, tenant, after, limit, *conditions), limit, lambda file: _shown(state, file))


@router.get("/v1/files/{name}")
def retrieve_file(name: str, tenant: TenantId, state: TheState) -> dict[str, Any]:
    return _shown(state, state.own(File, name, tenant))


@router.get("/v1/files/{name}/content", response_class=StreamingResponse)
def file_content(name: str, tenant: TenantId, state: TheState) -> StreamingResponse:
    file = state.own(File, name, tenant)
    path = state.storage.path(tenant, file.id)
    if not state.storage.fs.exists(path):
        raise NotOwned("File object", name)
    headers = {"content-length": str(file.size), "content-disposition": "attachment"}
    return StreamingResponse(state.storage.blocks(path), media_type="application/octet-stream", headers=headers)


@router.delete("/v1/files/{name}")
def delete_file(name: str, tenant: TenantId, state: TheState, retry: Retry = 0) -> dict[str, Any]:
    with state.store.session() as session:
        file = own(session, File, name, tenant)
        uses = (col(Job.training_file) == name) | (col(Job.validation_file) == name)
        if count(session, Job.tenant == tenant, uses, col(Job.phase).in_(LIVE)):
            raise ApiError("A job that is not over uses the file; cancel it first.", code="file_in_use")
        session.delete(file)
    state.storage.remove(state.storage.path(tenant, file.id))
    return {"id": name, "object": "file", "deleted": True}


def _shown(state: State, file: File) -> dict[str, Any]:
    return file_object(file, state.settings.policy.limits.files_days)


def _name(name: str) -> str:
    """A file's name as it is kept: text without control characters, never a path."""
    text = name.encode("utf-8", "replace").decode("utf-8", "replace")
    last = re.split(r"[/\\]", text)[-1]
    return "".join(c if c.isprintable() else "_" for c in last)[:255] or "file"
