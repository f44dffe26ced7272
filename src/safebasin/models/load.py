"""Load a model with its tokenizer, and say in one line what is wrong with it.

What the files of a folder contradict is refused: names, sizes and kinds of tensors, and ``architectures`` of another
family than ``model_type``. Numbers of config.json that no tensor shows (``rope_theta``, a norm's epsilon, a window, an
activation) cannot be checked: a model with others than it was trained with computes something else, and no error shows
it. The same holds for an adapter: it names its base, and nowhere what its base's config.json held.

More than 250 lines, since what can be wrong with the files of a model is refused in one place.
"""

import contextlib
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import validate_repo_id
from tokenizers import Tokenizer

from safebasin.console import line
from safebasin.data.files import read_text, shown
from safebasin.data.json_rows import read_json
from safebasin.data.tensor_files import FLOATS, tensor_files, tensor_kinds, weight_files
from safebasin.errors import UserError
from safebasin.models.adapter import adapter_settings, attach
from safebasin.models.border import loading
from safebasin.models.bundled import resolve
from safebasin.models.parts import text_config
from safebasin.models.quantized import nf4, settle
from safebasin.runtime import Dtype, resolved
from safebasin.template import PINNED, TemplateFails, check_template, pin_template, render, template_text

PROBE = "basin"  # a word that a chat template must hand on


class ModelAndTokenizer(NamedTuple):
    """A model, and the tokenizer of its rows with their chat template."""

    model: Any
    tokenizer: Any


def load(
    name: str,
    *,
    dtype: str = "auto",
    adapter: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    template: Mapping[str, Any] = MappingProxyType({}),
    quantization: str | None = None,
    attention: str | None = None,
) -> ModelAndTokenizer:
    """Load a model with its tokenizer; ``adapter`` stays beside the weights, ``revision`` is of a Hub id.

    ``name`` is a folder, a Hub id or a ``builtin:`` model; ``dtype`` "auto" is what the hardware does well. Weights are
    read from safetensors only. On a CPU attention runs eager, which is faster there for short rows, and so do experts,
    whose fused kernel has no derivative there; ``attention`` is another kernel of transformers. ``template`` is pinned
    into the chat template (``pin_template``). ``quantization`` "nf4" stores linear layers in four bits
    (``models/quantized.py``).

    Raises:
        UserError: the model, its tokenizer or the adapter cannot be read or do not fit together; float16; no chat
            template; tensors that are missing, left over or not finite.

    >>> model, tokenizer = load("builtin:smollm2-aligned")
    """
    from transformers import AutoModelForCausalLM

    if dtype not in get_args(Dtype):
        raise UserError(
            f"dtype {dtype!r} is refused: small inner products vanish in float16; use auto, bfloat16 or float32"
        )
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code, template=template)
    what = f"the model {shown(name)!r}"
    how: dict[str, Any] = {}
    if not torch.cuda.is_available():
        how = {"attn_implementation": "eager", "experts_implementation": "eager"}
    if attention:
        how["attn_implementation"] = attention
    with loading(what):
        path = resolve(name)
        if Path(path).is_dir():
            tensor_files(path)
            if quantization and read_json(Path(path) / "config.json").get("quantization_config"):
                raise UserError(f"{what} is quantized already; leave out model.quantization")
        if quantization:
            how |= nf4(getattr(torch, resolved(dtype)))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, resolved(dtype)),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, by name
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            return_dict=True,
            **how,
        )
        _check_family(what, loaded[0])
    model, report = loaded
    settle(model)
    _check_tensors(what, model, report, _folder(path, revision))
    if getattr(model, "peft_config", None):  # a fresh adapter would take its place, and its alignment with it
        raise UserError(f"{what} is an adapter, not a model; merge it into its base, save that, and name the folder")
    _fit_tokenizer(what, model, tokenizer)
    return with_adapter(ModelAndTokenizer(model, tokenizer), adapter, what)


def with_adapter(loaded: ModelAndTokenizer, adapter: str | Path | None, what: str = "the model") -> ModelAndTokenizer:
    """The model on its device, in eval mode, with an adapter beside its weights where one is given.

    Raises:
        UserError: the adapter cannot be read or is of another model; a weight or a logit is not finite; no forward.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = loaded
    if adapter is not None:
        model = attach(model, adapter)
        what += f" with the adapter {shown(adapter)!r}"
        _compare(adapter, model, tokenizer)
    model = model.to(device).eval()
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f"{what} holds weights that are not numbers ({name}); it is broken")
    ids = torch.tensor([tokenizer(PROBE, add_special_tokens=False)["input_ids"]], device=device)
    with loading(what), torch.no_grad():  # a configuration that fits the weights may still compute nothing
        if not torch.isfinite(model(input_ids=ids, use_cache=True).logits).all():
            raise UserError(f"{what} gives logits that are no numbers; a scale in its settings is wrong")
    return ModelAndTokenizer(model, tokenizer)


def load_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    template: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """The tokenizer of a model, with its chat template, into which ``template`` is pinned.

    Raises:
        UserError: it cannot be read, has no chat template, or cannot say where in a text a token stands.
    """
    from transformers import AutoTokenizer

    what = f"the model {shown(name)!r}"
    with loading(what) as border:
        path = resolve(name)
        if revision and Path(path).exists():
            raise UserError(f"{what} is on this machine and has no revision {shown(revision)!r}; leave it out")
        if Path(path).is_dir():
            if (Path(path) / "adapter_config.json").is_file() and not (Path(path) / "config.json").is_file():
                raise UserError(
                    f"{what} is an adapter, not a model; merge it into its base, save that, and name the folder"
                )
            for file in sorted(Path(path).glob("*.json")):
                read_json(file)
        elif Path(path).exists():
            raise UserError(f"{what} is a file; name the folder of the model")
        else:
            border.what += " (no such folder)"
            validate_repo_id(path)
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision or "main", trust_remote_code=trust_remote_code
        )
        if not tokenizer(PROBE, add_special_tokens=False)["input_ids"]:  # transformers makes an empty one of no files
            raise UserError(f"{what}: its tokenizer reads no text; save it with its vocabulary (tokenizer.json)")
    check_template(tokenizer)
    with contextlib.suppress(TemplateFails):  # a template may refuse a conversation: then its row is bad
        text = render(tokenizer, [{"role": "user", "content": PROBE}], ask=True)
        if tokenizer.bos_token and text.startswith(2 * tokenizer.bos_token):
            line(f"{what}: its chat template begins a conversation twice ({shown(tokenizer.bos_token)})")
        if PROBE not in text:
            raise UserError(f"{what}: its chat template leaves out what the user says; save the right one beside it")
    if not tokenizer.is_fast:
        raise UserError(
            f"{what}: its tokenizer does not say where in a text a token stands; save it with a tokenizer.json"
        )
    if getattr(tokenizer.backend_tokenizer.model, "dropout", None):
        raise UserError(
            f"{what}: its tokenizer leaves merges out at random (dropout), so that no two readings are one row"
        )
    pin_template(tokenizer, template)
    return tokenizer


def _compare(adapter: str | Path, model: Any, tokenizer: Any) -> None:
    """Say where an adapter names another model as its base, or was saved with a chat template that is not this one."""
    bases = {str(settings.get("base_model_name_or_path") or "") for settings in adapter_settings(model).values()}
    if other := next((base for base in bases if base and Path(base).name != Path(model.name_or_path).name), ""):
        line(f"the adapter {shown(adapter)!r} names {shown(other)!r} as its model and is put on another")
    path = Path(adapter) / "chat_template.jinja"
    if path.is_file() and PINNED not in (own := read_text(path)) and own.strip() not in template_text(tokenizer):
        line(f"the adapter {shown(adapter)!r} holds a chat template of its own, and the model's is used")


def _folder(path: str, revision: str | None) -> Path:
    """The folder of a model that was loaded: of a Hub id, its snapshot in the cache."""
    return Path(path) if Path(path).is_dir() else Path(hf_hub_download(path, "config.json", revision=revision)).parent


def _check_family(what: str, model: Any) -> None:
    """UserError where config.json names an architecture of transformers that is of another family than the class that
    its ``model_type`` stands for. A base model, another head or the text part of a family are of it."""
    families = (_family(getattr(transformers, name, None)) for name in model.config.architectures or ())
    if (own := _family(type(model))) and (other := next((each for each in families if each not in ("", own)), "")):
        raise UserError(
            f"cannot load {what}: the model_type of its config.json is of the family {own}, and its architectures are "
            f"of {other}: one of them is of another model"
        )


def _family(kind: Any) -> str:
    """``llama`` of a class of transformers.models.llama; empty where it is none of these."""
    steps = kind.__module__.split(".") if inspect.isclass(kind) else []
    return steps[2] if steps[:2] == ["transformers", "models"] else ""


def _check_tensors(what: str, model: Any, report: Mapping[str, Any], folder: Path) -> None:
    """Every tensor of the model was in its files, as plain numbers, and every tensor of the files has its place.

    transformers initialises at random what is missing, leaves out what is left over and casts what are integers; all
    with a warning at most. A part of its own beside the language model, such as a value head, is named and left out.
    """
    if report["mismatched_keys"]:
        name, *shapes = min(report["mismatched_keys"])
        sizes = " and not ".join(str(tuple(shape)) for shape in shapes)
        raise UserError(f"cannot load {what}: {name} is {sizes}: config.json is of another model")
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise UserError(f"cannot load {what}: {len(names)} of its tensors are not in its files ({shown(names[0])})")
    causal = any(getattr(module, "is_causal", False) for module in model.modules())
    if getattr(model.config, "is_decoder", None) is False and not causal:  # GPT-NeoX says no decoder, and is causal
        raise UserError(f"cannot load {what}: {type(model).__name__} is an encoder, which sees the tokens to come")
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise UserError(
            f"cannot load {what}: {type(model).__name__} has no attention modules with a cache of keys and values"
            " (past_key_values), by which rows are scanned and answers generated"
        )
    if getattr(text_config(model), "num_hidden_layers", 1) < 1:
        raise UserError(f"cannot load {what}: its config.json says that it has no block")
    spare = sorted(report["unexpected_keys"])
    if inside := [name for name in spare if _inside(model, name)]:
        raise UserError(
            f"cannot load {what}: its files hold {len(inside)} tensors that its config.json has no place for"
            f" ({shown(inside[0])})"
        )
    if spare:
        parts = ", ".join(sorted({name.split(".")[0] for name in spare}))
        line(f"{what}: {len(spare)} tensors beside the language model are left out ({shown(parts)})")
    if getattr(model, "hf_quantizer", None) is None:  # transformers skips a method that it does not know
        method = (read_json(folder / "config.json").get("quantization_config") or {}).get("quant_method")
        says = f"the method {shown(repr(method))}, which is not read here," if method else "no quantization_config"
        left_out = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ()) or "$^")
        numbers = {name for name, buffer in model.named_buffers() if not buffer.is_floating_point()}
        for name, kind in tensor_kinds(weight_files(folder)).items():
            if kind not in FLOATS and name not in {*numbers, *spare} and not left_out.search(name):
                raise UserError(
                    f"cannot load {what}: {shown(name)} is stored as {kind} and its config.json has {says}"
                    " to say what the numbers mean; take the weights before quantization"
                )


def _inside(model: Any, name: str) -> bool:
    """Whether a tensor of the files belongs to the language model: it lies in one of its parts, or it has the name of
    one of its tensors behind another prefix."""
    steps = name.split(".")
    modules, tensors = dict(model.named_modules()), model.state_dict()
    if any(".".join(steps[i:]) in tensors for i in range(1, len(steps))):
        return True
    deepest = next(part for i in range(len(steps) - 1, -1, -1) if (part := ".".join(steps[:i])) in modules)
    return deepest not in ("", model.base_model_prefix)


def _fit_tokenizer(what: str, model: Any, tokenizer: Any) -> None:
    """Every id of the tokenizer has an embedding, and there is a token to pad with.

    Where only the pad token has none, the tokenizer loses it and pads with another: which one does not matter, as
    padding is masked.
    """
    ends = getattr(model.generation_config, "eos_token_id", None) or 0
    if not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends])):
        raise UserError(f"{what}: its generation_config.json has an eos_token_id that is no token id: {ends!r}")
    size = model.get_input_embeddings().weight.shape[0]
    beyond = sorted(token for token, number in tokenizer.get_vocab().items() if number >= size)
    if beyond and beyond != [tokenizer.pad_token]:
        raise UserError(
            f"{what}: its tokenizer has {len(beyond)} tokens beyond the {size} that the model has embeddings for"
            f" ({shown(beyond[0])}); take the tokenizer of this model"
        )
    if beyond or tokenizer.pad_token_id is None:
        spare = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
        pad = next((token for token in spare if token not in (None, *beyond)), None)
        if pad is None:
            raise UserError(f"{what}: its tokenizer has no token to pad with; set its eos_token or its pad_token")
        tokenizer.pad_token = pad
    if beyond:  # left in, a text that holds it would ask for an embedding that is not there
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in beyond]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
