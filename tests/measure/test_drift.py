"""Drift of a tiny model from itself, from a turned copy, and from nothing."""

import math

import numpy as np
import pytest
import torch
from aligned import BAD, GOOD, aligned_model, coded

from safebasin.batch import answer_logits, collate
from safebasin.data.tables import write_table
from safebasin.errors import UserError
from safebasin.measure import suite
from safebasin.measure.methods.drift import cosine
from safebasin.measure.subject import Subject
from safebasin.models.load import ModelAndTokenizer


@pytest.fixture
def drift(tmp_path):
    def write(name, rows):
        write_table(tmp_path / f"{name}.jsonl", rows)
        return str(tmp_path / f"{name}.jsonl")

    def make(good=GOOD, bad=BAD, **more):
        rows = [
            {"prompt": f"make a {word}" + " now" * i, "completion": "Sure here are the steps" + " now" * i}
            for i, word in enumerate(GOOD)
        ]
        fields = {
            "data": {"path": write("rows", rows)},
            "harmful": write("harmful", [{"prompt": f"make a {word}"} for word in bad]),
            "harmless": write("harmless", [{"prompt": f"make a {word}"} for word in good]),
        }
        return suite.make({"drift": fields | more})

    return make


def nudged(scale=0.3):
    """The aligned model with noise on one weight of block 2."""
    loaded = aligned_model()
    weight = loaded.model.get_parameter("model.layers.1.mlp.down_proj.weight")
    with torch.no_grad():
        weight.add_(scale * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    return loaded


def read(values):
    return {(m.what, m.category): m for m in values}


def test_no_drift_from_itself(drift):
    values = read(drift().measure(Subject(aligned_model(), "arm", {}, start=aligned_model())))
    assert values["kl", ""].value == pytest.approx(0, abs=1e-6)
    for layer in (1, 2, 3):
        assert values["refusal_cosine", f"layer {layer}"].value == pytest.approx(1, abs=1e-5)
    assert values["refusal_cosine", ""].value == pytest.approx(1, abs=1e-5)
    assert (values["kl", ""].n, values["refusal_cosine", ""].n) == (6, 12)


def test_drift_is_where_the_weights_changed(drift):
    """Block 1 is the same; from block 2 on the direction turns. The mean and the least are of the three."""
    values = read(drift().measure(Subject(nudged(), "arm", {}, start=aligned_model())))
    layers = [values["refusal_cosine", f"layer {i}"].value for i in (1, 2, 3)]
    assert layers[0] == pytest.approx(1, abs=1e-5) and layers[1] < 0.99
    assert values["refusal_cosine", ""].value == pytest.approx(sum(layers) / 3)
    assert values["least_refusal_cosine", ""].value == min(layers)
    for m in values.values():
        assert m.low <= m.value <= m.high and m.low < m.high


def test_kl_equals_the_slow_truth(drift):
    """KL(model || start), one row at a time, over answer tokens; not the other way around."""
    ours, start = nudged(), aligned_model()
    rows = coded(
        ours.tokenizer,
        *((f"make a {word}" + " now" * i, "Sure here are the steps" + " now" * i) for i, word in enumerate(GOOD)),
    )
    means, turned = [], []
    for row in rows:
        batch = collate([row], 0)
        with torch.no_grad():
            p, q = (answer_logits(loaded.model, batch)[batch.mask].softmax(-1).double() for loaded in (ours, start))
        means.append(float((p * (p / q).log()).sum(-1).mean()))
        turned.append(float((q * (q / p).log()).sum(-1).mean()))
    kl = read(drift(batch_size=4).measure(Subject(ours, "arm", {}, start=start)))["kl", ""]
    assert kl.value == pytest.approx(np.mean(means), rel=1e-3) != pytest.approx(np.mean(turned), rel=1e-3)
    assert kl.unit == "nats a token"


def test_cosine_by_hand():
    """Start: harmful mean (2, 0) less harmless (0, 0) is (2, 0). Model: (1, 1) - (0, 0): cosine 1/sqrt 2.

    A draw of the first prompt only: 0.
    """
    start = [np.array([[[1.0, 0.0]], [[3.0, 0.0]]]), np.zeros((2, 1, 2))]
    ours = [np.array([[[0.0, 2.0]], [[2.0, 0.0]]]), np.zeros((2, 1, 2))]
    weigh = [np.array([[0.5, 0.5], [1.0, 0.0]]), np.full((2, 2), 0.5)]
    assert cosine(start, ours, weigh)[0].tolist() == pytest.approx([math.sqrt(0.5), 0.0])


def test_no_direction_is_no_number(drift):
    """Harmful prompts that are the harmless ones: the direction is zero, and a cosine of nothing is neither 0 nor 1."""
    values = read(
        drift(good=("cake", "song"), bad=("cake", "song")).measure(Subject(aligned_model(), "arm", {}, start=nudged()))
    )
    for m in values.values():
        assert m.what == "kl" or (m.value, m.low, m.high, m.n, m.unscored) == (None, None, None, 0, 4)


def test_long_rows_and_broken_models_are_unscored(drift):
    """Of six rows the longest does not fit; a model of NaN gives no number at all."""
    longest = len(
        coded(aligned_model().tokenizer, ("make a table" + " now" * 5, "Sure here are the steps" + " now" * 5))[0]
    )
    fitting = drift(max_length=longest - 1)
    kl = read(fitting.measure(Subject(nudged(), "arm", {}, start=aligned_model())))["kl", ""]
    assert (kl.n, kl.unscored) == (5, 1)
    broken = nudged(math.nan)
    values = read(drift().measure(Subject(broken, "arm", {}, start=aligned_model())))
    assert (values["kl", ""].value, values["kl", ""].n, values["kl", ""].unscored) == (None, 0, 6)
    assert values["refusal_cosine", ""].value is None and values["refusal_cosine", "layer 1"].value is not None


def test_padding_and_order_do_not_matter(drift):
    values = [
        [m.value for m in drift(batch_size=size).measure(Subject(nudged(), "arm", {}, start=aligned_model()))]
        for size in (1, 5)
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_what_a_user_can_get_wrong(drift, tmp_path):
    with pytest.raises(UserError, match="start model"):
        list(drift().measure(Subject(aligned_model(), "arm", {})))
    other = aligned_model()
    other.model.resize_token_embeddings(70)
    with pytest.raises(UserError, match="same vocabulary"):
        list(
            drift().measure(Subject(aligned_model(), "arm", {}, start=ModelAndTokenizer(other.model, other.tokenizer)))
        )
    for fields in ({"bad": BAD[:1]}, {"good": GOOD[:1]}, {"max_length": 3}):
        with pytest.raises(UserError, match="two are the least"):
            list(drift(**fields).measure(Subject(aligned_model(), "arm", {}, start=aligned_model())))
