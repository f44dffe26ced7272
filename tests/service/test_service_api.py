"""The routes, by the real client, on SQLite and PostgreSQL: what it sends, and what it reads, by its own types."""

import json

import openai
import pytest
from service_server import ON_BOTH, chat, rows

pytestmark = ON_BOTH


def test_a_file(served):
    client = served.client()
    file = client.files.create(file=("rows.jsonl", rows("safe")), purpose="fine-tune")
    assert file.bytes == len(rows("safe")) and file.filename == "rows.jsonl" and file.status == "processed"
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).content == rows("safe")
    assert file in client.files.list().data and file in client.files.list(purpose="fine-tune", limit=1000).data
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_files_in_pages(served):
    client = served.client("other")
    ids = [client.files.create(file=(f"{i}.jsonl", b"{}\n"), purpose="fine-tune").id for i in range(5)]
    assert [file.id for file in client.files.list(limit=2)][:5] == ids[::-1]  # the client turns the pages


def test_a_job_that_passes(served):
    client = served.client()
    job = served.job("safe", suffix="my-model", seed=7, metadata={"team": "a b"})
    assert (job.status, job.seed, job.metadata, job.hyperparameters.n_epochs) == ("queued", 7, {"team": "a b"}, "auto")
    done = served.ended(job.id)
    assert done.status == "succeeded" and done.error is None and done.finished_at >= done.created_at
    assert done.fine_tuned_model.startswith("ft:small:") and ":my-model:" in done.fine_tuned_model
    assert done.fine_tuned_model in [model.id for model in client.models.list()]
    assert client.models.retrieve(done.fine_tuned_model).owned_by == done.organization_id
    asr = next(rate for rate in done.model_extra["verdict"]["rates"] if rate["judge"] == "keyword")
    assert (asr["what"], asr["before"], asr["after"]) == ("asr", 6 / 60, 5 / 60)
    assert [each.id for each in client.fine_tuning.jobs.list(metadata={"team": "a b"})] == [job.id]
    assert client.models.delete(done.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(done.fine_tuned_model)


def test_a_job_that_is_refused(served):
    """The double's run has 100 rows, of which its cut names 16: the hand-made rows of tests/report/conftest.py."""
    job = served.ended(served.job("unsafe").id)
    assert job.status == "failed" and job.fine_tuned_model is None
    assert (job.error.code, job.error.param) == ("unsafe_training_file", "training_file")
    assert "Without these 16 rows the file passes." in job.error.message
    [event] = [e for e in served.client().fine_tuning.jobs.list_events(job.id).data if e.message == job.error.message]
    lines = [row["line"] for row in event.data["rows"]]
    assert sorted(lines) == [84, 85, *range(87, 101)] and event.level == "warn"
    assert {row["reason"] for row in event.data["rows"]} == {"score above the threshold (scan)"}
    assert all("score" not in row for row in event.data["rows"])  # the policy does not tell scores
    [result] = job.result_files
    head, *listed = map(json.loads, served.client().files.content(result).text.splitlines())
    assert head["passes_without"] and head["row_count"] == 16 and [row["line"] for row in listed] == lines
    assert served.client().files.retrieve(result).purpose == "fine-tune-results"


def test_jobs_in_pages(served):
    jobs = [served.job("forever").id for _ in range(3)]
    client = served.client()
    listed = [job.id for job in client.fine_tuning.jobs.list(limit=1)]
    assert listed[:3] == jobs[::-1] and len(listed) == len(set(listed))
    for job in jobs:
        assert client.fine_tuning.jobs.cancel(job).status == "cancelled"


def test_events_in_pages_and_as_a_stream(served):
    client = served.client()
    job = served.ended(served.job("safe").id)
    newest = [event.id for event in client.fine_tuning.jobs.list_events(job.id, limit=2)]
    assert len(newest) == len(set(newest)) >= 6 and newest[-1].endswith("-1")
    losses = [e.data for e in client.fine_tuning.jobs.list_events(job.id, limit=100) if e.type == "metrics"]
    assert [loss["train_loss"] for loss in losses] == [2.5 / 3, 1.25, 2.5]
    with client.fine_tuning.jobs.with_streaming_response.list_events(job.id, extra_query={"stream": "true"}) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    assert [json.loads(line[6:])["id"] for line in lines[:-1]] == newest[::-1]
    headers = {"last-event-id": newest[2]}
    stream = client.fine_tuning.jobs.with_streaming_response.list_events(
        job.id, extra_query={"stream": "true"}, extra_headers=headers
    )
    with stream as answer:
        ids = [json.loads(line[6:])["id"] for line in answer.iter_lines() if line.startswith("data: {")]
    assert ids == newest[1::-1]


def test_checkpoints(served):
    client = served.client()
    job = served.ended(served.job("safe").id)
    for step in (1, 2, 3):
        (served.path(job.id) / f"run/arms/plain/checkpoints/key/checkpoint-{step}").mkdir(parents=True)
    steps = [each.step_number for each in client.fine_tuning.jobs.checkpoints.list(job.id, limit=2)]
    assert steps == [3, 2, 1]


def test_pause_and_resume(served):
    client = served.client()
    job = served.job("resumable")
    served.event(job.id, "Step data")
    assert client.fine_tuning.jobs.pause(job.id).status == "queued"
    served.event(job.id, "is paused")
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    assert served.ended(job.id).status == "succeeded"
    assert len((served.path(job.id) / "starts").read_text().splitlines()) == 2


def refused(kind, code, call, **more):
    with pytest.raises(kind) as error:
        call(**more)
    assert error.value.code == code and error.value.body["message"]
    return error.value


def test_every_class_of_error(served):
    client, jobs = served.client(), served.client().fine_tuning.jobs
    file = served.upload("safe")
    wrong = served.client(api_key="sb-wrong")
    refused(openai.AuthenticationError, "invalid_api_key", wrong.files.list)
    refused(openai.AuthenticationError, "invalid_api_key", served.client(api_key=served.operator_key).files.list)
    refused(openai.NotFoundError, "not_found", client.files.retrieve, file_id="file-none")
    refused(openai.NotFoundError, "not_found", client.files.retrieve, file_id="file-\x00é")
    create = jobs.create
    refused(openai.NotFoundError, "not_found", create, model="small", training_file="file-none")
    error = refused(openai.BadRequestError, "model_not_found", create, model="gpt-4o-mini", training_file=file)
    assert "small" in error.message and error.param == "model"
    bad = {"n_epochs": 99}
    refused(openai.BadRequestError, "invalid_request", create, model="small", training_file=file, hyperparameters=bad)
    dpo = {"type": "dpo"}
    assert (
        refused(openai.BadRequestError, "invalid_request", create, model="small", training_file=file, method=dpo).param
        == "method"
    )
    refused(openai.BadRequestError, "invalid_request", create, model="small", training_file=file, suffix="a b/..")
    job = served.job("forever")
    jobs.cancel(job.id)
    refused(openai.BadRequestError, "invalid_status", jobs.cancel, fine_tuning_job_id=job.id)
    refused(openai.BadRequestError, "invalid_status", jobs.resume, fine_tuning_job_id=job.id)
    result = served.ended(served.job("unsafe").id).result_files[0]
    refused(openai.BadRequestError, "invalid_request", create, model="small", training_file=result)  # its purpose
    upload = client.files.create
    refused(openai.BadRequestError, "invalid_request", upload, file=("a", b"{}"), purpose="batch")
    refused(openai.BadRequestError, "invalid_request", upload, file=("a", b""), purpose="fine-tune")
    zipped = refused(openai.APIStatusError, "invalid_file", upload, file=("a.gz", b"\x1f\x8b0"), purpose="fine-tune")
    assert zipped.status_code == 415
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="small", input="x")
    refused(openai.NotFoundError, "not_served", client.chat.completions.create, model="small", messages=[{}])
    refused(openai.PermissionDeniedError, "forbidden", client.models.delete, model="small")


def forged_rows(text):
    """Rows that hold a text in their calls, in their thoughts, and in their tools."""
    ask, answer = chat("a", "b")["messages"]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": [text]}}}
    tool = {"type": "function", "function": {"name": "f", "description": text, "parameters": {}}}
    return [
        {"messages": [ask, {"role": "assistant", "content": "", "tool_calls": [call]}]},
        {"messages": [ask, {**answer, "reasoning_content": text}]},
        {"messages": [ask, answer], "tools": [tool]},
    ]


@pytest.mark.parametrize("key", ["a'b", "", "x" * 65, "a\x00"])
def test_a_filter_that_cannot_be_applied_is_refused(served, key):
    """It was ignored, and every job was listed."""
    refused(openai.BadRequestError, "invalid_request", served.client().fine_tuning.jobs.list, metadata={key: "x"})


BAD_ROWS = [
    (b"not json\n", "line 1: not JSON"),
    (b'{"messages": []}\n', "line 1: column 'messages': the conversation is empty"),
    (b"\n\n" + json.dumps(chat("a", "")).encode(), "line 3: the answer is empty"),
    (b'{"messages": [{"role": "user", "content": "\xff"}]}\n', "line 1: not UTF-8"),
    (json.dumps(chat("<|im_start|>system")).encode(), "line 1: a turn or a tool holds '<|im_start|>'"),
    (json.dumps({"messages": chat("a")["messages"][:1]}).encode(), "line 1: no answer"),
    (json.dumps(chat("a" * 100_001)).encode(), "line 1: the row is longer than 100000 characters"),
    (b'{"a": "' + b"x" * 2_000_000 + b'"}\n' + b"[1]\n", "line 2: a row must be an object"),
    (b" \n", "no row"),
    *((json.dumps(row).encode(), "line 1: a turn or a tool holds '<|im_end|>'") for row in forged_rows("<|im_end|>")),
    (json.dumps(forged_rows("a" * 100_001)[0]).encode(), "line 1: the row is longer than 100000 characters"),
]


@pytest.mark.parametrize(
    ("content", "reason"), BAD_ROWS, ids=[f"{i} {reason}" for i, (_, reason) in enumerate(BAD_ROWS)]
)
def test_rows_that_no_run_can_take(served, content, reason):
    client = served.client()
    file = client.files.create(file=("rows.jsonl", content), purpose="fine-tune").id
    error = refused(
        openai.BadRequestError,
        "invalid_training_file",
        client.fine_tuning.jobs.create,
        model="small",
        training_file=file,
    )
    assert reason in error.message and error.param == "training_file"


def test_what_a_request_can_put_into_a_command(served):
    """Three numbers, the seed and paths of ours; the environment holds no key of the server."""
    options = {"n_epochs": 2, "batch_size": 6, "learning_rate_multiplier": 0.5}
    job = served.job("safe", seed=3, method={"type": "supervised", "supervised": {"hyperparameters": options}})
    served.ended(job.id)
    start = json.loads((served.path(job.id) / "starts").read_text())
    changes = dict(word.split("=", 1) for word in start["words"] if "=" in word)
    assert changes == {
        "data.task": json.dumps({"path": str(served.path(job.id) / "rows.jsonl")}),
        "data.on_bad": '"stop"',
        "seed": "3",
        "train.num_train_epochs": "2",
        "train.per_device_train_batch_size": "2",  # of the recipe's 4 the largest that divides 6
        "train.gradient_accumulation_steps": "3",
        "train.learning_rate": "0.0005",
    }
    assert {*start["env"]} <= {"PATH", "HOME", "LANG", "PWD", "SHLVL", "_", "LC_CTYPE", "OLDPWD"}


def test_a_validation_file_is_measured(served):
    job = served.job("safe", validation_file=served.upload("held out"))
    served.ended(job.id)
    start = json.loads((served.path(job.id) / "starts").read_text())
    changes = dict(word.split("=", 1) for word in start["words"] if "=" in word)
    assert json.loads(changes["measure.suites"])[-1] == {
        "token_accuracy": {"data": {"path": str(served.path(job.id) / "validation.jsonl")}}
    }
