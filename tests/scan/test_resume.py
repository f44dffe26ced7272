"""A scan that is killed goes on where it was, and ends with the file that it would have written."""

import json

import pytest
from aligned import aligned_model, refusals
from runs import trial

from safebasin.scan import scorer
from safebasin.scan.journal import ScanJournal
from safebasin.scan.scan import Scanned, score_rows

MODEL, TOKENIZER = aligned_model()
ROWS = refusals(TOKENIZER)


def run(path, key, name="self_refusal"):
    """The rows that were scored, counted after each batch, and the scores."""
    counts: list[int] = []
    scanned = score_rows(
        MODEL,
        TOKENIZER,
        ROWS,
        {"it": scorer.make(name)},
        {"probe": ROWS},
        batch_size=2,
        journal=ScanJournal(path, key),
        progress=lambda done, _: counts.append(done),
    )
    return counts, scanned


@pytest.mark.slow
def test_killed_twice(tmp_path):
    """SIGKILL at random points; the benchmark ``kill`` does it ten times on 20,000 rows."""
    outcome = trial(tmp_path, 600, 2)
    assert outcome["kills"] >= 1 and outcome["journal_lines_at_last_kill"] > 1


def test_half_a_line_and_another_key_are_cut_off(tmp_path):
    """What is in the journal is not scored again; a torn last line is; a journal of other rows counts for nothing."""
    path = tmp_path / "journal.jsonl"
    assert run(path, "a")[0] == [2, 4, 6] and run(path, "a")[0] == []
    before = path.read_bytes()
    path.write_bytes(before[:-7])
    assert run(path, "a")[0] == [6] and path.read_bytes() == before
    assert run(path, "b")[0] == [2, 4, 6]
    first = json.loads(path.read_text().splitlines()[1])
    assert set(first) == {"rows", "scores"} and len(first["scores"]["it"]) == 2


DAMAGED = [
    b"",
    b"\0" * 80,
    b"\xff\xfe garbage",
    b"not JSON",
    b"null",
    b"[]",
    b"17",
    b"{}",
    b'{"rows": [0, 1]}',
    b'{"rows": [0, 1], "scores": {}}',
    b'{"rows": [0, 1], "scores": {"other": [1.0, 2.0]}}',
    b'{"rows": [0, 1], "scores": {"it": [1.0, 2.0], "other": [1.0, 2.0]}}',
    b'{"rows": [0, 1], "scores": {"it": [1.0]}}',
    b'{"rows": [0, 1], "scores": {"it": [1.0, 2.0, 3.0]}}',
    b'{"rows": [0, 1], "scores": {"it": [1.0, NaN]}}',
    b'{"rows": [0, 1], "scores": {"it": [1.0, "2.0"]}}',
    b'{"rows": [0, 1], "scores": {"it": [1.0, null]}}',
    b'{"rows": [0, 1], "scores": {"it": [[1.0], [2.0]]}}',  # rows of four answer tokens
    b'{"rows": [0, 6], "scores": {"it": [1.0, 2.0]}}',  # of six rows
    b'{"rows": [-1, 0], "scores": {"it": [1.0, 2.0]}}',
    b'{"rows": ["0", "1"], "scores": {"it": [1.0, 2.0]}}',
    b'{"rows": 0, "scores": {"it": 1.0}}',
    b'{"rows": [0, 1], "scores": {"it": [1.0, 2.0]}, "more": 1}',
]


@pytest.mark.parametrize("name", ["self_refusal", "gradshield"])
def test_a_damaged_line_counts_for_nothing(tmp_path, name):
    """Each in the place of the first batch, which is scored again; a scorer gives a number a row, or one a token."""
    path = tmp_path / "journal.jsonl"
    _, expected = run(path, "a", name)
    sound = path.read_bytes().splitlines()
    for line in (*DAMAGED, sound[1][:40], sound[1] + sound[2]):
        path.write_bytes(b"\n".join([sound[0], line, *sound[2:], b""]))
        counts, scanned = run(path, "a", name)
        assert counts == [6] and scanned == expected, line
        assert set(sound) <= set(path.read_bytes().splitlines()), line


@pytest.mark.parametrize("head", [b"", b"\xff\xfe", b'{"rows": [0], "scores": {"it": [9.0]}}'])
def test_a_journal_without_its_key_is_begun_again(tmp_path, head):
    path = tmp_path / "journal.jsonl"
    _, expected = run(path, "a")
    path.write_bytes(head + b"\n" + b"\n".join(path.read_bytes().splitlines()[1:]) + b"\n")
    counts, scanned = run(path, "a")
    assert counts == [2, 4, 6] and scanned == expected and isinstance(scanned, Scanned)
