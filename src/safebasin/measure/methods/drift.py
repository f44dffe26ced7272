"""Drift: how far a tuned model is from the one it started from, in what it says and in what it refuses by.

    kl(x)  = mean over answer tokens of KL(model || start)                                                 (1)
    r_l    = mean_harmful h_l - mean_harmless h_l,  h_l after block l at the last prompt token             (2)
    cosine = <r_l, r_l'> / (|r_l| |r_l'|) of start and model; mean over l, and least                       (3)

Eq. 2 is the refusal direction of Arditi et al. 2024 (arXiv:2406.11717). The interval of (1) is Student's over rows, of (3) a bootstrap
over prompts, the same for both models. Departs from the paper: no layer is chosen, all are compared (the last one after the final norm).
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from pydantic import PositiveInt

from safebasin.batch import answer_logits, by_length, collate
from safebasin.data.records import Measurement
from safebasin.data.source import Source, open_prompts, open_rows
from safebasin.encode import TokenizedRow, encode_all
from safebasin.errors import UserError
from safebasin.measure import suite
from safebasin.measure.mechanics import asked
from safebasin.measure.subject import Subject
from safebasin.models.load import ModelAndTokenizer
from safebasin.stats import mean

States = Float[np.ndarray, "prompts layers hidden"]


@suite("drift", paper="arXiv:2406.11717", roles=("start",))
class Drift:
    """How far the model has moved from its start: on ordinary answers, and in the direction by which it refuses."""

    data: Source  # ordinary rows with answers
    harmful: str  # prompts
    harmless: str
    take: int | None = None  # of each prompt file
    max_length: PositiveInt = 512  # longer rows are unscored
    batch_size: PositiveInt = 16
    name: str = "drift"

    def measure(self, subject: Subject) -> Iterator[Measurement]:
        if subject.start is None or subject.start.model.config.vocab_size != subject.loaded.model.config.vocab_size:
            raise UserError(
                f"{self.name} compares with the start model, of the same vocabulary, and has none here; measure it in a run"
            )
        examples, bad = open_rows(self.data)
        rows, long = encode_all(subject.loaded.tokenizer, examples, self.max_length)
        kinds = [
            [prompt.text for prompt in open_prompts(path, take=self.take)] for path in (self.harmful, self.harmless)
        ]
        for path, kind in zip((self.data.path, self.harmful, self.harmless), (rows, *kinds), strict=True):
            if len(kind) < 2:
                raise UserError(
                    f"{self.name}: {path} gives {len(kind)} rows within max_length {self.max_length}; two are the least"
                )
        found = [kl for kl in self.kl(subject.loaded, subject.start, rows) if np.isfinite(kl)]
        value, (low, high) = mean(found) if len(found) > 1 else (None, (None, None))
        yield Measurement(
            self.name,
            "kl",
            value,
            low,
            high,
            len(found),
            len(rows) + len(long) + len(bad) - len(found),
            unit="nats a token",
        )

        prompts = [asked(subject.loaded, subject.turns(kind)) for kind in kinds]
        draw, n = np.random.default_rng(0), sum(map(len, kinds))
        weigh = [
            np.vstack([[1 / m] * m, draw.multinomial(m, [1 / m] * m, 500) / m]) for m in map(len, kinds)
        ]  # as they are, then drawn
        cosines = cosine(
            *([self.states(loaded, kind) for kind in prompts] for loaded in (subject.start, subject.loaded)), weigh
        )
        layers = [("refusal_cosine", values, f"layer {i}") for i, values in enumerate(cosines, 1)]
        for what, values, layer in (
            *layers,
            ("refusal_cosine", cosines.mean(0), ""),
            ("least_refusal_cosine", cosines.min(0), ""),
        ):
            known = bool(np.isfinite(values[0]))  # else one of the two has no direction: nothing to compare
            value, (low, high) = (
                (float(values[0]), np.nanpercentile(values[1:], (2.5, 97.5)).tolist())
                if known
                else (None, (None, None))
            )
            yield Measurement(
                self.name, what, value, low, high, n * known, n * (not known), unit="cosine", category=layer
            )

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
        found: dict[int, np.ndarray] = {}
        for indices in by_length(rows, self.batch_size):
            batch = collate([rows[i] for i in indices], loaded.tokenizer.pad_token_id).to(loaded.model.device)
            out = loaded.model(**batch.inputs, output_hidden_states=True)
            found |= zip(indices, torch.stack(out.hidden_states[1:], 1)[:, :, -1].float().cpu().numpy(), strict=True)
        return np.stack([found[i] for i in range(len(rows))])


def cosine(
    start: Sequence[States], ours: Sequence[States], weigh: Sequence[np.ndarray]
) -> Float[np.ndarray, "layers draws"]:
    """Eq. 2 and 3; (harmful, harmless) states, and a weight for each prompt in each draw. NaN where there is no direction."""
    found = []
    for layer in range(start[0].shape[1]):
        r = [weigh[0] @ harmful[:, layer] - weigh[1] @ harmless[:, layer] for harmful, harmless in (start, ours)]
        with np.errstate(invalid="ignore"):
            found.append((r[0] * r[1]).sum(-1) / (np.linalg.norm(r[0], axis=-1) * np.linalg.norm(r[1], axis=-1)))
    return np.stack(found)
