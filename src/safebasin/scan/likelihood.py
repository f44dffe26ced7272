"""How likely the model finds an answer that is put before it: all of it, or how it begins."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from safebasin.batch import Batch, answer_logits
from safebasin.data.example import Example
from safebasin.data.tables import BadRow
from safebasin.encode import TokenizedRow, encode
from safebasin.errors import UserError


def log_likelihood(model: Any, batch: Batch) -> Float[Tensor, " batch"]:
    """log P(answer | prompt) in nats, in float32 or wider: summed over every row's answer tokens."""
    logits = answer_logits(model, batch)[batch.mask]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logs = -functional.cross_entropy(wide, batch.labels[batch.mask], reduction="none")
    return torch.zeros(batch.mask.shape, dtype=logs.dtype, device=logs.device).masked_scatter(batch.mask, logs).sum(1)


def opening_margin(model: Any, batch: Batch) -> Float[Tensor, ""]:
    """mean_k (log P(refusal | x_k) - log P(compliance | x_k)) in nats, of k refusals and behind them k compliances.

    Raises:
        UserError: it is not above 0.
    """
    refusal, compliance = log_likelihood(model, batch).chunk(2)
    margin = (refusal - compliance).mean()
    if margin <= 0:
        raise UserError(
            "the start model does not refuse the probe; it is not aligned (refusal less compliance is "
            f"{margin.item():.3g} nats); use an aligned model, or probe rows that refuse in the model's own words"
        )
    return margin


def answered(row: TokenizedRow, answer: Sequence[int] | int) -> TokenizedRow:
    """The row up to its first answer, and then other answer tokens, or that many of its own.

    Raises:
        UserError: the row has no answer token.
    """
    if True not in row.answer[1:]:
        raise UserError(f"the anchor row {row.id} has no answer token; give each probe prompt an answer (a refusal)")
    first = row.answer.index(True, 1)
    end = row.answer.index(False, first) if False in row.answer[first:] else len(row)
    ids = row.ids[first : min(end, first + answer)] if isinstance(answer, int) else tuple(answer)
    return TokenizedRow(row.id, row.ids[:first] + ids, (False,) * first + (True,) * len(ids))


def opening_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The tokens of ``text`` as an answer begins with them (with or without a space: as the template has it).

    Raises:
        UserError: the text is not whole tokens there, or the tokenizer does not know it.
    """
    turns = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": text})
    coded = encode(tokenizer, Example("", turns, {}, 0), max_length=1 << 20)
    if isinstance(coded, BadRow):
        raise UserError(f"cannot find {text!r} at the start of an answer: {coded.reason}")
    ids = coded.ids[coded.answer.index(True) :]
    for n in range(1, len(ids) + 1):
        if tokenizer.decode(ids[:n]).strip() == text:
            return ids[:n]
    raise UserError(
        f"{text!r} is not whole tokens where an answer starts (found {tokenizer.decode(ids)!r}); choose other words"
    )
