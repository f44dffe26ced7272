"""Chat completions: ownership, the name of the model, streams, and an endpoint that fails."""

import json
from pathlib import Path

import openai
import pytest
from chat_server import Served as Endpoint
from service_server import Served, in_thread


@pytest.fixture(scope="module")
def proxied(tmp_path_factory, templates):
    """A server in front of an endpoint whose answers a test sets."""
    folder = tmp_path_factory.mktemp("proxied")
    endpoint = Endpoint(lambda *request: endpoint.reply(*request))
    endpoint.reply = says
    serving = {"url": endpoint.url, "name": "path"}
    with in_thread(Served(folder, templates, serving=serving)) as served:
        served.endpoint = endpoint
        yield served
    endpoint.kill()


@pytest.fixture(scope="module")
def tuned(proxied):
    return proxied.ended(proxied.job("safe").id).fine_tuned_model


def says(_, request, text="billing"):
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    answer = {"id": "x", "object": "chat.completion", "created": 1, "model": request["model"], "choices": [choice]}
    return 200, json.dumps(answer).encode(), ("Content-Type", "application/json")


def streams(_, request):
    chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": request["model"]}
    parts = [{"index": 0, "delta": {"content": text}, "finish_reason": None} for text in ("bil", "ling")]
    lines = "".join(f"data: {json.dumps({**chunk, 'choices': [part]})}\n\n" for part in parts)
    return 200, (lines + "data: [DONE]\n\n").encode(), ("Content-Type", "text/event-stream")


ASK = [{"role": "user", "content": "My parcel \U0001f600 is lost"}]


def test_a_tuned_model_answers(proxied, tuned):
    proxied.endpoint.reply = says
    answer = proxied.client().chat.completions.create(model=tuned, messages=ASK, temperature=0, max_tokens=5)
    assert answer.choices[0].message.content == "billing" and answer.model == tuned
    path, request = proxied.endpoint.seen[-1]
    assert path == "/v1/chat/completions" and set(request) == {"model", "messages", "temperature", "max_tokens"}
    served = Path(request["model"])
    assert served.parent == proxied.settings.folder / "models" and (served / "adapter_config.json").is_file()
    assert "sb-" not in str(proxied.endpoint.headers[-1])  # no key of a customer goes on


def test_the_base_and_its_name_there(proxied):
    proxied.endpoint.reply = says
    assert proxied.client().chat.completions.create(model="small", messages=ASK).model == "small"
    assert proxied.endpoint.seen[-1][1]["model"] == "base"


def test_a_stream(proxied, tuned):
    proxied.endpoint.reply = streams
    chunks = list(proxied.client().chat.completions.create(model=tuned, messages=ASK, stream=True))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "billing"
    assert {chunk.model for chunk in chunks} == {tuned}


def test_a_foreign_model_is_not_asked(proxied, tuned):
    before = len(proxied.endpoint.seen)
    with pytest.raises(openai.NotFoundError):
        proxied.client("other").chat.completions.create(model=tuned, messages=ASK)
    with pytest.raises(openai.BadRequestError):
        proxied.client().chat.completions.create(model=tuned, messages=ASK, extra_body={"lora_path": "/etc"})
    assert len(proxied.endpoint.seen) == before


@pytest.mark.parametrize(("status", "kind"), [(500, 503), (404, 503), (401, 503), (400, 400), (422, 422), (0, 503)])
def test_an_endpoint_that_fails(proxied, tuned, status, kind):
    proxied.endpoint.reply = lambda _, request: (status, f"no such {request['model']}".encode())
    with pytest.raises(openai.APIStatusError) as error:
        proxied.client().chat.completions.create(model=tuned, messages=ASK)
    assert error.value.status_code == kind and str(proxied.folder) not in error.value.message


@pytest.mark.parametrize("body", [b"", b"[]", b"not json", b"null"])
def test_an_endpoint_that_answers_nonsense(proxied, tuned, body):
    proxied.endpoint.reply = lambda *_: (200, body)
    with pytest.raises(openai.APIStatusError) as error:
        proxied.client().chat.completions.create(model=tuned, messages=ASK)
    assert error.value.status_code == 503


def test_a_deleted_model_is_gone_from_the_endpoint(proxied):
    model = proxied.ended(proxied.job("safe").id).fine_tuned_model
    folder = proxied.settings.folder / "models" / model.rpartition(":")[2]
    assert folder.is_dir()
    proxied.client().models.delete(model)
    assert not folder.exists()
    with pytest.raises(openai.NotFoundError):
        proxied.client().chat.completions.create(model=model, messages=ASK)
