"""A model's fingerprint is its content: every file counts, names and times do not."""

import json
import os
import shutil
from pathlib import Path

import pytest
from folders import save_tiny

from safebasin.errors import UserError
from safebasin.models import fingerprint
from safebasin.models.fingerprint import model_fingerprint

OLD = 1_700_000_000  # s: weights that are not about to change


@pytest.fixture
def memory(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SAFEBASIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "SETTLED", -(10**18))  # files of this test are old enough
    monkeypatch.setattr(fingerprint, "LARGE", 0)  # and large enough
    return tmp_path / "cache" / "digests.json"


@pytest.fixture
def folder(tmp_path, memory) -> Path:
    folder = save_tiny(tmp_path / "model")
    for name, text in (
        ("merges.txt", "a b"),
        ("own.py", "x = 1"),
        ("adapter_config.json", "{}"),
        ("tokenizer.model", "m"),
    ):
        (folder / name).write_text(text)
    for name in ("parts/deep.py", "additional_chat_templates/rag.jinja"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("x")
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The names of the files that are hashed, in their order."""
    names: list[str] = []
    digest = fingerprint.file_digest
    monkeypatch.setattr(fingerprint, "file_digest", lambda path: names.append(path.name) or digest(path))
    return names


def test_every_file_counts(folder):
    seen = {model_fingerprint(str(folder))}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert {"config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json"} < {p.name for p in files}
    for number, path in enumerate(files, 2):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # one bit, the same size
        seen.add(model_fingerprint(str(folder)))
        assert len(seen) == number, path
        path.write_bytes(content)
        assert model_fingerprint(str(folder)) in seen
    (folder / "config.json").rename(folder / "other.json")
    assert model_fingerprint(str(folder)) not in seen


def test_times_places_and_notes_do_not(folder, tmp_path):
    before = model_fingerprint(str(folder))
    for path in folder.rglob("*"):
        os.utime(path, (OLD, OLD))
    (folder / "README.md").write_text("notes")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "model.safetensors").write_bytes(b"another")
    assert model_fingerprint(str(folder)) == before
    assert model_fingerprint(str(shutil.copytree(folder, tmp_path / "copy"))) == before


def test_weights_are_read_once_and_small_files_always(folder, reads, memory):
    first = model_fingerprint(str(folder))
    assert sorted(name for name in reads if name.endswith(".safetensors")) == [
        "adapter_model.safetensors",
        "model.safetensors",
    ]
    small = [name for name in reads if not name.endswith(".safetensors")]
    reads.clear()
    assert model_fingerprint(str(folder)) == first and reads == small
    reads.clear()
    os.utime(folder / "model.safetensors", (OLD, OLD))
    assert model_fingerprint(str(folder)) == first
    assert [name for name in reads if name.endswith(".safetensors")] == ["model.safetensors"]
    assert len(json.loads(memory.read_text())) == 2


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "null", '{"%s": 1}', '{"%s": ["x"]}', '{"%s": [1, 2, 3, "0"]}', "\udcff"]
)
def test_a_damaged_memory_is_remade(damage, folder, reads, memory):
    first, remembered = model_fingerprint(str(folder)), json.loads(memory.read_text())
    text = damage.replace("%s", str(folder / "model.safetensors"))
    memory.write_bytes(text.encode("utf-8", "surrogateescape"))
    reads.clear()
    assert model_fingerprint(str(folder)) == first and "model.safetensors" in reads
    assert json.loads(memory.read_text()) == remembered


def test_without_a_cache_it_is_slower_and_not_wrong(folder, memory, monkeypatch):
    first = model_fingerprint(str(folder))
    (folder / "file").write_text("")
    monkeypatch.setenv("SAFEBASIN_CACHE", str(folder / "file" / "cache"))
    assert model_fingerprint(str(folder)) == first


def test_the_memory_holds_large_files_that_are_there(folder, reads, memory, monkeypatch):
    """It is read and written whole, so it must not grow with every file of every run."""
    model_fingerprint(str(folder))
    (folder / "adapter_model.safetensors").unlink()
    os.utime(folder / "model.safetensors", (OLD, OLD))
    model_fingerprint(str(folder))
    assert list(json.loads(memory.read_text())) == [str(folder / "model.safetensors")]
    memory.unlink()
    monkeypatch.setattr(fingerprint, "LARGE", (folder / "model.safetensors").stat().st_size + 1)
    model_fingerprint(str(folder))
    assert not memory.exists()


def test_weights_that_are_young_are_read_again(folder, reads, memory, monkeypatch):
    """Bytes that change twice within one tick of the clock have one time stamp."""
    monkeypatch.setattr(fingerprint, "SETTLED", 60 * 10**9)
    model_fingerprint(str(folder))
    assert not memory.exists()
    reads.clear()
    model_fingerprint(str(folder))
    assert "model.safetensors" in reads


def test_a_hub_id_is_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--org--name"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    assert model_fingerprint("org/name") == commit
    for name in ("org/other", "./no/folder", "a b", ""):
        with pytest.raises(UserError, match=r"^cannot load the model '[^\n]*$"):
            model_fingerprint(name)


def test_a_builtin_name_is_its_folder(folder, monkeypatch):
    monkeypatch.setattr(fingerprint, "resolve", lambda name: str(folder) if name == "builtin:smollm2" else name)
    assert model_fingerprint("builtin:smollm2") == model_fingerprint(str(folder))
