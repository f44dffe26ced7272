"""Mixed answers: lambda 0 is the base, 1 the aligned model, and between them the slow truth."""

import pytest
import torch
from aligned import BAD, GOOD, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LORA, tiny_model
from transformers import LlamaConfig

from safebasin.encode import render
from safebasin.errors import DefenceError, UserError
from safebasin.measure.generate import Answer, generate
from safebasin.measure.mix import mixed_generate
from safebasin.models.adapter import fresh_adapter
from safebasin.vector import trainable

TOKENIZER = word_tokenizer()


def sharp_adapted():
    """The tiny model with large weights and an adapter far from zero, so that base and aligned answers differ."""
    model = tiny_model()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(10)
        adapted = fresh_adapter(model, LORA, seed=0).eval()
        draw = torch.Generator().manual_seed(1)
        for p in trainable(adapted).values():
            p.add_(0.5 * torch.randn(p.shape, generator=draw))
    return adapted


MODEL = sharp_adapted()
words = st.lists(st.sampled_from((*BAD, *GOOD, "make", "a", "now")), min_size=1, max_size=6).map(" ".join)


def user_turn(prompt):
    return [{"role": "user", "content": prompt}]


@torch.no_grad()
def slow(prompt, lam, max_new_tokens):
    """One request, no cache, both models whole at every token."""
    ids = TOKENIZER(render(TOKENIZER, user_turn(prompt), ask=True), add_special_tokens=False)["input_ids"]
    new_tokens = []
    for _ in range(max_new_tokens):
        aligned = MODEL(input_ids=torch.tensor([ids + new_tokens])).logits[0, -1]
        with MODEL.disable_adapter():
            base = MODEL(input_ids=torch.tensor([ids + new_tokens])).logits[0, -1]
        new = int(((1 - lam) * base + lam * aligned).argmax())
        if new == TOKENIZER.eos_token_id:
            return Answer(TOKENIZER.decode(new_tokens, skip_special_tokens=True), len(new_tokens), True)
        new_tokens.append(new)
    return Answer(TOKENIZER.decode(new_tokens, skip_special_tokens=True), len(new_tokens), False)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(words, st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])), min_size=1, max_size=5), st.integers(1, 7)
)
def test_equals_the_slow_truth_request_by_request(rows, max_new_tokens):
    """Whatever the neighbours in the batch and their lambdas."""
    lam = torch.tensor([share for _, share in rows])
    mixed = mixed_generate(MODEL, TOKENIZER, [user_turn(prompt) for prompt, _ in rows], lam, max_new_tokens)
    assert mixed == [slow(prompt, share, max_new_tokens) for prompt, share in rows]


def test_the_ends_are_the_base_and_the_aligned_model():
    prompts = [user_turn(f"make a {word}") for word in (*BAD, *GOOD)]
    aligned = generate(MODEL, TOKENIZER, prompts, max_new_tokens=8)
    with MODEL.disable_adapter():
        base = generate(MODEL, TOKENIZER, prompts, max_new_tokens=8)
    assert sum(a != b for a, b in zip(aligned, base, strict=True)) > len(prompts) / 2
    assert mixed_generate(MODEL, TOKENIZER, prompts, torch.zeros(len(prompts)), 8) == base
    assert mixed_generate(MODEL, TOKENIZER, prompts, torch.ones(len(prompts)), 8) == aligned
    lambdas = torch.tensor([0.0, 1.0] * (len(prompts) // 2))
    mixed = [(base, aligned)[i % 2][i] for i in range(len(prompts))]
    assert mixed_generate(MODEL, TOKENIZER, prompts, lambdas, 8) == mixed


class Stub:
    """Tokens 5 ("I") and 6 ("cannot") have the logits 3 and 0 with the adapter off, and 0 and 1 with it on."""

    device, generation_config, config = torch.device("cpu"), None, LlamaConfig(max_position_embeddings=64)
    on = True

    def disable_adapter(self):
        return self

    def __enter__(self):
        self.on = False

    def __exit__(self, *_):
        self.on = True

    def __call__(self, input_ids, **_):
        logits = torch.full((*input_ids.shape, 8), -9.0)
        logits[..., 5], logits[..., 6] = (0.0, 1.0) if self.on else (3.0, 0.0)
        return type("Out", (), {"logits": logits, "past_key_values": None})


def test_where_the_answer_turns_by_hand():
    """3 (1 - lambda) against lambda: the aligned token wins from lambda = 3/4 on, so 0.74 and 0.76 differ."""
    answers = mixed_generate(Stub(), TOKENIZER, [user_turn("make")] * 2, torch.tensor([0.74, 0.76]), 1)
    assert [answer.text for answer in answers] == ["I", "cannot"]


@pytest.mark.parametrize("lam", [[0.5], [0.5, 1.5], [-0.1, 0.0], [float("nan"), 0.0]])
def test_lambda_is_a_share_for_each_request(lam):
    with pytest.raises(UserError, match=r"lambda in 0\.\.1 for each of 2"):
        mixed_generate(MODEL, TOKENIZER, [user_turn("make")] * 2, torch.tensor(lam), 3)


def test_what_cannot_be_mixed():
    with pytest.raises(DefenceError, match="no adapter"):
        mixed_generate(tiny_model(), TOKENIZER, [user_turn("make")], torch.tensor([0.5]), 3)
    with pytest.raises(UserError, match="do not fit"):
        mixed_generate(MODEL, TOKENIZER, [user_turn("make " * 125)], torch.tensor([0.5]), 8)
    assert mixed_generate(MODEL, TOKENIZER, [], torch.zeros(0), 3) == []
