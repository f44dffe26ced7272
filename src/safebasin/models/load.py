"""Load a model with its tokenizer, and say in one line what is wrong with it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import validate_repo_id
from tokenizers import Tokenizer

from safebasin.data.tables import read_json, shown
from safebasin.errors import UserError
from safebasin.layer import tensor_files
from safebasin.models.adapter import merge
from safebasin.models.border import loading
from safebasin.models.bundled import resolve
from safebasin.template import check_template, pin_template


class ModelAndTokenizer(NamedTuple):
    model: Any
    tokenizer: Any


def load(
    name: str,
    *,
    dtype: str = "bfloat16",
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    template: Mapping[str, Any] = MappingProxyType({}),
) -> ModelAndTokenizer:
    """Load a model with its tokenizer; ``adapter`` is merged into the weights.

    ``name`` is a folder, a Hub id or a ``builtin:`` model. Weights are read from safetensors only. On a CPU attention
    runs eager, which is faster there for short rows. ``template`` is pinned into the chat template (``pin_template``).

    Raises:
        UserError: the model, its tokenizer or the adapter cannot be read or do not fit together; float16; no chat
            template; tensors that are missing, left over or not finite.

    >>> model, tokenizer = load("builtin:smollm2-aligned")
    """
    from transformers import AutoModelForCausalLM

    if dtype not in ("bfloat16", "float32"):
        raise UserError(
            f"dtype {dtype!r} is refused: gradients of small inner products vanish in float16; use bfloat16 or float32"
        )
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code, template=template)
    what, attention = (
        f"the model {shown(name)!r}",
        {} if torch.cuda.is_available() else {"attn_implementation": "eager"},
    )
    with loading(what):
        path = resolve(name)
        if Path(path).is_dir():
            tensor_files(path)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, by name
            trust_remote_code=trust_remote_code,
            **attention,
        )
    model, report = loaded
    _check_tensors(what, model, report)
    if getattr(model, "peft_config", None):  # a fresh adapter would take its place, and its alignment with it
        raise UserError(f"{what} is an adapter, not a model; merge it into its base, save that, and name the folder")
    _fit_tokenizer(what, model, tokenizer)
    if adapter is not None:
        model = merge(model, adapter)
    for parameter_name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f"{what} holds weights that are not numbers ({parameter_name}); it is broken")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return ModelAndTokenizer(model.to(device).eval(), tokenizer)


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, template: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """The tokenizer of a model, with its chat template, into which ``template`` is pinned.

    Raises:
        UserError: it cannot be read, has no chat template, or cannot say where in a text a token stands.
    """
    from transformers import AutoTokenizer

    what = f"the model {shown(name)!r}"
    with loading(what):
        path = resolve(name)
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
            what += " (no such folder)"
            validate_repo_id(path)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    check_template(tokenizer)
    if not tokenizer.is_fast:
        raise UserError(
            f"{what}: its tokenizer does not say where in a text a token stands; save it with a tokenizer.json"
        )
    pin_template(tokenizer, template)
    return tokenizer


def _check_tensors(what: str, model: Any, report: Mapping[str, Any]) -> None:
    """Every tensor of the model was in its files, and every block that its files hold is in the model.

    transformers initialises at random what is missing, and leaves out what is left over; both with a warning.
    """
    if report["mismatched_keys"]:
        name, *shapes = min(report["mismatched_keys"])
        sizes = " and not ".join(str(tuple(shape)) for shape in shapes)
        raise UserError(f"cannot load {what}: {name} is {sizes}: config.json is of another model")
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise UserError(f"cannot load {what}: {len(names)} of its tensors are not in its files ({shown(names[0])})")
    if getattr(model.config.get_text_config(), "num_hidden_layers", 1) < 1:
        raise UserError(f"cannot load {what}: its config.json says that it has no block")
    kinds = {re.sub(r"\d+", "0", name) for name in model.state_dict()}
    spare = sorted(name for name in report["unexpected_keys"] if re.sub(r"\d+", "0", name) in kinds)
    if spare:
        raise UserError(
            f"cannot load {what}: its files hold {len(spare)} tensors that its config.json has no place for"
            f" ({shown(spare[0])})"
        )


def _fit_tokenizer(what: str, model: Any, tokenizer: Any) -> None:
    """Every id of the tokenizer has an embedding, and there is a token to pad with.

    Where only the pad token has none, the tokenizer loses it and pads with another: which one does not matter, as
    padding is masked.
    """
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
