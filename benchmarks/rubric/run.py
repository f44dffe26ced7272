"""The rubric judge against a live ``transformers serve``, killed in the middle. One command: ``python benchmarks/rubric/run.py``.

It needs what ``transformers[serving]`` adds (fastapi, uvicorn, openai). The server is real and local, and so is its end: a signal that cannot be
caught, sent between two answers of one call. Floor: a reply takes one forward over the rubric's 350 tokens and one for each new token.

What must hold is the same whatever the model says: no crash, and no answer after the kill is "safe" (or anything else). How many replies before it
hold a rating is a fact about the served model; one of 135 million parameters in 8 tokens rates hardly anything, which is *unscored* too.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
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
from typing import Any

from safebasin.data.builtin import OPENERS, rows_of
from safebasin.data.tables import write_json
from safebasin.errors import UserError
from safebasin.measure.judge import Verdict, rule
from safebasin.measure.rubric import Rubric
from safebasin.measure.subject import count
from safebasin.models.bundled import resolve

HERE = Path(__file__).parent
SERVE = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]


@contextlib.contextmanager
def served(folder: str, log: Path, patience: float) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server of one model on a free port, and its process. It is gone after the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("wb") as out:
        quiet = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        process = subprocess.Popen(
            [*SERVE, folder, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            stdout=out,
            stderr=out,
            env=quiet,
        )
        try:
            until = time.monotonic() + patience
            while not healthy(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None or time.monotonic() > until:
                    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
                    raise UserError(
                        f"transformers serve did not start ({' '.join(last) or 'no word'}); pip install 'transformers[serving]'"
                    )
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
    """Answers; before number ``at`` is given out, something happens."""

    def __init__(self, answers: Sequence[str], at: int, happens: Callable[[], Any]):
        super().__init__(answers)
        self.at, self.happens = at, happens

    def __iter__(self) -> Iterator[str]:
        for i in range(len(self)):
            if i == self.at:
                self.happens()
            yield self[i]


class Judge:
    """The rubric, whose server ends before answer number ``at``. ``heard``: the bytes of every reply that came."""

    def __init__(self, rubric: Rubric, at: int, process: subprocess.Popen[bytes]):
        self.rubric, self.at, self.process = rubric, at, process

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def score(self, answers: Sequence[str], prompts: Sequence[str] = ()) -> list[float | None]:
        return self.rubric.score(Interrupted(answers, self.at, self.kill), prompts)


def first_words(url: str, model: str, tokens: int) -> str:
    """What the server says to a greeting: proof that it answers at all."""
    body = json.dumps(
        {"model": model, "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": tokens}
    ).encode()
    request = urllib.request.Request(f"{url}/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def main(words: Sequence[str] | None = None) -> None:
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--model", default="builtin:smollm2-aligned", help="the model that is served as the judge")
    ask.add_argument("--answers", type=int, default=10, help="refusals and openers in turn")
    ask.add_argument("--kill", type=int, default=5, help="answers before the server's end")
    ask.add_argument("--tokens", type=int, default=8, help="of a reply")
    ask.add_argument("--timeout", type=float, default=120.0, help="seconds a reply, and until the server is up")
    ask.add_argument("--out", type=Path, default=HERE / "results.json")
    asked = ask.parse_args(words)
    if not 0 < asked.kill < asked.answers:
        ask.error("--kill lies between the first and the last answer")
    rows = rows_of("refusals")[: asked.answers]
    prompts = [row["prompt"] for row in rows]
    answers = [row["completion"] if i % 2 else OPENERS[i % len(OPENERS)] for i, row in enumerate(rows)]
    folder = resolve(asked.model)
    with tempfile.TemporaryDirectory() as place, served(folder, Path(place) / "log", asked.timeout) as (url, process):
        greeting = first_words(url, folder, asked.tokens)
        settings = {"temperature": 0, "max_tokens": asked.tokens}
        rubric = Rubric(
            url=url, model=folder, settings=settings, timeout=asked.timeout, tries=2, wait=0.1, cache=f"{place}/ratings"
        )
        began = time.perf_counter()
        verdicts = [ruling.verdict for ruling in rule(Judge(rubric, asked.kill, process), answers, (), prompts)]
        seconds = time.perf_counter() - began
    before, after = verdicts[: asked.kill], verdicts[asked.kill :]
    measured = count("asr", "asr", Verdict.COMPLIED, verdicts, judge="rubric")
    facts = {
        "model": asked.model,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "date": datetime.date.today().isoformat(),
    }
    records = [
        ("greeting.characters", len(greeting.strip()), 1, ">= 1", "characters of a reply before the rubric was asked"),
        ("before_kill.rated", sum(v is not Verdict.UNSCORED for v in before), len(before), None, "answers"),
        ("after_kill.unscored", sum(v is Verdict.UNSCORED for v in after), len(after), f"= {len(after)}", "answers"),
        ("after_kill.safe", sum(v is Verdict.REFUSED for v in after), len(after), "= 0", "answers"),
        ("asr.unscored", measured.unscored, len(verdicts), f">= {len(after)}", "answers"),
        ("asr", measured.value, measured.n, None, "share"),
        ("seconds", round(seconds, 1), len(verdicts), None, "s"),
    ]
    told = [
        {"what": what, "value": value, "interval": None, "n": n, "goal": goal, "unit": unit} | facts
        for what, value, n, goal, unit in records
    ]
    told[-2]["interval"] = None if measured.low is None else [round(measured.low, 4), round(measured.high, 4)]
    write_json(asked.out, told)
    for record in told:
        print(
            f"{record['what']:24} {'not scored' if record['value'] is None else record['value']!s:>10}  n {record['n']}  {record['goal'] or ''}"
        )


if __name__ == "__main__":
    main()
