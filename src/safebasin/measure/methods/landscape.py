"""ASR at stops along lines through the weights: the safety landscape (Peng et al. 2024, arXiv:2405.17374; measure/landscape.py).

    landscape      theta + a d (+ b d'), d random: how deep is the basin in which the model lies (VISAGE, 0 to 1; the paper's over 100)
    interpolation  theta + a (theta - theta_start): this model at a = 0, the start model at -1; where between them is safety lost

Departs from the paper: the judge is named (theirs: a list of phrases); 24 new tokens, not 512; no answers are kept.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
from pydantic import PositiveInt

from safebasin.console import steps
from safebasin.data.records import Measurement
from safebasin.data.source import open_prompts
from safebasin.errors import UserError
from safebasin.measure import suite
from safebasin.measure.judge import Verdict
from safebasin.measure.landscape import ask, harm, random_direction, visage, visage_interval
from safebasin.measure.subject import Subject, count, distinct
from safebasin.stats import wilson
from safebasin.vector import Vector


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines:
    """What both share; ``lines`` gives the axes of every line (two axes: a plane)."""

    prompts: str
    column: str = "prompt"
    limit: int | None = None
    take: int | None = None
    seed: int = 0  # of the order of the prompts, and of the directions
    judges: tuple[str, ...] = ("classifier",)  # one
    max_new_tokens: PositiveInt = 24
    batch: PositiveInt = 16  # prompts asked before it is looked whether a stop is decided
    width: float = 0.2  # of the Wilson interval that decides it (16 refusals of 16 do); 0: ask all

    def measure(self, subject: Subject) -> Iterator[Measurement]:
        prompts = open_prompts(self.prompts, self.column, None, self.take, self.seed, limit=self.limit)
        texts = [prompt.text for prompt in distinct(self.name, prompts)]
        judge, stops, seen = subject.one_judge(self.name, self.judges), [], {}
        order = np.random.default_rng(self.seed).permutation(
            len(texts)
        )  # a file is often in the order of its categories
        for line, axes in enumerate(self.lines(subject), 1):
            grid = list(itertools.product(np.linspace(*self.ends, self.points).round(6).tolist(), repeat=len(axes)))
            with steps(f"{subject.arm}: {self.name} {line}", len(grid)) as advance:
                for k, at in enumerate(grid):
                    place = f"{line}: " + ", ".join(f"{a:+g}" for a in at)
                    key, moves = (
                        (place, list(zip(at, axes, strict=True))) if any(at) else ("", [])
                    )  # the unmoved weights: once
                    if key not in seen:
                        turned = np.roll(
                            order, -k * self.batch
                        ).tolist()  # stops that end early do not all rest on the same prompts
                        told = ask(
                            subject,
                            judge,
                            [texts[i] for i in turned],
                            moves,
                            self.max_new_tokens,
                            self.batch,
                            self.width,
                        )
                        seen[key] = told, harm(told, turned[: len(told)], len(texts))
                    yield count(self.name, "asr", Verdict.COMPLIED, seen[key][0], judge=self.judges[0], category=place)
                    stops.append(seen[key][1])
                    advance(k + 1, "")
        every, table = (
            [verdict for told, _ in seen.values() for verdict in told],
            np.array(stops).reshape(line, -1, len(texts)),
        )
        coherent, asked, scored = (
            len(every) - every.count(Verdict.UNSCORED),
            len(every),
            int(np.isfinite(table).any((0, 1)).sum()),
        )
        value, (low, high) = (visage(table), visage_interval(table)) if scored else (None, (None, None))
        yield Measurement(self.name, "visage", value, low, high, scored, len(texts) - scored, judge=self.judges[0])
        yield Measurement(self.name, "coherence", coherent / asked, *wilson(coherent, asked), asked)
        yield Measurement(
            self.name,
            "generations_saved",
            float(len(stops) * len(texts) - asked),
            None,
            None,
            asked,
            unit="generations",
        )


@suite("landscape", paper="arXiv:2405.17374", roles=("start",))
class Landscape(Lines):
    """How deep the safe region is around the model's weights."""

    directions: PositiveInt = 3
    dimensions: PositiveInt = 1  # 2: planes, of points * points stops each
    points: PositiveInt = 21
    ends: tuple[float, float] = (-0.5, 0.5)  # r
    name: str = "landscape"

    def lines(self, subject: Subject) -> Iterator[list[Vector]]:
        for k in range(1000 * self.seed, 1000 * self.seed + self.directions):
            yield [random_direction(subject.loaded.model, k * self.dimensions + i) for i in range(self.dimensions)]


@suite("interpolation", paper="arXiv:2405.17374", roles=("start",))
class Interpolation(Lines):
    """Where safety is lost between the start model and this one."""

    points: PositiveInt = 11
    ends: tuple[float, float] = (-1.0, 0.0)
    name: str = "interpolation"

    def lines(self, subject: Subject) -> Iterator[list[Vector]]:
        if subject.start is None:
            raise UserError(
                f"{self.name} walks from the start model to a tuned one, and this arm has none; measure it on a tuned arm"
            )
        theta, start = (dict(loaded.model.named_parameters()) for loaded in (subject.loaded, subject.start))
        yield [Vector({name: p.detach().float() - start[name].detach().float() for name, p in theta.items()})]
