"""The definition that the host must equal: a plain loop over whole batches, with the formulas written out."""

import copy

import torch
from tiny import LORA, PAD, random_rows, tiny_model

from safebasin.batch import collate
from safebasin.model import fresh_adapter
from safebasin.train.stream import Stream
from safebasin.vector import trainable


def log_probabilities(model, batch):
    """[batch, answers, vocabulary] by the whole forward: no tail, no head on chosen positions."""
    told = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.inputs["position_ids"]).logits
    return told[:, -batch.mask.shape[1] - 1 : -1].log_softmax(-1)


def mean_nll(model, batch):
    picked = log_probabilities(model, batch).gather(-1, batch.labels[..., None])[..., 0]
    return -(picked * batch.mask).sum() / batch.mask.sum()


def mean_kl(model, reference, batch):
    with torch.no_grad():
        p = log_probabilities(reference, batch)
    q = log_probabilities(model, batch)
    return ((p.exp() * (p - q)).sum(-1) * batch.mask).sum() / batch.mask.sum()


def gradient(loss, model):
    parameters = list(trainable(model).values())
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])


def loop(rule: str, steps: int, lr: float = 0.05, clip: float = 1.0) -> dict[str, torch.Tensor]:
    """AdamW on eight rows a step; ``rule``: sft, or safegrad with rho 1."""
    model = fresh_adapter(tiny_model(), LORA, seed=0)
    reference = copy.deepcopy(model)
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=0.0)
    task = Stream("task", random_rows(22, 1), 8, 8, 0, PAD)
    align = Stream("align", random_rows(7, 2), 4, 4, 0, PAD)
    model.train()
    for step in range(steps):
        u = gradient(mean_nll(model, collate(task.rows_at(step), PAD)), model)
        if rule == "safegrad":
            a = gradient(mean_kl(model, reference, collate(align.rows_at(step), PAD)), model)
            if u @ a < 0 and a @ a > 1e-9:
                u = u - (u @ a) / (a @ a) * a
            u = u + a
        offset = 0
        for p in parameters.values():
            p.grad = u[offset : offset + p.numel()].view_as(p).clone()
            offset += p.numel()
        torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
        optimizer.step()
    return {name: p.detach().clone() for name, p in parameters.items()}
