"""The ghost product against its slow truth, one backward a row; and one number derived by hand."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PAD, tiny_model
from torch import nn

from safebasin.batch import Encoded, collate
from safebasin.record import DefenceError, UserError
from safebasin.scan.ghost import answer_nll, ghost_product, only_trainable, probe_gradient
from safebasin.scan.source import MODULES, target_weights
from safebasin.vector import Vector


def tiny(dtype=torch.float32):
    """The tiny Llama with weights far from zero, so that attention and gates are not flat."""
    model = tiny_model(0, dtype)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(10)
    return model


MODEL = tiny()


def random_direction(model, targets, seed=1):
    random = torch.Generator().manual_seed(seed)
    weights = {name: model.get_parameter(name) for name in targets}
    return Vector({name: torch.randn(w.shape, generator=random).to(w.dtype) for name, w in weights.items()})


def row(lengths, seed=0):
    prompt, answer = lengths
    ids = torch.randint(1, 64, (prompt + answer,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Encoded(f"r{seed}", tuple(ids), (False,) * prompt + (True,) * answer)


def one_by_one(model, rows, direction, reduction):
    """The definition: a batch of one row, ordinary autograd, the inner product of the whole gradient."""
    scores = []
    for each in rows:
        batch = collate([each], PAD)

        def loss(m, b):
            return (answer_nll(m, b) * b.mask).sum() / (b.mask.sum() if reduction == "mean" else 1)

        scores.append(probe_gradient(model, batch, loss, direction) @ direction)
    return torch.tensor(scores, dtype=torch.float32)


def close(fast, slow, rtol=1e-4):
    torch.testing.assert_close(fast, slow, rtol=rtol, atol=rtol * float(slow.abs().max()))


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=5),
    layers=st.sampled_from([None, 1, 2]),
    reduction=st.sampled_from(["sum", "mean"]),
    seed=st.integers(0, 99),
)
def test_one_backward_for_all_rows_equals_one_a_row(lengths, layers, reduction, seed):
    rows = [row(each, seed + i) for i, each in enumerate(lengths)]
    direction = random_direction(MODEL, target_weights(MODEL, layers=layers), seed)
    fast = ghost_product(MODEL, collate(rows, PAD), answer_nll, direction, reduction=reduction)
    close(fast, one_by_one(MODEL, rows, direction, reduction))


def test_batch_and_padding_do_not_matter():
    """A row scores the same alone, in a batch, and with extra padding on its left."""
    rows = [row((3, 2), 1), row((5, 7), 2), row((20, 4), 3)]
    direction = random_direction(MODEL, target_weights(MODEL))
    together = ghost_product(MODEL, collate(rows, PAD), answer_nll, direction)
    alone = torch.cat([ghost_product(MODEL, collate([each], PAD), answer_nll, direction) for each in rows])
    close(together, alone)
    assert together.unique().numel() == 3


def test_masked_answer_positions_carry_nothing():
    """Two assistant turns with a user turn between them: the middle tokens have no loss of their own."""
    ids = row((12, 0), 5).ids
    turns = Encoded("two", ids, (False,) * 3 + (True,) * 2 + (False,) * 4 + (True,) * 3)
    direction = random_direction(MODEL, target_weights(MODEL))
    close(ghost_product(MODEL, collate([turns, row((2, 3))], PAD), answer_nll, direction)[:1], one_by_one(MODEL, [turns], direction, "sum"))


def test_a_loss_at_masked_positions_does_not_count():
    """Masking is done here, not by the loss: one that speaks at every position of the tail changes nothing."""

    def loud(model, batch):
        return answer_nll(model, dataclasses.replace(batch, mask=torch.ones_like(batch.mask)))

    direction = random_direction(MODEL, target_weights(MODEL))
    batch = collate([row((3, 2), 1), row((5, 7), 2)], PAD)
    close(ghost_product(MODEL, batch, loud, direction), ghost_product(MODEL, batch, answer_nll, direction))


def test_lora_factors():
    """The B factors of a fresh adapter, where B = 0 but its gradient is not."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")).eval()
    targets = target_weights(model, part="lora_B")
    assert len(targets) == 6 and all(name.endswith("lora_B.default.weight") for name in targets)
    assert len(target_weights(model)) == 21  # the full weights under the adapter are found as well
    direction = random_direction(model, targets)
    rows = [row((4, 3), 1), row((6, 5), 2)]
    fast = ghost_product(model, collate(rows, PAD), answer_nll, direction)
    close(fast, one_by_one(model, rows, direction, "sum"))
    with model.disable_adapter(), pytest.raises(DefenceError, match="no gradient reached"):
        ghost_product(model, collate(rows, PAD), answer_nll, direction)


class OneLayer(nn.Module):
    """One-hot tokens through one linear layer, W = 0: every next token has the probability 1/2."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(2, 2, bias=False)})])
        nn.init.zeros_(self.layers[0]["q_proj"].weight)

    def forward(self, input_ids, logits_to_keep, **_):
        logits = self.layers[0]["q_proj"](nn.functional.one_hot(input_ids, 2).float())
        return SimpleNamespace(logits=logits[:, logits_to_keep])


def test_by_hand():
    """Token 0 is the prompt. The answer 1 has D = p - e_1 = (1/2, -1/2) and X = e_0, so grad L = [[1/2, 0], [-1/2, 0]].

    The margin S = logit[0] - logit[1] behind the prompt has grad S = [[1, 0], [-1, 0]]. Hence <grad L, grad S> = 1/2 + 1/2 = 1:
    learning to answer 1 lowers the margin. Learning to answer 0 raises it: -1. Answer 1 twice: the second has X = e_1 and adds 0;
    the mean over its two tokens is 1/2.
    """
    model = OneLayer()
    probe = collate([Encoded("p", (0, 0), (False, True))], PAD)

    def margin(m, b):
        logits = m(**b.inputs).logits[0, 0]
        return logits[0] - logits[1]

    direction = probe_gradient(model, probe, margin, ["layers.0.q_proj.weight"])
    assert direction["layers.0.q_proj.weight"].tolist() == [[1.0, 0.0], [-1.0, 0.0]]
    rows = [Encoded("yes", (0, 1), (False, True)), Encoded("no", (0, 0), (False, True)), Encoded("2", (0, 1, 1), (False, True, True))]
    assert ghost_product(model, collate(rows, PAD), answer_nll, direction).tolist() == [1.0, -1.0, 1.0]
    assert ghost_product(model, collate(rows, PAD), answer_nll, direction, reduction="mean").tolist() == [1.0, -1.0, 0.5]


def test_bfloat16_stays_near_float32():
    """Products are accumulated in float32: what is left is the rounding of the forward and the backward themselves."""
    rows = [row((6, 8), i) for i in range(8)]
    direction = random_direction(MODEL, target_weights(MODEL))
    exact = ghost_product(MODEL, collate(rows, PAD), answer_nll, direction)
    coarse = ghost_product(tiny(dtype=torch.bfloat16), collate(rows, PAD), answer_nll, direction)
    assert coarse.dtype == torch.float32
    assert torch.corrcoef(torch.stack([exact, coarse]))[0, 1] > 0.999


def test_the_backward_stops_at_the_lowest_target():
    """With the last layer only, nothing below it has a graph: the first layer's output requires no gradient."""
    seen = {}
    hook = MODEL.model.layers[1].register_forward_hook(lambda _, __, out: seen.update(below=out.requires_grad))
    try:
        direction = random_direction(MODEL, target_weights(MODEL, layers=1))
        with torch.no_grad():  # and a caller's no_grad does not switch the score off
            score = ghost_product(MODEL, collate([row((4, 4))], PAD), answer_nll, direction)
    finally:
        hook.remove()
    assert seen == {"below": False} and score.abs().item() > 0


def test_the_model_is_left_as_it_was():
    model = tiny()
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    targets = target_weights(model)
    batch = collate([row((4, 4))], PAD)
    direction = probe_gradient(model, batch, lambda m, b: answer_nll(m, b).sum(), targets)
    ghost_product(model, batch, answer_nll, direction)
    with pytest.raises(ZeroDivisionError), only_trainable(model, targets):
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(targets)
        raise ZeroDivisionError
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_targets():
    names = target_weights(MODEL)
    assert len(names) == 3 * len(MODULES) and "model.layers.0.self_attn.q_proj.weight" in names
    assert set(names) <= {name for name, _ in MODEL.named_parameters()}
    assert {name.split(".")[2] for name in target_weights(MODEL, layers=2)} == {"1", "2"}
    assert len(target_weights(MODEL, ("q_proj",))) == 3
    with pytest.raises(UserError, match="linear layers there: down_proj, gate_proj"):
        target_weights(MODEL, ("qkv_proj",))
    with pytest.raises(UserError, match="layers=0"):
        target_weights(MODEL, layers=0)


class Flat(OneLayer):
    """A layer that sees the rows' tokens in one heap, as an expert of a mixture does."""

    def forward(self, input_ids, logits_to_keep, **_):
        hot = nn.functional.one_hot(input_ids, 2).float()
        logits = self.layers[0]["q_proj"](hot.flatten(0, 1)).unflatten(0, input_ids.shape)
        return SimpleNamespace(logits=logits[:, logits_to_keep])


def test_mixed_rows_and_dead_layers_stop_the_run():
    batch = collate([Encoded("a", (0, 1), (False, True)), Encoded("b", (0, 0), (False, True))], PAD)
    direction = Vector({"layers.0.q_proj.weight": torch.ones(2, 2)})
    with pytest.raises(DefenceError, match="rows are mixed"):
        ghost_product(Flat(), batch, answer_nll, direction)
    with pytest.raises(DefenceError, match="zero everywhere"):
        probe_gradient(OneLayer(), batch, lambda m, b: 0 * answer_nll(m, b).sum(), direction)
    with pytest.raises(DefenceError, match="not finite"):
        probe_gradient(OneLayer(), batch, lambda m, b: answer_nll(m, b).sum() * float("inf"), direction)
