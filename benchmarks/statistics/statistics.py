"""How often intervals hold the truth, and the intervals of stored results made again.

``coverage`` simulates runs: seed s answers prompt i with probability sigmoid(m + a_s + b_i + e_si), a, b, e normal with
the deviations that a record names. The truth is the mean over new seeds and new prompts. Prompts are ``shared`` by all
seeds, or drawn ``anew`` by each.

``intervals`` writes the interval of every stored share over three seeds or more again, in the place. Answers by prompt
were not stored with the results of 2026-11-21: there the shares by seed decide (``stats.two_level_counts``), as if all
seeds had the same prompts, which is the cautious reading.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter

from benchmarks.harness import ROOT, Bench, experiment
from safebasin.data.files import atomic_write
from safebasin.stats import Interval, mean, two_level, two_level_counts, two_level_difference, wilson

SPREADS = {"none": (0.0, 1.5, 0.0), "some": (0.3, 1.5, 0.5), "much": (0.7, 1.5, 0.5), "hard prompts": (0.3, 4.0, 0.5)}
Table = np.ndarray  # [seeds, prompts] of hits


def level(share: float, deviations: Sequence[float]) -> float:
    """m for which the mean is ``share``."""
    noise = np.random.default_rng(1).standard_normal((3, 40_000)).T @ np.array(deviations)
    low, high = -30.0, 30.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 / (1 + np.exp(-(middle + noise)))).mean() < share else (low, middle)
    return low


def draw(chance: np.random.Generator, m: float, deviations: Sequence[float], seeds: int, n: int, anew: bool) -> Table:
    a, b, e = deviations
    logits = m + a * chance.standard_normal((seeds, 1)) + b * chance.standard_normal((seeds if anew else 1, n))
    return chance.random((seeds, n)) < 1 / (1 + np.exp(-(logits + e * chance.standard_normal((seeds, n)))))


def by_prompt(table: Table, anew: bool) -> list[dict[Any, float]]:
    return [{(s if anew else 0, i): float(hit) for i, hit in enumerate(row)} for s, row in enumerate(table)]


def student(table: Table, _: bool) -> Interval:
    return mean(table.mean(1).tolist())[1]


def pooled(table: Table, _: bool) -> Interval:
    return wilson(int(table.sum()), table.size)


def hull(table: Table, anew: bool) -> Interval:
    return two_level(by_prompt(table, anew))[1]


def counts(table: Table, _: bool) -> Interval:
    return two_level_counts(table.mean(1).tolist(), table.shape[1])[1]


WAYS: dict[str, Callable[[Table, bool], Interval]] = {
    "student": student,
    "pooled": pooled,
    "two_level": hull,
    "two_level_counts": counts,
}


@experiment("coverage", results="statistics", replaces=("what",), quick={"draws": 4})
def coverage(*, bench: Bench, draws: Annotated[int, Parameter(help="runs a cell")] = 200, n: int = 90) -> None:
    """How often does a 95 % interval over seeds and prompts hold the truth?"""
    chance = np.random.default_rng(0)
    held: dict[tuple[str, str, float], list[bool]] = {}
    paired: list[bool] = []
    for seeds, (name, deviations), share in itertools.product((3, 5), SPREADS.items(), (0.02, 0.06, 0.3, 0.9)):
        m = level(share, deviations)
        for _, anew in itertools.product(range(draws), (False, True)):
            table = draw(chance, m, deviations, seeds, n, anew)
            for way, interval in WAYS.items():
                low, high = interval(table, anew)
                held.setdefault((way, name, share), []).append(low <= share <= high)
            other = draw(chance, m, deviations, seeds, n, anew)
            difference = [
                {key: row[key] - they[key] for key in row}
                for row, they in zip(by_prompt(table, anew), by_prompt(other, anew), strict=True)
            ]
            low, high = two_level_difference(difference)[1]
            paired.append(low <= 0 <= high)
    for (way, name, share), hits in held.items():
        what = f"coverage.{way}.{name.replace(' ', '_')}.{share:g}"
        bench.record(what, sum(hits) / len(hits), wilson(sum(hits), len(hits)), n=len(hits), unit="share")
    for way in WAYS:
        cells = [sum(hits) / len(hits) for (each, *_), hits in held.items() if each == way]
        bench.record(f"coverage.{way}.worst", min(cells), n=len(cells), unit="share, of cells")
        bench.record(f"coverage.{way}.mean", sum(cells) / len(cells), n=len(cells), unit="share, of cells")
    bench.record("coverage.difference", sum(paired) / len(paired), n=len(paired), unit="share")


@experiment("intervals", results="statistics", replaces=("what",), quick={"write": False})
def intervals(*, bench: Bench, write: Annotated[bool, Parameter(help="change the files")] = True) -> None:
    """The intervals of the stored results over seeds, made again by the two-level method."""
    for name in ("quickstart", "methods"):
        file = ROOT / "benchmarks" / name / "results.json"
        text = file.read_text(encoding="utf-8")
        rows, changed = json.loads(text), 0
        for row in rows:
            shares = [value for value in (row.get("seeds") or {}).values() if value is not None]
            if row.get("unit") in ("share", "share of tokens", "F1") and len(shares) > 2 and row["n"]:
                row["interval"] = [*two_level_counts(shares, row.get("fewest", row["n"]))[1]]
                row["interval_of"], changed = "seeds and prompts, from the shares by seed", changed + 1
        if write:
            first = text.splitlines()[1]
            with atomic_write(file) as part:
                indent = len(first) - len(first.lstrip())
                part.write_text(json.dumps(rows, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
        bench.record(f"intervals.{name}", changed, n=len(rows), unit="records")
