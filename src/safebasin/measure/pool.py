"""Answers by a pool: prompts in the batches of one process, each batch an item of an engine.

A worker writes the answers of its batch to a cache of its own, the part; the driver takes them over and then finds
every answer in its cache. The digest of the weights is in a cache's keys: answers of another model, or of libraries
that load it otherwise, are not found, and the driver generates them itself.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safebasin.console import progress
from safebasin.data.files import atomic_write
from safebasin.measure.answers import AnswerCache
from safebasin.measure.generate import generate
from safebasin.models.load import ModelAndTokenizer
from safebasin.spread import Engine, Facts
from safebasin.spread.parts import Parts
from safebasin.template import render

BATCH = 64  # prompts of an item: a batch of ``generate``
Turns = Sequence[Mapping[str, Any]]


class AskItem(NamedTuple):
    """A batch of prompts."""

    name: str
    turns: Sequence[Turns]
    how: Mapping[str, Any]  # arguments of ``generate``


class AskWorker:
    """Loads the model of an arm once, and answers batches."""

    def __init__(self, open_model: Callable[[], ModelAndTokenizer]):
        self.loaded = open_model()

    def __call__(self, item: AskItem, path: Path) -> Facts:
        with atomic_write(path) as part:
            cache = AnswerCache(part)
            generate(*self.loaded, item.turns, batch_size=BATCH, cache=cache, **item.how)
            cache.close()
        return {"prompts": len(item.turns)}


class Pool(NamedTuple):
    """Where an arm's prompts are answered."""

    engine: Engine
    folder: Path  # of the parts, until their answers are in the cache
    make: Callable[[], AskWorker]  # it travels: no model in it

    def fill(
        self, cache: AnswerCache, tokenizer: Any, turns: Sequence[Turns], title: str, how: Mapping[str, Any]
    ) -> None:
        """Have all answers in ``cache``.

        Raises:
            UserError: see the engine; or a file cannot be read or written.
        """
        sizes = {each: len(ids) for each, ids in _tokens(tokenizer, turns).items()}
        order = sorted(sizes, key=lambda i: -sizes[i])
        chunks = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        items = [AskItem(f"{k:06d}", [turns[i] for i in chunk], how) for k, chunk in enumerate(chunks)]
        key = hashlib.blake2b(
            repr([list(turns), how["max_new_tokens"], how.get("decided_by")]).encode(), digest_size=16
        ).hexdigest()
        parts = Parts(self.folder, key, ".db")
        parts.open()
        missing, done = parts.missing(items), 0
        with progress(title, len(order)) as advance:
            for facts in self.engine.work(missing, self.make, parts.path):
                done += facts["prompts"]
                advance(done, "")
        for item in items:
            cache.take_over(parts.path(item.name))
        parts.clear()


def _tokens(tokenizer: Any, turns: Sequence[Turns]) -> dict[int, tuple[int, ...]]:
    """The prompts that differ, by the place of the first of each, as ``generate`` runs them."""
    first: dict[tuple[int, ...], int] = {}
    for i, conversation in enumerate(turns):
        prefill = conversation[-1]["content"] if conversation[-1]["role"] == "assistant" else ""
        text = render(tokenizer, conversation[:-1] if prefill else conversation, ask=True) + prefill
        first.setdefault(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), i)
    return {i: ids for ids, i in first.items()}
