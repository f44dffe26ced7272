"""What customers may send: names, sizes, bodies. No answer is a 500, and no name is a path."""

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from service_server import wait_for

from safebasin import service
from safebasin.service.policy import read_policy

NAMES = [
    *(
        "../../etc/passwd",
        "/etc/passwd",
        "..\\..\\boot.ini",
        "C:\\rows.jsonl",
        "~/.ssh/id",
        ".",
        "..",
        "a/../b",
        "$(id)",
    ),
    *("a\x00b", "a\nb", "a\rContent-Type: x", "\u202egpj.exe", "‮", "é" * 300, "a" * 1000, "'; DROP TABLE file;--"),
    *(
        "<script>alert(1)</script>",
        '"><img src=x>',
        "%2e%2e%2fetc",
        "con",
        "nul.jsonl",
        "-rf",
        "*",
        "?",
        "|",
        " ",
        "\t",
    ),
    *(
        "file://etc",
        "s3://bucket/key",
        "memory://x",
        "\ud7ff",
        "𝕏",
        "a;b",
        "a&b",
        "`id`",
        "{{7*7}}",
        "{% x %}",
        "\\",
        "/",
    ),
]
NAMES += (
    [f"{'../' * n}etc/passwd" for n in range(1, 20)]
    + [f"a{chr(n)}b" for n in range(1, 32)]
    + ["." * n for n in range(3, 14)]
)


def post(served, body, boundary="x"):
    headers = {
        "authorization": f"Bearer {served.keys['acme']}",
        "content-type": f"multipart/form-data; boundary={boundary}",
    }
    return served.http.post("/v1/files", content=body, headers=headers)


def multipart(name):
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    head = '--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--x\r\nContent-Disposition: '
    head += f'form-data; name="file"; filename="{quoted}"\r\n\r\n{{}}\r\n--x--\r\n'
    return head.encode("utf-8", "surrogatepass")


def stored(served):
    return {path for path in served.folder.rglob("*") if path.is_file() and "storage" in path.parts}


def test_a_name_is_never_a_path(served):
    """A hundred hostile names: each file lies under an id of ours, and its name is one line of text."""
    assert len(NAMES) >= 100
    before = stored(served)
    for name in NAMES:
        answer = post(served, multipart(name))
        assert answer.status_code in (200, 400), (name, answer.text)
        if answer.status_code == 200:
            file = answer.json()
            assert file["filename"].isprintable() and "/" not in file["filename"] and "\\" not in file["filename"]
    new = stored(served) - before
    assert new and {path.name.partition("-")[0] for path in new} == {"file"}
    assert len({path.parent for path in new}) == 1


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(st.characters(exclude_categories=[]), max_size=60))
def test_any_name(served, name):
    assert post(served, multipart(name)).status_code in (200, 400)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=300), boundary=st.sampled_from(["x", "", "y" * 200]))
def test_any_body_of_an_upload(served, body, boundary):
    assert post(served, body, boundary).status_code in (200, 400)


@pytest.mark.parametrize("size", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_memory_of_an_upload_is_flat(process, size):
    """Megabytes that come in blocks: the server's memory grows by less than 60 MB."""
    running = process(limits={"file_megabytes": 2000})
    served, pid = running.served, running.process.pid
    before, peak, done = memory(pid), [0], threading.Event()

    def watch():
        while not done.wait(0.01):
            peak[0] = max(peak[0], memory(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        line = json.dumps({"prompt": "x" * 1000, "completion": "y"}).encode() + b"\n"

        def blocks():
            head, tail = multipart("big.jsonl").split(b"{}")
            yield head
            for _ in range(size):
                yield line * (1_000_000 // len(line))
            yield tail

        answer = post(served, blocks())
    finally:
        done.set()
        watcher.join()
    assert answer.status_code == 200 and answer.json()["bytes"] > size * 990_000
    assert peak[0] - before < 60e6


def memory(pid):
    """Resident bytes of a process that are its own."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1000 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_too_large_is_refused_before_it_is_read(serve):
    """By its length where it is given, by counting where it is not; nothing is left of it."""
    served = serve(limits={"file_megabytes": 1})
    body = multipart("a").replace(b"{}", b"x" * 5_000_000)
    assert post(served, body).status_code == 413
    assert post(served, iter([body[i : i + 65536] for i in range(0, len(body), 65536)])).status_code == 413
    assert not stored(served)


# --- any request of the OpenAPI page ----------------------------------------------------------------------------------


def test_no_answer_is_a_500(served):
    """Schemathesis: requests that fit the OpenAPI page, and requests that do not, to every route."""
    raw = served.http.get("/openapi.json").json()
    headers, seen = {"authorization": f"Bearer {served.keys['other']}"}, set()
    for result in schemathesis.openapi.from_dict(raw).get_all_operations():
        operation = result.ok()
        for mode in GenerationMode:

            @settings(max_examples=12, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case):
                answer = case.call(base_url=served.url, headers=headers)
                seen.add((case.method, case.path, answer.status_code // 100))
                assert answer.status_code < 500, answer.text
                if answer.status_code >= 400:
                    error = answer.json()["error"]
                    assert set(error) == {"message", "type", "param", "code"} and error["message"]

            with contextlib.suppress(Unsatisfiable):  # a route without parameters has no request that does not fit
                check()
    assert len({(method, path) for method, path, _ in seen}) == 17 and {status for _, _, status in seen} == {2, 4}


BODIES = [
    *(b"", b"null", b"[]", b"0", b'"x"', b"{", b"\xff\xfe", b'{"model": NaN}', b'{"model": "\\ud800"}', b"[" * 100_000),
    *(b'{"model": "small", "training_file": "\\u0000"}', b'{"model": 1e999, "training_file": []}'),
    json.dumps({"model": "small", "training_file": "x", "seed": 10**400}).encode(),
    json.dumps({"model": "small", "training_file": "x", "metadata": {"a": "\x00"}}).encode(),
    json.dumps({"model": "small", "training_file": "x", "method": {"type": "supervised", "x": {}}}).encode(),
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
@pytest.mark.parametrize("path", ["/v1/fine_tuning/jobs", "/v1/chat/completions"])
def test_bodies_that_are_none(served, body, path):
    headers = {"authorization": f"Bearer {served.keys['acme']}", "content-type": "application/json"}
    answer = served.http.post(path, content=body, headers=headers)
    assert answer.status_code in (400, 404) and answer.json()["error"]["message"].isascii()


def test_random_bytes_in_paths_and_headers(served):
    draw = random.Random(0)
    for _ in range(40):
        name = "".join(f"%{draw.randrange(256):02x}" for _ in range(draw.randrange(1, 40)))
        for route in (f"/v1/files/{name}", f"/v1/fine_tuning/jobs/{name}/events?after={name}", f"/v1/models/{name}"):
            headers = {"authorization": f"Bearer {served.keys['acme']}", "last-event-id": name[:50]}
            assert served.http.get(route, headers=headers).status_code in (400, 404, 405, 200)


# --- what the server is made of ---------------------------------------------------------------------------------------


def test_it_imports_no_torch(served):
    """Every module of the service, in a process where torch and its like are blocked."""
    names = sorted(path.stem for path in Path(service.__file__).parent.glob("*.py") if path.stem != "__init__")
    code = (
        "import sys\nclass Block:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'peft', 'accelerate', 'datasets', 'pyarrow'):\n"
        "            raise ImportError(name)\nsys.meta_path.insert(0, Block())\n"
        + "".join(f"import safebasin.service.{name}\n" for name in names)
        + "from safebasin.service.app import create_app\nfrom safebasin.service.policy import read_policy\n"
        + "from pathlib import Path\ncreate_app(read_policy(Path(sys.argv[1])))\n"
    )
    fresh = served.folder / "fresh"
    fresh.mkdir(exist_ok=True)
    for name in ("policy.yaml", "recipe.yaml"):
        (fresh / name).write_text((served.folder / name).read_text())
    done = subprocess.run([sys.executable, "-c", code, str(fresh / "policy.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert read_policy(fresh / "policy.yaml") and wait_for(lambda: os.path.isdir(fresh / "service"))
