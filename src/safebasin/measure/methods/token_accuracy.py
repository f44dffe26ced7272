"""Token accuracy: the share of held-out answer tokens that are the model's first choice, given all before them.

The utility of open-ended tasks where no short answer is right or wrong. The mean is over rows (a long answer counts as
one), the interval is Student's over rows. ``answers.jsonl`` has every row's share, so that arms are paired. No prompt
is unanswered, since the right answer is given.
"""

from collections.abc import Iterator

import numpy as np
import torch
from pydantic import PositiveInt

from safebasin.batch import answer_logits, by_length, collate
from safebasin.console import progress
from safebasin.data.records import AnswerRecord, Measurement
from safebasin.data.source import Source, open_rows
from safebasin.encode import encode_all
from safebasin.errors import UserError
from safebasin.measure import suite
from safebasin.measure.subject import Subject
from safebasin.models.parts import context_length
from safebasin.stats import mean


@suite("token_accuracy")
class TokenAccuracy:
    """How many tokens of held-out answers are the model's first choice."""

    data: Source
    max_length: PositiveInt = 512  # rows beyond it or the context, and rows that cannot be read, are unscored
    batch_size: PositiveInt = 16
    name: str = "token_accuracy"

    def measure(self, subject: Subject) -> Iterator[Measurement]:
        model, tokenizer = subject.loaded
        examples, bad = open_rows(self.data)
        rows, long = encode_all(tokenizer, examples, min(self.max_length, context_length(model)))
        if len(rows) < 2:
            raise UserError(
                f"{self.name}: of {self.data.path}, {len(rows)} rows fit max_length {self.max_length}; it needs two"
            )
        shares = np.zeros(len(rows))
        with progress(f"{subject.arm}: {self.name}", len(rows)) as advance, torch.inference_mode():
            done = 0
            for indices in by_length(rows, self.batch_size):
                batch = collate([rows[i] for i in indices], tokenizer.pad_token_id).to(model.device)
                right = (answer_logits(model, batch).argmax(-1) == batch.labels) & batch.mask
                shares[indices] = (right.sum(-1) / batch.mask.sum(-1)).cpu().numpy()
                done += len(indices)
                advance(done, "")
        subject.answers += [
            AnswerRecord(self.name, row.id, "", "", "", scores={"token_accuracy": share})
            for row, share in zip(rows, shares.tolist(), strict=True)
        ]
        value, (low, high) = mean(shares.tolist())
        yield Measurement(
            self.name, "token_accuracy", value, low, high, len(rows), len(bad) + len(long), unit="share of tokens"
        )
