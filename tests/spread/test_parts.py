"""The laws of parts: what is done is what lies on disk, whatever was killed; another key begins anew."""

import os
from pathlib import Path
from typing import NamedTuple

import pytest

from safebasin.errors import UserError
from safebasin.spread import make_engine
from safebasin.spread.here import Here
from safebasin.spread.on_ray import OnRay
from safebasin.spread.parts import KEY, Parts, first_of_all


class Work(NamedTuple):
    name: str


ITEMS = [Work(f"{k:03d}") for k in range(5)]


def worker(built: list[int]):
    """A factory of workers that counts them; a part holds its item's name."""

    def make():
        built.append(1)

        def work(item: Work, path: Path) -> dict[str, object]:
            path.write_text(item.name)
            return {"name": item.name}

        return work

    return make


def opened(folder: Path, key: str = "key") -> Parts:
    parts = Parts(folder / "parts", key, ".txt")
    parts.open()
    return parts


def test_what_is_missing_is_made_once(tmp_path):
    built: list[int] = []
    parts = opened(tmp_path)
    first = Here().work(parts.missing(ITEMS), worker(built), parts.path)
    assert [next(first)["name"] for _ in range(3)] == ["000", "001", "002"]
    first.close()  # killed
    again = opened(tmp_path)
    assert [item.name for item in again.missing(ITEMS)] == ["003", "004"]
    os.unlink(again.path("001"))  # lost in any place
    rest = [facts["name"] for facts in Here().work(again.missing(ITEMS), worker(built), again.path)]
    assert rest == ["001", "003", "004"] and len(built) == 2 and again.missing(ITEMS) == []
    assert list(Here().work([], worker(built), again.path)) == [] and len(built) == 2  # nothing to do, nothing loaded


@pytest.mark.parametrize("damage", ["other", "", "\x00", '"other"'])
def test_parts_of_another_key_are_removed(tmp_path, damage):
    parts = opened(tmp_path)
    list(Here().work(ITEMS, worker([]), parts.path))
    assert opened(tmp_path).missing(ITEMS) == []
    (parts.folder / KEY).write_text(damage)
    assert opened(tmp_path).missing(ITEMS) == ITEMS
    assert opened(tmp_path, "next").missing(ITEMS) == ITEMS


def test_the_first_worker_says_what_the_others_compare_with(tmp_path):
    assert first_of_all(tmp_path, {"scores": [1.0]}) == {"scores": [1.0]}
    assert first_of_all(tmp_path, {"scores": [2.0]}) == {"scores": [1.0]}
    assert [file.name for file in tmp_path.iterdir()] == ["first.json"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write parts to .*file/parts: Not a directory"):
        opened(tmp_path / "file")


def test_engines_by_name():
    assert make_engine("here") == Here()
    assert make_engine({"ray": {"workers": 2, "gpus": 0.5}}) == OnRay(workers=2, gpus=0.5)
    with pytest.raises(UserError, match="no 'dask'; there are: here, ray"):
        make_engine("dask")
    with pytest.raises(UserError, match=r"engine\.ray: cpus: Input should be greater than 0"):
        make_engine({"ray": {"cpus": 0}})
    with pytest.raises(UserError, match=r"engine\.ray: cpus: a number is needed"):
        make_engine({"ray": {"cpus": "2"}})


def test_a_cluster_that_asks_for_no_token_is_refused(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(UserError, match="runs the code of whoever reaches it"):
        next(OnRay(address="10.0.0.1:6379").work(ITEMS, worker([]), Path))


def test_ray_and_torchrun_do_not_mix(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        next(OnRay().work(ITEMS, worker([]), Path))
