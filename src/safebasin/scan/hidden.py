"""Hidden states at a row's last answer token (the end of the turn, where the template marks it)."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from safebasin.batch import Batch, by_length, collate
from safebasin.encode import TokenizedRow
from safebasin.models.adapter import without_adapter
from safebasin.models.hooks import captured
from safebasin.models.parts import blocks, language_model

ANCHOR_BATCH = 16  # anchor rows in one forward; it changes no number


@torch.no_grad()
def last_states(model: Any, batch: Batch, layer: int | None = None) -> Float[Tensor, "batch hidden"]:
    """Unit vectors, float32 or wider: the output of block ``layer`` (from 0), or, without one, what the head reads
    (normed).

    At the last answer token of a row. The vocabulary's head is not run.
    """
    modules = {} if layer is None else {layer: blocks(model)[layer]}
    inputs = {name: value for name, value in batch.inputs.items() if name != "logits_to_keep"}
    with captured(modules) as outputs:
        final = language_model(without_adapter(model))(**inputs).last_hidden_state
    states = final if layer is None else outputs[layer]
    back = 1 + batch.mask.flip(1).int().argmax(1)  # places from the right end, where all rows end
    last = states[torch.arange(len(states), device=states.device), states.shape[1] - back]
    return functional.normalize(last.to(torch.promote_types(last.dtype, torch.float32)), dim=-1)


def anchor_states(
    model: Any, tokenizer: Any, rows: Sequence[TokenizedRow], layer: int | None = None
) -> Float[Tensor, "rows hidden"]:
    """``last_states`` of an anchor set; the order is that of the batches."""
    device = next(model.parameters()).device
    batches = (
        collate([rows[i] for i in few], tokenizer.pad_token_id).to(device) for few in by_length(rows, ANCHOR_BATCH)
    )
    return torch.cat([last_states(model, batch, layer) for batch in batches])
