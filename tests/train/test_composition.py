"""A token loss, a penalty and a surgery in one step: the direction is the formula."""

import pytest
from away import adapted, assert_same, gradient
from tiny import PAD, kl_to_reference, random_rows, tiny_model

from safebasin.batch import collate
from safebasin.errors import UserError
from safebasin.train.compose import Composition
from safebasin.train.loss import kl_from_reference, nll
from safebasin.train.oracle import Oracle
from safebasin.train.stream import Stream


@pytest.mark.parametrize("micro", [8, 3])
def test_star_dss_asft_and_safegrad_are_one_formula(micro, tmp_path, monkeypatch):
    """u = grad[ V CE + (1 - V) kl KL ] + grad[ lambda sum |(I - C) dW|^2 ], a = grad KL(ref || model), surgery.

    The truth is autograd on whole batches with dense matrices.
    """
    monkeypatch.setenv("SAFEBASIN_CACHE", str(tmp_path / "cache"))
    for name, seed in (("base", 5), ("aligned", 0)):
        tiny_model(seed).save_pretrained(tmp_path / name)
    methods = Composition.of(
        [
            {"star_dss": {"kl": 0.5}},
            {
                "asft": {
                    "lam": 0.002,
                    "base": str(tmp_path / "base"),
                    "aligned": str(tmp_path / "aligned"),
                    "scale": 2.0,
                }
            },
            {"safegrad": {"rho": 0.7}},
        ]
    )
    rows = {"task": random_rows(8, 2, columns=methods.needs("columns")), "align": random_rows(6, 0)}
    streams = {name: Stream(name, part, len(part), micro, 0, PAD) for name, part in rows.items()}
    direction = methods.direction(Oracle(adapted(0.1), streams, seed=0, loss=methods.loss, penalty=methods.penalty))

    model, base, aligned = adapted(0.1), tiny_model(5), tiny_model(0)
    task, align = (collate(streams[name].rows_at(0), PAD) for name in ("task", "align"))
    v = task.columns["star"]
    token = ((v * nll(model, task) + (1 - v) * 0.5 * kl_to_reference(model, task)) * task.mask).sum() / task.mask.sum()
    anchor = 0.0
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            name = name.removeprefix("base_model.model.")
            d = (aligned.get_parameter(f"{name}.weight") - base.get_parameter(f"{name}.weight")).detach()
            update = 2.0 * module.lora_B["default"].weight @ module.lora_A["default"].weight
            anchor = anchor + (update - d @ d.T / d.norm() @ update).square().sum()
    pulled = gradient(0.002 * anchor, model)
    u = gradient(token, model) + pulled
    a = gradient((kl_from_reference(model, align) * align.mask).sum() / align.mask.sum(), model)
    assert pulled.norm() > 0.01 * u.norm()
    assert u @ a < -0.1 * u.norm() * a.norm()  # a conflict, so that the surgery is seen
    assert_same(direction, u - (u @ a) / (a @ a) * a + 0.7 * a, 1e-4)


def test_two_token_losses_are_refused():
    with pytest.raises(UserError, match="star_dss and constrained_sft both define the token loss"):
        Composition.of(["star_dss", "constrained_sft"])


def test_what_a_composition_needs_is_what_its_methods_need():
    asft = {"asft": {"base": "builtin:smollm2", "aligned": "builtin:smollm2-aligned"}}
    methods = Composition.of(["star_dss", asft, "metric_safegrad"])
    assert (methods.needs("columns"), methods.needs("streams")) == (("star",), ("align",))
    assert set(methods.needs("roles")) == {"reference", "base"}
