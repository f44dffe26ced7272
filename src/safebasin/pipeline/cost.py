"""What tuning will take, before it begins: memory by arm, and about how long, by a product that is timed now.

Nothing is loaded or fetched: shapes come from the headers of weights that lie on this machine.
"""

import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from safebasin.data.files import shown
from safebasin.data.source import is_remote, open_rows
from safebasin.data.tensor_files import open_tensors, tensor_files
from safebasin.models.bundled import cache
from safebasin.models.tensors import BLOCK
from safebasin.pipeline.plan import Plan
from safebasin.runtime import resolved
from safebasin.train.settings import training_arguments

CHARACTERS = 4  # of a token, in English
NF4 = 0.53  # bytes a number: four bits, and the scales of 64 numbers in 8 bits with theirs


def costs(plan: Plan) -> list[str]:
    """A line an arm that is tuned: bytes of weights, gradients and optimizer without activations, and minutes.

    Tokens are counted by characters, and those that rows share are counted for each: a run may take half of it."""
    if not plan.compositions:
        return []
    if (shapes := _shapes(plan.recipe.model.name)) is None:
        return [f"memory and time: {plan.recipe.model.name} is not on this machine yet"]
    every, tuned = sum(map(math.prod, shapes.values())), _tuned(plan, shapes)
    if not tuned:
        return [f"no matrix in the files of the model is named by train.adapter: {shown(str(plan.recipe.adapter))}"]
    wide = 4 if plan.recipe.full or resolved(plan.recipe.model.dtype) == "float32" else 2
    blocks = sum(math.prod(shape) for name, shape in shapes.items() if BLOCK.fullmatch(name) and len(shape) == 2)
    base = wide * every if plan.recipe.model.quantization is None else wide * (every - blocks) + NF4 * blocks
    speed = _speed(torch.float32 if plan.recipe.arguments["bf16"] is False else torch.bfloat16)
    lines = []
    for arm, methods in plan.compositions.items():
        streams = len(methods.needs("streams"))
        # AdamW's two moments, the step's direction and a gradient a stream, each in float32; an adapter itself too
        held = base + 4 * tuned * (3 + 1 + streams + (not plan.recipe.full))
        if plan.recipe.full and "reference" in methods.needs("roles") and plan.recipe.train.get("reference") == "copy":
            held += every * (2 if resolved(plan.recipe.model.dtype) == "bfloat16" else 4)
        if plan.recipe.full and "base" in methods.needs("roles"):
            held += 4 * blocks
        text = f"arm {arm}: {tuned / 1e6:,.1f} million numbers tuned, {held / 2**30:.1f} GiB and the activations"
        if tokens := _tokens(plan, arm):
            tokens *= 1 + streams * plan.recipe.align_share
            text += f"; {(6 if plan.recipe.full else 4) * blocks * tokens / speed / 60:.0f} minutes or less"
        lines.append(text)
    return [*lines, f"at the speed of this moment: {speed / 1e9:.0f} GFLOP/s"]


def _shapes(name: str) -> Mapping[str, tuple[int, ...]] | None:
    """Shapes of a model's tensors; None where its weights are not on this machine."""
    folder: Any = Path(name)
    if name.startswith("builtin:"):
        folder = next(cache().glob(f"{name.removeprefix('builtin:')}-????????????"), folder)
    elif not folder.is_dir():
        cached = try_to_load_from_cache(name, "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else folder
    if not any(folder.glob("*.safetensors")):
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor, path in tensor_files(folder).items():
        with open_tensors(path) as file:
            shapes[tensor] = tuple(file.get_slice(tensor).get_shape())
    return shapes


def _tuned(plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many numbers are tuned: all, or r (in + out) of every matrix that the adapter is on."""
    if plan.recipe.full:
        return sum(map(math.prod, shapes.values()))
    targets, rank = plan.recipe.adapter.get("target_modules") or "all-linear", plan.recipe.adapter.get("r", 8)
    total = 0
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if isinstance(targets, str):
            chosen = bool(BLOCK.fullmatch(name) if targets == "all-linear" else re.fullmatch(targets, module))
        else:
            chosen = any(module == target or module.endswith(f".{target}") for target in targets)
        total += rank * sum(shape) if chosen and len(shape) == 2 else 0
    return total


def _tokens(plan: Plan, arm: str) -> float:
    """About how many tokens of the task are learned from over the run; 0 where its rows are on the Hub."""
    if is_remote(plan.recipe.data.task.path):
        return 0.0
    examples = open_rows(plan.recipe.data.task).examples
    sizes = [sum(len(str(message.get("content"))) for message in example.messages) for example in examples]
    if not sizes:
        return 0.0
    args = training_arguments(plan.arguments(arm), Path("unused"))
    rows = len(sizes) / (1 - plan.recipe.data.poison_share) * args.num_train_epochs
    if args.max_steps > 0:
        rows = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
    return rows * sum(sizes) / len(sizes) / CHARACTERS


def _speed(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a matrix product of 1024 on this machine's device, the best of three."""
    device, best = "cuda" if torch.cuda.is_available() else "cpu", math.inf
    a = torch.randn(1024, 1024, device=device).to(dtype)
    for _ in range(3):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - start)
    return float(2 * 1024**3 / best)
