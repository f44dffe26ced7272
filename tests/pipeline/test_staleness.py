"""Whatever a recipe can name is changed, one thing at a time, and the steps that rest on it run again; nothing else
runs again."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from product import product

from safebasin.guards.side import SideGuard, base_digest, tokenizer_digest
from safebasin.models.load import load
from safebasin.pipeline import fingerprint as fingerprints
from safebasin.pipeline.folder import RunFolder
from safebasin.pipeline.parse import read
from safebasin.pipeline.run import Run

pytestmark = pytest.mark.slow

ALL = {"data", "scan", "cut.defended", "train.defended", "measure.start", "measure.defended"}


def grown(path: Path) -> None:
    """One more row, of which the file's other rows know nothing."""
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[0].replace("make a", "make the")]) + "\n")


def scaled(path: Path) -> None:
    """The tensors of a safetensors file, a thousandth larger."""
    tensors = {name: tensor * 1.001 for name, tensor in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def spaced(path: Path) -> None:
    """JSON with another number in it that changes nothing but the content."""
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"max_window_layers": 7}))


@pytest.fixture
def everything(tmp_path):
    """A recipe that names a file wherever one can be named, and one finished run of it."""
    recipe = product(tmp_path)
    loaded = load(str(tmp_path / "model"), dtype="float32")
    base = tmp_path / "base"
    for part in loaded:
        part.save_pretrained(base)
    scaled(base / "model.safetensors")
    layers, size = [1], loaded.model.config.hidden_size
    torch.manual_seed(0)
    SideGuard(layers, size, 4, base_digest(loaded.model), tokenizer_digest(loaded.tokenizer)).save(
        tmp_path / "side_guard"
    )
    for part in loaded:
        part.save_pretrained(tmp_path / "chat_guard")
    (tmp_path / "secret").write_text("k7 q2\n")
    for name in ("pool", "lookalike", "unsafe", "summaries", "tokens"):
        (tmp_path / f"{name}.jsonl").write_text((tmp_path / "task.jsonl").read_text())
    tree = yaml.safe_load(recipe.read_text())
    tree["data"] |= {
        "attack": {"harmless_sum": {"pool": str(tmp_path / "pool.jsonl"), "against": "gradshield", "quantile": 1.0}}
    }
    tree["scan"]["scorers"] += [{"dsa": {"guard": str(tmp_path / "side_guard")}}]
    tree["arms"] = {
        "start": {},
        "defended": {
            "cut": {"scorer": "gradshield", "threshold": 1e9},
            "train": [
                {"asft": {"base": str(base), "aligned": str(tmp_path / "model"), "lam": 0.1}},
                {"backdoor_align": {"trigger": str(tmp_path / "secret")}},
            ],
        },
    }
    tree["train"] |= {"max_steps": 1}
    tree["measure"]["suites"] = [
        {"asr": {"prompts": str(tmp_path / "prompts.jsonl"), "judges": ["keyword"], "max_new_tokens": 2}},
        {"over_refusal": {"prompts": str(tmp_path / "lookalike.jsonl"), "judges": ["keyword"], "max_new_tokens": 2}},
        {"accuracy": {"data": {"path": str(tmp_path / "held_out.jsonl")}, "max_new_tokens": 2}},
        {"token_accuracy": {"data": {"path": str(tmp_path / "tokens.jsonl")}}},
    ]
    recipe.write_text(yaml.safe_dump(tree))
    return tmp_path, recipe


def ran(recipe: Path, out: Path, sets: dict[str, str] | None = None) -> set[str]:
    """The steps that a run had to do."""
    steps, step = set(), RunFolder._step

    def spy(self, name, inputs, outputs):
        context = step(self, name, inputs, outputs)
        work = context.__enter__()
        if work:
            steps.add(name)

        class Again:
            def __enter__(self):
                return work

            def __exit__(self, *error):
                return context.__exit__(*error)

        return Again()

    RunFolder._step = spy
    try:
        with Run(read(recipe, (), sets), out) as run:
            run.report()
    finally:
        RunFolder._step = step
    return steps


TRAIN, MEASURE = {"train.defended"}, {"measure.start", "measure.defended"}
CHANGES = [  # file, change, the steps that read it; those after them run again where what they read came out otherwise
    ("task.jsonl", grown, {"data", "scan", "cut.defended"} | TRAIN),
    ("pool.jsonl", grown, {"data"}),
    ("refusals.jsonl", grown, {"scan"} | TRAIN),
    ("poison.jsonl", grown, {"data"}),
    ("harmful.jsonl", grown, {"scan"}),
    ("safe.jsonl", grown, {"scan"}),
    ("held_out.jsonl", grown, MEASURE),
    ("prompts.jsonl", grown, MEASURE),
    ("lookalike.jsonl", grown, MEASURE),
    ("tokens.jsonl", grown, MEASURE),
    ("secret", lambda path: path.write_text("other\n"), TRAIN),
    ("side_guard.safetensors", scaled, {"scan"}),
    ("base/model.safetensors", scaled, TRAIN),
    ("model/model.safetensors", scaled, {"scan"} | TRAIN | MEASURE),
    ("model/config.json", spaced, {"scan"} | TRAIN | MEASURE),
    ("model/chat_template.jinja", lambda path: path.write_text(path.read_text() + "{# #}"), {"scan"} | TRAIN | MEASURE),
    ("model/tokenizer_config.json", spaced, {"scan"} | TRAIN | MEASURE),
]


def test_every_file_that_a_recipe_names_is_seen(everything):
    folder, recipe = everything
    out = folder / "out"
    assert ran(recipe, out) == ALL
    assert ran(recipe, out) == set()
    text = recipe.read_text()
    named = {p.relative_to(folder).as_posix() for p in folder.iterdir() if str(p) in text} | {"side_guard"}
    for name, change, expected in CHANGES:
        path = folder / name
        before, stamp = path.read_bytes(), (out / "report.json").stat().st_mtime_ns
        change(path)
        assert path.read_bytes() != before
        steps = ran(recipe, out)
        assert expected <= steps, (name, steps)
        assert (out / "report.json").stat().st_mtime_ns != stamp, name
        assert ran(recipe, out) == set(), name
        named -= {name, name.split("/")[0], name.split(".")[0]}
    assert named <= {"recipe.yaml"}, f"files that the recipe names and this test does not change: {named}"


def test_other_sources_and_versions(everything, monkeypatch):
    """A changed line of the package (the loss times a hundred), or another torch, made none of these numbers."""
    folder, recipe = everything
    out = folder / "out"
    ran(recipe, out)
    with monkeypatch.context() as patch:
        patch.setattr("safebasin.pipeline.folder.package_digest", lambda: "another")
        assert ran(recipe, out) == ALL
    versions = fingerprints.versions()
    with monkeypatch.context() as patch:
        patch.setattr("safebasin.pipeline.folder.versions", lambda: versions | {"torch": "0.0.0"})
        assert ran(recipe, out) == ALL
        assert json.loads((out / "manifest.json").read_text())["versions"]["torch"] == "0.0.0"
    assert ran(recipe, out) == ALL


def test_the_packages_own_files_are_digested(tmp_path, monkeypatch):
    (tmp_path / "loss.py").write_text("x = 1\n")
    monkeypatch.setattr(fingerprints, "PACKAGE", tmp_path)
    fingerprints.package_digest.cache_clear()
    first = fingerprints.package_digest()
    (tmp_path / "loss.py").write_text("x = 100\n")
    fingerprints.package_digest.cache_clear()
    assert fingerprints.package_digest() != first
    monkeypatch.undo()
    fingerprints.package_digest.cache_clear()


def test_a_file_in_the_place_of_a_public_set(everything):
    """--set NAME=FILE: the file's rows count."""
    folder, recipe = everything
    text = recipe.read_text().replace(str(folder / "prompts.jsonl"), "some/prompts")
    recipe.write_text(text)
    out, sets = folder / "out", {"some/prompts": str(folder / "prompts.jsonl")}
    ran(recipe, out, sets)
    assert ran(recipe, out, sets) == set()
    grown(folder / "prompts.jsonl")
    assert ran(recipe, out, sets) == {"measure.start", "measure.defended"}


def test_a_damaged_artefact_is_made_again_and_an_edited_one_is_said(everything, capsys):
    folder, recipe = everything
    out = folder / "out"
    ran(recipe, out)
    answers = out / "arms" / "defended" / "answers.jsonl"
    before = answers.read_bytes()
    for content in (before[:-20], before.replace(b'"complied"', b'"refused"') + b"\n", b""):
        answers.write_bytes(content)
        assert ran(recipe, out) == {"measure.defended"}
        assert answers.read_bytes() == before
        assert "arms/defended/answers.jsonl is not as it was written" in " ".join(capsys.readouterr().err.split())


def test_a_report_goes_when_a_step_under_it_becomes_stale(everything, monkeypatch):
    """A run that stops halfway leaves no report of the numbers before."""
    folder, recipe = everything
    out = folder / "out"
    ran(recipe, out)
    assert (out / "report.html").is_file()
    grown(folder / "prompts.jsonl")
    monkeypatch.setattr("safebasin.measure.subject.Subject.ask", lambda *_: pytest.exit("killed"))
    with pytest.raises(pytest.exit.Exception):
        ran(recipe, out)
    assert not [name for name in ("report.html", "report.md", "report.json") if (out / name).exists()]
