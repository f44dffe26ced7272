"""Batched greedy answers against the slow truth: one prompt, no cache, the argmax of a full forward for each token."""

import pytest
import torch
from aligned import BAD, GOOD, TEMPLATE, aligned_model, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from safebasin.errors import UserError
from safebasin.measure.answers import AnswerCache
from safebasin.measure.generate import Answer, Ends, generate, turn_ends
from safebasin.template import render


def sharp_model():
    """Weights ten times the usual ones, so that attention is sharp and a wrong position or mask changes the answer."""
    model = tiny_model()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(10)
    return model


WANDERS = sharp_model(), word_tokenizer()
words = st.lists(st.sampled_from((*BAD, *GOOD, "make", "a", "now")), min_size=1, max_size=9).map(" ".join)


def user_turn(prompt):
    return [{"role": "user", "content": prompt}]


@torch.no_grad()
def slow(model, tokenizer, prompt, max_new_tokens, stops):
    ids = tokenizer(render(tokenizer, user_turn(prompt), ask=True), add_special_tokens=False)["input_ids"]
    new_tokens = []
    for _ in range(max_new_tokens):
        new = int(model(input_ids=torch.tensor([ids + new_tokens])).logits[0, -1].argmax())
        if new in stops:
            return Answer(tokenizer.decode(new_tokens, skip_special_tokens=True), len(new_tokens), True)
        new_tokens.append(new)
    return Answer(tokenizer.decode(new_tokens, skip_special_tokens=True), len(new_tokens), False)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(words, min_size=1, max_size=7),
    st.integers(1, 4),
    st.integers(1, 8),
    st.sets(st.integers(3, 27), max_size=12),
)
def test_equals_the_slow_truth(prompts, batch_size, max_new_tokens, ends):
    """Whatever the batch, its padding, and which rows leave it early."""
    model, tokenizer = WANDERS
    model.generation_config.eos_token_id = sorted(ends) or None
    try:
        answers = generate(
            model, tokenizer, [user_turn(p) for p in prompts], max_new_tokens=max_new_tokens, batch_size=batch_size
        )
    finally:
        model.generation_config.eos_token_id = None
    assert answers == [slow(model, tokenizer, p, max_new_tokens, {tokenizer.eos_token_id, *ends}) for p in prompts]


def test_answers_come_in_the_order_of_the_prompts():
    loaded = aligned_model()
    helped, refused = Answer("Sure here are the steps", 5, True), Answer("I cannot help", 3, True)
    answers = generate(
        *loaded,
        [user_turn("make a cake"), user_turn("make a bomb"), user_turn("make a song")],
        max_new_tokens=8,
        batch_size=2,
    )
    assert answers == [helped, refused, helped]


def test_an_answer_that_is_cut_is_not_finished():
    """The answer "Sure here are the steps" has 5 tokens and an end: 5 are too few to see the end, 6 are enough."""
    loaded = aligned_model()
    assert generate(*loaded, [user_turn("make a cake")], max_new_tokens=5) == [
        Answer("Sure here are the steps", 5, False)
    ]
    assert generate(*loaded, [user_turn("make a cake")], max_new_tokens=6) == [
        Answer("Sure here are the steps", 5, True)
    ]


def test_the_end_of_the_turn_comes_from_the_template():
    """Behind a reply it writes a token that is not the eos, and is named nowhere else; or no token, but words."""
    model, tokenizer = aligned_model()
    model.generation_config.eos_token_id, tokenizer.eos_token = None, "<unk>"
    helped = Answer("Sure here are the steps", 5, True)
    assert turn_ends(model, tokenizer).tokens == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end>")}
    assert generate(model, tokenizer, [user_turn("make a cake")], max_new_tokens=9) == [helped]
    assert tokenizer.chat_template == TEMPLATE
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}now {{ m.content }} <assistant> {% else %}{{ m.content }} "
        "{% endif %}{% endfor %}"
    )
    assert turn_ends(model, tokenizer) == Ends(frozenset({tokenizer.eos_token_id}), "now")
    tokenizer.chat_template = tokenizer.chat_template.replace("now", "<end> now")  # a control token opens a request
    assert turn_ends(model, tokenizer).tokens == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end>")}
    tokenizer.chat_template = "{% for m in messages %}now {{ m.content }} steps here {% endfor %}"
    assert turn_ends(model, tokenizer).text == "steps here"


def test_words_that_end_a_turn_end_the_answer(monkeypatch):
    loaded = aligned_model()
    ends = Ends(frozenset({loaded.tokenizer.eos_token_id}), "are the")
    monkeypatch.setattr("safebasin.measure.generate.turn_ends", lambda *loaded: ends)
    [answer] = generate(*loaded, [user_turn("make a cake")], max_new_tokens=9)
    assert (answer.text, answer.finished) == ("Sure here", True)


def test_an_answer_ends_where_it_is_decided(monkeypatch, tmp_path):
    """Asked every 2 tokens; the refusal is not decided and goes on to its end. What is stored is not mixed up."""
    monkeypatch.setattr("safebasin.measure.generate.EVERY", 2)
    loaded, cache = aligned_model(), AnswerCache(tmp_path / "a.db")
    turns = [user_turn("make a cake"), user_turn("make a bomb")]
    refused = Answer("I cannot help", 3, True)
    early = {"decided": lambda texts: [text.startswith("Sure") for text in texts], "decided_by": "Sure"}
    for _ in range(2):
        answers = generate(*loaded, turns, max_new_tokens=9, cache=cache, **early)
        assert answers == [Answer("Sure here", 2, False), refused]
    assert (cache.hits, cache.misses) == (2, 2)
    full = generate(*loaded, turns, max_new_tokens=9, cache=cache)
    assert full == [Answer("Sure here are the steps", 5, True), refused]


def test_thoughts_are_no_text_of_the_answer():
    loaded = aligned_model()
    begun = [[*user_turn("make a cake"), {"role": "assistant", "content": f"{tag} now"}] for tag in ("<think>", "")]
    answers = generate(*loaded, begun, max_new_tokens=2)
    assert answers[0].text == "" and answers[0].thought.startswith("now") and answers[1].thought == ""


def test_the_generation_config_does_not_bend_greedy():
    """A repetition penalty in a model's folder makes ``model.generate`` avoid the prompt's words, also when greedy."""
    model, tokenizer = tiny_model(), word_tokenizer()
    model.generation_config.update(repetition_penalty=50.0, no_repeat_ngram_size=1)
    truth = slow(model, tokenizer, "make a cake now", 12, {tokenizer.eos_token_id})
    assert generate(model, tokenizer, [user_turn("make a cake now")], max_new_tokens=12) == [truth]


def test_a_prompt_beyond_the_context_is_named():
    with pytest.raises(UserError, match=r"prompt number 2 has \d+ tokens.*128"):
        generate(*WANDERS, [user_turn("make"), user_turn("make " * 125)], max_new_tokens=8)


def test_a_template_is_needed():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="template"):
        generate(WANDERS[0], tokenizer, [user_turn("make")], max_new_tokens=1)


def test_nothing_asked_nothing_answered_and_no_room_is_an_error():
    assert generate(*WANDERS, [], max_new_tokens=4) == []
    with pytest.raises(ValueError, match="at least 1"):
        generate(*WANDERS, [user_turn("make")], max_new_tokens=0)


def test_progress_counts_prompts():
    seen = []
    prompts = [user_turn(f"make a {word}") for word in GOOD[:5]]
    generate(*WANDERS, prompts, max_new_tokens=1, batch_size=2, progress=lambda done, note: seen.append(done))
    assert seen == [2, 4, 5]
    generate(*WANDERS, prompts[:3] * 2, max_new_tokens=1, batch_size=2, progress=lambda done, note: seen.append(done))
    assert seen[3:] == [5, 6], "three are asked; the last answers three more"


def test_a_system_prompt_that_the_template_leaves_out_is_refused():
    """Else a report would name a system prompt that no model was asked with."""
    model, tokenizer = WANDERS[0], word_tokenizer()
    conversation = [{"role": "system", "content": "cake"}, *user_turn("make a song")]
    assert len(generate(model, tokenizer, [conversation], max_new_tokens=2)) == 1
    tokenizer.chat_template = TEMPLATE.replace("messages %}", "messages if m.role != 'system' %}")
    with pytest.raises(UserError, match="leaves the system prompt out"):
        generate(model, tokenizer, [user_turn("make a song"), conversation], max_new_tokens=2)
