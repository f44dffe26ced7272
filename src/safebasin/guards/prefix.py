"""A guard's score of every prefix of an answer in one forward pass, for STAR-DSS (arXiv:2505.17196).

    V_k = P(safe | x, y_1:kM) = sigmoid(l_safe - l_unsafe)    two logits where the guard gives its verdict, after every
                                                              M tokens (a softmax, if there are several unsafe verdicts)

The paper runs the guard once for every k. Here the answer is read once, and a copy of the template's text behind the
answer (the suffix) is attached to every chunk, as branches to a trunk: copy k attends to the trunk up to y_kM and to
itself, at the positions that follow y_kM. What all rows begin with (the policy) is read once. A model whose attention
takes no such mask reads chunk after chunk and copies its cache for each suffix.

Departs from the paper: chunks are of the guard's tokens; a row's text is tokenised separately from the template.
"""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import Cache

from safebasin.errors import UserError
from safebasin.models.parts import context_length
from safebasin.template import render
from safebasin.tree import takes_tree

WIDTH = 2048  # tokens of suffix copies in one pass; a longer answer takes several, so that the mask stays small
Ids = Sequence[int]


class Guard(NamedTuple):
    """A guard's prompt as token ids: policy, conversation, between, answer up to the end of a chunk, suffix."""

    policy: Ids
    between: Ids
    suffix: Ids
    verdicts: Ids  # the safe one, then the unsafe ones


def read_guard(
    tokenizer: Any,
    template: str | None,
    verdicts: Sequence[str],
    opening: str = "",
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> Guard:
    """The guard's prompt, taken from its chat template.

    Args:
        tokenizer: the guard's.
        template: the user's turn, with {conversation} and {answer}; None: the chat template takes the conversation.
        verdicts: the safe one, then the unsafe ones; each is recognised by its first token.
        opening: what the guard writes before its verdict.
        variables: further variables of the chat template.

    Raises:
        UserError: a field is missing, or a verdict cannot be recognised by its first token.
    """
    turns = [{"role": "user", "content": template or "{conversation}"}, {"role": "assistant", "content": "{answer}"}]
    text = render(tokenizer, turns[: 1 if template else 2], ask=True, **variables)
    text = text if text.endswith(opening) else text + opening
    if re.findall("{conversation}|{answer}", text) != ["{conversation}", "{answer}"]:
        raise UserError("the guard's prompt must hold {conversation} and then {answer}, once each; set `template`")

    def encoded(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    parts = re.split("{conversation}|{answer}", text)
    policy, between, suffix = map(encoded, parts)
    first = []
    for verdict in verdicts:
        ids = encoded(parts[-1] + verdict)[: len(suffix) + 1]
        if ids[:-1] != suffix or ids[-1:] in ([], [tokenizer.unk_token_id]):
            raise UserError(
                f"the verdict {verdict!r} begins no token where the guard answers; set `verdicts` to words that do"
            )
        first.append(ids[-1])
    if not suffix or not 1 < len(set(first)) == len(first):
        raise UserError(
            "the guard has no verdict to give: nothing follows {answer}, or two verdicts begin with the same token; "
            "set `template` and `verdicts`"
        )
    return Guard(policy, between, suffix, first)


def check_fits(model: Any, tokens: int) -> None:
    """UserError where a guard's context does not hold a prompt of so many tokens."""
    if tokens > (context := context_length(model)):
        raise UserError(
            f"the guard's context of {context} tokens does not hold a prompt of {tokens}; take a guard of a longer "
            "context or a shorter `policy`, or leave long rows out"
        )


@torch.no_grad()
def encode_policy(model: Any, policy: Ids) -> Cache:
    """Keys and values of what all rows begin with, for one row; scoring leaves them as they are."""
    cache = DynamicCache(config=model.config)
    if policy:
        model.base_model(input_ids=torch.tensor([policy], device=model.device), past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def prefix_scores(
    model: Any,
    contexts: Sequence[Ids],
    answers: Sequence[Ids],
    suffix: Ids,
    verdicts: Ids,
    *,
    every: int,
    policy: Cache | None = None,
) -> list[Float[Tensor, " chunks"]]:
    """P(safe | policy, context, answer to the end of chunk k) over the verdicts: ceil(answer / every) numbers a row.

    Raises:
        UserError: an answer or the suffix is empty, ``every`` is below 1, or a row does not fit into the context.
    """
    if every < 1 or not suffix or not all(map(len, answers)):
        raise UserError(
            "a guard scores chunks of one token or more: the suffix or an answer is empty, or `every` is below 1"
        )
    policy = policy or encode_policy(model, ())
    rows = zip(contexts, answers, strict=True)
    check_fits(model, policy.get_seq_length() + max(len(c) + len(a) for c, a in rows) + len(suffix))
    verdict_logits = _branches if takes_tree(model) else _forks
    logits = verdict_logits(model, contexts, answers, suffix, list(verdicts), every, policy)
    return [row.float().softmax(-1)[:, 0] for row in logits]


def _branches(
    model: Any, contexts: Sequence[Ids], answers: Sequence[Ids], suffix: Ids, verdicts: Ids, every: int, policy: Cache
) -> Iterable[Float[Tensor, "chunks verdicts"]]:
    """One tree a row, all rows at once.

    Columns: policy, contexts (padded on the left: a chunk ends at one column in all rows), answers, suffix copies.
    """
    sides = [(map(torch.LongTensor, contexts), "left"), (map(torch.LongTensor, answers), "right")]
    left, right = (
        pad_sequence(list(ids), batch_first=True, padding_value=-1, padding_side=side) for ids, side in sides
    )
    trunk, rows, size, before = torch.cat([left, right], 1), len(answers), len(suffix), policy.get_seq_length()
    cache = copy.deepcopy(policy)
    cache.batch_repeat_interleave(rows)
    read = before + (trunk >= 0).cumsum(1)  # tokens up to each column: the position that follows it
    ends = torch.arange(left.shape[1], trunk.shape[1], every).add(every).clamp(max=trunk.shape[1])
    logits: list[Tensor] = []
    for some in ends.split(max(1, WIDTH // size)):
        start, stop, copies = cache.get_seq_length() - before, int(some[-1]), len(some)
        # A query attends to the columns below ``reach`` that are no padding, and a copy's query to its own copy.
        reach = torch.cat([torch.arange(start, stop) + 1, some.repeat_interleave(size)]) + before
        no_padding = pad(trunk[:, :stop] >= 0, (before, 0), value=True)[:, None]
        seen = (torch.arange(before + stop) < reach[:, None]) & no_padding
        own = torch.block_diag(*[torch.ones(size, size).tril()] * copies)
        own = pad(own, (0, 0, stop - start, 0)).bool().expand(rows, -1, -1)
        mask = (~torch.cat([seen, own], 2)[:, None]).to(model.dtype) * torch.finfo(model.dtype).min
        ids = torch.cat([trunk[:, start:stop].clamp(min=0), torch.tensor(suffix).repeat(rows, copies)], 1)
        positions = torch.cat(
            [(read[:, start:stop] - 1).clamp(min=0), (read[:, some - 1, None] + torch.arange(size)).flatten(1)], 1
        )
        last = torch.arange(stop - start + size, stop - start + size * copies + 1, size) - 1  # token of each copy
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "logits_to_keep": last}
        output = model(
            **{name: x.to(model.device) for name, x in inputs.items()}, past_key_values=cache, use_cache=True
        )
        logits.append(output.logits[..., verdicts])
        cache.crop(-copies * size)
    return [row[: -(-len(answer) // every)] for row, answer in zip(torch.cat(logits, 1), answers, strict=True)]


def _forks(
    model: Any, contexts: Sequence[Ids], answers: Sequence[Ids], suffix: Ids, verdicts: Ids, every: int, policy: Cache
) -> Iterable[Float[Tensor, "chunks verdicts"]]:
    """For any cache and attention: one row after the other, chunk after chunk, the cache copied for each suffix."""
    ending = torch.tensor([suffix], device=model.device)
    for context, answer in zip(contexts, answers, strict=True):
        cache, row = copy.deepcopy(policy), []
        for start in range(0, len(answer), every):
            new = torch.tensor([[*(() if start else context), *answer[start : start + every]]], device=model.device)
            model.base_model(input_ids=new, past_key_values=cache, use_cache=True)
            output = model(input_ids=ending, past_key_values=copy.deepcopy(cache), use_cache=True)
            row.append(output.logits[0, -1, verdicts])
        yield torch.stack(row)
