"""Weights that were tuned, as updates of the weights that they started from: a LoRA adapter, or a full model.

``tuned_updates`` reads either as module -> dW, one module at a time and without a model; whatever is not a plain sum
W + s B A is refused by name before anything is computed. ``switched_on`` adds updates to what a model computes.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from safebasin.data.files import shown
from safebasin.data.json_rows import read_json
from safebasin.data.tensor_files import open_tensors
from safebasin.errors import UserError
from safebasin.layer import LazyMapping, Update
from safebasin.models.adapter import MOVED, adapter_folder
from safebasin.models.border import loading
from safebasin.models.hooks import hooked
from safebasin.models.tensors import BLOCK, ModelShapes, Tensors, is_model

PREFIX = "base_model.model."
KEY = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
REFUSED = {  # of adapter_config.json: what makes a module more than W + s B A
    "use_dora": "DoRA rescales the weight itself",
    "modules_to_save": "modules_to_save are trained in full",
    "fan_in_fan_out": "fan_in_fan_out stores weights transposed",
    "lora_bias": "lora_bias trains biases",
    "trainable_token_indices": "trainable_token_indices trains embeddings",
    "target_parameters": "target_parameters adapts parameters that are no linear layer",
    "layer_replication": "layer_replication stacks blocks",
    "use_qalora": "QALoRA pools the inputs",
    "alora_invocation_tokens": "aLoRA is active on some tokens only",
}


def tuned_updates(tuned: str | Path, start: Tensors) -> "AdapterUpdates | ModelUpdates":
    """The updates of an adapter or of a full model, relative to the model that it was tuned from.

    Raises:
        UserError: see the two classes.
    """
    full = tuned in ("builtin:smollm2-aligned", "builtin:smollm2") or is_model(tuned)
    return ModelUpdates(tuned, start) if full else AdapterUpdates(tuned, start)


class AdapterUpdates(LazyMapping[str, Update]):
    """The updates s B A of a PEFT adapter, module -> Update in float32, in the order of the file.

    Raises:
        UserError: no adapter, of another kind than LoRA, of another model, one of ``REFUSED``, not finite, or all zero.
    """

    def __init__(self, folder: str | Path, start: Tensors | ModelShapes):
        self.start = start
        with loading(f"the adapter {shown(folder)!r}"):
            self.folder = adapter_folder(folder)
        self.config: dict[str, Any] = read_json(self.folder / "adapter_config.json")
        self.what = f"the adapter {shown(folder)}"
        self._refuse()
        with open_tensors(self.folder / "adapter_model.safetensors") as file:
            matches = {name: KEY.fullmatch(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if strange := sorted(name for name, match in matches.items() if match is None):
            raise UserError(f"{self.what} holds {strange[0]}, which is no LoRA matrix of a linear layer")
        sides: dict[str, set[str]] = {}
        for match in filter(None, matches.values()):
            if match["module"].startswith(PREFIX):
                raise UserError(f"{self.what} was trained on another adapter ({match['module']}); merge that one first")
            sides.setdefault(match["module"], set()).add(match["side"])
        if not sides:
            raise UserError(f"{self.what} holds no LoRA matrix")
        self.names = tuple(sorted(sides, key=natural))
        alive = False
        for module in self.names:
            if sides[module] != {"A", "B"}:
                raise UserError(f"{self.what}: {module} has only one of its two matrices")
            alive |= self._check(module)
        if not alive:
            raise UserError(f"{self.what} is a zero update: the model is the one that tuning started from")

    def _refuse(self) -> None:
        settings = self.config
        if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
            kind = settings.get("peft_type") if isinstance(settings, dict) else None
            raise UserError(f"{self.what} is of the kind {shown(str(kind))}; only LoRA is an update to edit")
        for key, reason in REFUSED.items():
            if settings.get(key):
                raise UserError(f"{self.what} cannot be read as an update: {reason}")
        if (bias := settings.get("bias", "none")) != "none":
            raise UserError(f"{self.what} cannot be read as an update: it trains biases (bias: {shown(str(bias))})")
        init = str(settings.get("init_lora_weights", True)).lower()
        if init.startswith(MOVED):
            raise UserError(f"{self.what}: init_lora_weights {shown(init)} changed the weights that it is added to")

    def _check(self, module: str) -> bool:
        """Whether a module's update is more than zero."""
        shape = self.start.shape(f"{module}.weight")
        with loading(self.what):  # a rank, a scale or a pattern that is none
            update, rank = self[module], self._by_pattern("rank_pattern", module, self.config.get("r", 8))
        if update.shape != shape or update.a is None or update.b.shape[1] != update.a.shape[0]:
            raise UserError(
                f"{self.what}: {module} is {update.shape[0]} x {update.shape[1]} and {shape} in the model; they are not"
                " of one model"
            )
        if update.b.shape[1] != rank:
            raise UserError(
                f"{self.what}: {module} has rank {update.b.shape[1]}, and {shown(str(rank))} in adapter_config.json; "
                "PEFT would not load it"
            )
        if not math.isfinite(size := update.norm()):
            raise UserError(f"{self.what}: {module} holds numbers that are not finite; it is broken")
        return size > 0

    def scale(self, module: str, rank: int) -> float:
        """s of a module: alpha / r, or alpha / sqrt(r) with rsLoRA; patterns as PEFT reads them."""
        alpha = self._by_pattern("alpha_pattern", module, self.config.get("lora_alpha", 8))
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _by_pattern(self, field: str, module: str, default: Any) -> Any:
        """What the first pattern that matches a module says of it."""
        patterns = (self.config.get(field) or {}).items()
        return next((value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", module)), default)

    def rank(self, module: str) -> int:
        """r of a module."""
        with open_tensors(self.folder / "adapter_model.safetensors") as file:
            return int(file.get_slice(f"{PREFIX}{module}.lora_A.weight").get_shape()[0])

    def __getitem__(self, module: str) -> Update:
        if module not in self.names:
            raise KeyError(module)
        with open_tensors(self.folder / "adapter_model.safetensors") as file:
            a, b = (file.get_tensor(f"{PREFIX}{module}.lora_{side}.weight").float() for side in "AB")
        return Update(b * self.scale(module, a.shape[0]), a)


class ModelUpdates(LazyMapping[str, Update]):
    """The dense updates Wt - Wa of a full model, over the matrices of its blocks that tuning has changed.

    ``others`` are tensors that tuning has changed beside them (embeddings, norms, heads): no edit touches those.

    Raises:
        UserError: names or shapes differ from those of the start, not finite, or nothing differs.
    """

    def __init__(self, model: str | Path, start: Tensors):
        self.start, self.tensors = start, Tensors(model)
        self.folder = self.tensors.folder
        modules: list[str] = []
        others: list[str] = []
        if differing := sorted(self.tensors.files.keys() ^ start.files.keys()):
            raise UserError(f"{shown(model)} and the model it was tuned from differ at {differing[0]}")
        for name in sorted(start, key=natural):
            if self.tensors.shape(name) != (shape := start.shape(name)):
                raise UserError(
                    f"{shown(model)}: {name} is {self.tensors.shape(name)} and {shape} in the model it was tuned from"
                )
            tensor = self.tensors[name]
            if not torch.isfinite(tensor).all():
                raise UserError(f"{shown(model)}: {name} holds numbers that are not finite; it is broken")
            if not torch.equal(tensor, start[name]):
                match = BLOCK.fullmatch(name) if len(shape) == 2 else None
                (modules if match else others).append(match["module"] if match else name)
        if not modules:
            raise UserError(f"{shown(model)} is a zero update: its blocks are those of the model it was tuned from")
        self.names, self.others = tuple(modules), tuple(others)

    def __getitem__(self, module: str) -> Update:
        if module not in self.names:
            raise KeyError(module)
        name = f"{module}.weight"
        return Update(self.tensors[name].float() - self.start[name].float())


def natural(name: str) -> list[Any]:
    """A key that sorts block 2 before block 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


@contextlib.contextmanager
def switched_on(model: nn.Module, updates: Mapping[str, Update], prefix: str = "") -> Iterator[None]:
    """Inside, modules add dW x to what they give; the weights are not touched, and low ranks stay low.

    Where the model has an adapter of its own that is switched off for a while, so are these: the reference is the
    model that all of them start from. ``prefix`` stands before the names in such a model.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    def add(update: Update) -> Callable[..., Any]:
        parts: dict[Any, list[Tensor]] = {}

        def hook(module: Any, args: Any, output: Any) -> Any:
            if layers and layers[0].disable_adapters:
                return output
            x = args[0]
            matrices = parts.setdefault(
                (x.device, x.dtype), [m.to(x.device, x.dtype) for m in (update.a, update.b) if m is not None]
            )
            for matrix in matrices:
                x = x @ matrix.T
            return output + x

        return hook

    with hooked({model.get_submodule(prefix + name): add(update) for name, update in updates.items()}):
        yield
