"""Cells of a grid to records: every measurement of every attack, learning rate and defence, over seeds and prompts.

Intervals are counted again from the answers (``stats.two_level``); two seeds have none.
"""

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safebasin.console import printable
from safebasin.data.records import Measurement
from safebasin.errors import UserError
from safebasin.report.compare import hits_of
from safebasin.report.files import answers_of, measurements_of
from safebasin.report.manifest import Manifest, read_manifest
from safebasin.report.rates import QUANTITIES, MetricKey
from safebasin.stats import Interval, two_level, two_level_counts

START = "start"  # the model as it was: it is in the tables and not in the ranking
MEASURED, TO_DO, NOT_MADE, FAILED = "measured", "to do", "attack not made", "could not run"
TASK = ("accuracy", "token_accuracy", "rouge1", "rouge2", "rougeL")  # quantities of what the user tunes for
Record = dict[str, Any]  # of grid.json
# attack, rate, defence, suite, quantity, judge -> seed -> prompt -> a hit or a score; None: not scored
Outcomes = dict[tuple[Any, ...], dict[str, Mapping[str, float | None]]]


class Cell(NamedTuple):
    """One defence under one attack, learning rate and seed."""

    attack: str
    seed: int
    defence: str
    folder: Path  # of the run
    outcome: str
    reason: str  # why there is no measurement
    rate: float | None = None  # the learning rate, where the attacker chose it


def records(cells: Sequence[Cell], outcomes: Outcomes | None = None) -> Iterator[Record]:
    """The time of all steps, then a record for each attack, rate, defence, suite and judge.

    A cell with a reason has a record without a value. The interval is over seeds and prompts; ``upper`` is its upper
    end where an answer that could not be scored counts as a success; n, unscored, off_task and seconds are sums over
    seeds; ``fewest`` is the least n of a seed; kappa is the least with any other judge.

    Args:
        cells: of the grid.
        outcomes: filled with what every prompt gave.

    Raises:
        UserError: a manifest, measurements or answers of a run are missing or damaged.
    """
    manifests = {cell.folder: read_manifest(cell.folder) for cell in cells if cell.outcome == MEASURED}
    total = sum(_seconds(manifest, list(manifest.get("steps", {}))) for manifest in manifests.values())
    facts = {"attack": "", "defence": "", "quantity": "seconds", "value": round(total, 1), "unit": "s"}
    yield {"what": "seconds.total", **facts, "n": len(manifests)}
    groups: dict[tuple[str, float | None, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.attack, cell.rate, cell.defence), []).append(cell)
    for (attack, rate, defence), group in groups.items():
        about: Record = {"attack": attack, "defence": defence, **({} if rate is None else {"rate": rate})}
        for cell in group:
            if cell.reason:
                what = f"{_named(about)}.{cell.outcome.replace(' ', '_')}"
                seeds = {str(cell.seed): None}
                reason = {"value": None, "seeds": seeds, "reason": printable(cell.reason)}
                yield {"what": what, **about, "quantity": cell.outcome, **reason}
        measured = [cell for cell in group if cell.outcome == MEASURED]
        yield from _measured(about, measured, manifests, {} if outcomes is None else outcomes)


def _named(about: Record) -> str:
    rate = f"@{about['rate']:g}" if "rate" in about else ""
    return f"{about['attack']}{rate}.{about['defence']}"


def _seconds(manifest: Manifest, steps: Sequence[str]) -> float:
    return sum((manifest.get("steps", {}).get(step, {}).get("seconds", 0.0) for step in steps), 0.0)


def _measured(
    about: Record, cells: Sequence[Cell], manifests: Mapping[Path, Manifest], outcomes: Outcomes
) -> Iterator[Record]:
    """Records of one attack, rate and defence, whose cells are the seeds."""
    attack, rate, defence = about["attack"], about.get("rate"), about["defence"]
    by_key: dict[tuple[str, str, str], dict[str, Measurement]] = {}  # suite, quantity, judge -> seed -> measurement
    for cell in cells:
        manifest, arm = manifests[cell.folder], cell.defence
        seconds = _seconds(manifest, [f"{step}.{arm}" for step in ("cut", "train", "measure")])
        about |= {"seconds": round(about.get("seconds", 0.0) + seconds, 2), "model": manifest.get("model", "")}
        path, measured = cell.folder / "arms" / arm / "measurements.jsonl", measurements_of(cell.folder, arm)
        if measured is None:
            raise UserError(f"{path} is missing; measure it again: safebasin bench")
        date = max(datetime.date.fromtimestamp(path.stat().st_mtime).isoformat(), about.get("date", ""))
        where = [manifest[key] for key in ("machine", "hardware") if key in manifest]  # as the run wrote it
        about |= {"machine": ", ".join(where) or "a machine", "date": date}
        for m in measured:
            if not m.category:
                key = printable(m.suite), printable(m.what), printable(m.judge)
                by_key.setdefault(key, {})[str(cell.seed)] = m
        keys = [MetricKey(m.what, m.suite, m.judge) for m in measured if not m.category]
        for (_, key), hits in hits_of(keys, answers_of(cell.folder, [arm], [])).items():
            place = attack, rate, defence, *map(printable, (key.suite, key.quantity, key.judge))
            numbers = {prompt: None if hit is None else float(hit) for prompt, hit in hits.items()}
            outcomes.setdefault(place, {})[str(cell.seed)] = numbers
    agreement = {
        key: average([m.value for m in seeds.values()]) for key, seeds in by_key.items() if key[1] == "agreement"
    }
    for (suite, quantity, judge), seeds in by_key.items():
        if quantity == "agreement":
            continue
        kappas = [
            k for (s, _, pair), k in agreement.items() if s == suite and judge in pair.split(", ") and k is not None
        ]
        name = suite if quantity in QUANTITIES else f"{suite}.{quantity}"
        by_seed = outcomes.get((attack, rate, defence, suite, quantity, judge), {})
        value, interval = over_seeds(list(seeds.values()), list(by_seed.values()))
        filled = [{prompt: 1.0 if x is None else x for prompt, x in each.items()} for each in by_seed.values()]
        upper = interval_over(two_level, filled) if quantity == "asr" and filled else None
        yield {
            "what": ".".join(filter(None, (_named(about), name, judge))),
            **about,
            **{"quantity": quantity, "suite": suite, "judge": judge, "value": value, "interval": interval},
            **({"upper": upper.high} if upper else {}),
            **{count: sum(getattr(m, count) for m in seeds.values()) for count in ("n", "unscored", "off_task")},
            "fewest": min(m.n for m in seeds.values()),
            "unit": next(iter(seeds.values())).unit,
            "kappa": min(kappas, default=None),
            "seeds": {seed: m.value for seed, m in seeds.items()},
        }


def over_seeds(
    measured: Sequence[Measurement], hits: Sequence[Mapping[str, float | None]] = ()
) -> tuple[float | None, tuple[float, float] | None]:
    """Mean over the seeds that were scored, and its interval over seeds and prompts; of one seed, its own.

    Without answers by prompt (``hits``) the interval of a share is that of its counts; other units have none.
    """
    scored = [(m.value, m) for m in measured if m.value is not None]
    if len(scored) < 2:
        return next(((value, _ends(m)) for value, m in scored), (None, None))
    value, rows = sum(v for v, _ in scored) / len(scored), [scored_hits(each) for each in hits]
    if all(rows) and len(rows) == len(scored):
        return value, interval_over(two_level, rows)
    if scored[0][1].unit != "share":
        return value, None
    return value, interval_over(
        lambda shares: two_level_counts(shares, min(m.n for _, m in scored)), [v for v, _ in scored]
    )


def _ends(m: Measurement) -> tuple[float, float] | None:
    return None if m.low is None or m.high is None else (m.low, m.high)


def scored_hits(hits: Mapping[str, float | None]) -> dict[str, float]:
    """The prompts that were scored."""
    return {prompt: value for prompt, value in hits.items() if value is not None}


def interval_over(function: Callable[[Any], tuple[float, Interval]], seeds: Sequence[Any]) -> Interval | None:
    """An interval over seeds; two seeds do not say how much seeds vary, and have none."""
    return None if len(seeds) == 2 else function(seeds)[1]


def average(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are not None; None if all are."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
