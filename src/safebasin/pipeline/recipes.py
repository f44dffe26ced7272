"""The recipes that travel in the package: ``builtin:quickstart`` runs as it is, and ``safebasin init`` copies one to
change."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safebasin.errors import UserError
from safebasin.pipeline.config import Recipe
from safebasin.pipeline.parse import parse, read

PLACES = (Path(__file__).parents[1] / "recipes", Path(__file__).parents[3] / "recipes")  # installed, and in a checkout


def recipe_text(name: str) -> str:
    """The text of a shipped recipe.

    Raises:
        UserError: there is none of this name.
    """
    folder = next((place for place in PLACES if place.is_dir()), PLACES[0])
    path = folder / f"{name}.yaml"
    if not re.fullmatch(r"\w+", name) or not path.is_file():
        raise UserError(
            f"no built-in recipe {name!r}; there are: {', '.join(sorted(p.stem for p in folder.glob('*.yaml')))}"
        )
    return path.read_text(encoding="utf-8")


def read_recipe(path: Path, changes: Sequence[str] = (), sets: Mapping[str, str] | None = None) -> Recipe:
    """A recipe from a file, or a shipped one by ``builtin:NAME``; see ``parse.parse``."""
    if path.name.startswith("builtin:"):
        return parse(recipe_text(path.name.removeprefix("builtin:")), path.name, changes, sets)
    return read(path, changes, sets)


def write_recipe(name: str, path: Path) -> Iterator[tuple[int, str]]:
    """Copy a shipped recipe to a new file; the lines that are the user's to change, with their numbers.

    Raises:
        UserError: the file is there already, or its folder is not.
    """
    text = recipe_text(name)
    if path.exists():
        raise UserError(f"{path} is there already; give another name")
    if not path.parent.is_dir():
        raise UserError(f"no such folder: {path.parent}")
    path.write_text(text, encoding="utf-8")
    return ((number, line) for number, line in enumerate(text.splitlines(), 1) if "# yours" in line)
