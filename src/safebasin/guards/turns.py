"""Answers of rows as token ids of a guard, whose tokenizer may be another: the chunk that each token of a row is in."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile
from operator import eq
from typing import Any, NamedTuple

from safebasin.batch import Batch


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a row's text, in which no special token is recognised: the text is hostile."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def chunks_of(tokenizer: Any, ids: Sequence[int], text: str, begins: Sequence[int]) -> list[int]:
    """The chunk of ``text`` that each of ``ids``, which decode to it, ends in.

    A character that several tokens share belongs to the chunk that completes it. What follows the text (an end mark) is
    in the last chunk.

    Args:
        tokenizer: of ``ids``.
        ids: token ids of an answer.
        text: the answer.
        begins: where each chunk but the first begins, in characters of ``text``.
    """
    prefixes = [tokenizer.decode(ids[:k], skip_special_tokens=True) for k in range(1, len(ids))]
    ends = [  # a prefix that ends within a character decodes to another character there
        len(prefix) if text.startswith(prefix) else len([*takewhile(bool, map(eq, prefix, text))]) + 1
        for prefix in prefixes
    ]
    return [*(bisect_left(begins, end) for end in ends), len(begins)]


class Turn(NamedTuple):
    """One answer of a row."""

    row: int
    positions: list[int]  # of its tokens, in the batch's tail
    context: list[int]  # the guard's token ids of what precedes the answer
    answer: list[int]  # the guard's token ids of the answer
    chunks: list[int]  # of ``answer``: the one that each token of the row ends in


def turns_of(
    batch: Batch, row_tokenizer: Any, guard_tokenizer: Any, between: Sequence[int], every: int
) -> Iterator[Turn]:
    """Every answer that holds text, in the order of the rows; a chunk is ``every`` of the guard's tokens.

    ``between``: the guard's token ids between what precedes an answer and the answer.
    """
    offset = batch.input_ids.shape[1] - batch.mask.shape[1]
    rows = zip(batch.input_ids, batch.attention_mask.bool(), batch.mask.tolist(), strict=True)
    for i, (ids, seen, mask) in enumerate(rows):
        for positions in (
            [k for k, _ in run] for answers, run in groupby(enumerate(mask), key=lambda at: at[1]) if answers
        ):
            begin, tokens = offset + positions[0], batch.labels[i, positions].tolist()
            before = row_tokenizer.decode(ids[:begin][seen[:begin]], skip_special_tokens=True)
            text = row_tokenizer.decode(tokens, skip_special_tokens=True)
            coded = guard_tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
            )
            if answer := coded["input_ids"]:
                begins = [start for start, _ in coded["offset_mapping"][every::every]]
                context = [*text_ids(guard_tokenizer, before), *between]
                yield Turn(i, positions, context, answer, chunks_of(row_tokenizer, tokens, text, begins))
