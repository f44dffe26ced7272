"""Rows as token ids: the chat template, and the mask of the answer."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from safebasin.data.example import Example
from safebasin.data.tables import BadRow
from safebasin.errors import UserError


@dataclasses.dataclass(frozen=True)
class TokenizedRow:
    """A row as token ids, and which of them the model is to learn."""

    id: str
    ids: tuple[int, ...]
    answer: tuple[bool, ...]  # one per id
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    start: int | None = None  # of a row cut short: the place of its first token in the whole row

    def __len__(self) -> int:
        return len(self.ids)


def template_digest(tokenizer: Any) -> str:
    """Digest of the chat template: training, scoring and measuring must agree on it."""
    return hashlib.blake2b(str(tokenizer.chat_template).encode(), digest_size=8).hexdigest()


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, ask: bool = False, **told: Any) -> str:
    """The conversation as the model's own chat template writes it; ``ask`` opens the assistant's turn, ``told`` is what else the template reads.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the model's tokenizer has no chat template; use the instruct model, or set tokenizer.chat_template and save it"
        )
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask, **told)


def encode(tokenizer: Any, example: Example, max_length: int) -> TokenizedRow | BadRow:
    """Token ids and answer mask of a row, by the difference of rendered prefixes; the mask ends with the turn's end token."""
    text = render(tokenizer, example.messages)
    spans = []
    for i, turn in enumerate(example.messages):
        if turn["role"] == "assistant" and turn.get("weight", 1) != 0:
            before = render(tokenizer, example.messages[:i], ask=True)
            after = render(tokenizer, example.messages[: i + 1])
            if not (text.startswith(before) and text.startswith(after)):
                return BadRow(
                    example.line, "the chat template rewrites earlier turns; the answer cannot be found in it"
                )
            spans.append((len(before), len(after)))
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = coded["input_ids"], coded["offset_mapping"]
    if len(ids) > max_length:
        return BadRow(example.line, f"over-long: {len(ids)} tokens, max_length is {max_length}")
    answer = [False] * len(ids)
    for start, end in spans:
        inside = [k for k, (a, b) in enumerate(offsets) if b > start and a < end]
        stops = [k for k in inside if ids[k] == tokenizer.eos_token_id]
        for k in inside:
            answer[k] = not stops or k <= stops[-1]
    if spans and not any(answer):
        return BadRow(example.line, "no answer token")
    return TokenizedRow(example.id, tuple(ids), tuple(answer))


def encode_all(tokenizer: Any, examples: Sequence[Example], max_length: int) -> tuple[list[TokenizedRow], list[BadRow]]:
    rows: list[TokenizedRow] = []
    bad: list[BadRow] = []
    for example in examples:
        coded = encode(tokenizer, example, max_length)
        (bad if isinstance(coded, BadRow) else rows).append(coded)  # type: ignore[arg-type]
    return rows, bad


def shorten(row: TokenizedRow, length: int) -> TokenizedRow:
    """What fits of a row into ``length`` tokens (two or more): its beginning; where that holds no answer token, the end of the prompt and the
    first answer tokens, these at most a half."""
    if len(row) <= length:
        return row
    start = 0
    if True in row.answer[length:] and True not in row.answer[1:length]:
        first = row.answer.index(True, 1)
        start = first + min(length // 2, len(row) - first) - length
    kept = slice(start, start + length)
    return dataclasses.replace(row, ids=row.ids[kept], answer=row.answer[kept], start=start)
