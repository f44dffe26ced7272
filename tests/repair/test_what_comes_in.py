"""What comes in to a repair, and where its result goes: refused in one line, or done; never a traceback."""

import json
import shutil

import pytest
from folders import run
from tuned import save_adapter, save_model, save_start

from safebasin.data.files import new_folder
from safebasin.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The start, an adapter, another one, and a full model."""
    folder = tmp_path_factory.mktemp("saved")
    start = save_start(folder / "start")
    save_adapter(folder / "adapter", start)
    save_adapter(folder / "other", start, seed=5, rank=2)
    save_model(folder / "full", start)
    return folder


def repair(saved, out, *words, adapter="adapter", method="shrink"):
    model = ["--model", str(saved / "start"), "--adapter", str(saved / adapter), "--out", str(out)]
    return run("repair", *model, "--method", method, *words)


CONFIGS = [
    ({"lora_alpha": None}, "cannot load the adapter"),
    ({"lora_alpha": "x"}, "cannot load the adapter"),
    ({"alpha_pattern": {"(": 3}}, "cannot load the adapter"),
    ({"rank_pattern": [1]}, "cannot load the adapter"),
    ({"r": 64}, "has rank 4, and 64 in adapter_config.json"),
    ({"rank_pattern": {"q_proj": 2}}, "has rank 4, and 2 in adapter_config.json"),
]


@pytest.mark.parametrize(("change", "reason"), CONFIGS, ids=[str(change) for change, _ in CONFIGS])
def test_a_configuration_that_is_not_of_the_matrices(saved, tmp_path, change, reason, capsys):
    shutil.copytree(saved / "adapter", tmp_path / "changed")
    path = tmp_path / "changed" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert repair(saved, tmp_path / "out", adapter=path.parent) == 1
    assert reason in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["shrink: 3", "shrink: 0", "shrink: [alpha]", "shrink: alpha"])
def test_a_method_whose_fields_are_none(saved, tmp_path, method, capsys):
    """``shrink: 0`` was read as shrink with its defaults."""
    assert repair(saved, tmp_path / "out", method=method) == 1
    assert "a method is `name` or `name: {field: value}`" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_a_line(saved, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in ("/proc/x", tmp_path / "file" / "x", "."):
        assert repair(saved, out) == 1, out
        assert "cannot write the folder" in capsys.readouterr().err
    assert (tmp_path / "here").is_dir() and not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("there", [True, False])
def test_of_a_link_what_it_points_to_is_written(saved, tmp_path, there):
    if there:
        (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert repair(saved, tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "adapter_config.json").is_file()
    assert repair(saved, tmp_path / "link") == 0  # in the place of a repair of before
    assert not list(tmp_path.glob("*.part"))


def test_of_a_folder_that_failed_nothing_is_left(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    with pytest.raises(UserError, match="No space left"), new_folder(tmp_path / "out") as part:
        (part / "half").write_text("x")
        raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_a_role_that_cannot_stand(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    every = "safe_merge: {modules: all}"
    cases = [
        ("resta", ("--harmful", str(saved / "adapter")), "the role harmful holds the update of the tuned model itself"),
        (every, ("--safe", str(saved / "full")), "the role safe is a full model and the tuned one is an adapter"),
        (every, ("--safe", "nobody/nothing"), "cannot load the adapter 'nobody/nothing'"),
    ]
    for method, words, reason in cases:
        assert repair(saved, tmp_path / "out", *words, method=method) == 1
        assert reason in capsys.readouterr().err
    assert repair(saved, tmp_path / "out", "--harmful", str(saved / "other"), method="resta") == 0
    capsys.readouterr()
    low = ("--safe", str(saved / "full"), "--method", "truncate: {rank: 4}")
    assert repair(saved, tmp_path / "low", *low, method=every) == 0  # its end is of low rank
