"""What passes through modules, and weights that are changed for a while."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from safebasin.vector import local

Key = TypeVar("Key")


@contextlib.contextmanager
def hooked(hooks: Mapping[nn.Module, Callable[..., Any]], *, inputs: bool = False) -> Iterator[None]:
    """Forward hooks (``inputs``: forward pre-hooks) with torch's own signature, removed at the end whatever happens."""
    with contextlib.ExitStack() as handles:
        for module, hook in hooks.items():
            handles.enter_context(
                module.register_forward_pre_hook(hook) if inputs else module.register_forward_hook(hook)
            )
        yield


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode, so without dropout; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def captured(modules: Mapping[Key, nn.Module], *, inputs: bool = False) -> Iterator[dict[Key, Tensor]]:
    """The output (``inputs``: the first positional input) of each module in its latest forward, by the caller's names.

    Of an output that is a tuple, the first part. The graph is kept: detach what is to outlive the backward.

    >>> with captured({"head": model.lm_head}, inputs=True) as seen:
    ...     model(**batch.inputs)
    >>> seen["head"].shape  # [batch, tokens, hidden]
    """
    seen: dict[Key, Tensor] = {}

    def remember(name: Key) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], *output: Any) -> None:
            value = output[0] if output else args
            seen[name] = value[0] if isinstance(value, tuple) else value

        return hook

    with contextlib.ExitStack() as stack:
        for name, module in modules.items():  # one at a time: two names may stand for one module
            stack.enter_context(hooked({module: remember(name)}, inputs=inputs))
        yield seen


@contextlib.contextmanager
def perturbed(parameters: Mapping[str, Tensor], change: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Inside, parameters hold ``change(name, value)``; afterwards they are bit for bit what they were.

    ``value`` is this rank's part of the parameter, without a graph; it must not be changed in place. None leaves a
    parameter as it is. A result of another float type is rounded to the parameter's.

    >>> with perturbed(parameters, lambda name, value: value + local(delta[name])):
    ...     loss = model(**batch.inputs).loss
    """
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                value = local(parameter).detach()
                new = change(name, value)
                if new is not None:
                    before.append((value, value.clone()))
                    value.copy_(local(new))
        yield
    finally:
        with torch.no_grad():
            for value, original in reversed(before):  # a tied weight may have been changed twice
                value.copy_(original)
