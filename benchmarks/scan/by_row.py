"""Rows to tokens one by one: the definition that ``safebasin.encode`` is held against, and how it was done before.

Each row is rendered twice, once with sentinels in the place of its texts, and has a call of the tokenizer of its own,
which says where in the text each token stands; every token is looked at by Python.
"""

from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

from safebasin import places
from safebasin.data.example import Example
from safebasin.data.json_rows import BadRow
from safebasin.encode import ENDLESS, TokenizedRow
from safebasin.places import Unplaced, answer_places, check_contents, control_tokens
from safebasin.template import TemplateFails, generation_marks, render
from safebasin.tokens import Span

HOW = {"add_special_tokens": False, "return_offsets_mapping": True, "return_attention_mask": False}


def by_row(tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[TokenizedRow | BadRow]:
    """``encode`` of every row, none of them larger than a row may be."""
    results = []
    with mock.patch.object(places, "_plain", lambda *_: None):
        for example in examples:
            places._rendered.cache_clear()
            results.append(one_row(tokenizer, example, max_length))
    return results


def one_row(tokenizer: Any, example: Example, max_length: int) -> TokenizedRow | BadRow:
    try:
        check_contents(tokenizer, example)
        text = render(tokenizer, example.messages, tools=example.tools)
        spans = answer_places(tokenizer, example, text)
        coded = tokenizer([text], **HOW)
        [ids], [offsets] = coded["input_ids"], coded["offset_mapping"]
        check_forged(tokenizer, ids, offsets, spans.contents)
        if len(ids) > max_length:
            return BadRow(example.line, f"over-long: {len(ids)} tokens, max_length is {max_length}")
        answer = learned(tokenizer, example, ids, offsets, spans)
    except (TemplateFails, Unplaced) as error:
        return BadRow(example.line, str(error))
    if example.learned and not any(answer):
        return BadRow(example.line, "no answer token")
    last = [token for token, is_learned in zip(ids, answer, strict=True) if is_learned][-3:]
    ends = not last or control_tokens(tokenizer).ids.intersection(last)
    return TokenizedRow(example.id, tuple(ids), tuple(answer), note=spans.note or ("" if ends else ENDLESS))


def learned(
    tokenizer: Any, example: Example, ids: Sequence[int], offsets: Sequence[Span], spans: places.Places
) -> list[bool]:
    """The answer mask."""
    answer = [False] * len(ids)
    for tokens in inside(offsets, spans.answers):
        stops = [k for k in tokens if ids[k] == tokenizer.eos_token_id]
        for k in tokens:
            answer[k] = not stops or k <= stops[-1]
    for tokens in inside(offsets, spans.unlearned):
        for k in tokens:
            answer[k] = False
    marked = generation_marks(tokenizer, example.messages, example.tools)
    if not (any(marked) and len(marked) == len(ids)):
        return answer
    result = [False] * len(answer)
    for tokens in inside(offsets, spans.answers):
        last = max((k for k in tokens if marked[k]), default=len(answer))
        for k in tokens:
            result[k] = answer[k] and bool(marked[k] or k > last)
    return result


def inside(offsets: Sequence[Span], spans: Sequence[Span]) -> Iterator[list[int]]:
    """Of each span of characters the tokens that share one with it; the spans are in order."""
    first = 0
    for start, end in spans:
        while first < len(offsets) and offsets[first][1] <= start:
            first += 1
        tokens, k = [], first
        while k < len(offsets) and offsets[k][0] < end:
            if offsets[k][1] > start:
                tokens.append(k)
            k += 1
        yield tokens


def check_forged(tokenizer: Any, ids: Sequence[int], offsets: Sequence[Span], contents: Sequence[Span]) -> None:
    """Unplaced: a content has a part in a control token."""
    control = control_tokens(tokenizer).ids
    spots = [k for k, token in enumerate(ids) if token in control]
    for tokens in inside([offsets[k] for k in spots], contents):
        if tokens:
            name = tokenizer.convert_ids_to_tokens(ids[spots[tokens[0]]])
            raise Unplaced(f"a content forms the control token {name!r} in the rendered text: a forged turn")
