"""Several processes share the rows of a scan: each scores batches into a journal of its own, and rank 0 writes all."""

import os
import subprocess
import sys

import pytest
from accelerate import PartialState
from aligned import aligned_model, refusals
from runs import prepare, start

from safebasin.data.files import file_digest
from safebasin.errors import DefenceError
from safebasin.scan import scorer
from safebasin.scan.journal import ScanJournal
from safebasin.scan.scan import score_rows

MODEL, TOKENIZER = aligned_model()
ROWS = refusals(TOKENIZER)
SCORERS, ANCHORS = {"it": scorer.make("gradshield")}, {"probe": ROWS, "harmful": ROWS[:2], "safe": ROWS[2:4]}


class Rank(PartialState):
    """One of several processes, played one after another, rank 0 last: none has to wait."""

    def __init__(self, number: int, of: int):  # all instances of the real one share their state
        self.process_index, self.num_processes = number, of

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    def wait_for_everyone(self) -> None:
        pass


def scanned(journal: ScanJournal | None) -> tuple[list[int], object]:
    counts: list[int] = []
    result = score_rows(
        MODEL,
        TOKENIZER,
        ROWS,
        SCORERS,
        ANCHORS,
        batch_size=2,
        journal=journal,
        progress=lambda done, _: counts.append(done),
    )
    return counts, result


def test_shares_make_up_the_scan(tmp_path):
    """Five batches (six rows and four anchor rows): three processes score 2, 2 and 1. Rank 0 returns the undivided
    scan."""
    batches = [len(scanned(ScanJournal(tmp_path / "journal.jsonl", "key", Rank(number, 3)))[0]) for number in (2, 1)]
    counts, result = scanned(ScanJournal(tmp_path / "journal.jsonl", "key", Rank(0, 3)))
    assert [len(counts), *reversed(batches)] == [2, 2, 1]
    assert result == scanned(None)[1]


def test_rows_that_nobody_scored_stop_the_scan(tmp_path):
    """Rank 0 of three scores four of ten rows; the others have written nothing, or a line that is damaged."""
    (tmp_path / "journal-1.jsonl").write_text('key\n{"rows": [4, 5, 6')
    with pytest.raises(DefenceError, match="6 rows have no score"):
        scanned(ScanJournal(tmp_path / "journal.jsonl", "key", Rank(0, 3)))


def test_what_others_did_is_not_done_again(tmp_path):
    """A scan of two processes goes on with one: the journal of each counts, one of another key does not; in the end
    none is left, and nothing of a write that a kill cut short."""
    path = tmp_path / "journal.jsonl"
    scanned(ScanJournal(path, "key", Rank(1, 2)))
    (tmp_path / "journal-7.jsonl").write_text('other\n{"rows": [0], "scores": {"it": [9.0]}}\n')
    (tmp_path / "journal.jsonl.17.part").write_text("key")
    journal = ScanJournal(path, "key")
    counts, result = scanned(journal)
    assert counts == [6, 8, 10] and result == scanned(None)[1]
    journal.clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(tmp_path):
    """torchrun and gloo, over the command line, against one process: the same bytes."""
    files = prepare(tmp_path, 200)
    alone = start(*files, tmp_path / "one")
    model, rows, probe = map(str, files)
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
