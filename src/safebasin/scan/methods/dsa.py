"""DSA: the guard inside the model, on every row (Disentangled Safety Adapters, arXiv:2506.00166).

    score(x, y) = max_t P(unsafe | x, y_<=t)

One forward scores every prefix of the answer (``safebasin.guards.side``), which is what STAR-DSS weighs tokens by.

Departs from the paper: it scores whole texts; the maximum, which finds harm anywhere in an answer, is ours.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor

from safebasin.batch import Batch
from safebasin.encode import TokenizedRow
from safebasin.guards.side import SHIPPED, SideGuard, fit_side_guard, own_rows
from safebasin.scan import scorer


@scorer("dsa", paper="arXiv:2506.00166", tokens="max", probability=True)
class Dsa:
    """How sure a guard on the model's hidden states is that the answer is unsafe."""

    # builtin: that of builtin:smollm2-aligned; or a saved guard's path without its ending; None: fitted here
    guard: str | None = "builtin"
    rows: PositiveInt = 64  # that a guard is fitted to here: of each of six kinds of the project's own rows

    def fit(self, model: Any, tokenizer: Any, anchors: Mapping[str, Sequence[TokenizedRow]]) -> SideGuard:
        if self.guard is None:
            return fit_side_guard(model, tokenizer, own_rows(self.rows))
        return SideGuard.load(SHIPPED if self.guard == "builtin" else Path(self.guard), model).reads(tokenizer)

    def score(self, model: Any, batch: Batch, fitted: SideGuard) -> Float[Tensor, "batch answers"]:
        return fitted.unsafe(model, batch)
