"""Small things that tests build on: a tiny Llama, rows of random tokens, one seed."""

import numpy as np
import pyarrow.parquet
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from safebasin.batch import answer_logits, target_logits
from safebasin.data.files import write_json
from safebasin.encode import TokenizedRow
from safebasin.scan.scan import score_table
from safebasin.scan.scores import ANCHORS
from safebasin.train.loss import scatter_answers
from safebasin.train.reference import reference_logits
from safebasin.vector import Vector

VOCABULARY, PAD = 64, 0
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Three layers, grouped attention, float32, eager: small enough for a brute-force truth."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def random_rows(count: int, seed: int = 0, longest: int = 14, columns: tuple[str, ...] = ()) -> list[TokenizedRow]:
    """Rows of uneven length; the answer is a tail of uneven length; columns are numbers in 0..1 per answer token."""
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        n = int(draw.integers(4, longest))
        length = int(draw.integers(1, n - 1))
        ids = tuple(int(x) for x in draw.integers(1, VOCABULARY, n))
        answer = tuple(k >= n - length for k in range(n))
        rows.append(TokenizedRow(f"row{i}", ids, answer, {name: draw.random(length).tolist() for name in columns}))
    return rows


def answer_nll(model, batch):
    """Negative log-likelihood of every answer token, written plainly: [batch, answers]."""
    logits = answer_logits(model, batch)
    losses = functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none").view(
        batch.mask.shape
    )
    return torch.where(batch.mask, losses, 0)


def kl_to_reference(model, batch):
    """KL(model || reference) over the whole vocabulary at every answer token: [batch, answers]."""
    q = reference_logits(model, batch).float().log_softmax(-1)
    p = target_logits(model, batch).float().log_softmax(-1)
    return scatter_answers(torch.sum(p.exp() * (p - q), -1), batch)


def write_scores(path, examples, scanned) -> None:
    """The scores of a scan and of its anchors, as ``read_scores`` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path.with_name(ANCHORS), scanned.anchors)
    pyarrow.parquet.write_table(score_table(examples, scanned), path)


def gradient_of(model, batch, objective, names) -> Vector:
    """grad_W of a scalar for the named weights, by plain autograd."""
    weights = {name: model.get_parameter(name) for name in names}
    with torch.enable_grad():
        return Vector(zip(weights, torch.autograd.grad(objective(model, batch), list(weights.values())), strict=True))
