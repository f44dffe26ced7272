"""The derivative of every answer token's loss along one direction V of the weights, in forward mode: exact, no graph.

    <grad_W CE_t, V> = d/de CE_t(W + e V) at e = 0                                                                   (1)
    y = W x,   y' = W x' + V x                          at every target weight; ' is the derivative along V          (2)

Three things make it cheap. V is a gradient over few probe tokens, V = sum_s d_s x_s^T, so that V x = D^T (X x) costs
s (in + out) and not in * out. A derivative at a token depends on the tokens before it only, so a prompt that rows share
(system prompt, instruction) is run once, and its keys and values are cached with their derivatives. And every token's
part of its row's score costs nothing more.

Cost over a forward of the unshared tokens: about 2.2 with all layers; 1 + 1.2 k / n with the last k of n.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from safebasin.batch import Batch, pack
from safebasin.data.files import cause
from safebasin.errors import DefenceError, UserError
from safebasin.models.adapter import without_adapter
from safebasin.models.quantized import plain_layers
from safebasin.scan.source import at_weights
from safebasin.tree import by_positions, mask_dtype, sequences, takes_tree

KERNELS = ("_attn_implementation", "_experts_implementation")  # in a configuration

_NO_TANGENT = (
    "{} has a layer without a derivative in forward mode, so that no score of gradients can be computed: name scorers "
    "that read no gradient (scan.scorers: opening_margin, self_refusal, dsa)"
)
Dual = forward_ad.UnpackedDualTensor


class Factors(NamedTuple):
    """V = left @ right of one weight; ``right`` None: V = left."""

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "rank in"] | None

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x if self.right is None else functional.linear(x, self.right), self.left)


Direction = Mapping[str, Factors]  # weight -> its part of V


def gradient(
    model: Any, batch: Batch, objective: Callable[[Any, Batch], Float[Tensor, ""]], targets: Sequence[str]
) -> Direction:
    """grad_W of an objective over a few probe rows, in factors: a layer's inputs and the gradients at its outputs.

    Raises:
        DefenceError: the objective does not reach a target, or its gradient is not finite or is zero everywhere.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def remember(name: str, x: Tensor, y: Tensor) -> None:
        inputs[name], outputs[name] = x.detach(), y if y.requires_grad else y.requires_grad_()

    with _frozen(model), torch.enable_grad(), _eager(model), at_weights(model, targets, remember):
        value = objective(model, batch)
    grads = torch.autograd.grad(value, list(outputs.values()), allow_unused=True)
    direction = {}
    for name, d in zip(outputs, grads, strict=True):
        if d is None:
            raise DefenceError(f"the probe does not depend on {name}: is the layer switched off?")
        x, d = inputs[name].flatten(0, -2), d.flatten(0, -2)
        if not torch.isfinite(d).all():
            raise DefenceError(f"the probe's gradient is not finite at {name}")
        live = (d != 0).any(-1)  # the gradient at padding is zero
        x, d = x[live], d[live]
        narrow = len(x) * (x.shape[1] + d.shape[1]) < x.shape[1] * d.shape[1]
        direction[name] = Factors(d.T.contiguous(), x) if narrow else Factors(d.T @ x, None)
    if not any(factors.left.any() for factors in direction.values()):
        raise DefenceError("the probe's gradient is zero everywhere: every row would score 0")
    return direction


def through_adapter(direction: Direction, rank: int, seed: int) -> Direction:
    """V A^T A: the direction that a fresh LoRA adapter of scale 1 leaves of V. Its A [rank, in] is drawn as PEFT draws
    it, B = 0.

    There grad_A is zero and grad_B = grad_W A^T, hence <grad_B L, grad_B S> = <grad_W L, grad_W S A^T A>.
    """
    generator, projected = torch.Generator().manual_seed(seed), {}
    for name, (left, right) in direction.items():
        width = (left if right is None else right).shape[1]
        bound = width**-0.5  # Kaiming's, with a = sqrt(5)
        a = torch.empty(rank, width).uniform_(-bound, bound, generator=generator).to(left)
        projected[name] = Factors(left @ a.T if right is None else left @ (right @ a.T), a)
    return projected


class Tangent:
    """Derivatives along one direction. The last shared prefix is cached (``by_prefix`` groups rows that share one)."""

    def __init__(self, direction: Direction):
        self.direction = direction
        self._prefix: tuple[int, ...] = ()
        self._layers: list[tuple[Dual, Dual]] = []  # keys and values of the prefix, by layer

    @torch.no_grad()
    def token_losses(self, model: Any, batch: Batch) -> Float[Tensor, "batch answers"]:
        """d/de of every answer token's negative log-likelihood, in float32 or wider; zero elsewhere.

        The model must be in eval mode (dropout would make a score random).

        Raises:
            DefenceError: a target weight that the forward does not use.
            UserError: a layer has no derivative in forward mode.
        """

        def derive(name: str, x: Tensor, y: Tensor) -> Tensor:
            vx, (y, dy) = self.direction[name](forward_ad.unpack_dual(x).primal), forward_ad.unpack_dual(y)
            return forward_ad.make_dual(y, vx if dy is None else dy + vx)

        level = forward_ad.dual_level()
        with level, _eager(model), plain_layers(model), at_weights(model, list(self.direction), derive):
            try:
                shared = self._share(model, batch)
                losses = [self._losses(model, part, shared) for part in _parts(model, batch, shared)]
            except NotImplementedError as error:
                raise UserError(
                    f"{_NO_TANGENT.format(type(without_adapter(model)).__name__)} ({cause(error)})"
                ) from error
            slopes = [forward_ad.unpack_dual(part).tangent for part in losses]
        slope = torch.cat(slopes)
        return torch.zeros(batch.mask.shape, dtype=slope.dtype, device=slope.device).masked_scatter(batch.mask, slope)

    def _losses(self, model: Any, batch: Batch, shared: int) -> Float[Tensor, " n"]:
        """Of the answer tokens, row after row, with their derivatives; the first ``shared`` tokens are in the cache."""
        inner = without_adapter(model)
        packed = pack(batch, mask_dtype(inner), shared) if takes_tree(inner) else None
        rows, inputs = packed or batch, packed.inputs if packed else _behind(batch, shared)
        if shared:
            inputs |= {"past_key_values": self._cache(len(inputs["input_ids"])), "use_cache": True}
        logits = rows.targets(model(**inputs).logits)
        logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return -logs.gather(-1, batch.labels[batch.mask][:, None])[:, 0]

    def _share(self, model: Any, batch: Batch) -> int:
        """The length of the batch's shared prefix, now cached; 0 where the model's cache cannot be shared."""
        if not batch.shared:
            return 0
        ids = batch.input_ids[:1, batch.input_ids.shape[1] - int(batch.attention_mask[0].sum()) :][:, : batch.shared]
        prefix = tuple(ids[0].tolist())
        if prefix != self._prefix:
            first = torch.zeros(1, dtype=torch.long, device=ids.device)
            if not by_positions(without_adapter(model)):  # between prefix and row there may be padding
                return 0
            cache = model(
                input_ids=ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=first
            ).past_key_values
            if any(type(layer) is not DynamicLayer for layer in cache.layers):
                return 0
            self._prefix = prefix
            self._layers = [
                (forward_ad.unpack_dual(layer.keys), forward_ad.unpack_dual(layer.values)) for layer in cache.layers
            ]
        return batch.shared

    def _cache(self, rows: int) -> DynamicCache:
        cache = DynamicCache()
        for i, (keys, values) in enumerate(self._layers):
            cache.update(_repeated(keys, rows), _repeated(values, rows), i)
        return cache


def _parts(model: Any, batch: Batch, shared: int) -> Iterator[Batch]:
    """The batch, or parts of it that are each worth a sequence."""
    if not takes_tree(without_adapter(model)):
        yield batch
        return
    for few in sequences((batch.attention_mask.sum(1) - shared).tolist()):
        ids, seen, mask = batch.input_ids[few], batch.attention_mask[few], batch.mask[few]
        yield dataclasses.replace(batch, input_ids=ids, attention_mask=seen, mask=mask)


def _behind(batch: Batch, shared: int) -> dict[str, Any]:
    """Arguments of the forward of padded rows without their first ``shared`` tokens, which stand before the padding."""
    rows, width = len(batch.mask), batch.input_ids.shape[1] - shared
    position = batch.attention_mask.cumsum(-1) - 1
    seen = (batch.attention_mask * (position >= shared))[:, shared:]
    return {
        "input_ids": batch.input_ids[:, shared:],
        "attention_mask": torch.cat([seen.new_ones(rows, shared), seen], 1),
        "position_ids": position[:, shared:].clamp(min=0),
        "logits_to_keep": torch.arange(width - batch.mask.shape[1] - 1, width, device=seen.device),
        "use_cache": False,
    }


def _repeated(dual: Dual, rows: int) -> Tensor:
    t = dual.primal.expand(rows, -1, -1, -1)
    return t if dual.tangent is None else forward_ad.make_dual(t, dual.tangent.expand_as(t))


@contextlib.contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Inside, no weight requires a gradient: the graph starts at the lowest target."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Inside, attention and experts are eager: the fused kernels have no forward derivative."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = list({id(config): config for config in configs if isinstance(config, PreTrainedConfig)}.values())
    before = [(config, name, getattr(config, name)) for config in configs for name in KERNELS]
    try:
        for config, name, _ in before:
            setattr(config, name, "eager")
        yield
    finally:
        for config, name, kernel in before:
            setattr(config, name, kernel)
