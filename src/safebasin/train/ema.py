"""EMA of the update: an exponential moving average of the weights, of which an adapter holds factors (settings of
arXiv:2508.12531, COLM 2025).

    M_0 = 0,   M_t = beta M_t-1 + (1 - beta) B_t A_t                                                                 (1)

An average of factors is not the average of their products. The sum is a concatenation of factors, brought back to
``rank`` by its singular values after every step; what that loses is reported.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.distributed.tensor import DTensor

from safebasin.errors import UserError
from safebasin.layer import Update
from safebasin.registry import validated
from safebasin.vector import Vector

FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_A\.default\.weight")


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Ema:
    """Settings of ``train.ema``."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99  # beta
    rank: PositiveInt | None = None  # of the average; None: four times that of the adapter


@dataclasses.dataclass
class UpdateAverage:
    """M, and the largest share of |M|^2 that a truncation has lost.

    ``vector`` holds the factors by the names of the parameters, so that checkpoints carry them as a method's state.
    """

    settings: Ema
    vector: Vector = dataclasses.field(default_factory=Vector)
    lost: float = 0.0

    def update(self, point: Mapping[str, Tensor]) -> None:
        """Equation 1, after a step.

        Raises:
            UserError: parameters that are no LoRA matrices, or are sharded.
        """
        beta = self.settings.decay
        with torch.no_grad():
            for name, a in point.items():
                if FACTOR.fullmatch(name) is None:
                    if ".lora_B." not in name:
                        raise UserError(f"train.ema averages the updates of LoRA, and {name} is none of its matrices")
                    continue
                other = name.replace(".lora_A.", ".lora_B.")
                b = point[other]
                if isinstance(a, DTensor):
                    raise UserError("train.ema reads complete matrices, which train.fsdp shards; leave one of them out")
                new = Update(b.float() * (1 - beta), a.float())
                if name in self.vector:
                    new = Update(self.vector[other], self.vector[name]) * beta + new
                rank = self.settings.rank or 4 * a.shape[0]
                if new.b.shape[1] > rank:
                    size = new @ new
                    new = new.balanced(rank)
                    self.lost = max(self.lost, 1 - (new @ new) / size if size else 0.0)
                assert new.a is not None
                self.vector[other], self.vector[name] = new.b.contiguous(), new.a.contiguous()

    def updates(self) -> dict[str, Update]:
        """M of every module, without the adapter's scale."""
        modules = {match["module"]: name for name in self.vector if (match := FACTOR.fullmatch(name))}
        return {
            module: Update(self.vector[name.replace(".lora_A.", ".lora_B.")].cpu(), self.vector[name].cpu())
            for module, name in modules.items()
        }


def read_ema(value: Any) -> Ema | None:
    """``train.ema`` of a recipe, or nothing."""
    return None if value is None else validated(Ema, value, "train.ema")
