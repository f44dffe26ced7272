"""A recipe from YAML and back: changes of the command line, unknown keys refused, dataclasses as plain trees."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from safebasin.data.source import Source
from safebasin.errors import UserError
from safebasin.pipeline import yaml12
from safebasin.pipeline.config import Arm, Cut, Data, Measure, Model, Recipe, Scan
from safebasin.registry import validated

T = TypeVar("T")
NAMES = [
    field.name for kind in (Recipe, Model, Data, Source, Scan, Cut, Arm, Measure) for field in dataclasses.fields(kind)
]


def parse(
    text: str, origin: str = "the recipe", changes: Sequence[str] = (), sets: Mapping[str, str] | None = None
) -> Recipe:
    """A recipe from YAML.

    Args:
        text: YAML 1.2.
        origin: what error messages call it.
        changes: ``dotted.key=value`` from the command line.
        sets: files in place of sets: wherever the recipe holds the name as a value, the file stands in its place.

    Raises:
        UserError: not YAML, an unknown key, a value of the wrong kind or outside its bounds.
    """
    return validate(Recipe, edited(yaml12.load(text, origin), origin, changes, sets), origin)


def edited(tree: Any, origin: str, changes: Sequence[str], sets: Mapping[str, str] | None) -> Any:
    """The tree with ``--change`` and ``--set`` applied to it.

    Raises:
        UserError: no mapping, a change that has no place in it, or a set that it does not name.
    """
    if not isinstance(tree, Mapping):
        raise UserError(f"{origin}: a recipe is a mapping of data, arms and measure; found {type(tree).__name__}")
    tree = copy.deepcopy(tree)
    for change in changes:
        key, sign, value = change.partition("=")
        if not sign:
            raise UserError(f"--change takes dotted.key=value, found {change!r}")
        _put(tree, key.split("."), yaml12.load(value, f"--change {key}"))
    for name, file in (sets or {}).items():
        tree, count = _replaced(tree, name, file)
        if not count:
            raise UserError(f"--set {name}: {origin} names no such set")
    return tree


def validate(kind: type[T], tree: Any, origin: str) -> T:
    """The tree as a dataclass of ``kind``; see ``registry.validated``."""
    return validated(kind, tree, origin, NAMES)


def _replaced(tree: Any, name: str, file: str) -> tuple[Any, int]:
    if isinstance(tree, dict):
        pairs = {key: _replaced(value, name, file) for key, value in tree.items()}
        return {key: value for key, (value, _) in pairs.items()}, sum(count for _, count in pairs.values())
    if isinstance(tree, list):
        items = [_replaced(value, name, file) for value in tree]
        return [value for value, _ in items], sum(count for _, count in items)
    return (file, 1) if tree == name else (tree, 0)


def _put(tree: Any, keys: list[str], value: Any) -> None:
    """Set a value deep in a tree; a number is a place in a list."""
    way = ".".join(keys)
    for key in keys[:-1]:
        if isinstance(tree, list) and key.isdecimal() and int(key) < len(tree):
            tree = tree[int(key)]
        elif isinstance(tree, dict):
            if tree.get(key) is None:
                tree[key] = {}
            tree = tree[key]
        else:
            raise UserError(f"--change {way}: there is no {key!r} on the way")
    if isinstance(tree, list) and keys[-1].isdecimal() and int(keys[-1]) < len(tree):
        tree[int(keys[-1])] = value
    elif isinstance(tree, dict):
        tree[keys[-1]] = value
    else:
        raise UserError(f"--change {way}: it does not end in a mapping")


def read(path: Path, changes: Sequence[str] = (), sets: Mapping[str, str] | None = None) -> Recipe:
    """The recipe in a file; see ``parse``."""
    return parse(yaml12.read(path), str(path), changes, sets)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML; ``parse(dump(recipe)) == recipe``."""
    return yaml.dump(plain(recipe), Dumper=yaml12.Dumper, sort_keys=False, allow_unicode=True)


def plain(value: Any) -> Any:
    """A tree of dataclasses as JSON has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def parse_sets(items: Sequence[str]) -> dict[str, str]:
    """``NAME=FILE`` of the command line.

    Raises:
        UserError: no ``=``, the file is not there, or a name stands twice.
    """
    pairs = [item.partition("=") for item in items]
    if twice := next((name for name, _, _ in pairs if [pair[0] for pair in pairs].count(name) > 1), ""):
        raise UserError(f"--set {twice}: it stands twice; which file is meant?")
    wrong = next((name for name, sign, file in pairs if not sign or not Path(file).is_file()), None)
    if wrong is not None:
        raise UserError(f"--set {wrong}: it takes NAME=FILE, and the file must be there")
    return {name: file for name, _, file in pairs}
