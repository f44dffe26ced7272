"""What safety tuning, or tuning after it, did inside (Jain et al. 2024, arXiv:2407.10264).

Clusters, null space, effects and extrapolation: the equations stand in measure/mechanics.py. separation is (1),
null_sine (2), effect (3). For (4) the first matrix of every MLP is set to W_start + alpha dW, the rest is as tuned, and
answers to both files are judged: alpha = 0 takes the change of these matrices away, above 1 it goes on.

The interval of a separation joins Student's of both kinds as independent; a sine has none: singular vectors are no
sample.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from safebasin.data.records import Measurement
from safebasin.data.source import SetName, open_prompts
from safebasin.errors import UserError
from safebasin.measure import suite
from safebasin.measure.judging import Verdict, check_counts_refusals
from safebasin.measure.landscape import moved_verdicts
from safebasin.measure.mechanics import MLP, Block, compare, prompt_rows
from safebasin.measure.prompts import OneJudge
from safebasin.measure.subject import Subject, count, distinct
from safebasin.stats import mean
from safebasin.vector import Vector

Samples = Sequence[Float[Tensor, " n"]]
HITS = ("over_refusal", Verdict.REFUSED), ("asr", Verdict.COMPLIED)  # of safe and of unsafe requests


@suite("mechanics", paper="arXiv:2407.10264", roles=("start",))
class Mechanics:
    """How far safe and unsafe requests lie from each other in every block, and what the change of the weights does."""

    safe: SetName  # prompts
    unsafe: SetName  # prompts that ask for harm
    take: Annotated[int, Field(ge=2)] | None = None  # of each file
    seed: NonNegativeInt = 0  # of the drawing of prompts
    k: PositiveInt = 3  # largest parts of dW
    alphas: tuple[float, ...] = (0.0, 1.0, 1.5)  # (): none is asked
    judges: OneJudge = ("classifier",)
    max_new_tokens: PositiveInt = 96
    mlp: tuple[str, str] = MLP  # the up and the down projection of a block, by the ends of their names
    name: str = "mechanics"

    def __post_init__(self) -> None:
        check_counts_refusals(self.judges)

    def measure(self, subject: Subject) -> Iterator[Measurement]:
        safe, unsafe = (self.requests(path) for path in (self.safe, self.unsafe))
        if subject.start is None:
            raise UserError(f"{self.name} compares with the start model and has none here; measure it in a run")
        judge = subject.judge(self.name, self.judges[0]) if self.alphas else None
        safe_rows, unsafe_rows = (prompt_rows(subject.merged, subject.turns(texts)) for texts in (safe, unsafe))
        blocks, d = [], Vector()
        for block in compare(subject.start, subject.merged, safe_rows, unsafe_rows, self.k, self.mlp):
            blocks.append(block)
            yield from self.of([block], f"layer {len(blocks)}")
            if len(block.angles.sines):
                name = f"{block.module}.weight"
                tuned, start = (
                    loaded.model.get_parameter(name).detach().float() for loaded in (subject.merged, subject.start)
                )
                d[name] = tuned - start
        yield from self.of(blocks, "")
        if judge is None or not d:  # without a change every alpha is the same model
            return
        for alpha in self.alphas:
            for (what, hit), texts in zip(HITS, (safe, unsafe), strict=True):
                verdicts = moved_verdicts(subject, judge, texts, [(alpha - 1, d)], self.max_new_tokens)
                yield count(self.name, what, hit, verdicts, judge=self.judges[0], category=f"alpha {alpha:g}")

    def requests(self, path: str) -> list[str]:
        """The prompts of a file, each once."""
        prompts = distinct(self.name, open_prompts(path, take=self.take, seed=self.seed))
        if len(prompts) < 2:
            raise UserError(f"{self.name}: {path} gives {len(prompts)} prompt; a cluster has two at least")
        return [prompt.text for prompt in prompts]

    def of(self, blocks: Sequence[Block], category: str) -> Iterator[Measurement]:
        """The numbers of one block, or the means over all."""
        margins = {
            "separation_start": [b.start_margins for b in blocks],
            "separation": [b.tuned_margins for b in blocks],
        }
        for what, pairs in margins.items():
            yield self.summed(what, [torch.stack(kind).mean(0) for kind in zip(*pairs, strict=True)], category)
        for i, what in enumerate(("effect_safe", "effect_unsafe")):
            yield self.summed(what, [torch.stack([b.effects[i] for b in blocks]).mean(0)], category)
        changed = [b.angles for b in blocks if len(b.angles.sines)]  # what did not change has no angle
        n = sum(len(angles.sines) for angles in changed)
        for what, values in (
            ("null_sine", [float(a.sines.mean()) for a in changed]),
            ("null_sine_chance", [a.chance for a in changed]),
        ):
            value = sum(values) / len(values) if values else None
            yield Measurement(
                self.name, what, value, None, None, n, len(blocks) - len(changed), unit="sine", category=category
            )

    def summed(self, what: str, samples: Samples, category: str) -> Measurement:
        """The sum of the samples' means."""
        means, n = [mean(sample.tolist()) for sample in samples], sum(map(len, samples))
        value = sum(middle for middle, _ in means)
        if not math.isfinite(value):
            return Measurement(self.name, what, None, None, None, 0, n, unit="activation", category=category)
        half = math.hypot(*(interval.high - middle for middle, interval in means))
        return Measurement(self.name, what, value, value - half, value + half, n, unit="activation", category=category)
