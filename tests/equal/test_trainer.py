"""Every way to run a step equals the plain loop, for every registered method, to 1e-5 of the length of the update.

FSDP2 runs through ``transformers.Trainer`` and accelerate's own wrapping, on two processes over gloo. accelerate shards
on accelerators only and drops FSDP on a CPU silently, which the host refuses; ``worker.shard_on_cpu`` takes that
condition away. A method that a mode cannot run must refuse it: it stands in ``REFUSED`` with its message, and nothing
else may fail.
"""

import copy
import functools
import gc
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
from away import adapted, assert_same
from plain import NAMES, STEPS, WholeBatches, composed, loop
from tiny import LORA, PAD, tiny_model
from worker import MODES, hosted, tune

from safebasin.batch import collate
from safebasin.errors import DefenceError, UserError
from safebasin.models.adapter import fresh_adapter
from safebasin.train import method
from safebasin.train.compose import Composition
from safebasin.train.oracle import Oracle
from safebasin.vector import Vector, trainable

pytestmark = pytest.mark.slow

SAME = 1e-5  # float32: other orders of summing, seen through a few steps of AdamW
# bfloat16 holds 2^-8 = 0.004 of a number, and a gradient is some ten products deep: 0.01 of the update, 0.045 for
# booster, whose direction is five times a difference of two gradients. Two splits of one step differ by 0.033 under it,
# so no host can promise less.
ROUNDED = 0.1
REFUSED: dict[tuple[str, str], str] = {}  # (method, mode) -> the words of its refusal


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Two tiny models on disk, the older and the newer, in a folder that is the cache too."""
    folder = tmp_path_factory.mktemp("equal")
    for name, seed in (("base", 5), ("aligned", 0)):
        tiny_model(seed).save_pretrained(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFEBASIN_CACHE", str(folder / "cache"))
        yield {name: str(folder / name) for name in ("base", "aligned")}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Every run of the Trainer begins with a garbage collection: half of its time, unless the imports are frozen."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def truth(folders):
    return functools.cache(lambda name, **changes: loop(composed(name, folders), **changes))


@torch.no_grad()
def error(actual: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Distance over the length of the update from the start."""
    start = trainable(fresh_adapter(tiny_model(), LORA, seed=0))
    assert actual.keys() == truth.keys() == start.keys()
    off = sum(float((actual[name] - truth[name]).square().sum()) for name in truth)
    way = sum(float((truth[name] - start[name]).square().sum()) for name in truth)
    assert way > 0.01
    return (off / way) ** 0.5


# --- the definition --------------------------------------------------------------------------------------


def log_probabilities(model, batch):
    """[batch, answers, vocabulary] by the whole forward: no tail, no head on chosen positions."""
    positions = batch.inputs["position_ids"]
    logits = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions).logits
    return logits[:, -batch.mask.shape[1] - 1 : -1].log_softmax(-1)


def written_out(name, model, task, align):
    """The direction of sft and of safegrad (rho 1) with their formulas in full; the reference is a second model."""
    parameters = list(trainable(model).values())
    picked = log_probabilities(model, task).gather(-1, task.labels[..., None])[..., 0]
    u = torch.autograd.grad(-(picked * task.mask).sum() / task.mask.sum(), parameters)
    if name == "safegrad":
        p, q = log_probabilities(adapted(0.0), align).detach(), log_probabilities(model, align)
        a = torch.autograd.grad(((p.exp() * (p - q)).sum(-1) * align.mask).sum() / align.mask.sum(), parameters)
        conflict, size = (sum((x * y).sum() for x, y in zip(v, a, strict=True)) for v in (u, a))
        assert conflict < 0
        u = [x - conflict / size * y + y for x, y in zip(u, a, strict=True)]
    return Vector(zip(trainable(model), u, strict=True))


@pytest.mark.parametrize("name", ["sft", "safegrad"])
def test_the_plain_loop_is_the_formula(name):
    methods = Composition.of([name])
    grad = WholeBatches(adapted(0.1), methods)
    batches = {name: collate(stream.rows_at(0), PAD) for name, stream in grad.streams.items()}
    task, align = batches["task"], batches.get("align")
    assert_same(methods.direction(grad), written_out(name, adapted(0.1), task, align), SAME)


SFT = ("sft", "buffer_reinforce")  # without its buffer, which the pipeline switches on, the latter is the former


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SFT])
def test_every_method_goes_elsewhere_than_sft(name, truth):
    """These tests can fail: methods differ by more than they allow, alignguard by 5e-4, the others by 0.03 and up."""
    assert error(truth(name), truth("sft")) > 10 * SAME


# --- modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("accumulation", [1, 4, 8])
def test_accumulation_equals_the_plain_loop(name, accumulation, folders, truth, tmp_path):
    assert (
        error(tune(composed(name, folders), tmp_path, micro=8 // accumulation, accumulation=accumulation), truth(name))
        < SAME
    )


@pytest.mark.parametrize("name", NAMES)
def test_resume_in_mid_run_equals_the_plain_loop(name, folders, truth, tmp_path):
    undisturbed = hosted(composed(name, folders), tmp_path, save_strategy="steps", save_steps=2, save_total_limit=None)
    undisturbed.train()
    host = hosted(composed(name, folders), tmp_path / "again")
    host.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert error({key: p.detach() for key, p in trainable(host.model).items()}, truth(name)) < SAME
    assert host.curve == undisturbed.curve


@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_equals_the_plain_loop(name, folders, truth, tmp_path):
    host = hosted(composed(name, folders), tmp_path, micro=4, accumulation=2, activation_checkpointing=True)
    passes = []
    host.model.get_base_model().model.layers[0].self_attn.register_forward_hook(
        lambda *_: passes.append(torch._C._current_graph_task_id())
    )
    host.train()
    assert error({name: p.detach() for name, p in trainable(host.model).items()}, truth(name)) < SAME
    assert any(task != -1 for task in passes)  # a layer ran again inside backward


@pytest.mark.parametrize("name", NAMES)
def test_bf16_autocast_equals_the_plain_loop(name, folders, truth, tmp_path):
    """On one batch the host adds no rounding to autocast's: it equals the plain loop under autocast as in float32.

    Against the plain loop in float32 the tolerance is ``ROUNDED``.
    """
    actual = tune(composed(name, folders), tmp_path, bf16=True)
    assert error(actual, truth(name, autocast=True)) < SAME
    assert error(actual, truth(name)) < ROUNDED


@pytest.fixture(scope="session")
def ranks(folders):
    """What two ranks came to, every method in every mode: one start for all."""
    folder = Path(folders["base"]).parent
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(Path(__file__).parent / "worker.py"),
    ]
    done = subprocess.run(
        [*command, str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        (
            safetensors.torch.load_file(folder / f"tuned{rank}.safetensors"),
            json.loads((folder / f"errors{rank}.json").read_text()),
        )
        for rank in (0, 1)
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_equal_the_plain_loop(mode, name, ranks, truth):
    for actual, errors in ranks:  # both replicas are the truth, not only the first
        key = f"{mode}/{name}"
        if (name, mode) in REFUSED:
            assert REFUSED[name, mode] in errors[key]
            continue
        assert key not in errors, errors[key]
        mine = {p_name.removeprefix(f"{key}/"): p for p_name, p in actual.items() if p_name.startswith(f"{key}/")}
        assert error(mine, truth(name)) < SAME


def test_a_norm_is_the_same_on_every_rank_however_it_is_sharded(ranks):
    """0 + 1 + 4 + 9 + 16 in uneven shards, on two ranks or within two replicas, and 25 on every rank: 55."""
    for _, errors in ranks:
        assert errors["norms"] == [pytest.approx(55**0.5)] * 2


def test_fsdp_that_would_not_shard_is_refused(ranks, tmp_path):
    assert all("this run is on cpu" in errors["fsdp2 on a CPU"] for _, errors in ranks)
    with pytest.raises(UserError, match="several processes"):
        hosted(Composition.of(["sft"]), tmp_path, **MODES["fsdp2"])


# --- liveness --------------------------------------------------------------------------------------------

UNREAD = {("patch", "task")}  # it follows the alignment rows alone
FAULTS = {
    "missing": lambda value: value.detach(),
    "zero": lambda value: value * 0,
    "non-finite": lambda value: value * float("nan"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("name", "source"),
    [
        (e.name, source)
        for e in (each for each in method if each.name in NAMES)
        for source in ("task", *e.streams, "penalty")
        if (e.name, source) not in UNREAD and (source != "penalty" or hasattr(e.kind, "penalty"))
    ],
)
def test_a_method_without_its_gradient_stops_the_run_before_any_update_by_it(
    name, source, fault, folders, tmp_path, monkeypatch
):
    """The first step that asks for a stream or penalty stops; nothing that was made of it reaches the parameters."""
    methods, spoilt, steps = composed(name, folders), FAULTS[fault], []
    original = Oracle._mean

    def mean(self, loss, stream, at):
        steps.extend([self.step] * (stream == source))
        spoilt_loss = (lambda model, batch: spoilt(loss(model, batch))) if stream == source else loss
        return original(self, spoilt_loss, stream, at)

    monkeypatch.setattr(Oracle, "_mean", mean)
    if source == "penalty":
        penalty, steps = methods.penalty, [0]
        methods = Composition(
            methods.methods,
            {**methods.components, "penalty": types.SimpleNamespace(penalty=lambda point: spoilt(penalty(point)))},
        )
    host = hosted(methods, tmp_path)
    with pytest.raises(DefenceError, match=r"gradient|dead"):
        host.train()
    assert host.state.global_step == steps[0] < STEPS


def test_a_parameter_that_no_loss_reaches_stops_the_run(tmp_path):
    host = hosted(Composition.of(["sft"]), tmp_path)
    host.model.register_parameter("alone", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(DefenceError, match="alone got no gradient"):
        host.train()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(lambda v: v * float("inf"), "not finite"), (lambda v: Vector(list(v.items())[1:]), "differ at")],
)
def test_a_direction_that_is_not_one_stops_the_run(spoil, words, tmp_path, monkeypatch):
    original = Composition.direction
    monkeypatch.setattr(Composition, "direction", lambda self, grad: spoil(original(self, grad)))
    host = hosted(Composition.of(["sft"]), tmp_path)
    before = copy.deepcopy(trainable(host.model))
    with pytest.raises(DefenceError, match=words):
        host.train()
    assert all(torch.equal(before[name], p) for name, p in trainable(host.model).items())
