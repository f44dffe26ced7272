"""The parts of a language model by what they are, whatever the architecture calls them."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from safebasin.errors import UserError


def text_config(model: Any) -> Any:
    """The configuration of the language model: inside a multimodal one, that of its text part."""
    return model.config.get_text_config()


def context_length(model: Any) -> int:
    """How many tokens a model can hold; ``sys.maxsize`` where its positions have no end (BLOOM's have none), or it has
    no configuration.

    With LongRoPE (Phi-3's long ones): how many before it turns all tokens of a batch by other angles, so that a row's
    numbers would depend on the rows beside it.
    """
    config = text_config(model) if getattr(model, "config", None) else None
    rope = getattr(config, "rope_parameters", None) or {}
    longrope = rope.get("rope_type") == "longrope"
    name = "original_max_position_embeddings" if longrope else "max_position_embeddings"
    return rope.get(name) or getattr(config, name, None) or sys.maxsize


def language_model(model: Any) -> nn.Module:
    """The transformer that reads text, without head: inside a multimodal model neither its vision nor its sound."""
    decoder: Any = model.get_decoder()
    if decoder is model:  # so it is of Llama 4's text model; what holds the embedding is meant
        embedding = model.get_input_embeddings()
        decoder = next(each for each in model.modules() if any(part is embedding for part in each.children()))
    result: nn.Module = decoder
    return result


def is_linear(layer: Any) -> bool:
    """Whether a layer computes W x + b. A kind of Linear may compute something else, as Llama 4's router does."""
    if not isinstance(layer, nn.Linear | Conv1D):
        return False
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward) or not layer.weight.is_floating_point():
        return True
    with torch.no_grad():
        return isinstance(layer(layer.weight.new_zeros(1, layer.weight.shape[1])), Tensor)


def blocks(model: Any) -> nn.ModuleList:
    """The transformer blocks of the language model, in their order; without a configuration its first list of modules.

    Raises:
        UserError: the model has no list of as many blocks as its configuration says.
    """
    plain = getattr(model, "config", None) is None
    inside, count = (model, None) if plain else (language_model(model), text_config(model).num_hidden_layers)
    for module in inside.modules():
        if isinstance(module, nn.ModuleList) and len(module) == (count or len(module)):
            return module
    raise UserError(f"{type(model).__name__} has no list of its {count} blocks; its hidden states cannot be read")
