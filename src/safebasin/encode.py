"""Rows as token ids: the chat template, and the mask of the answer.

Answers are found in the final rendering of a row, by ``safebasin.places``.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from safebasin.data.example import Example
from safebasin.data.json_rows import BadRow
from safebasin.errors import UserError
from safebasin.places import Places, Unplaced, answer_places, check_contents, control_tokens
from safebasin.template import TemplateFails, check_template, generation_marks, render, template_digest

__all__ = [
    "TemplateFails",
    "TokenizedRow",
    "check_template",
    "encode",
    "encode_all",
    "render",
    "shorten",
    "template_digest",
]

MOST_TURNS = 20_000  # of a row
MOST_CHARACTERS = 20_000_000
TOGETHER = 256  # rows whose texts are tokenised in one call
ENDLESS = "the chat template ends an answer with no special token: nothing teaches the model to stop"


@dataclasses.dataclass(frozen=True)
class TokenizedRow:
    """A row as token ids, and which of them the model is to learn."""

    id: str
    ids: tuple[int, ...]
    answer: tuple[bool, ...]  # one per id
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    start: int | None = None  # of a row cut short: the place of its first token in the full row
    note: str = ""  # how its answers were found, where not all of them could be

    def __len__(self) -> int:
        return len(self.ids)


def encode(tokenizer: Any, example: Example, max_length: int) -> TokenizedRow | BadRow:
    """Token ids and answer mask of a row; the mask ends with the turn's end token. One that cannot be used is bad.

    Raises:
        UserError: the tokenizer has no chat template that can be read.
    """
    [row] = _encoded(tokenizer, [example], max_length)
    return row.bad if isinstance(row, _Refused) else row


class _Rendered(NamedTuple):
    example: Example
    text: str
    places: Places


def _rendered(tokenizer: Any, example: Example) -> _Rendered | BadRow:
    turns, size = len(example.messages), sum(len(turn["content"]) for turn in example.messages)
    if turns > MOST_TURNS or size > MOST_CHARACTERS:
        return BadRow(
            example.line, f"{turns} turns with {size} characters; at most {MOST_TURNS} and {MOST_CHARACTERS} are read"
        )
    check_contents(tokenizer, example)
    text = render(tokenizer, example.messages, tools=example.tools)
    return _Rendered(example, text, answer_places(tokenizer, example, text))


def _coded(
    tokenizer: Any, row: _Rendered, ids: Sequence[int], offsets: Sequence[tuple[int, int]], max_length: int
) -> TokenizedRow | BadRow:
    """The row by the tokens of its text, and the place of each in it."""
    example, places = row.example, row.places
    _check_forged(tokenizer, ids, offsets, places)
    if len(ids) > max_length:
        return BadRow(example.line, f"over-long: {len(ids)} tokens, max_length is {max_length}")
    answer = [False] * len(ids)
    for inside in _inside(offsets, places.answers):
        stops = [k for k in inside if ids[k] == tokenizer.eos_token_id]
        for k in inside:
            answer[k] = not stops or k <= stops[-1]
    for inside in _inside(offsets, places.unlearned):
        for k in inside:
            answer[k] = False
    marked = generation_marks(tokenizer, example.messages, example.tools)
    if any(marked) and len(marked) == len(ids):
        answer = _marked(answer, marked, _inside(offsets, places.answers))
    if example.learned and not any(answer):
        return BadRow(example.line, "no answer token")
    learned = [token for token, is_learned in zip(ids, answer, strict=True) if is_learned]
    ends = not learned or control_tokens(tokenizer).ids.intersection(learned[-3:])  # white space may follow the end
    return TokenizedRow(example.id, tuple(ids), tuple(answer), note=places.note or ("" if ends else ENDLESS))


def _inside(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Of each span of characters the tokens that share one with it; the spans are in order."""
    first = 0
    for start, end in spans:
        while first < len(offsets) and offsets[first][1] <= start:
            first += 1
        inside, k = [], first
        while k < len(offsets) and offsets[k][0] < end:
            if offsets[k][1] > start:
                inside.append(k)
            k += 1
        yield inside


def _marked(answer: list[bool], marked: Sequence[int], answers: Iterator[list[int]]) -> list[bool]:
    """Of the answers what the template marks, and what follows the last mark of a turn: its end."""
    result = [False] * len(answer)
    for inside in answers:
        last = max((k for k in inside if marked[k]), default=len(answer))
        for k in inside:
            result[k] = answer[k] and bool(marked[k] or k > last)
    return result


def _check_forged(tokenizer: Any, ids: Sequence[int], offsets: Sequence[tuple[int, int]], places: Places) -> None:
    """A control token that a content has a part in is none of the template's.

    Raises:
        Unplaced: there is one.
    """
    control = control_tokens(tokenizer).ids
    spots = [k for k, token in enumerate(ids) if token in control]
    for inside in _inside([offsets[k] for k in spots], places.contents):
        if inside:
            name = tokenizer.convert_ids_to_tokens(ids[spots[inside[0]]])
            raise Unplaced(f"a content forms the control token {name!r} in the rendered text: a forged turn")


def encode_all(tokenizer: Any, examples: Sequence[Example], max_length: int) -> tuple[list[TokenizedRow], list[BadRow]]:
    """The rows that can be used, in their order, and the others with their reasons.

    Raises:
        UserError: the chat template cannot be read, or fails on every one of several rows.
    """
    rows: list[TokenizedRow] = []
    bad: list[BadRow] = []
    failures = 0
    for start in range(0, len(examples), TOGETHER):
        for coded in _encoded(tokenizer, examples[start : start + TOGETHER], max_length):
            if isinstance(coded, TokenizedRow):
                rows.append(coded)
            else:
                bad.append(coded.bad)
                failures += coded.template
    if failures == len(examples) > 1:
        raise UserError(f"line {bad[0].line}: {bad[0].reason}; so it does on all {failures} rows: mend the template")
    return rows, bad


class _Refused(NamedTuple):
    bad: BadRow
    template: bool = False  # which fails


def _encoded(tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[TokenizedRow | _Refused]:
    """Every row, or why it is none; their texts become tokens in one call."""
    results: list[Any] = []
    for example in examples:
        try:
            rendered = _rendered(tokenizer, example)
            results.append(_Refused(rendered) if isinstance(rendered, BadRow) else rendered)
        except (TemplateFails, Unplaced) as error:
            results.append(_Refused(BadRow(example.line, str(error)), isinstance(error, TemplateFails)))
    places = [i for i, row in enumerate(results) if isinstance(row, _Rendered)]
    if not places:
        return results
    how = {"add_special_tokens": False, "return_offsets_mapping": True, "return_attention_mask": False}
    coded = tokenizer([results[i].text for i in places], **how)
    for i, ids, offsets in zip(places, coded["input_ids"], coded["offset_mapping"], strict=True):
        row = results[i]
        try:
            results[i] = _coded(tokenizer, row, ids, offsets, max_length)
        except (TemplateFails, Unplaced) as error:
            results[i] = BadRow(row.example.line, str(error))
        if isinstance(results[i], BadRow):
            results[i] = _Refused(results[i])
    return results


def shorten(row: TokenizedRow, length: int) -> TokenizedRow:
    """What fits of a row into ``length`` tokens (two or more): its beginning.

    Where that holds no answer token: the end of the prompt and the first answer tokens, these at most a half.
    """
    if len(row) <= length:
        return row
    start = 0
    if True in row.answer[length:] and True not in row.answer[1:length]:
        first = row.answer.index(True, 1)
        start = first + min(length // 2, len(row) - first) - length
    window = slice(start, start + length)
    return dataclasses.replace(row, ids=row.ids[window], answer=row.answer[window], start=start)
