"""Which arm is which: by the gate's names, else by how an arm is tuned, never by its place in a recipe."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from safebasin.console import printable
from safebasin.errors import UserError
from safebasin.report.limits import Gate


class Roles(NamedTuple):
    """Which arm is which; None where the run has no such arm, or it is not said which of several."""

    start: str | None
    plain: str | None
    judged: str | None
    defended: tuple[str, ...]


def roles_of(arms: Mapping[str, Any], gate: Gate) -> Roles:
    """The roles of the arms by the gate's names, else by how they are tuned, never by their place.

    Args:
        arms: name -> settings as a recipe has them (``train``, ``cut``, ``columns``), or None where they are unknown:
            then the names ``start`` and ``plain`` say what an arm is.
    """
    kinds = {name: _kind(name, settings) for name, settings in arms.items()}
    by_kind = {kind: [name for name in arms if kinds[name] == kind] for kind in ("start", "plain", "defended")}
    plain = gate.plain if gate.plain in arms else _only(by_kind["plain"])
    defended = tuple(name for name in by_kind["defended"] if name != plain)
    judged = gate.arm or _only(defended or by_kind["plain"] or by_kind["start"])
    return Roles("start" if kinds.get("start") == "start" else _only(by_kind["start"]), plain, judged, defended)


def check_limits(settings: Mapping[str, Any], roles: Roles) -> None:
    """UserError where a limit that a recipe writes would compare the judged arm with itself. The default limits are not
    asked of such an arm.

    Args:
        settings: the gate, as the recipe has it.
        roles: of the run's arms.
    """
    against = {"max_accuracy_loss": roles.plain, "max_loss": roles.plain, "max_over_refusal_gain": roles.start}
    for key, arm in against.items():
        if settings.get(key) not in (None, {}) and arm is not None and arm == roles.judged:
            raise UserError(
                f"gate.{key}: it compares the judged arm with {printable(arm, 60)!r}, which is that arm itself and "
                "meets every limit; judge another arm (gate.arm), or leave the limit out"
            )


def _only(names: Sequence[str]) -> str | None:
    return names[0] if len(names) == 1 else None


def _kind(name: str, settings: Any) -> str:
    if settings is None:
        return name if name in ("start", "plain") else "defended"
    if settings.get("of") or settings.get("repair"):
        return "defended"
    if not settings.get("train"):
        return "start"
    plain = [*settings["train"]] in (["sft"], [{"sft": None}], [{"sft": {}}])
    return "plain" if plain and not settings.get("cut") and not settings.get("columns") else "defended"
