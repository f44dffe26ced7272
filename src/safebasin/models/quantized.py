"""Weights in four bits: NF4 of QLoRA (arXiv:2305.14314, NeurIPS 2023), by bitsandbytes, on a GPU or a CPU.

A block of 64 numbers is stored as indices into 16 quantiles of a normal distribution, times the block's largest
absolute value, which is itself stored in 8 bits. A layer reads its weight back as numbers in every forward; these are
the model's weights, and what is said of the model here is said of them: scores, merged weights, answers.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from safebasin.errors import UserError


def check_nf4() -> None:
    """UserError: bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("model.quantization: nf4 needs bitsandbytes; install it: pip install 'safebasin[nf4]'")


def nf4(dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` by which linear layers are stored in NF4 and compute in ``dtype``."""
    from transformers import BitsAndBytesConfig

    check_nf4()
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": settings, "device_map": {"": 0 if torch.cuda.is_available() else "cpu"}}


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The layers whose weight is in four bits, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and getattr(module.weight, "quant_state", None) is not None
    }


def settle(model: nn.Module) -> None:
    """On a CPU with a fused kernel bitsandbytes would reorder the weights at the first forward in eval mode; training
    after it would read them wrongly."""
    for layer in quantized_layers(model).values():
        layer.support_avx512bf16_for_cpu = False


def shape(module: Any) -> tuple[int, ...]:
    """[out, in] of a layer's weight, however it is stored."""
    state = getattr(module.weight, "quant_state", None)
    return tuple(module.weight.shape if state is None else state.shape)


def dense_weight(module: Any) -> Tensor:
    """The weight of a layer in four bits as numbers [out, in], in the type that it computes in."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(module.weight.data, module.weight.quant_state)
    return weight if module.compute_dtype is None else weight.to(module.compute_dtype)


def _linear(module: Any, x: Tensor) -> Tensor:
    weight = dense_weight(module)
    return functional.linear(x.to(weight.dtype), weight, module.bias).to(x.dtype)


@contextlib.contextmanager
def plain_layers(model: nn.Module) -> Iterator[None]:
    """Inside, layers in four bits compute by torch's own product, which has a derivative in forward mode."""
    layers = list(quantized_layers(model).values())
    try:
        for layer in layers:
            layer.forward = functools.partial(_linear, layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def dequantize(model: nn.Module) -> None:
    """Put plain linear layers with the same numbers in the place of those in four bits; adapters stay around them."""
    from peft.tuners.lora import Linear

    for name, layer in quantized_layers(model).items():
        out, into = shape(layer)
        plain = nn.Linear(into, out, bias=layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(dense_weight(layer), requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(name, plain)
        if name.endswith(".base_layer"):  # PEFT's wrapper of such a layer merges into four bits; its plain one does not
            wrapper: Any = model.get_submodule(name.removesuffix(".base_layer"))
            wrapper.__class__, wrapper.is_target_conv_1d_layer = Linear, False
    for key in ("is_quantized", "is_loaded_in_4bit", "quantization_method", "hf_quantizer"):
        model.__dict__.pop(key, None)
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.__dict__.pop("quantization_config", None)
