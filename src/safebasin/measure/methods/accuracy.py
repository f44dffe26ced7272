"""Task accuracy: the share of the task's own test rows that are answered as expected.

The whole conversation is asked: system prompt, earlier turns, last request. An empty answer is wrong. ``label``: the
answer is the label, or the label and then something in other words; one that names several labels is wrong. ``number``
compares the last number of the answer, as GSM8K does.
"""

import re
from collections.abc import Collection, Iterator
from typing import Literal

from pydantic import PositiveInt

from safebasin.data.records import AnswerRecord, Measurement
from safebasin.data.source import Source, open_examples
from safebasin.measure import suite
from safebasin.measure.judging import normal
from safebasin.measure.subject import Subject
from safebasin.stats import wilson


@suite("accuracy", reads=("answers",))
class Accuracy:
    """How well the model does the task that it was tuned for."""

    data: Source
    match: Literal["label", "exact", "number"] = "label"  # label: one label, and it stands first
    max_new_tokens: PositiveInt = 8
    name: str = "accuracy"

    def right(self, answer: str, expected: str, labels: Collection[str] = ()) -> bool:
        """Whether an answer is the expected one; ``labels`` are all that the task has."""
        if self.match == "number":
            return numbers(answer)[-1:] == numbers(expected)[-1:] != []
        given, wanted = normal(answer), normal(expected)
        if given == wanted or self.match == "exact":
            return given == wanted
        behind = re.match(re.escape(wanted) + r"\W*?(?:[.:;!?\n(|]|\s-+\s)(.+)", given, re.DOTALL)
        rest = behind[1] if behind else ""
        others = [label for name in labels if (label := normal(name)) not in ("", wanted)]
        several = any(re.search(rf"(?<!\w){re.escape(label)}(?!\w)", rest) for label in others)
        parts = [part for part in re.split(r"[.:;!?\n,|()]", rest) if part.strip()]
        return behind is not None and not several and all(len(part.split()) > 1 for part in parts)

    def measure(self, subject: Subject) -> Iterator[Measurement]:
        examples = open_examples(self.data)
        answers = subject.ask([example.conversation for example in examples], self.max_new_tokens, self.name)
        labels = {example.answer for example in examples}
        outcomes = [
            self.right(answer.text, example.answer, labels) for answer, example in zip(answers, examples, strict=True)
        ]
        subject.answers += [
            AnswerRecord(
                self.name,
                example.id,
                "",
                example.prompt,
                answer.text,
                example.answer,
                correct=outcome,
                finished=answer.finished,
                thought=answer.thought,
            )
            for example, answer, outcome in zip(examples, answers, outcomes, strict=True)
        ]
        n = len(outcomes)
        low, high = wilson(sum(outcomes), n)
        yield Measurement(self.name, "accuracy", sum(outcomes) / n, low, high, n, evidence="answers.jsonl")


def numbers(text: str) -> list[float]:
    """Every number of a text; commas, which separate thousands, are left out."""
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))]
