"""Two tenants on every route, on SQLite and PostgreSQL: what is another's is as if it had never been."""

import inspect
import re

import pytest
from fastapi.routing import APIRoute
from service_server import ON_BOTH

from safebasin.service.app import create_app
from safebasin.service.policy import read_policy
from safebasin.service.routes import events, files, jobs, models

pytestmark = ON_BOTH

ROUTES = [
    "GET /v1/files",
    "POST /v1/files",
    "GET /v1/files/FILE",
    "GET /v1/files/FILE/content",
    "DELETE /v1/files/FILE",
    "GET /v1/fine_tuning/jobs",
    "POST /v1/fine_tuning/jobs",
    "GET /v1/fine_tuning/jobs/JOB",
    "GET /v1/fine_tuning/jobs/JOB/events",
    "GET /v1/fine_tuning/jobs/JOB/checkpoints",
    "POST /v1/fine_tuning/jobs/JOB/cancel",
    "POST /v1/fine_tuning/jobs/JOB/pause",
    "POST /v1/fine_tuning/jobs/JOB/resume",
    "GET /v1/models",
    "GET /v1/models/MODEL",
    "DELETE /v1/models/MODEL",
    "POST /v1/chat/completions",
]


@pytest.fixture(scope="module")
def acme(served):
    """A job of acme's, and its things, which the other tenant tries to reach."""
    job = served.ended(served.job("safe").id)
    return {"FILE": job.training_file, "JOB": job.id, "MODEL": job.fine_tuned_model}


def ask(served, route, things, key):
    method, path = route.split()
    for name, value in things.items():
        path = path.replace(name, value)
    bodies = {
        "/v1/files": {"files": {"file": ("a", b"{}")}, "data": {"purpose": "fine-tune"}},
        "/v1/fine_tuning/jobs": {"json": {"model": "small", "training_file": things["FILE"]}},
        "/v1/chat/completions": {"json": {"model": things["MODEL"], "messages": [{"role": "user", "content": "x"}]}},
    }
    headers = {"authorization": f"Bearer {key}"} if key else {}
    more = bodies.get(path, {}) if method == "POST" else {}
    return served.http.request(method, path, headers=headers, **more)


@pytest.mark.parametrize("route", ROUTES)
def test_a_foreign_thing_is_as_one_that_never_was(served, acme, route):
    foreign = ask(served, route, acme, served.keys["other"])
    if any(name in route for name in acme) or route.startswith("POST /v1/fine") or "chat" in route:
        never = {"FILE": "file-" + "0" * 24, "JOB": "ftjob-" + "0" * 24, "MODEL": "ft:small:x:" + "0" * 24}
        same = ask(served, route, never, served.keys["other"])
        assert foreign.status_code == same.status_code == 404
        swap = {acme[name]: never[name] for name in acme}
        text = re.sub("|".join(map(re.escape, swap)), lambda match: swap[match[0]], foreign.text)
        assert text == same.text.replace(never["MODEL"], swap[acme["MODEL"]])
    else:
        assert foreign.status_code == 200 and not any(value in foreign.text for value in acme.values())


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("key", ["", "sb-wrong", "operator", "revoked"])
def test_no_key_no_answer(served, acme, route, key):
    if key == "operator":
        key = served.operator_key
    if key == "revoked":
        key = revoked(served)
    answer = ask(served, route, acme, key)
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"


def revoked(served):
    from safebasin.service.store import Key, Store, digest, new_key, new_tenant, select

    store = Store(served.settings.database)
    with store.session() as session:
        secret = new_key(session, new_tenant(session, "acme").id, "old")
        session.flush()
        key = session.exec(select(Key).where(Key.digest == digest(secret))).one()
        key.revoked = 1.0
        session.add(key)
        text = repr(session.exec(select(Key)).all())
    store.close()
    assert secret not in text, "a key stands in the table"
    return secret


def test_acme_still_has_everything(served, acme):
    client = served.client()
    assert client.files.retrieve(acme["FILE"]) and client.fine_tuning.jobs.retrieve(acme["JOB"])
    assert client.models.retrieve(acme["MODEL"])


def test_every_route_asks_for_its_tenant(tmp_path, served):
    """A route of the API that nobody added to ROUTES, or that has no tenant, fails here."""
    policy = tmp_path / "policy.yaml"
    policy.write_text(served.policy.read_text())
    (tmp_path / "recipe.yaml").write_text((served.folder / "recipe.yaml").read_text())
    app = create_app(read_policy(policy))
    described = app.openapi()["paths"]
    routes = [route for module in (files, jobs, events, models) for route in module.router.routes]
    routes += [route for route in app.routes if isinstance(route, APIRoute) and route.path.startswith("/v1")]
    listed = {re.sub(r"FILE|JOB|MODEL", "{name}", route) for route in ROUTES}
    assert {f"{method} {route.path}" for route in routes for method in route.methods} == listed
    assert {f"{method.upper()} {path}" for path in described for method in described[path]} == listed
    for route in routes:
        assert "tenant" in inspect.signature(route.endpoint).parameters, route.path
