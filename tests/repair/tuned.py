"""Tuned models for tests: the aligned tiny model, adapters made by plain PEFT, and random roles of small matrices."""

from pathlib import Path

import torch
from aligned import aligned_model
from peft import LoraConfig, get_peft_model

from safebasin.layer import Update
from safebasin.repair.walk import Roles

SHAPES = {"model.layers.0.q": (12, 8), "model.layers.1.q": (8, 12), "model.layers.10.q": (10, 10)}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def save_start(folder: Path) -> Path:
    """The aligned model and its tokenizer."""
    for part in aligned_model():
        part.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, start: Path, seed: int = 1, rank: int = 4, size: float = 0.2, **settings) -> Path:
    """A LoRA by plain PEFT on the aligned model, both factors random."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(start)
    config = LoraConfig(**{"r": rank, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings)
    tuned = get_peft_model(model, config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_" in name:
                p.copy_(size * torch.randn(p.shape, generator=draw))
    tuned.save_pretrained(folder)
    return folder


def save_model(folder: Path, start: Path, seed: int = 3, size: float = 0.05, only: str = "proj") -> Path:
    """The start with random numbers added to its matrices, as a full model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(start)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if only in name:
                p += size * torch.randn(p.shape, generator=draw)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(start).save_pretrained(folder)
    return folder


def update(shape: tuple[int, int], rank: int | None, draw: torch.Generator) -> Update:
    """A random update; dense where the rank is None."""
    if rank is None:
        return Update(torch.randn(*shape, generator=draw))
    return Update(torch.randn(shape[0], rank, generator=draw), torch.randn(rank, shape[1], generator=draw))


def moments(size: int, draw: torch.Generator) -> torch.Tensor:
    x = torch.randn(3 * size, size, generator=draw)
    return 2 / len(x) * x.T @ x


def random_roles(seed: int = 0, rank: int | None = 3) -> Roles:
    """Every role over three modules of different shapes."""
    draw = torch.Generator().manual_seed(seed)
    inputs = {name: moments(shape[1], draw) for name, shape in SHAPES.items()}
    return Roles(
        tuned={name: update(shape, rank, draw) for name, shape in SHAPES.items()},
        base={name: torch.randn(*shape, generator=draw) for name, shape in SHAPES.items()},
        safe={name: update(shape, 2, draw) for name, shape in SHAPES.items()},
        harmful={name: update(shape, 2, draw) for name, shape in SHAPES.items()},
        moments={stream: inputs for stream in ("probe", "task", "harmful")},
        gradients={name: torch.rand(*shape, generator=draw) for name, shape in SHAPES.items()},
    )


def densified(roles: Roles) -> Roles:
    """The same roles with the tuned updates dense."""
    import dataclasses

    return dataclasses.replace(roles, tuned={name: Update(each.dense()) for name, each in roles.tuned.items()})
