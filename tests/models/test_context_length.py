"""How many tokens a model can hold."""

import sys

import pytest
from transformers import BloomConfig, GPT2Config, LlamaConfig

from safebasin.models.parts import context_length


class Model:
    def __init__(self, config):
        self.config = config


@pytest.mark.parametrize(
    ("config", "length"),
    [(LlamaConfig(max_position_embeddings=96), 96), (GPT2Config(n_positions=64), 64), (BloomConfig(), sys.maxsize)],
)
def test_how_many_tokens_a_model_holds(config, length):
    assert context_length(Model(config)) == length
