"""What the verbs share: their options, how they print, and the start of what needs torch."""

import logging
import os
import warnings
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from safebasin import runtime
from safebasin.console import printable
from safebasin.errors import UserError
from safebasin.events import open_log

out = Console(highlight=False)

Sets = Annotated[tuple[str, ...], Parameter(name="--set", help="NAME=FILE: a local copy in place of a public set.")]
Changes = Annotated[tuple[str, ...], Parameter(name="--change", help="dotted.key=value: change a recipe.")]
RunFolderOption = Annotated[Path | None, Parameter(name="--out", help="Run folder; default runs/RECIPE.")]
Dtype = Annotated[runtime.Dtype, Parameter(help="Of the weights; auto: by the hardware.")]
Events = Annotated[
    Path | None,
    Parameter(name="--events", help="File to which steps, progress, losses and the verdict are added as JSON lines."),
]
Engine = Annotated[
    str,
    Parameter(
        name="--engine",
        help="Where scan, measuring and a grid's cells run: here, ray, or as in a recipe: '{ray: {address: auto}}'.",
    ),
]
ShowText = Annotated[bool, Parameter(help="Harmful text in clear.")]
Model = Annotated[str, Parameter(help="A folder, a Hub id or a built-in model.")]
MaxLength = Annotated[int, Parameter(help="Of a row in tokens; a longer one cannot be used.")]


def say(text: str) -> None:
    """One line on the standard output; what came with data in it is escaped and cut."""
    out.print(Text(printable(text, 4000)), soft_wrap=True)


def cells(table: Table, *texts: str) -> None:
    """A row of a table whose texts are hostile."""
    table.add_row(*(Text(printable(text)) for text in texts))


def on_engine(engine: str) -> list[str]:
    """The change of a recipe that ``--engine`` is; none where it is not given."""
    return [f"engine={engine}"] if engine else []


def refuse_processes() -> None:
    """UserError where a launcher started several processes: each would do the whole work in one folder."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("only run, train and scan are shared by processes; start this command without torchrun")


def start_events(path: Path | None) -> None:
    """Open the log of events, where one is named. Of processes that share a run, the first one writes."""
    if path is not None and os.environ.get("RANK", "0") == "0":
        open_log(path)


def start_torch() -> None:
    """Quiet transformers and keep freed memory. Called by the verbs that need torch, so that the others start at
    once."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it looks for a kernel at import, and says so
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # PEFT's call
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading weights; the steps have bars of their own
    runtime.keep_memory()
