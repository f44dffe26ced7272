"""Answers of two models at once: the logits of the start and of the tuned model, mixed (after arXiv:2506.00166).

    z = share z_start + (1 - share) z_tuned,    share = 0 for a request that the guard finds safe

z_tuned are the logits with the adapter on, z_start with it off: a share of 0 is the tuned model, 1 the start. A guard
may choose request by request, share(x) = share 1[P(unsafe | x) > t] (the paper's targeted form, from a review of it:
INFERRED).

Departs from the paper, where a side network makes the safe logits: here the aligned model is the start and what was
tuned is an adapter beside it, so that a token costs two forwards and the mixture has no weights of its own.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safebasin.errors import DefenceError, UserError
from safebasin.measure.generate import Answer, generate
from safebasin.models.adapter import adapter_settings, switched_off, why_off_is_not_start
from safebasin.models.load import ModelAndTokenizer

Conversation = Sequence[Mapping[str, Any]]


class Caches(NamedTuple):
    """Keys and values of both models for the same tokens."""

    tuned: Any
    start: Any

    def batch_select_indices(self, places: Tensor) -> None:
        for cache in self:
            cache.batch_select_indices(places)


class Mixed(NamedTuple):
    """What a forward of ``Mixture`` gives."""

    logits: Float[Tensor, "batch tokens vocabulary"]  # float32
    past_key_values: Caches


class Mixture(nn.Module):
    """A model with an adapter beside its weights (``models.adapter.attach``), its logits mixed with its start's.

    Raises:
        DefenceError: the model has no adapter.
    """

    share: Tensor

    def __init__(self, model: Any, share: float):
        super().__init__()
        adapters = adapter_settings(model)
        if not adapters:
            raise DefenceError("mixing needs a tuned model with its adapter beside the weights, and this one has none")
        if reason := next(filter(None, map(why_off_is_not_start, adapters.values())), ""):
            raise DefenceError(f"mixing needs the start, which is the adapter switched off, and {reason}")
        self.model, self.config, self.device = model, model.config, model.device
        self.generation_config, self.peft_config = model.generation_config, model.peft_config
        self.register_buffer("share", torch.tensor(share, dtype=torch.float64))  # so that a digest of the model has it

    def forward(self, *, past_key_values: Caches | None = None, **inputs: Any) -> Mixed:
        past = past_key_values or Caches(None, None)
        tuned = self.model(past_key_values=past.tuned, **inputs)
        with switched_off(self.model):
            start = self.model(past_key_values=past.start, **inputs)
        logits = torch.lerp(tuned.logits.float(), start.logits.float(), float(self.share))
        return Mixed(logits, Caches(tuned.past_key_values, start.past_key_values))


@dataclasses.dataclass
class Mixing:
    """How an arm's answers are mixed. ``requests`` counts, by what was asked, all requests and those that were mixed.

    Args:
        share: of the start's logits, above 0 and at most 1.
        unsafe: which requests are mixed; None: all. The others are answered by the tuned model alone.
    """

    share: float
    unsafe: Callable[[Sequence[Conversation]], Sequence[bool]] | None = None
    requests: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"mixing takes a share of the start's logits above 0 and at most 1, found {self.share}")

    def answers(
        self,
        loaded: ModelAndTokenizer,
        conversations: Sequence[Conversation],
        title: str = "",
        *,
        progress: Callable[[int, str], None] | None = None,
        **how: Any,
    ) -> list[Answer]:
        """Greedy answers in the order of the requests; ``how`` are arguments of ``generate``.

        Raises:
            UserError, DefenceError: see ``generate`` and ``Mixture``.
        """
        model, tokenizer = loaded
        mixture = Mixture(model, self.share)
        flags = [True] * len(conversations) if self.unsafe is None else list(self.unsafe(conversations))
        counts = self.requests.setdefault(title, {"asked": 0, "mixed": 0})
        counts["asked"], counts["mixed"] = counts["asked"] + len(flags), counts["mixed"] + sum(flags)
        answers: dict[int, Answer] = {}
        for flag, subject in ((False, model), (True, mixture)):
            chosen, done = [i for i, each in enumerate(flags) if each == flag], len(answers)

            def advance(count: int, text: str, done: int = done) -> None:
                if progress:
                    progress(done + count, text)

            texts = [conversations[i] for i in chosen]
            answers |= zip(chosen, generate(subject, tokenizer, texts, progress=advance, **how), strict=True)
        return [answers[i] for i in range(len(flags))]
