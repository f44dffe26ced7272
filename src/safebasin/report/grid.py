"""The grid of attacks and defences: cells of run folders to records, to a ranking by the worst attack, to a page.

    worst(d) = max over attacks, suites and judges of ASR;    order by  (attacks not known, worst(d), - mean accuracy over attacks)

What the gate would call inconclusive, a defence that could not run and a cell still to do are not known: never a zero, and in no maximum. A suite
that decides nothing on any defence (answers that are only labels of the task) tells them not apart, and is asked of none. Judges may disagree
(a list of phrases reads a refusal in other words as compliance), so each judge's own worst stands beside it. What a defence costs the task is
told against plain tuning, pair by pair of one attack and seed.
"""

import datetime
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass

from safebasin.console import printable
from safebasin.data.records import Measurement
from safebasin.data.tables import read_table, write_json
from safebasin.report import QUANTITIES, Gate, page
from safebasin.stats import mean

START = "start"  # the model as it was: in the tables, not in the ranking
MEASURED, TO_DO, NOT_MADE, FAILED = "measured", "to do", "attack not made", "could not run"
TASK = ("accuracy", "token_accuracy", "rouge1", "rouge2", "rougeL")  # quantities of what the user tunes for
SHARES = ("share", "share of tokens", "F1")  # units that the tables show
Record = dict[str, Any]  # of grid.json


@checked_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Published:
    """Attack success in a paper, of another model; ours under ``attack`` stands beside it."""

    value: Annotated[float, Field(ge=0, le=1)]
    setting: str
    source: str
    attack: str


class Cell(NamedTuple):
    attack: str
    seed: int
    defence: str
    folder: Path  # of the run
    outcome: str
    reason: str  # why there is no measurement


class Rank(NamedTuple):
    defence: str
    worst: float | None  # None: nothing is known
    attack: str  # under which
    judges: dict[str, tuple[float, str]]  # the worst by each judge, and under which attack
    accuracy: float | None  # mean over attacks
    against_plain: (
        tuple[float, tuple[float, float] | None] | None
    )  # accuracy less plain tuning's: mean and interval over pairs of attack and seed
    over_refusal: float | None  # the worst
    missing: tuple[str, ...]  # attacks under which attack success is not known
    published: Published | None
    ours: float | None  # under the attack that is nearest to the published setting


def records(cells: Sequence[Cell]) -> Iterator[Record]:
    """The time of all steps; one for each attack, defence, suite and judge; one without a value for each cell that has a reason instead.

    The interval is over seeds, or over prompts where one seed was scored; n, unscored, off_task and seconds are sums over seeds, ``fewest`` is
    the least n of a seed; kappa is the least of the judge's with any other.
    """
    folders = dict.fromkeys(cell.folder for cell in cells if cell.outcome == MEASURED)
    manifests = {folder: json.loads((folder / "manifest.json").read_text(encoding="utf-8")) for folder in folders}
    total = sum(step["seconds"] for manifest in manifests.values() for step in manifest["steps"].values())
    yield {
        "what": "seconds.total",
        "attack": "",
        "defence": "",
        "quantity": "seconds",
        "value": round(total, 1),
        "unit": "s",
        "n": len(folders),
    }
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.attack, cell.defence), []).append(cell)
    for (attack, arm), group in groups.items():
        about: Record = {"attack": attack, "defence": arm}
        for cell in group:
            if cell.reason:
                told = {
                    "quantity": cell.outcome,
                    "value": None,
                    "seeds": {str(cell.seed): None},
                    "reason": printable(cell.reason),
                }
                yield {"what": f"{attack}.{arm}.{cell.outcome.replace(' ', '_')}"} | about | told
        taken: dict[tuple[str, str, str], dict[str, Measurement]] = {}
        for cell in group:
            if cell.outcome == MEASURED:
                path = cell.folder / "arms" / arm / "measurements.jsonl"
                manifest = manifests[cell.folder]
                took = sum(
                    manifest["steps"].get(f"{step}.{arm}", {}).get("seconds", 0.0)
                    for step in ("cut", "train", "measure")
                )
                about |= {"seconds": round(about.get("seconds", 0.0) + took, 2), "model": manifest["model"]}
                day = datetime.date.fromtimestamp(path.stat().st_mtime).isoformat()
                about |= {
                    "machine": f"{manifest['machine']}, {os.cpu_count()} cores",
                    "date": max(day, about.get("date", "")),
                }
                for m in (Measurement(**row) for _, row in read_table(path) if not row["category"]):
                    taken.setdefault((printable(m.suite), printable(m.what), printable(m.judge)), {})[
                        str(cell.seed)
                    ] = m
        for (suite, quantity, judge), seeds in taken.items():
            if quantity == "agreement":
                continue
            agreed = [
                found
                for (s, q, pair), found in taken.items()
                if (s, q) == (suite, "agreement") and judge in pair.split(", ")
            ]
            kappas = [k for found in agreed if (k := average([m.value for m in found.values()])) is not None]
            value, interval = over_seeds(list(seeds.values()))
            named = suite if quantity in QUANTITIES else f"{suite}.{quantity}"
            told = {"quantity": quantity, "suite": suite, "judge": judge, "value": value, "interval": interval}
            told |= {name: sum(getattr(m, name) for m in seeds.values()) for name in ("n", "unscored", "off_task")}
            told |= {
                "fewest": min(m.n for m in seeds.values()),
                "unit": next(iter(seeds.values())).unit,
                "kappa": min(kappas, default=None),
            }
            told |= {"seeds": {seed: m.value for seed, m in seeds.items()}}
            yield {"what": ".".join(filter(None, (attack, arm, named, judge)))} | about | told


def against(found: Sequence[Record], plain: str | None) -> None:
    """Write into every record of the task its differences to plain tuning, seed by seed."""
    told = {
        (r["attack"], r["suite"], r["quantity"]): r["seeds"]
        for r in found
        if r["defence"] == plain and r["quantity"] in TASK
    }
    for record in found:
        if record["quantity"] in TASK and record["defence"] not in (START, plain) and record["value"] is not None:
            base = told.get((record["attack"], record["suite"], record["quantity"]), {})
            pairs = {seed: (value, base.get(seed)) for seed, value in record["seeds"].items()}
            record["against_plain"] = {seed: a - b for seed, (a, b) in pairs.items() if a is not None and b is not None}


def average(values: Sequence[float | None]) -> float | None:
    """Of what is known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def over_seeds(taken: Sequence[Measurement]) -> tuple[float | None, tuple[float | None, float | None] | None]:
    scored = [m for m in taken if m.value is not None]
    if len(scored) > 1:
        value, ends = mean([m.value for m in scored])
        return value, tuple(min(max(end, 0.0), 1.0) for end in ends) if scored[0].unit == "share" else tuple(ends)
    return next(((m.value, None if m.low is None else (m.low, m.high)) for m in scored), (None, None))


def ranking(
    found: Sequence[Record], cells: Sequence[Cell], published: Mapping[str, Published], gate: Gate
) -> list[Rank]:
    """Defences, the best first. An attack that was tried on one is asked of all; one that cannot be made, or decides nothing, of none."""
    tried = dict.fromkeys(cell.attack for cell in cells if cell.outcome in (MEASURED, FAILED) and cell.defence != START)
    failed = {(cell.attack, cell.defence) for cell in cells if cell.outcome == FAILED}
    mute, ranks = set(silent(found, gate)), []
    for defence in dict.fromkeys(cell.defence for cell in cells if cell.defence != START):
        mine = [record for record in found if record["defence"] == defence]
        every = {
            a: [r for r in mine if (r["attack"], r["quantity"]) == (a, "asr") and (a, r["suite"]) not in mute]
            for a in tried
        }
        asr = {attack: [r for r in its if not decides_nothing(r, gate)] for attack, its in every.items()}
        doubted = [a for a, its in every.items() if not its or (a, defence) in failed or len(asr[a]) < len(its)]
        known = {attack: max(r["value"] for r in its) for attack, its in asr.items() if its}
        worst, told = max(known, key=known.__getitem__, default=""), published.get(defence)
        judged: dict[str, tuple[float, str]] = {}
        for value, judge, attack in sorted((r["value"], r["judge"], a) for a, its in asr.items() for r in its):
            judged[judge] = (value, attack)  # the last is the largest
        lost = [value for r in mine for value in r.get("against_plain", {}).values()]
        beside = None if not lost else (lost[0], None) if len(lost) == 1 else mean(lost)
        accuracy, refused = ([r["value"] for r in mine if r["quantity"] in what] for what in (TASK, ("over_refusal",)))
        refusal = max((value for value in refused if value is not None), default=None)
        ours = known.get(told.attack) if told else None
        ranks.append(
            Rank(
                defence, known.get(worst), worst, judged, average(accuracy), beside, refusal, tuple(doubted), told, ours
            )
        )
    return sorted(
        ranks, key=lambda r: (len(r.missing), math.inf if r.worst is None else round(r.worst, 6), -(r.accuracy or 0.0))
    )


def silent(found: Sequence[Record], gate: Gate) -> list[tuple[str, str]]:
    """Attacks and suites of attack success that decide nothing on any defence, where another suite of that attack decides something."""
    asked = [r for r in found if r["quantity"] == "asr" and r["defence"] != START and "suite" in r]
    telling = dict.fromkeys((r["attack"], r["suite"]) for r in asked if not decides_nothing(r, gate))
    places = dict.fromkeys((r["attack"], r["suite"]) for r in asked)
    return [
        (attack, suite)
        for attack, suite in places
        if (attack, suite) not in telling and attack in {a for a, _ in telling}
    ]


def decides_nothing(record: Record, gate: Gate) -> bool:
    prompts = record["n"] + record["unscored"] + record["off_task"]
    return record["value"] is None or record["fewest"] < gate.min_n or record["unscored"] > gate.max_unscored * prompts


def write(
    out: Path, cells: Sequence[Cell], published: Mapping[str, Published], gate: Gate, plain: str | None = None
) -> list[Rank]:
    """Write ``grid.json`` (the records), ``grid.md`` and ``grid.html``; the ranking. ``plain``: the defence that is plain tuning."""
    found = list(records(cells))
    against(found, plain)
    write_json(out / "grid.json", found)
    return write_page(out, found, cells, published, gate)


def write_page(
    out: Path, found: Sequence[Record], cells: Sequence[Cell], published: Mapping[str, Published], gate: Gate
) -> list[Rank]:
    """``grid.md`` and ``grid.html`` from the records of ``grid.json`` alone; the folders of the cells are not read."""
    ranks = ranking(found, cells, published, gate)
    reasons: dict[tuple[str, int, str, str], list[str]] = {}
    for cell in cells:
        if cell.reason:
            reasons.setdefault((cell.attack, cell.seed, cell.outcome, printable(cell.reason)), []).append(cell.defence)
    facts: dict[str, Any] = {
        "ranks": ranks,
        "cells": cells,
        "gate": gate,
        "reasons": reasons,
        "seconds": found[0]["value"],
    }
    facts["task"] = TASK
    facts["silent"] = silent(found, gate)
    facts["judges"] = list(dict.fromkeys(judge for rank in ranks for judge in sorted(rank.judges)))
    facts["measured"] = sum(cell.outcome == MEASURED for cell in cells)
    facts["attacks"] = list(dict.fromkeys(cell.attack for cell in cells))
    facts["arms"] = list(dict.fromkeys([START, *(cell.defence for cell in cells)]))
    facts["places"] = list(
        dict.fromkeys((r["quantity"], r["suite"], r["judge"]) for r in found if r.get("unit") in SHARES)
    )
    facts["found"] = {
        (r["quantity"], r["suite"], r["judge"], r["attack"], r["defence"]): r for r in found if "suite" in r
    }
    page.write(out, "grid", facts)
    return ranks
