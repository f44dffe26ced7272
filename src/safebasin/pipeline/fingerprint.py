"""What a step stands on, as one digest, by content: nobody lists files by hand, so none can be forgotten.

``fingerprint(value)`` reads whatever a recipe, a method or a step names: rows of a set, bytes of a file or a folder,
the weights of a model, a method's fields and its source. A text that is the name of something is digested with what it
names.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from safebasin.data.json_rows import BadRow
from safebasin.data.source import Source, is_remote, open_table
from safebasin.data.tables import endings
from safebasin.models.fingerprint import file_digests, model_fingerprint
from safebasin.pipeline.config import Model
from safebasin.pipeline.parse import plain
from safebasin.runtime import resolved
from safebasin.scan.shard import JSON_LINES, cut_shards, read_shard

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "tokenizers",
    "safetensors",
    "datasets",
    "pyarrow",
    "numpy",
    "scipy",
)
HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+")
PACKAGE = Path(__file__).parents[1]


def fingerprint(value: Any) -> str:
    """32 hexadecimal digits of a value and of all that it names.

    Args:
        value: None, a bool, a number, a text, a Path, a Source, a ``config.Model``, a configured method, or a mapping,
            sequence or dataclass of these. Of a Path, and of a text that names a file, a folder, a built-in set or a
            model, the content counts; of a Source the rows, with the fields by which they are drawn.

    Raises:
        UserError: a set, a file or a model that is named and cannot be read.
        TypeError: a value of another kind, whose content nobody has said how to read.
    """
    return digest(_plain(value))


def digest(tree: Any) -> str:
    """32 hexadecimal digits of a tree of JSON."""
    return hashlib.blake2b(
        json.dumps(tree, sort_keys=True).encode("utf-8", "surrogatepass"), digest_size=16
    ).hexdigest()


def _plain(value: Any) -> Any:
    """A tree of JSON that holds the content of all that ``value`` names."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Path):
        return {"content": _content(value)}
    if isinstance(value, str):
        return {"text": value, "content": _named(value)}
    if isinstance(value, Source):
        fields = {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.name != "path"
        }
        return {"rows": _rows(value.path, value.revision), "fields": fields}
    if isinstance(value, Model):
        return {
            "weights": model_fingerprint(value.name, value.revision),
            "dtype": resolved(value.dtype),
            "quantization": value.quantization and [value.quantization, importlib.metadata.version("bitsandbytes")],
            "attention": value.attention,
            "remote": value.trust_remote_code,
            "template": plain(value.template),
        }
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__qualname__, "source": source_digest(type(value)), "fields": fields}
    raise TypeError(f"no fingerprint of a {type(value).__name__}")


def _named(text: str) -> str | None:
    """The content of what a text names; None where it names nothing."""
    if text.startswith("builtin:"):
        return model_fingerprint(text) if text.startswith("builtin:smollm2") else _rows(text)
    if not text or len(text) > 1000 or "\0" in text or "\n" in text:
        return None
    path = Path(text)
    try:
        if path.exists():
            return _content(path)
        # a guard is named by what its two files have in common
        pair = [path.with_name(path.name + ending) for ending in (".json", ".safetensors")]
        if path.name and all(part.is_file() for part in pair):
            return digest([_content(part) for part in pair])
    except OSError:  # a system prompt is too long to be a name
        return None
    # a model of the Hub that was fetched before
    cached = try_to_load_from_cache(text, "config.json") if HUB.fullmatch(text) else None
    return Path(cached).parent.name if isinstance(cached, str) else None


def _content(path: Path) -> str:
    """Digest of a file, or of every file of a folder by its name."""
    if not path.is_dir():
        return file_digests([path])[path]
    inside = sorted(
        p for p in path.rglob("*") if p.is_file() and not {".git", "__pycache__"} & {*p.relative_to(path).parts}
    )
    return digest([[p.relative_to(path).as_posix(), each] for p, each in file_digests(inside).items()])


def _rows(name: str, revision: str | None = None) -> str:
    """Digest of a set's rows, whatever file they come from."""
    rows = hashlib.blake2b(digest_size=16)
    # A large file is never in memory as a complete table.
    by_shard = endings(name) in JSON_LINES and not is_remote(name)
    shards = cut_shards(Path(name), 4096) if by_shard else ()
    for line, row in (
        itertools.chain.from_iterable(map(read_shard, shards)) if by_shard else open_table(name, revision=revision)
    ):
        shown = row._asdict() if isinstance(row, BadRow) else row
        rows.update(json.dumps([line, shown], sort_keys=True, default=repr).encode("utf-8", "surrogatepass"))
    return rows.hexdigest()


def source_digest(kind: type) -> str:
    """Digest of the module that defines a method of another package; of ours, ``package_digest`` covers it."""
    module = inspect.getmodule(kind)
    if module is None or module.__name__.split(".")[0] == "safebasin":
        return ""
    return digest(inspect.getsource(module))


@functools.cache
def package_digest() -> str:
    """Digest of every file of this package: a changed line of code makes what it made stale."""
    return _content(PACKAGE)


@functools.cache
def versions() -> dict[str, str]:
    """The versions of this package and of those that it computes with."""
    return {name: importlib.metadata.version(name) for name in ("safebasin", *PACKAGES)}
