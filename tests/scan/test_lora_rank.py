"""FIHS over the B factors of a fresh adapter, taken without one: against a real PEFT adapter that holds the same A."""

import pytest
import torch
from aligned import BAD, GOOD, aligned_model, coded, refusals
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import answer_nll, gradient_of

from safebasin.batch import collate
from safebasin.errors import UserError
from safebasin.scan import scorer
from safebasin.scan.methods.gradshield import GradShield
from safebasin.scan.probe import opening, refusal_margin, token_pair
from safebasin.scan.source import target_weights
from safebasin.scan.tangent import Factors, through_adapter

MODEL, TOKENIZER = aligned_model()
ANCHORS = {"probe": refusals(TOKENIZER, BAD[:2])}
ROWS = coded(TOKENIZER, *((f"make a {word}", "Sure here are the steps") for word in BAD[2:4] + GOOD[:2])) + refusals(
    TOKENIZER, BAD[2:4]
)


@pytest.mark.parametrize("depth", [0.3, 1.0])
def test_it_is_the_product_of_a_real_adapters_gradients(depth):
    """PEFT scales B A x by s = alpha / r = 2, so its gradients are s times ours, and their product s^2 = 4 times."""
    method = GradShield(lora_rank=4, seed=3, depth=depth)
    fitted = method.fit(MODEL, TOKENIZER, ANCHORS)
    scores = [method.score(MODEL, collate([row], TOKENIZER.pad_token_id), fitted).sum().item() for row in ROWS]
    probe = opening(MODEL, TOKENIZER, ANCHORS["probe"][:1])
    model = get_peft_model(
        aligned_model().model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    ).eval()
    weights = target_weights(model, depth=depth)
    names = [name.replace(".base_layer.weight", ".lora_B.default.weight") for name in weights]
    assert len(names) == len(fitted.direction)
    for name in names:
        a = model.get_parameter(name.replace("lora_B", "lora_A"))
        weight = name.removeprefix("base_model.model.").replace(".lora_B.default", "")
        with torch.no_grad():
            a.copy_(fitted.direction[weight].right)
    pair = token_pair(MODEL, TOKENIZER, probe, None)
    s = gradient_of(model, probe, lambda m, b: refusal_margin(m, b, pair).mean(), names)
    truth = [
        gradient_of(model, collate([row], TOKENIZER.pad_token_id), lambda m, b: answer_nll(m, b).sum(), names) @ s / 4
        for row in ROWS
    ]
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(truth), rtol=1e-4, atol=1e-5 * max(map(abs, truth)))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_both_forms_of_v_give_v_a_transposed_a(out, width, probe_rank, rank, seed):
    random = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((out, probe_rank), (probe_rank, width))
    )
    factored = through_adapter({"w": Factors(left, right)}, rank, seed)["w"]
    dense = through_adapter({"w": Factors(left @ right, None)}, rank, seed)["w"]
    a = factored.right
    assert a.shape == (rank, width) and torch.equal(a, dense.right) and a.dtype == torch.float64
    for left_now, right_now in (factored, dense):
        torch.testing.assert_close(left_now @ right_now, left @ right @ a.T @ a)


def test_by_hand():
    """V = [[1, 2], [3, 4]] and one row a = (a1, a2): V a^T a has in its first row (a1 + 2 a2) a."""
    (left, a) = through_adapter({"w": Factors(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), None)}, 1, 0)["w"]
    a1, a2 = a[0].tolist()
    assert (left @ a)[0].tolist() == pytest.approx([(a1 + 2 * a2) * a1, (a1 + 2 * a2) * a2])


def test_a_is_drawn_as_peft_draws_it():
    """Uniform within 1 / sqrt(in), another for each weight and each seed; the spread of 20,000 numbers is that of
    PEFT's own A to 3 %."""
    weights = {name: Factors(torch.zeros(3, 100), None) for name in ("one", "two")}
    first, again, other = (through_adapter(weights, 200, seed) for seed in (0, 0, 1))
    assert torch.equal(first["one"].right, again["one"].right)
    assert not torch.equal(first["one"].right, other["one"].right) and not torch.equal(
        first["one"].right, first["two"].right
    )

    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(100, 3)

    theirs = get_peft_model(Holder(), LoraConfig(r=200, target_modules=["linear"])).get_parameter(
        "base_model.model.linear.lora_A.default.weight"
    )
    ours = first["one"].right
    assert ours.abs().max() <= 0.1 and theirs.abs().max() <= 0.1
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.03) and abs(ours.mean().item()) < 0.002


def test_a_rank_below_one_is_refused():
    with pytest.raises(UserError, match="lora_rank"):
        scorer.make({"gradshield": {"lora_rank": 0}})
