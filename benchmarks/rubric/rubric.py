"""The rubric judge against a live ``transformers serve`` that is killed while it answers.

Needs what ``transformers[serving]`` adds (fastapi, uvicorn, openai). The server is real and local. It ends by SIGKILL,
between two answers of one call. Floor: a reply takes one forward pass over the rubric's 350 tokens and one for each new
token.

Whatever the model replies, two things must hold: no crash, and no answer after the kill is "safe" (or anything else).
How many replies before the kill hold a rating is a fact about the served model; one of 135 million parameters in 8
tokens rates hardly anything, which is *unscored* too.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from benchmarks.harness import Bench, experiment
from safebasin.data.builtin import OPENERS, rows_of
from safebasin.errors import UserError
from safebasin.measure.judges.rubric import Rubric
from safebasin.measure.judging import Verdict, judge_answers
from safebasin.measure.subject import count
from safebasin.models.bundled import resolve

SERVE = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]


@contextlib.contextmanager
def served(folder: str, log: Path, patience: float) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The URL and the process of a server of one model on a free port; it is gone after the block.

    Raises:
        UserError: it does not answer within ``patience`` seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*SERVE, folder, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=quiet)
        try:
            until = time.monotonic() + patience
            while not healthy(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None or time.monotonic() > until:
                    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
                    reason = " ".join(last) or "it printed nothing"
                    raise UserError(f"transformers serve did not start ({reason}); pip install 'transformers[serving]'")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1", process
        finally:
            process.kill()
            process.wait()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


class Interrupted(list):
    """Answers; before number ``at`` is given out, ``event`` is called."""

    def __init__(self, answers: Sequence[str], at: int, event: Callable[[], Any]):
        super().__init__(answers)
        self.at, self.event = at, event

    def __iter__(self) -> Iterator[str]:
        for i in range(len(self)):
            if i == self.at:
                self.event()
            yield self[i]


class Judge:
    """The rubric, whose server is killed before answer number ``at``."""

    def __init__(self, rubric: Rubric, at: int, process: subprocess.Popen[bytes]):
        self.rubric, self.at, self.process = rubric, at, process

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def score(self, answers: Sequence[str], prompts: Sequence[str] = ()) -> list[float | None]:
        return self.rubric.score(Interrupted(answers, self.at, self.kill), prompts)


def greeting(url: str, model: str, tokens: int) -> str:
    """What the server replies to "Hello": proof that it answers at all."""
    messages = [{"role": "user", "content": "Hello"}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": tokens}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)["choices"][0]["message"]["content"]


@experiment("rubric", quick={"answers": 4, "kill": 2, "tokens": 4})
def rubric(
    *,
    bench: Bench,
    model: Annotated[str, Parameter(help="the model that is served as the judge")] = "builtin:smollm2-aligned",
    answers: Annotated[int, Parameter(help="refusals and openers in turn")] = 10,
    kill: Annotated[int, Parameter(help="answers before the server is killed")] = 5,
    tokens: Annotated[int, Parameter(help="of a reply")] = 8,
    timeout: Annotated[float, Parameter(help="seconds a reply may take, and the server to start")] = 120.0,
) -> None:
    """What does a judge behind an endpoint do when its server is killed?"""
    if not 0 < kill < answers:
        raise UserError("--kill lies between the first and the last answer")
    rows = rows_of("refusals")[:answers]
    prompts = [row["prompt"] for row in rows]
    texts = [row["completion"] if i % 2 else OPENERS[i % len(OPENERS)] for i, row in enumerate(rows)]
    folder = resolve(model)
    with tempfile.TemporaryDirectory() as place, served(folder, Path(place) / "log", timeout) as (url, process):
        characters = len(greeting(url, folder, tokens).strip())
        settings = {"temperature": 0, "max_tokens": tokens}
        endpoint = Rubric(
            url=url, model=folder, settings=settings, timeout=timeout, tries=2, wait=0.1, cache=f"{place}/ratings"
        )
        began = time.perf_counter()
        judged = judge_answers(Judge(endpoint, kill, process), texts, (), prompts)
        verdicts = [judgement.verdict for judgement in judged]
        duration = time.perf_counter() - began
    before, after = verdicts[:kill], verdicts[kill:]
    unscored = [sum(v is Verdict.UNSCORED for v in part) for part in (before, after)]
    safe = sum(v is Verdict.REFUSED for v in after)
    asr = count("asr", "asr", Verdict.COMPLIED, verdicts, judge="rubric")
    bench.facts |= {"model": model}
    reply = "characters of a reply before the rubric was asked"
    bench.record("greeting.characters", characters, n=1, unit=reply, goal=">= 1")
    bench.record("before_kill.rated", len(before) - unscored[0], n=len(before), unit="answers")
    bench.record("after_kill.unscored", unscored[1], n=len(after), unit="answers", goal=f"= {len(after)}")
    bench.record("after_kill.safe", safe, n=len(after), unit="answers", goal="= 0")
    bench.record("asr.unscored", asr.unscored, n=len(verdicts), unit="answers", goal=f">= {len(after)}")
    bench.record("asr", asr.value, None if asr.low is None else (asr.low, asr.high), n=asr.n, unit="share")
    bench.record("seconds", round(duration, 1), n=len(verdicts), unit="s")
