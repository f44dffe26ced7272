"""Checkpoints and kills: what is complete, what is skipped, and that a killed run ends as one that was not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from killed import KILLED, PLACES, STEPS, TWICE

from safebasin.train.checkpoint import (
    MARK,
    clear_checkpoints,
    is_complete,
    last_checkpoint,
    mark_complete,
    remove_checkpoint,
    rotate,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed.py")), str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "outcomes.json").read_text())


@pytest.mark.parametrize("place", [*PLACES, TWICE])
def test_a_killed_run_ends_as_one_that_was_not(place, outcomes):
    """Its adapter byte for byte, its loss curve, its steps, and the one checkpoint that is left."""
    truth, killed = outcomes["undisturbed"], outcomes[place]
    assert (killed["died"], killed["again"]) == (KILLED, 0)
    for key in ("adapter", "curve", "steps", "left"):
        assert killed[key] == truth[key], key
    assert truth["left"] == [f"checkpoint-{STEPS}"]


@pytest.mark.parametrize(
    ("place", "first"),
    [
        ("before any checkpoint is complete", 1),
        ("in the optimizer", 2),
        ("in the methods' state", 2),
        ("before the mark", 2),
        ("in the mark", 2),
        ("after the mark", 3),
        ("while the older one is removed", 3),
        (TWICE, 3),
        ("in the last checkpoint", STEPS),
        ("after the last step, before the adapter", STEPS + 1),
    ],
)
def test_it_goes_on_after_its_last_complete_checkpoint(place, first, outcomes):
    """A tuning whose last checkpoint is complete takes no step more."""
    assert outcomes[place]["taken"] == list(range(first, STEPS + 1))


def saved(folder: Path, step: int, *, mark: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "inner").mkdir(parents=True)
    (checkpoint / "optimizer.pt").write_text(f"state {step}")
    (checkpoint / "inner" / "shard").write_text("part")
    if mark:
        mark_complete(checkpoint)
    return checkpoint


def test_the_newest_complete_one_counts(tmp_path):
    assert last_checkpoint(tmp_path / "missing") is None
    saved(tmp_path, 9)
    tenth = saved(tmp_path, 10)
    saved(tmp_path, 11, mark=False)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-12").write_text("no folder")
    assert last_checkpoint(tmp_path) == tenth


@pytest.mark.parametrize(
    "spoil",
    [
        lambda checkpoint: (checkpoint / "optimizer.pt").unlink(),
        lambda checkpoint: (checkpoint / "optimizer.pt").write_text("state"),
        lambda checkpoint: (checkpoint / "inner" / "shard").write_text("trap"),  # of the same length
        lambda checkpoint: (checkpoint / MARK).write_text("{"),
        lambda checkpoint: (checkpoint / MARK).write_text("[]"),
        lambda checkpoint: (checkpoint / MARK).write_text("{}"),
        lambda checkpoint: (checkpoint / MARK).write_bytes(b"\xff"),
    ],
)
def test_a_broken_one_is_skipped_for_the_one_before(spoil, tmp_path):
    first, second = saved(tmp_path, 1), saved(tmp_path, 2)
    assert last_checkpoint(tmp_path) == second
    spoil(second)
    assert not is_complete(second)
    assert last_checkpoint(tmp_path) == first


@pytest.mark.parametrize(("limit", "left"), [(1, [7]), (2, [5, 7]), (None, [1, 5, 7])])
def test_what_a_complete_one_replaces_is_removed(limit, left, tmp_path):
    for step in (1, 5):
        saved(tmp_path, step)
    for step in (3, 9):
        saved(tmp_path, step, mark=False)
    rotate(saved(tmp_path, 7), limit)
    assert sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir()) == left


def test_the_mark_is_removed_first(tmp_path, monkeypatch):
    checkpoint = saved(tmp_path, 1)
    monkeypatch.setattr("shutil.rmtree", lambda folder: None)  # killed before it removes anything
    remove_checkpoint(checkpoint)
    assert last_checkpoint(tmp_path) is None


def test_a_finished_tuning_leaves_no_checkpoint_but_what_a_tracker_wrote(tmp_path):
    saved(tmp_path / "one", 1)
    saved(tmp_path / "two", 3, mark=False)
    events = tmp_path / "two" / "runs" / "events"
    events.parent.mkdir()
    events.write_text("loss")
    clear_checkpoints(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [events] and not (tmp_path / "one").exists()
    events.unlink()
    events.parent.rmdir()
    clear_checkpoints(tmp_path)
    assert not tmp_path.exists()
