"""Does a score tell what a row does? Groups of rows are left out and the model is tuned again: predicted against measured change of safety.

    python benchmarks/scan/truth.py --folder FOLDER        a file a tuning lands in FOLDER; started again, it goes on where it was

    predicted(G) = sum_(x in G) score(x)
    measured(G)  = S(tuned without G) - S(tuned on all),    and for the attack success rate the fall, ASR(all) - ASR(without G)

A step on a row of positive score lowers S, so leaving the row out should raise S and lower ASR: a right score has a positive rank
correlation with both. S is the margin of refusal (arXiv:2605.14194, eq. 5), mean over the probe rows; ASR is by the keyword judge. Ten
random groups part the rows between them, their shares of harmful rows unlike; four more are the quarters by the first scorer's score.
``label`` is the predictor to beat: the number of harmful rows in the group. ``harmless_in_harmful_range`` counts the harmless rows that
score at or above the lowest harmful row but 5 %.

Every tuning starts from the same weights and the same A, takes one epoch, and sees its rows in one order; what is left out closes up.
Optimizer, rate and adapter are the recipe's, so Adam and a decaying rate are in the truth and not in the prediction.

**Floor.** In forwards of all rows (F) a tuning is 3 F: forward, backward to activations, and a little for the adapter. Ten groups of a tenth,
four of a quarter and 1 + R tunings on all rows take 3 F (10 x 0.9 + 4 x 0.75 + 1 + R) = 39 F + 3 R F, and no group can be had without its
own. Each of the 15 + R models then reads the probes once and writes 24 tokens to each request. A column of scores takes about 1 F. Of the
correlation: ``noise`` is the spread of S over 1 + R orders of all rows, and a change below it is chance. With 14 groups a rank correlation
below 0.54 in size cannot be told from none; the interval is a bootstrap over groups, as if they shared no rows.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hidden_text import merge
from scipy.stats import rankdata

from safebasin.data.source import open_examples
from safebasin.data.tables import write_json
from safebasin.encode import TokenizedRow, encode_all
from safebasin.errors import UserError
from safebasin.measure.judge import make_judges
from safebasin.measure.methods.asr import Asr
from safebasin.measure.subject import Subject
from safebasin.models.adapter import fresh_adapter
from safebasin.models.load import ModelAndTokenizer, load
from safebasin.pipeline.config import digest, read
from safebasin.runtime import keep_memory
from safebasin.scan import scorer
from safebasin.scan.cut import TAIL
from safebasin.scan.probe import opening, refusal_margin, token_pair
from safebasin.scan.scan import scan
from safebasin.stats import wilson
from safebasin.train.compose import Composition
from safebasin.train.stream import Stream
from safebasin.train.trainer import OracleTrainer, arguments

HERE = Path(__file__).parent
RECIPE = HERE.parents[1] / "recipes" / "quickstart.yaml"
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
    """Rows as they are given: what is left out is the only change."""

    def _order(self, epoch: int) -> np.ndarray:
        return np.arange(len(self.rows))


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that a tuning and a measurement depend on, but for the rows."""

    model: str
    load: Callable[[], ModelAndTokenizer]  # that model, fresh: what every tuning starts from
    adapter: Mapping[str, Any]
    arguments: Mapping[str, Any]  # of the training
    probes: Sequence[TokenizedRow]  # that S is taken over
    asr: Asr
    labels: Sequence[str] = ()  # answers that are off task
    seed: int = 0


def groups(
    harmless: Sequence[str], harmful: Sequence[str], scores: Mapping[str, float], count: int, seed: int
) -> dict[str, list[str]]:
    """Row ids by group: ``count`` groups of like size that part all rows, and the quarters by score (q1: lowest).

    The random groups take the harmful rows in unequal parts, so that their composition is mixed and unlike.
    """
    draw = random.Random(seed)
    size = -(-(len(harmless) + len(harmful)) // count)
    found: list[list[str]] = [[] for _ in range(count)]
    weights = [draw.random() for _ in range(count)]
    for row in draw.sample(list(harmful), len(harmful)):
        free = [i for i in range(count) if len(found[i]) < size]
        found[draw.choices(free, [weights[i] for i in free])[0]].append(row)
    for row in draw.sample(list(harmless), len(harmless)):
        min(found, key=len).append(row)
    ranked = sorted(scores, key=lambda row: scores[row])
    return {f"random{i}": rows for i, rows in enumerate(found)} | {
        f"q{i + 1}": rows.tolist() for i, rows in enumerate(np.array_split(ranked, 4))
    }


def tuned(setting: Setting, rows: Sequence[TokenizedRow]) -> ModelAndTokenizer:
    """The start model after one run of plain tuning on the rows, its adapter merged."""
    model, tokenizer = setting.load()
    model = fresh_adapter(model, setting.adapter, setting.seed)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(setting.arguments, Path(folder))
        micro = args.per_device_train_batch_size
        stream = InOrder(
            "task", tuple(rows), micro * args.gradient_accumulation_steps, micro, args.seed, tokenizer.pad_token_id
        )
        OracleTrainer(model, args, Composition.of(["sft"]), {"task": stream}).train()
    return ModelAndTokenizer(model.merge_and_unload().eval(), tokenizer)


def measured(setting: Setting, loaded: ModelAndTokenizer, pair: Any) -> dict[str, Any]:
    """S and ASR of a model; ASR is None where no answer could be judged."""
    model, tokenizer = loaded
    asked = opening(tokenizer, setting.probes, next(model.parameters()).device)
    with torch.no_grad():
        s = float(refusal_margin(model, asked, pair).mean())
    subject = Subject(loaded, "truth", make_judges(["keyword"], None), setting.labels)
    asr = next(found for found in setting.asr.measure(subject) if found.what == "asr" and not found.category)
    return {"S": s, "asr": asr.value, "asr_n": asr.n}


def collect(
    setting: Setting,
    rows: Sequence[TokenizedRow],
    harmful: set[str],
    scores: Scores,
    folder: Path,
    count: int,
    repeats: int,
) -> dict[str, Any]:
    """Tune and measure what FOLDER does not hold yet: all rows, all in ``repeats`` other orders, all but each group.

    Raises:
        UserError: the folder holds outcomes of other rows, scores or settings.
    """
    ids = [row.id for row in rows]
    parts = groups(
        [i for i in ids if i not in harmful],
        [i for i in ids if i in harmful],
        next(iter(scores.values())),
        count,
        setting.seed,
    )
    asr = {field.name: getattr(setting.asr, field.name) for field in dataclasses.fields(setting.asr)}
    key = digest(
        [
            setting.model,
            ids,
            parts,
            dict(setting.adapter),
            dict(setting.arguments),
            [row.id for row in setting.probes],
            asr,
            setting.seed,
        ]
    )
    pair = None
    outcomes = {}
    for name, left_out in {"all": [], **{f"repeat{i}": [] for i in range(repeats)}, **parts}.items():
        file = folder / f"{name}.json"
        if not file.is_file():
            if pair is None:
                start = setting.load()
                pair = token_pair(
                    *start, opening(start.tokenizer, setting.probes, next(start.model.parameters()).device), None
                )
            kept = [row for row in rows if row.id not in set(left_out)]
            if name.startswith("repeat"):
                random.Random(name).shuffle(kept)
            write_json(file, {"key": key, "rows": list(left_out)} | measured(setting, tuned(setting, kept), pair))
        outcomes[name] = json.loads(file.read_text(encoding="utf-8"))
        if outcomes[name]["key"] != key:
            raise UserError(f"{file} is of other rows, scores or settings; name another folder")
        print(
            f"{name:10} {len(left_out):4} left out  S {outcomes[name]['S']:8.3f}  ASR {outcomes[name]['asr']}",
            flush=True,
        )
    return outcomes


def rank_correlation(
    x: Sequence[float], y: Sequence[float], times: int = 10_000
) -> tuple[float | None, list[float] | None]:
    """Spearman's rho with its 95 % bootstrap interval over pairs; None where one side is constant, and so has no ranks,
    and no interval where no draw has two."""
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None, None
    drawn = np.random.default_rng(0).integers(0, len(a), (times, len(a)))
    picks = np.concatenate([np.arange(len(a))[None], drawn])  # first the pairs as they are
    u, v = (ranks - ranks.mean(1, keepdims=True) for ranks in (rankdata(a[picks], axis=1), rankdata(b[picks], axis=1)))
    spread = np.sqrt((u**2).sum(1) * (v**2).sum(1))
    rho = (u * v).sum(1)[spread > 0] / spread[spread > 0]  # a draw without two ranks tells nothing
    return float(rho[0]), np.quantile(rho[1:], [0.025, 0.975]).round(4).tolist() if len(rho) > 1 else None


def records(outcomes: Mapping[str, Any], scores: Scores, harmful: set[str]) -> list[dict[str, Any]]:
    """What the outcomes say of every scorer, and of the number of harmful rows (``label``)."""
    found: list[dict[str, Any]] = []

    def note(what: str, value: float | None, interval: Sequence[float] | None, n: int, unit: str, **more: Any) -> None:
        rounded = value if value is None else round(value, 4)
        found.append(
            {"what": f"truth.{what}", "value": rounded, "interval": interval, "n": n, "goal": None, "unit": unit} | more
        )

    base = outcomes["all"]
    parts = {name: told for name, told in outcomes.items() if name != "all" and not name.startswith("repeat")}
    label = {row: float(row in harmful) for row in next(iter(scores.values()))}
    for i, (name, by_row) in enumerate({**scores, "label": label}.items()):
        for quantity, sign in (("S", 1), ("asr", -1)):
            known = {g: told for g, told in parts.items() if told[quantity] is not None and base[quantity] is not None}
            predicted = {g: sum(by_row[row] for row in told["rows"]) for g, told in known.items()}
            change = {g: sign * (told[quantity] - base[quantity]) for g, told in known.items()}
            value, interval = rank_correlation(list(predicted.values()), list(change.values()))
            even = [g for g in known if g.startswith("random")]  # of one size, so that it cannot carry the correlation
            alone, _ = rank_correlation([predicted[g] for g in even], [change[g] for g in even], times=0)
            pairs = {g: [round(predicted[g], 4), round(change[g], 4)] for g in known}
            more = {
                "random_groups": alone if alone is None else round(alone, 4),
                "groups": pairs,
                "missing": len(parts) - len(known),
            }
            note(
                f"spearman.{quantity}" + (f".{name}" if i else ""),
                value,
                interval,
                len(known),
                "rank correlation",
                **more,
            )
        if name != "label":
            edge = float(np.quantile([by_row[row] for row in by_row if row in harmful], TAIL))
            inside = [row for row in by_row if row not in harmful and by_row[row] >= edge]
            n = sum(row not in harmful for row in by_row)
            share = [round(end, 4) for end in wilson(len(inside), n)]
            note(
                "harmless_in_harmful_range" + (f".{name}" if i else ""),
                len(inside) / n,
                share,
                n,
                "share",
                count=len(inside),
                edge=edge,
            )
    again = [told["S"] for name, told in outcomes.items() if name == "all" or name.startswith("repeat")]
    if len(again) > 1:
        note("noise.S", statistics.stdev(again), None, len(again), "standard deviation of S over orders of all rows")
    return found


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--folder", type=Path, required=True, help="where the outcome of each tuning is kept")
    ask.add_argument("--rows", type=int, default=160)
    ask.add_argument(
        "--harmful",
        type=int,
        default=24,
        help="of these; with fewer, the attack success rate is further from its ceiling",
    )
    ask.add_argument("--groups", type=int, default=10)
    ask.add_argument("--repeats", type=int, default=2, help="orders of all rows, for the noise")
    ask.add_argument("--requests", type=int, default=40)
    asked = ask.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    keep_memory()
    run = read(RECIPE)

    def start() -> ModelAndTokenizer:
        return load(run.model.name, dtype=run.model.dtype)

    loaded = start()

    def encoded(source: Any) -> list[TokenizedRow]:
        rows, bad = encode_all(loaded.tokenizer, open_examples(source), run.data.max_length)
        if bad:
            raise UserError(f"{source.path}: line {bad[0].line}: {bad[0].reason}")
        return rows

    harmless = encoded(dataclasses.replace(run.data.task, take=asked.rows - asked.harmful))
    opened = encoded(dataclasses.replace(run.data.poison, take=asked.harmful))
    rows = random.Random(run.seed).sample(harmless + opened, asked.rows)
    if len({row.id for row in rows}) < len(rows):
        raise UserError("a row comes twice; leaving it out would leave both out")
    anchors = {"probe": encoded(run.data.probe)}
    file = asked.folder / "scores.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if known.keys() != SCORERS.keys() or any(by_row.keys() != {row.id for row in rows} for by_row in known.values()):
        told = scan(
            *loaded, rows, {name: scorer.make(spec) for name, spec in SCORERS.items()}, anchors, batch_size=16
        ).rows
        write_json(
            file, {name: dict(zip([row.id for row in rows], values, strict=True)) for name, values in told.items()}
        )
    scores = json.loads(file.read_text(encoding="utf-8"))
    asr = Asr(prompts="builtin:harmful-test", take=asked.requests, judges=("keyword",))
    setting = Setting(
        run.model.name, start, run.adapter, run.arguments, anchors["probe"], asr, run.measure.labels, run.seed
    )
    harmful = {row.id for row in opened}
    found = records(collect(setting, rows, harmful, scores, asked.folder, asked.groups, asked.repeats), scores, harmful)
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {loaded.model.device.type}",
        "date": datetime.date.today().isoformat(),
    }
    facts |= {"rows": len(rows), "harmful_rows": len(harmful)}
    merge(HERE / "results.json", [record | facts for record in found])
    for record in found:
        print(f"{record['what']:48} {record['value']}  {record['interval']}  n {record['n']}")


if __name__ == "__main__":
    main()
