"""Task accuracy: the share of the task's own test rows that are answered as expected.

An empty answer is unscored, not wrong: the two have different causes. ``number`` compares the last number of the answer, as GSM8K does.
"""

import re
from collections.abc import Iterator
from typing import Literal

from pydantic import PositiveInt

from safebasin.data.records import Measurement
from safebasin.data.source import Source, open_examples
from safebasin.measure import suite
from safebasin.measure.judge import normal
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
        told, wanted = normal(answer), normal(expected)
        return told == wanted or (self.match == "label" and re.match(re.escape(wanted) + r"(?!\w)", told) is not None)

    def measure(self, subject: Subject) -> Iterator[Measurement]:
        examples = open_examples(self.data)
        told = subject.ask([example.prompt for example in examples], self.max_new_tokens, self.name)
        pairs = [(answer.text, example.answer) for answer, example in zip(told, examples, strict=True)]
        outcomes = [self.right(text, expected) if text.strip() else None for text, expected in pairs]
        for example, answer, outcome in zip(examples, told, outcomes, strict=True):
            subject.answers.append(
                {"suite": self.name, "id": example.id, "category": "", "prompt": example.prompt, "answer": answer.text}
                | {
                    "expected": example.answer,
                    "verdicts": {},
                    "scores": {},
                    "correct": outcome,
                    "finished": answer.finished,
                }
            )
        scored = [outcome for outcome in outcomes if outcome is not None]
        low, high = wilson(sum(scored), len(scored)) if scored else (None, None)
        value = sum(scored) / len(scored) if scored else None
        yield Measurement(
            self.name, "accuracy", value, low, high, len(scored), len(outcomes) - len(scored), evidence="answers.jsonl"
        )


def numbers(text: str) -> list[float]:
    """Every number of a text, thousands separators aside."""
    return [float(found) for found in re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))]
