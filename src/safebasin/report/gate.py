"""The gate: from a report to a verdict. What could not be measured never passes, and never fails the model either."""

import dataclasses
from pathlib import Path
from typing import Any

from safebasin.console import printable
from safebasin.errors import UserError
from safebasin.report.findings import FAIL, INCONCLUSIVE, PASS, findings_of
from safebasin.report.limits import Gate
from safebasin.report.manifest import evidence_digest, evidence_problems, load_json, read_manifest
from safebasin.report.report import SCHEMA, Report, Verdict

CODES = {FAIL: 3, INCONCLUSIVE: 4, PASS: 0}  # the worst first; 1 and 2 are user errors and run-time errors


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
