"""The parts of a model, whatever its architecture calls them."""

import sys

import pytest
import torch
from tiny import PAD, random_rows, tiny_model
from torch import nn
from transformers import BloomConfig, GPT2Config, Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, Phi3Config
from transformers.pytorch_utils import Conv1D

from safebasin.batch import collate
from safebasin.errors import UserError
from safebasin.models.adapter import fresh_adapter
from safebasin.models.parts import blocks, context_length, is_linear, language_model
from safebasin.scan.hidden import last_states
from safebasin.scan.source import target_weights


class Model:
    def __init__(self, config):
        self.config = config


class Doubling(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


SIZES = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
SIZES |= {"original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (LlamaConfig(max_position_embeddings=96), 96),
        (GPT2Config(n_positions=64), 64),
        (BloomConfig(), sys.maxsize),
        (Phi3Config(**SIZES, rope_parameters=LONG), 32),  # behind them its rotation is another one for all tokens
        (Phi3Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e4}), 64),
    ],
)
def test_how_many_tokens_a_model_holds(config, length):
    assert context_length(Model(config)) == length


def llama4():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "intermediate_size_mlp": 48}
    torch.manual_seed(0)
    return Llama4ForCausalLM(Llama4TextConfig(num_local_experts=4, num_experts_per_tok=1, pad_token_id=0, **sizes))


def test_the_text_model_is_found_where_transformers_does_not():
    model = llama4()
    assert model.get_decoder() is model and language_model(model) is model.model
    assert len(blocks(model)) == 2 and language_model(tiny_model()) is not None
    assert last_states(model, collate(random_rows(2), PAD)).shape == (2, 32)


def test_a_router_is_no_linear_layer():
    """Of Llama 4 it gives two tensors: nothing scores it, and an adapter on it is refused with the names of the
    others."""
    assert [is_linear(layer) for layer in (nn.Linear(3, 2), Conv1D(2, 3), Doubling(3, 2))] == [True, True, True]
    assert not is_linear(Router(3, 2)) and not is_linear(nn.Embedding(3, 2))
    model = llama4()
    assert "model.layers.0.feed_forward.router" in dict(model.named_modules())
    assert not [name for name in target_weights(model) if "router" in name]
    with pytest.raises(UserError, match=r"router is a Llama4Router.*\[down_proj, gate_proj, k_proj, o_proj, q_proj"):
        fresh_adapter(llama4(), {"r": 2, "target_modules": "all-linear"}, 0)
    assert fresh_adapter(llama4(), {"r": 2, "target_modules": ["q_proj"]}, 0) is not None
