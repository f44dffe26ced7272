"""Logits of the reference, computed once a row: it never changes, and rows come back in every epoch or sooner.

A distribution over the vocabulary at every answer token is too large to cache. Cached are the last hidden states there,
``[n, hidden]`` a row in the model's own type, and the head is applied anew: a product in place of a forward. At most
``LIMIT`` bytes, in the memory of the host; rows beyond it are run again. So are all rows where the head is not one
frozen product (an adapter on it, a scale or a cap after it: seen on the first batch, bit for bit), and under FSDP,
where a forward is collective and no rank can leave it out alone. Under DDP a rank caches the rows that it sees. Nothing
is saved: a resumed run starts an empty cache. States are those of the batch that a row was first in; another padding
differs by rounding. The oracle owns the cache and hands it to losses with the batch.
"""

import dataclasses
import hashlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional

from safebasin.batch import Batch, Packed, layout
from safebasin.models.adapter import reference, unwrapped
from safebasin.models.hooks import hooked

LIMIT = 2**30  # bytes of hidden states: 900,000 answer tokens of SmolLM2-135M, 130,000 of an 8B model


class ReferenceCache:
    """Of one model: the head where it can be applied anew, how the forward casts it, and hidden states by row."""

    def __init__(self, model: Any):
        inner = unwrapped(model)
        head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
        plain = (
            type(head) is nn.Linear
            and not head.weight.requires_grad
            and not any(isinstance(part, FSDPModule) for part in inner.modules())
        )
        self.head: Any = head if plain else None
        self.states: dict[bytes, Tensor] = {}
        self.cast: dict[str, Any] | None = None  # arguments of autocast in the forward
        self.room = LIMIT

    def logits(self, states: Tensor) -> Tensor:
        """[..., vocabulary] from hidden states [..., hidden], cast as in the forward."""
        with torch.no_grad(), torch.autocast(states.device.type, **(self.cast or {"enabled": False})):
            return self.head(states)

    def add(
        self,
        keys: list[bytes],
        states: Tensor,
        cast: dict[str, Any],
        logits: Tensor,
        batch: Batch,
        rows: Batch | Packed,
    ) -> None:
        """Cache the rows of a batch while there is room. ``states`` are the head's input in the forward of ``rows``.

        On the first batch the head's own product is compared with the model's ``logits`` [n, vocabulary]; where they
        differ nothing is cached from then on.
        """
        if self.cast is None:
            self.cast = cast
            if not torch.equal(rows.targets(self.logits(states)).float(), logits.float()):
                self.head = None
                return
        for key, row in zip(keys, rows.targets(states).cpu().split(batch.mask.sum(1).tolist()), strict=True):
            if key not in self.states and row.nbytes <= self.room:
                self.states[key] = row
                self.room -= row.nbytes


@dataclasses.dataclass(frozen=True)
class CachedBatch(Batch):
    """A batch as a loss gets it from the oracle: with the cache of the model's reference."""

    cache: ReferenceCache | None = None


def reference_logits(model: Any, batch: Batch) -> Float[Tensor, "n vocabulary"]:
    """Logits of the reference, without dropout, that predict the answer tokens, row after row."""
    inner = unwrapped(model)
    cache = batch.cache if isinstance(batch, CachedBatch) else None
    if cache is None or cache.head is None:
        return _forward(inner, batch)[0]
    keys = _keys(batch)
    if all(key in cache.states for key in keys):
        return cache.logits(torch.cat([cache.states[key] for key in keys]).to(batch.mask.device))
    inputs: list[tuple[Tensor, dict[str, Any]]] = []

    def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        kind = args[0].device.type
        cast = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        inputs.append((args[0], cast))

    with hooked({cache.head: record}, inputs=True):
        logits, rows = _forward(inner, batch)
    cache.add(keys, *inputs[0], logits, batch, rows)
    return logits


def _forward(model: Any, batch: Batch) -> tuple[Float[Tensor, "n vocabulary"], Batch | Packed]:
    """Logits of the answer tokens, and the rows as they were run. Without dropout: no random number is drawn, so the
    model's own are the same with the cache and without.
    """
    training = model.training
    model.eval()
    with reference(model):
        rows = layout(model, batch)
        logits = rows.targets(model(**rows.inputs).logits)
    model.train(training)
    return logits, rows


def _keys(batch: Batch) -> list[bytes]:
    """Digests of the rows: their tokens, and which of them are answers."""
    mask = functional.pad(batch.mask, (batch.input_ids.shape[1] - batch.mask.shape[1], 0))
    rows = zip(torch.stack([batch.input_ids, mask.long()], -1).cpu(), batch.attention_mask.bool().cpu(), strict=True)
    return [hashlib.blake2b(row[seen].numpy().tobytes(), digest_size=16).digest() for row, seen in rows]
