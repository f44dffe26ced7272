"""What safety tuning, or tuning after it, did inside: clusters, null space, effects, extrapolation (Jain et al. 2024, arXiv:2407.10264).

The equations stand in measure/mechanics.py: separation is (1), null_sine (2), effect (3). For (4) the first matrix of every MLP is set to
W_start + alpha dW, the rest is as tuned, and answers to both files are judged: 0 takes the change of these matrices away, above 1 goes on.

The interval of a separation joins Student's of both kinds as independent; a sine has none: singular vectors are no sample.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor

from safebasin.data.records import Measurement
from safebasin.data.source import open_prompts
from safebasin.errors import UserError
from safebasin.measure import suite
from safebasin.measure.judge import Verdict
from safebasin.measure.landscape import verdicts
from safebasin.measure.mechanics import MLP, Block, asked, compare
from safebasin.measure.subject import Subject, count, distinct
from safebasin.stats import mean
from safebasin.vector import Vector

Samples = Sequence[Float[Tensor, " n"]]
HITS = ("over_refusal", Verdict.REFUSED), ("asr", Verdict.COMPLIED)  # of safe and of unsafe requests


@suite("mechanics", paper="arXiv:2407.10264", roles=("start",))
class Mechanics:
    """How safe and unsafe requests are told apart in every block, what the change does there, and what more of it does."""

    safe: str  # prompts
    unsafe: str
    take: int | None = None  # of each file
    seed: int = 0
    k: PositiveInt = 3  # largest parts of dW
    alphas: tuple[float, ...] = (0.0, 1.0, 1.5)  # (): none is asked
    judges: tuple[str, ...] = ("classifier",)  # one
    max_new_tokens: PositiveInt = 24
    mlp: tuple[str, str] = MLP
    name: str = "mechanics"

    def measure(self, subject: Subject) -> Iterator[Measurement]:
        paths = (self.safe, self.unsafe)
        kinds = [
            [p.text for p in distinct(self.name, open_prompts(path, take=self.take, seed=self.seed))] for path in paths
        ]
        for path, kind in zip(paths, kinds, strict=True):
            if len(kind) < 2:
                raise UserError(f"{self.name}: {path} gives {len(kind)} prompt; a cluster has two at least")
        if subject.start is None:
            raise UserError(f"{self.name} compares with the start model and has none here; measure it in a run")
        judge = subject.one_judge(self.name, self.judges) if self.alphas else None
        rows = [asked(subject.loaded, subject.turns(kind)) for kind in kinds]
        blocks, d = [], Vector()
        for block in compare(subject.start, subject.loaded, *rows, self.k, self.mlp):
            blocks.append(block)
            yield from self.of([block], f"layer {len(blocks)}")
            if len(block.angles.sines):
                name = f"{block.module}.weight"
                tuned, start = (
                    loaded.model.get_parameter(name).detach().float() for loaded in (subject.loaded, subject.start)
                )
                d[name] = tuned - start
        yield from self.of(blocks, "")
        for alpha in self.alphas if judge and d else ():  # without a change every alpha is the same model
            for (what, hit), kind in zip(HITS, kinds, strict=True):
                told = verdicts(subject, judge, kind, [(alpha - 1, d)], self.max_new_tokens)
                yield count(self.name, what, hit, told, judge=self.judges[0], category=f"alpha {alpha:g}")

    def of(self, blocks: Sequence[Block], category: str) -> Iterator[Measurement]:
        """The numbers of one block, or the means over all."""
        start, tuned, effect = (
            [b.start_margins for b in blocks],
            [b.tuned_margins for b in blocks],
            [b.effects for b in blocks],
        )
        for what, pairs in (("separation_start", start), ("separation", tuned)):
            yield self.told(what, [torch.stack(kind).mean(0) for kind in zip(*pairs, strict=True)], category)
        for what, kind in zip(("effect_safe", "effect_unsafe"), zip(*effect, strict=True), strict=True):
            yield self.told(what, [torch.stack(kind).mean(0)], category)
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

    def told(self, what: str, samples: Samples, category: str) -> Measurement:
        """The sum of the samples' means."""
        means, n = [mean(sample.tolist()) for sample in samples], sum(map(len, samples))
        value = sum(middle for middle, _ in means)
        if not math.isfinite(value):
            return Measurement(self.name, what, None, None, None, 0, n, unit="activation", category=category)
        half = math.hypot(*(interval.high - middle for middle, interval in means))
        return Measurement(self.name, what, value, value - half, value + half, n, unit="activation", category=category)
