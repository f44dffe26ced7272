"""The routes of the API: shape, and nothing else. Errors have OpenAI's form, whatever goes wrong."""

import asyncio
import collections
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import func, tuple_
from sqlmodel import Session, col, select
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect

from safebasin.service import jobs, page
from safebasin.service.files import Refused, Storage
from safebasin.service.jobs import ApiError
from safebasin.service.policy import Settings
from safebasin.service.proxy import ChatBody, Proxy
from safebasin.service.schema import (
    CreateJob,
    error_object,
    event_object,
    file_object,
    job_object,
    model_object,
    model_row,
)
from safebasin.service.store import LIVE, OVER, Event, File, Job, Model, NotOwned, Store, count, key_of, new_id, own
from safebasin.service.supervisor import Supervisor

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
_log = logging.getLogger("safebasin.service")
JSON_BYTES = 16 << 20  # of a request that is no upload
POLL = 0.5  # seconds between two looks of a stream


class Guard:
    """Around all routes: a body has a limit, which is counted as it comes, and every answer the headers of a browser's
    safety."""

    def __init__(self, app: Any, upload: float):
        self.app, self.upload = app, upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        most = self.upload + (1 << 20) if scope["path"] == "/v1/files" else JSON_BYTES
        too_large = Refused(f"The request is larger than {most / 1e6:.0f} MB.", 413)
        size = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        seen = 0

        async def counted() -> Scope:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise too_large
            return message

        async def headed(message: Scope) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message["headers"]}
                message["headers"] += [(name, value) for name, value in _HEADERS if name not in names]
            await send(message)

        if size.isdigit() and int(size) > most:
            await _refused(None, too_large)(scope, receive, headed)
        else:
            await self.app(scope, counted, headed)


_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'; form-action 'self'; base-uri 'none'"),
)


def _answer(message: str, code: str, param: str | None, status: int) -> JSONResponse:
    # The client repeats a 429 by itself; a quota does not change in a second.
    headers = {"x-should-retry": "false"} if status in (413, 429) else {}
    return JSONResponse(error_object(message, code, param, status), status, headers)


def _api_error(_: Any, error: Any) -> JSONResponse:
    return _answer(error.message, error.code, error.param, error.status)


def _not_owned(_: Any, error: Any) -> JSONResponse:
    return _answer(str(error), "not_found", None, 404)


def _refused(_: Any, error: Any) -> JSONResponse:
    return _answer(str(error), "invalid_file", "file", error.status)


def _invalid(_: Any, error: Any) -> JSONResponse:
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"] if part != "body")[:200]
    return _answer(f"{param}: {first['msg']}" if param else first["msg"], "invalid_request", param or None, 400)


def _http(_: Any, error: Any) -> JSONResponse:
    answer = _answer(str(error.detail), "not_found" if error.status_code == 404 else "invalid", None, error.status_code)
    answer.headers.update(error.headers or {})
    return answer


def _broke(_: Any, error: Any) -> JSONResponse:
    return _answer("The server failed; the operator's log has the reason.", "server_error", None, 500)


def _gone(_: Any, error: Any) -> JSONResponse:
    return _answer("The client closed the connection.", "client_closed", None, 400)


_HANDLERS: dict[Any, Any] = {
    ApiError: _api_error,
    NotOwned: _not_owned,
    Refused: _refused,
    RequestValidationError: _invalid,
    HTTPException: _http,
    ClientDisconnect: _gone,
    Exception: _broke,
}


def create_app(settings: Settings) -> FastAPI:
    """The server of a policy.

    Raises:
        UserError: the database or the storage cannot be opened, or another server works in the folder.
    """
    store, storage = Store(settings.database), Storage(settings.storage)
    supervisor = Supervisor(store, storage, settings)
    policy, proxy = settings.policy, Proxy(settings)
    limits = policy.limits
    streams: collections.Counter[str] = collections.Counter()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(supervisor.start)
        yield
        await run_in_threadpool(supervisor.stop)
        await proxy.close()
        store.close()

    app = FastAPI(
        title="safebasin",
        lifespan=lifespan,
        middleware=[Middleware(Guard, upload=1e6 * limits.file_megabytes)],
        exception_handlers=_HANDLERS,
        docs_url=None,
        redoc_url=None,
    )

    def tenant_of(authorization: Annotated[str, Header()] = "") -> str:
        """The tenant whose key a request brings. Every route of the API depends on this (tests go through them)."""
        kind, _, secret = authorization.partition(" ")
        with store.session() as session:
            key = key_of(session, secret) if kind.lower() == "bearer" and secret.isascii() else None
        if key is None or key.tenant is None:
            raise ApiError("Incorrect API key provided.", code="invalid_api_key", status=401)
        return key.tenant

    TenantId = Annotated[str, Depends(tenant_of)]
    Limit = Annotated[int, Query(ge=1, le=1000)]
    After = Annotated[str | None, Query(max_length=200)]
    Retry = Annotated[int, Header(alias="x-stainless-retry-count", ge=0, le=100)]

    def newest(session: Session, kind: Any, tenant: str, after: str | None, limit: int, *conditions: Any) -> Any:
        """A page of a tenant's things, newest first, as a list of OpenAI's form."""
        query = select(kind).where(kind.tenant == tenant, *conditions)
        if after:
            last = own(session, kind, after, tenant)
            query = query.where(tuple_(kind.created, kind.id) < tuple_(last.created, last.id))
        return session.exec(query.order_by(kind.created.desc(), kind.id.desc()).limit(limit + 1)).all()

    def listed(rows: Any, limit: int, form: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        data = [form(row) for row in rows[:limit]]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        return {"object": "list", "data": data, "has_more": len(rows) > limit, **ends}

    def shown(file: File) -> dict[str, Any]:
        return file_object(file, limits.files_days)

    # --- files
    # ----------------------------------------------------------------------------------------------------------------

    @app.post("/v1/files", openapi_extra=_UPLOAD)
    async def upload(request: Request, tenant: TenantId, retry: Retry = 0) -> dict[str, Any]:
        async with request.form(max_files=1, max_fields=8) as form:
            part, purpose = form.get("file"), form.get("purpose")
            if not isinstance(part, UploadFile):
                raise ApiError("A file is needed.", param="file")
            if purpose != "fine-tune":
                raise ApiError("The purpose must be fine-tune.", param="purpose")
            name = _name(part.filename or "")
            return shown(await run_in_threadpool(_store_file, part.file, name, tenant, retry))

    def _store_file(stream: Any, name: str, tenant: str, retry: int) -> File:
        with store.session() as session:
            used = session.exec(select(func.coalesce(func.sum(File.size), 0)).where(File.tenant == tenant)).one()
        left = 1e6 * limits.files_megabytes - float(used)
        if left <= 0:
            raise ApiError("The files of this account fill its quota; delete some.", code="quota", status=429)
        file = File(id=new_id("file"), tenant=tenant, name=name, purpose="fine-tune", size=0, digest="", created=0)
        path = storage.path(tenant, file.id)
        file.size, file.digest = storage.put(path, stream, min(1e6 * limits.file_megabytes, left))
        if not file.size:
            storage.remove(path)
            raise ApiError("The file is empty.", param="file")
        file.created, file.retry = time.time(), retry
        with store.session() as session:
            same = select(File).where(
                File.tenant == tenant, File.digest == file.digest, File.name == name, File.size == file.size
            )
            recent = same.where(File.created > time.time() - 60 * jobs.MINUTES)
            if retry and (first := session.exec(recent).first()):  # the answer to an earlier try was lost
                storage.remove(path)
                return first
            session.add(file)
        return file

    @app.get("/v1/files")
    def list_files(
        tenant: TenantId,
        after: After = None,
        limit: Limit = 100,
        purpose: Annotated[str | None, Query(max_length=40, pattern=r"^[a-z-]*$")] = None,
    ) -> dict[str, Any]:
        with store.session() as session:
            conditions = [File.purpose == purpose] if purpose else []
            return listed(newest(session, File, tenant, after, limit, *conditions), limit, shown)

    @app.get("/v1/files/{name}")
    def retrieve_file(name: str, tenant: TenantId) -> dict[str, Any]:
        with store.session() as session:
            return shown(own(session, File, name, tenant))

    @app.get("/v1/files/{name}/content", response_class=StreamingResponse)
    def file_content(name: str, tenant: TenantId) -> StreamingResponse:
        with store.session() as session:
            file = own(session, File, name, tenant)
        path = storage.path(tenant, file.id)
        if not storage.fs.exists(path):
            raise NotOwned("File object", name)
        headers = {"content-length": str(file.size), "content-disposition": "attachment"}
        return StreamingResponse(storage.blocks(path), media_type="application/octet-stream", headers=headers)

    @app.delete("/v1/files/{name}")
    def delete_file(name: str, tenant: TenantId, retry: Retry = 0) -> dict[str, Any]:
        with store.session() as session:
            file = own(session, File, name, tenant)
            uses = (col(Job.training_file) == name) | (col(Job.validation_file) == name)
            if count(session, Job.tenant == tenant, uses, col(Job.phase).in_(LIVE)):
                raise ApiError("A job that is not over uses the file; cancel it first.", code="file_in_use")
            session.delete(file)
        storage.remove(storage.path(tenant, file.id))
        return {"id": name, "object": "file", "deleted": True}

    # --- jobs
    # ----------------------------------------------------------------------------------------------------------------

    @app.post("/v1/fine_tuning/jobs")
    def create_job(
        body: CreateJob,
        tenant: TenantId,
        retry: Retry = 0,
        idempotency_key: Annotated[str | None, Header(max_length=255, pattern=r"^[!-~]+$")] = None,
    ) -> dict[str, Any]:
        job = jobs.create(store, storage, settings, tenant, body, retry, idempotency_key)
        supervisor.wake()
        return job_object(job)

    @app.get("/v1/fine_tuning/jobs")
    def list_jobs(request: Request, tenant: TenantId, after: After = None, limit: Limit = 20) -> dict[str, Any]:
        conditions = []
        for key, value in request.query_params.multi_items():
            if match := re.fullmatch(r"metadata\[([\w. -]{1,64})\]", key):
                if not value.isprintable():
                    raise ApiError("Metadata has no control characters.", param="metadata")
                conditions.append(col(Job.settings)["metadata"][match[1]].as_string() == value)
        with store.session() as session:
            return listed(newest(session, Job, tenant, after, limit, *conditions), limit, job_object)

    @app.get("/v1/fine_tuning/jobs/{name}")
    def retrieve_job(name: str, tenant: TenantId) -> dict[str, Any]:
        with store.session() as session:
            return job_object(own(session, Job, name, tenant))

    def change(verb: str, name: str, tenant: str, retry: int) -> dict[str, Any]:
        job = jobs.change(store, verb, name, tenant, retry)
        supervisor.wake()
        return job_object(job)

    @app.post("/v1/fine_tuning/jobs/{name}/cancel")
    def cancel_job(name: str, tenant: TenantId, retry: Retry = 0) -> dict[str, Any]:
        return change("cancel", name, tenant, retry)

    @app.post("/v1/fine_tuning/jobs/{name}/pause")
    def pause_job(name: str, tenant: TenantId, retry: Retry = 0) -> dict[str, Any]:
        return change("pause", name, tenant, retry)

    @app.post("/v1/fine_tuning/jobs/{name}/resume")
    def resume_job(name: str, tenant: TenantId, retry: Retry = 0) -> dict[str, Any]:
        return change("resume", name, tenant, retry)

    @app.get("/v1/fine_tuning/jobs/{name}/events", response_model=None)
    async def list_events(
        name: str,
        tenant: TenantId,
        after: After = None,
        limit: Limit = 20,
        stream: bool = False,
        last_event_id: Annotated[str | None, Header(max_length=200)] = None,
    ) -> Any:
        job = await run_in_threadpool(_own_job, name, tenant)
        number = _number(after if not stream else last_event_id or after, job)
        if not stream:
            return await run_in_threadpool(_event_page, job.id, number, limit)
        if streams[tenant] >= limits.streams:
            raise ApiError(f"{limits.streams} streams are open.", code="too_many_streams", status=429)
        return StreamingResponse(_stream(job.id, tenant, number or 0), media_type="text/event-stream")

    def _own_job(name: str, tenant: str) -> Job:
        with store.session() as session:
            return own(session, Job, name, tenant)

    def _number(event: str | None, job: Job) -> int | None:
        """The number of an event by its id."""
        if not event:
            return None
        match = re.fullmatch(rf"ftevent-{job.id.removeprefix('ftjob-')}-([0-9]{{1,9}})", event)
        if match is None:
            raise NotOwned("event", event)
        return int(match[1])

    def _event_page(job: str, before: int | None, limit: int) -> dict[str, Any]:
        query = select(Event).where(Event.job == job)
        if before is not None:
            query = query.where(Event.number < before)
        with store.session() as session:
            rows = session.exec(query.order_by(col(Event.number).desc()).limit(limit + 1)).all()
        return listed(rows, limit, event_object)

    def _later(job: str, number: int) -> tuple[bool, list[Event]]:
        """Whether the job was over, and then its events after a number."""
        with store.session() as session:
            over = session.exec(select(Job.phase).where(Job.id == job)).one() in OVER
            query = select(Event).where(Event.job == job, Event.number > number).order_by(col(Event.number)).limit(500)
            return over, list(session.exec(query).all())

    async def _stream(job: str, tenant: str, number: int) -> AsyncIterator[str]:
        """Events as they come, oldest first, and [DONE] when the job is over."""
        streams[tenant] += 1
        try:
            quiet = 0.0
            while True:
                over, events = await run_in_threadpool(_later, job, number)
                for event in events:
                    number, form = event.number, event_object(event)
                    yield f"id: {form['id']}\ndata: {json.dumps(form)}\n\n"
                if over and not events:
                    break
                quiet = 0.0 if events else quiet + POLL
                if quiet >= 15:  # so that a proxy on the way keeps the connection
                    yield ": still here\n\n"
                    quiet = 0.0
                await asyncio.sleep(0 if events else POLL)
            yield "data: [DONE]\n\n"
        finally:
            streams[tenant] -= 1

    @app.get("/v1/fine_tuning/jobs/{name}/checkpoints")
    def list_checkpoints(name: str, tenant: TenantId, after: After = None, limit: Limit = 10) -> dict[str, Any]:
        job = _own_job(name, tenant)
        base = settings.policy.models.get(job.model)
        arm = job.settings.get("arm") or ((base.model or base.uploaded) if base else "")
        folders = settings.job_folder(job.id).glob(f"run/arms/{arm}/checkpoints/*/checkpoint-*") if arm else ()
        steps = {int(path.name.rpartition("-")[2]): path.stat().st_mtime for path in folders if path.name[-1].isdigit()}
        short = job.id.removeprefix("ftjob-")
        rows = [_checkpoint(job.id, short, step, steps[step]) for step in sorted(steps, reverse=True)]
        if after:
            ids = [row["id"] for row in rows]
            if after not in ids:
                raise NotOwned("checkpoint", after)
            rows = rows[ids.index(after) + 1 :]
        return listed(rows, limit, lambda row: row)

    # --- models
    # ----------------------------------------------------------------------------------------------------------------

    def bases() -> list[dict[str, Any]]:
        return [model_object(name, 0.0, "provider") for name in policy.models]

    @app.get("/v1/models")
    def list_models(tenant: TenantId) -> dict[str, Any]:
        with store.session() as session:
            rows = session.exec(select(Model).where(Model.tenant == tenant).order_by(col(Model.created))).all()
        return {"object": "list", "data": [*bases(), *map(model_row, rows)]}

    @app.get("/v1/models/{name}")
    def retrieve_model(name: str, tenant: TenantId) -> dict[str, Any]:
        if name in policy.models:
            return model_object(name, 0.0, "provider")
        with store.session() as session:
            return model_row(own(session, Model, name, tenant))

    @app.delete("/v1/models/{name}")
    def delete_model(name: str, tenant: TenantId) -> dict[str, Any]:
        if name in policy.models:
            raise ApiError("This model is the provider's; it cannot be deleted.", code="forbidden", status=403)
        with store.session() as session:
            model = own(session, Model, name, tenant)
            session.delete(model)
        short = model.job.removeprefix("ftjob-")
        storage.remove(storage.path(tenant, f"models/{short}"))
        proxy.remove(short)
        return {"id": name, "object": "model", "deleted": True}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatBody, tenant: TenantId) -> Any:
        return await proxy.answer(body, await run_in_threadpool(_served, body.model, tenant))

    def _served(name: str, tenant: str) -> str:
        if base := policy.models.get(name):
            return base.served or name
        with store.session() as session:
            return own(session, Model, name, tenant).served

    page.add_pages(app, store, storage, settings, supervisor)
    return app


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


def _name(name: str) -> str:
    """A file's name as it is kept: text without control characters, never a path."""
    text = name.encode("utf-8", "replace").decode("utf-8", "replace")
    last = re.split(r"[/\\]", text)[-1]
    return "".join(c if c.isprintable() else "_" for c in last)[:255] or "file"


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
