"""Several methods in one step. Each defines components of the update; two that define the same one are refused by name.

    token loss         ``loss(model, batch)``   replaces the negative log-likelihood of the task
    penalty            ``penalty(parameters)``  is added to the task once an optimizer step
    update direction   ``direction(grad)``      combines ``grad.task()`` with gradients of other streams

The update of a composition is therefore  direction( grad[ token loss ] + grad[ penalty ], other streams ).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from safebasin.data.example import Example
from safebasin.errors import UserError
from safebasin.train import method as registry
from safebasin.train.loss import nll
from safebasin.train.oracle import Grad, Loss
from safebasin.vector import Vector

COMPONENTS = {"loss": "token loss", "penalty": "penalty", "direction": "update direction"}


@dataclasses.dataclass(frozen=True)
class Composition:
    """The methods of a run, and which of them defines each component of the update."""

    methods: tuple[Any, ...]
    components: Mapping[str, Any]

    @classmethod
    def of(cls, specs: Sequence[Any]) -> "Composition":
        """Build the methods from their configuration.

        Raises:
            UserError: no method, an unknown one, one with missing or wrong files, or two that define one component.
        """
        methods = tuple(registry.make(spec) for spec in specs)
        for method in methods:
            if method.entry.implements("check"):
                method.check()  # its files, without a model
        if not methods:
            raise UserError(
                "an arm's train is empty; plain tuning is `train: [sft]`, and an arm that is left as it was has none"
            )
        components: dict[str, Any] = {}
        for method in methods:
            for component, words in COMPONENTS.items():
                if not method.entry.implements(component):
                    continue
                if component in components:
                    names = f"{components[component].entry.name} and {method.entry.name}"
                    raise UserError(f"train: {names} both define the {words}; keep one of them")
                components[component] = method
            if method.entry.implements("align_rows") and not any("align" in each.entry.streams for each in methods):
                raise UserError(
                    f"train: {method.entry.name} needs a method beside it that reads alignment rows: safegrad"
                )
        return cls(methods, components)

    @property
    def loss(self) -> Loss:
        """The token loss of the task: a method's, or the negative log-likelihood."""
        return self.components["loss"].loss if "loss" in self.components else nll

    @property
    def penalty(self) -> Any:
        """A method's penalty of the trainable parameters, or None."""
        return self.components["penalty"].penalty if "penalty" in self.components else None

    def direction(self, grad: Grad) -> Vector:
        """The direction of one optimizer step, which becomes ``.grad``."""
        return self.components["direction"].direction(grad) if "direction" in self.components else grad.task()

    def align_rows(self, examples: Sequence[Example]) -> list[Example]:
        """Alignment rows as the methods want them: more of them, and then each as a served request."""
        for method in self.methods:
            if method.entry.implements("align_rows"):
                examples = method.align_rows(examples)
        return [dataclasses.replace(each, messages=self.format_messages(each.messages)) for each in examples]

    def format_messages(self, messages: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
        """A served request, or an alignment row, as the methods want it; of no messages, the system prompt they add."""
        for method in self.methods:
            if method.entry.implements("format_messages"):
                messages = method.format_messages(messages)
        return tuple(messages)

    def needs(self, fact: str) -> tuple[str, ...]:
        """What the methods ask of the run, in order and once: ``streams``, ``roles`` or ``columns``."""
        return tuple(dict.fromkeys(name for method in self.methods for name in getattr(method.entry, fact)))
