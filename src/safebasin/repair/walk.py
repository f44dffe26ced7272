"""The walk of a repair over the weights of a model: select, edit and compose, module by module.

    dW'_l = dW_l                where the module is not selected
    dW'_l = E(dW_l)             where it is

An edit that selects looks at the updates of all modules first; several edits compose from left to right. Nothing but
the updates of one module, one V and one H is in memory at a time: a module is edited when its result is asked for.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from safebasin.errors import DefenceError, UserError
from safebasin.layer import Update
from safebasin.repair import edit as registry
from safebasin.repair.update import cosine, image

SAME = 1e-6  # of the length of an update: an edit that moves it less has changed nothing
ROLES = {
    "base": "the model before its alignment",
    "safe": "an adapter tuned from the start on refusals and harmless rows",
    "harmful": "an adapter tuned from the start on rows that are harmful",
}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Layer:
    """One weight in the roles that its edit reads.

    ``roles``: the updates of ``safe`` and ``harmful``, and V = W_start - W_base as that of ``base``. ``moments``: H by
    the name of its rows; ``gradients``: F.
    """

    name: str
    tuned: Update
    roles: Mapping[str, Update] = dataclasses.field(default_factory=dict)
    moments: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    gradients: Tensor | None = None

    @property
    def v(self) -> Tensor:
        """V ``[out, in]``."""
        return self.roles["base"].dense()


@runtime_checkable
class Edit(Protocol):
    """What a weight should have been. A class may also define:

    ``statistic(layer) -> float`` and ``select(values) -> names``: which modules are edited, by a number of each;
    ``more(fact) -> names``: what ``facts`` gives, where it depends on the fields.
    """

    def edit(self, layer: Layer) -> Update:
        """dW' of a module whose update is ``layer.tuned``, in the same shape."""


@dataclasses.dataclass(frozen=True, eq=False)
class Roles:
    """Where the walk reads from: mappings by module, read one module at a time."""

    tuned: Mapping[str, Update]
    base: Mapping[str, Tensor] | None = None  # V
    safe: Mapping[str, Update] | None = None
    harmful: Mapping[str, Update] | None = None
    moments: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # H by the name of the rows
    gradients: Mapping[str, Any] | None = None  # F

    def update(self, role: str, module: str) -> Update:
        """What a role holds of a module."""
        source = getattr(self, role)
        value = source[module]
        return value if isinstance(value, Update) else Update(value)


@dataclasses.dataclass(frozen=True)
class Record:
    """What was done to a module: a line of ``repair.json``. Lengths are Frobenius norms."""

    module: str
    rank_in: int
    rank_out: int | None  # None: a dense update
    norm: float  # |dW|
    norm_after: float  # |dW'|
    distance: float  # |dW' - dW| / |dW|
    cosine: float | None  # cos(C dW, dW), where a base is there
    image: float | None  # |C dW| / |dW|
    selected: tuple[str, ...]  # the edits that took it
    energy: float  # |dW'|^2 over what it was before its rank was cut


def facts(edit: Any, fact: str) -> tuple[str, ...]:
    """What an edit needs: ``roles``, ``streams`` or ``reads``; and ``dense``, where its fields make the result so."""
    more = edit.more(fact) if edit.entry.implements("more") else ()
    return tuple(dict.fromkeys((*getattr(edit.entry, fact, ()), *more)))


def needs(edits: Sequence[Any], fact: str) -> tuple[str, ...]:
    """What several edits need, each once."""
    return tuple(dict.fromkeys(name for edit in edits for name in facts(edit, fact)))


def make_edits(specs: Sequence[Any]) -> tuple[Any, ...]:
    """Edits from their configuration.

    Raises:
        UserError: none, an unknown one, a wrong field, or one whose strength is set to change nothing.
    """
    edits = tuple(registry.make(spec) for spec in specs)
    if not edits:
        raise UserError("repair is empty; name at least one edit, for example shrink: {alpha: 0.5}")
    for edit in edits:
        field, off, _ = edit.entry.strength or ("", 0.0, 0.0)
        if field and getattr(edit, field) == off and not edit.entry.truncates:  # truncate has a rank beside it
            raise UserError(f"repair.{edit.entry.name}: {field}: {off:g} is the end that changes nothing")
    return edits


def gives_dense(edits: Sequence[Any]) -> bool:
    """Whether the result is dense, so that it is no adapter of the rank that went in."""
    dense = False
    for edit in edits:
        dense = not edit.entry.truncates and (dense or edit.entry.entrywise or bool(facts(edit, "dense")))
    return dense


class Walk:
    """Edits over the modules of an update; ``walk[module]`` is the module's new update.

    Raises:
        UserError: a role that is missing, lacks a module or has another shape; a base that is the start.
    """

    def __init__(self, edits: Sequence[Any], roles: Roles):
        self.edits, self.roles = edits, roles
        self.needs = needs(edits, "roles")
        self._check()
        self.skipped = tuple(name for name in roles.tuned if not roles.tuned[name].norm() > 0)  # dW = 0
        self.modules = tuple(name for name in roles.tuned if name not in self.skipped)
        self.selected: list[frozenset[str]] = []
        self.changed = [False] * len(edits)
        for i, edit in enumerate(edits):
            chosen = self.modules
            if edit.entry.implements("select"):
                chosen = edit.select({name: edit.statistic(self.layer(name, i)) for name in self.modules})
            self.selected.append(frozenset(chosen))

    def _check(self) -> None:
        for role in self.needs:
            if role not in ROLES:
                continue
            if getattr(self.roles, role) is None:
                methods = " and ".join(e.entry.name for e in self.edits if role in facts(e, "roles"))
                raise UserError(f"{methods} needs the role {role}: {ROLES[role]}")
            source = getattr(self.roles, role)
            names = set(source)
            for name in self.roles.tuned:
                if name not in names:
                    raise UserError(f"the role {role} has no module {name}, which the tuned model has")
                shape = self.roles.tuned[name].shape
                if role != "base" and (other := source[name].shape) != shape:
                    raise UserError(f"{name} is {other} in the role {role} and {shape} in the tuned model")
        if "base" in self.needs and not any(self.roles.update("base", n).b.any() for n in self.roles.tuned):
            raise UserError("base and start hold the same weights, so there is no alignment direction between them")

    def layer(self, name: str, upto: int) -> Layer:
        """A module after the first edits."""
        edits = self.edits[: upto + 1]
        roles = {role: self.roles.update(role, name) for role in needs(edits, "roles") if role in ROLES}
        moments = {stream: self.roles.moments[stream][name] for stream in needs(edits, "streams")}
        gradients = None
        if "gradients" in needs(edits, "reads") and self.roles.gradients is not None:
            gradients = self.roles.gradients[name]
        layer = Layer(name=name, tuned=self.roles.tuned[name], roles=roles, moments=moments, gradients=gradients)
        for i, edit in enumerate(edits[:upto]):
            layer = dataclasses.replace(layer, tuned=self._edited(i, edit, layer))
        return layer

    def _edited(self, i: int, edit: Any, layer: Layer) -> Update:
        if layer.name not in self.selected[i]:
            return layer.tuned
        update: Update = edit.edit(layer)
        if update.shape != layer.tuned.shape or not (update.norm() < float("inf")):
            raise DefenceError(f"{layer.name}: {edit.entry.name} gave an update of another shape, or no numbers")
        return update

    def result(self, name: str) -> tuple[Update, Record]:
        """The new update of a module, and what was done to it."""
        if name in self.skipped:
            update = self.roles.tuned[name]
            return update, _record(name, update, update, None, (), 1.0)
        last, taken, energy = len(self.edits) - 1, [], 1.0
        layer = self.layer(name, last)
        layer = dataclasses.replace(layer, tuned=self.roles.tuned[name])
        for i, edit in enumerate(self.edits):
            new = self._edited(i, edit, layer)
            if name in self.selected[i]:
                taken.append(edit.entry.name)
                self.changed[i] |= (new - layer.tuned).norm() > SAME * layer.tuned.norm()
                if edit.entry.truncates and (size := layer.tuned.norm()):  # an edit before may have left nothing
                    energy *= (new.norm() / size) ** 2
            layer = dataclasses.replace(layer, tuned=new)
        v = layer.v if "base" in layer.roles else None
        return layer.tuned, _record(name, self.roles.tuned[name], layer.tuned, v, tuple(taken), energy)

    def check_changed(self) -> None:
        """DefenceError where an edit has changed no module; call it after every result."""
        for edit, changed in zip(self.edits, self.changed, strict=True):
            if not changed:
                raise DefenceError(f"{edit.entry.name} changed nothing: no module was selected, or its strength is low")


def _record(name: str, old: Update, new: Update, v: Tensor | None, taken: tuple[str, ...], energy: float) -> Record:
    size, projected = old.norm(), None if v is None or not v.any() else old.left(lambda x: image(v, x))
    return Record(
        module=name,
        rank_in=old.rank,
        rank_out=None if new.a is None else new.b.shape[1],
        norm=size,
        norm_after=new.norm(),
        distance=(new - old).norm() / size if size else 0.0,
        cosine=None if projected is None else cosine(projected, old),
        image=None if projected is None else projected.norm() / size,
        selected=taken,
        energy=energy,
    )
