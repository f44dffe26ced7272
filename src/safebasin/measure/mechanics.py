"""What tuning does to a layer: clusters, null space, effect, extrapolation (Jain et al. 2024, arXiv:2407.10264).

W is the first matrix of a block's MLP in two checkpoints, dW = W_tuned - W_start = sum_i sigma_i u~_i v_i^T.

    tau(x)     = ||a(x) - mu_U|| - ||a(x) - mu_S||,   separation = E_safe tau - E_unsafe tau              (1)
    sin(angle) = ||(I - P) u~_i||,   P = sum_{i<=r} u_i u_i^T of W_start, 99 % of its energy                (2)
    effect     = sigma_i v_i^T x / ||x||,   x what goes into W                                               (3)
    W(alpha)   = W_start + alpha dW = W_tuned + (alpha - 1) dW: a move of measure/landscape.py                (4)

Departs from the paper: a row's own cluster mean leaves the row out (else two draws of one cluster look separated); the
sine stands beside the one of a random direction; energy is the sum of sigma^2.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safebasin.batch import by_length, collate
from safebasin.encode import TokenizedRow
from safebasin.errors import UserError
from safebasin.measure.generate import prompt_ids
from safebasin.models.hooks import captured
from safebasin.models.load import ModelAndTokenizer
from safebasin.template import render

MLP = "gate_proj", "down_proj"


def margins(own: Float[Tensor, "n width"], other: Float[Tensor, "m width"]) -> Float[Tensor, " n"]:
    """How much nearer a row is to its own cluster, without itself, than to the other.

    Eq. 1: tau of safe rows, -tau of unsafe ones.

    Raises:
        ValueError: a cluster of one row.
    """
    if min(len(own), len(other)) < 2:
        raise ValueError(f"a cluster has two rows at least, found {len(own)} and {len(other)}")
    left_out = len(own) / (len(own) - 1)  # a - mean without a = (a - mean) n / (n - 1)
    return (own - other.mean(0)).norm(dim=-1) - left_out * (own - own.mean(0)).norm(dim=-1)


def both_margins(safe: Float[Tensor, "safe width"], unsafe: Float[Tensor, "unsafe width"]) -> "Pair":
    """Eq. 1 of the rows of both clusters."""
    return margins(safe, unsafe), margins(unsafe, safe)


class Change(NamedTuple):
    """dW = u diag(sigma) v, largest first; parts below rounding are left out, so that an unchanged weight has none."""

    u: Float[Tensor, "out k"]
    sigma: Float[Tensor, " k"]
    v: Float[Tensor, "k in"]


def change(start: Float[Tensor, "out in"], tuned: Float[Tensor, "out in"], k: int) -> Change:
    """The top ``k`` parts of dW."""
    u, sigma, v = torch.linalg.svd(tuned.float() - start.float(), full_matrices=False)
    rank = min(k, int((sigma > 1e-6 * start.float().norm()).sum()))
    return Change(u[:, :rank], sigma[:rank], v[:rank])


class Angles(NamedTuple):
    """Eq. 2 of the largest parts of a change."""

    sines: Float[Tensor, " k"]  # 1: in the null space of W^T
    chance: float  # of a random direction: sqrt(1 - r / out)


def null_angles(w: Float[Tensor, "out in"], u: Float[Tensor, "out k"], energy: float = 0.99) -> Angles:
    """Eq. 2."""
    left, sigma, _ = torch.linalg.svd(w.float(), full_matrices=False)
    share = sigma.square().cumsum(0) / sigma.square().sum()
    left = left[:, : (rank := int((share[:-1] < energy).sum()) + 1)]
    return Angles((u - left @ (left.T @ u)).norm(dim=0), (1 - rank / len(w)) ** 0.5)


def effects(parts: Change, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows k"]:
    """Eq. 3. The sign of a part is arbitrary, and one for all rows."""
    return (x / x.norm(dim=-1, keepdim=True)) @ parts.v.T * parts.sigma


def prompt_rows(loaded: ModelAndTokenizer, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[TokenizedRow]:
    """Conversations that end where the answer begins. Their last token is marked: states are read there."""
    texts = [render(loaded.tokenizer, turns, ask=True) for turns in conversations]
    return [
        TokenizedRow(str(i), ids, (*[False] * (len(ids) - 1), True))
        for i, ids in enumerate(prompt_ids(*loaded, texts, max_new_tokens=1))
    ]


@torch.inference_mode()
def inputs(
    loaded: ModelAndTokenizer, rows: Sequence[TokenizedRow], modules: Sequence[str]
) -> dict[str, Float[Tensor, "rows in"]]:
    """What goes into each linear module, averaged over the marked tokens of every row, float32 on the CPU."""
    model = loaded.model
    linear = {name: model.get_submodule(name) for name in modules}
    means = {name: torch.zeros(len(rows), module.in_features) for name, module in linear.items()}
    with captured(linear, inputs=True) as seen:
        for indices in by_length(rows, 16):
            batch = collate([rows[i] for i in indices], loaded.tokenizer.pad_token_id).to(model.device)
            model(**batch.inputs)
            for name in modules:
                marked = seen[name][:, -batch.mask.shape[1] :].float() * batch.mask[..., None]
                means[name][indices] = (marked.sum(1) / batch.mask.sum(1, keepdim=True)).cpu()
    return means


Pair = tuple[Float[Tensor, " safe"], Float[Tensor, " unsafe"]]  # a number a row


class Block(NamedTuple):
    """What tuning did to one block. Margins are in units of the activations.

    The separation is the sum of both mean margins, about 0 where safe and unsafe rows are one cluster.
    """

    module: str  # W
    start_margins: Pair  # eq. 1
    tuned_margins: Pair
    angles: Angles
    effects: Pair  # length of the top k effects


def compare(
    start: ModelAndTokenizer,
    tuned: ModelAndTokenizer,
    safe: Sequence[TokenizedRow],
    unsafe: Sequence[TokenizedRow],
    k: int = 3,
    mlp: tuple[str, str] = MLP,
) -> Iterator[Block]:
    """Every block: the first of ``mlp`` is W, the input of the second a(x). x of eq. 3 is read in the tuned model.

    Raises:
        UserError: the model has no linear module of that name.
    """
    names = [
        name
        for name, module in tuned.model.named_modules()
        if name.endswith(f".{mlp[0]}") and isinstance(module, nn.Linear)
    ]
    if not names:
        raise UserError(f"no linear module is named {mlp[0]!r}; name the first and the last matrix of the model's MLP")
    after = [name.removesuffix(mlp[0]) + mlp[1] for name in names]
    start_safe, start_unsafe = (inputs(start, rows, after) for rows in (safe, unsafe))
    tuned_safe, tuned_unsafe = (inputs(tuned, rows, after + names) for rows in (safe, unsafe))
    for name, act in zip(names, after, strict=True):
        w = start.model.get_submodule(name).weight.detach().cpu()
        parts = change(w, tuned.model.get_submodule(name).weight.detach().cpu(), k)
        yield Block(
            module=name,
            start_margins=both_margins(start_safe[act], start_unsafe[act]),
            tuned_margins=both_margins(tuned_safe[act], tuned_unsafe[act]),
            angles=null_angles(w, parts.u),
            effects=(effects(parts, tuned_safe[name]).norm(dim=-1), effects(parts, tuned_unsafe[name]).norm(dim=-1)),
        )
