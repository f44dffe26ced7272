"""Verbs about the installation: init, list, schema, doctor."""

import json
from pathlib import Path
from typing import Annotated

import rich.table
from cyclopts import Parameter

from safebasin.cli.options import cells, out, say, start_torch


def init_verb(
    file: Annotated[Path, Parameter(help="The recipe to write.")] = Path("recipe.yaml"),
    *,
    recipe: Annotated[str, Parameter(help="The shipped recipe that it is a copy of.")] = "own",
) -> int:
    """Write a recipe for your own model and rows, and name the lines to change."""
    from safebasin.pipeline.recipes import write_recipe

    for number, line in write_recipe(recipe, file):
        say(f"{file}:{number}: {line.strip()}")
    say(f"then: safebasin run {file}")
    return 0


def list_verb(*, json_: Annotated[bool, Parameter(name="--json", help="For programs.")] = False) -> int:
    """Every method of every stage, with its fields and where it comes from."""
    from safebasin.outline import STAGES, outline

    stages = {stage: list(outline(stage)) for stage in STAGES}
    if json_:
        tree = {
            stage: {each.name: {"summary": each.summary, "paper": each.paper} for each in listed}
            for stage, listed in stages.items()
        }
        print(json.dumps(tree, indent=2))
        return 0
    for stage, listed in stages.items():
        table = rich.table.Table("method", "what it does", "fields", "paper", title=stage, title_justify="left")
        for each in listed:
            cells(table, each.name, each.summary, ", ".join(each.fields), each.paper)
        out.print(table)
    return 0


def schema_verb(*, report: Annotated[bool, Parameter(help="Of report.json.")] = False) -> int:
    """The JSON schema of a recipe, for editors; or of a report, for programs that read it."""
    if report:
        from safebasin.report.report import schema
    else:
        start_torch()
        from safebasin.pipeline.schema import schema
    print(json.dumps(schema(), indent=2))
    return 0


def doctor_verb() -> int:
    """What this machine has: versions, threads, the built-in models."""
    start_torch()
    import platform

    import torch

    from safebasin.models.bundled import BUILTIN, cache, resolve
    from safebasin.pipeline.fingerprint import versions
    from safebasin.runtime import hardware, machine

    for name, version in versions().items():
        say(f"{name} {version}")
    say(f"Python {platform.python_version()}, {torch.get_num_threads()} threads, GPU: {torch.cuda.is_available()}")
    say(f"computes on {machine()}; dtype auto is {hardware().dtype}: {hardware().reason}")
    say(f"model cache: {cache()}")
    for name in BUILTIN:
        resolve(name)
        say(f"{name}: ready")
    return 0
