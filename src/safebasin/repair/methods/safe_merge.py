"""SafeMERGE: a module whose update disagrees with the alignment direction is merged with that of a safe adapter
(arXiv:2503.17239).

    dW' = (1 - w) dW + w dW_safe   where cos(C dW, dW) < tau                                                         (1)

In low rank the sum is a concatenation [(1 - w) B | w B_safe] [A; A_safe], exact at rank r + r_safe.

Departs from the official code: that adds the factors (PEFT's `linear`), which is 0.66 to 0.70 of its length away from
equation 1 on random adapters; a module with dW = 0 is skipped, not merged; no DARE.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from safebasin.layer import Update
from safebasin.repair import edit
from safebasin.repair.update import Matrix, Share, cosine, multiplier
from safebasin.repair.walk import Layer


@edit("safe_merge", paper="arXiv:2503.17239", roles=("safe",), strength=("w", 0.0, 1.0))
class SafeMerge:
    """Mix a safe adapter into the modules that disagree with the alignment direction."""

    w: Share = 0.2  # w: 1 - alpha of the paper
    modules: Literal["all", "below"] = "below"  # all: LoRA fusion, which needs no base
    tau: Annotated[float, Field(ge=-1, le=1.1)] = 0.35  # tau
    matrix: Matrix = "official"  # V V^T / |V|, or the projector on its k largest directions
    k: PositiveInt = 16  # of topk

    def more(self, fact: str) -> tuple[str, ...]:
        return ("base",) if fact == "roles" and self.modules == "below" else ()

    def statistic(self, layer: Layer) -> float:
        if self.modules == "all":
            return -1.0
        return cosine(layer.tuned.left(multiplier(layer.v, self.matrix, self.k)), layer.tuned)

    def select(self, values: Mapping[str, float]) -> list[str]:
        return [name for name, value in values.items() if self.modules == "all" or value < self.tau]

    def edit(self, layer: Layer) -> Update:
        if self.w in (0, 1):
            return layer.roles["safe"] if self.w else layer.tuned
        return layer.tuned * (1 - self.w) + layer.roles["safe"] * self.w
