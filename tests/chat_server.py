"""A chat-completion endpoint that truly listens, and stops to; fixtures for tests of the judge that asks one."""

import contextlib
import http.server
import json
import threading

import pytest

from safebasin.measure.judges.rubric import Rubric


class Served:
    """An endpoint on a free port; ``replies`` gives (status, body) a request, ``seen`` what came.

    ``kill`` closes it as a crash would.
    """

    def __init__(self, replies):
        self.seen, self.headers = [], []
        served = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                served.seen.append((self.path, request))
                served.headers.append(dict(self.headers))
                status, body, *more = replies(len(served.seen), request)
                if status == 0:  # the connection is lost before a word of the reply
                    return self.close_connection
                self.send_response(status)
                for name, value in more:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # a client that gave up
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def kill(self):
        self.server.shutdown()
        self.thread.join()
        self.server.socket.close()


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with contextlib.ExitStack() as stack:

        def start(replies):
            served = Served(replies)
            stack.callback(lambda: served.thread.is_alive() and served.kill())
            return served

        yield start


@pytest.fixture
def rubric(tmp_path):
    def make(served, **more):
        fields = {"timeout": 2, "wait": 0.01, "tries": 2, "cache": str(tmp_path / "ratings")} | more
        return Rubric(url=served.url, model="tiny", **fields)

    return make


def says(text):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
