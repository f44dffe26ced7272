"""A run as a tree of frozen dataclasses: YAML in, YAML out, unknown keys refused, one digest."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from safebasin.data.source import Source
from safebasin.errors import UserError
from safebasin.measure.rubric import Rubric
from safebasin.registry import explain

Spec = str | dict[str, dict[str, Any] | None]  # a method: its name, or {name: {field: value}}
_frozen = checked_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))


@_frozen
class Model:
    name: str = "builtin:smollm2-aligned"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    trust_remote_code: bool = False


@_frozen
class Data:
    """The rows. ``poison`` is for experiments: the attack's rows are mixed into the task so that they are ``poison_share`` of the whole."""

    task: Source
    poison: Source | None = None  # harmful requests with openers: what the attack is made of
    attack: Spec = "explicit"
    poison_share: float = Field(default=0.0, ge=0, lt=1)
    align: Source | None = None  # rows as an aligned model answers them: what defences are aligned by
    probe: Source = Source(
        path="builtin:refusals", take=100
    )  # harmful requests with refusals: what scorers ask the model
    harmful: Source = Source(
        path="builtin:opened", take=40
    )  # rows known to be harmful: anchors of the cut, simulated attacks
    safe: Source = Source(path="builtin:harmless", take=60)  # rows known to be safe: anchors of the cut
    max_length: int = 1024
    on_bad: Literal["stop", "skip"] = "stop"


@_frozen
class Scan:
    scorers: tuple[Spec, ...] = ("gradshield",)
    batch_size: int = 16


@_frozen
class Cut:
    scorer: str | Annotated[tuple[str, ...], Field(min_length=1)] = "gradshield"  # several: a row must pass each
    estimator: Literal["anchors", "paper"] = "anchors"
    threshold: float | None = None

    @property
    def scorers(self) -> tuple[str, ...]:
        return (self.scorer,) if isinstance(self.scorer, str) else self.scorer


@_frozen
class Arm:
    """One way to tune. ``train: null`` leaves the model as it was."""

    cut: Cut | None = None
    columns: dict[str, str] = Field(
        default_factory=dict
    )  # that methods read: of which scorer, or from which file (row_id, column)
    train: tuple[Spec, ...] | None = None


@_frozen
class Measure:
    suites: tuple[Spec, ...] = ()
    labels: tuple[str, ...] = ()  # answers of the task that are only a label: off task to a harmful request
    system: str | None = None
    rubric: Rubric | None = None  # the served model of the judge "rubric"


@_frozen
class Run:
    """Everything that decides the outcome of a run."""

    data: Data
    arms: dict[str, Arm]
    measure: Measure
    model: Model = Model()
    scan: Scan = Scan()
    # ``adapter`` (LoraConfig), ``align_share`` (rows of other streams over rows of the task), and TrainingArguments by their names
    train: dict[str, Any] = Field(default_factory=dict)
    gate: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0

    @property
    def adapter(self) -> dict[str, Any]:
        return dict(self.train.get("adapter") or {})

    @property
    def align_share(self) -> float:
        return float(self.train.get("align_share", 0.25))

    @property
    def arguments(self) -> dict[str, Any]:
        own = {name: value for name, value in self.train.items() if name not in ("adapter", "align_share")}
        return {"seed": self.seed, **own}


def parse(text: str, origin: str = "the recipe", changes: Sequence[str] = ()) -> Run:
    """A run from YAML; ``changes`` are ``dotted.key=value`` from the command line.

    Raises:
        UserError: not YAML, an unknown key, a value of the wrong kind.
    """
    try:
        tree = yaml.safe_load(text)
        if not isinstance(tree, Mapping):
            raise UserError(f"{origin}: a recipe is a mapping of data, arms and measure; found {type(tree).__name__}")
        for change in changes:
            key, sign, value = change.partition("=")
            if not sign:
                raise UserError(f"--change takes dotted.key=value, found {change!r}")
            _put(tree, key.split("."), yaml.safe_load(value))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{origin}{where}: not YAML: {getattr(error, 'problem', error)}") from None
    try:
        return TypeAdapter(Run).validate_python(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: {explain(error)}") from None


def _put(tree: Any, keys: list[str], value: Any) -> None:
    """Set a value deep in a tree; a number is a place in a list."""
    way = ".".join(keys)
    for key in keys[:-1]:
        if isinstance(tree, list) and key.isdigit() and int(key) < len(tree):
            tree = tree[int(key)]
        elif isinstance(tree, dict):
            tree = tree.setdefault(key, {})
        else:
            raise UserError(f"--change {way}: there is no {key!r} on the way")
    if not isinstance(tree, dict):
        raise UserError(f"--change {way}: it does not end in a mapping")
    tree[keys[-1]] = value


def read(path: Path, changes: Sequence[str] = ()) -> Run:
    if not path.is_file():
        raise UserError(f"no such recipe: {path}")
    return parse(path.read_text(encoding="utf-8"), str(path), changes)


def dump(run: Run) -> str:
    """The resolved run as YAML; ``parse(dump(run)) == run``."""
    return yaml.safe_dump(plain(run), sort_keys=False, allow_unicode=True)


def plain(value: Any) -> Any:
    """A tree of dataclasses as JSON has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def digest(value: Any) -> str:
    """Digest of anything that ``plain`` can write."""
    return hashlib.blake2b(json.dumps(plain(value), sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def schema() -> dict[str, Any]:
    """JSON schema of a recipe."""
    return TypeAdapter(Run).json_schema()
