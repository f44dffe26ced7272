"""Fine-tune a language model without losing its safety alignment, and prove it.

The names below are the Python interface; each is documented, with an example, in ``safebasin.api``. They are imported
when they are first used, so that ``import safebasin`` takes no time.

>>> import safebasin
>>> rows = safebasin.read_rows([{"prompt": "Name a fruit.", "completion": "Apple."}])
>>> rows.examples[0].answer
'Apple.'
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safebasin.api import (
        Oracle,
        cut_rows,
        load_model,
        measure_model,
        mixed_answers,
        preview_rows,
        read_recipe,
        read_rows,
        run_recipe,
        scan_rows,
        train_adapter,
        write_report,
    )

__all__ = [
    "Oracle",
    "cut_rows",
    "load_model",
    "measure_model",
    "mixed_answers",
    "preview_rows",
    "read_recipe",
    "read_rows",
    "run_recipe",
    "scan_rows",
    "train_adapter",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("safebasin")
    if name in __all__:
        return getattr(importlib.import_module("safebasin.api"), name)
    raise AttributeError(f"module 'safebasin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
