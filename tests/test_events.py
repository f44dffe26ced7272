"""The events of a run: JSON lines that another program reads while the run goes on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from folders import run

from safebasin import console, events
from safebasin.cli.main import Terminated, guarded
from safebasin.errors import DefenceError, UserError


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_and_the_end(tmp_path):
    path = tmp_path / "new" / "events.jsonl"
    events.open_log(path)
    events.emit("step", step="data", state="started")
    events.close_log(0)
    events.emit("step", step="scan", state="started")  # no log is open: nothing
    first, last = lines(path)
    assert first["event"] == "step" and first["step"] == "data" and first["time"] > 1.7e9
    assert (last["event"], last["code"], last["message"]) == ("end", 0, "")


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError, 1), (DefenceError, 2), (ZeroDivisionError, 2), (KeyboardInterrupt, 130), (Terminated, 143)],
)
def test_the_end_has_the_exit_code(tmp_path, error, code):
    def action():
        events.open_log(tmp_path / "events")
        raise error("token=abc why")

    assert guarded(action) == code
    [end] = lines(tmp_path / "events")
    assert end["code"] == code and end["message"] and "abc" not in end["message"]


def test_a_broken_line_is_closed(tmp_path):
    path = tmp_path / "events"
    path.write_text('{"event": "st')
    events.open_log(path)
    events.close_log(0)
    broken, end = path.read_text().splitlines()
    assert broken == '{"event": "st' and json.loads(end)["event"] == "end"


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"--events .*: cannot write"):
        events.open_log(tmp_path)
    events.open_log(Path("/dev/full"))
    with pytest.raises(UserError, match=r"--events .*: cannot write: No space"):
        events.emit("step")
    events.close_log(1)  # says nothing more


def test_progress_every_five_seconds_and_at_the_end(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    events.open_log(tmp_path / "events")
    with console.progress("scan", 20) as advance:
        for done in range(1, 21):
            now[0] = float(done)
            advance(done, "")
    events.close_log(0)
    done = [each["done"] for each in lines(tmp_path / "events") if each["event"] == "progress"]
    assert done == [6, 12, 18, 20]


def test_a_refused_recipe_has_an_end(tmp_path):
    (tmp_path / "bad.yaml").write_text("data: 3\n")
    assert run("run", str(tmp_path / "bad.yaml"), "--events", str(tmp_path / "events")) == 1
    [end] = lines(tmp_path / "events")
    assert end["code"] == 1 and "bad.yaml" in end["message"]


@pytest.mark.slow
def test_a_run_and_its_rerun(tmp_path):
    """A tiny product: every step is started and done, every optimizer step has a loss, the verdict is the report's.

    The rerun skips every step. SIGTERM ends a run with code 143."""
    from product import product

    recipe, path = product(tmp_path), tmp_path / "events.jsonl"
    command = [
        sys.executable,
        "-m",
        "safebasin",
        "run",
        str(recipe),
        "--out",
        str(tmp_path / "out"),
        "--events",
        str(path),
    ]
    assert subprocess.run(command, capture_output=True).returncode == 0
    seen = lines(path)
    steps = [(each["step"], each["state"]) for each in seen if each["event"] == "step"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert steps == [(name, state) for name in manifest["steps"] for state in ("started", "done")]
    for arm in {each["arm"] for each in seen if each["event"] == "loss"}:
        facts = json.loads((tmp_path / "out" / "arms" / arm / "train.json").read_text())
        losses = [[each["step"], each["loss"]] for each in seen if each["event"] == "loss" and each["arm"] == arm]
        assert len(losses) == facts["steps"]
    verdict, end = seen[-2:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())["verdict"]
    assert verdict["event"] == "verdict" and {key: verdict[key] for key in report} == report
    assert (end["event"], end["code"]) == ("end", 0)
    path.unlink()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not path.exists() or b'"step"' not in path.read_bytes():
        assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    code = child.wait()
    assert code in (0, 143) and lines(path)[-1]["code"] == code  # 0: it was faster than the signal
    assert {each["state"] for each in lines(path) if each["event"] == "step"} == {"skipped"}
