"""The guard of an arm whose answers are mixed: which requests are unsafe, by a scorer that gives probabilities.

The guard reads each request as if it was being complied with: P(unsafe | x, OPENER), the worst token of the opener. It
reads the start, whose adapter is switched off, so that no tuned model guards itself.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from safebasin.batch import by_length, collate
from safebasin.data.example import Example
from safebasin.data.files import write_json
from safebasin.encode import TokenizedRow, encode_all
from safebasin.errors import UserError
from safebasin.measure.mix import Conversation, Mixing
from safebasin.models.adapter import switched_off
from safebasin.models.load import ModelAndTokenizer
from safebasin.models.parts import context_length
from safebasin.pipeline.config import Mix
from safebasin.pipeline.plan import Plan
from safebasin.pipeline.read import anchor_rows

OPENER = "Sure, here is"
BATCH = 16  # requests a forward


def mixing(
    settings: Mix, guard: Any, loaded: ModelAndTokenizer, anchors: Mapping[str, Sequence[TokenizedRow]]
) -> Mixing:
    """How an arm's answers are mixed; ``guard``: a scorer, or None; ``anchors``: rows that it may be fitted to."""
    if guard is None:
        return Mixing(settings.share)
    with switched_off(loaded.model):
        fitted = guard.fit(*loaded, anchors)
    return Mixing(settings.share, request_guard(guard, fitted, loaded, settings.above))


def request_guard(
    guard: Any, fitted: Any, loaded: ModelAndTokenizer, above: float
) -> Callable[[Sequence[Conversation]], list[bool]]:
    """Which requests a fitted scorer gives more than ``above``.

    Raises:
        UserError: (of the function) a request that does not fit into the model's context.
    """
    model, tokenizer = loaded

    def unsafe(conversations: Sequence[Conversation]) -> list[bool]:
        examples = [Example(str(i), _opened(turns), {}, i) for i, turns in enumerate(conversations, 1)]
        rows, bad = encode_all(tokenizer, examples, context_length(model))
        if bad:
            raise UserError(f"mix: the guard cannot read request {bad[0].line}: {bad[0].reason}")
        flags = [False] * len(rows)
        for chosen in by_length(rows, BATCH):
            batch = collate([rows[i] for i in chosen], tokenizer.pad_token_id).to(model.device)
            with switched_off(model), torch.no_grad():
                worst = guard.score(model, batch, fitted).amax(1).tolist()
            for i, p in zip(chosen, worst, strict=True):
                flags[i] = p > above
        return flags

    return unsafe


def _opened(turns: Conversation) -> tuple[Mapping[str, Any], ...]:
    """A request with the opener as its answer, behind what a begun answer has; earlier answers are not judged."""
    begun = turns[-1]["content"] + " " if turns[-1]["role"] == "assistant" else ""
    before = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in turns[: -1 if begun else None]]
    return (*before, {"role": "assistant", "content": begun + OPENER})


def of_arm(plan: Plan, arm: str, loaded: ModelAndTokenizer) -> Mixing | None:
    """How an arm's answers are mixed; None where its model answers alone."""
    settings, guard = plan.recipe.arms[arm].mix, plan.guards.get(arm)
    if settings is None:
        return None
    return mixing(settings, guard, loaded, anchor_rows(plan, loaded) if guard else {})


def write_mix(plan: Plan, arm: str, requests: Mapping[str, Mapping[str, int]], target: Path) -> None:
    """``arms/ARM/mix.json``: what was mixed how, and how many requests of each suite."""
    settings = plan.recipe.arms[arm].mix
    assert settings is not None
    facts = dataclasses.asdict(settings) | {"of": plan.recipe.arms[arm].of, "requests": requests}
    write_json(target, facts)
