"""What a step of every training method costs beside a step of plain tuning, in time and in memory.

The weights are frozen and an adapter is tuned, so a backward pass goes to the activations alone and costs as much as a
forward pass. F is a forward pass over the task's batch, w F one over the alignment batch (w is about 1/4 with one
alignment row to four of the task), h F the head alone at a row's answer tokens, P the numbers that AsFT's penalty
multiplies by r columns, whatever the batch. Logits of the reference are cached: from the second time on a row costs the
head alone. The timed steps are such, but for ``_first``, where the reference runs a forward.

    method                          passes over the task            over alignment rows           floor: cost over 2 F
    sft                             forward, backward                                             1
    safegrad, metric_safegrad (kl)  forward, backward               forward, backward, head       1 + w + h / 2
    safegrad_first                  forward, backward               forward, reference, backward  1 + 3 w / 2
    safegrad_every4 (kl)            forward, backward               a quarter of safegrad's       1 + w / 4 + h / 8
    safegrad (sft), spard           forward, backward               forward, backward             1 + w
    safe_instr                      forward, backward               forward, backward             1 + w
    star_dss, constrained_sft       forward, backward, head                                       1 + h / 2
    star_dss_first                  forward, reference, backward                                  3 / 2
    asft                            forward, backward, r P                                        1 + r P / 2 F
    lisa, a step of the task        forward, backward                                             1
    composition                     forward, backward, head, r P    forward, backward, head       the sum of its parts
    composition_first               forward, reference, back., r P  forward, reference, backward  (3 + 3w + rP / F) / 2

``sft`` is plain tuning on packed rows, ``padded`` the same on padded rows, as every trainer elsewhere runs them.
``packed.step_ratio`` is sft over padded, ``NAME.step_ratio`` a method on packed rows over padded plain tuning,
``NAME.packed_ratio`` over packed plain tuning. ``NAME.padded_ratio`` (2026-11-21) is of padded rows over padded rows.

The floor of a record is counted from the batches that were timed, in multiply-adds: every token that is run goes
through the weights of the layers, every position that predicts an answer through the head. Attention's own products,
the work over the vocabulary after the head, the adapter and the optimizer are not in it. Lisa takes one step of
alignment in the warm-up; a step of alignment costs w. Of safegrad_every4 a value is of four steps on end, one of which
computes the alignment gradient, over plain tuning's four on the same rows.

One model serves all methods in turn: a method's adapter is copied in before its step and out after it, and each has an
optimizer of its own. A ratio is of two steps on the same rows. Memory is the peak resident size of a process, with
weights and interpreter, that takes a few steps of one method.

Records of each number of threads (OMP_NUM_THREADS) and of rows stand side by side: a second pass over one row gains
little from a second thread, so ratios on one thread are nearer to their floors; with ``--accumulation 4`` there are
four alignment rows a step, a quarter as ever, and AsFT's penalty is paid once in sixteen rows.
"""

import dataclasses
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Annotated, Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from cyclopts import Parameter
from transformers import TrainingArguments

from benchmarks import recipe
from benchmarks.harness import ROOT, Bench, experiment, ratios, seconds, take_turns
from safebasin.batch import Batch, pack
from safebasin.errors import UserError
from safebasin.models.adapter import fresh_adapter
from safebasin.models.load import load
from safebasin.runtime import keep_memory, resolved
from safebasin.train.compose import Composition
from safebasin.train.reference import CachedBatch, ReferenceCache, reference_logits
from safebasin.train.settings import training_arguments
from safebasin.train.stream import Stream
from safebasin.train.trainer import OracleTrainer, streams_of
from safebasin.vector import trainable

WARM_UP = 2  # steps that are not counted: first touch of memory, and a KL that is silent at the start
CHILD_STEPS = 4  # of a process whose memory is measured
MEMORY = ("safegrad", "star_dss")
GOALS = {
    "packed.step_ratio": "<= 0.70",
    "safegrad.step_ratio": "<= 1.05",
    "safegrad.packed_ratio": "<= 1.25",
    "safegrad_every4.packed_ratio": "<= 1.25",
    "asft.step_ratio": "<= 1.03",
    "star_dss.step_ratio": "<= 1.05",
    "composition.step_ratio": "<= 1.15",
}
ROWS = (320, 56)  # of the task, and harmful ones: the quickstart's


class Way(NamedTuple):
    """A method to time, and its floor.

    ``task``, ``align``: passes over these rows. ``cached``: streams whose reference logits are there before the step.
    ``penalty``: AsFT's. ``padded``: rows are not packed. ``every``: steps to a pass over the alignment rows.
    """

    specs: tuple[Any, ...]
    task: int = 2
    align: int = 0
    cached: tuple[str, ...] = ()
    penalty: bool = False
    padded: bool = False
    every: int = 1


def methods(base: str, aligned: str) -> dict[str, Way]:
    """The methods that are timed; ``base`` and ``aligned`` are the models before and after alignment."""
    asft = {"asft": {"base": base, "aligned": aligned}}
    return {
        "sft": Way(("sft",)),
        "padded": Way(("sft",), padded=True),
        "safegrad": Way(("safegrad",), align=2, cached=("align",)),
        "safegrad_every4": Way(({"safegrad": {"every": 4}},), align=2, cached=("align",), every=4),
        "safegrad_first": Way(("safegrad",), align=3),
        "safegrad_sft": Way(({"safegrad": {"align": "sft"}},), align=2),
        "metric_safegrad": Way(("metric_safegrad",), align=2, cached=("align",)),
        "asft": Way((asft,), penalty=True),
        "star_dss": Way(("star_dss",), cached=("task",)),
        "star_dss_first": Way(("star_dss",), task=3),
        "constrained_sft": Way(("constrained_sft",), cached=("task",)),
        "spard": Way(("spard",), align=2),
        "lisa": Way(({"lisa": {"align_steps": 1, "task_steps": 10**6}},)),
        "safe_instr": Way(("safe_instr",), align=2),
        "composition": Way(("star_dss", asft, "safegrad"), align=2, cached=("task", "align"), penalty=True),
        "composition_first": Way(("star_dss", asft, "safegrad"), task=3, align=3, penalty=True),
    }


class Setting(NamedTuple):
    """What all methods share."""

    model: Any  # with its fresh adapter
    args: TrainingArguments
    streams: Mapping[str, Stream]


def setting(name: str, accumulation: int = 1, dtype: str = "auto") -> Setting:
    """The quickstart's adapter, arguments and kinds of rows on a model; the column ``star`` is random."""
    loaded = load(name, dtype=dtype)
    mixed, _ = recipe.training_rows(loaded.tokenizer, *ROWS)
    draw = np.random.default_rng(0)
    task = [dataclasses.replace(row, columns={"star": draw.random(sum(row.answer)).tolist()}) for row in mixed]
    align = recipe.rows(loaded.tokenizer, recipe.TREE["data"]["align"])
    settings = {"gradient_accumulation_steps": accumulation, "bf16": resolved(dtype) == "bfloat16"}
    args = training_arguments(recipe.ARGUMENTS | settings, ROOT / "runs")
    streams = streams_of({"task": task, "align": align}, args, loaded.tokenizer.pad_token_id)
    return Setting(fresh_adapter(loaded.model, recipe.ADAPTER, 0), args, streams)


class Turn:
    """A method's run on the shared model: its host, its optimizer, and its adapter while other methods run."""

    def __init__(self, way: Way, shared: Setting):
        self.cached = way.cached
        self.rows = mock.patch("safebasin.batch.padded_because", lambda _: "timed") if way.padded else nullcontext()
        self.host = OracleTrainer(shared.model, shared.args, Composition.of(way.specs), shared.streams)
        self.host.create_optimizer()
        self.point = {name: p.detach().clone() for name, p in trainable(shared.model).items()}

    def step(self) -> float:
        """Seconds of one optimizer step as the Trainer takes it.

        Copying the adapter and filling the cache of reference logits are not timed.
        """
        host, step = self.host, self.host.state.global_step
        if host._oracle is not None:  # it is there from the first step on, which is one of the warm-up
            cache = host._oracle.reference_cache = ReferenceCache(host.model)
            for batch in (batch for name in self.cached for batch in host.streams[name].at(step)):
                reference_logits(host.model, CachedBatch(**vars(batch.to(host.args.device)), cache=cache))
        parameters = trainable(host.model)
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(self.point[name])

        def update() -> None:
            host.training_step(host.model, {})
            host.accelerator.clip_grad_norm_(parameters.values(), host.args.max_grad_norm)
            host.optimizer.step()
            host.optimizer.zero_grad()

        with self.rows:
            duration = seconds(update)
        host.state.global_step += 1
        for name, p in parameters.items():
            self.point[name].copy_(p.detach())
        return duration


def turns(chosen: Mapping[str, Way], shared: Setting) -> dict[str, Turn]:
    """All hosts are built before the first step: each sees the adapter fresh. The model is wrapped once."""
    hosts = {name: Turn(way, shared) for name, way in chosen.items()}
    next(iter(hosts.values())).host.accelerator.prepare_model(shared.model)
    return hosts


def run(hosts: Mapping[str, Turn], steps: int, warm_up: int = 0) -> dict[str, list[float]]:
    """Seconds of every method's steps, side by side."""
    return take_turns({name: turn.step for name, turn in hosts.items()}, steps, warm_up=warm_up)


class Work(NamedTuple):
    """Weights that a token meets: ``layers`` every token, ``head`` every position that predicts.

    The ``anchor`` numbers of AsFT's penalty meet ``rank`` columns.
    """

    layers: int
    head: int
    anchor: int
    rank: int

    @classmethod
    def of(cls, model: Any) -> "Work":
        head = model.get_output_embeddings()
        linear = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head and "lora_" not in name
        }
        shapes = [module.weight.shape for name, module in linear.items() if name.endswith("base_layer")]
        anchor = sum(out * out if out <= into else 2 * out * into + into * into for out, into in shapes)
        layers = sum(module.weight.numel() for module in linear.values())
        return cls(layers, head.weight.numel(), anchor, model.peft_config["default"].r)

    def forward(self, batches: Sequence[Batch], *, padded: bool = False) -> int:
        """Multiply-adds of a forward over a step's micro-batches."""
        count = 0
        for batch in batches:
            packed = None if padded else pack(batch)
            if packed is None:
                tail = batch.mask.shape[1] + 1
                count += len(batch.mask) * (batch.input_ids.shape[1] * self.layers + tail * self.head)
            else:
                count += len(packed.attends) * self.layers + len(packed.predicts) * self.head
        return count

    def floor(self, way: Way, task: Sequence[Batch], align: Sequence[Batch], plain: Way) -> float:
        """The least cost of a step over one of plain tuning."""
        products = 1.0 * self.rank * self.anchor * way.penalty
        for name, part, passes, steps in (("task", task, way.task, 1), ("align", align, way.align, way.every)):
            heads = self.head * sum(int(batch.mask.sum()) for batch in part) if name in way.cached else 0
            products += (passes * self.forward(part, padded=way.padded) + heads) / steps
        return products / (2 * self.forward(task, padded=plain.padded))


def step_ratios(bench: Bench, chosen: Mapping[str, Way], shared: Setting, steps: int) -> None:
    """Records of time; a ratio is of the same step of plain tuning."""
    values = run(turns(chosen, shared), steps, WARM_UP)
    work, counted = Work.of(shared.model), range(WARM_UP, WARM_UP + steps)
    bench.timing("sft.seconds", values["sft"], unit="s")
    bench.timing("padded.seconds", values["padded"], unit="s")
    batches = [[shared.streams[stream].at(step) for stream in ("task", "align")] for step in counted]
    for name, way in chosen.items():
        for plain, record in (("padded", "step_ratio"), ("sft", "packed_ratio")):
            if name == plain or (name, plain) == ("padded", "sft"):
                continue
            floor = float(np.median([work.floor(way, *pair, chosen[plain]) for pair in batches]))
            what = f"{'packed' if name == 'sft' else name}.{record}"
            goal = " and ".join([f"floor {floor:.3f}", *([GOALS[what]] if what in GOALS else [])])
            cycles = {each: in_cycles(values[each], way.every) for each in (name, plain)}
            bench.timing(what, ratios(cycles, name, plain), goal=goal)


def in_cycles(values: Sequence[float], every: int) -> list[float]:
    """Seconds of so many steps on end; a rest of fewer is left out."""
    return [sum(values[i : i + every]) for i in range(0, len(values) - every + 1, every)]


def peak(name: str, model: str, base: str, accumulation: int) -> float:
    """Peak resident size in MiB of a process that takes a few steps of one method and nothing else."""
    code = f"from benchmarks.train.train import child; child({name!r}, {model!r}, {base!r}, {accumulation})"
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ).stdout
    return float(output.split()[-1])


def child(name: str, model: str, base: str, accumulation: int) -> None:
    """Take a few steps of one method, then print the peak resident size of this process in MiB."""
    keep_memory()
    run(turns({name: methods(base, model)[name]}, setting(model, accumulation)), CHILD_STEPS)
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(size / (2**20 if sys.platform == "darwin" else 2**10))


def peaks(model: str, base: str, accumulation: int, repetitions: int) -> dict[str, list[float]]:
    """``peak`` of plain tuning and of the methods whose memory is measured, by repetition."""
    ways = {name: lambda name=name: peak(name, model, base, accumulation) for name in ("sft", *MEMORY)}
    return take_turns(ways, repetitions, warm_up=0)


def memory_ratios(bench: Bench, sizes: Mapping[str, Sequence[float]]) -> None:
    """Records of memory; a ratio is over plain tuning in the same repetition. With no second model the floor is 1."""
    bench.timing("sft.memory", sizes["sft"], unit="MiB")
    for name in MEMORY:
        bench.timing(f"{name}.memory_ratio", ratios(sizes, name, "sft"), goal="floor 1.000")


@experiment("train", replaces=("what", "threads", "rows"), quick={"steps": 2, "repetitions": 0, "only": ("safegrad",)})
def train(
    *,
    bench: Bench,
    model: Annotated[str, Parameter(help="the model that is tuned")] = recipe.MODEL,
    base: Annotated[str, Parameter(help="the weights before alignment, for asft")] = "builtin:smollm2",
    steps: Annotated[int, Parameter(help=f"of every method, after {WARM_UP} that do not count; two or more")] = 20,
    accumulation: Annotated[int, Parameter(help="micro-batches of four rows an optimizer step")] = 1,
    only: Annotated[tuple[str, ...], Parameter(help="some of the methods")] = (),
    repetitions: Annotated[int, Parameter(help="of a memory measurement; two or more, 0 leaves memory out")] = 3,
) -> None:
    """What does a step of every training method cost beside plain tuning, in time and memory?"""
    if steps < 2 or repetitions == 1:
        raise UserError("an interval needs two values or more: set --steps and --repetitions")
    # Memory first: a process inherits the peak of the one that starts it, and this one holds no model yet.
    sizes = peaks(model, base, accumulation, repetitions) if repetitions else {}
    ways, plain = methods(base, model), ("sft", "padded")
    short = [name for name, way in ways.items() if steps < 2 * way.every]
    if named := sorted(set(only) & set(short)):
        raise UserError(
            f"an interval of {named[0]} needs two cycles: set --steps to {2 * ways[named[0]].every} or more"
        )
    chosen = {name: way for name, way in ways.items() if name in plain or name in only or not (only or name in short)}
    shared = setting(model, accumulation)
    bench.facts |= {"model": model, "rows": shared.streams["task"].batch, "align_rows": shared.streams["align"].batch}
    if sizes:
        memory_ratios(bench, sizes)
    step_ratios(bench, chosen, shared, steps)
