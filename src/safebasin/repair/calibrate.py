"""What edits know of the data: moments of a layer's inputs, and squared gradients of its weight.

    H = (2 / n) sum_t x_t x_t^T  [in, in]      over the n tokens that are not padding
    F = mean over batches of (grad L)^2  [out, in],   L the mean negative log-likelihood of the batch's answer tokens

Both are mappings, module -> matrix, computed for as many modules at a time as fit into ``BUDGET``: a small model takes
one pass over the rows, a large one a pass a block. Modules that share their input (q, k and v) share its moments.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from safebasin.batch import Batch, answer_logits
from safebasin.errors import DefenceError
from safebasin.layer import LazyMapping
from safebasin.models.hooks import hooked

Source = Callable[[], tuple[Any, Sequence[Batch]]]
BUDGET = 2**30  # bytes of matrices that are computed in one pass


class _Groups(LazyMapping[str, Tensor]):
    """Matrices by module, computed group by group; only the latest group is in memory.

    Args:
        load: gives the model and the rows; it is called when the first matrix is asked for.
        shapes: [out, in] by module, in the order of the model.
    """

    def __init__(self, load: Source, shapes: Mapping[str, tuple[int, int]], budget: int = BUDGET):
        self.load, self.budget, self.group = load, budget, dict[str, Tensor]()
        self.names = self.sizes = {name: self.size(*shape) for name, shape in shapes.items()}

    @abc.abstractmethod
    def size(self, out: int, into: int) -> int:
        """Bytes of a module's matrix."""

    @abc.abstractmethod
    def compute(self, model: Any, batches: Sequence[Batch], modules: Mapping[str, Any]) -> dict[str, Tensor]: ...

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.group:
            self.group, names = {}, list(self.sizes)
            taken: list[str] = []
            size = 0
            for other in names[names.index(name) :]:
                size += self.sizes[other]
                if taken and size > self.budget:
                    break
                taken.append(other)
            model, batches = self.load()
            device = next(model.parameters()).device
            modules = {other: model.get_submodule(other) for other in taken}
            self.group = self.compute(model, [batch.to(device) for batch in batches], modules)
            for other, matrix in self.group.items():
                if not torch.isfinite(matrix).all():
                    raise DefenceError(f"{other}: its calibration is not finite")
        return self.group[name]


class Moments(_Groups):
    """H of every module, float32."""

    def size(self, out: int, into: int) -> int:
        return 4 * into * into

    def compute(self, model: Any, batches: Sequence[Batch], modules: Mapping[str, Any]) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        leaders: dict[str, str] = {}  # module -> the first one that takes the same input
        inputs: dict[int, tuple[str, Tensor]] = {}  # of the batch: the tensors are held, so that ids are their own
        count, mask = 0, torch.empty(0)

        def hook(name: str) -> Any:
            def remember(module: Any, args: tuple[Any, ...]) -> None:
                x = args[0]
                leaders[name] = inputs.setdefault(id(x), (name, x))[0]
                if leaders[name] == name:
                    rows = x[mask].float()
                    sums[name] = sums.get(name, 0) + rows.T @ rows

            return remember

        with hooked({module: hook(name) for name, module in modules.items()}, inputs=True), torch.no_grad():
            for batch in batches:
                mask = batch.attention_mask.bool()
                count += int(mask.sum())
                inputs.clear()
                model(**batch.inputs)
        if missing := sorted(modules.keys() - leaders.keys()):
            raise DefenceError(f"{missing[0]}: no calibration row reached it")
        done = {name: (total * (2 / count)).cpu() for name, total in sums.items()}
        return {name: done[leader] for name, leader in leaders.items()}


class SquaredGradients(_Groups):
    """F of every module, float32."""

    def size(self, out: int, into: int) -> int:
        return 4 * out * into

    def compute(self, model: Any, batches: Sequence[Batch], modules: Mapping[str, Any]) -> dict[str, Tensor]:
        weights = {name: module.weight for name, module in modules.items()}
        before = {name: weight.requires_grad for name, weight in weights.items()}
        sums = {name: torch.zeros(weight.shape) for name, weight in weights.items()}
        try:
            for weight in weights.values():
                weight.requires_grad_(True)
            for batch in batches:
                logits = answer_logits(model, batch).float()
                loss = functional.cross_entropy(logits[batch.mask], batch.labels[batch.mask])
                for name, part in zip(sums, torch.autograd.grad(loss, list(weights.values())), strict=True):
                    sums[name] += part.float().cpu() ** 2
        finally:
            for name, weight in weights.items():
                weight.requires_grad_(before[name])
        return {name: total / len(batches) for name, total in sums.items()}
