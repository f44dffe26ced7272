"""Adapters: a fresh one, one folded into the weights, and the reference, which is the adapter switched off."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safebasin.errors import DefenceError, UserError


def merge(model: nn.Module, adapter: str | Path) -> nn.Module:
    """The model with an adapter folded into its weights."""
    from peft import PeftModel

    if not (Path(adapter) / "adapter_config.json").is_file() and Path(adapter).exists():
        raise UserError(f"{adapter} is not an adapter folder (no adapter_config.json in it)")
    if Path(adapter).is_dir() and not (Path(adapter) / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{adapter} holds no adapter_model.safetensors; other formats can run code when read and are refused"
        )
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


def fresh_adapter(model: nn.Module, settings: Mapping[str, Any], seed: int) -> Any:
    """A LoRA adapter that starts as the identity (B = 0); its A is a function of the seed."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))  # type: ignore[arg-type]
        except (ValueError, TypeError) as error:
            raise UserError(f"train.adapter: {error}") from error


def unwrapped(model: Any) -> Any:
    """The model inside DDP."""
    return getattr(model, "module", model) if isinstance(model, nn.parallel.DistributedDataParallel) else model


@contextlib.contextmanager
def reference(model: Any) -> Iterator[None]:
    """Inside, the model is the one that tuning started from: its adapter is switched off. No copy is made.

    Raises:
        DefenceError: the model has no adapter to switch off.
    """
    inner = unwrapped(model)
    if not hasattr(inner, "disable_adapter"):
        raise DefenceError(
            "a method needs the reference model, which is the adapter switched off, and this model has no adapter"
        )
    with inner.disable_adapter(), torch.no_grad():
        yield


def starts_fresh(model: nn.Module) -> bool:
    """Whether every adapter adds nothing yet, so that switching it off gives the starting model."""
    return all(not p.detach().any() for name, p in model.named_parameters() if "lora_B" in name)
