"""The ghost product: <grad_W L_row, V> for every row of a batch, from one forward and one backward.

A linear layer Y = X W^T with D = dL/dY has, for one row, grad_W L = sum_t D_t X_t^T, hence

    <grad_W L, V> = sum_t D_t . (V X_t)                                 X: [tokens, in], D: [tokens, out], V: [out, in]

L is the sum of the rows' losses, and no row attends to another, so D holds the gradient of every row: no per-row weight
gradient is formed. The cost over a forward is one backward to the activations and one product V X a layer.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from safebasin.batch import Batch, answer_logits
from safebasin.errors import DefenceError
from safebasin.scan.source import module_of
from safebasin.vector import Vector


def answer_nll(model: Any, batch: Batch) -> Float[Tensor, "batch answers"]:
    """Negative log-likelihood of every answer token, in float32 or wider."""
    logits = answer_logits(model, batch)[batch.mask]  # the vocabulary is the widest axis: answer tokens only
    losses = functional.cross_entropy(logits.to(_wide(logits)), batch.labels[batch.mask], reduction="none")
    return torch.zeros(batch.mask.shape, dtype=losses.dtype, device=losses.device).masked_scatter(batch.mask, losses)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@contextlib.contextmanager
def only_trainable(model: Any, names: Iterable[str]) -> Iterator[None]:
    """Inside, exactly the named weights require a gradient."""
    chosen = set(names)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


def ghost_product(
    model: Any,
    batch: Batch,
    token_loss: Callable[[Any, Batch], Float[Tensor, "batch answers"]],
    direction: Vector,
    *,
    reduction: Literal["sum", "mean"] = "sum",
) -> Float[Tensor, " batch"]:
    """<grad_W L_row, V> summed over the weights that ``direction`` names.

    ``reduction``: L_row is the sum or the mean of the row's answer tokens. The model must be in eval mode (dropout
    would make a score random). Products are accumulated in float32 or wider; V X itself is computed in the layer's own
    dtype, as the forward is.

    Raises:
        DefenceError: a layer mixes rows (its input has no batch axis), or no gradient reaches it: both would give low
        scores.
    """
    rows = batch.mask.shape[0]
    total: list[Tensor] = []
    reached: set[str] = set()

    def watch(name: str, v: Tensor) -> Callable[..., None]:
        def after(module: torch.nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            x = args[0].detach()
            if x.dim() != 3 or x.shape[0] != rows:
                raise DefenceError(
                    f"{name}: its input is {tuple(x.shape)}, not [{rows} rows, tokens, in]: rows are mixed"
                )
            if not y.requires_grad:
                y.requires_grad_()  # the graph starts here: the backward never goes below the lowest target

            def take(d: Tensor) -> None:
                vx = functional.linear(x, v.to(device=x.device, dtype=x.dtype))
                total.append((d.to(_wide(d)) * vx).sum(dim=(1, 2)).to(batch.mask.device))
                reached.add(name)

            y.register_hook(take)

        return after

    hooks = [module_of(model, name).register_forward_hook(watch(name, v)) for name, v in direction.items()]
    try:
        with torch.enable_grad(), only_trainable(model, ()):
            loss = token_loss(model, batch)
            row_loss = (loss * batch.mask).sum(1)
            if reduction == "mean":
                row_loss = row_loss / batch.mask.sum(1).clamp(min=1)
            if row_loss.requires_grad:
                row_loss.sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    missed = sorted(direction.keys() - reached)
    if missed:
        raise DefenceError(
            f"no gradient reached {len(missed)} of {len(direction)} weights ({missed[0]}): is it switched off?"
        )
    return torch.stack(total).sum(0)


def probe_gradient(
    model: Any, batch: Batch, objective: Callable[[Any, Batch], Float[Tensor, ""]], targets: Iterable[str]
) -> Vector:
    """grad_W of a scalar objective for the target weights, in their own dtype.

    Raises:
        DefenceError: the objective does not depend on a target, or its gradient is not finite or is zero everywhere.
    """
    weights = {name: model.get_parameter(name) for name in targets}
    with torch.enable_grad(), only_trainable(model, weights):
        grads = torch.autograd.grad(objective(model, batch), list(weights.values()), allow_unused=True)
    direction = Vector()
    for name, grad in zip(weights, grads, strict=True):
        if grad is None:
            raise DefenceError(f"the probe does not depend on {name}: is the layer switched off?")
        if not torch.isfinite(grad).all():
            raise DefenceError(f"the probe's gradient is not finite at {name}")
        direction[name] = grad
    if not any(grad.any() for grad in direction.values()):
        raise DefenceError("the probe's gradient is zero everywhere: every row would score 0")
    return direction
