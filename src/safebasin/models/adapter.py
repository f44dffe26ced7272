"""Adapters: a fresh one, one beside the weights, and the reference, which is the adapter switched off.

More than 250 lines, since whoever attaches, merges or switches off an adapter goes by the same rules of PEFT.
"""

import contextlib
import copy
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn

from safebasin.console import line
from safebasin.data.files import cause, shown
from safebasin.data.json_rows import read_json
from safebasin.data.tensor_files import FLOATS, tensor_kinds
from safebasin.errors import DefenceError, UserError
from safebasin.models.border import ERRORS, loading
from safebasin.models.parts import is_linear, language_model, text_config
from safebasin.models.quantized import dequantize, quantized_layers
from safebasin.vector import WRAPPED

WEIGHTS = "adapter_model.safetensors"
FILES = ("adapter_config.json", WEIGHTS)
RANDOM_INIT = (
    "init_lora_weights: pissa_niter takes random factors out of the weights, and loading the adapter takes others; use"
    " pissa, which takes the exact ones"
)
OTHERS = {  # settings of an adapter by which it is no change of the model's own weights
    "alora_invocation_tokens": "alora_invocation_tokens: an aLoRA acts behind some tokens only, and is not read here",
    "layer_replication": "layer_replication stacks blocks anew: save that model, and tune an adapter of it",
}
MOVED = ("pissa", "olora", "loftq", "corda", "lora_ga")  # initialisations that change the weight that B A is added to


def attach(model: nn.Module, adapter: str | Path) -> nn.Module:
    """The model with an adapter beside its weights, as it was trained and is served; a folder or a Hub id.

    Not merged: in bfloat16 a sum rounds a small update away. Every tensor of the adapter is accounted for.

    Raises:
        UserError: the adapter cannot be read, or is of another model: names, sizes or kinds of its tensors do not meet.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, PromptLearningConfig, get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    what = f"the adapter {shown(adapter)!r}"
    with loading(what):
        folder = adapter_folder(adapter)
        settings = read_json(folder / "adapter_config.json")
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        configs: dict[str, type] = {name.value: config for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if str(kind) not in configs:
            raise UserError(
                f"{what}: its adapter_config.json names no peft_type that this peft has: {shown(repr(kind))}"
            )
        if str(settings.get("init_lora_weights")).startswith("pissa_niter"):
            raise UserError(f"{what}: {RANDOM_INIT}")
        if reason := next((why for key, why in OTHERS.items() if settings.get(key)), ""):
            raise UserError(f"{what}: {reason}")
        if issubclass(configs[str(kind)], PromptLearningConfig) or kind == "ADAPTION_PROMPT":
            raise UserError(f"{what}: {kind} adds tokens to a prompt; adapters of weights are read")
        fields = inspect.signature(configs[str(kind)]).parameters
        if unread := sorted(name for name, value in settings.items() if value and name not in fields):
            line(f"{what}: this peft does not read {shown(', '.join(unread))} of its adapter_config.json")
        stored = tensor_kinds([folder / WEIGHTS])
        if packed := sorted(name for name, kind in stored.items() if kind not in FLOATS):
            raise UserError(f"{what}: {shown(packed[0])} is stored as {stored[packed[0]]}, and no weight is")
        tuned: Any = PeftModel.from_pretrained(model, str(folder))
        keys = tuned.load_adapter(str(folder), "default")  # a second time, for its report: the first one only warns
        biases = {name for name in get_peft_model_state_dict(tuned, save_embedding_layers=False) if "lora_" not in name}
        if strange := sorted({*keys.unexpected_keys, *keys.missing_keys, *(biases - stored.keys())}):
            raise UserError(
                f"{what} is of another model: {len(strange)} of its tensors do not meet it ({shown(strange[0])})"
            )
        scales = [s for layer in tuned.modules() if isinstance(layer, LoraLayer) for s in layer.scaling.values()]
        if scales and not any(scales):
            raise UserError(f"{what}: its lora_alpha is 0, so that it changes nothing")
        if (
            kind == "LORA"
            and not settings.get("modules_to_save")
            and any("lora_B" in n for n in stored)
            and starts_fresh(tuned)
        ):
            line(f"{what} changes nothing: it is not tuned")
        attached: nn.Module = tuned.get_base_model()  # the model's own class, its layers wrapped
        return attached


def merged(model: Any) -> Any:
    """A copy in float32 with its adapter folded into the weights; the model itself where it is plain already.

    Its logits are those of the adapter beside the weights but for rounding. Weights in four bits become the numbers
    that they stand for. A weight that two layers share is parted where one of them is tuned.

    Raises:
        UserError: a kind of adapter that has no place in the weights, such as a bias where a layer has none.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    adapted = adapter_settings(model)
    if not adapted and not quantized_layers(model):
        return model
    with loading("the adapter as part of the weights, where this is asked for"):
        model = copy.deepcopy(model)
        dequantize(model)
        model = model.float()
        if not adapted:
            return model
        for name, module in reversed(list(model.named_modules())):  # inner layers first: a layer may be wrapped twice
            if isinstance(module, BaseTunerLayer):
                layer = module.get_base_layer()
                for part, weight in list(layer.named_parameters(recurse=False)):
                    setattr(layer, part, nn.Parameter(weight.detach().clone(), requires_grad=False))
                module.merge()
                if not name.endswith(".base_layer"):
                    model.set_submodule(name, module.get_base_layer())  # of LN tuning another one
            elif isinstance(module, ModulesToSaveWrapper):
                model.set_submodule(name, module.modules_to_save[module.active_adapter])  # type: ignore[index]
            elif isinstance(module, TrainableTokensWrapper):
                model.set_submodule(name, module.token_adapter)
    head: Any = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = text_config(model).tie_word_embeddings = False  # else saving would drop it
    del model.peft_config
    return model


def adapter_settings(model: Any) -> dict[str, dict[str, Any]]:
    """The settings of the adapters in a model, by their names; empty where it has none."""
    return {name: config.to_dict() for name, config in (getattr(model, "peft_config", None) or {}).items()}


def adapter_folder(adapter: str | Path) -> Path:
    """The folder of an adapter, fetched where it is a Hub id; it holds the two files of one.

    Raises:
        UserError: there is no such folder, or a file is missing.
    """
    folder = Path(adapter)
    if not folder.exists():
        if not re.fullmatch(r"[\w-][\w.-]{0,95}/[\w.-]{1,96}", str(adapter)):
            raise UserError(f"no such folder of an adapter: {shown(adapter)}")
        folder = Path(snapshot_download(str(adapter), allow_patterns=list(FILES)))
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{shown(adapter)} is not an adapter folder (no adapter_config.json in it)")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{shown(adapter)} holds no {WEIGHTS}; other formats can run code when read and are refused")
    return folder


def fresh_adapter(model: nn.Module, settings: Mapping[str, Any], seed: int) -> Any:
    """A LoRA adapter that starts as the identity (B = 0); its A is a function of the seed.

    Of a multimodal model the language model alone is tuned: rows are text, and nothing else gets a gradient.

    Raises:
        UserError: settings that PEFT refuses, or a rank or alpha for modules that are not tuned.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    settings = dict(settings)
    if outside := _outside_text(model):
        own = settings.get("exclude_modules") or ()
        listed = [own] if isinstance(own, str) else [rf"(.*\.)?({re.escape(name)})" for name in own]
        settings["exclude_modules"] = "|".join([outside, *listed])
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, at a Conv1D, at experts and at an embedding that is tied
        torch.manual_seed(seed)
        try:
            tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        except ERRORS as error:
            raise UserError(f"train.adapter: {cause(error)}") from error
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    _check_linear(layers)
    targets = settings.get("target_modules")
    for target in targets if isinstance(targets, list | tuple | set) else ():
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise UserError(f"train.adapter.target_modules: {target!r} is no module that is tuned")
    for field in ("rank_pattern", "alpha_pattern"):
        for key in settings.get(field) or ():
            if not any(re.fullmatch(rf"(.*\.)?({key})", name) for name in layers):
                raise UserError(f"train.adapter.{field}: {key!r} is no module that is tuned")
    return tuned


def _check_linear(layers: Mapping[str, Any]) -> None:
    """UserError where a tuned layer is a kind of Linear that computes something else."""
    bases = {name: layer.get_base_layer() for name, layer in layers.items()}
    other = [name for name, base in bases.items() if isinstance(base, nn.Linear) and not is_linear(base)]
    if other:
        plain = sorted({name.rpartition(".")[2] for name in bases.keys() - other})
        raise UserError(
            f"train.adapter.target_modules: {other[0]} is a {type(bases[other[0]]).__name__}, which is no plain linear "
            f"layer; name the modules: [{', '.join(plain)}]"
        )


def _outside_text(model: Any) -> str:
    """A pattern of the modules of a multimodal model that are no part of its language model; empty for other models."""
    inside = language_model(model)
    prefix = next((name for name, module in model.named_modules() if module is inside), "")
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), "")
    if prefix == model.base_model_prefix:
        return ""
    return rf"(?!{re.escape(prefix)}\.|{re.escape(head)}$).*"


def all_weights(model: Any) -> Any:
    """The model with every weight of its language model and its head to be tuned, and no other."""
    model.requires_grad_(False)
    for part in (language_model(model), model.get_output_embeddings()):
        part.requires_grad_(True)
    return model


def every_weight(model: Any) -> dict[str, Any]:
    """The parameters and stored buffers of a model by name, one that is shared once: what a folder of it holds."""
    named = {WRAPPED.sub("", name): p for name, p in model.named_parameters()}
    stored = model.state_dict().keys()
    return named | {name: b for name, b in model.named_buffers() if name in stored}


def unwrapped(model: Any) -> Any:
    """The model inside DDP."""
    return getattr(model, "module", model) if isinstance(model, nn.parallel.DistributedDataParallel) else model


def without_adapter(model: Any) -> Any:
    """The transformers model inside DDP and PEFT; the adapter's layers stand in it all the same."""
    inner = unwrapped(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


@contextlib.contextmanager
def reference(model: Any) -> Iterator[None]:
    """Inside, the model is the one that tuning started from: its adapter is switched off, without a copy.

    Raises:
        DefenceError: the model has no adapter to switch off.
    """
    inner = unwrapped(model)
    if not hasattr(inner, "disable_adapter"):
        raise DefenceError(
            "a method needs the reference model, which is the adapter switched off, and this model has no adapter"
        )
    with inner.disable_adapter(), torch.no_grad():
        yield


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Inside, an adapter beside the weights (``attach``) adds nothing: the model is its start."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [each for each in model.modules() if isinstance(each, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    were_off = [layer.disable_adapters for layer in layers]
    trained = [(p, p.requires_grad) for p in model.parameters()]  # switching on asks for gradients, too
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, off in zip(layers, were_off, strict=True):
            layer.enable_adapters(not off)
        for p, was_trained in trained:
            p.requires_grad_(was_trained)


def starts_fresh(model: nn.Module) -> bool:
    """Whether every adapter adds nothing yet, so that switching it off gives the starting model."""
    return all(not p.detach().any() for name, p in model.named_parameters() if "lora_B" in name)


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
