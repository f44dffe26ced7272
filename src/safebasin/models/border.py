"""Where other libraries read the files of a model or an adapter: their errors become one line, without their notes."""

import contextlib
import re
import types
import warnings
from collections.abc import Iterator

from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import enable_progress_bars
from huggingface_hub.utils import logging as hub
from safetensors import SafetensorError
from transformers.utils import logging

from safebasin.data.files import cause
from safebasin.errors import DefenceError, UserError

# What transformers, peft and torch raise at a configuration, tokenizer or tensor that is damaged or does not fit.
ERRORS: tuple[type[Exception], ...] = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, ImportError),
    *(AssertionError, re.error, SafetensorError, StrictDataclassError),
)


class loading(contextlib.ExitStack):
    """Inside, an error of those libraries becomes a ``UserError``: ``what`` cannot be loaded, and why.

    ``tokenizers`` raises plain ``Exception``; that very class is taken, and none that derives from it.

    >>> with loading("the model 'some/folder'"):
    ...     AutoTokenizer.from_pretrained("some/folder")
    """

    def __init__(self, what: str):
        super().__init__()
        self.what = what

    def __enter__(self) -> "loading":
        self.enter_context(_quiet())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if error is None or isinstance(error, UserError | DefenceError):
            return
        if kind is Exception or isinstance(error, ERRORS):
            raise UserError(f"cannot load {self.what}: {cause(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers and the Hub's client show errors only, and no bar but that of a download."""
    level, hub_level, bars = logging.get_verbosity(), hub.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()
        enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        hub.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()
