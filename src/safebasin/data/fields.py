"""Templates over the columns of a row: ``Classify: {text}``."""

import re
from collections.abc import Mapping
from typing import Any

FIELD = re.compile(r"{(\w[\w .-]*(?:\|\w[\w .-]*)*)}")


def lacking(template: str, row: Mapping[str, Any]) -> str:
    """The first field of a template that the row cannot fill, or nothing: an empty column, or one of lists or objects,
    which text would show in Python's notation."""
    return next(
        (
            names
            for names in FIELD.findall(template)
            if isinstance(_first(names, row), list | tuple | Mapping | bytes | None)
        ),
        "",
    )


def _first(names: str, row: Mapping[str, Any]) -> Any:
    """Of the columns ``name|other`` the first that the row has, or None."""
    return next((row[name] for name in names.split("|") if row.get(name) is not None), None)


def fill(template: str, row: Mapping[str, Any]) -> str:
    """``{name}`` replaced by the row's column, ``{name|other}`` by the first that it has; nothing else is read."""
    return FIELD.sub(lambda match: str(_first(match[1], row)), template)
