"""Load a model with its tokenizer, and say in one line what is wrong with it."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from safebasin.errors import UserError
from safebasin.models.adapter import merge
from safebasin.models.bundled import resolve


class ModelAndTokenizer(NamedTuple):
    model: Any
    tokenizer: Any


def load(
    name: str, *, dtype: str = "bfloat16", adapter: str | Path | None = None, trust_remote_code: bool = False
) -> ModelAndTokenizer:
    """Load a model with its tokenizer; ``adapter`` is merged into the weights.

    Weights are read from safetensors only. On a CPU attention runs eager, which is faster there for short rows.

    Raises:
        UserError: unknown name, an adapter, float16, no chat template, weights that are not safetensors, not-a-number weights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in ("bfloat16", "float32"):
        raise UserError(
            f"dtype {dtype!r} is refused: gradients of small inner products vanish in float16; use bfloat16 or float32"
        )
    path = resolve(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    attention = {} if torch.cuda.is_available() else {"attn_implementation": "eager"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True, **attention, **options
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model {name!r}: {str(error).splitlines()[0]}") from error
    if not tokenizer.chat_template:
        raise UserError(
            f"the model {name!r} has no chat template; use its instruct version, or save a template with its tokenizer"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(
        model, "peft_config", None
    ):  # transformers puts it on its base: a fresh adapter would take its place and its alignment with it
        raise UserError(f"{name!r} is an adapter, not a model; merge it into its base, save that, and name the folder")
    if adapter is not None:
        model = merge(model, adapter)
    for parameter_name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f"the model {name!r} holds weights that are not numbers ({parameter_name}); it is broken")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return ModelAndTokenizer(model.to(device).eval(), tokenizer)
