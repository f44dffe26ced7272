"""Several methods in one step. Each claims places; two that claim the same one are refused by name.

    token loss   ``loss(model, batch)``   takes the place of the negative log-likelihood of the task
    penalty      ``penalty(parameters)``  is added to the task once an optimizer step
    surgery      ``direction(grad)``      makes the direction out of ``grad.task()`` and other streams

The direction of a composition is therefore  surgery( grad[ token loss ] + grad[ penalty ], other streams ).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from safebasin.errors import UserError
from safebasin.train import method
from safebasin.train.loss import nll
from safebasin.train.oracle import Grad, Loss
from safebasin.vector import Vector

PLACES = {"loss": "token loss", "penalty": "penalty", "direction": "surgery"}


@dataclasses.dataclass(frozen=True)
class Composition:
    """The methods of a run by place."""

    methods: tuple[Any, ...]
    places: Mapping[str, Any]

    @classmethod
    def of(cls, specs: Sequence[Any]) -> "Composition":
        """Build the methods from their configuration.

        Raises:
            UserError: no method, an unknown one, one whose files do not stand, or two that claim the same place.
        """
        methods = tuple(method.make(spec) for spec in specs)
        for made in methods:
            if made.entry.implements("check"):
                made.check()  # what can be said without a model
        if not methods:
            raise UserError(
                "an arm's train is empty; plain tuning is `train: [sft]`, and an arm that is left as it was has none"
            )
        places: dict[str, Any] = {}
        for made in methods:
            for place in PLACES:
                if not made.entry.implements(place):
                    continue
                if place in places:
                    names = [m.entry.name for m in (places[place], made)]
                    raise UserError(
                        f"train: {names[0]} and {names[1]} both claim the {PLACES[place]}; keep one of them"
                    )
                places[place] = made
        return cls(methods, places)

    @property
    def loss(self) -> Loss:
        return self.places["loss"].loss if "loss" in self.places else nll

    @property
    def penalty(self) -> Any:
        return self.places["penalty"].penalty if "penalty" in self.places else None

    def direction(self, grad: Grad) -> Vector:
        return self.places["direction"].direction(grad) if "direction" in self.places else grad.task()

    def format_messages(self, messages: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
        """Alignment rows and served requests as the methods want them; of no messages, the system prompt that they add, if any."""
        for made in self.methods:
            if made.entry.implements("format_messages"):
                messages = made.format_messages(messages)
        return tuple(messages)

    def needs(self, fact: str) -> tuple[str, ...]:
        """What the methods ask of the run: ``streams``, ``roles`` or ``columns``."""
        return tuple(dict.fromkeys(name for made in self.methods for name in getattr(made.entry, fact)))
