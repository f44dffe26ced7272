"""The server under load, on one machine: creation, polls, cancellation, restart, memory, kills, lost answers.

A job here is a process that sleeps, or that ignores SIGTERM: what is measured is the server. The clients are raw
connections, since OpenAI's client takes longer for a call than the server does.
"""

import contextlib
import http.client
import http.server
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Annotated, Any, Literal

import openai
import yaml
from cyclopts import Parameter

from benchmarks.harness import Bench, experiment
from benchmarks.service.end_to_end import free_port, load, new_key, serve
from safebasin.service.executor import Child
from safebasin.service.policy import read_policy
from safebasin.service.store import Job, Store, new_id

GOALS = {
    "create.seconds.10k_rows": "<= 1",
    "polls_per_second": ">= 200",
    "cancel.seconds": "<= 25",
    "restart.seconds.1000_jobs": "<= 2",
    "idle.mb": "<= 100",
    "lost_jobs": "= 0",
    "duplicate_jobs": "= 0",
}
# A double of the run: it writes an event, and sleeps, or is deaf to SIGTERM, or ends at once with a user error.
CHILD = """
import json, signal, sys, time
words = sys.argv[1:]
file = json.loads(next(w.split("=", 1)[1] for w in words if w.startswith("data.task=")))["path"]
mode = json.loads(open(file).readline())["messages"][0]["content"]
log = words[words.index("--events") + 1]
def say(**facts):
    open(log, "a").write(json.dumps({"time": time.time(), **facts}) + "\\n")
say(event="step", step="data", state="started")
if mode == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
time.sleep(600 if mode == "long" else 0.2)
say(event="end", code=1, message=f"{file}: 1 rows cannot be used")
"""


class Service:
    """A server in a folder, with one customer."""

    def __init__(self, folder: Path, **limits: Any):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        recipe = Path(__file__).parents[2] / "recipes" / "service.yaml"
        many = {"jobs_waiting": 100_000, "jobs_running": 100_000, "jobs_refused_day": 100_000}
        tree = {
            "models": {"small": {"recipe": str(recipe)}},
            "limits": many | limits,
            "child": {"command": [sys.executable, "-c", CHILD], "slots": 4},
        }
        self.policy, self.port = folder / "policy.yaml", free_port()
        self.policy.write_text(yaml.safe_dump(tree))
        self.key = new_key(self.policy, "acme")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Seconds until the server answers."""
        start = time.perf_counter()
        self.process = serve(self.policy, self.port)
        return time.perf_counter() - start

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End the server and its children."""
        self.kill()
        for file in self.policy.parent.glob("service/jobs/*/pid"):
            if child := Child.adopt(file.parent):
                child.send(signal.SIGKILL)

    def client(self, port: int | None = None, **more: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{port or self.port}/v1", api_key=self.key, **more)

    def upload(self, mode: str, count: int = 1) -> str:
        turns = [{"role": "user", "content": mode}, {"role": "assistant", "content": "billing"}]
        content = (json.dumps({"messages": turns}) + "\n").encode() * count
        return self.client().files.create(file=("rows.jsonl", content), purpose="fine-tune").id

    def create(self, file: str, **more: Any) -> str:
        return self.client().fine_tuning.jobs.create(model="small", training_file=file, **more).id

    def post(self, file: str, seed: int) -> str:
        """A job by a raw connection; its id."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        with contextlib.closing(connection):
            body = json.dumps({"model": "small", "training_file": file, "seed": seed})
            headers = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
            connection.request("POST", "/v1/fine_tuning/jobs", body, headers)
            return str(json.loads(connection.getresponse().read())["id"])


def polls(service: Service, job: str, seconds: float, threads: int = 4) -> float:
    """Answers a second to ``threads`` customers who ask after a job as fast as they can."""
    counts, end = [0] * threads, time.perf_counter() + seconds

    def poll(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", service.port)
        while time.perf_counter() < end:
            headers = {"authorization": f"Bearer {service.key}"}
            connection.request("GET", f"/v1/fine_tuning/jobs/{job}", headers=headers)
            answer = connection.getresponse()
            answer.read()
            counts[number] += answer.status == 200
        connection.close()

    workers = [threading.Thread(target=poll, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / seconds


class Loser(http.server.BaseHTTPRequestHandler):
    """Passes requests on to ``port``; of every two POSTs the first one's answer is lost."""

    port, seen = 0, 0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        url = f"http://127.0.0.1:{self.port}{self.path}"
        with urllib.request.urlopen(urllib.request.Request(url, body, dict(self.headers))) as answer:
            data = answer.read()
        type(self).seen += 1
        if self.seen % 2:
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def alive(pid: int) -> bool:
    """Whether a process runs and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def fill(service: Service, count: int) -> None:
    """Jobs that are over, and ten that say they run and whose children are gone."""
    store = Store(read_policy(service.policy).database)
    server = (service.policy.parent / "service" / "server").read_text()
    with store.session() as session:
        first = session.get(Job, service.create(service.upload("short")))
        assert first is not None
        facts = first.model_dump(exclude={"id", "phase", "finished", "owner"})
        for number in range(count):
            phase, finished = ("running", None) if number < 10 else ("failed", time.time())
            session.add(Job(id=new_id("ftjob"), phase=phase, finished=finished, owner=server, **facts))
    store.close()


def cpu(pid: int) -> float:
    """Seconds that a process has computed so far: what a time would be on a machine that does nothing else."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@experiment("service", replaces=("what",), quick={"kills": 3, "seconds": 1, "jobs": 50, "answers": 5}, goals=GOALS)
def service(
    *,
    bench: Bench,
    part: Annotated[Literal["all", "speed", "faults"], Parameter(help="of the measurements")] = "all",
    kills: Annotated[int, Parameter(help="kills of the server")] = 50,
    answers: Annotated[int, Parameter(help="answers that are lost")] = 50,
    jobs: Annotated[int, Parameter(help="jobs in the table at a restart")] = 1000,
    seconds: Annotated[float, Parameter(help="of polling")] = 10,
) -> None:
    """How fast, how small and how sure is the server: creation, polls, cancellation, restart, kills, lost answers?"""
    folder = bench.keep / "load"
    bench.facts["load"] = load()
    if part != "faults":
        tuned = Service(folder / "speed")
        try:
            speed(bench, tuned, jobs, seconds)
        finally:
            tuned.stop()
    if part != "speed":
        bench.facts["load"] = load()
        bench.record("lost_jobs", lost_jobs(folder / "kills", kills), n=kills, unit="jobs")
        bench.record("duplicate_jobs", duplicate_jobs(folder / "answers", answers), n=answers, unit="jobs")


def speed(bench: Bench, tuned: Service, jobs: int, seconds: float) -> None:
    """Records of times and of memory; ``cpu``: the server's own seconds of them, which other work does not lengthen."""
    starts = [tuned.start()]
    assert tuned.process is not None
    pid = tuned.process.pid
    bench.record("start.seconds", starts.pop(), n=1, unit="s", cpu=cpu(pid))
    time.sleep(2)
    status = Path(f"/proc/{pid}/status").read_text()
    bench.record("idle.mb", int(status.split("VmRSS:")[1].split()[0]) / 1000, n=1, unit="MB")
    file, times, before = tuned.upload("long", 10_000), [], cpu(pid)
    for seed in range(10):
        start = time.perf_counter()
        job = tuned.create(file, seed=seed)
        times.append(time.perf_counter() - start)
    bench.timing("create.seconds.10k_rows", times, unit="s", cpu=round((cpu(pid) - before) / 10, 3))
    before = cpu(pid)
    rate = polls(tuned, job, seconds)
    each = (cpu(pid) - before) / max(1.0, rate * seconds)
    bench.record("polls_per_second", rate, n=int(seconds), unit="answers/s", cpu=round(each, 5))
    deaf = tuned.upload("deaf")
    for other in tuned.client().fine_tuning.jobs.list(limit=100).data:
        tuned.client().fine_tuning.jobs.cancel(other.id)
    job = tuned.create(deaf)
    path = tuned.policy.parent / "service" / "jobs" / job
    while not (path / "events.jsonl").is_file():
        time.sleep(0.05)
    child, start = int((path / "pid").read_text()), time.perf_counter()
    time.sleep(0.3)  # until it is deaf
    tuned.client().fine_tuning.jobs.cancel(job)
    bench.record("cancel.answer.seconds", time.perf_counter() - start - 0.3, n=1, unit="s")
    while alive(child):
        time.sleep(0.05)
    bench.record("cancel.seconds", time.perf_counter() - start - 0.3, n=1, unit="s")
    fill(tuned, jobs)
    used = []
    for _ in range(6):
        tuned.kill()
        starts.append(tuned.start())
        used.append(cpu(tuned.process.pid))
    bench.timing("restart.seconds.1000_jobs", starts, unit="s", cpu=statistics.median(used))


def lost_jobs(folder: Path, kills: int) -> int:
    """Jobs of which the client has an answer, and that have no verdict, after kills amid creation and running."""
    killed = Service(folder)
    created: list[str] = []
    try:
        killed.start()
        file = killed.upload("short")
        for number in range(kills):
            stop = threading.Timer(0.05 + 0.4 * (number % 10) / 10, killed.kill)
            stop.start()
            with contextlib.suppress(OSError, http.client.HTTPException):
                while stop.is_alive():
                    created.append(killed.post(file, len(created)))
                    time.sleep(0.05)
            stop.join()
            killed.start()
        end, lost = time.monotonic() + 600, set(created)
        while lost and time.monotonic() < end:
            done = [job.id for job in killed.client().fine_tuning.jobs.list(limit=1000) if job.finished_at]
            lost -= set(done)
            time.sleep(1)
        print(f"{len(created)} jobs over {kills} kills")
        return len(lost)
    finally:
        killed.stop()


def duplicate_jobs(folder: Path, answers: int) -> int:
    """Jobs beyond one for each call of a client whose first answer was lost."""
    served = Service(folder)
    try:
        served.start()
        handler = type("Handler", (Loser,), {"port": served.port})
        proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        file, client = served.upload("short"), served.client(proxy.server_port)
        times = []
        for seed in range(answers):
            start = time.perf_counter()
            client.fine_tuning.jobs.create(model="small", training_file=file, seed=seed)
            times.append(time.perf_counter() - start)
        proxy.shutdown()
        proxy.server_close()
        print(f"median call with a lost answer: {statistics.median(times):.2f} s")
        return len(list(served.client().fine_tuning.jobs.list(limit=1000))) - answers
    finally:
        served.stop()
