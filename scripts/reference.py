"""Write the reference pages of the site from the package itself: registries, schema, command line, public names.

    python scripts/reference.py [FOLDER]        by default docs/reference, and docs/changelog.md from CHANGELOG.md

These pages are not committed: `make docs` runs this before it builds the site, so they cannot differ from the code.
"""

import ast
import functools
import importlib
import inspect
import io
import json
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

ROOT = Path(__file__).parents[1]
STAGES = {  # page -> title, registry, where a recipe names such a method, what stands above the methods
    "scan": (
        "Scan: scorers",
        "safebasin.scan:scorer",
        "`scan.scorers`, and by name in `arms.NAME.cut.scorer` and `arms.NAME.columns`",
        "A scorer gives every row, or every answer token, a number. High means harmful. Nothing is deleted by a scan.",
    ),
    "train": (
        "Train: methods",
        "safebasin.train:method",
        "`arms.NAME.train`, a list",
        "A method defines `loss` (it takes the place of the task's token loss), `penalty` (added once a step) or "
        "`direction` (gradient surgery). Methods of different kinds can stand in one arm.",
    ),
    "repair": (
        "Repair: edits",
        "safebasin.repair:edit",
        "`arms.NAME.repair`, a list, and `safebasin repair --method`",
        "An edit says what the update of a weight should have been. Edits compose from left to right; each has one "
        "strength. [The guide](../guides/repair.md) has the roles that they need.",
    ),
    "measure": (
        "Measure: suites",
        "safebasin.measure:suite",
        "`measure.suites`, a list",
        "A suite asks the model of an arm and gives measurements: a value, its 95 % interval, the number of scored "
        "prompts, and what could not be scored.",
    ),
    "judges": (
        "Measure: judges",
        "safebasin.measure:judge",
        "`judges:` of a suite",
        "A judge reads a request and its answer and says: complied, refused, off task, or unscored.",
    ),
    "attack": (
        "Attack: hostile rows",
        "safebasin.attack:attack",
        "`data.attack`, with `data.poison` and `data.poison_share`; the attacks of a grid",
        "An attack makes the rows that a hostile customer would send, and says how the attacker asks at test time. "
        "It is for experiments: your own rows need none.",
    ),
}
METHODS = {  # keys of a recipe that name methods: they are explained on another page
    "Arm.train": "list of [training methods](train.md), or null",
    "Arm.repair": "list of [edits](repair.md), or null",
    "Data.attack": "an [attack](attack.md)",
    "Scan.scorers": "list of [scorers](scan.md)",
    "Measure.suites": "list of [suites](measure.md)",
    "Measure.judges": "mapping of [judges](judges.md) to their settings",
}
THEIRS = {"train": "`transformers.TrainingArguments`", "adapter": "`peft.LoraConfig`"}
COMMON = {  # fields that mean the same in every method, where the method says nothing of its own
    "against": "the scorer whose scores the attacker knows",
    "batch_size": "rows a forward pass",
    "column": "the column that holds the prompt",
    "data": "held-out rows of the task",
    "dtype": "of the weights",
    "judges": "their names",
    "max_new_tokens": "tokens of an answer",
    "modules": "the linear layers, by the ends of their names",
    "name": "of the suite, if a run has several of one kind",
    "prompts": "a file, a built-in set or a Hub id",
    "seed": "of the drawing",
    "take": "draw so many; null: all",
}
NEEDS = {
    "streams": "rows beside the task",
    "roles": "other weights or models",
    "columns": "columns of the rows",
    "reads": "is handed",
}
TYPES = {"number": "number", "integer": "whole number", "string": "text", "boolean": "true or false", "null": "null"}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
Pages = dict[str, str]


def prose(text: str) -> str:
    """Text of a docstring as Markdown: only code spans keep their marks."""
    parts = re.split(r"(``.+?``|`[^`\n]+`)", text)
    for at in range(0, len(parts), 2):
        parts[at] = re.sub(r"([*\[\]|])", r"\\\1", parts[at]).replace("<", "&lt;")
        parts[at] = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", parts[at])
    return "".join(parts)


def markdown(doc: str) -> str:
    """A docstring as Markdown: indented blocks are equations, ``Args:`` and the like are lists, ``>>>`` is code."""
    blocks = []
    text = re.sub(r"(?<=[^\n])\n(?=Departs from )", "\n\n", inspect.cleandoc(doc))
    for block in re.split(r"\n\s*\n", text):
        head, _, rest = block.partition("\n")
        if re.fullmatch(r"(Args|Returns|Raises|Yields):", head):
            items = re.split(r"\n(?=\S)", inspect.cleandoc(rest))
            blocks.append(f"**{head[:-1]}**\n\n" + "\n".join(f"- {prose(' '.join(each.split()))}" for each in items))
        elif block.startswith(">>>"):
            blocks.append(f"```pycon\n{block}\n```")
        elif all(line.startswith("    ") for line in block.split("\n")):
            blocks.append(f"``` {{ .text .no-copy }}\n{inspect.cleandoc(block)}\n```")
        else:
            blocks.append(prose(block))
    return "\n\n".join(blocks)


def comments(kind: type) -> dict[str, str]:
    """The comment of each field of a class and of the classes that it extends: beside the field, or above it."""
    comments: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if each.__module__.startswith("safebasin."):
            comments |= _comments(each)
    return comments


def _comments(kind: type) -> dict[str, str]:
    source = inspect.cleandoc("if 1:\n" + inspect.getsource(kind)) if inspect.getsource(kind)[0] == " " else ""
    lines = (source or inspect.getsource(kind)).split("\n")
    notes: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline):
        if token.type == tokenize.COMMENT:
            whole_line = not lines[token.start[0] - 1][: token.start[1]].strip()
            (alone if whole_line else notes)[token.start[0]] = token.string.lstrip("# ")
    comments = {}
    [body] = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.ClassDef)][:1]
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above: list[str] = []
            while node.lineno - 1 - len(above) in alone:
                above.insert(0, alone[node.lineno - 1 - len(above)])
            inside = [
                (notes | alone)[at] for at in range(node.lineno, (node.end_lineno or 0) + 1) if at in notes | alone
            ]
            comments[node.target.id] = " ".join(above + inside)
    return comments


def type_of(schema: dict[str, Any]) -> str:
    """A JSON schema in words, with its bounds."""
    if "$ref" in schema:
        name = schema["$ref"].split("/")[-1]
        return "anything" if name == "JsonValue" else f"[{name}](recipe.md#{name.lower()})"
    if values := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return " or ".join(f"`{each if isinstance(each, str) else json.dumps(each)}`" for each in values)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(type_of(each) for each in schema[key]))
    kind = schema.get("type", "anything")
    if kind == "array":
        if "prefixItems" in schema:
            return f"list of {len(schema['prefixItems'])}: " + ", ".join(map(type_of, schema["prefixItems"]))
        return f"list of {type_of(schema.get('items', {}))}" + (" (not empty)" if schema.get("minItems") else "")
    if kind == "object":
        inner = schema.get("additionalProperties") or next(iter(schema.get("patternProperties", {}).values()), None)
        return f"mapping to {type_of(inner)}" if isinstance(inner, dict) else "mapping"
    return TYPES.get(kind, kind) + "".join(f", {sign} {schema[key]}" for key, sign in BOUNDS.items() if key in schema)


def fields_table(schema: dict[str, Any], notes: dict[str, str], section: str = "") -> str:
    """The fields of a mapping in their order, with type, bounds, default and comment. ``section``: of a recipe."""
    rows = ["| field | type | default | |", "| --- | --- | --- | --- |"]
    order = [*notes, *schema.get("properties", {})]
    for name, inner in sorted(schema.get("properties", {}).items(), key=lambda item: order.index(item[0])):
        default = "required" if name in schema.get("required", ()) else "its defaults"
        if "default" in inner:
            text = json.dumps(inner["default"], ensure_ascii=False)
            default = "its defaults" if len(text) > 60 and isinstance(inner["default"], dict) else f"`{text}`"
        kind, note = (
            METHODS.get(f"{section}.{name}") or type_of(inner),
            inner.get("description") or notes.get(name) or COMMON.get(name, ""),
        )
        if section and "properties" in inner and f"{section}.{name}" not in METHODS:
            kind, note = f"[{name}](#{name})", ""
        note = prose(" ".join(note.split("\n\n")[0].split()))
        rows.append(f"| `{name}` | {kind} | {default.replace('|', chr(92) + '|')} | {note} |")
    return "\n".join(rows) if len(rows) > 2 else "No fields."


def stage_page(title: str, registry: Any, where: str, intro: str) -> str:
    """All methods of one extension point; a module that holds several shows its equations once."""
    modules: dict[str, list[Any]] = {}
    for entry in registry:
        modules.setdefault(entry.kind.__module__, []).append(entry)
    parts = [f"# {title}", f"{intro}\n\nIn a recipe: {where}. A method is named as `name` or `name: {{field: value}}`."]
    links = (f"[`{entry.name}`](#{entry.name})" for entry in registry)
    parts.append("Methods: " + " · ".join(links))
    for name, entries in modules.items():
        for entry in entries:
            parts.append(f"## {entry.name} {{ #{entry.name} }}")
            parts.append(prose(entry.summary))
            needs = [
                f"{text}: {', '.join(f'`{n}`' for n in getattr(entry, k))}"
                for k, text in NEEDS.items()
                if getattr(entry, k)
            ]
            if entry.paper:
                needs.insert(0, f"Paper: {prose(entry.paper)}")
            if needs:
                parts.append(". ".join(f"{each[0].upper()}{each[1:]}" for each in needs) + ".")
            parts.append(fields_table(TypeAdapter(entry.kind).json_schema(), comments(entry.kind)))
        doc = importlib.import_module(name).__doc__ or ""
        path = entries[0].kind.__module__.replace(".", "/")
        several = (
            f"### Equations of {', '.join(f'`{entry.name}`' for entry in entries)}\n\n" if len(entries) > 1 else ""
        )
        parts.append(f"{several}{markdown(doc)}\n\nSource: `{path}.py`")
    return "\n\n".join(parts) + "\n"


def sections(name: str, schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A mapping of the recipe, then the mappings that stand inside it without a name of their own."""
    yield name, schema
    for key, inner in schema.get("properties", {}).items():
        if "properties" in inner and f"{name}.{key}" not in METHODS:
            yield from sections(key, inner)


def recipe_page() -> str:
    from safebasin.data.source import Source
    from safebasin.pipeline import config
    from safebasin.pipeline.schema import schema
    from safebasin.report.limits import Gate

    tree = schema()
    parts = [
        "# Recipe keys",
        "A recipe is one YAML file (YAML 1.2: `1e-4` is a number). An unknown or repeated key is an error. "
        "`safebasin schema` prints the JSON schema from which this page is made; an editor that reads JSON schemas "
        "completes and checks a recipe with it.",
    ]
    mappings = [*sections(tree.get("title", "Recipe"), tree)]
    mappings += [(name, part) for name, part in tree["$defs"].items() if part.get("properties")]
    for name, part in mappings:
        kind = getattr(config, name, None) or {"gate": Gate, "Source": Source}.get(name)
        parts.append(f"## {name} {{ #{name.lower()} }}")
        parts += [prose(part["description"])] if part.get("description") else []
        if name in THEIRS:
            parts.append(f"A key without a default here has that of {THEIRS[name]}.")
        parts.append(fields_table(part, comments(kind) if inspect.isclass(kind) else {}, name))
    return "\n\n".join(parts) + "\n"


def cli_page() -> str:
    """What ``safebasin VERB --help`` says, of every verb."""
    from safebasin.cli.main import app

    text = app.generate_docs(output_format="markdown")
    text = re.sub(r"## Table of Contents\n.*?(?=\*\*Commands\*\*)", "", text, flags=re.DOTALL)
    text = re.sub(r", --empty-[\w-]+`", "`", text)
    text = re.sub(r"`([A-Z_]+), --[\w-]+`", r"`\1`", text)
    text = re.sub(r" \*\[default: (False|\"\"|\(\))\]\*", "", text)
    return re.sub(r"^# safebasin$", "# Command line", text, count=1, flags=re.MULTILINE)


def signature(value: Callable[..., Any]) -> str:
    """Of a function or class, with the names of types alone."""
    text = inspect.signature(value, eval_str=False)
    parts = []
    for parameter in text.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        note = (
            parameter.annotation
            if isinstance(parameter.annotation, str)
            else inspect.formatannotation(parameter.annotation)
        )
        default = parameter.default
        shown = getattr(default, "__name__", None) or repr(default)
        parts.append(f"{parameter.name}: {note}" + ("" if default is parameter.empty else f" = {shown}"))
    back = "" if text.return_annotation is text.empty else f" -> {text.return_annotation}"
    body = "".join(f"    {part},\n" for part in parts)
    return re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", f"(\n{body}){back}" if parts else f"(){back}")


def python_page() -> str:
    """The names of ``safebasin.__all__`` with their docstrings: functions first."""
    import safebasin

    parts = ["# Python", markdown(safebasin.__doc__ or "")]
    for name in sorted(safebasin.__all__, key=lambda name: name[0].isupper()):
        value = getattr(safebasin, name)
        doc = markdown(value.__doc__ or "")
        parts.append(f"## {name} {{ #{name} }}\n\n```python\n{name}{signature(value)}\n```\n\n{doc}")
    return "\n\n".join(parts) + "\n"


def registry_of(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def pages() -> dict[str, Callable[[], str]]:
    """The name of every generated page of the reference, and what writes it."""
    stages = {
        name: functools.partial(lambda title, path, *words: stage_page(title, registry_of(path), *words), *facts)
        for name, facts in STAGES.items()
    }
    return stages | {
        "recipe": recipe_page,
        "cli": cli_page,
        "python": python_page,
    }


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in pages().items():
        (folder / f"{name}.md").write_text(write(), encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")  # it stands in docs there
    (folder.parent / "changelog.md").write_text(changelog, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "reference")
