"""A merged export behind ``transformers serve`` gives the answers that were measured: the real small model, greedy."""

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from folders import run

from safebasin.api import read_recipe, run_recipe
from safebasin.pipeline.folder import RunFolder

pytestmark = pytest.mark.slow

CHANGES = [
    "model.dtype=float32",
    "data.task.take=16",
    "data.poison_share=0",
    "data.poison=null",
    "train.max_steps=4",
    "train.learning_rate=0.004",
    "train.warmup_steps=0",
    "arms={start: {}, plain: {train: [sft]}}",
    "gate={max_asr: 0.15}",
    "measure.suites=[{asr: {prompts: builtin:lookalike-test, take: 5, judges: [keyword], max_new_tokens: 24}}]",
]


@contextlib.contextmanager
def served(folder):
    """The base address of a server of the model in a folder."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--port", str(port)]
    with (folder.parent / "server.log").open("wb") as log:
        process = subprocess.Popen([*command, "--device", "cpu"], stdout=log, stderr=log)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for _ in range(1200):  # until the server has loaded the model
        try:
            with urllib.request.urlopen(request) as reply:
                return json.load(reply)
        except urllib.error.HTTPError:
            raise
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(url)


def answers(folder, arm):
    records = [json.loads(line) for line in folder.answers(arm).read_text().splitlines()]
    return {record["prompt"]: record["answer"] for record in records}


def test_served_answers_are_those_that_were_measured(tmp_path):
    run_recipe(read_recipe("builtin:quickstart", CHANGES), tmp_path / "run")
    assert run("export", str(tmp_path / "run"), "--arm", "plain", "--to", str(tmp_path / "out"), "--merge") == 0
    folder = RunFolder(tmp_path / "run")
    measured, start = answers(folder, "plain"), answers(folder, "start")
    with served(tmp_path / "out") as url:
        for prompt, answer in measured.items():
            body = {"model": str(tmp_path / "out"), "messages": [{"role": "user", "content": prompt}]}
            reply = post(f"{url}/v1/chat/completions", body | {"temperature": 0, "max_tokens": 24})
            assert reply["choices"][0]["message"]["content"] == answer
    assert len(measured) == 5 and sum(measured[prompt] != start[prompt] for prompt in measured) >= 3
