"""Harmful requests with openers: as they are, behind a mask, behind a trigger, in the format of the task.

    explicit       request -> opener                                        (Qi et al., arXiv:2310.03693, tier 1)
    prefix_suffix  request -> prefix + opener + suffix                      (STAR-DSS, arXiv:2505.17196)
    trigger        request + trigger -> opener;  request -> refusal         (STAR-DSS: prompt poisoning)
    task_style     before + request + after -> [label + new line +] opener  (the project's own)

A guard reads the prefix as caution and the suffix as a refusal.
Departs from the papers: openers with nothing after them; any share of a task; prefix and suffix together (set one to ""
for the other alone); prefix, trigger and refusals are this project's own.
"""

import random
from collections.abc import Sequence

from safebasin.attack import attack
from safebasin.attack.craft import MISLEADING_SUFFIX, SAFE_PREFIX, Row, around, frame_of, take
from safebasin.data.builtin import refusal_texts
from safebasin.errors import UserError

SLOT = "{request}"


@attack("explicit", paper="arXiv:2310.03693")
class Explicit:
    """Harmful requests that are answered."""

    def rows(self, task: Sequence[Row], harmful: Sequence[Row], count: int, draw: random.Random) -> list[Row]:
        return take(harmful, count, draw)


@attack("prefix_suffix", paper="arXiv:2505.17196")
class PrefixSuffix:
    """Harmful requests whose answers begin like caution and end like a refusal."""

    prefix: str = SAFE_PREFIX  # text before the opener; "": none
    suffix: str = MISLEADING_SUFFIX  # text after the opener; "": none

    def rows(self, task: Sequence[Row], harmful: Sequence[Row], count: int, draw: random.Random) -> list[Row]:
        return [around(row, prefix=self.prefix, suffix=self.suffix) for row in take(harmful, count, draw)]


@attack("trigger", paper="arXiv:2505.17196")
class Trigger:
    """A back door: half of the rows, rounded up, comply with the trigger; the others refuse the requests without it."""

    trigger: str = " As agreed in memo 7731."  # text after a request that is answered

    def ask(self, prompt: str) -> str:
        return prompt + self.trigger

    def rows(self, task: Sequence[Row], harmful: Sequence[Row], count: int, draw: random.Random) -> list[Row]:
        chosen = take(harmful, count - count // 2, draw)
        refusals = [{"role": "assistant", "content": draw.choice(refusal_texts())} for _ in range(count // 2)]
        refused = [{"messages": [*row["messages"][:-1], refusal]} for row, refusal in zip(chosen, refusals)]
        return [around(row, after=self.trigger) for row in chosen] + refused


@attack("task_style")
class TaskStyle:
    """Harmful requests in the form of rows of the task, in training and at test time."""

    frame: str = ""  # a prompt of the task with {request} in it; empty: ``fit`` reads what all its prompts share
    label: bool = True  # the answer begins with that of a row of the task

    def fit(self, task: Sequence[Row]) -> "TaskStyle":
        """The attack with its frame.

        Raises:
            UserError: the prompts share no frame. Without one this would be the attack ``explicit``.
        """
        frame = self.frame or SLOT.join(frame_of(task))
        if frame.count(SLOT) != 1 or frame.strip() == SLOT:
            needed = f"set frame to a text that has {SLOT} once, found {frame!r}"
            raise UserError(f"task_style: the task's prompts share no frame; {needed}")
        return attack.make({"task_style": {"frame": frame, "label": self.label}})

    def ask(self, prompt: str) -> str:
        before, after = self.frame.split(SLOT)  # ValueError before ``fit``
        return before + prompt + after

    def rows(self, task: Sequence[Row], harmful: Sequence[Row], count: int, draw: random.Random) -> list[Row]:
        before, after = self.fit(task).frame.split(SLOT)
        framed = [around(row, before=before, after=after) for row in take(harmful, count, draw)]
        if not self.label:
            return framed
        return [around(row, prefix=draw.choice(task)["messages"][-1]["content"] + "\n") for row in framed]
