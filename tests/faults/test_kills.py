"""The product is killed at sixty places and goes on: every artefact is that of an undisturbed run.

One run is copied at every place as a kill there would leave it, and real kills at some of them leave the same files.

A place is a moment before the run creates, renames, removes or opens for writing something in its folder: in the rows,
the scan and its journal, the cut, a checkpoint, the adapter, the answers, the report. The report step and the
checkpoints are killed at every event.
"""

import json
import signal

import pytest
from product import KILLED, artefacts, events_of, forked, product

pytestmark = pytest.mark.slow

PLACES = 60


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The recipe, its undisturbed run, and what that did to its folder."""
    folder = tmp_path_factory.mktemp("product")
    recipe = product(folder)
    code = forked(events_of(recipe, folder / "undisturbed", None, folder / "events.json"), folder / "log")
    assert code == 0, (folder / "log").read_text()[-3000:]
    return recipe, folder / "undisturbed", json.loads((folder / "events.json").read_text())


def places(events: list, count: int) -> list[int]:
    """Events evenly over the run, and more of them in checkpoints and in the report."""
    dense = [i for i, (_, path) in enumerate(events) if path.startswith("report.") or "checkpoints" in path]
    step = max(1, len(dense) * 2 // count)
    chosen = {*dense[::step]}
    even = len(events) / max(1, count - len(chosen))
    chosen |= {int(i * even) for i in range(count - len(chosen))}
    extra = (i for i in range(len(events)) if i not in chosen)
    while len(chosen) < min(count, len(events)):
        chosen.add(next(extra))
    return sorted(chosen)


def test_killed_at_sixty_places_it_ends_as_if_nothing_had_been(undisturbed, tmp_path):
    recipe, out, events = undisturbed
    expected, wrong = artefacts(out), []
    chosen = places(events, PLACES)
    assert len(chosen) == PLACES
    assert any(events[k][1].startswith("report.") for k in chosen) and any(
        "checkpoints" in events[k][1] for k in chosen
    )
    left = {k: tmp_path / f"{k}" / "undisturbed" for k in chosen}  # of the same name, which the report shows
    twin = tmp_path / "twin" / "undisturbed"
    code = forked(events_of(recipe, twin, None, tmp_path / "events", copies=left), tmp_path / "log")
    assert code == 0, (tmp_path / "log").read_text()[-2000:]
    for k in chosen[::12]:
        killed = tmp_path / f"killed-{k}" / "undisturbed"
        code = forked(events_of(recipe, killed, k, tmp_path / "events"), tmp_path / "log")
        assert code == KILLED, (k, events[k], code, (tmp_path / "log").read_text()[-2000:])
        assert artefacts(killed) == artefacts(left[k]), (k, events[k], "a kill leaves other files than the copy")
    for k, killed in left.items():
        code = forked(events_of(recipe, killed, None, tmp_path / "events"), tmp_path / "log")
        if code != 0:
            wrong.append((k, events[k], "exit code", code, (tmp_path / "log").read_text()[-500:]))
            continue
        actual = artefacts(killed)
        wrong += [
            (k, events[k], name)
            for name in sorted(expected.keys() | actual.keys())
            if expected.get(name) != actual.get(name)
        ]
    assert not wrong, "\n".join(map(str, wrong[:10]))


def test_killed_twice_in_a_row(undisturbed, tmp_path):
    """A kill, a kill of the run that goes on, and the end."""
    recipe, out, events = undisturbed
    killed = tmp_path / "undisturbed"
    for k in (len(events) // 2, len(events) // 8):
        assert forked(events_of(recipe, killed, k, tmp_path / "events"), tmp_path / "log") == KILLED
    assert forked(events_of(recipe, killed, None, tmp_path / "events"), tmp_path / "log") == 0
    assert artefacts(killed) == artefacts(out)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_sigterm_is_a_clean_stop(undisturbed, tmp_path, share):
    """Exit code 143 and one line; the same command goes on."""
    recipe, out, events = undisturbed
    stopped = tmp_path / "undisturbed"
    action = events_of(recipe, stopped, int(share * len(events)), tmp_path / "events", signal.SIGTERM)
    assert forked(action, tmp_path / "log") == 143
    text = (tmp_path / "log").read_text()
    assert "terminated; run the same command again" in text and "Traceback" not in text
    assert forked(events_of(recipe, stopped, None, tmp_path / "events"), tmp_path / "log") == 0
    assert artefacts(stopped) == artefacts(out)


def test_a_second_run_in_the_same_folder_is_refused(undisturbed, tmp_path):
    recipe, out, _ = undisturbed
    from filelock import FileLock

    with FileLock(out / ".lock"):
        code = forked(events_of(recipe, out, None, tmp_path / "events"), tmp_path / "log")
    assert code == 1
    text = (tmp_path / "log").read_text()
    assert "another run works in" in text and len(text.strip().splitlines()) == 1
