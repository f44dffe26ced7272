"""The hidden state of a row: the right token, the right layer, whatever the padding."""

import pytest
import torch
from aligned import BAD, GOOD, aligned_model, coded
from torch.nn import functional

from safebasin.batch import collate
from safebasin.encode import TokenizedRow
from safebasin.errors import UserError
from safebasin.models.parts import blocks
from safebasin.scan.hidden import anchor_states, last_states

MODEL, TOKENIZER = aligned_model()
ROWS = coded(
    TOKENIZER, *((f"make a {word}" + " now" * i, "Sure here" + " steps" * (3 - i)) for i, word in enumerate(BAD[:4]))
)
# The template writes nothing behind the end of a turn; this row has two tokens there, which the state must not see.
TRAILED = TokenizedRow("trailed", (*ROWS[0].ids, 3, 13), (*ROWS[0].answer, False, False))


@pytest.mark.parametrize("layer", [None, 0, 1, 2])
def test_it_is_transformers_own_state_at_the_last_answer_token(layer):
    """hidden_states[l + 1] is behind block l; hidden_states[-1] is normed, so the last block alone differs from it."""
    batch = collate([*ROWS, TRAILED], TOKENIZER.pad_token_id)
    actual = last_states(MODEL, batch, layer)
    for row, state in zip([*ROWS, TRAILED], actual, strict=True):
        last = max(k for k, learned in enumerate(row.answer) if learned)
        seen: list[torch.Tensor] = []
        hook = MODEL.model.layers[2].register_forward_hook(lambda m, a, y, into=seen: into.append(y))
        states = MODEL(torch.tensor(row.ids)[None], output_hidden_states=True).hidden_states
        hook.remove()
        expected = states[-1] if layer is None else seen[0] if layer == 2 else states[layer + 1]
        torch.testing.assert_close(state, functional.normalize(expected[0, last], dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual[-1], actual[0], rtol=1e-4, atol=1e-5)


def test_anchor_states_are_the_states_of_every_row():
    many = coded(
        TOKENIZER, *((f"make a {word}" + " now" * i, "Sure") for i in range(4) for word in BAD + GOOD)
    )  # more than one batch
    together = anchor_states(MODEL, TOKENIZER, many, 1)
    alone = torch.cat([last_states(MODEL, collate([row], TOKENIZER.pad_token_id), 1) for row in many])
    torch.testing.assert_close(together.sum(0), alone.sum(0), rtol=1e-4, atol=1e-4)
    assert len(together) == len(many)


def test_a_model_without_a_list_of_blocks():
    class Blockless(torch.nn.Module):
        config = MODEL.config

        def get_decoder(self):
            return torch.nn.Module()

    assert list(blocks(MODEL)) == list(MODEL.model.layers)
    with pytest.raises(UserError, match="no list of its 3 blocks"):
        blocks(Blockless())
