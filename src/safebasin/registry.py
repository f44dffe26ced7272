"""One registry class, one instance for each extension point: the decorator registers, the folder discovers.

A method is a class of keyword-only frozen fields. Its fields are its hyper-parameters, its YAML keys and its columns
in the report. ``Registry.__call__`` makes it so and files it; ``Registry.load`` imports every module of the registry's
folder and every entry point of the group ``safebasin.<name>``, so that a new method is a new file and no edit. What a
method needs of the run, it says in the decorator.
"""

import dataclasses
import difflib
import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from safebasin.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known of one method before it is configured. ``streams`` to ``probability`` are the decorator's facts."""

    name: str
    kind: type
    paper: str = ""
    streams: tuple[str, ...] = ()  # sets of rows beside "task" that the run must supply
    roles: tuple[str, ...] = ()  # other models that it needs: "reference", "start", "aligned"
    columns: tuple[str, ...] = ()  # columns of the rows that it reads
    # what else it is handed: "score(s)" (attacks), "prompts" (judges), "answers" alone (suites)
    reads: tuple[str, ...] = ()
    tokens: Literal["", "sum", "max"] = ""  # scorers: how the numbers of a row's answer tokens make the row's score
    probability: bool = False  # scorers: whether a number is a probability
    harmful_only: bool = False  # judges: whether they take any answer to a harmless request for a refusal
    strength: tuple[str, float, float] | None = None  # edits: a field, its value that changes nothing, its strongest
    entrywise: bool = False  # edits: whether the result is dense
    truncates: bool = False  # edits: whether the result is a truncation, whose energy is reported

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.kind) or "").split("\n")[0]

    def implements(self, name: str) -> bool:
        """Whether the class defines an optional part of its extension point, such as ``penalty`` or ``prefill``."""
        return hasattr(self.kind, name) or name in {field.name for field in dataclasses.fields(self.kind)}


class Registry:
    """The methods of one extension point by name.

    Args:
        name: of the extension point, as it stands in messages.
        folder: the package whose modules hold the methods; by default ``safebasin.<name>.methods``.

    >>> demo = Registry("demo")
    >>> @demo("mine", paper="arXiv:0000.00000")
    ... class Mine:
    ...     rho: float = 1.0
    >>> Mine(rho=2).rho
    2.0
    """

    def __init__(self, name: str, folder: str = ""):
        self.name = name
        self.folder = folder or f"safebasin.{name}.methods"
        self._entries: dict[str, Entry] = {}
        self._loaded = False

    @dataclass_transform(kw_only_default=True, frozen_default=True)
    def __call__(self, name: str, **facts: Any) -> Callable[[type[T]], type[T]]:
        def register(kind: type[T]) -> type[T]:
            if name in self._entries:
                raise ValueError(f"{self.name}: the name {name!r} is taken by {self._entries[name].kind}")
            config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
            checked: Any = checked_dataclass(kind, frozen=True, kw_only=True, config=config)
            self._entries[name] = Entry(name=name, kind=checked, **facts)
            checked.entry = self._entries[name]
            return checked

        return register

    def load(self) -> None:
        """Import every module of the folder and every entry point, once."""
        if self._loaded:
            return
        package = importlib.import_module(self.folder)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
        for point in importlib.metadata.entry_points(group=f"safebasin.{self.name}"):
            point.load()
        self._loaded = True

    def __iter__(self) -> Iterator[Entry]:
        self.load()
        return iter(sorted(self._entries.values(), key=lambda entry: entry.name))

    def __getitem__(self, name: str) -> Entry:
        self.load()
        if name not in self._entries:
            raise UserError(f"{self.name} has no method {name!r}; it has: {', '.join(sorted(self._entries))}")
        return self._entries[name]

    def make(self, spec: str | Mapping[str, Any]) -> Any:
        """Build a method from its configuration: ``name`` or ``{name: {field: value}}``.

        Raises:
            UserError: unknown method, unknown field, or a value of the wrong type or outside its bounds.
        """
        name, fields = split_spec(spec, self.name)
        kind: type[Any] = self[name].kind
        return validated(kind, fields, f"{self.name}.{name}", [field.name for field in dataclasses.fields(kind)])


OTHER_NAMES = {  # of other trainers -> ours
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "warmup_ratio": "warmup_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
}


def split_spec(spec: str | Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """The name and the fields of ``name`` or ``{name: {field: value}}``.

    Raises:
        UserError: another form; ``where`` stands before the message.

    >>> split_spec({"safegrad": {"rho": 2}}, "train")
    ('safegrad', {'rho': 2})
    """
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and len(spec) == 1:
        [(name, fields)] = spec.items()
        if isinstance(name, str) and (fields is None or isinstance(fields, Mapping)):
            return name, dict(fields or {})
    raise UserError(f"{where}: a method is `name` or `name: {{field: value}}`, found {spec!r}")


def validated(kind: type[T], tree: Any, origin: str, names: Iterable[str] = ()) -> T:
    """The tree as an object of ``kind``; a boolean or a text in the place of a number is refused, not converted.

    Args:
        kind: a dataclass whose fields are bounded.
        tree: as YAML has it.
        origin: what error messages call it.
        names: of fields, for the message on an unknown one.

    Raises:
        UserError: an unknown field, a value of the wrong kind or outside its bounds.
    """
    try:
        checked: T = TypeAdapter(kind).validate_python(tree)
        refuse_converted(tree, checked)
    except ValidationError as error:
        raise UserError(f"{origin}: {explain(error, names)}") from None
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    return checked


def refuse_converted(raw: Any, checked: Any, where: str = "") -> None:
    """UserError where pydantic made a number of something else: ``take: true`` is no 1, and ``rho: "2"`` no 2."""
    if isinstance(checked, int | float) and not isinstance(checked, bool):
        if isinstance(raw, bool | str):
            raise UserError(f"{where}: a number is needed, found {raw!r}")
    elif isinstance(raw, Mapping):
        for key, value in raw.items():
            inner = checked.get(key) if isinstance(checked, Mapping) else getattr(checked, str(key), None)
            refuse_converted(value, inner, f"{where}.{key}" if where else str(key))
    elif isinstance(raw, list | tuple) and isinstance(checked, list | tuple):
        for i, (value, inner) in enumerate(zip(raw, checked, strict=False)):
            refuse_converted(value, inner, f"{where}.{i}")


def nearest(name: str, names: Iterable[str]) -> str:
    """What a message adds to an unknown name: the known one that was meant, or nothing.

    >>> nearest("learning_rat", ["learning_rate", "seed"])
    "; is 'learning_rate' meant?"
    """
    names, other = list(names), OTHER_NAMES.get(name.lower(), "")
    close = [other] if other in names else difflib.get_close_matches(name, {*names} - {name}, 1)
    return f"; is {close[0]!r} meant?" if close else ""


def explain(error: ValidationError, names: Iterable[str] = ()) -> str:
    """A validation error in one line: where, what was found, what is wrong; ``names``: those that are known."""
    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "value"
        unknown = item["type"] in ("extra_forbidden", "unexpected_keyword_argument")
        parts.append(f"{where}: {'unknown key' + nearest(str(item['loc'][-1]), names) if unknown else item['msg']}")
    return "; ".join(parts)
