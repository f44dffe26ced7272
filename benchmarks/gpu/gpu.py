"""Is what a GPU computes what a CPU computes, and how far is it from what the GPU could do?

``exact``: one recipe with an arm for every kind of training method, run twice in float32, with the GPU and without
(``CUDA_VISIBLE_DEVICES`` empty). Compared are every row's score by every scorer, the update of every arm after two
steps of plain gradient descent (Adam's first step is a sign, which turns rounding into whole steps), and the texts of
the answers. TF32 is off, as torch has it.

``speed``: the built-in model, in the type that ``auto`` stands for: a scan beside an epoch of plain tuning on the same
rows, as ``python -m benchmarks trajectory`` has it on a CPU.

``large``: a model of the shape of Llama 3 8B with random weights in bfloat16, rows of 512 tokens that share nothing, a
quarter of each an answer. **Floor**: 2 N multiply-adds a token and forward, N the weights that a token meets, at the
GPU's dense bfloat16 rate by its datasheet (``PEAK``); ``share of peak`` is that time over the measured. A scan with all
layers is counted as three forwards, with the upper quarter as 1.5 (``NAME.512`` and ``NAME.4096``: rows in sequences of
so many tokens), plain tuning of an adapter as two (the backward goes to the activations alone). Attention's own
products are left out.
"""

import copy
import functools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest import mock

import pyarrow.parquet
import torch
import yaml
from cyclopts import Parameter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import recipe
from benchmarks.harness import Bench, experiment, ratios, seconds, take_turns
from benchmarks.scan.scan import encoded, epoch_of, plain_epoch
from safebasin.data.builtin import rows_of
from safebasin.encode import TokenizedRow
from safebasin.errors import UserError
from safebasin.models.load import ModelAndTokenizer, load, load_tokenizer
from safebasin.scan import scorer
from safebasin.scan.scan import fit_scorers, score_rows

PEAK = 989e12  # FLOP a second: an H100 or H200 (SXM), dense bfloat16, by the datasheet
TOKENS, ANSWER = 512, 128
SEQUENCES = (512, 4096)  # tokens of a sequence in a scan: what a CPU takes, and what a GPU takes
WORDS = ["I", "Sure"]  # of FIHS's margin: random weights refuse nothing
SHAPE = {  # Llama 3 8B
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
SCORERS = (
    "trajectory",
    "refusal_place",
    {"gradshield": {"depth": 1.0}},
    "opening_margin",
    "refusal_loss",
    "self_refusal",
    "similarity",
    "larf",
    "anchor",
    "dsa",
)
ASFT = {"asft": {"base": "builtin:smollm2", "aligned": "builtin:smollm2-aligned"}}
ARMS: dict[str, list[Any]] = {
    "sft": ["sft"],
    "safegrad": ["safegrad"],
    "safegrad_sft": [{"safegrad": {"align": "sft", "rho": 3}}],
    "metric_safegrad": ["metric_safegrad"],
    "star_dss": ["star_dss"],
    "asft": [ASFT],
    "constrained_sft": ["constrained_sft"],
    "spard": ["spard"],
    "lisa": ["lisa"],
    "safe_instr": ["safe_instr"],
    "booster": ["booster"],
    "composition": ["star_dss", ASFT, {"safegrad": {"align": "sft"}}],
}
Way = tuple[float, Callable[[], float]]  # its floor in forwards, and the seconds that it takes
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2, "warmup_steps": 0, "lr_scheduler_type": "constant"}


def run_of(arms: Mapping[str, Sequence[Any]], rows: int) -> dict[str, Any]:
    """The quickstart in float32 with these arms, two steps of plain gradient descent and a few answers."""
    tree = copy.deepcopy(recipe.TREE)
    tree["model"]["dtype"] = "float32"
    tree["data"]["task"]["take"] = rows
    tree["scan"]["scorers"] = list(SCORERS)
    tree["train"] = {"adapter": recipe.ADAPTER | {"r": 2}, "per_device_train_batch_size": 4, "bf16": False, **SGD}
    columns = {name: {"columns": {"star": "trajectory"}} for name, train in arms.items() if "star_dss" in train}
    tree["arms"] = {"start": {}} | {name: {"train": train} | columns.get(name, {}) for name, train in arms.items()}
    tree["measure"]["suites"] = [{"asr": {"prompts": "builtin:harmful-test", "take": 16}}]
    tree["gate"] = {"arm": next(iter(arms)), "min_n": 1}
    return tree


def relative(ours: torch.Tensor, other: torch.Tensor) -> float:
    """|ours - other| / |other|, in float64."""
    difference = ours.double() - other.double()
    return float(difference.norm() / other.double().norm())


def exact(bench: Bench, arms: Mapping[str, Sequence[Any]], rows: int) -> None:
    """Records of the differences between a run with the GPU and one without."""
    file = bench.keep / "exact.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(run_of(arms, rows), sort_keys=False), encoding="utf-8")
    folders = {name: bench.keep / name for name in ("gpu", "cpu")}
    for name, folder in folders.items():
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if name == "cpu" else {}
        command = [sys.executable, "-m", "safebasin", "run", str(file), "--out", str(folder)]
        begun = time.perf_counter()
        if (code := subprocess.run(command, env=os.environ | hidden).returncode) not in (0, 3, 4):
            raise UserError(f"the run on the {name} ended with exit code {code}")
        bench.record(f"exact.seconds.{name}", time.perf_counter() - begun, n=1, unit="s, the whole run")
    tables = [folder / "scan" / "scores.parquet" for folder in folders.values()]
    for column in pyarrow.parquet.read_schema(tables[0]).names if tables[0].is_file() else ():  # an arm needed a scan
        if column.startswith("score_"):
            a, b = (
                torch.tensor(pyarrow.parquet.read_table(t)[column].to_pylist(), dtype=torch.float64) for t in tables
            )
            what = f"exact.scan.{column.removeprefix('score_')}"
            bench.record(what, relative(a, b), n=len(a), unit="relative difference of the scores")
    for arm in arms:
        a, b = (
            load_file(folder / "arms" / arm / "adapter" / "adapter_model.safetensors") for folder in folders.values()
        )
        grown = sorted(name for name in b if "lora_B" in name)  # B starts at zero: it is the update
        a, b = (torch.cat([each[name].flatten() for name in grown]) for each in (a, b))
        bench.record(f"exact.train.{arm}", relative(a, b), n=len(a), unit="relative difference of the update")
    for arm in ("start", *arms):
        a, b = (answers_of(folder / "arms" / arm) for folder in folders.values())
        equal = sum(a[key] == b[key] for key in b) / len(b)
        bench.record(f"exact.answers.{arm}", equal, n=len(b), unit="share of answers that are the same text")


def answers_of(folder: Path) -> dict[str, str]:
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["prompt"]: row["answer"] for row in map(json.loads, lines)}


def speed(bench: Bench, repeats: int) -> None:
    """Records of a scan beside an epoch of plain tuning, on the quickstart's rows."""
    loaded = load(recipe.MODEL)
    rows, _ = recipe.training_rows(loaded.tokenizer, 320, 56)
    bench.facts["dtype"] = str(loaded.model.dtype).removeprefix("torch.")
    anchors = {"probe": encoded(loaded, rows_of("refusals")[:100], "probe")}
    ways: dict[str, Callable[[], float]] = {"sft": plain_epoch(loaded, rows)}
    for spec in ("trajectory", "gradshield", {"gradshield": {"depth": 1.0}}):
        name = spec if isinstance(spec, str) else "gradshield.all_layers"
        ways[name] = scan_of(loaded, rows, spec, anchors, 32)
    values = take_turns(ways, repeats)
    bench.timing("sft.rows", [len(rows) / value for value in values["sft"]], unit="rows a second")
    for name in list(ways)[1:]:
        bench.timing(f"{name}.rows", [len(rows) / value for value in values[name]], unit="rows a second")
        bench.timing(f"{name}.epoch_ratio", ratios(values, name, "sft"), unit="epochs of plain tuning on padded rows")


def scan_of(
    loaded: ModelAndTokenizer, rows: Sequence[TokenizedRow], spec: Any, anchors: Any, batch: int
) -> Callable[[], float]:
    """The seconds of a scan by one scorer, fitted before."""
    scorers = {"it": scorer.make(spec)}
    fitted = fit_scorers(*loaded, scorers, anchors)
    return lambda: seconds(
        functools.partial(score_rows, *loaded, rows, scorers, anchors, batch_size=batch, fitted=fitted)
    )


def large(bench: Bench, count: int, batch: int, repeats: int) -> None:
    """Records of a forward, a scan and plain tuning at the shape of 8B."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, chance = load_tokenizer(recipe.MODEL), random.Random(0)
    with device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.bfloat16).eval()
    loaded = ModelAndTokenizer(model, tokenizer)
    met = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    rows = [
        TokenizedRow(
            f"row-{i}",
            [chance.randrange(1000, 40000) for _ in range(TOKENS)],
            [k >= TOKENS - ANSWER for k in range(TOKENS)],
        )
        for i in range(count)
    ]
    anchors = {"probe": encoded(loaded, rows_of("refusals")[:100], "probe")}
    bench.facts |= {"weights": met, "rows": count, "batch": batch, "tokens": TOKENS}
    forward = functools.partial(forwards, model, rows, batch)
    ways: dict[str, Way] = {"forward": (1.0, functools.partial(seconds, forward))}
    for name, passes, spec in (
        ("gradshield", 1.5, {"gradshield": {"tokens": WORDS}}),
        ("trajectory", 1.5, "trajectory"),
        ("gradshield.all_layers", 3.0, {"gradshield": {"depth": 1.0, "tokens": WORDS}}),
    ):
        way = scan_of(loaded, rows, spec, anchors, batch)
        ways |= {f"{name}.{tokens}": (passes, in_sequences(tokens, way)) for tokens in SEQUENCES}

    def measure(ways: Mapping[str, Way]) -> None:
        values = take_turns({name: way for name, (_, way) in ways.items()}, repeats)
        for name, (passes, _) in ways.items():
            share = [2 * met * TOKENS * count * passes / PEAK / value for value in values[name]]
            bench.timing(f"large.{name}.tokens", [TOKENS * count / v for v in values[name]], unit="tokens a second")
            bench.timing(f"large.{name}.peak_share", share, unit=f"share of {PEAK / 1e12:.0f} TFLOP/s")

    measure(ways)
    measure({"sft": (2.0, epoch_of(model, tokenizer, rows, batch))})  # the adapter comes last: it stays in the model
    if torch.cuda.is_available():
        bench.record("large.memory", torch.cuda.max_memory_allocated() / 2**30, n=1, unit="GiB, the most at once")


def in_sequences(tokens: int, way: Callable[[], float]) -> Callable[[], float]:
    """With rows in sequences of so many tokens (``safebasin.tree.SEQUENCE``)."""

    def patched() -> float:
        with mock.patch("safebasin.tree.SEQUENCE", tokens):
            return way()

    return patched


@torch.inference_mode()
def forwards(model: Any, rows: Sequence[TokenizedRow], batch: int) -> None:
    """One forward of all rows; the head at answer positions alone."""
    for i in range(0, len(rows), batch):
        ids = torch.tensor([row.ids.tolist() for row in rows[i : i + batch]], device=model.device)
        model(input_ids=ids, logits_to_keep=ANSWER + 1, use_cache=False)


@experiment("gpu", replaces=("what",), quick={"part": ("exact",), "arms": ("sft", "safegrad_sft"), "rows": 12})
def gpu(
    *,
    bench: Bench,
    part: Annotated[tuple[Literal["exact", "speed", "large"], ...], Parameter(help="some of the parts")] = (
        "exact",
        "speed",
        "large",
    ),
    arms: Annotated[tuple[Literal[tuple(ARMS)], ...], Parameter(help="in the part exact")] = tuple(ARMS),
    rows: Annotated[int, Parameter(help="of the task, in the part exact")] = 40,
    count: Annotated[int, Parameter(help="rows of 512 tokens, in the part large")] = 64,
    batch: Annotated[int, Parameter(help="rows a batch, in the part large")] = 8,
    repeats: Annotated[int, Parameter(help="of a timing, after one that does not count")] = 5,
) -> None:
    """Does a GPU compute what a CPU computes, and how far is it from what it could do?"""
    if "exact" in part:
        exact(bench, {arm: ARMS[arm] for arm in arms}, rows)
    if "speed" in part:
        speed(bench, repeats)
    if "large" in part:
        large(bench, count, batch, repeats)
