"""A guard's score of every prefix of an answer in one forward pass, for STAR-DSS (arXiv:2505.17196).

    V_k = P(safe | x, y_1:kM) = sigmoid(l_safe - l_unsafe)       two logits where the guard says its verdict, after every M tokens
                                (a softmax, where there are several unsafe verdicts)

The paper asks the guard afresh for every k. Here the answer is read once, and a copy of the template's words behind the answer (the
suffix) hangs on every chunk, as branches on a trunk: copy k sees the trunk up to y_kM and itself, at the positions that follow y_kM.
What all rows begin with (the policy) is read once. Departs from the paper: chunks are of the guard's tokens; a row's text is tokenised
apart from the template. A model whose attention takes no such mask reads chunk after chunk and forks its cache for each suffix.
"""

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from safebasin.encode import render
from safebasin.errors import UserError

WIDTH = 2048  # tokens of suffix copies in one pass: a longer answer takes several, so that the mask does not grow with its square
Ids = Sequence[int]


class Guard(NamedTuple):
    """A guard as token ids. It reads: policy, conversation, between, answer up to the end of a chunk, suffix; then it says a verdict."""

    policy: Ids
    between: Ids
    suffix: Ids
    verdicts: Ids  # the safe one, then the unsafe ones


def read_guard(
    tokenizer: Any,
    template: str | None,
    verdicts: Sequence[str],
    opening: str = "",
    told: Mapping[str, Any] = MappingProxyType({}),
) -> Guard:
    """``template``: the user's turn, with {conversation} and {answer}; None: the guard's chat template takes the conversation itself.

    ``verdicts``: the safe one, then the unsafe ones. ``opening``: what the guard says before its verdict. ``told``: what else its chat template
    reads. UserError if a field is missing or a verdict cannot be told by its first token.
    """
    turns = [{"role": "user", "content": template or "{conversation}"}, {"role": "assistant", "content": "{answer}"}]
    text = render(tokenizer, turns[: 1 if template else 2], ask=True, **told)
    text = text if text.endswith(opening) else text + opening
    if re.findall("{conversation}|{answer}", text) != ["{conversation}", "{answer}"]:
        raise UserError("what the guard is shown must hold {conversation} and then {answer}, once each; set `template`")
    before, between, after = re.split("{conversation}|{answer}", text)
    shown = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, between, after)]
    said = [tokenizer(after + word, add_special_tokens=False)["input_ids"][: len(shown[2]) + 1] for word in verdicts]
    for word, ids in zip(verdicts, said, strict=True):
        if ids[:-1] != shown[2] or ids[-1] == tokenizer.unk_token_id:
            raise UserError(
                f"the verdict {word!r} begins no token where the guard answers; set `verdicts` to words that do"
            )
    first = [ids[-1] for ids in said]
    if not shown[2] or not 1 < len(set(first)) == len(first):
        raise UserError(
            "the guard is not asked: nothing follows {answer}, or two verdicts begin alike; set `template` and `verdicts`"
        )
    return Guard(*shown, first)


def takes_tree(model: Any) -> bool:
    """Whether attention takes any mask: eager or SDPA, full in every layer, positions given."""
    wanted = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"} <= set(
        inspect.signature(model.forward).parameters
    )
    full = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    return wanted and full and model.config._attn_implementation in ("eager", "sdpa")


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
    """P(safe | policy, context, answer to the end of chunk k) over the verdicts: ceil(answer / every) numbers a row; none may be empty."""
    if every < 1 or not suffix or not all(map(len, answers)):
        raise UserError(
            "a guard is asked behind chunks of one token or more: the suffix or an answer is empty, or `every` is below 1"
        )
    policy, ask = policy or encode_policy(model, ()), _branches if takes_tree(model) else _forks
    return [
        row.float().softmax(-1)[:, 0] for row in ask(model, contexts, answers, suffix, list(verdicts), every, policy)
    ]


def _branches(
    model: Any, contexts: Sequence[Ids], answers: Sequence[Ids], suffix: Ids, verdicts: Ids, every: int, policy: Cache
) -> Any:
    """One tree a row. Columns: policy, contexts (padded on the left: a chunk ends at one column in all rows), answers, suffix copies."""
    sides = [(map(torch.LongTensor, contexts), "left"), (map(torch.LongTensor, answers), "right")]
    left, right = (
        pad_sequence(list(ids), batch_first=True, padding_value=-1, padding_side=side) for ids, side in sides
    )
    trunk, rows, size, before = torch.cat([left, right], 1), len(answers), len(suffix), policy.get_seq_length()
    cache = DynamicCache(
        [
            tuple(part.expand(rows, -1, -1, -1) for part in (layer.keys, layer.values))
            for layer in policy.layers
            if before
        ]
    )
    read = before + (trunk >= 0).cumsum(1)  # tokens up to each column: the position that follows it
    ends = torch.arange(left.shape[1], trunk.shape[1], every).add(every).clamp(max=trunk.shape[1])
    logits: list[Tensor] = []
    for some in ends.split(max(1, WIDTH // size)):
        start, stop, copies = cache.get_seq_length() - before, int(some[-1]), len(some)
        reach = (
            torch.cat([torch.arange(start, stop) + 1, some.repeat_interleave(size)]) + before
        )  # columns that a query sees of the trunk
        seen = (torch.arange(before + stop) < reach[:, None]) & pad(trunk[:, :stop] >= 0, (before, 0), value=True)[
            :, None
        ]
        own = pad(
            torch.block_diag(*[torch.ones(size, size).tril()] * copies), (0, 0, stop - start, 0)
        ).bool()  # a copy sees itself alone
        mask = (~torch.cat([seen, own.expand(rows, -1, -1)], 2)[:, None]).to(model.dtype) * torch.finfo(model.dtype).min
        ids = torch.cat([trunk[:, start:stop].clamp(min=0), torch.tensor(suffix).repeat(rows, copies)], 1)
        positions = torch.cat(
            [(read[:, start:stop] - 1).clamp(min=0), (read[:, some - 1, None] + torch.arange(size)).flatten(1)], 1
        )
        verdict = (
            torch.arange(stop - start + size, stop - start + size * copies + 1, size) - 1
        )  # the last token of each copy
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "logits_to_keep": verdict}
        told = model(
            **{name: x.to(model.device) for name, x in inputs.items()}, past_key_values=cache, use_cache=True
        ).logits
        logits.append(told[..., verdicts])
        cache.crop(-copies * size)
    return [row[: -(-len(answer) // every)] for row, answer in zip(torch.cat(logits, 1), answers, strict=True)]


def _forks(
    model: Any, contexts: Sequence[Ids], answers: Sequence[Ids], suffix: Ids, verdicts: Ids, every: int, policy: Cache
) -> Any:
    """For any cache and attention: a row alone, chunk after chunk, the cache forked for each suffix."""
    for context, answer in zip(contexts, answers, strict=True):
        cache, row = copy.deepcopy(policy), []
        for start in range(0, len(answer), every):
            new = torch.tensor([[*(() if start else context), *answer[start : start + every]]], device=model.device)
            model.base_model(input_ids=new, past_key_values=cache, use_cache=True)
            asked = {"input_ids": torch.tensor([suffix], device=model.device), "past_key_values": copy.deepcopy(cache)}
            row.append(model(**asked, use_cache=True).logits[0, -1, verdicts])
        yield torch.stack(row)
