"""Lists in OpenAI's form, page by page."""

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Query
from sqlalchemy import tuple_
from sqlmodel import Session, select

from safebasin.service.store import own

Limit = Annotated[int, Query(ge=1, le=1000)]
After = Annotated[str | None, Query(max_length=200)]


def newest(session: Session, kind: Any, tenant: str, after: str | None, limit: int, *conditions: Any) -> Any:
    """A page of a tenant's things, newest first, and one more where there are more."""
    query = select(kind).where(kind.tenant == tenant, *conditions)
    if after:
        last = own(session, kind, after, tenant)
        query = query.where(tuple_(kind.created, kind.id) < tuple_(last.created, last.id))
    return session.exec(query.order_by(kind.created.desc(), kind.id.desc()).limit(limit + 1)).all()


def listed(rows: Any, limit: int, form: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Rows as a list of OpenAI's form; one more than ``limit`` says that there are more."""
    data = [form(row) for row in rows[:limit]]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": len(rows) > limit, **ends}
