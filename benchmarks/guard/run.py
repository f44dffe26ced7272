"""Guard scores of all prefixes of an answer: one pass against a fresh call for each, side by side. One command: ``python benchmarks/guard/run.py``.

Floor, in tokens that go through the guard, for one row: policy P, conversation and template c, answer T = 128, suffix S (what the
template has behind the answer), K = 26 chunks of M = 5, R rows that share a policy:

    fresh calls   K (P + c + S) + 1753        the prefixes 5, 10, ... 125, 128 add up to 1753
    one pass      P / R + c + T + K S

With SmolLM2's template and the default policy's closing words S is 11, and c is 19.5 on average. At P = 300 that is 10,346 against 508
with R = 4: 20 times. At P = 0 it is 2,546 against 434: 6 times. No way of scoring all prefixes can do without K S, so a guard with a
long suffix gains less: with S = 70, 6 times at P = 300. The policy is read anew in every timed pass here; a scan reads it once for all
its rows. Fresh calls go in batches of the same R rows, and ask the head for the last token only.

Memory is the most bytes of tensors alive at once beyond the weights; what a kernel takes inside itself is not in it.
"""

import argparse
import datetime
import json
import os
import platform
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safebasin.data.builtin import rows_of
from safebasin.guards.prefix import Guard, encode_policy, prefix_scores, read_guard, takes_tree
from safebasin.guards.turns import text_ids
from safebasin.models.load import load
from safebasin.runtime import keep_memory
from safebasin.scan.methods.guard import POLICY

HERE = Path(__file__).parent
POLICIES = (300, 0)  # tokens
GOALS = {"one_pass.speedup.policy300": ">= 10", "one_pass.max_error": "<= 1e-3"}
Rows = Sequence[tuple[Sequence[int], Sequence[int]]]  # (context, answer)


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were alive at once and were made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def free(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for storage in (x.untyped_storage() for x in tree_leaves(made) if isinstance(x, Tensor)):
            if storage._cdata not in known:  # neither a view nor in place
                known.add(storage._cdata)
                weakref.finalize(storage, self.free, storage.nbytes())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
        return made


@torch.no_grad()
def fresh_calls(model: Any, guard: Guard, policy: Sequence[int], rows: Rows, every: int) -> list[Tensor]:
    """As in the paper: for every k a call of its own, over all rows that have a k-th chunk."""
    scores: list[list[Tensor]] = [[] for _ in rows]
    for k in range(0, max(len(answer) for _, answer in rows), every):
        asked = {
            i: [*policy, *context, *answer[: k + every], *guard.suffix]
            for i, (context, answer) in enumerate(rows)
            if k < len(answer)
        }
        width = max(map(len, asked.values()))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in asked.values()], device=model.device)
        seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in asked.values()], device=model.device)
        inputs = {"input_ids": ids, "attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0)}
        last = torch.tensor(
            [width - 1], device=model.device
        )  # an index: a slice (logits_to_keep=1) would copy the head's weight, see Batch.inputs
        said = (
            model(**inputs, logits_to_keep=last, use_cache=False)
            .logits[:, -1, list(guard.verdicts)]
            .float()
            .softmax(-1)[:, 0]
        )
        for i, score in zip(asked, said, strict=True):
            scores[i].append(score)
    return [torch.stack(row) for row in scores]


def one_pass(model: Any, guard: Guard, policy: Sequence[int], rows: Rows, every: int) -> list[Tensor]:
    contexts, answers = zip(*rows, strict=True)
    return prefix_scores(
        model, contexts, answers, guard.suffix, guard.verdicts, every=every, policy=encode_policy(model, policy)
    )


WAYS: dict[str, Callable[..., list[Tensor]]] = {"fresh": fresh_calls, "one_pass": one_pass}


def floor(guard: Guard, policy: int, rows: Rows, every: int) -> dict[str, int]:
    """Tokens that go through the guard, all rows together."""
    fresh = sum(
        policy + len(c) + min(k + every, len(a)) + len(guard.suffix) for c, a in rows for k in range(0, len(a), every)
    )
    return {
        "fresh": fresh,
        "one_pass": policy + sum(len(c) + len(a) + -(-len(a) // every) * len(guard.suffix) for c, a in rows),
    }


def median(values: Sequence[float]) -> tuple[float, list[float]]:
    """The median and its 95 % interval by order statistics: six values or more, and no shape is assumed."""
    if len(values) < 6:
        raise ValueError(f"a 95 % interval of a median needs six values, found {len(values)}")
    order, k = sorted(values), int(stats.binom.ppf(0.025, len(values), 0.5))
    return float(np.median(order)), [order[k - 1], order[-k]]


def measure(
    model: Any, guard: Guard, rows: Rows, *, every: int, repetitions: int, policies: Sequence[int] = POLICIES
) -> list[dict[str, Any]]:
    """Records of one model. Repetitions are interleaved, and the ways take turns at going first."""
    records: list[dict[str, Any]] = []
    seconds: dict[tuple[str, int], list[float]] = {(way, policy): [] for way in WAYS for policy in policies}
    errors = []

    def note(what: str, value: float, interval: list[float] | None, n: int, unit: str, **more: Any) -> None:
        records.append(
            {"what": what, "value": value, "interval": interval, "n": n, "goal": GOALS.get(what), "unit": unit} | more
        )

    shared = {length: (list(guard.policy) * (1 + length // len(guard.policy)))[:length] for length in policies}
    for length, policy in shared.items():  # not timed: memory, errors, and the first touch of everything
        found = {}
        for way, call in WAYS.items():
            with Peak() as peak:
                found[way] = call(model, guard, policy, rows, every)
            note(f"{way}.memory.policy{length}", peak.most / 2**20, None, 1, "MiB")
        errors += [float((x - y).abs().max()) for x, y in zip(found["fresh"], found["one_pass"], strict=True)]
    for repetition in range(repetitions):
        for length, policy in shared.items():
            for way in sorted(WAYS, reverse=repetition % 2 == 1):
                begun = time.perf_counter()
                WAYS[way](model, guard, policy, rows, every)
                if model.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[way, length].append(time.perf_counter() - begun)
    for length in policies:
        for way in WAYS:
            tokens = floor(guard, length, rows, every)
            note(f"{way}.seconds.policy{length}", *median(seconds[way, length]), repetitions, "s", tokens=tokens[way])
        ratios = [slow / fast for slow, fast in zip(seconds["fresh", length], seconds["one_pass", length], strict=True)]
        note(
            f"one_pass.speedup.policy{length}",
            *median(ratios),
            repetitions,
            "times",
            floor=round(tokens["fresh"] / tokens["one_pass"], 2),
        )
    prefixes = sum(-(-len(answer) // every) for _, answer in rows) * len(policies)
    note("one_pass.max_error", max(errors), None, prefixes, "probability")
    return records


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--model", default="builtin:smollm2", help="the guard network")
    ask.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    ask.add_argument("--rows", type=int, default=4)
    ask.add_argument("--answer-tokens", type=int, default=128)
    ask.add_argument("--every", type=int, default=5)
    ask.add_argument(
        "--repetitions",
        type=int,
        default=6,
        choices=range(6, 100),
        metavar="N",
        help="6 or more: fewer give no interval",
    )
    ask.add_argument("--out", type=Path, default=HERE / "results.json")
    asked = ask.parse_args()
    keep_memory()
    model, tokenizer = load(asked.model, dtype=asked.dtype)
    if not takes_tree(model):
        raise SystemExit(f"{asked.model} takes no tree of a mask, so there is no one pass to measure")
    guard = read_guard(tokenizer, POLICY, ("No", "Yes"))
    told = rows_of("builtin:ordinary-test")
    text = text_ids(tokenizer, "\n\n".join(row["completion"] for row in told))
    answers = [(text[i * asked.answer_tokens :] + text)[: asked.answer_tokens] for i in range(asked.rows)]
    contexts = [[*text_ids(tokenizer, row["prompt"]), *guard.between] for row in told[: asked.rows]]
    rows = list(zip(contexts, answers, strict=True))
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {model.device.type}",
        "date": datetime.date.today().isoformat(),
    }
    facts |= {
        "model": asked.model,
        "dtype": asked.dtype,
        "rows": asked.rows,
        "threads": torch.get_num_threads(),
        "suffix": len(guard.suffix),
    }
    records = [
        record | facts for record in measure(model, guard, rows, every=asked.every, repetitions=asked.repetitions)
    ]
    known = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.is_file() else []
    names = {record["what"] for record in records}
    kept = [record for record in known if record["what"] not in names]  # dsa.py writes here too
    asked.out.write_text(json.dumps([*kept, *records], indent=1) + "\n", encoding="utf-8")
    for record in records:
        print(
            f"{record['what']:32} {record['value']:12.6g} {record['unit']:12} {record['interval'] or ''} {record['goal'] or ''}"
        )


if __name__ == "__main__":
    main()
