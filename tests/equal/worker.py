"""Tune the tiny model through the host; one process calls ``tune``, torchrun runs this file. Prints nothing, writes a safetensors file."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import safetensors.torch
import torch
import torch.distributed as dist
from tiny import LORA, PAD, random_rows, tiny_model

from safebasin.model import fresh_adapter
from safebasin.train.compose import Composition
from safebasin.train.host import Host, arguments, streams_of
from safebasin.vector import trainable

GLOBAL = 8  # rows a step over all ranks and micro-batches
STEPS = 5


def tune(methods: list, folder: Path, *, micro: int = GLOBAL, accumulation: int = 1, resume: str | None = None, **settings) -> dict[str, torch.Tensor]:
    """Trainable parameters after tuning with the given split of the same eight rows a step."""
    torch.set_num_threads(1)
    composition = Composition.of(methods)
    model = fresh_adapter(tiny_model(), LORA, seed=0)
    chosen = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation, "max_steps": STEPS}
    chosen |= {"learning_rate": 0.05, "lr_scheduler_type": "constant", "seed": 0, "max_grad_norm": 1.0, "optim": "adamw_torch"}
    args = arguments(chosen | settings, folder)
    rows = {"task": random_rows(22, 1, columns=composition.needs("columns"))}
    rows |= {name: random_rows(7, 2) for name in composition.needs("streams")}
    host = Host(model, args, composition, streams_of(rows, args, PAD, align_share=0.5))
    host.train(resume_from_checkpoint=resume)
    return {name: p.detach().clone() for name, p in trainable(host.model).items()}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    found = tune(asked["methods"], Path(asked["folder"]), micro=asked["micro"], accumulation=asked["accumulation"])
    if int(os.environ["RANK"]) == asked["writer"]:
        safetensors.torch.save_file({name: p.contiguous() for name, p in found.items()}, asked["out"])
    dist.barrier()
    dist.destroy_process_group()  # leaving it to the interpreter's end aborts now and then
