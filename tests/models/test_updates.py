"""Updates read from adapters, against PEFT's own; they are written again as adapters."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from tuned import save_adapter, save_start

from safebasin.errors import DefenceError
from safebasin.layer import Update
from safebasin.models.load import load
from safebasin.models.tensors import Tensors
from safebasin.models.updates import AdapterUpdates, switched_on
from safebasin.models.write import write_lora

IDS = torch.tensor([[3, 20, 21, 4, 5, 6]])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("updates")
    save_start(folder / "start")
    return folder


def test_updates_are_those_of_peft(home):
    """Scales of rsLoRA and of patterns, against PEFT's own."""
    start = AutoModelForCausalLM.from_pretrained(home / "start")
    patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_rslora=True, **patterns)
    tuned = get_peft_model(start, config)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape))
    tuned.save_pretrained(home / "patterned")
    updates = AdapterUpdates(home / "patterned", Tensors(home / "start"))
    for name, module in tuned.named_modules():
        if hasattr(module, "lora_A"):
            ours = updates[name.removeprefix("base_model.model.")].dense()
            assert torch.allclose(ours, module.get_delta_weight("default"), atol=1e-5)


def test_switched_on_is_the_adapter_beside_the_weights(home):
    model = AutoModelForCausalLM.from_pretrained(home / "start").eval()
    beside = load(str(home / "start"), dtype="float32", adapter=save_adapter(home / "tuned", home / "start")).model
    with torch.no_grad():
        before = model(IDS).logits
        with switched_on(model, AdapterUpdates(home / "tuned", Tensors(home / "start"))):
            on = model(IDS).logits
        assert torch.equal(model(IDS).logits, before)
        assert torch.allclose(on, beside(IDS.to(beside.device)).logits.cpu(), atol=1e-4)


def test_a_dense_update_is_no_adapter(tmp_path):
    with pytest.raises(DefenceError, match="no adapter"):
        write_lora(tmp_path / "a", {}, {"m": Update(torch.ones(2, 2))})
