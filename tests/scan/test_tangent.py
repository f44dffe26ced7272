"""The derivative in forward mode against its slow truth, one backward a row; and one number derived by hand."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PAD, answer_nll, gradient_of, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, FalconConfig, GPTNeoConfig, MptConfig

from safebasin.batch import collate
from safebasin.encode import TokenizedRow
from safebasin.errors import DefenceError, UserError
from safebasin.scan.source import target_weights
from safebasin.scan.tangent import Factors, Tangent, gradient
from safebasin.tree import ALIKE, by_positions, by_prefix, takes_tree


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
    return {name: Factors(torch.randn(w.shape, generator=random).to(w.dtype), None) for name, w in weights.items()}


def row(lengths, seed=0, before=()):
    prompt, answer = lengths
    ids = torch.randint(1, 64, (prompt + answer,), generator=torch.Generator().manual_seed(seed)).tolist()
    return TokenizedRow(f"r{seed}", (*before, *ids), (False,) * (len(before) + prompt) + (True,) * answer)


def one_by_one(model, rows, direction):
    """The definition: a batch of one row, ordinary autograd, the inner product of the whole gradient with V; a loss a
    token."""
    products = []
    for each in rows:
        batch = collate([each], PAD)
        for k in range(int(batch.mask.sum())):
            taken = gradient_of(model, batch, lambda m, b, k=k: answer_nll(m, b)[b.mask][k], direction)
            products.append(sum(float((taken[name].double() * v.left.double()).sum()) for name, v in direction.items()))
    return torch.tensor(products, dtype=torch.float32)


def derivatives(tangent, model, rows, shared=0):
    batch = collate(rows, PAD, shared)
    losses = tangent.token_losses(model, batch)
    assert losses.shape == batch.mask.shape and not losses[~batch.mask].any()
    return losses[batch.mask]


def close(fast, slow, rtol=2e-4):
    torch.testing.assert_close(fast, slow, rtol=rtol, atol=rtol * float(slow.abs().max()))


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=4),
    shared=st.integers(0, 30),
    depth=st.sampled_from([1.0, 0.3, 0.6]),
    seed=st.integers(0, 99),
    sequence=st.sampled_from([1, 12, 256]),
    packed=st.booleans(),
)
def test_every_token_equals_one_backward(lengths, shared, depth, seed, sequence, packed):
    """With and without a prefix that the rows share; packed into sequences of that many tokens, and padded."""
    before = row((shared, 0), seed + 50).ids
    rows = [row(each, seed + i, before) for i, each in enumerate(lengths)]
    direction = random_direction(MODEL, target_weights(MODEL, depth=depth), seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safebasin.tree.SEQUENCE", sequence)
        patch.setattr("safebasin.scan.tangent.takes_tree", lambda _: packed)
        fast = derivatives(Tangent(direction), MODEL, rows, shared)
    close(fast, one_by_one(MODEL, rows, direction))


SMALL = {"vocab_size": 64, "hidden_size": 32, "bos_token_id": 1, "eos_token_id": 1}
PLACES = {  # attention that counts places and not positions: by ALiBi, or in windows that its cache does not know of
    "falcon": FalconConfig(**SMALL, num_hidden_layers=2, num_attention_heads=4, alibi=True),
    "mpt": MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=128),
    "gpt_neo": GPTNeoConfig(**SMALL, num_layers=2, num_heads=4, attention_types=[[["local"], 2]], window_size=4),
}


@pytest.mark.parametrize("kind", PLACES)
def test_where_places_count_a_row_is_scored_as_if_alone(kind):
    """Neither packed, nor behind a shared prefix and padding."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PLACES[kind], attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)  # sharp enough for a wrong distance to be seen
    before = row((30, 0), 1).ids
    rows = [row((4 + 3 * i, 2), i, before) for i in range(3)]
    direction = random_direction(model, target_weights(model))
    assert not by_positions(model) and not takes_tree(model)
    close(derivatives(Tangent(direction), model, rows, 30), one_by_one(model, rows, direction), 2e-3)


def test_a_prefix_is_run_once_and_never_mistaken():
    """Four batches: two share a prefix of 30 tokens, one another, one none. The forward runs 30 tokens once for the
    first two."""
    first, second = row((30, 0), 1).ids, row((40, 0), 2).ids
    batches = [
        [row((4, 2), k + i, before) for i in range(3)]
        for k, before in ((10, first), (20, first), (30, second), (40, ()))
    ]
    direction = random_direction(MODEL, target_weights(MODEL))
    tangent, widths = Tangent(direction), []
    hook = MODEL.model.layers[0].register_forward_pre_hook(lambda _, args: widths.append(tuple(args[0].shape[:2])))
    try:
        fast_losses = [
            derivatives(tangent, MODEL, rows, shared) for rows, shared in zip(batches, (30, 30, 40, 0), strict=True)
        ]
    finally:
        hook.remove()
    assert widths == [(1, 30), (1, 18), (1, 18), (1, 40), (1, 18), (1, 18)]
    for rows, fast in zip(batches, fast_losses, strict=True):
        close(fast, one_by_one(MODEL, rows, direction))


@settings(max_examples=50, deadline=None)
@given(
    heads=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40)), min_size=1, max_size=30),
    size=st.integers(1, 6),
)
def test_rows_that_begin_alike_come_together(heads, size):
    """Every row once, longest first in its batch; what a batch claims to share, its rows share, before any answer."""
    long = [row((40, 0), seed).ids for seed in range(3)]
    rows = [row((2 + i % 5, 1), i, long[which][:count]) for i, (which, count) in enumerate(heads)]
    batches = list(by_prefix(rows, size))
    assert sorted(i for batch in batches for i in batch.rows) == list(range(len(rows)))
    for chosen, shared in batches:
        assert 0 < len(chosen) <= size and (shared == 0 or shared >= ALIKE)
        assert len({rows[i].ids[:shared].tobytes() for i in chosen}) == 1 and not any(
            rows[i].answer[: shared + 1].any() for i in chosen
        )
        assert [len(rows[i]) for i in chosen] == sorted((len(rows[i]) for i in chosen), reverse=True)


def test_two_instructions_are_two_families():
    """Ten rows with one prompt of 30 tokens and ten with another: five batches of four, each of one family, which
    shares all 30."""
    long = [row((30, 0), seed).ids for seed in (1, 2)]
    rows = [row((3, 1), i, long[i % 2]) for i in range(20)]
    batches = list(by_prefix(rows, 4))
    assert len(batches) == 6 and all(shared >= 30 and len({i % 2 for i in chosen}) == 1 for chosen, shared in batches)


def test_masked_answer_positions_carry_nothing():
    """Two assistant turns with a user turn between them: the middle tokens have no loss of their own."""
    ids = row((12, 0), 5).ids
    turns = TokenizedRow("two", ids, (False,) * 3 + (True,) * 2 + (False,) * 4 + (True,) * 3)
    direction = random_direction(MODEL, target_weights(MODEL))
    close(
        derivatives(Tangent(direction), MODEL, [turns, row((2, 3))]), one_by_one(MODEL, [turns, row((2, 3))], direction)
    )


@pytest.mark.parametrize("length", [2, 30])
def test_the_gradient_in_factors_is_the_gradient(length):
    """Two tokens give factors of rank 2, less than the weight itself; thirty are kept as the whole weight, but in the
    last MLP, where only the tokens that the loss is taken at have a gradient."""
    batch = collate([row((length - 1, 1)), row((1, 1), 1)], PAD)
    targets = target_weights(MODEL)
    factored = gradient(MODEL, batch, lambda m, b: answer_nll(m, b).sum(), targets)
    full = gradient_of(MODEL, batch, lambda m, b: answer_nll(m, b).sum(), targets)
    assert (factored["model.layers.0.mlp.up_proj.weight"].right is None) == (length == 30)
    assert factored["model.layers.2.mlp.up_proj.weight"].right.shape == (2, 32)
    for name, (left, right) in factored.items():
        close(left if right is None else left @ right, full[name])


def test_lora_factors():
    """The B factors of a fresh adapter, where B = 0 but its derivative is not."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    ).eval()
    targets = [name for name, _ in model.named_parameters() if "lora_B" in name]
    assert len(targets) == 6
    assert len(target_weights(model)) == 21  # the full weights under the adapter, and none of its own
    direction = random_direction(model, targets)
    rows = [row((4, 3), 1), row((6, 5), 2)]
    close(derivatives(Tangent(direction), model, rows), one_by_one(model, rows, direction))
    with model.disable_adapter(), pytest.raises(DefenceError, match="6 of 6 weights are not used"):
        derivatives(Tangent(direction), model, rows)


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
    """Token 0 is the prompt. The answer 1 has D = p - e_1 = (1/2, -1/2) and X = e_0, so grad CE = [[1/2, 0], [-1/2,
    0]].

    The margin S = logit[0] - logit[1] behind the prompt has grad S = [[1, 0], [-1, 0]]. Hence <grad CE, grad S> = 1/2 +
    1/2 = 1: learning to answer 1 lowers the margin. Learning to answer 0 raises it: -1. Answer 1 twice: the second has
    X = e_1 and adds 0.
    """
    model = OneLayer()
    probe = collate([TokenizedRow("p", (0, 0), (False, True))], PAD)

    def margin(m, b):
        logits = m(**b.inputs).logits[0, 0]
        return logits[0] - logits[1]

    direction = gradient(model, probe, margin, ["layers.0.q_proj.weight"])
    left, right = direction["layers.0.q_proj.weight"]
    assert (left if right is None else left @ right).tolist() == [[1.0, 0.0], [-1.0, 0.0]]
    rows = [
        TokenizedRow("yes", (0, 1), (False, True)),
        TokenizedRow("no", (0, 0), (False, True)),
        TokenizedRow("2", (0, 1, 1), (False, True, True)),
    ]
    assert Tangent(direction).token_losses(model, collate(rows, PAD)).tolist() == [[0.0, 1.0], [0.0, -1.0], [1.0, 0.0]]


def test_bfloat16_stays_near_float32():
    rows = [row((6, 8), i) for i in range(8)]
    direction = random_direction(MODEL, target_weights(MODEL))
    coarse = {name: Factors(v.left.bfloat16(), None) for name, v in direction.items()}
    exact, rough = (
        derivatives(Tangent(direction), MODEL, rows),
        derivatives(Tangent(coarse), tiny(dtype=torch.bfloat16), rows),
    )
    assert rough.dtype == torch.float32
    assert torch.corrcoef(torch.stack([exact, rough]))[0, 1] > 0.999


def test_the_model_is_left_as_it_was():
    """Gradients asked of the same weights as before, no hook left, attention as it was, no graph and no derivative in
    what comes back."""
    model = tiny()
    model.set_attn_implementation("sdpa")
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    batch = collate([row((4, 4))], PAD)
    direction = gradient(model, batch, lambda m, b: answer_nll(m, b).sum(), target_weights(model))
    losses = Tangent(direction).token_losses(model, batch)
    assert not losses.requires_grad and model.config._attn_implementation == "sdpa"
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_targets():
    names = target_weights(MODEL)
    assert len(names) == 3 * 7 and "model.layers.0.self_attn.q_proj.weight" in names
    assert set(names) <= {name for name, _ in MODEL.named_parameters()}
    assert {name.split(".")[2] for name in target_weights(MODEL, depth=0.6)} == {"1", "2"}
    assert len(target_weights(MODEL, ("q_proj",))) == 3
    with pytest.raises(UserError, match="linear layers there: down_proj, gate_proj"):
        target_weights(MODEL, ("qkv_proj",))
    with pytest.raises(UserError, match="depth=0"):
        target_weights(MODEL, depth=0.0)
    packed = tiny()
    packed.model.layers[0].self_attn.q_proj.weight = nn.Parameter(torch.ones(4, 8, dtype=torch.int8), False)
    with pytest.raises(UserError, match=r"q_proj is quantised .* or in four bits: model\.quantization: nf4$"):
        target_weights(packed)


def test_dead_gradients_stop_the_run():
    batch = collate([TokenizedRow("a", (0, 1), (False, True)), TokenizedRow("b", (0, 0), (False, True))], PAD)
    name = "layers.0.q_proj.weight"
    with pytest.raises(DefenceError, match="zero everywhere"):
        gradient(OneLayer(), batch, lambda m, b: 0 * answer_nll(m, b).sum(), [name])
    with pytest.raises(DefenceError, match="not finite"):
        gradient(OneLayer(), batch, lambda m, b: answer_nll(m, b).sum() * float("inf"), [name])
    one = torch.ones((), requires_grad=True)
    with pytest.raises(DefenceError, match="1 of 1 weights are not used"):
        gradient(OneLayer(), batch, lambda m, b: one * 1, [name])
    with pytest.raises(DefenceError, match="does not depend on"):
        gradient(OneLayer(), batch, lambda m, b: (answer_nll(m, b).detach() * one).sum(), [name])


class Backward(torch.autograd.Function):
    """A function with a backward alone, as BLOOM's GELU."""

    @staticmethod
    def forward(context, x):
        return x * 1

    @staticmethod
    def backward(context, d):
        return d


def test_a_layer_without_a_derivative_in_forward_mode_is_refused():
    model = tiny_model(0)
    model.model.layers[0].mlp.act_fn.forward = Backward.apply
    tangent = Tangent(random_direction(model, target_weights(model)))
    with pytest.raises(UserError, match=r"LlamaForCausalLM has a layer without a derivative.*opening_margin"):
        tangent.token_losses(model, collate([row((3, 2))], PAD))
