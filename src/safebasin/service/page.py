"""The operator's pages: jobs, the decision on a job in review, customers and their keys, the policy, the audit trail.

Whatever came with a request or with rows is text: Jinja escapes it, and hidden characters show. Every form carries the
token of its session, and everything that an operator does is a line of the audit trail.

More than 250 lines, since every route is a function inside ``add_pages``: FastAPI takes them with what they share.
"""

import dataclasses
import json
import secrets
import time
from pathlib import Path
from typing import Annotated, Any

import jinja2
from fastapi import Depends, FastAPI, Form, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse
from sqlalchemy import func
from sqlmodel import Session, col, select
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from safebasin.console import printable
from safebasin.errors import UserError
from safebasin.service import jobs
from safebasin.service.deliver import deliver
from safebasin.service.ending import add_result_file
from safebasin.service.errors import ApiError
from safebasin.service.files import Storage
from safebasin.service.policy import Settings
from safebasin.service.store import (
    OVER,
    Action,
    Event,
    Job,
    Key,
    Login,
    NotOwned,
    Store,
    Tenant,
    add_event,
    digest,
    key_of,
    move,
    new_key,
    new_tenant,
)
from safebasin.service.supervisor import Supervisor
from safebasin.service.verdict import cut_rows

HOURS = 12  # of a session
SHOWN = 100  # jobs of a page, rows of a job, lines of the trail
REPORT_CSP = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"
Text = Annotated[str, Form(max_length=2000)]
Short = Annotated[str, Form(min_length=1, max_length=80, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]


@dataclasses.dataclass(frozen=True)
class Operator:
    """Who is at the browser."""

    name: str
    csrf: str


def add_pages(app: FastAPI, store: Store, storage: Storage, settings: Settings, supervisor: Supervisor) -> None:
    """Add the routes under /operator."""
    here, policy = Path(__file__).parent, settings.policy
    app.mount("/operator/static", StaticFiles(directory=here / "static"))
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here / "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    templates.filters["plain"] = lambda value: printable(str(value), 4000)
    templates.filters["when"] = lambda t: time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(t)) if t else ""

    def show(template: str, operator: Operator | None, status: int = 200, **facts: Any) -> HTMLResponse:
        text = templates.get_template(f"{template}.html.jinja").render(operator=operator, **facts)
        return HTMLResponse(text, status)

    def back(path: str) -> RedirectResponse:
        return RedirectResponse(path, 303)

    def signed_in(request: Request) -> Operator:
        with store.session() as session:
            login = session.get(Login, digest(request.cookies.get("operator", "")))
            key = session.get(Key, login.key) if login and login.expires > time.time() else None
        if login is None or key is None or key.revoked is not None:
            raise HTTPException(
                401 if "hx-request" in request.headers else 303,  # a part of a page cannot follow a redirect
                "Sign in first.",
                {"location": "/operator/login", "hx-redirect": "/operator/login"},
            )
        return Operator(key.name, login.csrf)

    def checked(operator: Annotated[Operator, Depends(signed_in)], csrf: Text) -> Operator:
        """The operator, where the form is one of the operator's own session."""
        if not secrets.compare_digest(csrf.encode(), operator.csrf.encode()):
            raise ApiError("The form is not of this session; load the page again.", code="csrf", status=403)
        return operator

    SignedIn = Annotated[Operator, Depends(signed_in)]
    Checked = Annotated[Operator, Depends(checked)]

    def note(session: Session, operator: Operator, action: str, target: str, text: str = "") -> None:
        session.add(Action(time=time.time(), operator=operator.name, action=action, target=target, note=text))

    # --- sessions -----------------------------------------------------------------------------------------------------

    @app.get("/operator/login", include_in_schema=False)
    def login_page() -> HTMLResponse:
        return show("login", None, problem="")

    @app.post("/operator/login", include_in_schema=False)
    def login(request: Request, key: Text = "") -> Any:
        secret = secrets.token_urlsafe(32)
        with store.session() as session:
            key_row = key_of(session, key.strip())
            if key_row is None or key_row.tenant is not None:
                return show("login", None, 401, problem="This is no operator's key.")
            expires = time.time() + 3600 * HOURS
            session.add(Login(digest=digest(secret), key=key_row.id, csrf=secrets.token_urlsafe(16), expires=expires))
            note(session, Operator(key_row.name, ""), "sign in", "")
        answer = back("/operator")
        answer.set_cookie(
            "operator",
            secret,
            max_age=3600 * HOURS,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return answer

    @app.post("/operator/logout", include_in_schema=False)
    def logout(request: Request, _: Checked) -> Any:
        with store.session() as session:
            session.delete(session.get_one(Login, digest(request.cookies["operator"])))
        return back("/operator/login")

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def job_list(phase: str, page: int) -> dict[str, Any]:
        query = select(Job, Tenant.name).join(Tenant, col(Tenant.id) == col(Job.tenant))
        if phase:
            query = query.where(Job.phase == phase)
        with store.session() as session:
            rows = session.exec(query.order_by(col(Job.created).desc()).offset(page * SHOWN).limit(SHOWN + 1)).all()
            last = select(Event.job, func.max(Event.number)).where(col(Event.job).in_([job.id for job, _ in rows]))
            newest = [tuple(row) for row in session.exec(last.group_by(Event.job)).all()]
            texts = {job: session.get_one(Event, (job, number)).message for job, number in newest}
            counts = session.exec(select(Job.phase, func.count()).group_by(Job.phase)).all()
        listed = [(job, name, texts.get(job.id, "")) for job, name in rows[:SHOWN]]
        return {
            "jobs": listed,
            "more": len(rows) > SHOWN,
            "counts": sorted(map(tuple, counts)),
            "phase": phase,
            "page": page,
        }

    Phase = Annotated[str, Query(max_length=20, pattern=r"^[a-z]*$")]
    Page = Annotated[int, Query(ge=0, le=10_000)]

    @app.get("/operator", include_in_schema=False)
    def jobs_page(operator: SignedIn, phase: Phase = "", page: Page = 0) -> HTMLResponse:
        return show("jobs", operator, **job_list(phase, page))

    @app.get("/operator/list", include_in_schema=False)
    def jobs_part(operator: SignedIn, phase: Phase = "", page: Page = 0) -> HTMLResponse:
        return show("jobs_part", operator, **job_list(phase, page))

    def any_job(session: Session, name: str) -> Job:
        """A job of any tenant: an operator sees all."""
        job = session.get(Job, name) if name.isascii() and name.isprintable() else None
        if job is None:
            raise NotOwned("fine-tuning job", name)
        return job

    def facts_of(name: str) -> dict[str, Any]:
        with store.session() as session:
            job = any_job(session, name)
            tenant = session.get_one(Tenant, job.tenant)
            query = select(Event).where(Event.job == job.id).order_by(col(Event.number).desc()).limit(SHOWN)
            events = session.exec(query).all()
        total = next((e.data for e in events if e.data and e.kind == "metrics"), None)
        return {"job": job, "tenant": tenant, "events": events, "over": job.phase in OVER, "progress": total}

    @app.get("/operator/jobs/{name}", include_in_schema=False)
    def job_page(name: str, operator: SignedIn) -> HTMLResponse:
        facts = facts_of(name)
        job, base = facts["job"], policy.models.get(facts["job"].model)
        run = settings.job_folder(job.id) / "run"
        arms = [job.settings.get("arm"), *([base.uploaded, base.without, base.model] if base else [])]
        arms = [arm for arm in dict.fromkeys(filter(None, arms)) if (run / "arms" / arm / "adapter").is_dir()]
        rows = _rows_with_text(run, job.settings.get("arm") or "", settings.job_folder(job.id) / "rows.jsonl")
        report = (run / "report.html").is_file()
        return show("job", operator, **facts, rows=rows, report=report, arms=arms)

    @app.get("/operator/jobs/{name}/live", include_in_schema=False)
    def job_part(name: str, operator: SignedIn, phase: Phase = "") -> HTMLResponse:
        facts = facts_of(name)
        part = show("job_part", operator, **facts)
        if phase not in ("", facts["job"].phase):  # the page has other forms now, or a report
            part.headers["hx-refresh"] = "true"
        return part

    @app.get("/operator/jobs/{name}/report", include_in_schema=False)
    def job_report(name: str, _: SignedIn) -> FileResponse:
        with store.session() as session:
            path = settings.job_folder(any_job(session, name).id) / "run" / "report.html"
        if not path.is_file():
            raise NotOwned("report", name)
        return FileResponse(path, media_type="text/html", headers={"content-security-policy": REPORT_CSP})

    @app.post("/operator/jobs/{name}/approve", include_in_schema=False)
    def approve(name: str, operator: Checked, arm: Short, text: Text = "") -> Any:
        with store.session() as session:
            job = any_job(session, name)
        if job.phase != "review" or job.owner != supervisor.id:
            raise ApiError(f"The job is {job.phase}, or in the folder of another server ({job.owner}).")
        base = policy.models[job.model]
        if arm not in (job.settings.get("arm"), base.uploaded, base.without, base.model):
            raise ApiError(f"No arm {arm!r} of this job can be approved.")
        try:
            served = deliver(job, arm, storage, settings)
        except (UserError, OSError) as error:
            raise ApiError(str(error), status=409) from None
        left_out = "All rows were learned." if arm == base.uploaded else "The rows that were named are left out."
        with store.session() as session:
            model = jobs.succeed(session, settings, job, served)
            values: dict[str, Any] = {"phase": "succeeded", "finished": time.time(), "fine_tuned_model": model}
            if not move(session, name, ("review",), **values):
                raise ApiError("The job was decided meanwhile.")
            shown = job.outcome or {}
            add_event(session, name, f"The operator approved the job. {left_out}", data=shown)
            if "rows" in shown and arm != base.uploaded:
                add_result_file(session, storage, job, shown)
            note(session, operator, "approve", name, f"{arm}. {text}")
        return back(f"/operator/jobs/{name}")

    @app.post("/operator/jobs/{name}/refuse", include_in_schema=False)
    def refuse(name: str, operator: Checked, text: Text = "") -> Any:
        with store.session() as session:
            job = any_job(session, name)
            shown = job.outcome or {}
            message = " ".join(filter(None, [str(shown.get("message", "")), printable(text, 1000)]))
            error = {"code": shown.get("verdict", "refused"), "message": message, "param": "training_file"}
            values: dict[str, Any] = {"phase": "failed", "finished": time.time(), "error": error}
            if not move(session, name, ("review",), **values):
                raise ApiError(f"The job is {job.phase}; it does not wait for a decision.")
            data = {**shown, "rows": shown["rows"][: policy.tell.rows]} if "rows" in shown else shown
            add_event(session, name, f"The operator refused the file. {message}", level="warn", data=data)
            if "rows" in shown:
                add_result_file(session, storage, job, shown)
            note(session, operator, "refuse", name, text)
        return back(f"/operator/jobs/{name}")

    @app.post("/operator/jobs/{name}/cancel", include_in_schema=False)
    def cancel(name: str, operator: Checked, text: Text = "") -> Any:
        with store.session() as session:
            job = any_job(session, name)
            note(session, operator, "cancel", name, text)
        jobs.change(store, "cancel", name, job.tenant, 0)
        supervisor.wake()
        return back(f"/operator/jobs/{name}")

    # --- customers, policy, trail -------------------------------------------------------------------------------------

    def tenants(operator: Operator, secret: str = "") -> HTMLResponse:
        with store.session() as session:
            keys = session.exec(select(Key).order_by(col(Key.created))).all()
            rows = [
                (t, jobs.used_hours(session, t.id)) for t in session.exec(select(Tenant).order_by(Tenant.name)).all()
            ]
        return show("tenants", operator, tenants=rows, keys=keys, secret=secret, hours=policy.limits.gpu_hours_month)

    @app.get("/operator/tenants", include_in_schema=False)
    def tenants_page(operator: SignedIn) -> HTMLResponse:
        return tenants(operator)

    @app.post("/operator/keys", include_in_schema=False)
    def create_key(operator: Checked, tenant: Short, name: Short) -> HTMLResponse:
        with store.session() as session:
            secret = new_key(session, new_tenant(session, tenant).id, name)
            note(session, operator, "new key", tenant, name)
        return tenants(operator, secret)  # shown this once

    @app.post("/operator/keys/{name}/revoke", include_in_schema=False)
    def revoke(name: str, operator: Checked) -> Any:
        with store.session() as session:
            key = session.get(Key, name) if name.isascii() and name.isprintable() else None
            if key is None:
                raise NotOwned("key", name)
            key.revoked = key.revoked or time.time()
            session.add(key)
            note(session, operator, "revoke", name, key.name)
        return back("/operator/tenants")

    @app.get("/operator/policy", include_in_schema=False)
    def policy_page(operator: SignedIn) -> HTMLResponse:
        return show("policy", operator, text=settings.text)

    @app.get("/operator/audit", include_in_schema=False)
    def audit_page(operator: SignedIn, page: Page = 0) -> HTMLResponse:
        query = select(Action).order_by(col(Action.id).desc()).offset(page * SHOWN).limit(SHOWN + 1)
        with store.session() as session:
            rows = session.exec(query).all()
        return show("audit", operator, actions=rows[:SHOWN], more=len(rows) > SHOWN, page=page)


def _rows_with_text(run: Path, arm: str, file: Path) -> list[dict[str, Any]]:
    """The worst rows that a cut named, each with what it says."""
    if not (run / "data" / "rows.json").is_file() or not arm or not file.is_file():
        return []
    rows = cut_rows(run, arm)[:SHOWN]
    wanted, texts = {row["line"] for row in rows}, {}
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if number in wanted:
                texts[number] = _text_of(line)
    return [{**row, "text": texts.get(row["line"], "")} for row in rows]


def _text_of(line: str) -> str:
    try:
        row = json.loads(line)
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in row["messages"])
    except (ValueError, LookupError, TypeError):
        return line
