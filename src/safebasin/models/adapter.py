"""Adapters: a fresh one, one folded into the weights, and the reference, which is the adapter switched off."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn

from safebasin.data.tables import cause, read_json, shown
from safebasin.errors import DefenceError, UserError
from safebasin.layer import open_tensors
from safebasin.models.border import ERRORS, loading

FILES = ("adapter_config.json", "adapter_model.safetensors")


def merge(model: nn.Module, adapter: str | Path) -> nn.Module:
    """The model with an adapter folded into its weights; ``adapter`` is a folder or a Hub id.

    Raises:
        UserError: the adapter cannot be read, or is of another model: sizes or names of its tensors do not meet.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel

    what = f"the adapter {shown(adapter)!r}"
    with loading(what):
        folder = adapter_folder(adapter)
        settings = read_json(folder / "adapter_config.json")
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        if str(kind) not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise UserError(
                f"{what}: its adapter_config.json names no peft_type that this peft has: {shown(repr(kind))}"
            )
        tuned: Any = PeftModel.from_pretrained(model, str(folder))
        keys = tuned.load_adapter(str(folder), "default")  # a second time, for its report: the first one only warns
        if strange := sorted([*keys.unexpected_keys, *keys.missing_keys]):
            raise UserError(
                f"{what} is of another model: {len(strange)} of its tensors do not meet it ({shown(strange[0])})"
            )
        return tuned.merge_and_unload()


def adapter_folder(adapter: str | Path) -> Path:
    """The folder of an adapter, fetched where it is a Hub id; it holds the two files of one."""
    folder = Path(adapter)
    if not folder.exists():
        folder = Path(snapshot_download(str(adapter), allow_patterns=list(FILES)))
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{shown(adapter)} is not an adapter folder (no adapter_config.json in it)")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{shown(adapter)} holds no adapter_model.safetensors; other formats can run code when read and are refused"
        )
    with open_tensors(folder / "adapter_model.safetensors"):
        return folder


def fresh_adapter(model: nn.Module, settings: Mapping[str, Any], seed: int) -> Any:
    """A LoRA adapter that starts as the identity (B = 0); its A is a function of the seed.

    Raises:
        UserError: settings that PEFT refuses.
    """
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        except ERRORS as error:
            raise UserError(f"train.adapter: {cause(error)}") from error


def unwrapped(model: Any) -> Any:
    """The model inside DDP."""
    return getattr(model, "module", model) if isinstance(model, nn.parallel.DistributedDataParallel) else model


def without_adapter(model: Any) -> Any:
    """The transformers model inside DDP and PEFT; the adapter's layers stand in it all the same."""
    inner = unwrapped(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


@contextlib.contextmanager
def reference(model: Any) -> Iterator[None]:
    """Inside, the model is the one that tuning started from: its adapter is switched off, without a copy.

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
