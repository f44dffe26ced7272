"""Weights that were tuned, as updates of the weights that they started from: a LoRA adapter, or a full model.

``tuned_updates`` reads either as module -> dW, one module at a time and without a model; whatever is not a plain sum
W + s B A is refused by name before anything is computed. ``write_lora`` and ``write_model`` write what comes out.
"""

import contextlib
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from safebasin.data.files import shown, write_json
from safebasin.data.json_rows import read_json
from safebasin.errors import DefenceError, UserError
from safebasin.layer import Update, open_tensors, tensor_files
from safebasin.models.adapter import adapter_folder
from safebasin.models.border import loading
from safebasin.models.bundled import resolve
from safebasin.models.hooks import hooked

PREFIX = "base_model.model."
KEY = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
BLOCK = re.compile(r"(?P<module>.+\.\d+\..+)\.weight")  # a weight inside a block; embeddings and heads are outside
FLOATS = ("F64", "F32", "F16", "BF16")
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
MOVED = ("pissa", "olora", "loftq", "corda", "lora_ga")  # initialisations that change the weight that B A is added to


def why_off_is_not_start(settings: Mapping[str, Any]) -> str:
    """Why a model is not what tuning started from when its adapter is switched off; empty where it is.

    ``settings``: of an adapter, as ``peft.LoraConfig`` has them; without any, there is none.
    """
    if not settings:
        return "every weight is tuned"
    init, bias = str(settings.get("init_lora_weights", True)).lower(), settings.get("bias", "none")
    if init.startswith(MOVED):
        return f"init_lora_weights {init} changes the weights that the adapter is added to"
    return "" if bias == "none" else f"bias {bias} tunes the model's own biases"


class Tensors(Mapping[str, Tensor]):
    """The float matrices of a model folder or a Hub id: name -> tensor, read one at a time.

    Raises:
        UserError: it cannot be read, or its weights are quantized.
    """

    def __init__(self, model: str | Path):
        self.folder = model_folder(model)
        self.files = tensor_files(self.folder)
        config = self.folder / "config.json"
        if config.is_file() and (settings := read_json(config)).get("quantization_config"):
            kind = settings["quantization_config"].get("quant_method", "of some kind")
            raise UserError(
                f"{shown(model)} is quantized ({kind}); an update is relative to the weights before quantization"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor in float.

        Raises:
            UserError: there is no such tensor, or it is quantized.
        """
        if name not in self.files:
            raise UserError(f"{shown(self.folder)} has no tensor {name}; adapter and model must be of one model")
        with open_tensors(self.files[name]) as file:
            part = file.get_slice(name)
            if (kind := part.get_dtype()) not in FLOATS:
                raise UserError(
                    f"{shown(self.folder)}: {name} is stored as {kind}; give the weights before quantization"
                )
            return tuple(part.get_shape())

    def __getitem__(self, name: str) -> Tensor:
        with open_tensors(self.files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


class ModelShapes:
    """The shapes of a loaded model, in the place of those of its files."""

    def __init__(self, model: nn.Module):
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def shape(self, name: str) -> tuple[int, ...]:
        """UserError where there is no such tensor."""
        if name not in self.shapes:
            raise UserError(f"the model has no tensor {name}; adapter and model must be of one model")
        return self.shapes[name]


def model_folder(name: str | Path) -> Path:
    """The folder of a model: a folder, a ``builtin:`` name, or a Hub id that is fetched."""
    with loading(f"the model {shown(name)!r}"):
        folder = Path(resolve(str(name)))
        if not folder.exists():
            folder = Path(snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"]))
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{shown(name)} is an adapter, not a model: adapters on adapters are refused; merge it first")
    return folder


def is_model(name: str | Path) -> bool:
    """Whether a folder is that of a full model."""
    return (Path(name) / "config.json").is_file()


def tuned_updates(tuned: str | Path, start: Tensors) -> "AdapterUpdates | ModelUpdates":
    """The updates of an adapter or of a full model, relative to the model that it was tuned from.

    Raises:
        UserError: see the two classes.
    """
    full = tuned in ("builtin:smollm2-aligned", "builtin:smollm2") or is_model(tuned)
    return ModelUpdates(tuned, start) if full else AdapterUpdates(tuned, start)


class AdapterUpdates(Mapping[str, Update]):
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
        self.modules = tuple(sorted(sides, key=natural))
        alive = False
        for module in self.modules:
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
        update, shape = self[module], self.start.shape(f"{module}.weight")
        if update.shape != shape or update.a is None or update.b.shape[1] != update.a.shape[0]:
            raise UserError(
                f"{self.what}: {module} is {update.shape[0]} x {update.shape[1]} and {shape} in the model; they are not"
                " of one model"
            )
        if not math.isfinite(size := update.norm()):
            raise UserError(f"{self.what}: {module} holds numbers that are not finite; it is broken")
        return size > 0

    def scale(self, module: str, rank: int) -> float:
        """s of a module: alpha / r, or alpha / sqrt(r) with rsLoRA; patterns as PEFT reads them."""
        alpha = self.config.get("lora_alpha", 8)
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def rank(self, module: str) -> int:
        """r of a module."""
        with open_tensors(self.folder / "adapter_model.safetensors") as file:
            return int(file.get_slice(f"{PREFIX}{module}.lora_A.weight").get_shape()[0])

    def __getitem__(self, module: str) -> Update:
        if module not in self.modules:
            raise KeyError(module)
        with open_tensors(self.folder / "adapter_model.safetensors") as file:
            a, b = (file.get_tensor(f"{PREFIX}{module}.lora_{side}.weight").float() for side in "AB")
        return Update(b * self.scale(module, a.shape[0]), a)

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)


class ModelUpdates(Mapping[str, Update]):
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
        self.modules, self.others = tuple(modules), tuple(others)

    def __getitem__(self, module: str) -> Update:
        if module not in self.modules:
            raise KeyError(module)
        name = f"{module}.weight"
        return Update(self.tensors[name].float() - self.start[name].float())

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)


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


# --- writing
# ----------------------------------------------------------------------------------------------------------------------


def write_lora(folder: Path, config: Mapping[str, Any], updates: Mapping[str, Update]) -> None:
    """An adapter that any loader of PEFT's files gives scale 1: s is in B, and lora_alpha is r module by module.

    Args:
        folder: written anew.
        config: of the adapter that the updates come from; its other settings stay.
        updates: in low rank.

    Raises:
        DefenceError: what was written does not read as what was to be written.
    """
    tensors, ranks = {}, {}
    for module, update in updates.items():
        if update.a is None:
            raise DefenceError(f"{module}: a dense update is no adapter; write full weights, or truncate it")
        ranks[module] = max(1, update.b.shape[1])
        missing = ranks[module] - update.b.shape[1]  # an update of rank 0 is written as one of rank 1 that is zero
        sides = {"A": nn.functional.pad(update.a, (0, 0, 0, missing)), "B": nn.functional.pad(update.b, (0, missing))}
        for side, matrix in sides.items():
            tensors[f"{PREFIX}{module}.lora_{side}.weight"] = matrix.float().contiguous()
    top = max(ranks.values())
    pattern = {module: rank for module, rank in ranks.items() if rank != top}
    settings = {"r": top, "lora_alpha": top, "rank_pattern": pattern, "alpha_pattern": pattern, "use_rslora": False}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    write_json(folder / "adapter_config.json", {**config, **settings, "init_lora_weights": True})
    written = AdapterUpdates.__new__(AdapterUpdates)  # without its checks: a zero update may be the result
    written.folder, written.config, written.modules = folder, {**config, **settings}, tuple(updates)
    for module, update in updates.items():
        if (written[module] - update).norm() > 1e-6 * update.norm():
            raise DefenceError(f"{module}: the adapter that was written does not read as what was computed")


def write_model(folder: Path, tuned: Tensors, start: Tensors, updates: Callable[[str], Update | None]) -> int:
    """A full model, shard by shard: Wa + dW' where ``updates`` gives a dW', the tensor of ``tuned`` as it is elsewhere.

    Names, types and shards are those of ``tuned``. An entry of dW' that is zero carries the very bits of Wa, and one
    that is that of dW those of Wt.

    Returns:
        How many entries of dW' are smaller than the weight's type can hold beside Wa, so that they vanish.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in sorted(tuned.folder.iterdir()):
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    vanished = 0
    for path in sorted(set(tuned.files.values())):
        shard = {}
        for name in (name for name, file in tuned.files.items() if file == path):
            weight = tuned[name]
            new = updates(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if new is not None:
                aligned, change = start[name], new.dense()
                rounded = (aligned.float() + change).to(weight.dtype)
                vanished += int(((rounded == aligned) & (change != 0)).sum())
                same = change == weight.float() - aligned.float()
                weight = torch.where(change == 0, aligned, torch.where(same, weight, rounded))
            shard[name] = weight.contiguous()
        save_file(shard, folder / path.name, {"format": "pt"})
    return vanished
