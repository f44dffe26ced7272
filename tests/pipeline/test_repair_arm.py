"""Arms that repair, go on from another arm, or are tuned on top of a harmful adapter: in a run, on the tiny model."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from tuned import save_model, save_start

from safebasin.data.tables import write_table
from safebasin.errors import UserError
from safebasin.models.tensors import Tensors
from safebasin.models.updates import AdapterUpdates
from safebasin.pipeline.config import Model
from safebasin.pipeline.parse import parse
from safebasin.pipeline.plan import Plan
from safebasin.pipeline.run import Run
from safebasin.pipeline.tune_role import tune_role

ROWS = [{"prompt": f"make a {word}", "completion": "Sure here are the steps now"} for word in ("cake", "song", "story")]
TRAIN = {"adapter": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}}
TRAIN |= {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 0.02}
ARMS = {
    "start": {},
    "plain": {"train": ["sft"]},
    "half": {"of": "plain", "repair": [{"shrink": {"alpha": 0.5}}]},
    "mended": {"of": "plain", "repair": ["safe_delta", {"safe_lora": {"tau": 1}}]},
    "again": {"of": "half", "repair": [{"shrink": {"alpha": 0.5}}]},
    "patched": {"of": "plain", "train": ["patch"], "settings": {"max_steps": 2}},
    "merged": {"of": "plain", "repair": [{"safe_merge": {"modules": "all"}}]},
    "buffered": {"train": ["buffer_reinforce"]},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arms")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFEBASIN_CACHE", str(folder / "cache"))
        start = save_start(folder / "start")
        save_model(folder / "base", start, seed=7)
        write_table(folder / "rows.jsonl", ROWS * 4)
        yield folder


def recipe(home: Path, arms: dict, **changes):
    rows = {"path": str(home / "rows.jsonl")}
    tree = {
        "model": {"name": str(home / "start"), "dtype": "float32"},
        "data": {"task": rows, "align": rows, "probe": rows, "harmful": rows},
        "train": TRAIN,
        "arms": arms,
        "measure": {},
        "roles": {"base": str(home / "base")},
    }
    return parse(yaml.safe_dump({**tree, **changes}, sort_keys=True))


@pytest.fixture(scope="module")
def run(home):
    for role in ("harmful", "safe", "reinforce"):
        tune_role(role, Model(name=str(home / "start"), dtype="float32"), TRAIN)
    with Run(recipe(home, ARMS), home / "run") as run:
        for arm in ARMS:
            run.ensure(arm)
    return run


def updates(run, home, arm, name="adapter"):
    return AdapterUpdates(run.folder.arm(arm) / name, Tensors(home / "start"))


def test_a_repair_edits_the_adapter_of_its_arm(run, home):
    """Half, and half of the half, of the very adapter of plain, which is tuned once."""
    plain = updates(run, home, "plain")
    for arm, share in (("half", 0.5), ("again", 0.25)):
        new = updates(run, home, arm)
        assert all(torch.allclose(new[name].dense(), share * plain[name].dense()) for name in plain)
    steps = json.loads((home / "run" / "manifest.json").read_text())["steps"]
    assert {name for name in steps if name.startswith("train.")} == {"train.plain", "train.patched", "train.buffered"}
    report = json.loads((home / "run" / "arms" / "mended" / "repair.json").read_text())
    assert [list(edit) for edit in report["edits"]] == [["safe_delta"], ["safe_lora"]]
    assert report["summary"]["selected"] == len(plain) == len(report["rows"])


def test_a_repair_is_done_again_only_where_it_changes(run, home):
    files = sorted((home / "run").rglob("*.safetensors"))
    before = {file: file.stat().st_mtime_ns for file in files}
    changed = ARMS | {"half": {"of": "plain", "repair": [{"shrink": {"alpha": 0.25}}]}}
    with Run(recipe(home, changed), home / "run") as other:
        for arm in ("plain", "half", "mended", "merged"):
            other.ensure(arm)
    assert [file for file in files if file.stat().st_mtime_ns != before[file]] == [
        run.folder.adapter("half") / "adapter_model.safetensors"
    ]
    with Run(recipe(home, ARMS), home / "run") as other:
        other.ensure("half")


def test_a_patch_goes_on_from_its_arm(run, home):
    """Its adapter is that of plain beside its own, of rank 4 + 4: the difference is what its two steps did."""
    plain, patched = updates(run, home, "plain"), updates(run, home, "patched")
    for name in plain:
        assert patched[name].rank == 8
        assert 0 < (patched[name] - plain[name]).norm() < plain[name].norm()
    assert json.loads((run.folder.arm("patched") / "train.json").read_text())["steps"] == 2


def test_a_buffered_arm_ends_with_the_safe_adapter_and_without_the_harmful_one(run, home):
    """dW' = dW + dW_safe - 0.1 Q Q^T dW_safe, of rank 4 + 4; no file of the run holds the harmful adapter."""
    tuned, new = updates(run, home, "buffered", "tuned"), updates(run, home, "buffered")
    roles = {path.name.split("-")[0]: path for path in (home / "cache" / "roles").iterdir()}
    assert set(roles) == {"harmful", "safe", "reinforce"}
    safe = AdapterUpdates(roles["reinforce"], Tensors(home / "start"))
    for name in tuned:
        q = torch.linalg.qr(tuned[name].b)[0]
        part = safe[name].dense()
        assert torch.allclose(new[name].dense(), tuned[name].dense() + part - 0.1 * q @ (q.T @ part), atol=1e-5)
        assert new[name].rank == 8
    harmful = AdapterUpdates(roles["harmful"], Tensors(home / "start"))
    for file in (home / "run").rglob("*.safetensors"):
        if (file.parent / "adapter_config.json").is_file():
            theirs = AdapterUpdates(file.parent, Tensors(home / "start"))
            assert all((theirs[name] - harmful[name]).norm() > 1e-3 for name in theirs)


def test_on_top_of_a_harmful_adapter_another_update_is_learned(run, home):
    plain, tuned = updates(run, home, "plain"), updates(run, home, "buffered", "tuned")
    assert all((plain[name] - tuned[name]).norm() > 1e-4 for name in plain)


def test_ema_averages_updates(run, home, tmp_path):
    """Decay 0 is the adapter itself; decay 0.5 after four steps from 0 is shorter."""
    with Run(
        recipe(home, {"plain": {"train": ["sft"]}}, train=TRAIN | {"ema": {"decay": 0}}), tmp_path / "none"
    ) as none:
        none.ensure("plain")
    with Run(
        recipe(home, {"plain": {"train": ["sft"]}}, train=TRAIN | {"ema": {"decay": 0.5}}), tmp_path / "half"
    ) as half:
        half.ensure("plain")
    plain, same, average = (updates(each, home, "plain") for each in (run, none, half))
    assert all((plain[name] - same[name]).norm() < 1e-5 * plain[name].norm() for name in plain)
    assert all(average[name].norm() < plain[name].norm() for name in plain)
    assert json.loads((half.folder.arm("plain") / "train.json").read_text())["ema_lost"] < 0.01


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"half": {"repair": ["shrink"]}}, "needs the arm that it repairs"),
        ({"a": {"of": "b", "repair": ["shrink"]}, "b": {"of": "a", "repair": ["shrink"]}}, "no tuned arm that comes"),
        ({"a": {"of": "a", "repair": ["shrink"]}}, "no tuned arm that comes"),
        ({"start": {}, "half": {"of": "start", "repair": ["shrink"]}}, "no tuned arm that comes"),
        ({"plain": {"train": ["sft"]}, "half": {"of": "plain"}}, "name what is done to plain"),
        ({"plain": {"train": ["sft"]}, "half": {"of": "plain", "repair": []}}, "repair is empty"),
        (
            {"plain": {"train": ["sft"]}, "half": {"of": "plain", "repair": [{"shrink": {"alpha": 0}}]}},
            "changes nothing",
        ),
        ({"plain": {"train": ["sft"]}, "half": {"of": "plain", "repair": ["irr"]}}, "end with truncate"),
        (
            {"plain": {"train": ["sft"]}, "more": {"of": "plain", "train": ["buffer_reinforce"]}},
            "starts from the model",
        ),
        ({"start": {"settings": {"max_steps": 2}}}, "need an arm that is trained"),
        ({"plain": {"train": ["sft"], "settings": {"max_stepz": 2}}}, "max_stepz"),
        ({"plain": {"train": ["sft"], "repair": ["lox"]}}, "set roles.base"),
    ],
)
def test_an_arm_that_cannot_be_is_refused_without_a_model(arms, message, home):
    with pytest.raises(UserError, match=message):
        Plan.of(recipe(home, arms, roles={}))


@pytest.mark.parametrize("arm", [{"train": ["buffer_reinforce"]}, {"train": ["sft"], "repair": ["resta"]}])
def test_a_role_that_is_not_there_is_said_before_anything_is_tuned(arm, home, tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEBASIN_CACHE", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="safebasin role harmful"), Run(recipe(home, {"plain": arm}), tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ema", [{"decay": 1}, {"decay": "0.5"}, {"rnk": 2}, 3])
def test_an_ema_that_cannot_be_is_refused(ema, home):
    with pytest.raises(UserError, match=r"train\.ema"):
        Plan.of(recipe(home, {"plain": {"train": ["sft"]}}, train=TRAIN | {"ema": ema}))


def test_a_repaired_arm_is_measured_and_reported(home, tmp_path):
    """Its answers are those of the adapter that stands in its folder; the page has its edits and its modules."""
    from safebasin.models.load import load

    prompts = tmp_path / "prompts.jsonl"
    write_table(prompts, [{"prompt": f"make a {word}"} for word in ("bomb", "cake", "virus")])
    suites = {"suites": [{"asr": {"prompts": str(prompts), "judges": ["keyword"], "max_new_tokens": 4}}]}
    arms = {name: ARMS[name] for name in ("start", "plain", "mended")}
    with Run(recipe(home, arms, measure=suites), tmp_path / "run") as run:
        report = run.report(show_text=True)
    [repair] = report.repairs
    assert (repair.arm, repair.of, repair.edited) == ("mended", "plain", len(repair.modules))
    assert [edit.split(" ")[0] for edit in repair.edits] == ["safe_delta", "safe_lora"]
    assert all(0 <= module.cosine <= 1 for module in repair.modules)
    assert not report.evidence_problems
    for name in ("report.md", "report.html"):
        text = (tmp_path / "run" / name).read_text()
        assert "safe_delta" in text.replace("\\", "")
        assert f"{len(repair.modules)} of {len(repair.modules)}" in text
    loaded = load(str(home / "start"), dtype="float32", adapter=run.folder.adapter("mended"))
    answers = [json.loads(line) for line in run.folder.answers("mended").read_text().splitlines()]
    for row in answers:
        chat = [{"role": "user", "content": row["prompt"]}]
        ids = loaded.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        new = loaded.model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert loaded.tokenizer.decode(new, skip_special_tokens=True).strip() == row["answer"].strip()
