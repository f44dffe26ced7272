"""Drift: how far a tuned model is from the one it started from, in its answers and in the direction of its refusals.

    kl(x)  = mean over answer tokens of KL(model || start)                                                 (1)
    r_l    = mean_harmful h_l - mean_harmless h_l,  h_l after block l at the last prompt token             (2)
    cosine = <r_l, r_l'> / (|r_l| |r_l'|) of start and model; mean over l, and least                       (3)

Eq. 2 is the refusal direction of Arditi et al. 2024 (arXiv:2406.11717). The interval of (1) is Student's over rows, of
(3) a bootstrap over prompts, the same for both models. Departs from the paper: no layer is chosen, all are compared
(the last one after the final norm).
"""

from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt

from safebasin.batch import answer_logits, by_length, collate
from safebasin.data.records import Measurement
from safebasin.data.source import SetName, Source, open_prompts, open_rows
from safebasin.encode import TokenizedRow, encode_all
from safebasin.errors import UserError
from safebasin.measure import suite
from safebasin.measure.mechanics import prompt_rows
from safebasin.measure.subject import Subject
from safebasin.models.load import ModelAndTokenizer
from safebasin.models.parts import context_length, text_config
from safebasin.stats import mean

States = Float[np.ndarray, "prompts layers hidden"]


@suite("drift", paper="arXiv:2406.11717", roles=("start",))
class Drift:
    """How far the model has moved from its start: on ordinary answers, and in the direction by which it refuses."""

    data: Source  # ordinary rows with answers
    harmful: SetName  # prompts
    harmless: SetName  # prompts
    take: Annotated[int, Field(ge=2)] | None = None  # of each prompt file
    max_length: PositiveInt = 512  # rows longer than it or the context are unscored
    batch_size: PositiveInt = 16
    name: str = "drift"

    def measure(self, subject: Subject) -> Iterator[Measurement]:
        start = subject.start
        if start is None or text_config(start.model).vocab_size != text_config(subject.loaded.model).vocab_size:
            raise UserError(
                f"{self.name} compares with a start model of the same vocabulary and has none here; measure it in a run"
            )
        examples, bad = open_rows(self.data)
        rows, long = encode_all(subject.loaded.tokenizer, examples, min(self.max_length, context_length(start.model)))
        harmful, harmless = (
            [prompt.text for prompt in open_prompts(path, take=self.take)] for path in (self.harmful, self.harmless)
        )
        sizes = {self.data.path: len(rows), self.harmful: len(harmful), self.harmless: len(harmless)}
        if few := [f"{path} gives {size} rows" for path, size in sizes.items() if size < 2]:
            raise UserError(f"{self.name}: {few[0]} within max_length {self.max_length}; two are the least")
        kl = [number for number in self.kl(subject.loaded, start, rows) if np.isfinite(number)]
        value, (low, high) = mean(kl) if len(kl) > 1 else (None, (None, None))
        unscored = len(rows) + len(long) + len(bad) - len(kl)
        yield Measurement(self.name, "kl", value, low, high, len(kl), unscored, unit="nats a token")

        draw = np.random.default_rng(0)
        weights = [  # of the prompts: as they are, then drawn again
            np.vstack([[1 / n] * n, draw.multinomial(n, [1 / n] * n, 500) / n]) for n in (len(harmful), len(harmless))
        ]
        prompts = [prompt_rows(subject.loaded, subject.turns(texts)) for texts in (harmful, harmless)]
        states = [[self.states(loaded, texts) for texts in prompts] for loaded in (start, subject.loaded)]
        cosines = cosine(states[0], states[1], weights)
        n = len(harmful) + len(harmless)
        for layer, values in enumerate(cosines, 1):
            yield self.interval("refusal_cosine", values, n, f"layer {layer}")
        yield self.interval("refusal_cosine", cosines.mean(0), n, "")
        yield self.interval("least_refusal_cosine", cosines.min(0), n, "")

    def interval(self, what: str, values: Float[np.ndarray, " draws"], n: int, category: str) -> Measurement:
        """The first of the values with the 95 % of the others; no number where a model has no direction to compare."""
        if not np.isfinite(values[0]):
            return Measurement(self.name, what, None, None, None, 0, n, unit="cosine", category=category)
        low, high = np.nanpercentile(values[1:], (2.5, 97.5)).tolist()
        return Measurement(self.name, what, float(values[0]), low, high, n, unit="cosine", category=category)

    @torch.inference_mode()
    def kl(self, loaded: ModelAndTokenizer, start: ModelAndTokenizer, rows: Sequence[TokenizedRow]) -> Iterator[float]:
        """Eq. 1 of every row, the longest first."""
        for indices in by_length(rows, self.batch_size):
            batch = collate([rows[i] for i in indices], loaded.tokenizer.pad_token_id).to(loaded.model.device)
            p, q = (
                answer_logits(model, batch)[batch.mask].float().log_softmax(-1) for model in (loaded.model, start.model)
            )
            yield from (float(part.mean()) for part in (p.exp() * (p - q)).sum(-1).split(batch.mask.sum(-1).tolist()))

    @torch.inference_mode()
    def states(self, loaded: ModelAndTokenizer, rows: Sequence[TokenizedRow]) -> States:
        """h of eq. 2 at every layer, in the order of the rows."""
        states: dict[int, np.ndarray] = {}
        for indices in by_length(rows, self.batch_size):
            batch = collate([rows[i] for i in indices], loaded.tokenizer.pad_token_id).to(loaded.model.device)
            out = loaded.model(**batch.inputs, output_hidden_states=True)
            last = torch.stack(out.hidden_states[1:], 1)[:, :, -1].float().cpu().numpy()
            states |= zip(indices, last, strict=True)
        return np.stack([states[i] for i in range(len(rows))])


def cosine(
    start: Sequence[States], tuned: Sequence[States], weights: Sequence[Float[np.ndarray, "draws prompts"]]
) -> Float[np.ndarray, "layers draws"]:
    """Eq. 2 and 3 of (harmful, harmless) states; ``weights`` of their prompts in each draw. NaN: no direction."""
    cosines = []
    for layer in range(start[0].shape[1]):
        r, s = (
            weights[0] @ harmful[:, layer] - weights[1] @ harmless[:, layer] for harmful, harmless in (start, tuned)
        )
        with np.errstate(invalid="ignore"):
            cosines.append((r * s).sum(-1) / (np.linalg.norm(r, axis=-1) * np.linalg.norm(s, axis=-1)))
    return np.stack(cosines)
