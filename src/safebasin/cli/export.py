"""The verb that takes an arm out of a run: export."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from safebasin.cli.options import say, start_torch


def export_verb(
    run: Annotated[Path, Parameter(name="RUN", help="Run folder.")],
    *,
    arm: Annotated[str, Parameter(help="The arm whose adapter is taken out.")] = "defended",
    to: Annotated[Path, Parameter(help="A new folder.")],
    merge: Annotated[bool, Parameter(help="Whole weights in the place of an adapter.")] = False,
    base: Annotated[
        str | None, Parameter(help="Hub id of the base, with @REVISION, where the recipe names a folder.")
    ] = None,
) -> int:
    """Write an arm of a finished run as a folder that others load: adapter, merged weights or full model, tokenizer and
    template, model card, and safebasin.json with the digests of the report and of the base's weights."""
    start_torch()
    from safebasin.pipeline.export import export

    for note in export(run, arm, to, merged=merge, base=base):
        say(f"note: {note}")
    say(f"export: {to}")
    return 0
