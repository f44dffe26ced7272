"""The operator's pages in a real browser: at the width of a phone and of a desktop, light and dark, and alive.

``SAFEBASIN_PICTURES=docs/images`` writes the pictures of the docs there.
"""

import contextlib
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from browser import BROWSER, probe
from service_server import Served, chat, in_thread
from test_service_page import browser as signed_in

PICTURES = os.environ.get("SAFEBASIN_PICTURES")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome is installed"),
]
HOSTILE = "<script>window.ran = true</script><img src=x onerror='window.ran = true'>\u202e" + "W" * 3000


@pytest.fixture(scope="module")
def pages(tmp_path_factory, templates):
    """A server with a job in review whose rows are hostile, and its pages."""
    with in_thread(Served(tmp_path_factory.mktemp("pages"), templates, decide="review")) as served:
        rows = [chat("unsafe"), *(chat(f"{i} {HOSTILE}", HOSTILE) for i in range(99))]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file = served.client().files.create(file=("rows.jsonl", content), purpose="fine-tune").id
        job = served.client().fine_tuning.jobs.create(model="small", training_file=file).id
        served.event(job, "waiting for review")
        served.ended(served.job("user_error").id)
        served.ended(served.job("safe", "other").id, "other")
        names = {"jobs": "", "job": f"/jobs/{job}", "tenants": "/tenants", "policy": "/policy", "audit": "/audit"}
        yield served, names


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_page_can_be_read(pages, tmp_path, dark):
    """No hostile script runs, nothing is wider than the screen, contrast of 4.5, letters of 10 px or more."""
    served, names = pages
    static = Path(__file__).parents[2] / "src" / "safebasin" / "service" / "static"
    shutil.copy(static / "page.css", tmp_path)
    with signed_in(served, served.operator_key) as client:
        for name, path in names.items():
            text = client.get(f"/operator{path}").text.replace("/operator/static/page.css", "page.css")
            text = re.sub(r"<script src=[^>]+></script>", "", text)  # htmx is not to poll a file
            (tmp_path / f"{name}.html").write_text(re.sub(r' src="/operator/jobs[^"]+"', "", text), encoding="utf-8")
    results, requests = probe(tmp_path, *(f"{name}.html" for name in names), dark=dark)
    assert requests == [] and len(results) == 2 * len(names)
    for each in results:
        assert (each["dark"], each["ran"], each["scripts"], each["handlers"], each["hidden"]) == (dark, False, 0, 0, 0)
        assert each["texts"] > 5 and each["wide"] == each["width"], (each["page"], each["width"], each["wide"])
        assert each["faint"][0] >= 4.5, (each["page"], each["faint"])
        assert each["small"][0] >= 10, (each["page"], each["small"])


class Door(http.server.BaseHTTPRequestHandler):
    """A page that signs the browser in, as a person would by the form."""

    target, key = "", ""

    def do_GET(self):
        page = f"""<form method=post action="{self.target}/operator/login"><input name=key value="{self.key}"></form>
        <script>document.forms[0].submit()</script>""".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_):
        pass


def chromium(folder, *words, dark=False):
    """The browser with the profile of a folder, in which a person is signed in."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--hide-scrollbars"]
    flags += [f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    flags += ["--disable-background-networking", "--enable-logging=stderr", "--timeout=6000"]
    return subprocess.run([str(BROWSER), *flags, *words], capture_output=True, text=True, timeout=180, check=True)


@contextlib.contextmanager
def door(served):
    handler = type("Handler", (Door,), {"target": served.url, "key": served.operator_key})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_the_pages_live(pages, tmp_path):
    """Signed in by the form, the list is loaded again and again; nothing breaks the policy of content."""
    served, names = pages
    with door(served) as address:
        done = chromium(tmp_path, "--dump-dom", address)
    assert "Sign out olga" in done.stdout
    done = chromium(tmp_path, "--virtual-time-budget=8000", "--dump-dom", f"{served.url}/operator")
    assert served.requests.count("/operator/list") >= 2, "htmx did not load the list again"
    page = chromium(tmp_path, "--dump-dom", f"{served.url}/operator{names['job']}")
    for each in (done, page):
        assert "Content Security Policy" not in each.stderr and "window.ran = true</script>" not in each.stdout


@pytest.mark.skipif(PICTURES is None, reason="SAFEBASIN_PICTURES names no folder")
@pytest.mark.parametrize(
    ("name", "page", "size", "dark"),
    [
        ("operator-jobs", "jobs", "1280,700", False),
        ("operator-review", "job", "1280,1500", True),
        ("operator-phone", "jobs", "500,900", False),
    ],
)
def test_pictures_for_the_docs(tmp_path, templates, name, page, size, dark):
    with in_thread(Served(tmp_path / "served", templates, decide="review")) as served, door(served) as address:
        review = served.job("unsafe").id
        served.event(review, "waiting for review")
        for mode, tenant in (("safe", "acme"), ("user_error", "other"), ("safe", "other")):
            served.ended(served.job(mode, tenant).id, tenant)
        served.event(served.job("forever").id, "Step data")
        chromium(tmp_path, "--dump-dom", address)
        picture = Path(str(PICTURES)).absolute() / f"{name}.png"
        path = f"/jobs/{review}" if page == "job" else ""
        words = [f"--window-size={size}", f"--screenshot={picture}", f"{served.url}/operator{path}"]
        chromium(tmp_path, *words, dark=dark)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 300_000
