"""The server is killed in every state of a job; the next one finds the table and the processes in agreement."""

import http.server
import shutil
import threading
import urllib.request

import openai
import pytest
from service_server import CLIENTS, Served, starts, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def server(process):
    """A server in a process with one job of a mode, which has come to its first step."""

    def start(mode, **policy):
        running = process(**policy)
        job = running.served.job(mode).id
        running.served.event(job, "Step data")
        return running, job

    return start


def test_queued(process):
    """Killed with jobs that wait: none is lost, none runs twice."""
    running = process(child={"slots": 1})
    jobs = [running.served.job("safe").id for _ in range(5)]
    running.kill()
    process(running.served)
    assert [running.served.ended(job).status for job in jobs] == ["succeeded"] * 5
    assert [len(starts(running.served, job)) for job in jobs] == [1] * 5


def test_running_and_the_child_lives(server, process):
    """The child is adopted: it is started once, and a cancellation of the next server kills it."""
    running, job = server("forever")
    pid = int((running.served.path(job) / "pid").read_text())
    running.kill()
    process(running.served)
    assert running.served.client().fine_tuning.jobs.retrieve(job).status == "running"
    assert len(starts(running.served, job)) == 1
    running.served.client().fine_tuning.jobs.cancel(job)
    assert running.served.ended(job).status == "cancelled"
    wait_for(lambda: not alive(pid))


def test_running_and_the_child_dies_too(server, process):
    """As when the machine goes down: the run is started again, and ends."""
    running, job = server("resumable")
    pid = int((running.served.path(job) / "pid").read_text())
    running.kill()
    kill(pid)
    process(running.served)
    assert running.served.ended(job).status == "succeeded" and len(starts(running.served, job)) == 2


def test_killed_between_the_claim_and_the_child(server, process):
    """The table says that the job runs, and it has no folder yet: it is started, and so are those behind it."""
    running, job = server("resumable")
    running.kill()
    kill(int((running.served.path(job) / "pid").read_text()))
    shutil.rmtree(running.served.path(job))
    process(running.served)
    running.served.event(job, "interrupted")
    assert running.served.ended(running.served.job("safe").id).status == "succeeded"
    running.served.client().fine_tuning.jobs.cancel(job)


def test_the_child_ends_while_no_server_lives(server, process):
    """Its end and its events are read by the next server."""
    running, job = server("slow")
    running.kill()
    wait_for(lambda: '"end"' in (running.served.path(job) / "events.jsonl").read_text())
    process(running.served)
    assert running.served.ended(job).status == "succeeded" and len(starts(running.served, job)) == 1
    messages = [e.message for e in running.served.client().fine_tuning.jobs.list_events(job, limit=100).data]
    assert len([text for text in messages if "training loss" in text]) == 3


@pytest.mark.parametrize("verb", ["cancel", "pause"])
def test_cancelled_or_paused_and_killed_at_once(server, process, verb):
    """The next server stops the child that the killed one had not yet stopped."""
    running, job = server("tree")
    pids = [int((running.served.path(job) / name).read_text()) for name in ("pid", "run/grandchild")]
    getattr(running.served.client().fine_tuning.jobs, verb)(job)
    running.kill()
    process(running.served)
    wait_for(lambda: not any(map(alive, pids)))
    status = running.served.client().fine_tuning.jobs.retrieve(job).status
    assert status == ("cancelled" if verb == "cancel" else "queued")
    if verb == "pause":
        running.served.client().fine_tuning.jobs.cancel(job)


def test_paused_in_review_and_over(process):
    running = process(decide="review")
    served = running.served
    review, over = served.job("unsafe").id, served.job("safe").id
    served.event(review, "waiting for review")
    paused = served.job("resumable").id
    served.event(paused, "Step data")
    served.client().fine_tuning.jobs.pause(paused)
    done = served.ended(over)
    running.kill()
    process(served)
    jobs = served.client().fine_tuning.jobs
    assert jobs.retrieve(over) == done
    assert [jobs.retrieve(job).status for job in (review, paused)] == ["queued", "queued"]
    jobs.resume(paused)
    assert served.ended(paused).status == "succeeded"
    assert len(starts(served, review)) == 1


def test_killed_again_and_again(process):
    """Five kills at any moment of five jobs: each ends as it should, each has one verdict."""
    running = process(child={"slots": 2})
    served = running.served
    jobs = [served.job(mode).id for mode in ("safe", "unsafe", "slow", "safe", "user_error")]
    for _ in range(5):
        running.kill()
        running = process(served)
    ends = [served.ended(job) for job in jobs]
    assert [job.status for job in ends] == ["succeeded", "failed", "succeeded", "succeeded", "failed"]
    for job in ends:
        messages = [e.message for e in served.client().fine_tuning.jobs.list_events(job.id, limit=100).data]
        text = job.error.message if job.error else "The file passes; no row was left out."
        assert messages.count(text) == 1


def alive(pid):
    from test_life import alive

    return alive(pid)


def kill(pid):
    import os
    import signal

    os.killpg(pid, signal.SIGKILL)
    wait_for(lambda: not alive(pid))


def test_a_second_server_in_one_folder_is_refused(process):
    running = process()
    second = Served.__new__(Served)
    second.__dict__ = {**running.served.__dict__, "port": 1}
    with pytest.raises(AssertionError, match="another server works"):
        type(running)(second)


# --- the answer that is lost ------------------------------------------------------------------------------------------


class Swallow(http.server.BaseHTTPRequestHandler):
    """A proxy that passes every request on, and loses the answers to the first ``lost`` POSTs."""

    target, lost, seen = "", 1, 0

    def do_POST(self):
        size = int(self.headers["Content-Length"])
        request = urllib.request.Request(self.target + self.path, self.rfile.read(size), dict(self.headers))
        with urllib.request.urlopen(request) as answer:
            body = answer.read()
        type(self).seen += 1
        if type(self).seen <= self.lost:
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("lost", [1, 2])
def test_a_swallowed_answer_is_one_job_and_one_file(serve, lost):
    served = serve()
    handler = type("Handler", (Swallow,), {"target": served.url, "lost": lost})
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{proxy.server_port}/v1", api_key=served.keys["acme"])
        CLIENTS.append(client)
        file = served.upload("forever")
        job = client.fine_tuning.jobs.create(model="small", training_file=file)
        assert handler.seen == lost + 1
        assert [each.id for each in served.client().fine_tuning.jobs.list()] == [job.id]
        handler.seen = 0
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
        handler.seen = 0
        again = client.files.create(file=("again.jsonl", b"{}\n"), purpose="fine-tune")
        assert handler.seen == lost + 1
        assert [each.id for each in served.client().files.list() if each.filename == "again.jsonl"] == [again.id]
    finally:
        proxy.shutdown()
        proxy.server_close()


def test_two_honest_jobs_of_one_file_are_two(served):
    file = served.upload("forever")
    create = served.client().fine_tuning.jobs.create
    jobs = [create(model="small", training_file=file).id for _ in range(2)]
    keyed = [create(model="small", training_file=file, extra_headers={"idempotency-key": "k1"}).id for _ in range(2)]
    assert len({*jobs, *keyed}) == 3 and keyed[0] == keyed[1]
    with pytest.raises(openai.BadRequestError) as error:
        create(model="small", training_file=file, seed=1, extra_headers={"idempotency-key": "k1"})
    assert error.value.code == "idempotency_error"
    for job in {*jobs, *keyed}:
        served.client().fine_tuning.jobs.cancel(job)
