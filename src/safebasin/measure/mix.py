"""Answers of the aligned model and its base, mixed by a weight per request (arXiv:2506.00166).

    z = (1 - lambda) z_base + lambda z_dsa

z_dsa are the logits with the safety adapter on, z_base with it off. lambda = 0 is the base, 1 the aligned model; a
guard may choose, for example lambda(x) = 1[P(unsafe | x) > t] (the paper's targeted form, from a review of it:
INFERRED).

Departs from the paper: z_dsa comes from the whole model with a LoRA adapter, not from a side network, so a token costs
two forwards.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from safebasin.encode import render
from safebasin.errors import UserError
from safebasin.measure.generate import Answer, stop_tokens
from safebasin.models.adapter import reference
from safebasin.models.parts import text_config


@torch.no_grad()
def mixed_generate(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    lam: Float[Tensor, " batch"],
    max_new_tokens: int,
) -> list[Answer]:
    """Greedy answers to one batch of conversations, each at most ``max_new_tokens`` long.

    ``lam`` holds one number in 0..1 for each conversation.

    Raises:
        UserError: a number outside 0..1 or a wrong count of them, or a request that leaves no room in the context.
        DefenceError: the model has no adapter.
    """
    if lam.shape != (len(conversations),) or not ((lam >= 0) & (lam <= 1)).all() or max_new_tokens < 1:
        needed = f"a lambda in 0..1 for each of {len(conversations)} requests, and a token"
        raise UserError(f"mixing needs {needed}; found {lam.tolist()}")
    prompts = [
        tokenizer(render(tokenizer, turns, ask=True), add_special_tokens=False)["input_ids"] for turns in conversations
    ]
    width, context = max(map(len, prompts), default=0), text_config(model).max_position_embeddings
    if width + max_new_tokens > context:
        raise UserError(f"a request of {width} tokens and its answer do not fit into the context of {context}")
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    weight, stops = lam.to(model.device, torch.float32)[:, None], stop_tokens(model, tokenizer)
    new_tokens: list[list[int]] = [[] for _ in prompts]
    caches: list[Any] = [None, None]  # of the base and of the aligned model
    while prompts and len(new_tokens[0]) < max_new_tokens and not all(stops & set(row) for row in new_tokens):
        last = torch.tensor([ids.shape[1] - 1], device=ids.device)  # an index, no slice: see Batch.inputs
        past = {"attention_mask": mask, "position_ids": positions, "use_cache": True, "logits_to_keep": last}
        with reference(model):
            base = model(input_ids=ids, past_key_values=caches[0], **past)
        aligned = model(input_ids=ids, past_key_values=caches[1], **past)
        caches = [base.past_key_values, aligned.past_key_values]
        z = (1 - weight) * base.logits[:, -1].float() + weight * aligned.logits[:, -1].float()
        ids, positions = z.argmax(-1)[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        for row, token in zip(new_tokens, ids[:, 0].tolist(), strict=True):
            row.append(token)
    ends = [next((k for k, token in enumerate(row) if token in stops), None) for row in new_tokens]
    return [
        Answer(tokenizer.decode(row[:end], skip_special_tokens=True), len(row[:end]), end is not None)
        for row, end in zip(new_tokens, ends, strict=True)
    ]
