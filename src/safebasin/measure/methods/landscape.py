"""ASR at stops along lines through the weights: the safety landscape (Peng et al. 2024, arXiv:2405.17374).

    landscape      theta + a d (+ b d'), d random: how deep is the basin around the model (VISAGE)
    interpolation  theta + a (theta - theta_start): this model at a = 0, the start model at -1; where is safety lost

The equations stand in measure/landscape.py. Departs from the paper: VISAGE is 0 to 1 (theirs: 0 to 100); the judge is
named (theirs: a list of phrases); 24 new tokens, not 512; no answers are recorded.
"""

import abc
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
from jaxtyping import Float
from pydantic import Field, NonNegativeInt, PositiveInt

from safebasin.console import progress
from safebasin.data.records import Measurement
from safebasin.data.source import SetName, open_prompts
from safebasin.errors import UserError
from safebasin.measure import suite
from safebasin.measure.judging import Verdict
from safebasin.measure.landscape import ask, harm, random_direction, visage, visage_interval
from safebasin.measure.prompts import OneJudge
from safebasin.measure.subject import Subject, count, distinct
from safebasin.stats import wilson
from safebasin.vector import Vector


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines(abc.ABC):
    """What both share; ``lines`` gives the axes of every line (two axes: a plane)."""

    prompts: SetName
    column: str = "prompt"
    limit: PositiveInt | None = None  # rows looked at; the rest of the file may be the attack's
    take: PositiveInt | None = None
    seed: NonNegativeInt = 0  # of the order of the prompts, and of the directions
    judges: OneJudge = ("classifier",)
    max_new_tokens: PositiveInt = 96
    batch: PositiveInt = 16  # prompts asked between two checks whether a stop is decided
    width: Annotated[float, Field(ge=0, le=1)] = 0.2  # of the Wilson interval that decides a stop; 0: ask all
    points: PositiveInt = 21  # stops along an axis
    ends: tuple[float, float] = (-0.5, 0.5)  # of a
    name: str = "landscape"

    @abc.abstractmethod
    def lines(self, subject: Subject) -> Iterator[list[Vector]]:
        """The axes of one line after the other."""

    def measure(self, subject: Subject) -> Iterator[Measurement]:
        prompts = open_prompts(self.prompts, self.column, None, self.take, self.seed, limit=self.limit)
        texts = [prompt.text for prompt in distinct(self.name, prompts)]
        judge = subject.judge(self.name, self.judges[0])
        order = np.random.default_rng(self.seed).permutation(len(texts))  # files are often in the order of categories
        (low, high), table = self.ends, []
        visited: dict[str, tuple[list[Verdict], Float[np.ndarray, " prompts"]]] = {}
        for line, axes in enumerate(self.lines(subject), 1):
            grid = list(itertools.product(np.linspace(low, high, self.points).round(6).tolist(), repeat=len(axes)))
            stops = []
            with progress(f"{subject.arm}: {self.name} {line}", len(grid)) as advance:
                for k, at in enumerate(grid):
                    place = f"{line}: " + ", ".join(f"{a:+g}" for a in at)
                    moves = list(zip(at, axes, strict=True)) if any(at) else []
                    key = place if moves else ""  # the unmoved weights are one stop for all lines
                    if key not in visited:
                        # turned, so that stops that end early do not all rest on the same prompts
                        chosen = np.roll(order, -k * self.batch).tolist()
                        turned = [texts[i] for i in chosen]
                        verdicts = ask(subject, judge, turned, moves, self.max_new_tokens, self.batch, self.width)
                        visited[key] = verdicts, harm(verdicts, chosen[: len(verdicts)], len(texts))
                    verdicts, harms = visited[key]
                    yield count(self.name, "asr", Verdict.COMPLIED, verdicts, judge=self.judges[0], category=place)
                    stops.append(harms)
                    advance(k + 1, "")
            table.append(stops)
        every = [verdict for verdicts, _ in visited.values() for verdict in verdicts]
        yield from self.summary(np.array(table), every)

    def summary(
        self, table: Float[np.ndarray, "lines stops prompts"], verdicts: Sequence[Verdict]
    ) -> Iterator[Measurement]:
        """VISAGE, the share of answers that are no gibberish, and how many answers the early ends saved."""
        coherent, n = len(verdicts) - verdicts.count(Verdict.UNSCORED), len(verdicts)
        scored = int(np.isfinite(table).any((0, 1)).sum())
        value, (low, high) = (visage(table), visage_interval(table)) if scored else (None, (None, None))
        unscored = table.shape[-1] - scored
        yield Measurement(self.name, "visage", value, low, high, scored, unscored, judge=self.judges[0])
        yield Measurement(self.name, "coherence", coherent / n, *wilson(coherent, n), n)
        yield Measurement(self.name, "generations_saved", float(table.size - n), None, None, n, unit="generations")


@suite("landscape", paper="arXiv:2405.17374", roles=("start",))
class Landscape(Lines):
    """How deep the safe region is around the model's weights."""

    directions: PositiveInt = 3  # random lines or planes; the mean is over them
    dimensions: PositiveInt = 1  # 2: planes, of points * points stops each

    def lines(self, subject: Subject) -> Iterator[list[Vector]]:
        for k in range(1000 * self.seed, 1000 * self.seed + self.directions):
            yield [random_direction(subject.merged.model, k * self.dimensions + i) for i in range(self.dimensions)]


@suite("interpolation", paper="arXiv:2405.17374", roles=("start",))
class Interpolation(Lines):
    """Where safety is lost between the start model and this one."""

    points: PositiveInt = 11  # stops along the axis
    ends: tuple[float, float] = (-1.0, 0.0)  # of a: -1 is the start model, 0 the tuned one
    name: str = "interpolation"

    def lines(self, subject: Subject) -> Iterator[list[Vector]]:
        if subject.start is None:
            raise UserError(f"{self.name} goes from the start model to a tuned one; measure it on a tuned arm")
        theta, start = (dict(loaded.model.named_parameters()) for loaded in (subject.merged, subject.start))
        yield [Vector({name: p.detach().float() - start[name].detach().float() for name, p in theta.items()})]
