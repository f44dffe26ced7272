"""The operator's pages: who gets in, what a form needs, what is decided, and that nothing hostile lives in them."""

import contextlib
import json
import re

import httpx2
import openai
import pytest
from service_server import CLIENTS, chat

SCRIPT = "<script>alert(1)</script>\u202e"
PAGES = ("/operator", "/operator/list", "/operator/tenants", "/operator/policy", "/operator/audit")


@pytest.fixture(scope="module")
def reviewed(tmp_path_factory, templates):
    from service_server import Served, in_thread

    with in_thread(Served(tmp_path_factory.mktemp("reviewed"), templates, decide="review")) as server:
        yield server


@contextlib.contextmanager
def browser(served, key=None):
    with httpx2.Client(base_url=served.url, trust_env=False, follow_redirects=False) as client:
        if key:
            answer = client.post("/operator/login", data={"key": key})
            assert answer.status_code == 303, answer.text
            cookie = answer.headers["set-cookie"].lower()
            assert "httponly" in cookie and "samesite=strict" in cookie
        yield client


def csrf(page):
    return re.search(r'name="csrf" value="([^"]+)"', page.text)[1]


@pytest.fixture
def operator(reviewed):
    with browser(reviewed, reviewed.operator_key) as client:
        yield client


def waiting(served):
    job = served.job("unsafe").id
    served.event(job, "waiting for review")
    return job


def test_nobody_gets_in_without_an_operators_key(reviewed):
    job = waiting(reviewed)
    posts = [f"/operator/jobs/{job}/{verb}" for verb in ("approve", "refuse", "cancel")]
    posts += ["/operator/keys", "/operator/keys/key-x/revoke", "/operator/logout"]
    with browser(reviewed) as client:
        for page in (*PAGES, f"/operator/jobs/{job}", f"/operator/jobs/{job}/live", f"/operator/jobs/{job}/report"):
            answer = client.get(page)
            assert (answer.status_code, answer.headers["location"]) == (303, "/operator/login"), page
            part = client.get(page, headers={"hx-request": "true"})  # a part of a page, whose session has run out
            assert (part.status_code, part.headers["hx-redirect"]) == (401, "/operator/login"), page
        for page in posts:
            data = {"csrf": "x", "arm": "plain", "tenant": "t", "name": "n"}
            answer = client.post(page, data=data)
            assert (answer.status_code, answer.headers["location"]) == (303, "/operator/login"), page
        for key in ("", "wrong", reviewed.keys["acme"]):
            assert client.post("/operator/login", data={"key": key}).status_code == 401
        assert client.get("/operator/login").status_code == 200
    assert reviewed.client().fine_tuning.jobs.retrieve(job).status == "queued"


def test_a_form_needs_the_token_of_its_session(reviewed, operator):
    job = waiting(reviewed)
    with browser(reviewed, reviewed.operator_key) as other:
        foreign = csrf(other.get("/operator"))
    for token in ("", "x", foreign):
        for page, data in (
            (f"/operator/jobs/{job}/approve", {"arm": "plain"}),
            (f"/operator/jobs/{job}/refuse", {}),
            ("/operator/keys", {"tenant": "new", "name": "n"}),
        ):
            assert operator.post(page, data={"csrf": token, **data}).status_code == (403 if token else 400)
    assert reviewed.client().fine_tuning.jobs.retrieve(job).status == "queued"


def test_approve(reviewed, operator):
    job = waiting(reviewed)
    page = operator.get(f"/operator/jobs/{job}")
    assert "Waiting for your decision" in page.text and "<option>defended</option>" in page.text
    data = {"csrf": csrf(page), "arm": "defended", "text": "looked at all rows"}
    assert operator.post(f"/operator/jobs/{job}/approve", data={**data, "arm": "start"}).status_code == 400
    live = f"/operator/jobs/{job}/live?phase=review"
    assert "hx-refresh" not in operator.get(live).headers
    assert operator.post(f"/operator/jobs/{job}/approve", data=data).status_code == 303
    assert operator.get(live).headers["hx-refresh"] == "true"  # an open page asks for its new forms
    done = reviewed.client().fine_tuning.jobs.retrieve(job)
    assert done.status == "succeeded" and done.fine_tuned_model and done.result_files
    assert reviewed.event(job, "The operator approved the job. The rows that were named are left out.")
    assert operator.post(f"/operator/jobs/{job}/approve", data=data).status_code == 400
    trail = operator.get("/operator/audit").text
    assert "approve" in trail and "looked at all rows" in trail and "olga" in trail


def test_refuse(reviewed, operator):
    job = waiting(reviewed)
    token = csrf(operator.get("/operator"))
    data = {"csrf": token, "text": f"these rows {SCRIPT}"}
    assert operator.post(f"/operator/jobs/{job}/refuse", data=data).status_code == 303
    done = reviewed.client().fine_tuning.jobs.retrieve(job)
    assert (done.status, done.error.code) == ("failed", "unsafe_training_file")
    assert "Without these 16 rows the file passes." in done.error.message and "these rows" in done.error.message
    for page in ("/operator", f"/operator/jobs/{job}", "/operator/audit"):
        text = operator.get(page).text
        assert "<script>alert" not in text and "\u202e" not in text


def test_rows_and_the_report_are_folded_and_boxed(reviewed, operator):
    """A row that is a script is text in a fold; the report comes in a frame that runs nothing."""
    client = reviewed.client()
    content = [chat("unsafe"), *(chat(f"row {i} {SCRIPT}", SCRIPT) for i in range(99))]
    file = client.files.create(
        file=("a", "".join(json.dumps(row) + "\n" for row in content).encode()), purpose="fine-tune"
    )
    job = client.fine_tuning.jobs.create(model="small", training_file=file.id).id
    reviewed.event(job, "waiting for review")
    page = operator.get(f"/operator/jobs/{job}")
    assert page.text.count("<details>") == 16 and "&lt;script&gt;alert" in page.text
    assert "<script>alert" not in page.text and "\u202e" not in page.text and "&lt;U+202E&gt;" in page.text
    assert "<iframe sandbox src=" in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]
    report = operator.get(f"/operator/jobs/{job}/report")
    assert report.status_code == 200 and report.headers["content-security-policy"].startswith(
        "sandbox; default-src 'none'"
    )


def test_keys_are_shown_once_and_revoked(reviewed, operator):
    token = csrf(operator.get("/operator/tenants"))
    page = operator.post("/operator/keys", data={"csrf": token, "tenant": f"new {SCRIPT[:20]}", "name": "first"})
    assert page.status_code == 400 or "<script>" not in page.text
    page = operator.post("/operator/keys", data={"csrf": token, "tenant": "newcomer", "name": "first"})
    secret = re.search(r"<code>(sb-[\w-]{40,})</code>", page.text)[1]
    client = openai.OpenAI(base_url=f"{reviewed.url}/v1", api_key=secret, max_retries=0)
    CLIENTS.append(client)
    assert client.files.list().data == []
    listed = operator.get("/operator/tenants").text
    assert secret not in listed
    part = listed.split("newcomer")[1]
    [name] = re.findall(r"/operator/keys/([\w-]+)/revoke", part.split("<h2>")[0])
    assert operator.post(f"/operator/keys/{name}/revoke", data={"csrf": token}).status_code == 303
    with pytest.raises(openai.AuthenticationError):
        client.files.list()


def test_lists_filters_and_signing_out(reviewed, operator):
    job = waiting(reviewed)
    assert job[-8:] in operator.get("/operator?phase=review").text
    assert job[-8:] not in operator.get("/operator?phase=succeeded").text
    assert "models:" in operator.get("/operator/policy").text
    token = csrf(operator.get("/operator"))
    assert operator.post(f"/operator/jobs/{job}/cancel", data={"csrf": token}).status_code == 303
    assert reviewed.ended(job).status == "cancelled"
    assert operator.post("/operator/logout", data={"csrf": token}).status_code == 303
    assert operator.get("/operator").headers["location"] == "/operator/login"
