"""Prompts read as trees behind a cached prefix, against prompts that are padded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PAD, tiny_model

from safebasin.measure.prefill import Prefill

MODEL = tiny_model()
token = st.integers(1, 5)  # few: many prompts begin alike
prompts_alike = st.tuples(
    st.lists(token, max_size=20), st.lists(st.lists(token, min_size=1, max_size=12), min_size=1, max_size=6)
).map(lambda drawn: sorted({(*drawn[0], *rest) for rest in drawn[1]}, key=lambda ids: (-len(ids), ids)))


def states(read, prompts):
    """Logits, and keys and values at the places where there are tokens, of what ``prompts`` are read to."""
    with torch.inference_mode():
        past, seen, logits = read(prompts)
    keys = [layer.keys.transpose(1, 2)[seen.bool()] for layer in past.layers]
    values = [layer.values.transpose(1, 2)[seen.bool()] for layer in past.layers]
    return torch.stack([*keys, *values]), logits, seen


@settings(max_examples=40, deadline=None)
@given(prompts_alike, st.sampled_from([1, 20, 256]))
def test_trees_are_the_padded_prompts(prompts, sequence):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safebasin.tree.SEQUENCE", sequence)
        fast = states(Prefill(MODEL, PAD, prompts), prompts)
        patch.setattr("safebasin.measure.prefill.takes_tree", lambda _: False)
        slow = states(Prefill(MODEL, PAD, prompts), prompts)
    for mine, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)


def test_what_prompts_begin_with_is_run_once():
    """Ten tokens that three prompts share, then a branch of two and two of one: 10, and 4 more."""
    begin = tuple(range(1, 11))
    prompts = [(*begin, 11, 12), (*begin, 13), (*begin, 14)]
    widths = []
    hook = MODEL.model.layers[0].register_forward_pre_hook(lambda _, args: widths.append(tuple(args[0].shape[:2])))
    try:
        read = Prefill(MODEL, PAD, prompts)
        read(prompts[:2])
        read(prompts[2:])
    finally:
        hook.remove()
    assert widths == [(1, 10), (1, 3), (1, 1)]
