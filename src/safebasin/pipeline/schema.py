"""The JSON schema of a recipe, with every method's fields, the keys of ``train`` and those of ``gate``: for editors."""

from typing import Any

from pydantic import TypeAdapter

from safebasin.attack import attack
from safebasin.measure import judge, suite
from safebasin.pipeline.config import Recipe
from safebasin.registry import Registry
from safebasin.repair import edit
from safebasin.report.limits import Gate
from safebasin.scan import scorer
from safebasin.train import method
from safebasin.train.ema import Ema
from safebasin.train.settings import Adapter, Settings

SPECS = {  # where a recipe names methods: (definition, property) -> the registry, and whether several may stand there
    ("Data", "attack"): (attack, False),
    ("Scan", "scorers"): (scorer, True),
    ("Arm", "train"): (method, True),
    ("Arm", "repair"): (edit, True),
    ("Mix", "guard"): (scorer, False),
    ("Measure", "suites"): (suite, True),
}


def schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe."""
    tree = TypeAdapter(Recipe).json_schema()
    parts = tree["$defs"]
    for (definition, name), (registry, several) in SPECS.items():
        field, spec = parts[definition]["properties"][name], _spec(registry, parts)
        about = {key: field[key] for key in ("default", "title") if key in field}
        spec = {"type": "array", "items": spec} if several else spec
        if definition in ("Arm", "Mix"):
            spec = {"anyOf": [spec, {"type": "null"}]}
        parts[definition]["properties"][name] = {**spec, **about}
    judges = {entry.name: _fields(entry.kind, parts) for entry in judge}
    parts["Measure"]["properties"]["judges"] = {"type": "object", "additionalProperties": False, "properties": judges}
    tree["properties"]["train"] = _train(parts)
    tree["properties"]["gate"] = _fields(Gate, parts)
    return tree


def _spec(registry: Registry, parts: dict[str, Any]) -> dict[str, Any]:
    """A method's name, or its name with its fields."""
    named = [
        {
            "type": "object",
            "additionalProperties": False,
            "required": [entry.name],
            "properties": {entry.name: _fields(entry.kind, parts)},
        }
        for entry in registry
    ]
    names = {"enum": [entry.name for entry in registry]}
    return {"anyOf": [names, *named]}


def _fields(kind: type, parts: dict[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass; definitions that they refer to go to ``parts``."""
    fields = TypeAdapter(kind).json_schema()
    parts |= {name: part for name, part in fields.pop("$defs", {}).items() if name not in parts}
    return {**fields, "additionalProperties": False}


def _train(parts: dict[str, Any]) -> dict[str, Any]:
    settings = _fields(Settings, parts)
    share = {"type": "number", "exclusiveMinimum": 0, "description": "rows of other streams over rows of the task"}
    adapter = {**TypeAdapter(Adapter).json_schema(), "description": "peft.LoraConfig by its names"}
    return {
        **settings,
        "properties": {"adapter": adapter, "align_share": share, "ema": _fields(Ema, parts), **settings["properties"]},
    }
