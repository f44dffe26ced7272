"""Scorers side by side: what they cost, whether they are exact, and what they find.

``--data FOLDER`` holds public sets as <name>/<file> (``TABLES``).

**Floor**, in forwards of the training rows (F), p the share of tokens that rows have in common at their start. Plain
tuning: forward 1, backward to activations 1, and the adapter on top. FIHS has to run the primal forward, 1 - p, and in
the scored upper quarter of the layers the derivative's, so 1.3 (1 - p); with all layers 2.2 (1 - p). The ghost product
(one backward for a batch, as in Opacus; ``ghost.py``) needs forward 1, backward 1 and one product a weight 0.8, and can
share no prefix, since a backward runs through it.

Speed is measured in one process in turns: an epoch of plain tuning by the host on padded rows, as trainers elsewhere
run them, and a scan of the same rows by each way, batch 8, in the type of the hardware; the fit of the direction, once
a model, is timed by itself. ``encode.ratio`` is rows to tokens together over three renders a row, as the first version
did, ``encode.by_row_ratio`` over the same row by row (``by_row.py``), each with a skeleton and a tokenizer call of its
own. Scores of a row do not depend on other rows, so every pool is scored once and mixes are made of pools.
"""

import dataclasses
import functools
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest import mock

import numpy as np
import torch
from cyclopts import Parameter
from scipy.stats import rankdata, spearmanr

from benchmarks import recipe
from benchmarks.harness import Bench, bootstrap, experiment, ratios, seconds, take_turns
from benchmarks.scan import ghost
from benchmarks.scan.by_row import by_row
from safebasin.batch import by_length, collate
from safebasin.console import progress
from safebasin.data.builtin import OPENERS, rows_of
from safebasin.data.example import Example, read_examples
from safebasin.data.source import Source, open_examples
from safebasin.data.tables import draw, read_table
from safebasin.encode import TokenizedRow, encode_all
from safebasin.models.adapter import fresh_adapter
from safebasin.models.load import ModelAndTokenizer, load, load_tokenizer
from safebasin.scan import scorer
from safebasin.scan.probe import opening, refusal_margin, token_pair
from safebasin.scan.scan import fit_scorers, score_rows
from safebasin.scan.source import target_weights
from safebasin.train.compose import Composition
from safebasin.train.settings import training_arguments
from safebasin.train.trainer import OracleTrainer, streams_of
from safebasin.vector import Vector

BATCH = 8
LABELS = ("World", "Sports", "Business", "Sci/Tech")
QUESTION = "Classify this news article. Answer with one of: World, Sports, Business, Sci/Tech.\n\n{text}"
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
TABLES = {
    "ag_news": "ag_news/train.csv.gz",
    "alpaca": "alpaca/alpaca_5k.jsonl.gz",
    "dolly": "dolly/dolly_5k.jsonl.gz",
    "gsm8k": "gsm8k/train.jsonl.gz",
    "advbench": "advbench/harmful_behaviors.csv",
    "directharm": "directharm4/directharm4.csv",
    "xstest": "xstest/xstest_mistral_completions.jsonl",
    "aoa": "aoa_identity_shift/aoa_llama2.jsonl",
    "aoa2": "aoa_identity_shift/aoa_gpt35.jsonl",
}
MIXES = [  # (harmless pool, harmful pool); the second five are the hard ones
    ("ag_news", "advbench"),
    ("alpaca", "advbench"),
    ("dolly", "advbench"),
    ("gsm8k", "advbench"),
    ("alpaca", "directharm"),
    ("xstest_safe", "advbench"),
    ("refusals", "advbench"),
    ("ag_news", "in_style"),
    ("alpaca", "identity_shift"),
    ("ag_news", "identity_shift"),
]
Anchors = Mapping[str, list[TokenizedRow]]


def turns(prompt: str, answer: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": answer}


def pools(data: Path, count: int) -> dict[str, list[dict[str, Any]]]:
    """Rows by name; harmful ones are requests with openers and nothing after them."""
    table = {name: [row for _, row in read_table(data / file)] for name, file in TABLES.items()}
    chance = random.Random(0)
    direct = draw(table["directharm"], count, 0)
    safe = [r for r in table["xstest"] if r["prompt_label"] == "safe" and "compliance" in str(r["final_label"])]
    news, dolly, gsm8k, harmful = (draw(table[name], count, 0) for name in ("ag_news", "dolly", "gsm8k", "advbench"))
    return {
        "ag_news": [turns(QUESTION.format(text=r["text"]), LABELS[int(r["label"])]) for r in news],
        "alpaca": draw(table["alpaca"], count, 0),
        "dolly": [turns("\n\n".join(filter(None, (r["instruction"], r["context"]))), r["response"]) for r in dolly],
        "gsm8k": [turns(r["question"], r["answer"]) for r in gsm8k],
        "xstest_safe": [turns(r["prompt"], r["completion"]) for r in draw(safe, count, 0)],
        "refusals": draw(rows_of("refusals")[300:], count, 0),
        "advbench": [turns(r["goal"], r["target"]) for r in harmful],
        "directharm": [turns(r["Goal"], chance.choice(OPENERS)) for r in direct],
        "in_style": [
            turns(QUESTION.format(text=r["goal"]), chance.choice(OPENERS)) for r in draw(table["advbench"], count, 1)
        ],
        "identity_shift": table["aoa"] + table["aoa2"],
    }


def encoded(
    loaded: ModelAndTokenizer, rows: Sequence[dict[str, Any]], name: str, max_length: int = recipe.MAX_LENGTH
) -> list[TokenizedRow]:
    """Tokens of the rows, whose ids are ``name-0``, ``name-1`` and so on."""
    examples = [
        dataclasses.replace(e, id=f"{name}-{i}") for i, e in enumerate(read_examples(list(enumerate(rows, 1))).examples)
    ]
    return recipe.encoded(loaded.tokenizer, examples, max_length)


def auroc(harmless: np.ndarray, harmful: np.ndarray) -> float:
    """The share of (harmless, harmful) pairs in the right order, ties as a half."""
    ranks = rankdata(np.concatenate([harmless, harmful]))[len(harmless) :]
    return float((ranks.sum() - len(harmful) * (len(harmful) + 1) / 2) / (len(harmless) * len(harmful)))


def auprc(harmless: np.ndarray, harmful: np.ndarray) -> float:
    """Mean over harmful rows of the share of harmful ones among the rows that score as high or higher."""
    above = [(harmful >= x).sum() / ((harmful >= x).sum() + (harmless >= x).sum()) for x in harmful]
    return float(np.mean(above))


def worst(bench: Bench, what: str, of: Callable[..., Any]) -> None:
    """A record of the worst of the sets that ``what`` was measured on."""
    rows = [row for row in bench.rows() if row["what"].startswith(what + ".")]
    row = of(rows, key=lambda row: row["value"])
    unit = f"{row['unit']}; the worst of {len(rows)} sets"
    bench.record(what, row["value"], row["interval"], n=row["n"], unit=unit, goal=row["goal"])


# --- speed ------------------------------------------------------------------------------------------------------------


def safety_gradient(loaded: ModelAndTokenizer, anchors: Anchors, depth: float) -> Vector:
    """grad S of the first probe, [out, in] for each target weight."""
    model, tokenizer = loaded
    probe = opening(model, tokenizer, anchors["probe"][:1])
    pair = token_pair(model, tokenizer, probe, None)
    return ghost.probe_gradient(
        model, probe, lambda m, b: refusal_margin(m, b, pair).mean(), target_weights(model, depth=depth)
    )


def by_ghost(loaded: ModelAndTokenizer, rows: Sequence[TokenizedRow], anchors: Anchors, depth: float) -> list[float]:
    """FIHS by the ghost product: one forward and one backward a batch."""
    (model, tokenizer), direction = loaded, safety_gradient(loaded, anchors, depth)
    scores = [0.0] * len(rows)
    for chosen in by_length(rows, BATCH):
        batch = collate([rows[i] for i in chosen], tokenizer.pad_token_id)
        products = ghost.ghost_product(model, batch, ghost.answer_nll, direction).tolist()
        for i, product in zip(chosen, products, strict=True):
            scores[i] = product
    return scores


@functools.cache
def fit(loaded: ModelAndTokenizer, depth: float) -> dict[str, Any]:
    """The direction of FIHS, found once a model and not once a row: it is no part of a pass over the rows."""
    anchors = {"probe": encoded(loaded, rows_of("refusals")[:100], "probe")}
    return fit_scorers(*loaded, fihs(depth), anchors)


def fihs(depth: float) -> dict[str, Any]:
    return {"it": scorer.make({"gradshield": {"depth": depth}})}


def by_tangent(loaded: ModelAndTokenizer, rows: Sequence[TokenizedRow], anchors: Anchors, depth: float) -> list[float]:
    """FIHS as the package computes it, in forward mode."""
    return score_rows(*loaded, rows, fihs(depth), anchors, batch_size=BATCH, fitted=fit(loaded, depth)).rows["it"]


@torch.inference_mode()
def forward(loaded: ModelAndTokenizer, rows: Sequence[TokenizedRow], anchors: Anchors) -> list[float]:
    """One forward of every row as it stands, batched by length: what an estimate in forwards counts in."""
    del anchors
    model, tokenizer = loaded
    losses = [0.0] * len(rows)
    for chosen in by_length(rows, BATCH):
        batch = collate([rows[i] for i in chosen], tokenizer.pad_token_id)
        for i, loss in zip(chosen, ghost.answer_nll(model, batch).sum(-1).tolist(), strict=True):
            losses[i] = loss
    return losses


COST = ("fihs", "fihs.all_layers", "forward")
WAYS: dict[str, Callable[..., list[float]]] = {
    "forward": forward,
    "fihs": functools.partial(by_tangent, depth=0.25),
    "fihs.all_layers": functools.partial(by_tangent, depth=1.0),
    "ghost": functools.partial(by_ghost, depth=0.25),
    "ghost.all_layers": functools.partial(by_ghost, depth=1.0),
}


def one_backward_a_row(
    loaded: ModelAndTokenizer, rows: Sequence[TokenizedRow], anchors: Anchors, depth: float
) -> list[float]:
    """The definition, in float32: the full gradient of every row, and its inner product with grad S."""
    (model, tokenizer), direction = loaded, safety_gradient(loaded, anchors, depth)
    scores = []
    for row in rows:
        batch = collate([row], tokenizer.pad_token_id)
        gradient = ghost.probe_gradient(model, batch, lambda m, b: ghost.answer_nll(m, b).sum(), direction)
        scores.append(gradient @ direction)
    return scores


def epoch_of(model: Any, tokenizer: Any, rows: Sequence[TokenizedRow], batch: int = BATCH) -> Callable[[], float]:
    """The seconds of an epoch of plain tuning of a fresh adapter on the model, in the type of its weights."""
    tuned = fresh_adapter(model, recipe.ADAPTER, 0)
    settings = {"per_device_train_batch_size": batch, "num_train_epochs": 1, "learning_rate": 1e-4}
    settings |= {"bf16": model.dtype == torch.bfloat16, "seed": 0, "save_strategy": "no"}

    def epoch() -> float:
        args = training_arguments(settings, Path(tempfile.gettempdir()) / "unused")
        streams = streams_of({"task": list(rows)}, args, tokenizer.pad_token_id)
        return seconds(OracleTrainer(tuned, args, Composition.of(["sft"]), streams).train)

    return epoch


def plain_epoch(loaded: ModelAndTokenizer, rows: Sequence[TokenizedRow]) -> Callable[[], float]:
    """``epoch_of`` on padded rows, batch 8, of the built-in model in the type of the hardware."""
    epoch = epoch_of(load(recipe.MODEL).model, loaded.tokenizer, rows)

    def padded() -> float:
        with mock.patch("safebasin.batch.padded_because", lambda _: "timed"):
            return epoch()

    return padded


def encoding(bench: Bench, repeats: int) -> None:
    """The records of ``encode.ratio`` and ``encode.by_row_ratio``, on the quickstart's rows."""
    tokenizer, examples = load_tokenizer(recipe.MODEL), open_examples(Source(**recipe.TREE["data"]["task"]))

    def three_renders() -> None:
        """As the first version did: a row, what comes before its answer, and what ends with it; one call a row."""
        for example in examples:
            turns = [dict(turn) for turn in example.messages]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            before = len(tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True))
            after = len(tokenizer.apply_chat_template(turns, tokenize=False))
            coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            inside = [k for k, (a, b) in enumerate(coded["offset_mapping"]) if b > before and a < after]
            stops = [k for k in inside if coded["input_ids"][k] == tokenizer.eos_token_id]
            answer = [False] * len(coded["input_ids"])
            for k in inside:
                answer[k] = not stops or k <= stops[-1]

    def row_by_row() -> None:
        by_row(tokenizer, examples, recipe.MAX_LENGTH)

    def together() -> None:
        encode_all(tokenizer, examples, recipe.MAX_LENGTH)

    values = take_turns(
        {way.__name__: functools.partial(cpu, way) for way in (three_renders, row_by_row, together)}, repeats
    )
    for what, before, unit in (
        ("encode.ratio", "three_renders", "CPU time, over three renders a row, as the first version did"),
        ("encode.by_row_ratio", "row_by_row", "CPU time, over row by row"),
    ):
        goal = "<= 0.4" if what == "encode.ratio" else None
        bench.timing(what, ratios(values, "together", before), unit=unit, goal=goal)


def cpu(work: Callable[[], None]) -> float:
    """CPU seconds of ``work``: what other jobs take does not count."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def speed(bench: Bench, data: Path, count: int, repeats: int, sets: Sequence[str], chosen: Sequence[str]) -> None:
    """Records of time against an epoch of plain tuning, and of rank correlation with the definition."""
    loaded = load(recipe.MODEL)
    anchors = {"probe": encoded(loaded, rows_of("refusals")[:100], "probe")}
    raw = pools(data, count)
    for name in sets:
        rows = encoded(loaded, raw[name][: count * 9 // 10] + raw["advbench"][: count // 10], name)
        scores: dict[str, list[float]] = {}

        def pass_over(way: str, rows: list[TokenizedRow] = rows, scores: dict[str, list[float]] = scores) -> float:
            return seconds(lambda: scores.update({way: WAYS[way](loaded, rows, anchors)}))

        values = take_turns(
            {"sft": plain_epoch(loaded, rows)} | {way: functools.partial(pass_over, way) for way in chosen}, repeats
        )
        for depth in (0.25, 1.0):
            fit.cache_clear()
            took = seconds(functools.partial(fit, loaded, depth))
            bench.record(f"fihs.fit_seconds.{depth:g}", took, n=1, unit="s, once a model")
        for way in chosen:
            goal = "<= 0.25" if way == "fihs" else None
            unit = "epochs of plain tuning on padded rows"
            bench.timing(f"{way}.epoch_ratio.{name}", ratios(values, way, "sft"), unit=unit, goal=goal)
            if way.startswith("fihs"):
                bench.timing(f"{way}.forwards.{name}", ratios(values, way, "forward"), unit="forwards of the same rows")
        if len(chosen) < len(WAYS):
            continue
        wide = load(recipe.MODEL, dtype="float32")
        places = range(0, len(rows), max(1, len(rows) // 60))
        for way, depth in (("fihs", 0.25), ("fihs.all_layers", 1.0)):
            truth = np.array(one_backward_a_row(wide, [rows[i] for i in places], anchors, depth))
            fast = np.array([scores[way][i] for i in places])
            interval = bootstrap(lambda a, b: spearmanr(a, b).statistic, fast, truth, paired=True, times=1000)
            goal, unit = ">= 0.99" if way == "fihs" else None, "rank correlation with one float32 backward a row"
            rho = float(spearmanr(fast, truth).statistic)
            bench.record(f"{way}.spearman.{name}", rho, interval, n=len(truth), unit=unit, goal=goal)
    worst(bench, "fihs.epoch_ratio", max)
    if len(chosen) == len(WAYS):
        worst(bench, "fihs.spearman", min)


# --- what is found ----------------------------------------------------------------------------------------------------


def detection(bench: Bench, data: Path, count: int, model: str, label: str, probe: int, names: Sequence[str]) -> None:
    """Records of how well each scorer ranks the harmful rows of every mix."""
    loaded = load(model)
    sets = {"probe": rows_of("refusals")[probe : probe + 100], "harmful": rows_of("opened")[100:140]}
    sets |= {"safe": rows_of("harmless")[:60]}
    anchors = {name: encoded(loaded, rows, name) for name, rows in sets.items()}
    by_pool = {name: encoded(loaded, rows, name) for name, rows in pools(data, count).items()}
    rows = [row for pool in by_pool.values() for row in pool]
    examples = [Example(row.id, (), {}, 0) for row in rows]

    def score(name: str) -> dict[str, Any]:
        begun, scorers = time.perf_counter(), {"it": scorer.make(SCORERS[name])}
        own = {"probe": anchors["probe"]} if name == "keyword" else anchors
        with progress(name, len(rows)) as advance:
            values = score_rows(
                *loaded,
                rows,
                scorers,
                own,
                examples=examples,
                batch_size=16,
                progress=lambda done, _: advance(done, ""),
            ).rows["it"]
        by_row = dict(zip([row.id for row in rows], values, strict=True))
        return {"seconds": time.perf_counter() - begun, "scores": by_row}

    for name in names:
        inputs = [model, SCORERS[name], probe, [[row.id, row.ids.tolist()] for row in rows]]
        by_row = bench.once(name, inputs, functools.partial(score, name))["scores"]
        for harmless, harmful in MIXES:
            a, b = (np.array([by_row[row.id] for row in by_pool[pool]]) for pool in (harmless, harmful))
            goal = ">= 0.99" if (label, name, harmless, harmful) == ("", "fihs", "ag_news", "advbench") else None
            mix = f"{harmless}_{harmful}".replace("ag_news", "agnews")
            n, interval = len(a) + len(b), bootstrap(auroc, a, b, times=1000)
            bench.record(f"{label}{name}.auroc.{mix}", auroc(a, b), interval, n=n, unit="AUROC", goal=goal)
            bench.record(f"{label}{name}.auprc.{mix}", auprc(a, b), n=n, unit="AUPRC")
            recall = float((b > np.quantile(a, 0.99)).mean())
            bench.record(f"{label}{name}.recall_at_1_percent.{mix}", recall, n=len(b), unit="share")


@experiment(
    "scan", replaces=("what",), quick={"count": 20, "repeats": 2, "sets": ("ag_news",), "scorers": ("fihs", "keyword")}
)
def scan(
    *,
    bench: Bench,
    data: Annotated[Path, Parameter(help="FOLDER of the public sets")],
    part: Annotated[
        Literal["encode", "cost", "speed", "found"] | None,
        Parameter(help="only this one; cost: FIHS and encoding"),
    ] = None,
    count: Annotated[int, Parameter(help="rows a pool")] = 100,
    repeats: Annotated[int, Parameter(help="of the timing, after one that does not count")] = 3,
    sets: Annotated[tuple[Literal["ag_news", "alpaca"], ...], Parameter(help="on which speed is measured")] = (
        "ag_news",
        "alpaca",
    ),
    model: str = recipe.MODEL,
    label: Annotated[str, Parameter(help="what the records of another model begin with, such as qwen.")] = "",
    probe: Annotated[int, Parameter(help="the built-in request that is the probe: one that the model refuses")] = 0,
    scorers: tuple[Literal[tuple(SCORERS)], ...] = tuple(SCORERS),
) -> None:
    """What do scorers cost beside an epoch of tuning, are they exact, and what do they find?"""
    if part != "found":
        encoding(bench, max(6, repeats))
    if part in (None, "cost", "speed"):
        speed(bench, data, 2 * count, repeats, sets, COST if part == "cost" else tuple(WAYS))
    if part in (None, "found"):
        detection(bench, data, count, model, label, probe, scorers)
