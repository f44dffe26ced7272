"""What the reference says of a row, asked once: it never changes, and rows come back, the task's every epoch, alignment rows sooner.

A distribution over the vocabulary at every answer token is too large to keep. Kept are the last hidden states there, ``[n, hidden]`` a row as the
model made them, and the head is applied anew: a product in place of a forward. At most ``LIMIT`` bytes a model, in the memory of the host; rows
beyond are asked again. So are all rows where the head is not one frozen product (an adapter on it, a scale or a cap after it: seen on the first
batch, bit for bit) and under FSDP, where a forward is collective and no rank can leave it out alone. Under DDP a rank keeps the rows that it sees.
Nothing is saved: a resumed run asks again. States are those of the batch that a row first stood in; another padding differs by rounding.
"""

import contextlib
import hashlib
import weakref
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional

from safebasin.batch import Batch, answer_logits
from safebasin.models.adapter import reference, unwrapped

LIMIT = 2**30  # bytes of hidden states: 900,000 answer tokens of SmolLM2-135M, 130,000 of an 8B model


class ReferenceCache:
    """Of one model: the head where it can be applied anew, how the forward casts it, and states by row."""

    def __init__(self, model: nn.Module):
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        plain = (
            type(head) is nn.Linear
            and not head.weight.requires_grad
            and not any(isinstance(part, FSDPModule) for part in model.modules())
        )
        self.head: Any = head if plain else None
        self.states: dict[bytes, Tensor] = {}
        self.cast: dict[str, Any] | None = None
        self.room = LIMIT

    def logits(self, states: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(states.device.type, **self.cast):  # type: ignore[arg-type]
            return self.head(states)

    def keep(self, keys: list[bytes], states: Tensor, cast: dict[str, Any], logits: Tensor, batch: Batch) -> None:
        if self.cast is None:
            self.cast = cast
            if not torch.equal(self.logits(states)[:, :-1].float(), logits.float()):
                self.head = None
                return
        for key, told, mask in zip(keys, states, batch.mask, strict=True):
            mine = told[:-1][mask].cpu()
            if key not in self.states and mine.nbytes <= self.room:
                self.states[key] = mine
                self.room -= mine.nbytes


KNOWN: "weakref.WeakKeyDictionary[nn.Module, ReferenceCache]" = weakref.WeakKeyDictionary()


def reference_logits(model: Any, batch: Batch) -> Float[Tensor, "n vocabulary"]:
    """Logits of the reference, without dropout, that predict the answer tokens, row after row."""
    inner = unwrapped(model)
    known = KNOWN[inner] if inner in KNOWN else KNOWN.setdefault(inner, ReferenceCache(inner))
    keys = _keys(batch) if known.head is not None else []
    if keys and all(key in known.states for key in keys):
        return known.logits(torch.cat([known.states[key] for key in keys]).to(batch.mask.device))
    seen: list[tuple[Tensor, dict[str, Any]]] = []

    def see(_: Any, told: tuple[Tensor, ...]) -> None:
        kind = told[0].device.type
        seen.append((told[0], {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}))

    training = inner.training
    inner.eval()  # no random number is drawn here, so the model's own are the same whether a row is known or not
    with reference(inner), known.head.register_forward_pre_hook(see) if keys else contextlib.nullcontext():
        logits = answer_logits(inner, batch)
    inner.train(training)
    if keys:
        known.keep(keys, *seen[0], logits, batch)
    return logits[batch.mask]


def _keys(batch: Batch) -> list[bytes]:
    """Digests of the rows: their tokens, and which of them are answers."""
    mask = functional.pad(batch.mask, (batch.input_ids.shape[1] - batch.mask.shape[1], 0))
    rows = zip(torch.stack([batch.input_ids, mask.long()], -1).cpu(), batch.attention_mask.bool().cpu(), strict=True)
    return [hashlib.blake2b(told[seen].numpy().tobytes(), digest_size=16).digest() for told, seen in rows]
