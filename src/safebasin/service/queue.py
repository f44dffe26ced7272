"""Whose turn it is: the queue of jobs, which is in the table and is shared by all servers."""

import time
from collections.abc import Collection

from sqlalchemy import case, func, or_, update
from sqlmodel import Session, col, select

from safebasin.service.store import SILENT, Job, Server, Store, add_event, move


def take_over(store: Store) -> None:
    """Queue the jobs that run on servers that gave no sign of life for a minute."""
    with store.session() as session:
        silent = select(Server.id).where(Server.seen < time.time() - SILENT)
        lost = select(Job.id, Job.owner).where(Job.phase == "running", col(Job.owner).in_(silent))
        for name, owner in session.exec(lost).all():
            if move(session, name, ("running",), owner, phase="queued"):
                add_event(session, name, "The machine of the job was lost; it is queued again.", level="warn")


def claim_next(store: Store, owner: str, busy: Collection[str], most: int) -> Job | None:
    """Claim the job whose turn it is: of the tenant with the fewest running jobs, and of those the one that has waited
    longest since its last start, the oldest.

    Args:
        store: of all servers.
        owner: the server that claims it.
        busy: its jobs whose children still live.
        most: running jobs of a tenant.
    """
    while True:
        with store.session() as session:
            job = _next(session, owner, busy, most)
            if job is None:
                return None
            values = {"phase": "running", "owner": owner, "starts": job.starts + 1, "started": time.time()}
            if job.owner != owner:  # it was another server's: what that had read is not in this folder
                values["position"] = 0
            free = update(Job).where(
                col(Job.id) == job.id, col(Job.phase) == "queued", col(Job.owner).is_not_distinct_from(job.owner)
            )
            claimed = session.execute(free.values(**values).execution_options(synchronize_session=False))
            if claimed.rowcount == 1:  # type: ignore[attr-defined]
                add_event(session, job.id, "The job has started." if job.starts == 0 else "The job goes on.")
                return job


def _next(session: Session, owner: str, busy: Collection[str], most: int) -> Job | None:
    silent = select(Server.id).where(Server.seen < time.time() - SILENT)
    running = func.sum(case((col(Job.phase) == "running", 1), else_=0)).label("running")
    last = func.coalesce(func.max(Job.started), 0.0).label("last")
    tenants = select(Job.tenant, running, last).group_by(col(Job.tenant)).subquery()
    waiting = (
        select(Job)
        .join(tenants, tenants.c.tenant == col(Job.tenant))
        .where(
            Job.phase == "queued",
            tenants.c.running < most,
            or_(col(Job.owner).is_(None), col(Job.owner) == owner, col(Job.owner).in_(silent)),
            col(Job.id).not_in(busy),
        )
        .order_by(tenants.c.running, tenants.c.last, col(Job.created))
    )
    return session.exec(waiting).first()
