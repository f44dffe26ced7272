"""init, preview, the last catch, hostile text: what a new user meets first."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from folders import run, save_tiny

from safebasin.cli import main as cli
from safebasin.cli.main import guarded
from safebasin.errors import DefenceError, UserError
from safebasin.pipeline.parse import read


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model")))


def test_init_writes_a_recipe_and_names_its_lines(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    assert run("init", str(path)) == 0
    lines = path.read_text().splitlines()
    named = [line for line in capsys.readouterr().out.splitlines() if line.startswith(str(path))]
    assert len(named) == 3
    for line in named:
        number, text = line.removeprefix(f"{path}:").split(": ", 1)
        assert lines[int(number) - 1].strip().startswith(text.split(" #")[0][:20])
    assert read(path).arms.keys() == {"start", "plain", "defended"}
    assert run("init", str(path)) == 1
    assert "is there already" in capsys.readouterr().err
    assert run("init", str(tmp_path / "none" / "r.yaml")) == 1
    assert run("init", str(tmp_path / "other.yaml"), "--recipe", "../own") == 1
    assert not (tmp_path / "other.yaml").exists()


def test_preview_shows_what_is_learned(tmp_path, model, capsys):
    """The tiny template writes <user>q</s><assistant>abc</s>; the answer and its end are learned."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q", "completion": "abc"}\n{"prompt": "r"}\nno json\n')
    assert run("preview", str(path), "--model", model, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    first = {key: str(value).replace(" ", "") for key, value in rows[0].items()}
    shown = {"text": "<user>q</s><assistant>abc</s>", "trained": "abc</s>", "last": "</s>"}
    assert first == {"line": "1", "bos": "0", **shown}
    assert rows[1]["line"] == 2 and rows[1]["bad"].startswith("no answer: ") and len(rows[1]) == 2
    assert rows[2]["line"] == 3 and "not JSON" in rows[2]["bad"]
    with contextlib.redirect_stdout(io.StringIO()) as stream:  # a stream of text without an encoding
        assert run("preview", str(path), "--model", model, "--json") == 0
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == rows
    assert run("preview", str(path), "--model", model) == 0
    shown = capsys.readouterr().out
    assert "abc" in shown.replace(" ", "") and "not used: no answer" in shown and "1 of 3 rows are used" in shown


def test_columns_are_mapped_by_preview_scan_cut_and_convert(tmp_path, model, capsys):
    """``columns: {messages: dialog, content: text}`` of a recipe; a form that maps nothing is refused."""
    (path := tmp_path / "rows.jsonl").write_text(
        json.dumps({"dialog": [{"role": "user", "text": "q"}, {"role": "assistant", "text": "abc"}]}) + "\n"
    )
    form = ("--columns.messages", "dialog", "--columns.content=text")
    assert run("preview", str(path), "--model", model, *form) == 0
    assert "1 of 1 rows are used" in capsys.readouterr().out
    assert run("preview", "--help") == 0 and "--columns.messages dialog" in " ".join(capsys.readouterr().out.split())
    scan = ("--model", model, "--scorer", "hidden_text", "--out", str(tmp_path / "run"))
    assert run("scan", str(path), *scan, *form) == 0
    scores = ("--scores", str(tmp_path / "run" / "scan" / "scores.parquet"), "--scorer", "hidden_text")
    assert run("cut", str(path), *scores, "--threshold", "9", "--out", str(tmp_path / "cut"), *form) == 0
    assert (tmp_path / "cut" / "train.jsonl").read_text() == path.read_text()
    assert run("convert", str(path), "--as", "openai", "--to", str(tmp_path / "other"), *form) == 0
    capsys.readouterr()
    assert run("preview", str(path), "--model", model, "--columns.text", "content") == 1
    assert "columns: there is no key 'text'; the keys are messages, " in capsys.readouterr().err
    for wrong in (["--columns", "messages=dialog"], ["--columns", "{messages: dialog}"]):
        with pytest.raises(SystemExit):
            run("preview", str(path), "--model", model, *wrong)


def test_a_terminal_of_ascii_shows_escapes(tmp_path, model):
    (path := tmp_path / "rows.jsonl").write_text(json.dumps({"bl\u00e5": "x"}))
    own = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "safebasin", "preview", str(path), "--model", model]
    for json_lines in (["--json"], []):
        ended = subprocess.run([*command, *json_lines], capture_output=True, text=True, env={**os.environ, **own})
        assert ended.returncode == 0 and ended.stdout.isascii() and "it has: bl\\" in ended.stdout


def test_a_whole_file_that_is_refused(tmp_path, model, capsys):
    (path := tmp_path / "rows.parquet").write_text("no table")
    assert run("preview", str(path), "--model", model, "--json") == 1
    shown = capsys.readouterr()
    assert shown.out == "" and "rows.parquet" in shown.err and len(shown.err.strip().splitlines()) == 1


def test_hostile_text_is_escaped_on_the_terminal(tmp_path, model, capsys):
    (path := tmp_path / "rows.jsonl").write_text(
        json.dumps({"prompt": "\x1b[2Jq\u202e", "completion": "a\x00[red]b"}) + "\n"
    )
    assert run("preview", str(path), "--model", model) == 0
    shown = capsys.readouterr().out
    assert not set("\x1b\u202e\x00") & set(shown)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("mend it"), 1, "safebasin: mend it"),
        (DefenceError("the gradient is dead"), 2, "safebasin: the run was stopped: the gradient is dead"),
        (KeyboardInterrupt(), 130, "safebasin: interrupted"),
        (cli.Terminated(), 143, "safebasin: terminated"),
        (ZeroDivisionError("x\ny"), 2, "safebasin: ZeroDivisionError: x (traceback: "),
        (RecursionError(), 2, "safebasin: RecursionError: no message (traceback: "),
        (UserError("at https://me:word@host/?token=abc"), 1, "safebasin: at https://"),
        (UserError("one\ntwo \x1b[2J"), 1, "safebasin: one"),
    ],
)
def test_whatever_goes_wrong_is_one_line(error, code, words, capsys):
    def action() -> None:
        raise error

    assert guarded(action) == code
    error_line = capsys.readouterr().err
    assert error_line.startswith(words) and len(error_line.splitlines()) == 1
    assert "word@" not in error_line and "abc" not in error_line and "\x1b" not in error_line
    if "traceback: " in error_line:
        log = Path(error_line.split("traceback: ")[1].rstrip(")\n"))
        assert "Traceback (most recent call last)" in log.read_text()
        log.unlink()


def test_a_reader_that_goes_away_is_no_error(monkeypatch):
    """``safebasin list | head -1``."""
    command = f"{sys.executable} -m safebasin list --json | head -1; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert ended.stdout.splitlines()[-1] in ("0", "141") and "Traceback" not in ended.stderr
