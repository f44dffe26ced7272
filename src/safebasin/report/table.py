"""A run folder to a Report, and the Report to its files and to the terminal."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import rich.table
from rich.text import Text

from safebasin.console import printable
from safebasin.data.files import write_json
from safebasin.data.json_rows import BadRow
from safebasin.errors import UserError
from safebasin.report import words
from safebasin.report.compare import (
    agreement_of,
    categories_of,
    comparisons_of,
    counted_again,
    hits_of,
    readings_of,
)
from safebasin.report.files import RunFile, answers_of, load, load_run, safe_name
from safebasin.report.findings import INCONCLUSIVE
from safebasin.report.gate import judge_gate
from safebasin.report.limits import Gate, parse_gate
from safebasin.report.manifest import Manifest, evidence_digest, evidence_problems, read_manifest
from safebasin.report.rates import QUANTITIES
from safebasin.report.report import SCHEMA, Problem, Report, Verdict
from safebasin.report.roles import check_limits, roles_of
from safebasin.report.rows import cuts_of, heat_of, mixed_of, repairs_of, samples_of, training_of


def write_report(run: Path, *, show_text: bool = False, gate: Gate | None = None) -> Report:
    """Write ``report.json``, ``report.md`` and ``report.html`` of a run folder, and its adapters' cards.

    Raises:
        UserError: the folder is not a run folder, or a file of it is broken.
    """
    from safebasin.report import card, page  # they load the libraries for figures and cards, which take a second

    report = collect(run, show_text=show_text, gate=gate)
    page.write(run, "report", page.facts(report))
    write_json(run / "report.json", dataclasses.asdict(report))
    card.write(run, report)
    return report


def collect(
    run: Path, *, show_text: bool = False, gate: Gate | None = None, part: Callable[[str], bool] | None = None
) -> Report:
    """Read a run folder.

    Args:
        gate: the limits; None: those of the run's ``run.yaml``, or the default ones.
        show_text: prompts, answers and rows in clear; without it they are redacted.
        part: which prompts count, by their ids; None: all of them.

    Raises:
        UserError: no run folder, no arm in it, a file that is damaged, or a gate that is refused.
    """
    if not run.is_dir():
        raise UserError(f"no such run folder: {run}")
    config = load_run(run / "run.yaml")
    settings = _arms(run, config)
    written = {} if gate else config.get("gate") or {}
    gate = gate or parse_gate(written, list(settings))
    start, plain, judged, _ = roles = roles_of(settings, gate)
    check_limits(written, roles)
    gate = dataclasses.replace(gate, plain=plain or gate.plain)
    arms = tuple(sorted(settings, key=lambda arm: arm != start))  # the model as it was, then as in the recipe
    manifest = read_manifest(run)
    doubts = evidence_problems(run, manifest)
    problems = [Problem(place="evidence", reason=reason) for reason in doubts]
    problems += _bad_rows(run)
    readings = tuple(reading for arm in arms for reading in readings_of(run, arm, problems))
    answers = answers_of(run, arms, problems)
    keys = list(
        dict.fromkeys(
            r.key for r in readings if {r.quantity, r.suite} & {*QUANTITIES, *gate.losses} and r.unit != "kappa"
        )
    )
    attacks = [key for key in keys if key.quantity == "asr"]
    hits = hits_of(keys, answers)
    if part is not None:
        hits = {key: {prompt: hit for prompt, hit in by.items() if part(prompt)} for key, by in hits.items()}
        readings = tuple(counted_again(readings, hits))
    by_key = {(reading.arm, reading.key): reading for reading in readings}
    pairs = dict.fromkeys([(judged, gate.plain), (judged, start), *((arm, start) for arm in arms)])
    report = Report(
        schema=SCHEMA,
        run=safe_name(run.resolve().name),
        redacted=not show_text,
        verdict=Verdict(code=4, status=INCONCLUSIVE, reasons=()),
        gate=gate,
        evidence_digest=evidence_digest(manifest),
        evidence_problems=doubts,
        arms=arms,
        start=start,
        judged=judged,
        readings=readings,
        comparisons=tuple(
            comparison
            for arm, against in pairs
            if arm is not None and against is not None and arm != against
            for comparison in comparisons_of(arm, against, keys, hits, by_key, gate)
        ),
        agreement=tuple(agreement_of(attacks, arms, hits)),
        categories=tuple(categories_of(attacks, arms, answers, hits)),
        cuts=tuple(cuts_of(run, arms, show_text)),
        heat=tuple(heat_of(run, show_text)),
        training=tuple(training_of(run, arms)),
        about=tuple(_about(config, manifest)),
        repairs=tuple(repairs_of(run, arms)),
        mixed=tuple(mixed_of(run, arms)),
        samples=tuple(samples_of(attacks, answers, judged, show_text)),
        problems=tuple(problems),
        manifest=dict(_facts(manifest)),
    )
    return dataclasses.replace(report, verdict=judge_gate(report, gate))


def _bad_rows(run: Path) -> list[Problem]:
    """Rows that steps left out or cut short, each once."""
    files = [run / "data" / "problems.json", run / "scan" / "problems.json", *sorted(run.glob("arms/*/problems.json"))]
    rows = dict.fromkeys(row for file in files for row in load(file, list[BadRow], []))
    return [Problem(place=f"line {row.line}", reason=printable(row.reason)) for row in rows]


def _arms(run: Path, config: RunFile) -> dict[str, Any]:
    """The arms of the configuration in its order, then other folders of arms; their settings, None where unknown."""
    folders = [path.name for path in (run / "arms").glob("*") if path.is_dir()]
    folders.sort(key=lambda name: (name != "start", name != "plain", name))
    listed = config.get("arms") or ()
    settings = {name: each or {} for name, each in listed.items()} if isinstance(listed, Mapping) else {}
    arms = {name: settings.get(name) for name in (*listed, *folders)}
    if not arms:
        raise UserError(f"{run} holds no arm to report on (no folder {run / 'arms'}); run it first: safebasin run")
    for arm in arms:
        if arm in ("", ".", "..") or "/" in arm or "\\" in arm or printable(arm, 100) != arm:
            raise UserError(
                f"{run}: an arm's name is a plain folder name of at most 100 characters, found {printable(arm)!r}"
            )
    return arms


def _about(config: RunFile, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Model, rows and day of a run, as far as its files name them."""
    model, revision, data = manifest.get("model"), manifest.get("revision"), config.get("data") or {}
    if isinstance(model, str):
        yield "model", printable(model + (f" at {revision}" if isinstance(revision, str) else ""), 120)
    task, share, attack = data.get("task"), data.get("poison_share"), data.get("attack")
    if isinstance(task, Mapping) and isinstance(path := task.get("path"), str):
        name = str(next(iter(attack), "") if isinstance(attack, Mapping) else attack)
        mixed_in = isinstance(share, float) and 0 < share < 1
        yield "rows", printable(path, 120) + (f", {share:.0%} of {printable(name, 40)} mixed in" if mixed_in else "")
    if isinstance(date := manifest.get("date"), str):
        yield "date", printable(date, 20)


def _facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """The manifest without the steps' inputs and outputs, flat: names to texts."""
    for name, value in manifest.items():
        facts: Mapping[str, Any]
        if name == "steps":
            facts = {f"{step}.{key}": entry.get(key) for step, entry in value.items() for key in ("seconds", "digest")}
        else:
            facts = value if isinstance(value, Mapping) else {"": value}
        for key, fact in facts.items():
            text = str(fact) if isinstance(fact, str | int | float) else "–"
            yield safe_name(f"{name}.{key}".rstrip(".")), printable(text, 120)


def terminal_table(report: Report) -> rich.table.Table:
    """The arms side by side, the verdict below. Names are Text: markup in them is not interpreted."""
    table = rich.table.Table("measured", title=Text(f"safebasin: {report.run}"), caption_justify="left")
    table.caption = Text("\n".join([report.verdict.status.upper(), *report.verdict.reasons]))
    for arm in report.arms:
        table.add_column(Text(arm), justify="right")
    for key in report.keys:
        about = key.judge if key.suite == key.quantity else key.name
        row = ["\n".join(filter(None, (QUANTITIES.get(key.quantity, key.quantity), about)))]
        for reading in (report.at(arm, key) for arm in report.arms):
            counted = reading and ", ".join(filter(None, (words.interval(reading), words.counted(reading, "\n"))))
            row.append(f"{words.value(reading)}\n{counted}" if reading else "–")
        table.add_row(*map(Text, row))
    return table
