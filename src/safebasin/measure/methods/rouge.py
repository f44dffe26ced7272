"""ROUGE: how much of the expected answer an answer has (Lin 2004), for tasks without a single right answer.

    F1 = 2 P R / (P + R),   P and R of shared words (rouge1), of pairs of words (rouge2), or of the longest common
                            subsequence (rougeL), all stemmed

Google's ``rouge-score`` counts. The whole conversation is asked: system prompt, earlier turns, last request.
The mean and Student's interval are over rows; an empty answer has nothing of the expected one: 0.
"""

import importlib.util
from collections.abc import Iterator
from typing import Literal

from pydantic import PositiveInt

from safebasin.data.records import AnswerRecord, Measurement
from safebasin.data.source import Source, open_examples
from safebasin.errors import UserError
from safebasin.measure import suite
from safebasin.measure.subject import Subject
from safebasin.stats import mean


@suite("rouge", reads=("answers",))
class Rouge:
    """How much of an expected summary the model's own has."""

    data: Source
    kind: Literal["rouge1", "rouge2", "rougeL"] = "rougeL"  # single words, pairs of words, longest common subsequence
    max_new_tokens: PositiveInt = 96
    name: str = "rouge"

    def __post_init__(self) -> None:
        if importlib.util.find_spec("rouge_score") is None:
            raise UserError("the suite rouge needs rouge-score, which is not installed: it is the extra 'rouge'")

    def measure(self, subject: Subject) -> Iterator[Measurement]:
        from rouge_score.rouge_scorer import RougeScorer

        scorer, examples = RougeScorer([self.kind], use_stemmer=True), open_examples(self.data)
        answers = subject.ask([example.conversation for example in examples], self.max_new_tokens, self.name)
        f1 = [
            float(scorer.score(example.answer, answer.text)[self.kind].fmeasure)
            for example, answer in zip(examples, answers, strict=True)
        ]
        subject.answers += [
            AnswerRecord(
                self.name,
                example.id,
                "",
                example.prompt,
                answer.text,
                example.answer,
                scores={self.kind: score},
                finished=answer.finished,
                thought=answer.thought,
            )
            for example, answer, score in zip(examples, answers, f1, strict=True)
        ]
        value, (low, high) = mean(f1) if len(f1) > 1 else (f1[0], (None, None))
        yield Measurement(self.name, self.kind, value, low, high, len(f1), unit="F1", evidence="answers.jsonl")
