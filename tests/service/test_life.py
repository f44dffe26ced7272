"""The life of a job: its ends, its limits, whose turn it is, and what its tree of processes leaves."""

import json
import os
import threading

import openai
import pytest
from service_server import RECIPE, rows, starts, wait_for


@pytest.mark.parametrize(
    ("mode", "code", "starts"),
    [
        ("user_error", "invalid_training_file", 1),
        ("recipe_error", "server_error", 1),
        ("broken", "server_error", 2),  # one more try
        ("vanishing", "server_error", 3),
        ("thin", "inconclusive", 1),
        ("bad_base", "server_error", 1),
        ("hopeless", "unsafe_training_file", 1),
    ],
)
def test_how_a_job_fails(served, mode, code, starts):
    job = served.ended(served.job(mode).id)
    assert (job.status, job.error.code) == ("failed", code) and job.fine_tuned_model is None
    assert "/srv" not in job.error.message and str(served.folder) not in job.to_json()
    assert len((served.path(job.id) / "starts").read_text().splitlines()) == starts


def test_a_job_that_broke_once(served):
    assert served.ended(served.job("broken_once").id).status == "succeeded"


def test_a_job_that_prints_without_end(serve):
    served = serve(limits={"log_megabytes": 1})
    job = served.ended(served.job("printing").id)
    assert job.error.code == "server_error"
    assert (served.path(job.id) / "output.log").stat().st_size < 500e6


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().split()[2] != "Z"


@pytest.mark.parametrize("verb", ["cancel", "pause"])
def test_the_tree_is_killed(served, verb):
    """A child and a grandchild that ignore SIGTERM are dead after the grace."""
    job = served.job("tree")
    served.event(job.id, "Step scan")
    pids = [int((served.path(job.id) / name).read_text()) for name in ("pid", "run/grandchild")]
    assert all(map(alive, pids))
    getattr(served.client().fine_tuning.jobs, verb)(job.id)
    wait_for(lambda: not any(map(alive, pids)))
    if verb == "cancel":
        assert served.ended(job.id).status == "cancelled"
        wait_for(lambda: not served.path(job.id).exists())
    else:
        served.client().fine_tuning.jobs.cancel(job.id)


def test_a_cancellation_is_not_overwritten(served):
    """Jobs that are cancelled as their runs end: what the answer to the cancellation said holds for ever."""
    jobs, client = served.client().fine_tuning.jobs, served.client()
    expected = {}
    for _ in range(6):
        name = served.job("safe").id
        try:
            expected[name] = jobs.cancel(name).status
        except openai.BadRequestError:
            expected[name] = "succeeded"
    assert served.ended(served.job("safe").id).status == "succeeded"
    ends = [served.ended(name) for name in expected]
    assert {job.id: job.status for job in ends} == expected and "cancelled" in expected.values()
    models = {model.id for model in client.models.list()}
    assert all((job.fine_tuned_model in models) == (job.status == "succeeded") for job in ends)


def test_nobody_waits_for_more_than_one_foreign_job(serve):
    """One slot: a customer with a hundred jobs and one with one. The one job starts second."""
    served = serve(child={"slots": 1}, limits={"jobs_waiting": 200, "jobs_running": 2})
    first = served.job("resumable").id
    served.event(first, "Step data")
    file = served.upload("safe")
    many = [served.client().fine_tuning.jobs.create(model="small", training_file=file, seed=i).id for i in range(20)]
    other = served.job("safe", "other").id
    served.client().fine_tuning.jobs.cancel(first)
    served.ended(other, "other")
    waiting = [served.client().fine_tuning.jobs.retrieve(job).status for job in many]
    assert waiting.count("queued") >= 18


def test_limits(serve):
    served = serve(
        limits={
            "jobs_waiting": 2,
            "jobs_running": 1,
            "file_megabytes": 0.1,
            "files_megabytes": 0.15,
            "jobs_refused_day": 1,
            "rows": 50,
        }
    )
    client = served.client()
    with pytest.raises(openai.APIStatusError) as error:
        client.files.create(file=("big", b"x" * 100_001), purpose="fine-tune")
    assert error.value.status_code == 413
    with pytest.raises(openai.APIStatusError) as error:
        client.files.create(file=("big", b"x" * 3_000_000), purpose="fine-tune")
    assert error.value.status_code == 413
    large = client.files.create(file=("large", rows("forever", 1000)[:99_000]), purpose="fine-tune").id
    for _ in range(2):  # the second is cut off by what is left of the account's 150 kB
        with pytest.raises(openai.APIStatusError) as error:
            client.files.create(file=("second", b"x" * 60_000), purpose="fine-tune")
        assert error.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="more than 50 rows"):
        client.fine_tuning.jobs.create(model="small", training_file=large)
    client.files.delete(large)
    file = served.upload("forever", count=10)
    jobs = [client.fine_tuning.jobs.create(model="small", training_file=file).id]
    served.event(jobs[0], "Step data")
    jobs += [client.fine_tuning.jobs.create(model="small", training_file=file, seed=i).id for i in range(2)]
    with pytest.raises(openai.RateLimitError) as error:
        client.fine_tuning.jobs.create(model="small", training_file=file)
    assert error.value.code == "insufficient_quota" and error.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.BadRequestError, match="cancel it first"):
        client.files.delete(file)
    for job in jobs:
        client.fine_tuning.jobs.cancel(job)
    unsafe = client.fine_tuning.jobs.create(model="small", training_file=served.upload("unsafe", count=10)).id
    assert served.ended(unsafe).error.code == "unsafe_training_file"
    with pytest.raises(openai.RateLimitError, match="refused"):
        client.fine_tuning.jobs.create(model="small", training_file=file)


def test_hours_of_a_month(serve):
    served = serve(limits={"gpu_hours_month": 0})
    with pytest.raises(openai.RateLimitError, match="0 hours"):
        served.job("safe")


def test_policies_that_cut_and_that_search(serve):
    served = serve(decide="cut", search=1)
    job = served.ended(served.job("unsafe").id)
    assert job.status == "succeeded" and "16 rows were left out" in job.model_extra["verdict"]["message"]
    assert len(job.model_extra["verdict"]["rows"]) == 16 and job.result_files
    job = served.ended(served.job("hopeless").id)
    assert job.error.code == "unsafe_training_file"
    verbs = [json.loads(line)["words"][0] for line in (served.path(job.id) / "starts").read_text().splitlines()]
    assert verbs == ["run", "search", "run"]


def test_a_file_without_named_rows_costs_one_tuning(serve):
    """Where the arm of the model passes and its cut names no row, the other arms are not tuned; else they are."""
    gate = RECIPE["gate"] | {"max_accuracy_loss": None, "plain": "plain"}
    small = {"recipe": "recipe.yaml", "uploaded": "plain", "without": "defended", "model": "defended"}
    served = serve(recipe={**RECIPE, "gate": gate}, models={"small": small})
    clean, unsafe = (served.ended(served.job(mode).id) for mode in ("clean", "unsafe"))
    assert (clean.status, clean.model_extra["verdict"]["message"]) == (
        "succeeded",
        "The file passes; no row was left out.",
    )
    assert (unsafe.status, unsafe.error.code) == ("failed", "unsafe_training_file")
    [screen], [first, second] = (list(map(changes, starts(served, job.id))) for job in (clean, unsafe))
    assert list(json.loads(screen["arms"])) == list(json.loads(first["arms"])) == ["start", "defended"]
    assert json.loads(screen["gate"])["arm"] == "defended" and "plain" not in json.loads(screen["gate"])
    assert "arms" not in second and "gate" not in second
    assert served.event(unsafe.id, "with and without those that were named")


def changes(words):
    return dict(words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "--change")


def test_old_files_go(serve):
    served = serve(limits={"files_days": 1e-9})
    over = served.ended(served.job("user_error").id)
    file = served.upload("safe")
    job = served.job("forever")
    from safebasin.service.files import Storage
    from safebasin.service.retention import sweep
    from safebasin.service.store import Store

    store, storage = Store(served.settings.database), Storage(served.settings.storage)
    assert served.path(over.id).exists()
    sweep(store, storage, served.settings, (served.settings.folder / "server").read_text())
    assert not served.path(over.id).exists() and served.client().fine_tuning.jobs.retrieve(over.id) == over
    store.close()
    assert [each.id for each in served.client().files.list()] == [job.training_file]  # a job waits for it
    with pytest.raises(openai.NotFoundError):
        served.client().files.content(file)


def test_the_same_request_at_once_by_many_threads(served):
    """Repetitions of one request that come at the same time: one job."""
    file, seen = served.upload("forever"), []

    def create(retry):
        with served.client(timeout=59) as client:  # one of its own
            headers = {"x-stainless-retry-count": str(retry)}
            job = client.fine_tuning.jobs.create(model="small", training_file=file, extra_headers=headers)
            seen.append(job.id)

    threads = [threading.Thread(target=create, args=(retry,)) for retry in (0, 1, 2, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 5 and len(set(seen)) == 1
    served.client().fine_tuning.jobs.cancel(seen[0])


def test_a_verdict_that_breaks_is_an_end(served, monkeypatch):
    """A fault of ours while a verdict is being made: the job ends, and the next ones go on."""
    from safebasin.service import ending

    def broken(*_):
        raise KeyError("a fault of ours")

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(ending, "judge", broken)
        job = served.ended(served.job("safe").id)
    assert job.error.code == "server_error"
    assert served.ended(served.job("safe").id).status == "succeeded"


def test_hours_are_counted(served):
    from safebasin.service.store import Job, Store

    job = served.ended(served.job("slow").id)
    store = Store(served.settings.database)
    with store.session() as session:
        row = session.get(Job, job.id)
        assert 1 < row.seconds <= row.finished - row.started + 1
    store.close()
