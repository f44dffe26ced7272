"""What a step of every training method costs beside a step of plain tuning, and what memory. One command: ``python benchmarks/train/run.py``.

Floor, in forwards F of the task's batch. The weights are frozen and an adapter is tuned, so a backward goes to the activations alone and
costs one forward. w F is a forward of the alignment batch; with one alignment row to four of the task w is about 1/4. What the reference says
of a row is kept: from the second time on it is h F, the head at the row's answer tokens. The steps that are timed are such, but for ``_first``, where
the reference runs a forward. P are the numbers that AsFT's penalty multiplies by r columns, whatever the batch (``train/anchor.py``).

    method                          passes over the task                  over alignment rows                   over 2 F        w = 1/4
    sft                             forward, backward                                                           1                  1
    safegrad, metric_safegrad (kl)  forward, backward                     forward, backward, head   2 w + h     1 + w + h / 2      1.25 and a head
    safegrad_first                  forward, backward                     forward, reference, backward  3 w     1 + 3 w / 2        1.375
    safegrad (sft), spard           forward, backward                     forward, backward             2 w     1 + w              1.25
    safe_instr                      forward, backward                     forward, backward             2 w     1 + w              1.25
    star_dss, constrained_sft       forward, backward, head                                                     1 + h / 2          1 and a head
    star_dss_first                  forward, reference, backward                                                3 / 2              1.5
    asft                            forward, backward, r P                                                      1 + r P / 2 F      more than 1
    lisa, a step of the task        forward, backward                                                           1                  1
    composition                     forward, backward, head, r P          forward, backward, head               the sum of its parts
    composition_first               forward, reference, backward, r P     forward, reference, backward  3 w     3 / 2 + 3 w / 2 + r P / 2 F

w, and so the goal of a record, is counted from the batches that were timed, in multiply-adds: every padded token goes through the weights
of the layers, every position that predicts an answer through the head. Attention's own products, the work over the vocabulary after the
head, the adapter and the optimizer are not in it. Lisa takes one step of alignment, in the warm-up; a step of alignment costs w.

One model serves all methods in turn: a method's adapter is copied in before its step and out after it, and the optimizers are their own.
A ratio is of two steps on the same rows, minutes or less apart; the methods take turns at going first. Memory is the peak resident size of a
whole process, weights and interpreter too, that does nothing but a few steps of one method.

Records of each number of threads (OMP_NUM_THREADS) and of rows are kept side by side: a second pass over one row gains little from a second
thread, so that ratios on one thread are nearer to their floors; and with ``--accumulation 4`` the alignment rows are four, a quarter as ever, so
that their pass is as efficient as the task's, and AsFT's penalty is paid once in sixteen rows.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from transformers import TrainingArguments

from safebasin.batch import Batch
from safebasin.data.example import read_examples
from safebasin.data.source import open_examples
from safebasin.encode import encode_all
from safebasin.models.adapter import fresh_adapter
from safebasin.models.load import load
from safebasin.pipeline.config import read
from safebasin.pipeline.old import Pipeline
from safebasin.runtime import keep_memory
from safebasin.train.compose import Composition
from safebasin.train.reference import KNOWN, reference_logits
from safebasin.train.stream import Stream
from safebasin.train.trainer import OracleTrainer, arguments, streams_of
from safebasin.vector import trainable

HERE = Path(__file__).parent
RECIPE = HERE.parents[1] / "recipes" / "quickstart.yaml"
WARM_UP = 2  # steps of every method that are not counted: first touch of memory, and a KL that is silent at the start
CHILD_STEPS = 4  # of a process whose memory is measured
MEMORY = ("safegrad", "star_dss")


class Way(NamedTuple):
    """A method to time, and its floor: passes over the task and over alignment rows, streams of which it knows what the reference says, and
    whether it has AsFT's penalty."""

    specs: tuple[Any, ...]
    task: int = 2
    align: int = 0
    known: tuple[str, ...] = ()
    penalty: bool = False


def ways(base: str, aligned: str) -> dict[str, Way]:
    asft = {"asft": {"base": base, "aligned": aligned}}
    return {
        "sft": Way(("sft",)),
        "safegrad": Way(("safegrad",), align=2, known=("align",)),
        "safegrad_first": Way(("safegrad",), align=3),
        "safegrad_sft": Way(({"safegrad": {"align": "sft"}},), align=2),
        "metric_safegrad": Way(("metric_safegrad",), align=2, known=("align",)),
        "asft": Way((asft,), penalty=True),
        "star_dss": Way(("star_dss",), known=("task",)),
        "star_dss_first": Way(("star_dss",), task=3),
        "constrained_sft": Way(("constrained_sft",), known=("task",)),
        "spard": Way(("spard",), align=2),
        "lisa": Way(({"lisa": {"align_steps": 1, "task_steps": 10**6}},)),
        "safe_instr": Way(("safe_instr",), align=2),
        "composition": Way(("star_dss", asft, "safegrad"), align=2, known=("task", "align"), penalty=True),
        "composition_first": Way(("star_dss", asft, "safegrad"), task=3, align=3, penalty=True),
    }


class Setting(NamedTuple):
    """What all methods share."""

    model: Any  # with its fresh adapter
    args: TrainingArguments
    streams: Mapping[str, Stream]


def setting(name: str, accumulation: int = 1) -> Setting:
    """The quickstart's rows, adapter and arguments on a model; the column ``star`` is drawn at random."""
    with tempfile.TemporaryDirectory() as folder:
        pipeline = Pipeline(
            read(RECIPE, [f"model.name={name}", f"train.gradient_accumulation_steps={accumulation}"]), Path(folder)
        )
        pipeline.data()
        examples = {
            "task": read_examples(pipeline.train_file).examples,
            "align": open_examples(pipeline.config.data.align),
        }
    config = pipeline.config
    loaded = load(name, dtype=config.model.dtype)
    rows = {}
    for stream, told in examples.items():
        rows[stream], bad = encode_all(loaded.tokenizer, told, config.data.max_length)
        if bad:
            raise SystemExit(f"{stream}: line {bad[0].line}: {bad[0].reason}")
    draw = np.random.default_rng(config.seed)
    rows["task"] = [
        dataclasses.replace(row, columns={"star": draw.random(sum(row.answer)).tolist()}) for row in rows["task"]
    ]
    model = fresh_adapter(loaded.model, config.adapter, config.seed)
    args = arguments(config.arguments, Path("runs"))
    return Setting(model, args, streams_of(rows, args, loaded.tokenizer.pad_token_id, config.align_share))


class Turn:
    """A method's run on the model that all share: its host, its optimizer, and its adapter while others are in turn."""

    def __init__(self, way: Way, shared: Setting):
        self.known = way.known
        self.host = OracleTrainer(shared.model, shared.args, Composition.of(way.specs), shared.streams)
        self.host.create_optimizer()
        self.point = {name: p.detach().clone() for name, p in trainable(shared.model).items()}

    def step(self, model: Any) -> float:
        """One optimizer step as the Trainer takes it, in seconds; copying the adapter in and out, and what was known before, are not in them."""
        KNOWN.clear()
        for batch in (
            batch for name in self.known for batch in self.host.streams[name].at(self.host.state.global_step)
        ):
            reference_logits(model, batch.to(self.host.args.device))
        parameters = trainable(model)
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(self.point[name])
        begun = time.perf_counter()
        self.host.training_step(model, {})
        self.host.accelerator.clip_grad_norm_(parameters.values(), self.host.args.max_grad_norm)
        self.host.optimizer.step()
        self.host.optimizer.zero_grad()
        if self.host.args.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        self.host.state.global_step += 1
        for name, p in parameters.items():
            self.point[name].copy_(p.detach())
        return seconds


def turns(chosen: Mapping[str, Way], shared: Setting) -> dict[str, Turn]:
    """All hosts are made before the first step: each sees the adapter fresh. The Trainer's wrapper is put on the model once."""
    made = {name: Turn(way, shared) for name, way in chosen.items()}
    next(iter(made.values())).host.accelerator.prepare_model(shared.model)
    return made


def run(made: Mapping[str, Turn], model: Any, steps: int) -> dict[str, list[float]]:
    """Seconds of every method's steps, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for step in range(steps):
        for name in sorted(made, reverse=step % 2 == 1):
            seconds[name].append(made[name].step(model))
    return seconds


class Work(NamedTuple):
    """Weights that a token meets: ``layers`` every token, ``head`` every position that predicts; the numbers of AsFT's penalty meet ``rank`` columns."""

    layers: int
    head: int
    anchor: int
    rank: int

    @classmethod
    def of(cls, model: Any) -> "Work":
        head = model.get_output_embeddings()
        linear = {
            name: m
            for name, m in model.named_modules()
            if isinstance(m, torch.nn.Linear) and m is not head and "lora_" not in name
        }
        shapes = [m.weight.shape for name, m in linear.items() if name.endswith("base_layer")]
        anchor = sum(out * out if out <= into else 2 * out * into + into * into for out, into in shapes)
        return cls(
            sum(m.weight.numel() for m in linear.values()), head.weight.numel(), anchor, model.peft_config["default"].r
        )

    def forward(self, batches: Sequence[Batch]) -> int:
        """Multiply-adds of a forward over a step's micro-batches."""
        return sum(
            len(b.mask) * (b.input_ids.shape[1] * self.layers + (b.mask.shape[1] + 1) * self.head) for b in batches
        )

    def floor(self, way: Way, task: Sequence[Batch], align: Sequence[Batch]) -> float:
        """The least cost of a step over one of plain tuning."""
        whole = way.task * self.forward(task) + way.align * self.forward(align) + self.rank * self.anchor * way.penalty
        told = sum(
            int(batch.mask.sum())
            for name, batches in (("task", task), ("align", align))
            if name in way.known
            for batch in batches
        )
        return (whole + self.head * told) / (2 * self.forward(task))


def median(values: Sequence[float]) -> tuple[float, list[float]]:
    """The median and its 95 % bootstrap interval (percentiles)."""
    found = stats.bootstrap(
        (values,), np.median, method="percentile", n_resamples=2000, rng=np.random.default_rng(0)
    ).confidence_interval
    return round(float(np.median(values)), 4), [round(float(found.low), 4), round(float(found.high), 4)]


def note(what: str, values: Sequence[float], floor: float | None, unit: str = "x") -> dict[str, Any]:
    value, interval = median(values)
    goal = None if floor is None else f"floor {floor:.3f}"
    return {"what": what, "value": value, "interval": interval, "n": len(values), "goal": goal, "unit": unit}


def step_ratios(chosen: Mapping[str, Way], shared: Setting, steps: int) -> list[dict[str, Any]]:
    """Records of time; a ratio is of the same step of plain tuning."""
    seconds = {
        name: taken[WARM_UP:] for name, taken in run(turns(chosen, shared), shared.model, WARM_UP + steps).items()
    }
    work, counted = Work.of(shared.model), range(WARM_UP, WARM_UP + steps)
    records = [note("sft.seconds", seconds["sft"], None, "s")]
    for name, way in chosen.items():
        floors = [
            work.floor(way, *(shared.streams[stream].at(step) for stream in ("task", "align"))) for step in counted
        ]
        ratios = [mine / plain for mine, plain in zip(seconds[name], seconds["sft"], strict=True)]
        records.append(note(f"{name}.step_ratio", ratios, float(np.median(floors))))
    return records


def peak(name: str, asked: argparse.Namespace) -> float:
    """Peak resident size in MiB of a process of its own that takes a few steps of one method."""
    command = [sys.executable, __file__, "--child", name, "--model", asked.model, "--base", asked.base]
    command += ["--accumulation", str(asked.accumulation)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def child(name: str, asked: argparse.Namespace) -> None:
    shared = setting(asked.model, asked.accumulation)
    run(turns({name: ways(asked.base, asked.model)[name]}, shared), shared.model, CHILD_STEPS)
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(size / (2**20 if sys.platform == "darwin" else 2**10))


def memory_ratios(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Records of memory; a ratio is of plain tuning in the same repetition. The reference is no second model: the floor is 1."""
    sizes = [{name: peak(name, asked) for name in ("sft", *MEMORY)} for _ in range(asked.repetitions)]
    records = [note("sft.memory", [size["sft"] for size in sizes], None, "MiB")]
    return records + [
        note(f"{name}.memory_ratio", [size[name] / size["sft"] for size in sizes], 1.0) for name in MEMORY
    ]


def table(records: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| method | floor | measured | gap |", "| --- | --- | --- | --- |"]
    for record in records:
        if record["goal"]:
            floor, (low, high) = float(record["goal"].split()[-1]), record["interval"]
            measured = f"{record['value']:.2f} ({low:.2f} to {high:.2f})"
            lines.append(f"| {record['what']} | {floor:.2f} | {measured} | {record['value'] / floor - 1:+.0%} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--model", default="builtin:smollm2-aligned", help="the model that is tuned")
    ask.add_argument("--base", default="builtin:smollm2", help="the weights before alignment, for asft")
    ask.add_argument(
        "--steps", type=int, default=20, help=f"of every method, after {WARM_UP} that are not counted; two or more"
    )
    ask.add_argument("--accumulation", type=int, default=1, help="micro-batches of four rows an optimizer step")
    ask.add_argument("--only", type=lambda text: text.split(","), help="some of the methods: safegrad,asft")
    ask.add_argument(
        "--repetitions", type=int, default=3, help="of a memory measurement; two or more, 0 leaves memory out"
    )
    ask.add_argument("--out", type=Path, default=HERE / "results.json")
    ask.add_argument("--child", help=argparse.SUPPRESS)
    asked = ask.parse_args(words)
    if asked.steps < 2 or asked.repetitions == 1:
        ask.error("an interval needs two values or more")
    if asked.child:
        child(asked.child, asked)
        return
    # Memory first: a process starts with the peak of the one that made it, and this one is still small.
    records = memory_ratios(asked) if asked.repetitions else []
    shared = setting(asked.model, asked.accumulation)
    chosen = {
        name: way
        for name, way in ways(asked.base, asked.model).items()
        if name == "sft" or not asked.only or name in asked.only
    }
    records += step_ratios(chosen, shared, asked.steps)
    device = shared.args.device.type
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device}",
        "date": datetime.date.today().isoformat(),
    }
    facts |= {"model": asked.model, "threads": torch.get_num_threads(), "rows": shared.streams["task"].batch}
    facts |= {"align_rows": shared.streams["align"].batch}
    known = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.is_file() else []
    mine = {(record["what"], facts["threads"], facts["rows"]) for record in records}
    kept = [
        record for record in known if (record["what"], record["threads"], record["rows"]) not in mine
    ]  # another number of threads or rows
    asked.out.write_text(
        json.dumps([*kept, *(record | facts for record in records)], indent=1) + "\n", encoding="utf-8"
    )
    print(table(records))


if __name__ == "__main__":
    keep_memory()  # as the command line does
    main()
