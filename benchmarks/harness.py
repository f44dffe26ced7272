"""The harness of all benchmarks: options, timing side by side, intervals, records, and finished parts that are cached.

    @experiment("landscape", quick={"take": 4}, goals={"seconds.total": "<= 720"})
    def landscape(*, bench: Bench, take: Annotated[int, Parameter(help="prompts")] = 32) -> None:
        '''One line for ``--list``.'''
        answers = bench.once("answers", {"take": take}, lambda: slow(take))
        bench.record("asr", 0.5, interval=[0.4, 0.6], n=take, unit="share")

The keyword parameters of an experiment are its command line. A record is written to ``benchmarks/NAME/results.json`` as
soon as it is there, so a killed run leaves what it has measured.
"""

import dataclasses
import datetime
import hashlib
import importlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import cyclopts
import numpy as np
import torch
from cyclopts import Parameter
from scipy import stats
from transformers.utils import logging

from safebasin.data.files import write_json
from safebasin.errors import UserError
from safebasin.runtime import keep_memory
from safebasin.stats import mean

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "benchmarks"
FIELDS = ("what", "value", "interval", "n", "goal", "unit", "machine", "date")  # of every record
PUBLIC = {  # public sets by the names that recipes use, as files under --data FOLDER
    "fancyzhx/ag_news:train": "ag_news/train.csv.gz",
    "fancyzhx/ag_news:test": "ag_news/test.csv",
    "walledai/AdvBench:train": "advbench/harmful_behaviors.csv",
    "tatsu-lab/alpaca:train": "alpaca/alpaca_5k.jsonl.gz",
}
app = cyclopts.App(
    name="python -m benchmarks",
    help="Measurements of safebasin. Each writes its records to benchmarks/NAME/results.json.",
    help_format="plaintext",
    default_parameter=Parameter(parse=re.compile("^(?!bench$)"), consume_multiple=True, negative=""),
    version_flags=(),
)
Record = dict[str, Any]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A measurement by name.

    ``results``: the folder of ``benchmarks/`` whose results.json it writes. ``replaces``: fields by which a record
    takes the place of an earlier one in that file; without any, the file is written anew. ``quick``: options of
    ``--quick``, where the command line says nothing. ``goals``: the goal of a record by its ``what``.
    """

    function: Callable[..., None]
    results: str
    replaces: tuple[str, ...]
    quick: Mapping[str, Any]
    goals: Mapping[str, str]


EXPERIMENTS: dict[str, Experiment] = {}


def experiment(
    name: str,
    *,
    results: str = "",
    replaces: Sequence[str] = (),
    quick: Mapping[str, Any] | None = None,
    goals: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declare an experiment: a function of keyword parameters, one of them ``bench: Bench``. See ``Experiment``."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        EXPERIMENTS[name] = Experiment(function, results or name, tuple(replaces), quick or {}, goals or {})
        app.command(function, name=name)
        return function

    return register


class Bench:
    """What an experiment is given: ``record`` for its numbers, ``once`` for slow parts, ``keep`` for its other files.

    ``facts`` stand in every record; an experiment may add its own.
    """

    def __init__(self, file: Path, keep: Path, *, replaces: Sequence[str] = (), goals: Mapping[str, str] | None = None):
        self.file, self.keep, self.replaces, self.goals = file, keep, tuple(replaces), goals or {}
        self.records: list[Record] = []  # of this run
        self.facts: Record = machine()
        self._before = read_results(file) if replaces else []

    def record(
        self, what: str, value: float | None, interval: Sequence[float] | None = None, *, n: int, unit: str, **more: Any
    ) -> Record:
        """Write a record and print it; ``value`` is None where nothing could be scored. Numbers have six digits."""
        ends = None if interval is None else [_digits(end) for end in interval]
        row = {
            "what": what,
            "value": _digits(value),
            "interval": ends,
            "n": n,
            "goal": self.goals.get(what),
            "unit": unit,
        }
        row |= more | {name: fact for name, fact in self.facts.items() if name not in more}
        self.add([row])
        return row

    def add(self, rows: Sequence[Record]) -> None:
        """Write and print records that are complete."""
        identities = {self._identity(row) for row in rows}
        self.records = [old for old in self.records if self._identity(old) not in identities] + list(rows)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, self.rows())
        print(*map(line, rows), sep="\n", flush=True)

    def rows(self) -> list[Record]:
        """Records of the file: of this run, and of earlier runs where none of this run takes their place."""
        identities = {self._identity(row) for row in self.records}
        return [row for row in self._before if self._identity(row) not in identities] + self.records

    def _identity(self, row: Record) -> tuple[Any, ...]:
        return tuple(row.get(field) for field in self.replaces or ("what",))

    def timing(self, what: str, values: Sequence[float], *, unit: str = "x", **more: Any) -> Record:
        """A record of the median of ``values``."""
        value, interval = median(values)
        return self.record(what, value, interval, n=len(values), unit=unit, **more)

    def over_seeds(self, what: str, values: Sequence[float], *, unit: str, **more: Any) -> Record:
        """A record of the mean of one value a seed, with Student's interval; that of a share lies within [0, 1]."""
        value, interval = mean(values)
        if unit == "share":
            interval = (max(interval[0], 0.0), min(interval[1], 1.0))
        return self.record(what, value, interval, **{"n": len(values), "unit": unit} | more)

    def once(self, name: str, inputs: Any, work: Callable[[], T]) -> T:
        """The outcome of ``work`` (JSON); read from the folder ``keep`` if it is there for equal ``inputs``."""
        key = hashlib.blake2b(json.dumps(inputs, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()
        file = self.keep / f"{name}-{key}.json"
        if not file.is_file():
            outcome = work()
            self.keep.mkdir(parents=True, exist_ok=True)
            write_json(file, outcome)
        return json.loads(file.read_text(encoding="utf-8"))


def _digits(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.6g}")


def line(row: Record) -> str:
    """A record as it is printed; behind a floor stands how far the value is above it."""
    value = "not scored" if row["value"] is None else f"{row['value']:.4g}"
    ends = "" if row["interval"] is None else "[{:.4g}, {:.4g}]".format(*row["interval"])
    goal = row["goal"] or ""
    if goal.startswith("floor ") and row["value"] is not None:
        goal += f" ({row['value'] / float(goal.split()[1]) - 1:+.0%})"
    return f"{row['what']:44} {value:>10} {ends:20} n {row['n']:<6} {goal:24} {row['unit']}".rstrip()


def read_results(file: Path) -> list[Record]:
    """Records of a file, each with all ``FIELDS``: early ones lack some. No file, no records."""
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return [dict.fromkeys(FIELDS) | row for row in rows]


def machine() -> Record:
    """The machine, the threads, the version of torch and the day."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    processor = (names or [platform.processor() or "processor unknown"])[0]
    text = f"{platform.machine()}, {processor}, {os.cpu_count()} cores, {device}"
    today = datetime.date.today().isoformat()
    return {"machine": text, "threads": torch.get_num_threads(), "torch": torch.__version__, "date": today}


def seconds(work: Callable[[], Any]) -> float:
    """Seconds that ``work`` takes, to its end on the device."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(ways: Mapping[str, Callable[[], float]], repeats: int, *, warm_up: int = 1) -> dict[str, list[float]]:
    """What each way returns (``seconds`` of its work), ``repeats`` times after ``warm_up`` rounds that do not count.

    The ways run one after another in every round, and every second round in reverse: what slows the machine down for a
    while slows all.
    """
    values: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warm_up + repeats):
        for name in sorted(ways, reverse=turn % 2 == 1):
            values[name].append(ways[name]())
    return {name: column[warm_up:] for name, column in values.items()}


def ratios(values: Mapping[str, Sequence[float]], way: str, base: str) -> list[float]:
    """``way`` over ``base``, round by round."""
    return [mine / other for mine, other in zip(values[way], values[base], strict=True)]


def median(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The median and its 95 % interval.

    From six values on the interval is of order statistics, whatever the distribution; else a percentile bootstrap.

    Raises:
        UserError: one value has no interval.
    """
    if len(values) < 2:
        raise UserError(f"an interval of a median needs two values or more, got {len(values)}")
    order, k = sorted(map(float, values)), int(stats.binom.ppf(0.025, len(values), 0.5))
    if k:
        return statistics.median(order), (order[k - 1], order[-k])
    return statistics.median(order), bootstrap(np.median, np.array(order))


def bootstrap(
    measure: Callable[..., Any], *samples: np.ndarray, paired: bool = False, times: int = 2000
) -> tuple[float, float]:
    """The 95 % percentile interval of ``measure`` over resampled samples; ``paired``: with the same indices in each."""
    chance, draws = np.random.default_rng(0), []
    for _ in range(times):
        picks = [chance.integers(0, len(sample), len(sample)) for sample in samples]
        draws.append(measure(*(sample[picks[0 if paired else i]] for i, sample in enumerate(samples))))
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def run_cli(*words: Any, codes: Sequence[int] = (0,)) -> int:
    """Run the command line in a process of its own; its exit code.

    Raises:
        UserError: it ends with another exit code than ``codes``.
    """
    command = [sys.executable, "-m", "safebasin", *map(str, words)]
    code = subprocess.run(command).returncode
    if code not in codes:
        raise UserError(f"exit code {code}: {' '.join(command)}")
    return code


def local_sets(data: Path | None, recipe: Path) -> list[str]:
    """The options ``--set NAME=FILE`` that put files of a folder in the place of the public sets of a recipe."""
    text = recipe.read_text(encoding="utf-8")
    files = {name: data / file for name, file in PUBLIC.items() if data is not None and name in text}
    return [word for name, file in files.items() for word in ("--set", f"{name}={file}")]


def load_experiments() -> None:
    """Import every module that may declare one."""
    for file in sorted(Path(__file__).parent.glob("*/*.py")):
        importlib.import_module(f"benchmarks.{file.parent.name}.{file.stem}")


@app.meta.default
def launch(
    *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    quick: Annotated[bool, Parameter(help="Tiny settings: does it work at all? Records go to --keep.")] = False,
    out: Annotated[Path | None, Parameter(help="File of the records; default benchmarks/NAME/results.json.")] = None,
    keep: Annotated[
        Path | None,
        Parameter(help="Folder of finished parts, from which a killed run goes on; default runs/benchmarks/NAME."),
    ] = None,
    list_: Annotated[bool, Parameter(name="--list", help="Names and questions of all experiments.")] = False,
) -> None:
    """Run one experiment."""
    if list_ or not words:
        for name, entry in EXPERIMENTS.items():
            print(f"{name:12} {(entry.function.__doc__ or '').splitlines()[0]}")
        return
    function, bound, _ = app.parse_args(words)
    name, entry = next((name, entry) for name, entry in EXPERIMENTS.items() if entry.function is function)
    keep = keep or RUNS / (f"{name}-quick" if quick else name)
    history = Path(__file__).resolve().parent
    file = out or (keep if quick else history / entry.results) / "results.json"
    if quick and file.resolve().is_relative_to(history):
        raise UserError(f"{file} holds measured numbers; --quick does not write there")
    bench = Bench(file, keep, replaces=entry.replaces, goals=entry.goals)
    function(bench=bench, **({name: value for name, value in entry.quick.items() if quick} | bound.arguments))


def main(words: Sequence[str] | None = None) -> None:
    """Parse a command line and run its experiment."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of loading weights
    keep_memory()
    load_experiments()
    app.meta(words, result_action="return_value")
