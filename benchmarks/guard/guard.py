"""Guard scores of all prefixes of an answer: one pass against a fresh call for each, side by side.

Floor, in tokens that go through the guard, for one row: policy P, conversation and template c, answer T = 128, suffix S
(what the template has behind the answer), K = 26 chunks of M = 5, R rows that share a policy:

    fresh calls   K (P + c + S) + 1753        the prefixes 5, 10, ... 125, 128 add up to 1753
    one pass      P / R + c + T + K S

With SmolLM2's template and the default policy's closing words S is 11, and c is 19.5 on average. At P = 300 that is
10,346 against 508 with R = 4: 20 times. At P = 0 it is 2,546 against 434: 6 times. No way of scoring all prefixes can
do without K S, so a guard with a long suffix gains less: with S = 70, 6 times at P = 300. The policy is read anew in
every timed pass here; a scan reads it once for all its rows. Fresh calls go in batches of the same R rows, and ask the
head for the last token only.

Memory is the most bytes of tensors alive at once beyond the weights; what a kernel allocates inside itself is not in
it.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import Bench, experiment, ratios, seconds, take_turns
from safebasin.data.builtin import rows_of
from safebasin.errors import UserError
from safebasin.guards.prefix import Guard, encode_policy, prefix_scores, read_guard, takes_tree
from safebasin.guards.turns import text_ids
from safebasin.models.load import load
from safebasin.scan.methods.guard import POLICY

POLICIES = (300, 0)  # tokens
Rows = Sequence[tuple[Sequence[int], Sequence[int]]]  # (context, answer)


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were alive at once and were allocated inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def free(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for storage in (x.untyped_storage() for x in tree_leaves(output) if isinstance(x, Tensor)):
            if storage._cdata not in before:  # neither a view nor in place
                before.add(storage._cdata)
                weakref.finalize(storage, self.free, storage.nbytes())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
        return output


@torch.no_grad()
def fresh_calls(model: Any, guard: Guard, policy: Sequence[int], rows: Rows, every: int) -> list[Tensor]:
    """As in the paper: for every k a call of its own, over all rows that have a k-th chunk."""
    scores: list[list[Tensor]] = [[] for _ in rows]
    for k in range(0, max(len(answer) for _, answer in rows), every):
        inside = [i for i, (_, answer) in enumerate(rows) if k < len(answer)]
        texts = [[*policy, *rows[i][0], *rows[i][1][: k + every], *guard.suffix] for i in inside]
        width = max(map(len, texts))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in texts], device=model.device)
        seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in texts], device=model.device)
        inputs = {"input_ids": ids, "attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0)}
        # An index: a slice (logits_to_keep=1) would copy the head's weight, see Batch.inputs.
        last = torch.tensor([width - 1], device=model.device)
        logits = model(**inputs, logits_to_keep=last, use_cache=False).logits[:, -1, list(guard.verdicts)]
        for i, score in zip(inside, logits.float().softmax(-1)[:, 0], strict=True):
            scores[i].append(score)
    return [torch.stack(row) for row in scores]


def one_pass(model: Any, guard: Guard, policy: Sequence[int], rows: Rows, every: int) -> list[Tensor]:
    """All prefixes of all rows in one pass."""
    contexts, answers = zip(*rows, strict=True)
    cached = encode_policy(model, policy)
    return prefix_scores(model, contexts, answers, guard.suffix, guard.verdicts, every=every, policy=cached)


WAYS: dict[str, Callable[..., list[Tensor]]] = {"fresh": fresh_calls, "one_pass": one_pass}


def floor(guard: Guard, policy: int, rows: Rows, every: int) -> dict[str, int]:
    """Tokens that go through the guard, all rows together."""
    suffix = len(guard.suffix)
    chunks = [(len(c), min(k + every, len(a))) for c, a in rows for k in range(0, len(a), every)]
    fresh = sum(policy + context + prefix + suffix for context, prefix in chunks)
    shared = policy + sum(len(c) + len(a) for c, a in rows)
    return {"fresh": fresh, "one_pass": shared + len(chunks) * suffix}


def measure(
    bench: Bench,
    model: Any,
    guard: Guard,
    rows: Rows,
    *,
    every: int,
    repetitions: int,
    policies: Sequence[int] = POLICIES,
) -> None:
    """Records of one model at policies of so many tokens."""
    errors: list[float] = []
    shared = {length: policy_of(guard, length) for length in policies}
    for length, policy in shared.items():  # not timed: memory, errors, and the first touch of everything
        scores = {}
        for way, call in WAYS.items():
            with Peak() as peak:
                scores[way] = call(model, guard, policy, rows, every)
            bench.record(f"{way}.memory.policy{length}", peak.most / 2**20, n=1, unit="MiB")
        errors += [float((x - y).abs().max()) for x, y in zip(scores["fresh"], scores["one_pass"], strict=True)]
    for length, policy in shared.items():
        calls = {way: functools.partial(call, model, guard, policy, rows, every) for way, call in WAYS.items()}
        values = take_turns({way: functools.partial(seconds, call) for way, call in calls.items()}, repetitions)
        tokens = floor(guard, length, rows, every)
        for way in WAYS:
            bench.timing(f"{way}.seconds.policy{length}", values[way], unit="s", tokens=tokens[way])
        gain = round(tokens["fresh"] / tokens["one_pass"], 2)
        speedup = ratios(values, "fresh", "one_pass")
        bench.timing(f"one_pass.speedup.policy{length}", speedup, unit="times", floor=gain)
    prefixes = sum(-(-len(answer) // every) for _, answer in rows) * len(policies)
    bench.record("one_pass.max_error", max(errors), n=prefixes, unit="probability")


def inputs(model: str, dtype: str, rows: int, answer_tokens: int) -> tuple[Any, Guard, Rows]:
    """A guard's network, its reader, and rows to score."""
    network, tokenizer = load(model, dtype=dtype)
    if not takes_tree(network):
        raise UserError(f"{model} takes no tree of a mask, so there is no one pass to measure")
    reader = read_guard(tokenizer, POLICY, ("No", "Yes"))
    texts = rows_of("builtin:ordinary-test")
    ids = text_ids(tokenizer, "\n\n".join(row["completion"] for row in texts))
    answers = [(ids[i * answer_tokens :] + ids)[:answer_tokens] for i in range(rows)]
    contexts = [[*text_ids(tokenizer, row["prompt"]), *reader.between] for row in texts[:rows]]
    return network, reader, list(zip(contexts, answers, strict=True))


def policy_of(guard: Guard, length: int) -> list[int]:
    """A policy of so many tokens."""
    return (list(guard.policy) * (1 + length // len(guard.policy)))[:length]


@experiment(
    "guard",
    replaces=("what",),
    goals={"one_pass.speedup.policy300": ">= 10", "one_pass.max_error": "<= 1e-3"},
    quick={"rows": 1, "answer_tokens": 8, "repetitions": 2},
)
def guard(
    *,
    bench: Bench,
    model: Annotated[str, Parameter(help="the guard network")] = "builtin:smollm2",
    dtype: Literal["float32", "bfloat16"] = "float32",
    rows: int = 4,
    answer_tokens: int = 128,
    every: Annotated[int, Parameter(help="tokens of a chunk")] = 5,
    repetitions: int = 6,
) -> None:
    """All prefixes of an answer in one pass, against a call for each: how much faster, how equal?"""
    network, reader, pairs = inputs(model, dtype, rows, answer_tokens)
    bench.facts |= {"model": model, "dtype": dtype, "rows": rows, "suffix": len(reader.suffix)}
    measure(bench, network, reader, pairs, every=every, repetitions=repetitions)
