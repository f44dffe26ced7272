"""Processes that share a run, and memory."""

import ctypes
import datetime
import platform

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """The processes that share a run: mostly one. They may wait for one another for weeks."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=datetime.timedelta(weeks=4))


def keep_memory() -> None:
    """Tell glibc to keep freed memory: on a CPU the page faults of returning it cost up to seconds a GiB."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation by its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: no return of the heap's end
