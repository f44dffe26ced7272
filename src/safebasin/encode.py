"""Rows as token ids: the chat template, and the mask of the answer.

Answers are found in the final rendering of a row, by ``safebasin.places``. Rows are rendered and tokenised together,
and what is learned of them is marked in one array of all their tokens.

More than 250 lines, since rows are rendered, tokenised and marked together, in one pass.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32

from safebasin.data.example import Example
from safebasin.data.json_rows import BadRow
from safebasin.errors import UserError
from safebasin.places import Places, Unplaced, answer_places, check_contents, control_tokens
from safebasin.template import TemplateFails, generation_marks, has_marks, render_all
from safebasin.tokens import TokenizedTexts

MOST_TURNS = 20_000  # of a row
MOST_CHARACTERS = 20_000_000
TOGETHER = 256  # rows whose texts are rendered and tokenised in one call
ENDLESS = "the chat template ends an answer with no special token: nothing teaches the model to stop"


@dataclasses.dataclass(frozen=True, eq=False, init=False, slots=True)
class TokenizedRow:
    """A row as token ids, and which of them the model is to learn.

    Both are read-only arrays, which may lie in a file that is mapped into memory; other sequences become arrays.
    """

    id: str
    ids: Int32[np.ndarray, " tokens"]
    answer: Bool[np.ndarray, " tokens"]
    columns: Mapping[str, Any]
    start: int | None  # of a row cut short: the place of its first token in the full row
    note: str  # how its answers were found, where not all of them could be

    def __init__(
        self,
        id: str,
        ids: Sequence[Any] | np.ndarray,
        answer: Sequence[Any] | np.ndarray,
        columns: Mapping[str, Any] | None = None,
        start: int | None = None,
        note: str = "",
    ):
        values = (id, _frozen(ids, np.int32), _frozen(answer, np.bool_), columns or {}, start, note)
        for name, value in zip(self.__slots__, values, strict=True):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenizedRow):
            return NotImplemented
        same = (self.id, self.columns, self.start, self.note) == (other.id, other.columns, other.start, other.note)
        return same and np.array_equal(self.ids, other.ids) and np.array_equal(self.answer, other.answer)

    @property
    def first_answer(self) -> int:
        """The place of the first token that is learned; the number of tokens, where none is."""
        return int(self.answer.argmax()) if self.answer.any() else len(self)


def _frozen(values: Sequence[Any] | np.ndarray, dtype: Any) -> np.ndarray:
    """A read-only array; the same one where it is that."""
    if isinstance(values, np.ndarray) and values.dtype == dtype and not values.flags.writeable:
        return values
    array = np.array(values, dtype)
    array.flags.writeable = False
    return array


class Refused(NamedTuple):
    """Why a row cannot be learned."""

    reason: str
    tokens: int = 0  # of its text, where it came to that
    template: bool = False  # which fails


def encode(tokenizer: Any, example: Example, max_length: int) -> TokenizedRow | BadRow:
    """Token ids and answer mask of a row; the mask ends with the turn's end token. One that cannot be used is bad.

    Raises:
        UserError: the tokenizer has no chat template that can be read.
    """
    rows, bad = encode_all(tokenizer, [example], max_length)
    return rows[0] if rows else bad[0]


def encode_all(tokenizer: Any, examples: Sequence[Example], max_length: int) -> tuple[list[TokenizedRow], list[BadRow]]:
    """The rows that can be used, in their order, and the others with their reasons.

    Raises:
        UserError: the chat template cannot be read, or fails on every one of several rows.
    """
    return fit(encoded(tokenizer, examples), examples, max_length)


def fit(
    coded: Sequence[TokenizedRow | Refused], examples: Sequence[Example], max_length: int
) -> tuple[list[TokenizedRow], list[BadRow]]:
    """``encode_all`` of rows that are encoded at their full length.

    Raises:
        UserError: the chat template fails on every one of several rows.
    """
    rows: list[TokenizedRow] = []
    bad: list[BadRow] = []
    failures = 0
    for row, example in zip(coded, examples, strict=True):
        size = row.tokens if isinstance(row, Refused) else len(row)
        if size > max_length:
            bad.append(BadRow(example.line, f"over-long: {size} tokens, max_length is {max_length}"))
        elif isinstance(row, Refused):
            bad.append(BadRow(example.line, row.reason))
            failures += row.template
        else:
            rows.append(row)
    if failures == len(examples) > 1:
        raise UserError(f"line {bad[0].line}: {bad[0].reason}; so it does on all {failures} rows: correct the template")
    return rows, bad


def encoded(tokenizer: Any, examples: Sequence[Example]) -> list[TokenizedRow | Refused]:
    """Every row at its full length, or why there is none, in their order.

    Raises:
        UserError: the chat template cannot be read.
    """
    parts = (examples[start : start + TOGETHER] for start in range(0, len(examples), TOGETHER))
    return [row for part in parts for row in _together(tokenizer, part)]


class _Rendered(NamedTuple):
    example: Example
    text: str
    places: Places


def _together(tokenizer: Any, examples: Sequence[Example]) -> list[TokenizedRow | Refused]:
    """Every row, or why it is none; their texts are rendered in one call, and become tokens in one."""
    results: list[Any] = [_refusal(tokenizer, example) for example in examples]
    free = [i for i, refused in enumerate(results) if refused is None]
    for i, text in zip(free, render_all(tokenizer, [examples[i] for i in free]), strict=True):
        try:
            if isinstance(text, TemplateFails):
                raise text
            results[i] = _Rendered(examples[i], text, answer_places(tokenizer, examples[i], text))
        except (TemplateFails, Unplaced) as error:
            results[i] = Refused(str(error), template=isinstance(error, TemplateFails))
    coded = _coded(tokenizer, [row for row in results if isinstance(row, _Rendered)])
    return [next(coded) if isinstance(row, _Rendered) else row for row in results]


def _refusal(tokenizer: Any, example: Example) -> Refused | None:
    """Why a row is not even rendered."""
    turns, size = len(example.messages), sum([len(turn["content"]) for turn in example.messages])
    if turns > MOST_TURNS or size > MOST_CHARACTERS:
        return Refused(f"{turns} turns with {size} characters; at most {MOST_TURNS} and {MOST_CHARACTERS} are read")
    try:
        check_contents(tokenizer, example)
    except Unplaced as error:
        return Refused(str(error))
    return None


def _coded(tokenizer: Any, rows: Sequence[_Rendered]) -> Iterator[TokenizedRow | Refused]:
    """Each row by the tokens of its text, and the place of each token in it."""
    if not rows:
        return
    tokens = TokenizedTexts(tokenizer, [row.text for row in rows])
    control = tokens.having(control_tokens(tokenizer).ids)
    forged = _forged(tokenizer, tokens, control, [row.places.contents for row in rows])
    _, low, high = answers = tokens.inside([row.places.answers for row in rows])
    stops = np.flatnonzero(tokens.having([tokenizer.eos_token_id]))
    last = np.append(stops, -1)[np.searchsorted(stops, high) - 1]  # the last stop before the end of an answer's text
    learned = tokens.covered(low, np.where(last >= low, last + 1, high))
    learned &= ~tokens.covered(*tokens.inside([row.places.unlearned for row in rows])[1:])
    failures = _apply_marks(tokenizer, rows, tokens.first, learned, answers) if has_marks(tokenizer) else {}
    learned.flags.writeable = False
    places = np.flatnonzero(learned)
    ends = np.append(0, control[places].cumsum())
    begin, end = np.searchsorted(places, tokens.first[:-1]), np.searchsorted(places, tokens.first[1:])
    endless = (end > begin) & (ends[end] == ends[np.maximum(begin, end - 3)])  # white space may follow the end
    for i, (row, first, behind) in enumerate(zip(rows, tokens.first, tokens.first[1:], strict=False)):
        reason = failures.get(i) or ("" if end[i] > begin[i] or not row.example.learned else "no answer token")
        if i in forged:
            yield Refused(forged[i])
        elif reason:
            yield Refused(reason, int(behind - first))
        else:
            note = row.places.note or (ENDLESS if endless[i] else "")
            yield TokenizedRow(row.example.id, tokens.ids[first:behind], learned[first:behind], note=note)


def _forged(
    tokenizer: Any, tokens: TokenizedTexts, control: Bool[np.ndarray, " tokens"], contents: Sequence[Any]
) -> dict[int, str]:
    """Rows in which a content has a part in a control token, which is none of the template's; and the reason."""
    owners, low, high = tokens.inside(contents)
    before = np.append(0, control.cumsum())
    reasons: dict[int, str] = {}
    for k in np.flatnonzero(before[high] > before[low]):
        name = tokenizer.convert_ids_to_tokens(int(tokens.ids[low[k] + control[low[k] :].argmax()]))
        reason = f"a content forms the control token {name!r} in the rendered text: a forged turn"
        reasons.setdefault(int(owners[k]), reason)
    return reasons


def _apply_marks(
    tokenizer: Any,
    rows: Sequence[_Rendered],
    first: Int[np.ndarray, " rows_and_end"],
    learned: Bool[np.ndarray, " tokens"],
    answers: tuple[Int[np.ndarray, " spans"], Int[np.ndarray, " spans"], Int[np.ndarray, " spans"]],
) -> dict[int, str]:
    """Leave of the answers what the template marks, and what follows the last mark of a turn: its end. Rows on which
    the template fails, and how."""
    failures = {}
    for i, row in enumerate(rows):
        begin, end = first[i : i + 2]
        try:
            marked = np.array(generation_marks(tokenizer, row.example.messages, row.example.tools), bool)
        except TemplateFails as error:
            failures[i] = str(error)
            continue
        if not marked.any() or len(marked) != end - begin:
            continue
        allowed = np.zeros(end - begin, bool)
        for owner, low, high in zip(*answers, strict=True):
            inside = slice(low - begin, high - begin)
            if owner == i and marked[inside].any():
                allowed[inside] = marked[inside]
                allowed[low - begin + marked[inside].nonzero()[0][-1] + 1 : high - begin] = True
        learned[begin:end] &= allowed
    return failures


def shorten(row: TokenizedRow, length: int) -> TokenizedRow:
    """What fits of a row into ``length`` tokens (two or more): its beginning.

    Where that holds no answer token: the end of the prompt and the first answer tokens, these at most a half.
    """
    if len(row) <= length:
        return row
    start = 0
    if row.answer[length:].any() and not row.answer[1:length].any():
        first = 1 + int(row.answer[1:].argmax())
        start = first + min(length // 2, len(row) - first) - length
    window = slice(start, start + length)
    return dataclasses.replace(row, ids=row.ids[window], answer=row.answer[window], start=start)
