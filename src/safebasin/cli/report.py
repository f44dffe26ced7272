"""Verbs on a finished run, from its files alone: report, gate. No torch."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from safebasin.cli.options import ShowText, out, say


def gate_verb(run: Annotated[Path, Parameter(name="RUN", help="Run folder.")]) -> int:
    """Turn the report of a run into an exit code: 0 passed, 3 failed, 4 inconclusive.

    The report must be of the files that the run holds now; where it is not, the code is 4.
    """
    from safebasin.report.gate import read_verdict

    verdict = read_verdict(run)
    say(f"{verdict.status}: {'; '.join(verdict.reasons) or 'every limit is kept'}")
    return verdict.code


def report_verb(
    run: Annotated[Path, Parameter(name="RUN", help="Run folder.")],
    *,
    show_text: ShowText = False,
    inspect: Annotated[
        Path | None, Parameter(help="Folder for eval logs of Inspect; needs the extra 'inspect'.")
    ] = None,
) -> int:
    """Write report.json, report.md, report.html and the adapters' cards of a run folder again, from its files alone."""
    from safebasin.report.table import terminal_table, write_report

    report = write_report(run, show_text=show_text)
    out.print(terminal_table(report))
    if inspect:
        from safebasin.report.inspect import write_eval_logs

        say(f"eval logs: {len(write_eval_logs(run, report, inspect))} in {inspect}")
    return 0
