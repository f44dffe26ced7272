import pytest
import torch
from torch import nn

from safebasin.models.hooks import captured, hooked, perturbed


class Pair(nn.Module):
    """A module whose output is a tuple, as transformer blocks have it."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return 2 * x, "cache"


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_outputs_and_inputs_of_the_latest_forward():
    model = nn.Sequential(nn.ReLU(), Pair())
    for inputs, expected in ((False, [4.0, 0.0]), (True, [2.0, 0.0])):
        with captured({"block": model[1], 7: model[1]}, inputs=inputs) as seen:
            model(torch.tensor([9.0, 9.0]))
            model(torch.tensor([2.0, -3.0]))
        assert seen["block"].tolist() == seen[7].tolist() == expected
        assert hooks(model) == 0


def test_what_is_captured_has_its_graph():
    model, x = nn.Sequential(nn.Identity(), nn.Identity()), torch.tensor([3.0], requires_grad=True)
    with captured({"first": model[0]}) as seen:
        (model(x) ** 2).sum().backward()
    assert torch.autograd.grad(seen["first"].sum(), x)[0].tolist() == [1.0]


@pytest.mark.parametrize("inputs", [False, True])
def test_a_hook_may_change_what_passes_and_is_removed_after_an_error(inputs):
    model = nn.Sequential(nn.Identity())
    change = (lambda module, args: (args[0] + 1,)) if inputs else (lambda module, args, output: output + 1)
    with pytest.raises(ZeroDivisionError), hooked({model[0]: change}, inputs=inputs):
        assert model(torch.zeros(1)).item() == 1
        raise ZeroDivisionError
    assert model(torch.zeros(1)).item() == 0 and hooks(model) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_moved_and_come_back_bit_for_bit(dtype):
    a = nn.Parameter(torch.tensor([0.1, float("nan"), -0.0, 1e-40, 3.0]).to(dtype))
    b = nn.Parameter(torch.tensor([1.0]))
    bits = [p.detach().clone().view(torch.int16 if p.dtype == torch.bfloat16 else torch.int32) for p in (a, b)]
    with perturbed({"a": a, "b": b}, lambda name, value: value.float() + 0.5 if name == "a" else None):
        assert a[4].item() == 3.5 and a[2].item() == 0.5 and a.dtype == dtype and b.item() == 1
        (a[4] * b).sum().backward()
    assert a.grad is not None and b.grad is not None and b.grad.item() == 3.5
    for p, before in zip((a, b), bits):
        assert torch.equal(p.detach().view(before.dtype), before)


def test_a_tied_weight_is_changed_twice_and_restored_once():
    w = nn.Parameter(torch.tensor([1.0]))
    with perturbed({"head": w, "embedding": w}, lambda name, value: value * 10):
        assert w.item() == 100
    assert w.item() == 1


def test_weights_come_back_after_an_error_in_the_body_and_in_the_change():
    weights = {name: nn.Parameter(torch.tensor([1.0])) for name in "abc"}
    with pytest.raises(ZeroDivisionError), perturbed(weights, lambda name, value: value + 1):
        raise ZeroDivisionError
    delta = {"a": torch.ones(1)}
    with pytest.raises(KeyError), perturbed(weights, lambda name, value: value + delta[name]):
        pass
    assert [w.item() for w in weights.values()] == [1, 1, 1]
