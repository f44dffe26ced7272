"""Tune the tiny model through the host. One process calls ``tune``. ``torchrun worker.py folder`` runs every method in
every mode of ``MODES``; each rank writes the parameters of all of them, and the errors of those that did not run."""

import functools
import gc
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import safetensors.torch
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from plain import BATCH, CLIP, EPS, LR, NAMES, STEPS, composed, rows_of
from tiny import LORA, PAD, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import Trainer

from safebasin.errors import UserError
from safebasin.models.adapter import fresh_adapter
from safebasin.train.compose import Composition
from safebasin.train.settings import training_arguments
from safebasin.train.trainer import OracleTrainer, streams_of
from safebasin.vector import Vector, trainable

LAYERS = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
}
SHARDED = {"fsdp": True, "fsdp_config": LAYERS}
MODES = {
    "ddp": {},
    "fsdp2": SHARDED,
    "fsdp2 checkpointing resumed": {"fsdp": True, "fsdp_config": LAYERS | {"activation_checkpointing": True}},
}


def shard_on_cpu() -> None:
    """accelerate shards on accelerators only; on a CPU it silently runs DDP. Take that condition away."""
    build = Trainer.create_accelerator_and_postprocess

    def built(self: Trainer) -> None:
        build(self)
        if self.args.fsdp:
            state = self.accelerator.state
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    Trainer.create_accelerator_and_postprocess = built


def hosted(
    methods: Composition,
    folder: Path,
    *,
    micro: int = BATCH,
    accumulation: int = 1,
    model=None,
    reference=None,
    **settings,
) -> OracleTrainer:
    """The host over the given split of the same eight rows a step. ``reference`` gives one from the rows of all
    streams, with full fine-tuning."""
    torch.set_num_threads(1)
    chosen = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation, "max_steps": STEPS}
    chosen |= {
        "optim": "adamw_torch",
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "seed": 0,
        "max_grad_norm": CLIP,
        "adam_epsilon": EPS,
        "save_strategy": "no",
    }
    args = training_arguments(chosen | settings, folder)
    streams = streams_of(rows_of(methods), args, PAD, align_share=0.5)
    cache = reference and reference([row for stream in streams.values() for row in stream.rows])
    return OracleTrainer(model or fresh_adapter(tiny_model(), LORA, seed=0), args, methods, streams, reference=cache)


def tune(methods: Composition, folder: Path, *, resume: str | None = None, **changes) -> dict[str, torch.Tensor]:
    """Trainable parameters after tuning, shards gathered."""
    host = hosted(methods, folder, **changes)
    host.train(resume_from_checkpoint=resume)
    assert all(isinstance(p, DTensor) == ("fsdp" in changes) for p in trainable(host.model).values())
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in trainable(host.model).items()
    }


def sharded(mesh: tuple[int, ...], *placements) -> Vector:
    """(0, 1, 2, 3, 4) in uneven shards, beside (5) on every rank: of length sqrt(55)."""
    full = torch.arange(5.0)
    return Vector(a=distribute_tensor(full, init_device_mesh("cpu", mesh), placements), b=torch.tensor([5.0]))


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    folders = {"base": str(folder / "base"), "aligned": str(folder / "aligned")}
    tuned_by_name, errors = {}, {}
    try:
        hosted(Composition.of(["sft"]), folder / "unpatched", **SHARDED)
    except UserError as error:
        errors["fsdp2 on a CPU"] = str(error)
    shard_on_cpu()
    gc.freeze()  # the Trainer collects garbage at every start
    for mode, settings in MODES.items():
        for name in NAMES:
            key = f"{mode}/{name}"
            try:
                run = functools.partial(
                    tune, composed(name, folders), folder / key, micro=2, accumulation=2, **settings
                )
                resume = None
                if "resumed" in mode:
                    run(max_steps=2, save_strategy="steps", save_steps=2)
                    resume = str(folder / key / "checkpoint-2")
                tuned = run(resume=resume)
            except Exception as error:  # reported by method, so that one does not hide the others
                errors[key] = f"{type(error).__name__}: {error}"
                continue
            tuned_by_name |= {f"{key}/{parameter}": p for parameter, p in tuned.items()}
    errors["norms"] = [sharded((2,), Shard(0)).norm(), sharded((2, 1), Replicate(), Shard(0)).norm()]
    safetensors.torch.save_file(tuned_by_name, folder / f"tuned{rank}.safetensors")
    (folder / f"errors{rank}.json").write_text(json.dumps(errors))
    dist.barrier()
    dist.destroy_process_group()  # leaving it to the interpreter's end aborts now and then
