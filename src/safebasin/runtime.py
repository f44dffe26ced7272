"""Processes that share a run, memory, and what the hardware does well. torch is imported inside the functions that need
it: a recipe is read without it."""

import ctypes
import datetime
import functools
import platform
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, NamedTuple

Dtype = Literal["auto", "bfloat16", "float32"]  # of weights, as a recipe has it
BFLOAT16 = "amx_bf16"  # the flag of CPUs that are faster in bfloat16; AVX512-BF16 alone is slower (decision 23)


class Arithmetic(NamedTuple):
    """The type that ``auto`` stands for on this machine, and why."""

    dtype: Literal["bfloat16", "float32"]
    reason: str


def arithmetic(flags: Collection[str], gpu: bool | None = None) -> Arithmetic:
    """bfloat16 on a GPU that computes in it or a CPU with AMX, float32 elsewhere.

    Args:
        flags: of the CPU, as Linux names them.
        gpu: whether the GPU computes in bfloat16; None: there is none.

    >>> arithmetic({"avx2"}).dtype
    'float32'
    """
    if gpu is not None:
        return Arithmetic("bfloat16", "a GPU") if gpu else Arithmetic("float32", "a GPU without bfloat16")
    if BFLOAT16 in flags:
        return Arithmetic("bfloat16", f"a CPU with {BFLOAT16}")
    return Arithmetic("float32", f"a CPU without {BFLOAT16}")


@functools.cache
def hardware() -> Arithmetic:
    """``arithmetic`` of this machine."""
    import torch

    gpu = torch.cuda.is_bf16_supported(including_emulation=False) if torch.cuda.is_available() else None
    return arithmetic(cpu_facts().get("flags", "").split(), gpu)


def resolved(dtype: str) -> str:
    """The type of the weights: ``auto`` as this machine has it."""
    return hardware().dtype if dtype == "auto" else dtype


@functools.cache
def cpu_facts() -> dict[str, str]:
    """What Linux says of the first CPU: "model name", "flags" and more; empty elsewhere."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").split("\n\n")[0].splitlines() if file.is_file() else ()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def machine() -> str:
    """The GPU or the CPU that computes, in words."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    facts = cpu_facts()
    numbers = [f"{name} {facts[key]}" for name, key in (("family", "cpu family"), ("model", "model")) if key in facts]
    return facts.get("model name", platform.processor()) + (f" ({', '.join(numbers)})" if numbers else "")


def processes() -> Any:
    """The ``accelerate.PartialState`` of the processes that share a run: mostly one. They may wait for weeks."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=datetime.timedelta(weeks=4))


def keep_memory() -> None:
    """Tell glibc to keep freed memory: on a CPU the page faults of returning it cost up to seconds a GiB."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation by its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: no return of the heap's end
