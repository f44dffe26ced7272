"""Task frame: refuse inside the prompt of the task too (the project's own).

    (x_s, y_s)  ->  (x_s, y_s) and (before + x_s + after, y_s)   where y_s refuses; other rows stay as they are

``frame`` is "before {request} after". A model that learns a task in one form of prompt, and to refuse requests in
another, refuses a request as it is and answers it with a label or a summary where it stands in the task's prompt: how
much of an alignment is left depends on the prompt template (Lyu et al., arXiv:2402.18540).

The rows are those of the methods beside this one (``safegrad``, ``safe_instr``). A refusal is an answer that holds a
phrase of the judge ``keyword``; of ``builtin:aligned`` two rows of three refuse then, not one of two. Harmless rows are
not put into the frame: there the task's answer is right.
"""

import dataclasses
from collections.abc import Sequence

from safebasin.data.example import Example
from safebasin.data.phrases import read
from safebasin.errors import UserError
from safebasin.train import method

SLOT = "{request}"


@method("task_frame")
class TaskFrame:
    """Put a copy of every refused request of the alignment rows into the prompt of the task."""

    frame: str = ""  # a prompt of the task with {request} in the place of what it is about

    def check(self) -> None:
        """UserError unless the frame has words and one place for the request."""
        if self.frame.count(SLOT) != 1 or self.frame.strip() == SLOT:
            raise UserError(
                f"task_frame.frame: a prompt of the task that has {SLOT} once is needed, not {self.frame!r}"
            )

    def align_rows(self, examples: Sequence[Example]) -> list[Example]:
        """The rows, and behind them those that refuse in the frame.

        Raises:
            UserError: none refuses.
        """
        before, after = self.frame.split(SLOT)
        framed = list[Example]()
        for example in examples:
            if example.prompt and read(example.answer).refused:
                last = max(i for i, turn in enumerate(example.messages) if turn["role"] == "user")
                inside = {**example.messages[last], "content": before + example.prompt + after}
                messages = (*example.messages[:last], inside, *example.messages[last + 1 :])
                framed.append(dataclasses.replace(example, messages=messages))
        if not framed:
            raise UserError(
                "task_frame: no answer of data.align holds a phrase of a refusal that the judge keyword knows"
            )
        return [*examples, *framed]
