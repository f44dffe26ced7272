"""One unit of work, two engines: a stage is a list of items, an item makes one part, and what is done is what lies on
disk.

``Here`` makes the parts in this process; ``OnRay`` hands the items to a pool of Ray actors. Neither moves rows: an item
says where its rows are, and a worker answers with counts. Tuning is not spread: its processes are torchrun's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from safebasin.errors import UserError
from safebasin.registry import split_spec, validated

Facts = dict[str, Any]  # of one item: counts and seconds, never rows


@runtime_checkable
class Item(Protocol):
    """What makes one part."""

    @property
    def name(self) -> str:
        """Of its part. Names sort in the order of the result."""


ItemKind = TypeVar("ItemKind", bound=Item, contravariant=True)
Worker = Callable[[ItemKind, Path], Facts]  # writes the part as a complete file, or not at all


@runtime_checkable
class Engine(Protocol):
    """Where items are worked on."""

    def work(
        self, items: Sequence[Any], make: Callable[[], Worker[Any]], parts: Callable[[str], Path]
    ) -> Iterator[Facts]:
        """The facts of every item, as they come.

        Args:
            items: to do, all of them.
            make: builds a worker, once a process: it loads what every item needs. It travels to other machines.
            parts: the path of a part by its item's name.

        Raises:
            UserError, DefenceError: of a worker; no further item is begun. Or an item's worker died again and again.
        """


def make_engine(spec: str | Mapping[str, Any]) -> Engine:
    """``here``, ``ray`` or ``{ray: {address: auto, workers: 8, gpus: 1}}``.

    Raises:
        UserError: another engine, an unknown field, a value out of bounds.
    """
    from safebasin.spread.here import Here
    from safebasin.spread.on_ray import OnRay

    name, fields = split_spec(spec, "engine")
    engines: dict[str, type[Here] | type[OnRay]] = {"here": Here, "ray": OnRay}
    if name not in engines:
        raise UserError(f"engine: there is no {name!r}; there are: {', '.join(engines)}")
    engine: Engine = validated(engines[name], fields, f"engine.{name}")
    return engine
