"""Logits of the reference: the adapter switched off, or with full fine-tuning the model before the first step.

It never changes, and rows come back in every epoch or sooner, so each row's are computed once.

A distribution over the vocabulary at every answer token is too large to cache. Cached are the last hidden states there,
``[n, hidden]`` a row in the model's own type, and the head is applied anew: a product in place of a forward. At most
``LIMIT`` bytes, in the memory of the host; rows beyond it are run again. So are all rows where the head is not one
frozen product (an adapter on it, a scale or a cap after it: seen on the first batch, bit for bit), and under FSDP,
where a forward is collective and no rank can leave it out alone. Under DDP a rank caches the rows that it sees. Nothing
is saved: a resumed run starts an empty cache. States are those of the batch that a row was first in; another padding
differs by rounding. The oracle owns the cache and hands it to losses with the batch.

With full fine-tuning nothing can be switched off. ``stored_reference`` runs all rows through the start before the first
step, and writes their states beside the checkpoints; its cache reads them from there, with a frozen copy of the head.
``copied_reference`` is a second model, for heads that are more than a product.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional

from safebasin.batch import Batch, Packed, by_length, collate, layout
from safebasin.console import progress
from safebasin.data.files import write_json
from safebasin.encode import TokenizedRow
from safebasin.errors import UserError
from safebasin.layer import LazyMapping
from safebasin.models.adapter import reference, unwrapped
from safebasin.models.hooks import evaluating, hooked
from safebasin.runtime import processes

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
        self.model: Any = None  # a reference of its own; None: the model with its adapter off
        self.states: Any = {}  # digest of a row -> [answer tokens, hidden]
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
    cache = batch.cache if isinstance(batch, CachedBatch) else None
    own = cache is not None and cache.model is not None
    inner = cache.model if cache is not None and own else unwrapped(model)
    if cache is None or cache.head is None:
        return _forward(inner, batch, own)[0]
    keys = _keys(batch)
    if all(key in cache.states for key in keys):
        return cache.logits(torch.cat([cache.states[key] for key in keys]).to(batch.mask.device))
    inputs: list[tuple[Tensor, dict[str, Any]]] = []

    def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        kind = args[0].device.type
        cast = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        inputs.append((args[0], cast))

    with hooked({cache.head: record}, inputs=True):
        logits, rows = _forward(inner, batch, own)
    cache.add(keys, *inputs[0], logits, batch, rows)
    return logits


def _forward(model: Any, batch: Batch, own: bool) -> tuple[Float[Tensor, "n vocabulary"], Batch | Packed]:
    """Logits of the answer tokens, and the rows as they were run; ``own``: by a model that is the reference itself.

    Without dropout: no random number is drawn, so the model's own are the same with the cache and without.
    """
    with evaluating(model), torch.no_grad() if own else reference(model):
        rows = layout(model, batch)
        return rows.targets(model(**rows.inputs).logits), rows


def _keys(batch: Batch) -> list[bytes]:
    """Digests of the rows: their tokens, and which of them are answers."""
    mask = functional.pad(batch.mask, (batch.input_ids.shape[1] - batch.mask.shape[1], 0))
    rows = zip(torch.stack([batch.input_ids, mask.long()], -1).cpu(), batch.attention_mask.bool().cpu(), strict=True)
    return [hashlib.blake2b(row[seen].numpy().tobytes(), digest_size=16).digest() for row, seen in rows]


# --- of full fine-tuning ----------------------------------------------------------------------------------------------

MARK = "complete-{}.json"  # of a process: its files are all there


class StoredStates(LazyMapping[bytes, Tensor]):
    """Hidden states by row, read from safetensors files."""

    def __init__(self, files: Iterable[Path]):
        handles = [safetensors.safe_open(file, "pt") for file in files]
        self.names = self.places = {bytes.fromhex(key): handle for handle in handles for key in handle.keys()}  # noqa: SIM118

    def __getitem__(self, key: bytes) -> Tensor:
        states: Tensor = self.places[key].get_tensor(key.hex())
        return states


def copied_reference(start: Any) -> ReferenceCache:
    """A second model that is never tuned, in the type that it was loaded in; its states are cached as an adapter's."""
    cache = ReferenceCache(start.requires_grad_(False).eval())
    cache.model = start
    return cache


def stored_reference(
    start: Any, rows: Sequence[TokenizedRow], folder: Path, pad: int, *, size: int, bf16: bool
) -> ReferenceCache:
    """A cache that holds every row, in files of ``folder``; processes share the rows. What is there is not run again.

    Args:
        start: the model before the first step, bare; every process calls with its own.
        rows: of all streams.
        pad: id of the padding token.
        size: rows a forward.
        bf16: whether the run computes under autocast in bfloat16: so does the reference.

    Raises:
        UserError: a model whose head is more than one product (a scale or a cap after it).
    """
    ranks, cache, cast = processes(), copied_reference(start), torch.bfloat16
    kind = start.device.type
    mark = folder / MARK.format(ranks.process_index)
    if not mark.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"states-{ranks.process_index}-*"):
            old.unlink()
        part = rows[ranks.process_index :: ranks.num_processes]
        count = 0
        with progress("reference", len(part)) as advance, torch.autocast(kind, cast, enabled=bf16):
            for done, indices in enumerate(by_length(part, size), 1):
                batch = CachedBatch(**vars(collate([part[i] for i in indices], pad).to(start.device)), cache=cache)
                reference_logits(start, batch)
                if cache.head is None:
                    raise UserError(
                        f"the head of {type(start).__name__} is more than one product, so that its reference cannot be"
                        " stored as hidden states; set train.reference: copy, a second model in memory"
                    )
                last = done * size >= len(part)
                if cache.states and (last or cache.room < LIMIT / 2):
                    tensors = {key.hex(): states.contiguous() for key, states in cache.states.items()}
                    safetensors.torch.save_file(tensors, folder / f"states-{ranks.process_index}-{count}.safetensors")
                    cache.states, cache.room, count = {}, LIMIT, count + 1
                advance(min(done * size, len(part)), "")
        write_json(mark, {"rows": len(part)})
    ranks.wait_for_everyone()
    cache.states = StoredStates(sorted(folder.glob("states-*.safetensors")))
    cache.cast = {"dtype": cast, "enabled": bf16}
    head = cache.head  # the weight that is tuned from here on: its values now
    cache.head = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    for name, value in head.named_parameters():
        setattr(cache.head, name, nn.Parameter(value.detach().clone(), requires_grad=False))
    cache.model = None
    return cache
