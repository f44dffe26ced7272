"""AsFT: anchor the update to the alignment direction (arXiv:2506.08473, AAAI 2026, eq. 2-4).

    d = W_aligned - W_base  [out, in],    dW = s B A
    L = L_task + lambda sum_l |(I - C_l) s B_l A_l|_F^2                                               (eq. 4)
    official   C = d d^T / |d|_F              the code's, as in SafeLoRA: no projector, eigenvalues sigma_i^2 / |d|_F
    topk       C = U_k U_k^T                  the projector on the top k left singular vectors of d, what eq. 2-3 intend
    rank1      C = vec(d) vec(d)^T / |d|_F^2  acts on dW as a vector: only the part of dW along d itself is free

Computed in low rank, with no matrix larger than d and never dW: ``train/anchor_projector.py``. With full fine-tuning
dW = W - W_aligned is dense, which takes a second copy of the blocks in memory; there s is 1.

Departs from the official code: where the largest eigenvalue of C, sigma_1^2 / |d|_F, is above 2, d is punished more
than any other direction; there C is scaled so that it is 1 (d d^T / sigma_1^2). The penalty is added once an optimizer
step (the code adds it on every micro-step undivided, which multiplies lambda by the accumulation); matrices are paired
by name, not by position; differences and penalty in float32; ``scale`` is the explicit s. Where aligned and base do not
differ, d = 0, C = 0 and the penalty is |s B A|_F^2.
"""

import functools
import re
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from safebasin.data.tensor_files import open_tensors, tensor_files
from safebasin.errors import UserError
from safebasin.layer import Pair
from safebasin.models.bundled import BUILTIN, resolve
from safebasin.train import method
from safebasin.train.anchor_projector import AnchorProjector, Departure, directions, full

LORA_A = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_A\.(?P<adapter>[^.]+)\.weight")
BLOCK = re.compile(r"(?P<module>.+\.\d+\..+_proj)\.weight")  # what adapters are put on, as most models name it


@method("asft", paper="arXiv:2506.08473", roles=("base",))
class AsFT:
    """Penalise what an update does outside the direction that made the model safe."""

    lam: NonNegativeFloat = 1.0  # lambda
    base: str = ""  # folder of the weights before alignment, or a builtin: name
    aligned: str = ""  # folder of the weights after it: the model that is tuned
    projector: Literal["official", "topk", "rank1"] = "official"  # the form of C, equations above
    k: PositiveInt = 8  # singular vectors of topk
    scale: PositiveFloat = 1.0  # s: 1 in the official code; lora_alpha / r for the update as the model applies it

    def check(self) -> None:
        """UserError: base or aligned weights are not named or not there, or are not two versions of one model."""
        if not (self.base and self.aligned):
            raise UserError(
                "asft needs asft.base and asft.aligned: the folders of the weights before and after alignment"
            )
        if {self.base, self.aligned} <= set(BUILTIN):
            return  # a pair; to convert them here would take time
        ends = resolve(self.base), resolve(self.aligned)
        Pair(*ends, [match["module"] for name in tensor_files(ends[1]) if (match := BLOCK.fullmatch(name))])

    def penalty(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """lambda sum_l |(I - C_l) s B_l A_l|_F^2, a scalar.

        Raises:
            UserError: a name or a shape that differs between the weights and the model; nothing to penalise.
        """
        pairs = {match["module"]: name for name in parameters if (match := LORA_A.fullmatch(name))}
        full_weights = not pairs
        pairs = pairs or {match["module"]: name for name in parameters if (match := BLOCK.fullmatch(name))}
        if not pairs:
            raise UserError(
                "asft penalises LoRA matrices, or the projections of blocks, and finds none among the trainable"
                " parameters"
            )
        device = next(iter(parameters.values())).device
        key = (tuple(pairs), device)
        if key not in self._projectors:
            self._projectors[key] = directions(self.base, self.aligned, key[0], self.projector, self.k, device)
        projectors = [self._projectors[key][module] for module in pairs]
        if full_weights:
            return self.lam * self._dense(parameters, pairs, projectors)
        matrices: list[Tensor] = []
        for (module, name), projector in zip(pairs.items(), projectors, strict=True):
            a, b = full(parameters[name]), full(parameters[name.replace(".lora_A.", ".lora_B.")])
            if projector.shape != (b.shape[0], a.shape[1]):
                shapes = f"the direction {tuple(projector.shape)} but is tuned as {b.shape[0], a.shape[1]}"
                raise UserError(f"asft: {module} has {shapes}")
            matrices += [b, a]
        return self.lam * self.scale**2 * Departure.apply(projectors, *matrices)

    def _dense(
        self, parameters: Mapping[str, Tensor], pairs: Mapping[str, str], projectors: list[AnchorProjector]
    ) -> Tensor:
        """sum_l |(I - C_l) (W - W_aligned)|_F^2."""
        device = next(iter(parameters.values())).device
        if not self._aligned:
            files = tensor_files(resolve(self.aligned))
            for name in pairs.values():
                with open_tensors(files[name]) as file:
                    self._aligned[name] = file.get_tensor(name).to(device).float()
        pieces = [piece for name in pairs.values() for piece in (full(parameters[name]) - self._aligned[name], None)]
        return Departure.apply(projectors, *pieces)

    @functools.cached_property
    def _aligned(self) -> dict[str, Tensor]:
        """The weights that full fine-tuning starts from, by name."""
        return {}

    @functools.cached_property
    def _projectors(self) -> dict[tuple[tuple[str, ...], torch.device], dict[str, AnchorProjector]]:
        """By modules and device, of the runs that this method has been part of."""
        return {}
