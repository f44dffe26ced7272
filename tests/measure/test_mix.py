"""Mixed answers: a share of 0 is the tuned model, 1 the start, and between them the slow truth."""

import pytest
import torch
from aligned import BAD, GOOD, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners import lora
from tiny import LORA, tiny_model
from transformers import LlamaConfig

from safebasin.errors import DefenceError, UserError
from safebasin.measure.answers import AnswerCache
from safebasin.measure.generate import Answer, generate
from safebasin.measure.mix import Mixing, Mixture
from safebasin.models.adapter import fresh_adapter
from safebasin.models.load import ModelAndTokenizer
from safebasin.template import render
from safebasin.vector import trainable

TOKENIZER = word_tokenizer()


def sharp_adapted():
    """The tiny model with large weights and an adapter far from zero, so that its answers and its start's differ."""
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
LOADED = ModelAndTokenizer(MODEL.get_base_model(), TOKENIZER)
words = st.lists(st.sampled_from((*BAD, *GOOD, "make", "a", "now")), min_size=1, max_size=6).map(" ".join)


def user_turn(prompt):
    return [{"role": "user", "content": prompt}]


@torch.no_grad()
def slow(prompt, share, max_new_tokens):
    """One request, no cache, both models whole at every token."""
    ids = TOKENIZER(render(TOKENIZER, user_turn(prompt), ask=True), add_special_tokens=False)["input_ids"]
    new_tokens = []
    for _ in range(max_new_tokens):
        tuned = MODEL(input_ids=torch.tensor([ids + new_tokens])).logits[0, -1]
        with MODEL.disable_adapter():
            start = MODEL(input_ids=torch.tensor([ids + new_tokens])).logits[0, -1]
        new = int((share * start + (1 - share) * tuned).argmax())
        if new == TOKENIZER.eos_token_id:
            return Answer(TOKENIZER.decode(new_tokens, skip_special_tokens=True), len(new_tokens), True)
        new_tokens.append(new)
    return Answer(TOKENIZER.decode(new_tokens, skip_special_tokens=True), len(new_tokens), False)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(words, st.booleans()), min_size=1, max_size=5, unique_by=lambda row: row[0]),
    st.sampled_from([0.25, 0.5, 0.75, 1.0]),
    st.integers(1, 7),
)
def test_equals_the_slow_truth_request_by_request(rows, share, max_new_tokens):
    """Whatever the neighbours in the batch; what the guard finds safe is answered by the tuned model."""
    flags = {prompt: flag for prompt, flag in rows}
    mixing = Mixing(share, lambda turns: [flags[each[0]["content"]] for each in turns])
    answers = mixing.answers(LOADED, [user_turn(prompt) for prompt, _ in rows], "t", max_new_tokens=max_new_tokens)
    assert answers == [slow(prompt, share * flag, max_new_tokens) for prompt, flag in rows]
    assert mixing.requests == {"t": {"asked": len(rows), "mixed": sum(flags.values())}}


def test_the_ends_are_the_start_and_the_tuned_model():
    prompts = [user_turn(f"make a {word}") for word in (*BAD, *GOOD)]
    tuned = generate(*LOADED, prompts, max_new_tokens=8)
    with MODEL.disable_adapter():
        start = generate(MODEL, TOKENIZER, prompts, max_new_tokens=8)
    assert sum(a != b for a, b in zip(tuned, start, strict=True)) > len(prompts) / 2
    assert Mixing(1.0).answers(LOADED, prompts, max_new_tokens=8) == start
    assert Mixing(0.5, lambda turns: [False] * len(turns)).answers(LOADED, prompts, max_new_tokens=8) == tuned
    assert generate(*LOADED, prompts, max_new_tokens=8) == tuned, "the adapter is on again"


def test_answers_that_are_stored_are_those_of_their_share(tmp_path):
    """Another share is another model; what the tuned model alone answers is stored as its own."""
    prompts = [user_turn(f"make a {word}") for word in BAD]
    cache = AnswerCache(tmp_path / "answers.db")
    first = Mixing(0.5).answers(LOADED, prompts, max_new_tokens=6, cache=cache)
    assert (cache.hits, cache.misses) == (0, len(prompts))
    assert Mixing(0.5).answers(LOADED, prompts, max_new_tokens=6, cache=cache) == first
    Mixing(1.0).answers(LOADED, prompts, max_new_tokens=6, cache=cache)
    assert (cache.hits, cache.misses) == (len(prompts), 2 * len(prompts))
    generate(*LOADED, prompts, max_new_tokens=6, cache=cache)
    Mixing(0.5, lambda turns: [False] * len(turns)).answers(LOADED, prompts, max_new_tokens=6, cache=cache)
    assert (cache.hits, cache.misses) == (2 * len(prompts), 3 * len(prompts))


class Stub(torch.nn.Module):
    """Tokens 5 ("I") and 6 ("cannot") have the logits 3 and 0 with the adapter on, and 0 and 1 with it off."""

    device, generation_config, config = torch.device("cpu"), None, LlamaConfig(max_position_embeddings=64)

    def __init__(self):
        super().__init__()
        self.peft_config = {"default": LoraConfig()}
        self.adapter = lora.Linear(torch.nn.Linear(1, 1), "default", LoraConfig(), r=1)

    def forward(self, input_ids, **_):
        logits = torch.full((*input_ids.shape, 8), -9.0)
        logits[..., 5], logits[..., 6] = (0.0, 1.0) if self.adapter.disable_adapters else (3.0, 0.0)
        return type("Out", (), {"logits": logits, "past_key_values": None})


def test_where_the_answer_turns_by_hand():
    """share against 3 (1 - share): the start's token wins from a share of 3/4 on, so 0.74 and 0.76 differ."""
    answers = [
        Mixing(share).answers(ModelAndTokenizer(Stub(), TOKENIZER), [user_turn("make")], max_new_tokens=1)
        for share in (0.74, 0.76)
    ]
    assert [answer.text for [answer] in answers] == ["I", "cannot"]


@pytest.mark.parametrize("share", [0.0, 1.5, -0.1, float("nan")])
def test_a_share_is_above_0_and_at_most_1(share):
    with pytest.raises(UserError, match="above 0 and at most 1"):
        Mixing(share)


def test_what_cannot_be_mixed():
    with pytest.raises(DefenceError, match="this one has none"):
        Mixture(tiny_model(), 0.5)
    with pytest.raises(DefenceError, match="the model's own biases"):
        Mixture(fresh_adapter(tiny_model(), {**LORA, "bias": "lora_only"}, seed=0).get_base_model(), 0.5)
    with pytest.raises(UserError, match="does not fit"):
        Mixing(0.5).answers(LOADED, [user_turn("make " * 125)], max_new_tokens=8)
    assert Mixing(0.5).answers(LOADED, [], max_new_tokens=3) == []
