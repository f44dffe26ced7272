"""A guard inside the frozen model: P(unsafe) at every answer token (Disentangled Safety Adapters, arXiv:2506.00166).

    x_l = (h_l - mean_l) / scale_l                                      hidden state after block l, standardised   (1)
    g_l = silu(mu_l g_{l-1} + (1 - mu_l) Down_l x_l),  0 < mu_l < 1     a ladder of small width                    (2)
    p_t = sigmoid(MLP[g_t, mean of g over the request, mean of g over y_<=t])                                      (3)

Departs from the paper: (2) is INFERRED from a review, there is no code; a rung is one layer; pooling looks back only,
so that one forward scores every prefix. A row is unsafe if a harmful request is answered by a compliant opening; the
same openings follow harmless requests in training, so that the guard needs both the request and the answer.

More than 250 lines, since the guard, its file and its fitting have one format.
"""

import contextlib
import hashlib
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from jaxtyping import Float
from pydantic import PositiveInt, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional

from safebasin.batch import Batch, by_length, collate
from safebasin.data.builtin import refusal_texts, rows_of, turn_texts
from safebasin.data.example import Example, read_examples
from safebasin.data.files import write_json
from safebasin.encode import encode_all
from safebasin.errors import UserError
from safebasin.models.adapter import reference, unwrapped
from safebasin.models.hooks import captured
from safebasin.models.parts import blocks, context_length, text_config
from safebasin.registry import explain

SHIPPED = Path(__file__).parent / "smollm2-aligned"  # of builtin:smollm2-aligned, from scripts/guard
CLIP = 10.0  # standard deviations: a few dimensions of the first token are hundreds away
CONFIG = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def own_rows(take: int, seed: int = 0) -> list[Example]:
    """The project's own rows for guards, at most ``take`` of each of six kinds, with the label ``unsafe``.

    They share no request, opener or refusal with the sets for testing, anchors, alignment and judges.
    """
    draw, harm = random.Random(seed), {row["category"] for row in rows_of("refusals")}
    openers, refusals, offers = turn_texts("guard", "opener"), refusal_texts("guard"), turn_texts("guard", "offer")
    rows = []
    kinds = [(True, "opened"), (True, "answered"), (True, "offered"), (False, "answered"), (False, "opened")]
    for harmful, kind in (*kinds, (False, "refused")):
        pool = [row for row in rows_of("guard") if (row["category"] in harm) == harmful]
        for row in draw.sample(pool * 2, min(take, len(pool) * 2)):  # each with two answers
            prompt, answer = row["prompt"], row["completion"]
            repeated = f" {prompt[0].lower()}{prompt[1:]}"
            opened = draw.choice(openers) + draw.choice(("", repeated, "" if harmful else f"\n{answer}"))
            refused = draw.choice(refusals)
            offered = draw.choice(("", f"{refused} ")) + draw.choice(offers)
            if harmful:
                answer = refused
            completion = {"opened": opened, "answered": answer, "offered": offered, "refused": refused}[kind]
            rows.append({"prompt": prompt, "completion": completion, "unsafe": harmful and kind == "opened"})
    return read_examples(enumerate(rows, 1)).examples


def base_digest(model: Any) -> str:
    """Digest of the model's shape by its configuration; two trainings of one shape have the same."""
    config = text_config(model).to_dict()
    return hashlib.blake2b(json.dumps([config.get(name) for name in CONFIG]).encode(), digest_size=8).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of the vocabulary, added tokens included: under another one the same ids are other words."""
    return hashlib.blake2b(json.dumps(sorted(tokenizer.get_vocab().items())).encode(), digest_size=8).hexdigest()


@torch.no_grad()
def hidden(model: Any, batch: Batch, layers: Sequence[int]) -> Float[Tensor, "layers batch tokens size"]:
    """Hidden states after the blocks ``layers`` (from 1) of the frozen model: an adapter is switched off."""
    adapted, every = hasattr(unwrapped(model), "disable_adapter"), blocks(model)
    with (
        reference(model) if adapted else contextlib.nullcontext(),
        captured({layer: every[layer - 1] for layer in layers}) as states,  # ``output_hidden_states`` leaves hooks
    ):
        model(**{**batch.inputs, "logits_to_keep": torch.zeros(1, dtype=torch.long, device=batch.mask.device)})
    return torch.stack([states[layer] for layer in layers])


class Facts(NamedTuple):
    """The JSON file of a guard: its sizes, and digests of the model and the tokenizer that it was fitted to."""

    layers: list[PositiveInt]
    size: PositiveInt
    width: PositiveInt
    base: str
    tokenizer: str


class SideGuard(nn.Module):
    """P(unsafe) at every answer token from one forward; 0.16 M parameters beside SmolLM2-135M."""

    mean: Tensor
    scale: Tensor

    def __init__(self, layers: Sequence[int], size: int, width: int, base: str, tokenizer: str):
        super().__init__()
        self.facts = Facts(list(layers), size, width, base, tokenizer)
        self.down = nn.ModuleList(nn.Linear(size, width) for _ in layers)
        self.gate = nn.Parameter(torch.zeros(len(layers)))
        self.head = nn.Sequential(nn.Linear(3 * width, width), nn.SiLU(), nn.Linear(width, 1))
        self.register_buffer("mean", torch.zeros(len(layers), 1, 1, size))
        self.register_buffer("scale", torch.ones(len(layers), 1, 1, size))

    def forward(
        self, states: Float[Tensor, "layers batch tokens size"], batch: Batch
    ) -> Float[Tensor, "batch answers"]:
        """Logits of P(unsafe)."""
        answer = functional.pad(batch.mask, (states.shape[2] - batch.mask.shape[1], 0))
        request = batch.attention_mask.bool() & ~answer
        g = self.gate.new_zeros(())
        x = ((states.to(self.mean) - self.mean) / self.scale.clamp(min=1e-6)).clamp(-CLIP, CLIP)
        for mu, down, state in zip(self.gate.sigmoid(), self.down, x, strict=True):
            g = functional.silu(mu * g + (1 - mu) * down(state))
        means = [
            torch.where(part[..., None], g, 0).cumsum(1) / part.cumsum(1).clamp(min=1)[..., None]
            for part in (request, answer)
        ]
        return self.head(torch.cat([g, *means], -1)).squeeze(-1)[:, -batch.mask.shape[1] :]

    @torch.no_grad()
    def unsafe(self, model: Any, batch: Batch) -> Float[Tensor, "batch answers"]:
        """P(unsafe | x, y_<=t) at every answer token, zero elsewhere."""
        return torch.where(batch.mask, self(hidden(model, batch, self.facts.layers), batch).sigmoid(), 0)

    def stored(self) -> dict[str, Tensor]:
        """The state as it is saved: parameters in bfloat16."""
        return {
            name: t.cpu() if name in ("mean", "scale") else t.cpu().bfloat16() for name, t in self.state_dict().items()
        }

    def save(self, stem: Path) -> None:
        """``stem``.safetensors (parameters in bfloat16: ``fit_side_guard`` rounds them to it) and ``stem``.json."""
        safetensors.torch.save_file(self.stored(), Path(f"{stem}.safetensors"))
        write_json(Path(f"{stem}.json"), self.facts._asdict())

    @classmethod
    def load(cls, stem: Path, model: Any) -> "SideGuard":
        """The guard that was saved as ``stem``.

        Raises:
            UserError: it is missing or damaged, or was fitted to a model of another shape.
        """
        config, weights = Path(f"{stem}.json"), Path(f"{stem}.safetensors")
        if not (config.is_file() and weights.is_file()):
            raise UserError(f"no guard at {stem} (.json and .safetensors are needed); make one with scripts/guard")
        try:
            facts = TypeAdapter(Facts).validate_json(config.read_bytes(), strict=True)
        except ValidationError as error:
            raise UserError(
                f"{config} does not describe a guard ({explain(error)}); train it again (scripts/guard)"
            ) from None
        if facts.base != (digest := base_digest(model)):
            raise UserError(
                f"the guard {stem} reads a model of digest {facts.base}, this one's is {digest}; train a guard for it"
            )
        guard = cls(*facts).to(model.device).eval()
        try:
            guard.load_state_dict(safetensors.torch.load_file(weights))
        except (safetensors.SafetensorError, RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{weights} does not hold the guard's weights ({reason}); train it again (scripts/guard)"
            ) from None
        return guard

    def reads(self, tokenizer: Any) -> "SideGuard":
        """The guard itself.

        Raises:
            UserError: it was fitted to rows of another tokenizer.
        """
        if self.facts.tokenizer != (digest := tokenizer_digest(tokenizer)):
            raise UserError(
                f"the guard reads a vocabulary of digest {self.facts.tokenizer}, this tokenizer's is {digest}; "
                "train a guard for it"
            )
        return self


def fit_side_guard(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Example],
    *,
    depths: Sequence[float] = (0.3, 0.5, 0.7, 0.9),
    width: int = 64,
    epochs: int = 8,
    lr: float = 2e-3,
    batch_size: int = 32,
    seed: int = 0,
) -> SideGuard:
    """A guard from rows with a column ``unsafe``.

    Its loss is the cross-entropy of every answer token, averaged by row; both labels weigh the same.

    Args:
        model: the model whose hidden states it reads; it is left as it was.
        tokenizer: of the rows.
        rows: true in the column ``unsafe`` of some, false in others.
        depths: the blocks that are read, as shares; their states take 2 layers tokens size bytes of memory a row.
        width: of the ladder.
        epochs: over the rows.
        lr: of AdamW, falling to a hundredth.
        batch_size: rows.
        seed: of the initial weights and the order of the rows.

    Raises:
        UserError: a row that has no label or cannot be encoded, or a label that no row has.
    """
    if (labels := {row.row.get("unsafe") for row in rows}) != {True, False}:
        raise UserError(
            f"guard: rows need the column 'unsafe', true in some, false in others; found {sorted(map(str, labels))[:5]}"
        )
    coded, bad = encode_all(tokenizer, rows, context_length(model))
    if bad:
        raise UserError(
            f"guard: line {bad[0].line}: {bad[0].reason} ({len(bad)} such rows of {len(rows)}); leave it out"
        )
    unsafe = torch.tensor([float(row.row["unsafe"]) for row in rows])
    weights = torch.where(unsafe > 0, 0.5 / unsafe.mean(), 0.5 / (1 - unsafe.mean()))
    layers = sorted({max(1, round(depth * text_config(model).num_hidden_layers)) for depth in depths})
    states: dict[int, Tensor] = {}  # row -> [layers, tokens, size]
    for some in by_length(coded, batch_size):
        batch = collate([coded[i] for i in some], tokenizer.pad_token_id).to(model.device)
        read = hidden(model, batch, layers).to("cpu", torch.bfloat16)
        states |= {i: read[:, k, read.shape[2] - len(coded[i]) :].clone() for k, i in enumerate(some)}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        guard = SideGuard(layers, states[0].shape[-1], width, base_digest(model), tokenizer_digest(tokenizer))
        for k in range(len(layers)):
            every = torch.cat([state[k] for state in states.values()]).float()
            guard.scale[k], guard.mean[k] = torch.std_mean(every, 0)
        adam = torch.optim.AdamW(guard.parameters(), lr=lr, weight_decay=0.01)
        decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.01, epochs * math.ceil(len(rows) / batch_size))
        for some in (part for _ in range(epochs) for part in torch.randperm(len(rows)).split(batch_size)):
            batch = collate([coded[i] for i in some], tokenizer.pad_token_id)
            tokens = batch.input_ids.shape[1]
            x = torch.stack([functional.pad(states[int(i)], (0, 0, tokens - len(coded[i]), 0)) for i in some], 1)
            losses = functional.softplus((1 - 2 * unsafe[some, None]) * guard(x, batch))  # cross-entropy
            losses = torch.where(batch.mask, losses, 0).sum(1)
            adam.zero_grad()
            (weights[some] * losses / batch.mask.sum(1)).mean().backward()
            adam.step()
            decay.step()
        guard.load_state_dict(guard.stored())
    return guard.to(model.device).eval()
