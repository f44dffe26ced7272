"""The gate: from a report to a verdict. What could not be measured never passes, and never fails the model either."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safebasin.console import printable
from safebasin.errors import UserError
from safebasin.report import HARMFUL, SCHEMA, Gate, Report, Verdict
from safebasin.report.findings import FAIL, INCONCLUSIVE, PASS, findings_of
from safebasin.report.manifest import evidence_digest, evidence_problems, load_json, read_manifest

CODES = {FAIL: 3, INCONCLUSIVE: 4, PASS: 0}  # the worst first; 1 and 2 are user errors and run-time errors


def parse_gate(settings: Mapping[str, Any], arms: Sequence[str] | None = None) -> Gate:
    """The gate of a configuration. ``arms``: the names of the run's arms, or None where they are not given.

    Raises:
        UserError: an unknown key, a value of the wrong kind or outside its bounds, an arm that the run does not have.
    """
    kinds = typing.get_type_hints(Gate)
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in kinds:
            raise UserError(f"gate: unknown key {printable(str(key), 60)!r}; the keys are {', '.join(kinds)}")
        optional = type(None) in typing.get_args(kinds[key])
        values[key] = None if value is None and optional else _value(key, value)
        if key in ("arm", "plain") and arms is not None and values[key] not in (None, *arms):
            raise UserError(f"gate.{key}: the run has no arm {printable(value, 60)!r}; it has: {', '.join(arms)}")
    if values.get("arm") is not None and values["arm"] == values.get("plain"):
        raise UserError(f"gate.arm and gate.plain are one arm, {values['arm']!r}: it would be compared with itself")
    if values.get("max_loss") and "max_accuracy_loss" not in values:
        values["max_accuracy_loss"] = None
    return Gate(**values)


def _value(key: str, value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key == "max_loss":
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value) or {*HARMFUL} & {*value}:
            raise UserError("gate.max_loss: {QUANTITY OR SUITE: LIMIT} is needed, of the task: {token_accuracy: 0.05}")
        return {name: _value(f"max_loss.{printable(name, 60)}", limit) for name, limit in value.items()}
    if key in ("arm", "plain"):
        valid, needed = isinstance(value, str), "the name of an arm"
    elif key == "decide":
        valid, needed = value in ("bound", "point"), "bound or point"
    elif key == "min_n":
        valid, needed = number and isinstance(value, int) and value >= 1, "a whole number of 1 or more"
    else:
        valid, needed = number and 0 <= value <= 1, "a share, a number from 0 to 1,"  # NaN is not in it
        value = float(value) if valid else value
    if not valid:
        shown = printable(repr(value), 60) if isinstance(value, str | int | float | None) else type(value).__name__
        hint = f"; for {value:g} % write {value / 100:g}" if number and 1 < value <= 100 and key != "min_n" else ""
        raise UserError(f"gate.{key}: {needed} is needed, found {shown}{hint}")
    return value


def judge_gate(report: Report, gate: Gate) -> Verdict:
    """Fail if a value crosses a limit; inconclusive if a bound does, or something decides nothing; else pass. The worst
    reasons come first.

    Inconclusive whatever the numbers say, if the run's files do not prove them.
    """
    findings = list(findings_of(report, gate, report.judged)) or [(INCONCLUSIVE, "the gate has no limit that applies")]
    findings.sort(key=lambda finding: list(CODES).index(finding[0]))
    status = INCONCLUSIVE if report.evidence_problems else findings[0][0]
    reasons = (*report.evidence_problems, *(reason for _, reason in findings))
    return Verdict(code=CODES[status], status=status, reasons=reasons)


def read_verdict(run: Path) -> Verdict:
    """The verdict that the run's report states; inconclusive if the report was made from other files.

    Raises:
        UserError: the run has no report, or its report or its manifest is damaged.
    """
    path = run / "report.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; make it with: safebasin report {run}")
    report = load_json(path)
    verdict = _stated(report)
    if verdict is None:
        raise UserError(f"{path} is not a report of this version of safebasin; make it again: safebasin report {run}")
    manifest = read_manifest(run)
    evidence = [evidence_digest(manifest), list(evidence_problems(run, manifest))]
    if [report["evidence_digest"], report["evidence_problems"]] == evidence:
        return verdict
    reason = f"the report was made from other files than the run holds now; make it again: safebasin report {run}"
    return Verdict(code=CODES[INCONCLUSIVE], status=INCONCLUSIVE, reasons=(reason,))


def _stated(report: Any) -> Verdict | None:
    """The verdict of a report as it was read from its file; None if that is no report."""
    fields = {field.name for field in dataclasses.fields(Report)}
    if not isinstance(report, dict) or not fields <= report.keys() or report["schema"] != SCHEMA:
        return None
    match report["verdict"]:
        case {"code": int(code), "status": str(status), "reasons": [*reasons]} if not isinstance(code, bool):
            agree = CODES.get(status) == code and reasons and all(isinstance(reason, str) for reason in reasons)
            return Verdict(code=code, status=status, reasons=tuple(map(printable, reasons))) if agree else None
    return None
