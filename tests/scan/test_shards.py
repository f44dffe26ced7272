"""Several processes share the rows of a scan: each scores its batches into a journal of its own, and the first one writes the whole."""

import os
import subprocess
import sys
from types import SimpleNamespace

from aligned import aligned_model, refusals

from runs import prepare, start
from safebasin.data.tables import file_digest
from safebasin.scan import scorer
from safebasin.scan.scan import ScanJournal, scan

MODEL, TOKENIZER = aligned_model()
ROWS = refusals(TOKENIZER)
MADE, ANCHORS = {"it": scorer.make("gradshield")}, {"probe": ROWS, "harmful": ROWS[:2], "safe": ROWS[2:4]}


def rank(number: int, of: int) -> SimpleNamespace:
    """One of several processes, played one after another, the first one last: none has to wait."""
    return SimpleNamespace(
        process_index=number, num_processes=of, is_main_process=number == 0, wait_for_everyone=lambda: None
    )


def told(journal: ScanJournal | None) -> tuple[list[int], object]:
    asked: list[int] = []
    found = scan(
        MODEL,
        TOKENIZER,
        ROWS,
        MADE,
        ANCHORS,
        batch_size=2,
        journal=journal,
        progress=lambda done, _: asked.append(done),
    )
    return asked, found


def test_shares_make_up_the_whole_scan(tmp_path):
    """Five batches (six rows and four anchor rows): three processes score 2, 2 and 1. All that the first one returns is the undivided scan's."""
    batches = [len(told(ScanJournal(tmp_path / "journal.jsonl", "key", rank(number, 3)))[0]) for number in (2, 1)]
    asked, found = told(ScanJournal(tmp_path / "journal.jsonl", "key", rank(0, 3)))
    assert [len(asked), *reversed(batches)] == [2, 2, 1]
    assert found == told(None)[1]


def test_what_others_did_is_not_done_again(tmp_path):
    """A scan of two processes goes on with one: the journal of each is believed, one of another key is not, and in the end none is left."""
    path = tmp_path / "journal.jsonl"
    told(ScanJournal(path, "key", rank(1, 2)))
    (tmp_path / "journal-7.jsonl").write_text('other\n{"rows": [0], "scores": {"it": [9.0]}}\n')
    journal = ScanJournal(path, "key")
    asked, found = told(journal)
    assert asked == [6, 8, 10] and found == told(None)[1]
    journal.clear()
    assert not list(tmp_path.iterdir())


def test_two_processes_write_the_file_of_one(tmp_path):
    """torchrun and gloo, over the command line, against one process: the same bytes."""
    made = prepare(tmp_path, 200)
    alone = start(*made, tmp_path / "one")
    model, rows, probe = map(str, made)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "safebasin",
        "scan",
        rows,
    ]
    command += ["--model", model, "--probe", probe, "--out", str(tmp_path / "two"), "--batch-size", "32"]
    both = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert both.returncode == 0, both.stderr[-3000:]
    assert both.stdout.count("scores: ") == 1
    error = alone.communicate()[1]
    assert alone.returncode == 0, error.decode()[-2000:]
    for name in ("scores.parquet", "anchors.json", "heat.json"):
        assert file_digest(tmp_path / "one" / "scan" / name) == file_digest(tmp_path / "two" / "scan" / name), name
    assert not list((tmp_path / "two" / "scan").glob("journal*"))
