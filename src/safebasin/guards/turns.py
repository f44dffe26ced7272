"""The answers of rows in the words of a guard, whose tokenizer may be another: which chunk of an answer each token of the row ends in."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile
from operator import eq
from typing import Any, NamedTuple

from safebasin.batch import Batch


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a row's text, in which no special token is recognised: the text is hostile."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def chunks_of(tokenizer: Any, ids: Sequence[int], text: str, begins: Sequence[int]) -> list[int]:
    """The chunk of ``text`` that each of ``ids``, which decode to it, ends in. ``begins``: of all chunks but the first, in characters.

    A character that several tokens share stands in the chunk that completes it. What follows the text (an end mark) is in the last chunk.
    """
    read = [
        tokenizer.decode(ids[:k], skip_special_tokens=True) for k in range(1, len(ids))
    ]  # half a character reads as another one
    ends = [len(part) if text.startswith(part) else len([*takewhile(bool, map(eq, part, text))]) + 1 for part in read]
    return [*(bisect_left(begins, end) for end in ends), len(begins)]


class Turn(NamedTuple):
    """One answer of a row."""

    row: int
    places: list[int]  # of its tokens, in the batch's tail
    context: list[int]  # the guard's tokens: what precedes the answer
    answer: list[int]
    chunks: list[int]  # of ``answer``: the one that each token of the row ends in


def turns_of(batch: Batch, rows: Any, guards: Any, between: Sequence[int], every: int) -> Iterator[Turn]:
    """Every answer that holds text, in the order of the rows; chunks are of ``every`` of the guard's tokens.

    ``rows`` and ``guards`` are the tokenizers of the rows and of the guard; ``between`` stands between what precedes an answer and the answer.
    """
    offset = batch.input_ids.shape[1] - batch.mask.shape[1]
    for i, (ids, seen, mask) in enumerate(
        zip(batch.input_ids, batch.attention_mask.bool(), batch.mask.tolist(), strict=True)
    ):
        for places in ([k for k, _ in run] for said, run in groupby(enumerate(mask), key=lambda at: at[1]) if said):
            begin, told = offset + places[0], batch.labels[i, places].tolist()
            before, text = (rows.decode(part, skip_special_tokens=True) for part in (ids[:begin][seen[:begin]], told))
            read = guards(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
            if answer := read["input_ids"]:
                begins = [start for start, _ in read["offset_mapping"][every::every]]
                yield Turn(
                    i, places, [*text_ids(guards, before), *between], answer, chunks_of(rows, told, text, begins)
                )
