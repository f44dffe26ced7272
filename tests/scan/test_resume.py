"""A scan that is killed goes on where it was, and ends with the file that it would have written."""

import json

from aligned import aligned_model, refusals

from runs import trial
from safebasin.scan import scorer
from safebasin.scan.scan import ScanJournal, scan

MODEL, TOKENIZER = aligned_model()


def test_killed_twice(tmp_path):
    """SIGKILL at random points; benchmarks/scan/kill.py does it ten times on 20,000 rows."""
    told = trial(tmp_path, 1500, 2)
    assert told["kills"] >= 1 and told["journal_lines_at_last_kill"] > 1


def test_half_a_line_and_another_key_are_cut_off(tmp_path):
    """What is in the journal is not scored again; a torn last line is; a journal of other rows is not believed."""
    rows = refusals(TOKENIZER)
    path, anchors, made = tmp_path / "journal.jsonl", {"probe": rows}, {"it": scorer.make("self_refusal")}

    def run(key):
        asked = []
        scan(
            MODEL,
            TOKENIZER,
            rows,
            made,
            anchors,
            batch_size=2,
            journal=ScanJournal(path, key),
            progress=lambda done, _: asked.append(done),
        )
        return asked

    assert run("a") == [2, 4, 6] and run("a") == []
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert run("a") == [6] and path.read_bytes() == whole
    assert run("b") == [2, 4, 6]
    first = json.loads(path.read_text().splitlines()[1])
    assert set(first) == {"rows", "scores"} and len(first["scores"]["it"]) == 2
