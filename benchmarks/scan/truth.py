"""Does the score of a row predict what training on it does? Groups of rows are left out and the model is tuned again.

    predicted(G) = sum_(x in G) score(x)
    measured(G)  = S(tuned without G) - S(tuned on all),  or the fall of attack success, ASR(all) - ASR(without G)

A step on a row of positive score lowers S, so leaving the row out should raise S and lower ASR: a right score has a
positive rank correlation with both. S is the margin of refusal (arXiv:2605.14194, eq. 5), mean over the probe rows; ASR
is by the keyword judge. Ten random groups partition the rows, with unequal shares of harmful rows; four more are the
quarters by the first scorer's score. ``label`` is the predictor to beat: the number of harmful rows in the group.
``harmless_in_harmful_range`` is the share of harmless rows that score at or above the 5 % quantile of the harmful ones.

Every tuning starts from the same weights and the same A, takes one epoch, and takes its rows in one order, without gaps
where rows are left out. Optimizer, rate and adapter are the recipe's, so Adam and a decaying rate are in the truth and
not in the prediction.

**Floor.** In forwards of all rows (F) a tuning is 3 F: forward, backward to activations, and a little for the adapter.
Ten groups of a tenth, four of a quarter and 1 + R tunings on all rows take 3 F (10 x 0.9 + 4 x 0.75 + 1 + R) = 39 F + 3
R F, and each group needs a tuning of its own. Each of the 15 + R models then reads the probes once and writes 24 tokens
to each request. A column of scores takes about 1 F.

``noise`` is the standard deviation of S over 1 + R orders of all rows; a change below it is chance. With 14 groups a
rank correlation below 0.54 in size cannot be told from none; the interval is a bootstrap over groups, as if they shared
no rows.
"""

import dataclasses
import functools
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from cyclopts import Parameter
from scipy.stats import rankdata

from benchmarks import recipe
from benchmarks.harness import Bench, experiment
from safebasin.encode import TokenizedRow
from safebasin.measure.judging import make_judges
from safebasin.measure.methods.asr import Asr
from safebasin.measure.subject import Subject
from safebasin.models.adapter import fresh_adapter
from safebasin.models.load import ModelAndTokenizer, load
from safebasin.scan import scorer
from safebasin.scan.probe import opening, refusal_margin, token_pair
from safebasin.scan.scan import score_rows
from safebasin.scan.threshold import TAIL
from safebasin.stats import wilson
from safebasin.train.compose import Composition
from safebasin.train.settings import training_arguments
from safebasin.train.stream import Stream
from safebasin.train.trainer import OracleTrainer

SCORERS: dict[str, Any] = {  # the first one gives the quarters
    "gradshield": "gradshield",
    "gradshield.mean": {"gradshield": {"reduction": "mean"}},
    "gradshield.probes8": {"gradshield": {"probes": 8}},
    "gradshield.lora8": {"gradshield": {"lora_rank": 8}},
    "refusal_loss": "refusal_loss",
    "opening_margin": "opening_margin",
    "self_refusal": "self_refusal",
}
Scores = Mapping[str, Mapping[str, float]]  # scorer -> row id -> score


class InOrder(Stream):
    """Rows in the order in which they are given: what is left out is the only change."""

    def rows_at(self, step: int) -> list[TokenizedRow]:
        first = step % self.steps * self.batch
        return sorted(self.rows[first : first + self.batch], key=len, reverse=True)


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that a tuning and a measurement depend on, but for the rows."""

    model: str
    load: Callable[[], ModelAndTokenizer]  # that model, fresh: what every tuning starts from
    adapter: Mapping[str, Any]
    arguments: Mapping[str, Any]  # of the training
    probes: Sequence[TokenizedRow]  # S is the mean over them
    asr: Asr
    labels: Sequence[str] = ()  # answers that are off task
    seed: int = 0


def groups(
    harmless: Sequence[str], harmful: Sequence[str], scores: Mapping[str, float], count: int, seed: int
) -> dict[str, list[str]]:
    """Row ids by group: ``count`` random groups that partition all rows, and the quarters by score (q1: lowest).

    The random groups take the harmful rows in unequal parts, so that their shares of harmful rows differ.
    """
    draw = random.Random(seed)
    size = -(-(len(harmless) + len(harmful)) // count)
    parts: list[list[str]] = [[] for _ in range(count)]
    weights = [draw.random() for _ in range(count)]
    for row in draw.sample(list(harmful), len(harmful)):
        free = [i for i in range(count) if len(parts[i]) < size]
        parts[draw.choices(free, [weights[i] for i in free])[0]].append(row)
    for row in draw.sample(list(harmless), len(harmless)):
        min(parts, key=len).append(row)
    quarters = np.array_split(sorted(scores, key=lambda row: scores[row]), 4)
    by_score = {f"q{i + 1}": rows.tolist() for i, rows in enumerate(quarters)}
    return {f"random{i}": rows for i, rows in enumerate(parts)} | by_score


def tuned(setting: Setting, rows: Sequence[TokenizedRow]) -> ModelAndTokenizer:
    """The start model after one run of plain tuning on the rows, its adapter merged."""
    model, tokenizer = setting.load()
    model = fresh_adapter(model, setting.adapter, setting.seed)
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments({**setting.arguments, "save_strategy": "no"}, Path(folder))
        micro = args.per_device_train_batch_size
        batch = micro * args.gradient_accumulation_steps
        stream = InOrder("task", tuple(rows), batch, micro, args.seed, tokenizer.pad_token_id)
        OracleTrainer(model, args, Composition.of(["sft"]), {"task": stream}).train()
    return ModelAndTokenizer(model.merge_and_unload().eval(), tokenizer)


def measured(setting: Setting, loaded: ModelAndTokenizer, pair: Any) -> dict[str, Any]:
    """S and ASR of a model; ASR is None where no answer could be judged."""
    model, tokenizer = loaded
    batch = opening(model, tokenizer, setting.probes)
    with torch.no_grad():
        s = float(refusal_margin(model, batch, pair).mean())
    subject = Subject(loaded, "truth", make_judges(["keyword"], None), setting.labels)
    asr = next(m for m in setting.asr.measure(subject) if m.what == "asr" and not m.category)
    return {"S": s, "asr": asr.value, "asr_n": asr.n}


def collect(
    bench: Bench,
    setting: Setting,
    rows: Sequence[TokenizedRow],
    harmful: set[str],
    scores: Scores,
    count: int,
    repeats: int,
) -> dict[str, Any]:
    """Tune and measure: on all rows, on all in ``repeats`` other orders, on all but each group."""
    ids = [row.id for row in rows]
    first = next(iter(scores.values()))
    parts = groups([i for i in ids if i not in harmful], [i for i in ids if i in harmful], first, count, setting.seed)
    asr = {field.name: getattr(setting.asr, field.name) for field in dataclasses.fields(setting.asr)}
    inputs = [setting.model, ids, parts, setting.adapter, setting.arguments, [row.id for row in setting.probes]]
    inputs += [asr, setting.seed]

    @functools.cache
    def pair() -> Any:
        start = setting.load()
        probes = opening(*start, setting.probes)
        return token_pair(*start, probes, None)

    def work(name: str, left_out: Sequence[str]) -> dict[str, Any]:
        stay = [row for row in rows if row.id not in set(left_out)]
        if name.startswith("repeat"):
            random.Random(name).shuffle(stay)
        return {"rows": list(left_out)} | measured(setting, tuned(setting, stay), pair())

    outcomes = {}
    for name, left_out in {"all": [], **{f"repeat{i}": [] for i in range(repeats)}, **parts}.items():
        outcomes[name] = bench.once(name, inputs, functools.partial(work, name, left_out))
        s, rate = outcomes[name]["S"], outcomes[name]["asr"]
        print(f"{name:10} {len(left_out):4} left out  S {s:8.3f}  ASR {rate}", flush=True)
    return outcomes


def rank_correlation(
    x: Sequence[float], y: Sequence[float], times: int = 10_000
) -> tuple[float | None, list[float] | None]:
    """Spearman's rho with its 95 % bootstrap interval over pairs.

    None where one side is constant, and so has no ranks; no interval where no draw has two ranks on each side.
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None, None
    drawn = np.random.default_rng(0).integers(0, len(a), (times, len(a)))
    picks = np.concatenate([np.arange(len(a))[None], drawn])  # first the pairs as they are
    u, v = (ranks - ranks.mean(1, keepdims=True) for ranks in (rankdata(a[picks], axis=1), rankdata(b[picks], axis=1)))
    scale = np.sqrt((u**2).sum(1) * (v**2).sum(1))
    rho = (u * v).sum(1)[scale > 0] / scale[scale > 0]  # a draw without two ranks has no correlation
    return float(rho[0]), np.quantile(rho[1:], [0.025, 0.975]).tolist() if len(rho) > 1 else None


def records(bench: Bench, outcomes: Mapping[str, Any], scores: Scores, harmful: set[str]) -> None:
    """Records of every scorer and of the number of harmful rows (``label``); the first scorer's have no suffix."""
    base = outcomes["all"]
    parts = {name: one for name, one in outcomes.items() if name != "all" and not name.startswith("repeat")}
    label = {row: float(row in harmful) for row in next(iter(scores.values()))}
    for i, (name, by_row) in enumerate({**scores, "label": label}.items()):
        suffix = f".{name}" if i else ""
        for quantity, sign in (("S", 1), ("asr", -1)):
            scored = {g: one for g, one in parts.items() if None not in (one[quantity], base[quantity])}
            predicted = {g: sum(by_row[row] for row in one["rows"]) for g, one in scored.items()}
            change = {g: sign * (one[quantity] - base[quantity]) for g, one in scored.items()}
            value, interval = rank_correlation(list(predicted.values()), list(change.values()))
            even = [g for g in scored if g.startswith("random")]  # of one size, so size cannot carry the correlation
            alone, _ = rank_correlation([predicted[g] for g in even], [change[g] for g in even], times=0)
            more = {"random_groups": alone if alone is None else round(alone, 4)}
            more |= {"groups": {g: [round(predicted[g], 4), round(change[g], 4)] for g in scored}}
            more |= {"missing": len(parts) - len(scored)}
            what = f"truth.spearman.{quantity}{suffix}"
            bench.record(what, value, interval, n=len(scored), unit="rank correlation", **more)
        if name != "label":
            edge = float(np.quantile([by_row[row] for row in by_row if row in harmful], TAIL))
            harmless = [row for row in by_row if row not in harmful]
            inside, n = sum(by_row[row] >= edge for row in harmless), len(harmless)
            what, share = f"truth.harmless_in_harmful_range{suffix}", inside / n
            bench.record(what, share, wilson(inside, n), n=n, unit="share", count=inside, edge=edge)
    again = [one["S"] for name, one in outcomes.items() if name not in parts]
    if len(again) > 1:
        unit = "standard deviation of S over orders of all rows"
        bench.record("truth.noise.S", statistics.stdev(again), n=len(again), unit=unit)


@experiment(
    "truth",
    results="scan",
    replaces=("what",),
    quick={
        "rows": 12,
        "harmful": 4,
        "groups_": 2,
        "repeats": 1,
        "requests": 2,
        "probes": 4,
        "scorers": ("refusal_loss",),
    },
)
def truth(
    *,
    bench: Bench,
    rows: int = 160,
    harmful: Annotated[
        int, Parameter(help="of these; with fewer, the attack success rate is further from its ceiling")
    ] = 24,
    groups_: Annotated[int, Parameter(name="--groups")] = 10,
    repeats: Annotated[int, Parameter(help="orders of all rows, for the noise")] = 2,
    requests: Annotated[int, Parameter(help="of which the attack success rate is measured")] = 40,
    probes: Annotated[int, Parameter(help="over which S is the mean")] = 100,
    scorers: Annotated[tuple[str, ...], Parameter(help="the first one gives the quarters")] = tuple(SCORERS),
) -> None:
    """Does the score of a row predict what training on it does?"""
    start = functools.partial(load, recipe.MODEL)
    loaded = start()
    mixed, opened = recipe.training_rows(loaded.tokenizer, rows - harmful, harmful)
    refusals = recipe.rows(loaded.tokenizer, {"path": "builtin:refusals", "take": probes})

    def score(spec: Any) -> dict[str, float]:
        anchors = {"probe": refusals}
        values = score_rows(*loaded, mixed, {"it": scorer.make(spec)}, anchors, batch_size=16).rows["it"]
        return dict(zip([row.id for row in mixed], values, strict=True))

    ids = [[row.id, row.ids.tolist()] for row in mixed]
    specs = {name: SCORERS[name] for name in scorers}
    scores = {
        name: bench.once(f"scores.{name}", [recipe.MODEL, spec, probes, ids], functools.partial(score, spec))
        for name, spec in specs.items()
    }
    asr = Asr(prompts="builtin:harmful-test", take=requests, judges=("keyword",))
    setting = Setting(recipe.MODEL, start, recipe.ADAPTER, recipe.ARGUMENTS, refusals, asr, recipe.LABELS)
    bench.facts |= {"rows": len(mixed), "harmful_rows": len(opened)}
    records(bench, collect(bench, setting, mixed, opened, scores, groups_, repeats), scores, opened)
