"""The events of a job: pages of a list, or a stream as they come."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header
from fastapi.responses import StreamingResponse
from sqlmodel import col, select
from starlette.concurrency import run_in_threadpool

from safebasin.service.errors import ApiError
from safebasin.service.lists import After, Limit, listed
from safebasin.service.schema import event_object
from safebasin.service.state import State, TenantId, TheState
from safebasin.service.store import OVER, Event, Job, NotOwned

POLL = 0.5  # seconds between two looks of a stream

router = APIRouter()


@router.get("/v1/fine_tuning/jobs/{name}/events", response_model=None)
async def list_events(
    name: str,
    tenant: TenantId,
    state: TheState,
    after: After = None,
    limit: Limit = 20,
    stream: bool = False,
    last_event_id: Annotated[str | None, Header(max_length=200)] = None,
) -> Any:
    job = await run_in_threadpool(state.own, Job, name, tenant)
    number = _number(after if not stream else last_event_id or after, job)
    if not stream:
        return await run_in_threadpool(_event_page, state, job.id, number, limit)
    if state.streams[tenant] >= (most := state.settings.policy.limits.streams):
        raise ApiError(f"{most} streams are open.", code="too_many_streams", status=429)
    return StreamingResponse(_stream(state, job.id, tenant, number or 0), media_type="text/event-stream")


def _number(event: str | None, job: Job) -> int | None:
    """The number of an event by its id."""
    if not event:
        return None
    match = re.fullmatch(rf"ftevent-{job.id.removeprefix('ftjob-')}-([0-9]{{1,9}})", event)
    if match is None:
        raise NotOwned("event", event)
    return int(match[1])


def _event_page(state: State, job: str, before: int | None, limit: int) -> dict[str, Any]:
    query = select(Event).where(Event.job == job)
    if before is not None:
        query = query.where(Event.number < before)
    with state.store.session() as session:
        rows = session.exec(query.order_by(col(Event.number).desc()).limit(limit + 1)).all()
    return listed(rows, limit, event_object)


def _later(state: State, job: str, number: int) -> tuple[bool, list[Event]]:
    """Whether the job was over, and then its events after a number."""
    with state.store.session() as session:
        over = session.exec(select(Job.phase).where(Job.id == job)).one() in OVER
        query = select(Event).where(Event.job == job, Event.number > number).order_by(col(Event.number)).limit(500)
        return over, list(session.exec(query).all())


async def _stream(state: State, job: str, tenant: str, number: int) -> AsyncIterator[str]:
    """Events as they come, oldest first, and [DONE] when the job is over."""
    state.streams[tenant] += 1
    try:
        quiet = 0.0
        while True:
            over, events = await run_in_threadpool(_later, state, job, number)
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
        state.streams[tenant] -= 1
