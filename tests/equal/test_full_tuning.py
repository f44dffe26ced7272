"""Full fine-tuning and adapters on weights in four bits equal the plain loop, for every method that can run on them.

The reference of full fine-tuning is a second model in the loop, and states in files, or a second model, in the host.
"""

import functools

import pytest
import torch
from plain import LR, STEPS, composed, loop
from test_trainer import NAMES, SAME, folders, quick  # noqa: F401 - fixtures
from tiny import LORA, PAD, tiny_model
from worker import hosted

from safebasin.models.adapter import all_weights, fresh_adapter
from safebasin.models.quantized import dequantize, quantized_layers
from safebasin.train.reference import StoredStates, copied_reference, stored_reference
from safebasin.vector import trainable

pytestmark = pytest.mark.slow

FULL = [name for name in NAMES if name != "buffer_reinforce"]  # it adds the factors of adapters
NF4 = [name for name in NAMES if name not in ("buffer_reinforce", "asft")]  # asft reads the weights themselves
RATE = LR / 10  # all weights move, not a few matrices


@torch.no_grad()
def error(actual, truth, start) -> float:
    """Distance over the length of the update."""
    assert actual.keys() == truth.keys() == start.keys()
    off = sum(float((actual[name] - truth[name]).square().sum()) for name in truth)
    way = sum(float((truth[name] - start[name]).square().sum()) for name in truth)
    assert way > 1e-4
    return (off / way) ** 0.5


def tuned(host):
    return {name: p.detach() for name, p in trainable(host.model).items()}


def full_host(methods, folder, way, **settings):
    model = tiny_model()

    def reference(rows):
        if way == "copy":
            return copied_reference(tiny_model())
        states = stored_reference(model, rows, folder / "reference", PAD, size=5, bf16=settings.get("bf16", False))
        assert isinstance(states.states, StoredStates)
        all_weights(model)
        return states

    wanted = reference if "reference" in methods.needs("roles") else None
    how = {"learning_rate": RATE} | settings
    return hosted(methods, folder, model=all_weights(model), reference=wanted, **how)


@pytest.fixture(scope="module")
def truth(folders):  # noqa: F811
    return functools.cache(
        lambda name, **changes: loop(
            composed(name, folders), model=all_weights(tiny_model()), reference=tiny_model(), lr=RATE, **changes
        )
    )


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("way", ["stored", "copy"])
def test_full_fine_tuning_equals_the_plain_loop(name, way, folders, truth, tmp_path):  # noqa: F811
    methods = composed(name, folders)
    if way == "copy" and "reference" not in methods.needs("roles"):
        return
    host = full_host(methods, tmp_path, way, micro=2, accumulation=4)
    host.train()
    assert error(tuned(host), truth(name), trainable(tiny_model())) < SAME


@pytest.mark.parametrize("name", ["star_dss", "safegrad", "asft", "alignguard"])
def test_full_fine_tuning_resumed_equals_the_plain_loop(name, folders, truth, tmp_path):  # noqa: F811
    """The states of the start come from files, where the model is a checkpoint already."""
    methods = composed(name, folders)
    first = full_host(methods, tmp_path, "stored", save_strategy="steps", save_steps=2, max_steps=2)
    first.train()
    host = full_host(methods, tmp_path, "stored")
    host.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert host.state.global_step == STEPS
    assert error(tuned(host), truth(name), trainable(tiny_model())) < SAME


def test_full_fine_tuning_under_autocast_equals_the_plain_loop(folders, truth, tmp_path):  # noqa: F811
    """One method whose loss reads the reference, under the same bfloat16."""
    host = full_host(composed("star_dss", folders), tmp_path, "stored", bf16=True)
    host.train()
    second = tiny_model()
    second.forward = torch.autocast("cpu", torch.bfloat16)(second.forward)
    expected = loop(
        composed("star_dss", folders), model=all_weights(tiny_model()), reference=second, lr=RATE, autocast=True
    )
    assert error(tuned(host), expected, trainable(tiny_model())) < SAME


# --- four bits -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(folders):  # noqa: F811
    """A model in NF4, and a plain one with the numbers that it stands for."""
    from transformers import AutoModelForCausalLM

    from safebasin.models.quantized import nf4, settle

    def model(plain=False):
        how = {"dtype": torch.float32, "attn_implementation": "eager", **nf4(torch.float32)}
        quantized = AutoModelForCausalLM.from_pretrained(folders["aligned"], **how)
        settle(quantized)
        assert len(quantized_layers(quantized)) == 3 * 7
        if plain:
            dequantize(quantized)
        return fresh_adapter(quantized, LORA, seed=0)

    return model


@pytest.mark.parametrize("name", NF4)
def test_nf4_equals_the_plain_loop_on_its_numbers(name, folders, packed, tmp_path):  # noqa: F811
    methods = composed(name, folders)
    expected = loop(methods, model=packed(plain=True))
    host = hosted(methods, tmp_path, micro=2, accumulation=4, model=packed())
    host.train()
    assert len(quantized_layers(host.model)) == 3 * 7
    assert error(tuned(host), expected, trainable(packed())) < SAME
