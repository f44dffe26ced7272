"""What edits know of the data: moments of a layer's inputs, and squared gradients of its weight.

    H = (2 / n) sum_t x_t x_t^T  [in, in]      over the n tokens that are not padding
    F = mean over batches of (grad L)^2  [out, in],   L the mean negative log-likelihood of the batch's answer tokens

Both are mappings, module -> matrix, computed for as many modules at a time as fit into ``BUDGET``: a small model takes
one pass over the rows, a large one a pass a block. Modules that share their input (q, k and v) share its moments.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safebasin.batch import Batch, answer_logits
from safebasin.errors import DefenceError
from safebasin.models.hooks import hooked

BUDGET = 2**30  # bytes of matrices that are computed in one pass


class _Groups(Mapping[str, Tensor]):
    """Matrices by module, computed group by group; only the latest group is in memory."""

    def __init__(self, model: Any, batches: Sequence[Batch], modules: Sequence[str], budget: int = BUDGET):
        self.model, self.batches, self.budget = model, batches, budget
        self.sizes = {name: self.size(model.get_submodule(name)) for name in modules}
        self.group: dict[str, Tensor] = {}

    def size(self, module: nn.Module) -> int:
        """Bytes of a module's matrix."""
        raise TypeError("a kind of matrices says how large they are")

    def compute(self, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        raise TypeError("a kind of matrices says how they are computed")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.group:
            self.group, names = {}, list(self.sizes)
            taken, size = [], 0
            for other in names[names.index(name) :]:
                size += self.sizes[other]
                if taken and size > self.budget:
                    break
                taken.append(other)
            self.group = self.compute({other: self.model.get_submodule(other) for other in taken})
            for other, matrix in self.group.items():
                if not torch.isfinite(matrix).all():
                    raise DefenceError(f"{other}: its calibration is not finite")
        return self.group[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


class Moments(_Groups):
    """H of every module, float32."""

    def size(self, module: nn.Module) -> int:
        return 4 * int(module.in_features) ** 2  # type: ignore[call-overload]

    def compute(self, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        leaders: dict[str, str] = {}  # module -> the first one that takes the same input
        inputs: dict[int, tuple[str, Tensor]] = {}  # of the batch: the tensors are held, so that ids are their own
        count, mask = 0, torch.empty(0)

        def hook(name: str) -> Any:
            def remember(module: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0]
                leaders[name] = inputs.setdefault(id(x), (name, x))[0]
                if leaders[name] == name:
                    rows = x[mask].float()
                    sums[name] = sums.get(name, 0) + rows.T @ rows

            return remember

        with hooked({module: hook(name) for name, module in modules.items()}, inputs=True), torch.no_grad():
            for batch in self.batches:
                batch = batch.to(next(self.model.parameters()).device)
                mask = batch.attention_mask.bool()
                count += int(mask.sum())
                inputs.clear()
                self.model(**batch.inputs)
        if missing := sorted(modules.keys() - leaders.keys()):
            raise DefenceError(f"{missing[0]}: no calibration row reached it")
        done = {name: (total * (2 / count)).cpu() for name, total in sums.items()}
        return {name: done[leader] for name, leader in leaders.items()}


class SquaredGradients(_Groups):
    """F of every module, float32."""

    def size(self, module: nn.Module) -> int:
        return 4 * int(module.weight.numel())  # type: ignore[operator]

    def compute(self, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        weights = {name: module.weight for name, module in modules.items()}
        before = {name: weight.requires_grad for name, weight in weights.items()}
        sums = {name: torch.zeros(weight.shape) for name, weight in weights.items()}
        try:
            for weight in weights.values():
                weight.requires_grad_(True)
            for batch in self.batches:
                batch = batch.to(next(self.model.parameters()).device)
                logits = answer_logits(self.model, batch).float()
                loss = nn.functional.cross_entropy(logits[batch.mask], batch.labels[batch.mask])
                for name, part in zip(sums, torch.autograd.grad(loss, list(weights.values())), strict=True):
                    sums[name] += part.float().cpu() ** 2
        finally:
            for name, weight in weights.items():
                weight.requires_grad_(before[name])
        return {name: total / len(self.batches) for name, total in sums.items()}
