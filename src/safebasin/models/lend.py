"""One model in memory for all steps of a run: what is lent are modules of their own that share its weights.

Loading SmolLM2-135M takes three seconds of a CPU, and a run with two tuned arms asks for the start model seven times.
A lent model has its own modules, configuration and flags, so that an adapter on it, a hook or a frozen weight is not
seen by the others; only the numbers of the weights are shared. After a change of these in place, which torch counts,
the next request loads the model anew. Full fine-tuning changes them, and several processes may shard them: there
nothing is lent.
"""

import copy
from pathlib import Path
from typing import Any

from torch import nn

from safebasin.data.files import shown
from safebasin.models.load import ModelAndTokenizer, load, with_adapter
from safebasin.runtime import processes


class Lender:
    """Lends one model; any other is loaded."""

    def __init__(self) -> None:
        self._key = ""
        self._loaded: ModelAndTokenizer | None = None
        self._versions: list[int] = []

    def lend(self, name: str, adapter: str | Path | None = None, **how: Any) -> ModelAndTokenizer:
        """``load(name, adapter=adapter, **how)``, with shared weights where it has been loaded before."""
        what = f"the model {shown(name)!r}"
        key = repr((name, sorted(how.items(), key=lambda item: item[0])))
        if processes().num_processes > 1 or (self._loaded and self._key != key):
            return load(name, adapter=adapter, **how)
        if self._loaded is None or versions(self._loaded.model) != self._versions:
            loaded = load(name, **how)
            if getattr(loaded.model.config, "quantization_config", None) is not None:
                return with_adapter(loaded, adapter, what)
            self._key, self._loaded, self._versions = key, loaded, versions(loaded.model)
        shared = self._loaded._replace(model=sharing_copy(self._loaded.model))
        return with_adapter(shared, adapter, what)


def versions(model: nn.Module) -> list[int]:
    """How often each weight has been changed in place."""
    return [parameter._version for parameter in model.parameters()]


def sharing_copy(model: nn.Module) -> Any:
    """The same modules once more, with the same weights in memory."""
    weights = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, weights)
