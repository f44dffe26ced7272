"""Keys and values of prompts, with the logits behind them: what prompts begin with alike is run once.

Prompts of a suite share their system turn, and those of a task its instruction: two thirds of their tokens in the
quickstart. Where the model takes packed rows, prompts run as trees of tokens (``safebasin.tree``) behind a cached
prefix, and each prompt's keys and values are gathered from there. Elsewhere prompts are padded on the left.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache

from safebasin.models.parts import text_config
from safebasin.tree import ALIKE, mask_dtype, sequences, takes_tree, tree_mask, tree_of

Tokens = tuple[int, ...]


class Prompted(NamedTuple):
    """Prompts that have been read, padded on the left, with what was answered so far."""

    past: Any  # keys and values, [prompts, heads, tokens, size] a layer
    seen: Int[Tensor, "prompts tokens"]  # 1 where there is a token
    logits: Float[Tensor, "prompts vocabulary"]  # of the token behind each

    def of(self, rows: Sequence[int]) -> "Prompted":
        """Those of some prompts; the others are let go."""
        places = torch.tensor(rows, device=self.seen.device)
        self.past.batch_select_indices(places)
        return Prompted(self.past, self.seen[places], self.logits[places])


@contextlib.contextmanager
def fused(model: Any) -> Iterator[None]:
    """Inside, eager attention is SDPA where that is the same: it does not copy the keys that heads share, which is a
    third of the time of a token behind a long prompt on a CPU."""
    config, same = model.config, takes_tree(model) and text_config(model) is model.config and model._supports_sdpa
    before, capped = config._attn_implementation, getattr(config, "attn_logit_softcapping", None)  # SDPA caps nothing
    if same and before == "eager" and capped is None:
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = before


class Prefill:
    """Reads prompts, of which ``prompts`` are all that will come: what these share is read once.

    Args:
        model: in eval mode.
        pad: any token id.
        prompts: token ids.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, pad: int, prompts: Sequence[Tokens]):
        self.model, self.pad, self.shared = model, pad, 0
        self._prefix: list[tuple[Tensor, Tensor]] = []  # keys and values of the shared tokens, by layer
        if len(prompts) < 2 or not takes_tree(model):
            return
        first, last = min(prompts), max(prompts)
        same = [a == b for a, b in zip(first[:-1], last[:-1], strict=False)]
        shared = same.index(False) if False in same else len(same)
        if shared >= ALIKE:
            ids = torch.tensor([first[:shared]], device=model.device)
            keep = torch.zeros(1, dtype=torch.long, device=model.device)
            with fused(model):
                out = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=keep)
            self._prefix = _layers(out.past_key_values)
            self.shared = shared

    def __call__(self, prompts: Sequence[Tokens]) -> Prompted:
        """Prompts, the longest first."""
        width, device = len(prompts[0]), self.model.device
        seen = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        if not takes_tree(self.model):
            return self._padded(prompts, seen)
        lengths = [len(ids) - self.shared for ids in prompts]
        with fused(self.model):
            parts = [self._tree(prompts[few], width) for few in sequences(lengths)]
        past = DynamicCache()
        for layer, pairs in enumerate(zip(*(part for part, _ in parts), strict=True)):
            past.update(torch.cat([keys for keys, _ in pairs]), torch.cat([values for _, values in pairs]), layer)
        return Prompted(past, seen, torch.cat([logits for _, logits in parts]))

    def step(self, new: Int[Tensor, " prompts"], read: Prompted) -> Prompted:
        """One token more behind each."""
        seen = torch.cat([read.seen, read.seen.new_ones(len(new), 1)], 1)
        with fused(self.model):
            out = self.model(
                input_ids=new[:, None],
                attention_mask=seen,
                position_ids=seen.sum(1, keepdim=True) - 1,
                past_key_values=read.past,
                use_cache=True,
                logits_to_keep=torch.zeros(1, dtype=torch.long, device=seen.device),
            )
        return Prompted(out.past_key_values, seen, out.logits[:, -1])

    def _tree(self, prompts: Sequence[Tokens], width: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Keys and values of each layer, and logits, from one sequence."""
        tree, device, shared = tree_of(prompts), self.model.device, self.shared
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self._prefix):
            cache.update(keys, values, layer)
        out = self.model(
            input_ids=torch.tensor([tree.ids[shared:]], device=device),
            position_ids=torch.tensor([tree.positions[shared:]], device=device),
            attention_mask=tree_mask(tree.attends[shared:].to(device), mask_dtype(self.model)),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.tensor([path[-1] - shared for path in tree.paths], device=device),
        )
        places = torch.tensor([[0] * (width - len(path)) + path for path in tree.paths], device=device)
        pairs = [(_gathered(keys, places), _gathered(values, places)) for keys, values in _layers(out.past_key_values)]
        return pairs, out.logits[0]

    def _padded(self, prompts: Sequence[Tokens], seen: Tensor) -> Prompted:
        width, device = seen.shape[1], seen.device
        out = self.model(
            input_ids=torch.tensor([[self.pad] * (width - len(ids)) + [*ids] for ids in prompts], device=device),
            attention_mask=seen,
            position_ids=(seen.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            # an index and no slice (logits_to_keep=1), which would be strided: see Batch.inputs
            logits_to_keep=torch.tensor([width - 1], device=device),
        )
        return Prompted(out.past_key_values, seen, out.logits[:, -1])


def _layers(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _gathered(states: Float[Tensor, "1 heads tokens size"], places: Int[Tensor, "prompts width"]) -> Tensor:
    """[prompts, heads, width, size]"""
    return states[0][:, places].transpose(0, 1).contiguous()
