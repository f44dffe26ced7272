"""Actors make the parts that one process makes, also when one of them is killed; what they refuse stops the work.

One cluster of two CPUs for all tests of the file; the last one starts its own from a process of its own.
"""

import gc
import os
import signal
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
from runs import kill_an_actor, prepare, scan_in_shards, shard_recipe

from safebasin.errors import UserError
from safebasin.spread.on_ray import OnRay

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("ray") is None, reason="the extra ray is not installed")]


class Work(str):
    """An item that is its name."""

    @property
    def name(self) -> str:
        return str(self)


ITEMS = [Work(f"{k:03d}") for k in range(6)]


class Worker:
    """Writes an item's name; dies at item 002 as often as ``deaths`` says, and refuses the item ``refused``."""

    def __init__(self, deaths: int, refused: str = ""):
        self.deaths, self.refused = deaths, refused

    def __call__(self, item: str, path: Path) -> dict[str, object]:
        with path.with_suffix(".tries").open("a") as file:
            file.write("x")
        if item == "002" and len(path.with_suffix(".tries").read_text()) <= self.deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        if item == self.refused:
            raise UserError("this row cannot be used")
        path.write_text(item)
        return {"name": item, "pid": os.getpid()}


@pytest.fixture(scope="module")
def cluster():
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # Ray's own processes, left running
        with OnRay(workers=2).cluster():
            assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64
            from ray import cloudpickle

            cloudpickle.register_pickle_by_value(sys.modules[__name__])  # an actor cannot import a test
            yield
        gc.collect()


@pytest.mark.usefixtures("cluster")
def test_actors_are_used_again_and_a_killed_one_costs_its_item(tmp_path):
    facts = list(OnRay(workers=2).work(ITEMS, lambda: Worker(1), lambda name: tmp_path / f"{name}.txt"))
    assert {each["name"] for each in facts} == set(ITEMS) and len({each["pid"] for each in facts}) <= 3
    tries = {item: len((tmp_path / f"{item}.tries").read_text()) for item in ITEMS}
    assert tries == {**dict.fromkeys(ITEMS, 1), "002": 2}
    assert all((tmp_path / f"{item}.txt").read_text() == item for item in ITEMS)


@pytest.mark.usefixtures("cluster")
def test_an_item_that_kills_every_worker_stops_the_work(tmp_path):
    with pytest.raises(UserError, match="002: its worker died 3 times"):
        list(OnRay(workers=1).work(ITEMS, lambda: Worker(9), lambda name: tmp_path / f"{name}.txt"))
    assert len((tmp_path / "002.tries").read_text()) == 3 and (tmp_path / "001.txt").exists()


@pytest.mark.usefixtures("cluster")
def test_what_a_worker_refuses_is_tried_once(tmp_path):
    with pytest.raises(UserError, match=r"^this row cannot be used$"):
        list(OnRay(workers=1).work(ITEMS, lambda: Worker(0, "001"), lambda name: tmp_path / f"{name}.txt"))
    assert (tmp_path / "001.tries").read_text() == "x" and not (tmp_path / "003.tries").exists()


@pytest.mark.usefixtures("cluster")
def test_machines_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no machine of the cluster has 1 CPUs and 1 GPUs"):
        list(OnRay(gpus=1).work(ITEMS, lambda: Worker(0), lambda name: tmp_path / name))


def test_two_actors_of_which_one_is_killed_write_the_file_of_one_process(tmp_path):
    """48 rows in 6 shards, a scorer of tokens, one of rows and one of text."""
    files = prepare(tmp_path, 48)
    outcomes = {}
    for name, engine in (("here", "here"), ("ray", "{ray: {workers: 2}}")):
        recipe = shard_recipe(tmp_path, files, 8, engine, "[gradshield, self_refusal, hidden_text]")
        running = scan_in_shards(recipe, tmp_path / name)
        killed = kill_an_actor(running, tmp_path / name / "scan" / "parts") if name == "ray" else 1
        error = running.communicate()[1].decode()
        assert running.returncode == 0, error[-3000:]
        assert killed and (name == "here" or "its worker died; tried again" in error)
        outcomes[name] = {file.name: file.read_bytes() for file in sorted((tmp_path / name / "scan").iterdir())}
    assert outcomes["here"] == outcomes["ray"] and "parts" not in outcomes["ray"]


def test_two_actors_answer_as_one_process(tmp_path):
    """70 prompts in three batches of 32; the arm's files are the same, and no part is left."""
    files = prepare(tmp_path, 70)
    suites = f"[{{asr: {{prompts: {files[1]}, judges: [keyword], max_new_tokens: 8}}}}]"
    outcomes = {}
    for name, engine in (("here", "here"), ("ray", "{ray: {workers: 2}}")):
        recipe = shard_recipe(tmp_path, files, 32, engine, "[self_refusal]", suites)
        running = scan_in_shards(recipe, tmp_path / name, "measure")
        error = running.communicate()[1].decode()
        assert running.returncode == 0, error[-3000:]
        arm = tmp_path / name / "arms" / "start"
        outcomes[name] = {file.name: file.read_bytes() for file in sorted(arm.iterdir())}
    assert outcomes["here"] == outcomes["ray"] and set(outcomes["ray"]) == {"answers.jsonl", "measurements.jsonl"}
