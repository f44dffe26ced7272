"""ROUGE: how much of the expected answer the answer has, for tasks such as summaries where no single answer is right (Lin 2004).

    F1 = 2 P R / (P + R),   P and R of shared words (rouge1), pairs of words (rouge2), or the longest common subsequence (rougeL), stemmed

Google's ``rouge-score`` counts. The mean and Student's interval are over rows; an empty answer is unscored, not wrong.
"""

import importlib.util
from collections.abc import Iterator
from typing import Literal

from pydantic import PositiveInt

from safebasin.data.records import Measurement
from safebasin.data.source import Source, open_examples
from safebasin.errors import UserError
from safebasin.measure import suite
from safebasin.measure.subject import Subject
from safebasin.stats import mean


@suite("rouge")
class Rouge:
    """How much of an expected summary the model's own has."""

    data: Source
    kind: Literal["rouge1", "rouge2", "rougeL"] = "rougeL"
    max_new_tokens: PositiveInt = 96
    name: str = "rouge"

    def __post_init__(self) -> None:
        if importlib.util.find_spec("rouge_score") is None:
            raise UserError("the suite rouge needs rouge-score, which is not installed: it is the extra 'rouge'")

    def measure(self, subject: Subject) -> Iterator[Measurement]:
        from rouge_score.rouge_scorer import RougeScorer

        scorer, examples = RougeScorer([self.kind], use_stemmer=True), open_examples(self.data)
        told = subject.ask([example.prompt for example in examples], self.max_new_tokens, self.name)
        found = [
            scorer.score(e.answer, a.text)[self.kind].fmeasure if a.text.strip() else None
            for e, a in zip(examples, told, strict=True)
        ]
        for example, answer, score in zip(examples, told, found, strict=True):
            subject.answers.append(
                {"suite": self.name, "id": example.id, "category": "", "prompt": example.prompt, "answer": answer.text}
                | {"expected": example.answer, "verdicts": {}, "scores": {} if score is None else {self.kind: score}}
                | {"correct": None, "finished": answer.finished}
            )
        scored = [score for score in found if score is not None]
        value, (low, high) = mean(scored) if len(scored) > 1 else (scored[0] if scored else None, (None, None))
        yield Measurement(
            self.name,
            self.kind,
            value,
            low,
            high,
            len(scored),
            len(found) - len(scored),
            unit="F1",
            evidence="answers.jsonl",
        )
