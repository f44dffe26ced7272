"""Tune the adapter of a role, once a model: a recipe of one arm, in a folder of the cache."""

import shutil
from pathlib import Path
from typing import Any, Literal

from safebasin.errors import UserError
from safebasin.pipeline.config import Model, Recipe
from safebasin.pipeline.parse import plain, validate
from safebasin.pipeline.roles import role_adapter, role_folder
from safebasin.pipeline.run import Run

Role = Literal["safe", "harmful", "reinforce"]
ROWS: dict[Role, str] = {"safe": "builtin:aligned", "harmful": "builtin:opened", "reinforce": "builtin:aligned"}


def tune_role(role: Role, model: Model, train: dict[str, Any], rows: str = "") -> Path:
    """The adapter of a role for a model, tuned if it is not in the cache yet. ``train`` is that of a recipe.

    Raises:
        UserError: settings or rows that are refused; ``reinforce`` before ``harmful``; an existing one, other settings.
    """
    folder = role_folder(model, role)
    if (folder / "adapter_config.json").is_file():
        return folder
    methods: list[Any] = ["sft"]
    if role == "reinforce":
        role_adapter(model, "harmful", "")
        methods = [{"buffer_reinforce": {"merge": False}}]
    tree = {
        "model": plain(model),
        "data": {"task": {"path": rows or ROWS[role]}},
        "train": train,
        "arms": {role: {"train": methods}},
        "measure": {},
        "gate": {"plain": role},
    }
    work = folder.with_name(f".{folder.name}.work")
    with Run(validate(Recipe, tree, f"the role {role}"), work) as run:
        adapter = run.ensure(role)
    if adapter is None:
        raise UserError(f"the role {role} was not tuned")
    adapter.rename(folder)
    shutil.rmtree(work)
    return folder
