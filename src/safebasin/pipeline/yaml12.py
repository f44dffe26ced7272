"""Recipes as YAML 1.2 reads them: ``1e-4`` is a number and ``no`` a word; a key that stands twice is refused.

PyYAML follows YAML 1.1, where ``1e-4`` is text, ``on`` is true and ``1:30`` is ninety. Only the resolution of plain
words is replaced.
"""

import math
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from safebasin.errors import UserError

LARGEST = 100_000  # values in a tree, aliases followed: a file of a kilobyte can name billions
DEEPEST = 40
BYTES = 1 << 20

_CORE = {  # the core schema of YAML 1.2.2, section 10.3.2
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "tag:yaml.org,2002:null": (r"null|Null|NULL|~|", "nN~\0"),
    "tag:yaml.org,2002:merge": (r"<<", "<"),
}


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the words of YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            word = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if word in seen and word is not None:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(word)
        return super().construct_mapping(node, deep)


Loader.yaml_implicit_resolvers = {}  # its own, not those of YAML 1.1
for _tag, (_pattern, _first) in _CORE.items():
    for _character in _first:
        Loader.yaml_implicit_resolvers.setdefault("" if _character == "\0" else _character, []).append(
            (_tag, re.compile(rf"^(?:{_pattern})$"))
        )


def _integer(loader: Loader, node: yaml.ScalarNode) -> int:
    text = node.value
    return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


def _float(loader: Loader, node: yaml.ScalarNode) -> float:
    text = node.value.lower()
    if "inf" in text:
        return -math.inf if text.startswith("-") else math.inf
    return math.nan if "nan" in text else float(text)


Loader.add_constructor("tag:yaml.org,2002:int", _integer)
Loader.add_constructor("tag:yaml.org,2002:float", _float)


class Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes what ``Loader`` would read as something else than text."""


def _text(dumper: Dumper, text: str) -> yaml.ScalarNode:
    """Text with a line break that is no line feed is quoted twice: written plainly, it would be read as a space."""
    style = '"' if {*"\x85\u2028\u2029\r"} & {*text} else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


Dumper.add_representer(str, _text)
Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *Loader.yaml_implicit_resolvers.get(first, [])]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *Loader.yaml_implicit_resolvers}
}


def load(text: str, origin: str) -> Any:
    """The tree that a YAML text holds.

    Raises:
        UserError: not YAML, a key that stands twice, a tree that is too large or too deep; it names ``origin`` and the
        line.
    """
    try:
        tree = yaml.load(text, Loader)
        _measure(tree)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{origin}{where}: not YAML: {reason}") from None
    # nested too deep, a date or number that is none, a key that is a list
    except (RecursionError, ValueError, TypeError) as error:
        raise UserError(f"{origin}: not YAML that a recipe can hold: {str(error).splitlines()[0]}") from None
    return tree


def _measure(tree: Any) -> None:
    """ValueError where a tree is too deep or too large, aliases counted as often as they are used."""
    count, stack = 0, [(tree, 1)]
    while stack:
        value, depth = stack.pop()
        count += 1
        if depth > DEEPEST or count > LARGEST:
            raise ValueError(f"it nests deeper than {DEEPEST} or holds more than {LARGEST} values")
        inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        stack += [(inner, depth + 1) for inner in inside]


def read(path: Path, kind: str = "recipe") -> str:
    """The text of a recipe's file.

    Raises:
        UserError: no such file, not a file, too large, or not UTF-8.
    """
    if not path.is_file():
        raise UserError(f"no such {kind}: {path}")
    try:
        if path.stat().st_size > BYTES:
            raise UserError(f"{path}: a {kind} of more than {BYTES} bytes; is it one?")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
