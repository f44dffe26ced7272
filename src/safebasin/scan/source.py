"""The weights that a gradient score is taken over: linear weights inside the transformer blocks, chosen by name."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from safebasin.errors import DefenceError, UserError
from safebasin.models.hooks import hooked
from safebasin.models.parts import blocks, is_linear
from safebasin.models.quantized import quantized_layers, shape

Depth = Annotated[float, Field(gt=0, le=1)]  # a share of the model's blocks, from the top
MODULES = ("all-linear",)  # PEFT's word: every linear layer of the blocks, whatever its name


def target_weights(
    model: nn.Module,
    modules: tuple[str, ...] = MODULES,
    *,
    depth: float = 1.0,
) -> list[str]:
    """Names of the target weights, as in ``model.named_parameters()``; an adapter's own are not among them.

    ``depth``: the share of the blocks, from the top (at least one block).

    Raises:
        UserError: nothing matches, or the weights are quantised in another way than NF4, and so have no gradient.
    """
    if not 0 < depth <= 1:
        raise UserError(f"depth={depth}: it is a share of the model's blocks, above 0 and at most 1")
    every = blocks(model)
    prefix = next(name for name, module in model.named_modules() if module is every)
    layers = {
        name: module for name, module in model.named_modules() if name.startswith(f"{prefix}.") and is_linear(module)
    }
    matches: dict[str, int] = {}  # name of the module -> its block
    for name in layers:
        path = name.removeprefix(f"{prefix}.").split(".")
        if any(step.startswith("lora_") for step in path):
            continue
        # PEFT wraps a layer: q_proj becomes q_proj.base_layer
        owner = path[-2] if path[-1] == "base_layer" else path[-1]
        if modules == MODULES or owner in modules:
            matches[name] = int(path[0])
    if not matches:
        inside = sorted({name.split(".")[-1] for name in layers})
        raise UserError(
            f"no target weights: no weight of a linear layer named {', '.join(modules)} inside the model's blocks; "
            f"linear layers there: {', '.join(inside) or 'none'}; set `modules`"
        )
    last = range(len(every))[-max(1, round(depth * len(every))) :]
    names = [name for name, block in matches.items() if block in last]
    if not names:
        raise UserError(f"no target weights: the last {len(last)} blocks have none of them; raise `depth`")
    integers = (name for name in names if not layers[name].weight.is_floating_point())
    packed = next((name for name in integers if name not in quantized_layers(model)), None)
    if packed is not None:
        raise UserError(
            f"the weight of {packed} is quantised and has no gradient; load the model in bfloat16, or in four bits: "
            "model.quantization: nf4"
        )
    return [f"{name}.weight" for name in names]


def coverage(model: nn.Module, weights: Sequence[str]) -> float:
    """The share of the numbers in the language model's blocks, adapters left out, that the target weights hold.

    Less than all is the rule: biases and norms are no matrices, ``depth`` leaves blocks out, and experts that are one
    tensor a block are no linear layers.
    """
    numbers = sum(p.numel() for name, p in blocks(model).named_parameters() if "lora_" not in name)
    packed = quantized_layers(blocks(model)).values()  # a byte of such a weight holds two numbers
    numbers += sum(math.prod(shape(layer)) - layer.weight.numel() for layer in packed)
    return sum(math.prod(shape(module_of(model, name))) for name in weights) / numbers


def module_of(model: nn.Module, weight: str) -> nn.Module:
    """The layer that a target weight belongs to."""
    return model.get_submodule(weight.removesuffix(".weight"))


@contextlib.contextmanager
def at_weights(
    model: nn.Module, weights: Sequence[str], hook: Callable[[str, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """Inside, ``hook(weight, x, y)`` sees the input and the output of every target weight's layer, and may replace y.

    Raises:
        DefenceError: at the end, a weight that no forward has used.
    """
    reached: set[str] = set()

    def watch(weight: str) -> Callable[..., Tensor | None]:
        def after(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
            reached.add(weight)
            return hook(weight, args[0], y)

        return after

    with hooked({module_of(model, weight): watch(weight) for weight in weights}):
        yield
    missed = sorted(set(weights) - reached)
    if missed:
        raise DefenceError(
            f"{len(missed)} of {len(weights)} weights are not used ({missed[0]}): are they switched off?"
        )
