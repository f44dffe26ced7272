"""The methods of every stage, read from their source: what ``safebasin list`` prints at once, without importing torch.

A method of another package (entry point ``safebasin.<stage>``) is listed by the name of its entry point alone.
"""

import ast
import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

STAGES = {  # extension point -> its decorator, and the folder of its methods
    "attack": ("attack", "attack/methods"),
    "scan": ("scorer", "scan/methods"),
    "train": ("method", "train/methods"),
    "repair": ("edit", "repair/methods"),
    "measure": ("suite", "measure/methods"),
    "judge": ("judge", "measure/judges"),
}


class Outline(NamedTuple):
    """What the source of a method says: its name, summary, fields and paper."""

    name: str
    summary: str
    fields: tuple[str, ...]
    paper: str


def outline(stage: str) -> list[Outline]:
    """The methods of a stage, by name."""
    decorator, folder = STAGES[stage]
    home = Path(__file__).parent / folder
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(home.parent.rglob("*.py"))]
    classes = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    methods = []
    for node in classes.values():
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == decorator:
                methods.append(_outline(node, call, classes))
    foreign = importlib.metadata.entry_points(group=f"safebasin.{stage}")
    return sorted([*methods, *(Outline(point.name, f"of {point.value}", (), "") for point in foreign)])


def _outline(node: ast.ClassDef, call: ast.Call, classes: Mapping[str, ast.ClassDef]) -> Outline:
    facts = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    summary = (ast.get_docstring(node) or "").split("\n")[0]
    return Outline(
        ast.literal_eval(call.args[0]), summary, tuple(dict.fromkeys(_fields(node, classes))), facts.get("paper", "")
    )


def _fields(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> Iterator[str]:
    """Annotated names, those of base classes first."""
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            yield from _fields(classes[base.id], classes)
    for line in node.body:
        if (
            isinstance(line, ast.AnnAssign)
            and isinstance(line.target, ast.Name)
            and "ClassVar" not in ast.unparse(line.annotation)
        ):
            yield line.target.id
