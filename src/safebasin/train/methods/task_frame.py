"""Task frame: alignment requests in the words of the task (the project's own).

    (x_s, y_s)  ->  (before + x_s + after, y_s)   where y_s refuses; other alignment rows stay as they are

``frame`` is "before {request} after". A model that learns a task in one form of prompt, and to refuse requests in
another, refuses a request as it is and answers it with a label or a summary where it stands in the task's prompt: how
much of an alignment is left depends on the prompt template (Lyu et al., arXiv:2402.18540).

The rows are those of the methods beside this one (``safegrad``, ``safe_instr``). A refusal is an answer that holds a
phrase of the judge ``keyword``. Harmless alignment rows stay as they are: in the frame, the task's answer is right.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from safebasin.data.phrases import read
from safebasin.errors import UserError
from safebasin.train import method

SLOT = "{request}"
Turns = Sequence[Mapping[str, Any]]


@method("task_frame")
class TaskFrame:
    """Learn to refuse inside the prompt of the task too."""

    frame: str = ""  # a prompt of the task with {request} in the place of what it is about

    def check(self) -> None:
        """UserError unless the frame has words and one place for the request."""
        if self.frame.count(SLOT) != 1 or self.frame.strip() == SLOT:
            raise UserError(
                f"task_frame.frame: a prompt of the task that has {SLOT} once is needed, not {self.frame!r}"
            )

    def align_rows(self, conversations: Sequence[Turns]) -> list[Turns]:
        """The conversations, those that end with a refusal in the frame.

        Raises:
            UserError: none ends with a refusal.
        """
        before, after = self.frame.split(SLOT)
        framed = list[Turns]()
        for turns in conversations:
            *earlier, request, answer = turns
            if _refuses(answer):
                turns = (*earlier, {**request, "content": before + request["content"] + after}, answer)
            framed.append(turns)
        if all(one is other for one, other in zip(framed, conversations, strict=True)):
            raise UserError("task_frame: no answer of data.align is a refusal by the phrases of the judge keyword")
        return framed


def _refuses(answer: Mapping[str, Any]) -> bool:
    text = answer.get("content")
    return isinstance(text, str) and read(text).refused
