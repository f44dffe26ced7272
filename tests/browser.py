"""A headless browser for tests: what it shows, what it asks of a network, what ``probe.html`` measures in a page."""

import html
import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = Path(__file__).parent / "report" / "probe.html"


class Proxy(http.server.BaseHTTPRequestHandler):
    """Every request of the browser to a network comes here; none is answered."""

    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        self.send_error(404)

    do_CONNECT = do_GET

    def log_message(self, *_: object) -> None:
        pass


def browse(folder: Path, *words: str, dark: bool = False) -> tuple[str, list[str]]:
    """Standard output of the browser, and its requests to a network."""
    requests: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Recorder", (Proxy,), {"requests": requests}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = [
        *["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-sync"],
        *["--disable-background-networking", "--disable-component-update"],
        f"--user-data-dir={folder / 'profile'}",
        "--proxy-bypass-list=<-loopback>",
    ]
    flags += [
        f"--proxy-server=127.0.0.1:{server.server_port}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]
    try:
        done = subprocess.run([str(BROWSER), *flags, *words], capture_output=True, text=True, timeout=180, check=True)
    finally:
        server.shutdown()
        server.server_close()
    own = re.compile(r"\bgoogle(apis)?\.com\b")  # the browser's own requests
    return done.stdout, [request for request in requests if not own.search(request)]


def probe(folder: Path, *pages: str, dark: bool = False) -> tuple[list[dict[str, Any]], list[str]]:
    """What the probe measured in each page at each width, and the requests to a network."""
    shutil.copy(PROBE, folder)
    address = (
        f"{(folder / 'probe.html').as_uri()}#{'&'.join(f'{page},{width}' for page in pages for width in (390, 1280))}"
    )
    flags = "--allow-file-access-from-files", "--virtual-time-budget=20000", "--dump-dom"
    output, requests = browse(folder, *flags, address, dark=dark)
    results = re.search(r'<pre id="results">(.+?)</pre>', output, re.DOTALL)
    assert results, "the probe did not finish"
    return json.loads(html.unescape(results[1])), requests
