"""A guard inside the frozen model: it tells *unsafe* at every answer token (Disentangled Safety Adapters, arXiv:2506.00166).

    x_l = (h_l - mean_l) / scale_l                                        hidden state after block l, standardised   (1)
    g_l = silu(mu_l g_{l-1} + (1 - mu_l) Down_l x_l),  0 < mu_l < 1       a ladder of small width                    (2)
    p_t = sigmoid(MLP[g_t, mean of g over the request, mean of g over y_<=t])                                        (3)

Departs from the paper: (2) is INFERRED from a review, there is no code; a rung is one layer; pooling looks back only, so one forward
scores every prefix; unsafe is a harmful request with an opening. Openings follow harmless requests too: it takes both to tell.
"""

import contextlib
import hashlib
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from safebasin.batch import Batch, by_length, collate
from safebasin.data.builtin import refusal_texts, rows_of
from safebasin.data.example import Example, read_examples
from safebasin.data.tables import write_json
from safebasin.encode import encode_all
from safebasin.errors import UserError
from safebasin.models.adapter import reference, unwrapped

SHIPPED = Path(__file__).parent / "smollm2-aligned"  # of builtin:smollm2-aligned: made by scripts/guard
CLIP = 10.0  # standard deviations: a few dimensions of the first token are hundreds away
OPENINGS = (
    "Certainly! These are the steps:",
    "Yes. To do this, first",
    "Sure, let me explain.",
    "No problem. Start by",
    "Okay:",
)
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
    """The project's own rows, at most ``take`` of each of five kinds. builtin.OPENERS are not in them: they are left for testing."""
    draw, harm = random.Random(seed), {row["category"] for row in rows_of("refusals")}
    rows = []
    for harmful, kind in ((True, "opened"), (True, "told"), (False, "told"), (False, "opened"), (False, "refused")):
        pool = [row for row in rows_of("align") if (row["category"] in harm) == harmful]
        for asked, told in ((row["prompt"], row["completion"]) for row in draw.sample(pool, min(take, len(pool)))):
            opened = draw.choice(OPENINGS) + draw.choice(
                ("", f" {asked[0].lower()}{asked[1:]}", "" if harmful else f"\n{told}")
            )
            answer = {"opened": opened, "told": told, "refused": draw.choice(refusal_texts())}[kind]
            rows.append({"prompt": asked, "completion": answer, "unsafe": harmful and kind == "opened"})
    return read_examples(enumerate(rows, 1)).examples


def base_digest(model: Any) -> str:
    """Digest of the model's shape as its configuration has it; two trainings of one shape have the same."""
    config = model.config.get_text_config().to_dict()
    return hashlib.blake2b(json.dumps([config.get(name) for name in CONFIG]).encode(), digest_size=8).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of the vocabulary, added tokens with it: under another one the same ids are other words."""
    return hashlib.blake2b(json.dumps(sorted(tokenizer.get_vocab().items())).encode(), digest_size=8).hexdigest()


@torch.no_grad()
def hidden(model: Any, batch: Batch, layers: Sequence[int]) -> Float[Tensor, "layers batch tokens size"]:
    """Hidden states after the named blocks of the frozen model: where there is an adapter, it is switched off."""
    count, found = model.config.get_text_config().num_hidden_layers, {}
    blocks = next(part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == count)
    with contextlib.ExitStack() as inside:  # our own hooks: ``output_hidden_states`` leaves its behind
        inside.enter_context(
            reference(model) if hasattr(unwrapped(model), "disable_adapter") else contextlib.nullcontext()
        )
        for layer in layers:
            inside.enter_context(
                blocks[layer - 1].register_forward_hook(lambda *told, layer=layer: found.update({layer: told[2]}))
            )
        model(**{**batch.inputs, "logits_to_keep": torch.zeros(1, dtype=torch.long, device=batch.mask.device)})
    return torch.stack([found[layer][0] if isinstance(found[layer], tuple) else found[layer] for layer in layers])


class SideGuard(nn.Module):
    """P(unsafe) at every answer token from one forward; 0.16 M parameters beside SmolLM2-135M."""

    def __init__(self, layers: Sequence[int], size: int, width: int, base: str, tokenizer: str):
        super().__init__()
        self.facts = {"layers": list(layers), "size": size, "width": width, "base": base, "tokenizer": tokenizer}
        self.down = nn.ModuleList(nn.Linear(size, width) for _ in layers)
        self.gate = nn.Parameter(torch.zeros(len(layers)))
        self.head = nn.Sequential(nn.Linear(3 * width, width), nn.SiLU(), nn.Linear(width, 1))
        self.register_buffer("mean", torch.zeros(len(layers), 1, 1, size))
        self.register_buffer("scale", torch.ones(len(layers), 1, 1, size))

    def forward(
        self, states: Float[Tensor, "layers batch tokens size"], batch: Batch
    ) -> Float[Tensor, "batch answers"]:
        told, seen = functional.pad(batch.mask, (states.shape[2] - batch.mask.shape[1], 0)), batch.attention_mask.bool()
        g = self.gate.new_zeros(())
        x = ((states.to(self.mean) - self.mean) / self.scale.clamp(min=1e-6)).clamp(-CLIP, CLIP)
        for mu, down, state in zip(self.gate.sigmoid(), self.down, x, strict=True):
            g = functional.silu(mu * g + (1 - mu) * down(state))
        means = [
            torch.where(w[..., None], g, 0).cumsum(1) / w.cumsum(1).clamp(min=1)[..., None]
            for w in (seen & ~told, told)
        ]
        return self.head(torch.cat([g, *means], -1)).squeeze(-1)[:, -batch.mask.shape[1] :]

    @torch.no_grad()
    def unsafe(self, model: Any, batch: Batch) -> Float[Tensor, "batch answers"]:
        """P(unsafe | x, y_<=t) at every answer token, zero where there is none."""
        return torch.where(batch.mask, self(hidden(model, batch, self.facts["layers"]), batch).sigmoid(), 0)

    def stored(self) -> dict[str, Tensor]:
        return {
            name: t.cpu() if name in ("mean", "scale") else t.cpu().bfloat16() for name, t in self.state_dict().items()
        }

    def save(self, stem: Path) -> None:
        """``stem``.safetensors (parameters in bfloat16, which ``fit`` has rounded them to) and ``stem``.json."""
        safetensors.torch.save_file(self.stored(), stem.with_suffix(".safetensors"))
        write_json(stem.with_suffix(".json"), self.facts)

    @classmethod
    def load(cls, stem: Path, model: Any) -> "SideGuard":
        """The guard that was saved as ``stem``, for rows that it ``reads``. UserError: it is not there, or for a model of another shape."""
        if not (
            (config := stem.with_suffix(".json")).is_file() and (weights := stem.with_suffix(".safetensors")).is_file()
        ):
            raise UserError(f"no guard at {stem} (.json and .safetensors are needed); make one with scripts/guard")
        facts = json.loads(config.read_text(encoding="utf-8"))
        if "tokenizer" not in facts:
            raise UserError(
                f"the guard {stem} does not say which tokenizer's rows it reads; train it again (scripts/guard)"
            )
        if facts["base"] != (found := base_digest(model)):
            raise UserError(
                f"the guard {stem} reads a model of digest {facts['base']}, this one's is {found}; train a guard for it"
            )
        guard = cls(**facts).to(model.device).eval()
        guard.load_state_dict(safetensors.torch.load_file(weights))
        return guard

    def reads(self, tokenizer: Any) -> "SideGuard":
        """The guard, if rows come from the tokenizer that it was trained with. UserError: they do not."""
        if self.facts["tokenizer"] != (found := tokenizer_digest(tokenizer)):
            raise UserError(
                f"the guard reads a vocabulary of digest {self.facts['tokenizer']}, this tokenizer's is {found}; train one"
            )
        return self


def fit(model: Any, tokenizer: Any, rows: Sequence[Example], *, depths: Sequence[float] = (0.3, 0.5, 0.7, 0.9), width: int = 64,
        epochs: int = 8, lr: float = 2e-3, batch_size: int = 32, seed: int = 0) -> SideGuard:  # fmt: skip
    """A guard from rows with a column ``unsafe``: cross-entropy of every answer token, averaged by row; both labels weigh the same.

    ``depths``: the blocks that are read, as shares; their states are kept, in 2 layers tokens size bytes a row.
    UserError: a row that has no label or cannot be encoded, or a label that no row has."""
    if (labels := {row.row.get("unsafe") for row in rows}) != {True, False}:
        raise UserError(
            f"guard: rows need the column 'unsafe', true in some, false in others; found {sorted(map(str, labels))[:5]}"
        )
    coded, bad = encode_all(tokenizer, rows, model.config.max_position_embeddings)
    if bad:
        raise UserError(
            f"guard: line {bad[0].line}: {bad[0].reason} ({len(bad)} such rows of {len(rows)}); leave it out"
        )
    aimed = torch.tensor([float(row.row["unsafe"]) for row in rows])
    weigh = torch.where(aimed > 0, 0.5 / aimed.mean(), 0.5 / (1 - aimed.mean()))
    layers = sorted({max(1, round(depth * model.config.num_hidden_layers)) for depth in depths})
    states: dict[int, Tensor] = {}  # row -> [layers, tokens, size]
    for some in by_length(coded, batch_size):
        found = hidden(model, collate([coded[i] for i in some], tokenizer.pad_token_id).to(model.device), layers).to(
            "cpu", torch.bfloat16
        )
        states |= {i: found[:, k, found.shape[2] - len(coded[i]) :].clone() for k, i in enumerate(some)}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        guard = SideGuard(layers, states[0].shape[-1], width, base_digest(model), tokenizer_digest(tokenizer))
        for k in range(len(layers)):
            guard.scale[k], guard.mean[k] = torch.std_mean(
                torch.cat([state[k] for state in states.values()]).float(), 0
            )
        adam = torch.optim.AdamW(guard.parameters(), lr=lr, weight_decay=0.01)
        decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.01, epochs * math.ceil(len(rows) / batch_size))
        for some in (part for _ in range(epochs) for part in torch.randperm(len(rows)).split(batch_size)):
            batch = collate([coded[i] for i in some], tokenizer.pad_token_id)
            x = torch.stack(
                [functional.pad(states[int(i)], (0, 0, batch.input_ids.shape[1] - len(coded[i]), 0)) for i in some], 1
            )
            each = torch.where(
                batch.mask, functional.softplus((1 - 2 * aimed[some, None]) * guard(x, batch)), 0
            )  # cross-entropy
            adam.zero_grad()
            (weigh[some] * each.sum(1) / batch.mask.sum(1)).mean().backward()
            adam.step()
            decay.step()
        guard.load_state_dict(guard.stored())
    return guard.to(model.device).eval()
