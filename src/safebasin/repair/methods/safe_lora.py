"""Safe LoRA: an update that disagrees with its image under the alignment matrix becomes that image (arXiv:2405.16833,
NeurIPS 2024).

    C = V V^T / |V|_F,  V = W_start - W_base                                                                         (1)
    dW' = C dW   where cos(C dW, dW) <= tau, or is among the K lowest                                                (2)

C is no projector: |C dW| / |dW| is about sigma^2 / |V|_F, so that a projected module is nearly deleted. The report has
that ratio as ``image``; ``matrix: topk`` is the projector on the top k left singular vectors of V.

Departs from the official code: modules are paired by name; out x out is never formed; one pass.
"""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, PositiveInt

from safebasin.layer import Update
from safebasin.repair import edit
from safebasin.repair.update import Matrix, cosine, multiplier
from safebasin.repair.walk import Layer


@edit("safe_lora", paper="arXiv:2405.16833", roles=("base",), strength=("tau", -1.0, 1.0))
class SafeLora:
    """Project the modules whose update disagrees with the alignment direction."""

    tau: Annotated[float, Field(ge=-1, le=1)] | None = 0.5  # tau; below 0 no module, at 1 every one
    lowest: PositiveInt | None = None  # K, in the place of tau: the paper's default is 10; ties project more
    matrix: Matrix = "official"  # V V^T / |V|, or the projector on its k largest directions
    k: PositiveInt = 16  # of topk

    def __post_init__(self) -> None:
        if (self.tau is None) == (self.lowest is None):
            raise ValueError("set tau, or tau: null and lowest")

    def statistic(self, layer: Layer) -> float:
        return round(cosine(layer.tuned.left(multiplier(layer.v, self.matrix, self.k)), layer.tuned), 5)

    def select(self, values: Mapping[str, float]) -> list[str]:
        tau = self.tau if self.lowest is None else sorted(values.values())[: self.lowest][-1]
        return [name for name, value in values.items() if tau is not None and value <= tau]

    def edit(self, layer: Layer) -> Update:
        return layer.tuned.left(multiplier(layer.v, self.matrix, self.k))
