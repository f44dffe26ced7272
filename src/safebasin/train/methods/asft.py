"""AsFT: anchor the update to the alignment direction (arXiv:2506.08473, AAAI 2026, eq. 2-4).

    d = W_aligned - W_base  [out, in],    dW = s B A
    L = L_task + lambda sum_l |(I - C_l) s B_l A_l|_F^2                                               (eq. 4)
    official   C = d d^T / |d|_F              of the code, which is SafeLoRA's and no projector: eigenvalues sigma_i^2 / |d|_F
    topk       C = U_k U_k^T                  the projector on the top k left singular vectors of d, what eq. 2-3 intend
    rank1      C = vec(d) vec(d)^T / |d|_F^2  acts on dW as a vector: only the part of dW along d itself is free

Computed in low rank, with no matrix larger than d and never dW: ``train/anchor.py``.

Departs from the official code: once an optimizer step (the code adds it on every micro-step undivided, which multiplies lambda by
the accumulation); matrices are paired by name, not by position; differences and penalty in float32; ``scale`` is the explicit s.
Where aligned and base do not differ, d = 0, C = 0 and the penalty is |s B A|_F^2.
"""

import functools
import hashlib
import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from safebasin.errors import UserError
from safebasin.layer import Pair, read_directions, tensor_files, write_alignment_directions
from safebasin.models.bundled import BUILTIN, cache, resolve
from safebasin.train import method
from safebasin.train.anchor_projector import AnchorProjector, Departure

LORA_A = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_A\.(?P<adapter>[^.]+)\.weight")
BLOCK = re.compile(
    r"(?P<module>.+\.\d+\..+_proj)\.weight"
)  # the matrices that an adapter stands on, as most models name them


@functools.lru_cache(maxsize=1)
def directions(
    base: str, aligned: str, modules: tuple[str, ...], projector: str, k: int, device: torch.device
) -> dict[str, AnchorProjector]:
    """What is free of every module. The pair is read once, and its directions are kept in the cache folder."""
    folders = resolve(base), resolve(aligned)
    files = [path.resolve() for folder in folders for path in sorted(set(tensor_files(folder).values()))]
    facts = (modules, [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    path = cache() / f"directions-{hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()}.safetensors"
    if not path.is_file():
        write_alignment_directions(*folders, modules, path)
    if not any(d.any() for _, d in read_directions(path, modules)):
        raise UserError(
            f"asft: {aligned!r} and {base!r} hold the same weights, so there is no alignment direction between them"
        )
    return {module: AnchorProjector.of(d.to(device), projector, k) for module, d in read_directions(path, modules)}


def full(parameter: Tensor) -> Tensor:
    """All of a parameter that may be sharded, in float32; gradients flow back to the shards."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).float()


@method("asft", paper="arXiv:2506.08473", roles=("base",))
class AsFT:
    """Penalise what an update does outside the direction that made the model safe."""

    lam: float = 1.0  # lambda
    base: str = ""  # folder of the weights before alignment, or a builtin: name
    aligned: str = ""  # folder of the weights after it: the model that is tuned
    projector: Literal["official", "topk", "rank1"] = "official"
    k: int = 8  # singular vectors of topk
    scale: float = 1.0  # s: 1 in the official code; lora_alpha / r for the update as the model applies it

    def check(self) -> None:
        """What needs no model. UserError: base or aligned weights are not named or not there, or are not the two ends of one model."""
        if not (self.base and self.aligned):
            raise UserError(
                "asft needs asft.base and asft.aligned: the folders of the weights before and after alignment"
            )
        if {self.base, self.aligned} <= set(BUILTIN):
            return  # a pair; making them here would take time
        ends = resolve(self.base), resolve(self.aligned)
        Pair(*ends, [match["module"] for name in tensor_files(ends[1]) if (match := BLOCK.fullmatch(name))])

    def penalty(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """lambda sum_l |(I - C_l) s B_l A_l|_F^2, a scalar. UserError: a name or shape that differs, no LoRA matrices to penalise."""
        pairs = {match["module"]: name for name in parameters if (match := LORA_A.fullmatch(name))}
        if not pairs:
            raise UserError(
                "asft penalises LoRA matrices and finds none among the trainable parameters; tune with train.adapter"
            )
        device = next(iter(parameters.values())).device
        known = directions(self.base, self.aligned, tuple(pairs), self.projector, self.k, device)
        told: list[Tensor] = []
        for module, name in pairs.items():
            a, b = full(parameters[name]), full(parameters[name.replace(".lora_A.", ".lora_B.")])
            if known[module].shape != (b.shape[0], a.shape[1]):
                raise UserError(
                    f"asft: {module} has the direction {tuple(known[module].shape)} but is tuned as {b.shape[0], a.shape[1]}"
                )
            told += [b, a]
        return self.lam * self.scale**2 * Departure.apply([known[module] for module in pairs], *told)
