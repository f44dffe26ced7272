"""The parts of a language model by what they are, whatever the architecture calls them."""

import sys
from typing import Any

from torch import nn

from safebasin.errors import UserError


def text_config(model: Any) -> Any:
    """The configuration of the language model: inside a multimodal one, that of its text part."""
    return model.config.get_text_config()


def context_length(model: Any) -> int:
    """How many tokens a model can hold; ``sys.maxsize`` where its positions have no end (BLOOM's have none)."""
    return getattr(text_config(model), "max_position_embeddings", None) or sys.maxsize


def language_model(model: Any) -> nn.Module:
    """The transformer that reads text, without head: inside a multimodal model neither its vision nor its sound."""
    decoder: nn.Module = model.get_decoder()
    return decoder


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
