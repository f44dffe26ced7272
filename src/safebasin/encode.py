"""Rows as token ids: the chat template, and the mask of the answer. Here errors of a chat template become ours."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from safebasin.console import printable
from safebasin.data.example import Example
from safebasin.data.tables import BadRow, cause
from safebasin.errors import UserError


@dataclasses.dataclass(frozen=True)
class TokenizedRow:
    """A row as token ids, and which of them the model is to learn."""

    id: str
    ids: tuple[int, ...]
    answer: tuple[bool, ...]  # one per id
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    start: int | None = None  # of a row cut short: the place of its first token in the full row

    def __len__(self) -> int:
        return len(self.ids)


def template_digest(tokenizer: Any) -> str:
    """Digest of the chat template: training, scoring and measuring must agree on it."""
    return hashlib.blake2b(str(tokenizer.chat_template).encode(), digest_size=8).hexdigest()


class TemplateFails(UserError):
    """The chat template fails on these messages; on others it may not."""


def check_template(tokenizer: Any) -> None:
    """UserError where the tokenizer has no chat template, or several of which none is the default."""
    if not tokenizer.chat_template:
        raise UserError(
            "the model's tokenizer has no chat template; use the instruct model, or save a template with its tokenizer"
        )
    if isinstance(tokenizer.chat_template, Mapping) and "default" not in tokenizer.chat_template:
        names = ", ".join(tokenizer.chat_template)
        raise UserError(f"the model's tokenizer has the chat templates {printable(names)}; name one of them default")


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, ask: bool = False, **variables: Any) -> str:
    """The conversation as the model's own chat template writes it.

    ``ask`` opens the assistant's turn; ``variables`` are what else the template reads.

    Raises:
        UserError: no chat template, or one that is not Jinja.
        TemplateFails: a UserError too; the template fails on these messages.
    """
    check_template(tokenizer)
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask, **variables)
    except TemplateSyntaxError as error:
        raise UserError(f"the model's chat template cannot be read: line {error.lineno}: {cause(error)}") from error
    except (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise TemplateFails(f"the model's chat template fails: {cause(error)}") from error


def encode(tokenizer: Any, example: Example, max_length: int) -> TokenizedRow | BadRow:
    """Token ids and answer mask of a row; the mask ends with the turn's end token. One that cannot be used is bad.

    Raises:
        UserError: the tokenizer has no chat template that can be read.
    """
    try:
        return _encode(tokenizer, example, max_length)
    except TemplateFails as error:
        return BadRow(example.line, str(error))


def _encode(tokenizer: Any, example: Example, max_length: int) -> TokenizedRow | BadRow:
    """An answer's span is the difference of two rendered prefixes of the conversation: with it, and before it."""
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
    """The rows that can be used, in their order, and the others with their reasons.

    Raises:
        UserError: the chat template cannot be read, or fails on every one of several rows.
    """
    rows: list[TokenizedRow] = []
    bad: list[BadRow] = []
    failures = 0
    for example in examples:
        try:
            coded = _encode(tokenizer, example, max_length)
        except TemplateFails as error:
            coded, failures = BadRow(example.line, str(error)), failures + 1
        if isinstance(coded, BadRow):
            bad.append(coded)
        else:
            rows.append(coded)
    if failures == len(examples) > 1:
        raise UserError(f"line {bad[0].line}: {bad[0].reason}; so it does on all {failures} rows: mend the template")
    return rows, bad


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
