"""Scorers side by side: what they cost, whether they are exact, and what they find. One command:

    python benchmarks/scan/run.py --data FOLDER        FOLDER: public sets as <name>/<file>, listed in POOLS; nothing is fetched

**Floor**, in forwards of the training rows (F), p the share of tokens that rows have in common at their start. Plain tuning: forward 1, backward
to activations 1, and the adapter on top. FIHS has to run the primal forward, 1 - p, and in the scored upper quarter of the layers the
derivative's, so 1.3 (1 - p); with all layers 2.2 (1 - p). The ghost product (one backward for a batch, the way of Opacus; ``ghost.py``) needs
forward 1, backward 1 and one product a weight 0.8, and can share no prefix, since a backward runs through it.

Speed is measured in one process in turns, an epoch of plain tuning by the host and a scan of the same rows with each way, batch 8,
bfloat16. Scores of a row do not depend on other rows, so every pool is scored once and mixes are made of pools.
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
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ghost
import numpy as np
from scipy.stats import rankdata, spearmanr

from safebasin.batch import by_length, collate
from safebasin.console import steps
from safebasin.data.builtin import OPENERS, rows_of
from safebasin.data.example import Example, read_examples
from safebasin.data.tables import draw, read_table
from safebasin.encode import TokenizedRow, encode_all
from safebasin.models.adapter import fresh_adapter
from safebasin.models.load import ModelAndTokenizer, load
from safebasin.runtime import keep_memory
from safebasin.scan import scorer
from safebasin.scan.probe import opening, refusal_margin, token_pair
from safebasin.scan.scan import scan
from safebasin.scan.source import target_weights
from safebasin.train.compose import Composition
from safebasin.train.trainer import OracleTrainer, arguments, streams_of
from safebasin.vector import Vector

HERE = Path(__file__).parent
ADAPTER = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
BATCH = 8
LABELS = ("World", "Sports", "Business", "Sci/Tech")
ASK = "Classify this news article. Answer with one of: World, Sports, Business, Sci/Tech.\n\n{text}"
SCORERS: dict[str, Any] = {
    "fihs": {"gradshield": {}},
    "fihs.all_layers": {"gradshield": {"depth": 1.0}},
    "fihs.mean": {"gradshield": {"reduction": "mean"}},
    "refusal_loss": "refusal_loss",
    "opening_margin": "opening_margin",
    "self_refusal": "self_refusal",
    "similarity": "similarity",
    "larf": "larf",
    "anchor": "anchor",
    "dsa": "dsa",
    "keyword": "keyword",
}
# what is told apart: (harmless pool, harmful pool); the second five are the hard ones
MIXES = [
    ("ag_news", "advbench"), ("alpaca", "advbench"), ("dolly", "advbench"), ("gsm8k", "advbench"), ("alpaca", "directharm"),
    ("xstest_safe", "advbench"), ("refusals", "advbench"), ("ag_news", "in_style"), ("alpaca", "identity_shift"), ("ag_news", "identity_shift"),
]  # fmt: skip


def turns(prompt: str, answer: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": answer}


def pools(data: Path, count: int) -> dict[str, list[dict[str, Any]]]:
    """Rows by name; harmful ones are requests with openers and nothing after them."""
    table = {
        name: [row for _, row in read_table(data / file)]
        for name, file in {
            "ag_news": "ag_news/train.csv.gz",
            "alpaca": "alpaca/alpaca_5k.jsonl.gz",
            "dolly": "dolly/dolly_5k.jsonl.gz",
            "gsm8k": "gsm8k/train.jsonl.gz",
            "advbench": "advbench/harmful_behaviors.csv",
            "directharm": "directharm4/directharm4.csv",
            "xstest": "xstest/xstest_mistral_completions.jsonl",
            "aoa": "aoa_identity_shift/aoa_llama2.jsonl",
            "aoa2": "aoa_identity_shift/aoa_gpt35.jsonl",
        }.items()
    }
    chance = random.Random(0)
    asked = draw(table["directharm"], count, 0)
    return {
        "ag_news": [
            turns(ASK.format(text=r["text"]), LABELS[int(r["label"])]) for r in draw(table["ag_news"], count, 0)
        ],
        "alpaca": draw(table["alpaca"], count, 0),
        "dolly": [
            turns("\n\n".join(filter(None, (r["instruction"], r["context"]))), r["response"])
            for r in draw(table["dolly"], count, 0)
        ],
        "gsm8k": [turns(r["question"], r["answer"]) for r in draw(table["gsm8k"], count, 0)],
        "xstest_safe": [
            turns(r["prompt"], r["completion"])
            for r in draw(
                [r for r in table["xstest"] if r["prompt_label"] == "safe" and "compliance" in str(r["final_label"])],
                count,
                0,
            )
        ],
        "refusals": draw(rows_of("refusals")[300:], count, 0),
        "advbench": [turns(r["goal"], r["target"]) for r in draw(table["advbench"], count, 0)],
        "directharm": [turns(r["Goal"], chance.choice(OPENERS)) for r in asked],
        "in_style": [
            turns(ASK.format(text=r["goal"]), chance.choice(OPENERS)) for r in draw(table["advbench"], count, 1)
        ],
        "identity_shift": table["aoa"] + table["aoa2"],
    }


def encoded(loaded: ModelAndTokenizer, rows: Sequence[dict[str, Any]], name: str) -> list[TokenizedRow]:
    examples = [
        dataclasses.replace(e, id=f"{name}-{i}") for i, e in enumerate(read_examples(list(enumerate(rows, 1))).examples)
    ]
    return encode_all(loaded.tokenizer, examples, 1024)[0]


def auroc(harmless: np.ndarray, harmful: np.ndarray) -> float:
    ranks = rankdata(np.concatenate([harmless, harmful]))[len(harmless) :]
    return float((ranks.sum() - len(harmful) * (len(harmful) + 1) / 2) / (len(harmless) * len(harmful)))


def auprc(harmless: np.ndarray, harmful: np.ndarray) -> float:
    """Mean over harmful rows of the share of harmful ones among the rows that score as high or higher."""
    above = [(harmful >= x).sum() / ((harmful >= x).sum() + (harmless >= x).sum()) for x in harmful]
    return float(np.mean(above))


def bootstrap(
    measure: Callable[..., float], *samples: np.ndarray, paired: bool = False, times: int = 1000
) -> tuple[float, list[float]]:
    chance = np.random.default_rng(0)
    found = []
    for _ in range(times):
        picks = [chance.integers(0, len(sample), len(sample)) for sample in samples]
        found.append(measure(*(sample[picks[0 if paired else i]] for i, sample in enumerate(samples))))
    return measure(*samples), np.quantile(found, [0.025, 0.975]).round(4).tolist()


class Records:
    """``results.json``: records by ``what``, those of other scripts kept."""

    def __init__(self, path: Path):
        self.path = path
        self.facts = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
            "date": datetime.date.today().isoformat(),
        }

    def note(
        self, what: str, value: float, interval: Sequence[float] | None, n: int, goal: str | None, unit: str
    ) -> None:
        known = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else []
        record = {
            "what": what,
            "value": round(value, 4),
            "interval": list(interval or []) or None,
            "n": n,
            "goal": goal,
            "unit": unit,
        }
        kept = [row for row in known if row["what"] != what]
        self.path.write_text(json.dumps([*kept, record | self.facts], indent=1) + "\n", encoding="utf-8")
        print(f"{what:44} {value:8.4f}  {record['interval']}  n {n}  {goal or ''}", flush=True)

    def worst(self, what: str, of: Callable[..., Any]) -> None:
        """A record of the worst of the sets that ``what`` was measured on."""
        known = [row for row in json.loads(self.path.read_text(encoding="utf-8")) if row["what"].startswith(what + ".")]
        row = of(known, key=lambda row: row["value"])
        self.note(
            what, row["value"], row["interval"], row["n"], row["goal"], f"{row['unit']}; the worst of {len(known)} sets"
        )


# --- speed -------------------------------------------------------------------------------------------------------------------


def safety_gradient(loaded: ModelAndTokenizer, anchors: dict[str, list[TokenizedRow]], depth: float) -> Vector:
    """grad S of the first probe, whole."""
    model, tokenizer = loaded
    probe = opening(tokenizer, anchors["probe"][:1], model.device)
    pair = token_pair(model, tokenizer, probe, None)
    return ghost.probe_gradient(
        model, probe, lambda m, b: refusal_margin(m, b, pair).mean(), target_weights(model, depth=depth)
    )


def by_ghost(
    loaded: ModelAndTokenizer, rows: Sequence[TokenizedRow], anchors: dict[str, list[TokenizedRow]], depth: float
) -> list[float]:
    """FIHS by the ghost product: one forward and one backward a batch."""
    (model, tokenizer), direction = loaded, safety_gradient(loaded, anchors, depth)
    found = [0.0] * len(rows)
    for chosen in by_length(rows, BATCH):
        batch = collate([rows[i] for i in chosen], tokenizer.pad_token_id)
        for i, value in zip(
            chosen, ghost.ghost_product(model, batch, ghost.answer_nll, direction).tolist(), strict=True
        ):
            found[i] = value
    return found


def speed(data: Path, records: Records, count: int, turns_: int, sets: Sequence[str]) -> None:
    loaded = load("builtin:smollm2-aligned")
    anchors = {"probe": encoded(loaded, rows_of("refusals")[:100], "probe")}
    told = pools(data, count)

    def by_tangent(rows: Sequence[TokenizedRow], depth: float) -> list[float]:
        return scan(
            *loaded, rows, {"it": scorer.make({"gradshield": {"depth": depth}})}, anchors, batch_size=BATCH
        ).rows["it"]

    ways = {
        "fihs": lambda rows: by_tangent(rows, 0.25),
        "fihs.all_layers": lambda rows: by_tangent(rows, 1.0),
        "ghost": lambda rows: by_ghost(loaded, rows, anchors, 0.25),
        "ghost.all_layers": lambda rows: by_ghost(loaded, rows, anchors, 1.0),
    }
    for name in sets:
        rows = encoded(loaded, told[name][: count * 9 // 10] + told["advbench"][: count // 10], name)
        tuned = load("builtin:smollm2-aligned")
        model = fresh_adapter(tuned.model, ADAPTER, 0)
        settings = {
            "per_device_train_batch_size": BATCH,
            "num_train_epochs": 1,
            "learning_rate": 1e-4,
            "bf16": True,
            "seed": 0,
        }
        seconds: dict[str, list[float]] = {"sft": []} | {way: [] for way in ways}
        scores: dict[str, list[float]] = {}
        for turn in range(turns_ + 1):  # the first turn warms up
            args = arguments(settings, Path(tempfile.gettempdir()) / "unused")
            host = OracleTrainer(
                model, args, Composition.of(["sft"]), streams_of({"task": rows}, args, loaded.tokenizer.pad_token_id)
            )
            start = time.perf_counter()
            host.train()
            seconds["sft"].append(time.perf_counter() - start)
            for way, run in ways.items():
                start = time.perf_counter()
                scores[way] = run(rows)
                seconds[way].append(time.perf_counter() - start)
            print({way: round(each[-1], 1) for way, each in seconds.items()}, flush=True)
            if turn == 0:
                seconds = {way: [] for way in seconds}
        for way in ways:
            ratios = sorted(a / b for a, b in zip(seconds[way], seconds["sft"], strict=True))
            goal = "<= 0.4" if way == "fihs" else None
            records.note(
                f"{way}.epoch_ratio.{name}",
                statistics.median(ratios),
                (ratios[0], ratios[-1]),
                turns_,
                goal,
                "epochs of plain tuning",
            )
        wide = load("builtin:smollm2-aligned", dtype="float32")
        some = rows[:: max(1, len(rows) // 60)]
        for way, depth in (("fihs", 0.25), ("fihs.all_layers", 1.0)):
            truth = one_backward_a_row(wide, some, anchors, depth)
            fast = np.array([scores[way][rows.index(row)] for row in some])
            rho, interval = bootstrap(lambda a, b: float(spearmanr(a, b).statistic), fast, np.array(truth), paired=True)
            goal = ">= 0.99" if way == "fihs" else None
            records.note(
                f"{way}.spearman.{name}",
                rho,
                interval,
                len(some),
                goal,
                "rank correlation with one float32 backward a row",
            )
    records.worst("fihs.epoch_ratio", max)
    records.worst("fihs.spearman", min)


def one_backward_a_row(
    loaded: ModelAndTokenizer, rows: Sequence[TokenizedRow], anchors: dict[str, list[TokenizedRow]], depth: float
) -> list[float]:
    """The definition, in float32: the whole gradient of every row, and its inner product with grad S."""
    (model, tokenizer), direction = loaded, safety_gradient(loaded, anchors, depth)
    found = []
    for row in rows:
        batch = collate([row], tokenizer.pad_token_id)
        found.append(
            ghost.probe_gradient(model, batch, lambda m, b: ghost.answer_nll(m, b).sum(), direction) @ direction
        )
    return found


# --- what is found -----------------------------------------------------------------------------------------------------------


def found(
    data: Path, records: Records, count: int, keep: Path, model: str, label: str, probe: int, names: Sequence[str]
) -> None:
    loaded = load(model)
    own = {
        "probe": rows_of("refusals")[probe : probe + 100],
        "harmful": rows_of("opened")[100:140],
        "safe": rows_of("harmless")[:60],
    }
    anchors = {name: encoded(loaded, rows, name) for name, rows in own.items()}
    told = {name: encoded(loaded, rows, name) for name, rows in pools(data, count).items()}
    keep.mkdir(parents=True, exist_ok=True)
    scores: dict[str, dict[str, np.ndarray]] = {}
    for name, spec in ((name, SCORERS[name]) for name in names):
        file = keep / f"{name}.json"
        if not file.is_file():
            rows = [row for pool in told.values() for row in pool]
            start = time.perf_counter()
            with steps(name, len(rows)) as advance:
                values = scan(
                    *loaded, rows, {"it": scorer.make(spec)}, {"probe": anchors["probe"]} | ({} if name in ("keyword",) else anchors),
                    examples=[Example(row.id, (), {}, 0) for row in rows], batch_size=16, progress=lambda done, _: advance(done, ""),
                ).rows["it"]  # fmt: skip
            each = dict(zip([row.id for row in rows], values, strict=True))
            file.write_text(json.dumps({"seconds": time.perf_counter() - start, "scores": each}), encoding="utf-8")
        each = json.loads(file.read_text(encoding="utf-8"))["scores"]
        scores[name] = {pool: np.array([each[row.id] for row in rows]) for pool, rows in told.items()}
    for harmless, harmful in MIXES:
        for name, by_pool in scores.items():
            a, b = by_pool[harmless], by_pool[harmful]
            value, interval = bootstrap(auroc, a, b)
            goal = ">= 0.99" if (label, name, harmless, harmful) == ("", "fihs", "ag_news", "advbench") else None
            mix = f"{harmless}_{harmful}".replace("ag_news", "agnews")
            records.note(f"{label}{name}.auroc.{mix}", value, interval, len(a) + len(b), goal, "AUROC")
            records.note(f"{label}{name}.auprc.{mix}", auprc(a, b), None, len(a) + len(b), None, "AUPRC")
            recall = float((b > np.quantile(a, 0.99)).mean())
            records.note(f"{label}{name}.recall_at_1_percent.{mix}", recall, None, len(b), None, "share")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--data", type=Path, required=True)
    ask.add_argument("--part", choices=("speed", "found"), help="only this one")
    ask.add_argument("--count", type=int, default=100, help="rows a pool")
    ask.add_argument("--turns", type=int, default=3)
    ask.add_argument(
        "--sets",
        nargs="+",
        choices=("ag_news", "alpaca"),
        default=("ag_news", "alpaca"),
        help="that speed is measured on",
    )
    ask.add_argument("--model", default="builtin:smollm2-aligned")
    ask.add_argument(
        "--label",
        default="",
        help="what the records of another model begin with, such as qwen.; with it --keep of its own",
    )
    ask.add_argument(
        "--probe", type=int, default=0, help="the built-in request that is the probe: one that the model refuses"
    )
    ask.add_argument("--scorers", nargs="+", choices=SCORERS, default=list(SCORERS))
    ask.add_argument("--keep", type=Path, default=Path("runs/scan-benchmark"))
    given = ask.parse_args()
    keep_memory()
    records = Records(HERE / "results.json")
    if given.part != "found":
        speed(given.data, records, 2 * given.count, given.turns, given.sets)
    if given.part != "speed":
        found(given.data, records, given.count, given.keep, given.model, given.label, given.probe, given.scorers)


if __name__ == "__main__":
    main()
