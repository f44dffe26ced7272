"""Task accuracy: the share of the task's own test rows that are answered as expected.

An empty answer is unscored, not wrong: the two have different causes. ``number`` compares the last number of the
answer, as GSM8K does.
"""

import re
from collections.abc import Iterator
from typing import Literal

from pydantic import PositiveInt

from safebasin.data.records import AnswerRecord, Measurement
from safebasin.data.source import Source, open_examples
from safebasin.measure import suite
from safebasin.measure.judging import normal
from safebasin.measure.subject import Subject
from safebasin.stats import wilson


@suite("accuracy")
class Accuracy:
    """How well the model does the task that it was tuned for."""

    data: Source
    match: Literal["label", "exact", "number"] = "label"  # label: the answer begins with it
    max_new_tokens: PositiveInt = 8
    name: str = "accuracy"

    def right(self, answer: str, expected: str) -> bool:
        if self.match == "number":
            return numbers(answer)[-1:] == numbers(expected)[-1:] != []
        given, wanted = normal(answer), normal(expected)
        return given == wanted or (self.match == "label" and re.match(re.escape(wanted) + r"(?!\w)", given) is not None)

    def measure(self, subject: Subject) -> Iterator[Measurement]:
        examples = open_examples(self.data)
        answers = subject.ask([example.prompt for example in examples], self.max_new_tokens, self.name)
        outcomes = [
            self.right(answer.text, example.answer) if answer.text.strip() else None
            for answer, example in zip(answers, examples, strict=True)
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
            )
            for example, answer, outcome in zip(examples, answers, outcomes, strict=True)
        ]
        scored = [outcome for outcome in outcomes if outcome is not None]
        low, high = wilson(sum(scored), len(scored)) if scored else (None, None)
        value = sum(scored) / len(scored) if scored else None
        unscored = len(outcomes) - len(scored)
        yield Measurement(self.name, "accuracy", value, low, high, len(scored), unscored, evidence="answers.jsonl")


def numbers(text: str) -> list[float]:
    """Every number of a text; commas, which separate thousands, are left out."""
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))]
