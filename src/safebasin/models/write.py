"""Updates as files: a LoRA adapter, or the weights of a full model."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from safebasin.data.files import write_json
from safebasin.errors import DefenceError
from safebasin.layer import Update
from safebasin.models.tensors import Tensors
from safebasin.models.updates import PREFIX, AdapterUpdates


def write_lora(folder: Path, config: Mapping[str, Any], updates: Mapping[str, Update]) -> None:
    """An adapter that any loader of PEFT's files gives scale 1: s is in B, and lora_alpha is r module by module.

    Args:
        folder: written anew.
        config: of the adapter that the updates come from; its other settings stay.
        updates: in low rank.

    Raises:
        DefenceError: what was written does not read as what was to be written.
    """
    tensors, ranks = {}, {}
    for module, update in updates.items():
        if update.a is None:
            raise DefenceError(f"{module}: a dense update is no adapter; write full weights, or truncate it")
        ranks[module] = max(1, update.b.shape[1])
        missing = ranks[module] - update.b.shape[1]  # an update of rank 0 is written as one of rank 1 that is zero
        sides = {"A": nn.functional.pad(update.a, (0, 0, 0, missing)), "B": nn.functional.pad(update.b, (0, missing))}
        for side, matrix in sides.items():
            tensors[f"{PREFIX}{module}.lora_{side}.weight"] = matrix.float().contiguous()
    top = max(ranks.values())
    pattern = {module: rank for module, rank in ranks.items() if rank != top}
    settings = {"r": top, "lora_alpha": top, "rank_pattern": pattern, "alpha_pattern": pattern, "use_rslora": False}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    write_json(folder / "adapter_config.json", {**config, **settings, "init_lora_weights": True})
    written = AdapterUpdates.__new__(AdapterUpdates)  # without its checks: a zero update may be the result
    written.folder, written.config, written.names = folder, {**config, **settings}, tuple(updates)
    for module, update in updates.items():
        if (written[module] - update).norm() > 1e-6 * update.norm():
            raise DefenceError(f"{module}: the adapter that was written does not read as what was computed")


def write_model(folder: Path, tuned: Tensors, start: Tensors, updates: Callable[[str], Update | None]) -> int:
    """A full model, shard by shard: Wa + dW' where ``updates`` gives a dW', the tensor of ``tuned`` as it is elsewhere.

    Names, types and shards are those of ``tuned``. An entry of dW' that is zero carries the very bits of Wa, and one
    that is that of dW those of Wt.

    Returns:
        How many entries of dW' are smaller than the weight's type can hold beside Wa, so that they vanish.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in sorted(tuned.folder.iterdir()):
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    vanished = 0
    for path in sorted(set(tuned.files.values())):
        shard = {}
        for name in (name for name, file in tuned.files.items() if file == path):
            weight = tuned[name]
            new = updates(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if new is not None:
                aligned, change = start[name], new.dense()
                rounded = (aligned.float() + change).to(weight.dtype)
                vanished += int(((rounded == aligned) & (change != 0)).sum())
                same = change == weight.float() - aligned.float()
                weight = torch.where(change == 0, aligned, torch.where(same, weight, rounded))
            shard[name] = weight.contiguous()
        save_file(shard, folder / path.name, {"format": "pt"})
    return vanished
