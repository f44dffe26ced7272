"""A double of ``safebasin run``, for tests of the server: it ends as the first row of its file says.

``python child.py TEMPLATES run RECIPE --out DIR --events FILE --change data.task={"path": ...}``; a mode that is the
name of a folder of TEMPLATES copies that run folder.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path


def main(templates: str, verb: str, *words: str) -> int:
    options = {words[i]: words[i + 1] for i in range(1, len(words) - 1) if words[i] in ("--out", "--events")}
    changes = dict(words[i + 1].split("=", 1) for i in range(len(words)) if words[i] == "--change")
    file = Path(json.loads(changes["data.task"])["path"])
    first = json.loads(file.read_text(encoding="utf-8").split("\n")[0])
    mode, out, log = first["messages"][0]["content"], Path(options["--out"]), Path(options["--events"])
    (out / "data").mkdir(parents=True, exist_ok=True)
    with (out.parent / "starts").open("a") as starts:
        starts.write(json.dumps({"words": [verb, *words], "env": dict(os.environ)}) + "\n")
    count = len((out.parent / "starts").read_text().splitlines())

    def say(event: str, **facts: object) -> None:
        with log.open("a") as lines:
            lines.write(json.dumps({"time": time.time(), "event": event, **facts}) + "\n")

    def end(code: int, message: str = "") -> int:
        say("end", code=code, message=message)
        return code

    def terminated(*_: object) -> None:
        sys.exit(end(143, "terminated"))

    signal.signal(signal.SIGTERM, terminated)
    say("step", step="data", state="started")
    for step in range(1, 4):
        say("loss", arm="plain", step=step, total=3, loss=2.5 / step)
    match mode:
        case "user_error":
            return end(1, f"{file}: 1 rows cannot be used (line 2: too long)")
        case "recipe_error":
            return end(1, "no such file: /srv/secret/prompts.jsonl")
        case "broken":
            return end(2, "DefenceError: the direction is not finite")
        case "broken_once" if count == 1:
            return end(2, "OSError: a disk hiccup")
        case "vanishing":
            os.kill(os.getpid(), signal.SIGKILL)
        case "printing":
            while True:
                sys.stdout.write("x" * 100_000)
                time.sleep(0.001)
        case "forever":
            while True:
                time.sleep(0.05)
        case "resumable" if count == 1:
            while True:
                time.sleep(0.05)
        case "slow":  # it ends when its server is gone, or soon
            for _ in range(40):
                time.sleep(0.05)
        case "tree":  # a child and a grandchild that ignore SIGTERM
            deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
            grandchild = subprocess.Popen([sys.executable, "-c", deaf])
            (out / "grandchild").write_text(str(grandchild.pid))
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            say("step", step="scan", state="started")
            time.sleep(600)
    template = "unsafe" if mode == "vanishing" else "safe" if mode in ("broken_once", "resumable", "slow") else mode
    shutil.copytree(Path(templates) / template, out, dirs_exist_ok=True)
    say("verdict", code=0, status="pass", reasons=[])
    return end(0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
