"""One pass over all prefixes equals a fresh call for each; the guard's prompt; the scorer and the benchmark."""

import math

import pytest
import torch
from aligned import BAD, GOOD, aligned_model, coded, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCABULARY, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from benchmarks.guard import guard as benchmark
from benchmarks.harness import Bench
from safebasin.batch import collate
from safebasin.encode import TokenizedRow
from safebasin.errors import UserError
from safebasin.guards import prefix
from safebasin.guards.prefix import Guard, encode_policy, prefix_scores, read_guard, takes_tree
from safebasin.guards.templates import TEMPLATES
from safebasin.guards.turns import text_ids
from safebasin.scan import scorer
from safebasin.scan.methods.guard import GuardScore
from safebasin.scan.scan import score_rows

VERDICTS = (10, 20)


def loud(model):
    """Weights so large that a token seen or not seen is a difference of tenths, not of thousandths."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(20 if "embed" in name or "head" in name else 4 if weight.dim() == 2 else 1)
    return model


def sliding_model():
    """A Mistral that sees six tokens back: its cache and its attention take no tree."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return MistralForCausalLM(
        MistralConfig(vocab_size=VOCABULARY, sliding_window=6, attn_implementation="eager", **sizes)
    ).eval()


def with_attention(model, kind):
    model.set_attn_implementation(kind)
    return model


LLAMA = loud(tiny_model())
MODELS = {"eager": LLAMA, "sdpa": with_attention(loud(tiny_model()), "sdpa"), "sliding": loud(sliding_model())}


@torch.no_grad()
def fresh(model, policy, contexts, answers, suffix, verdicts, every):
    """The paper's way: row by row and prefix by prefix, without padding, masks or a cache."""
    scores = []
    for context, answer in zip(contexts, answers, strict=True):
        ends = [*range(every, len(answer), every), len(answer)]
        prompts = [torch.tensor([[*policy, *context, *answer[:end], *suffix]]) for end in ends]
        scores.append(
            torch.stack(
                [model(ids, use_cache=False).logits[0, -1, list(verdicts)].float().softmax(-1)[0] for ids in prompts]
            )
        )
    return scores


def equal(scores, expected, error):
    for one, other in zip(scores, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=error)


tokens = st.integers(0, VOCABULARY - 1)
drawn_rows = st.lists(
    st.tuples(st.lists(tokens, max_size=7), st.lists(tokens, min_size=1, max_size=16)), min_size=1, max_size=4
)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=40)
@given(
    rows=drawn_rows,
    policy=st.lists(tokens, max_size=9),
    suffix=st.lists(tokens, min_size=1, max_size=5),
    every=st.integers(1, 18),
    width=st.sampled_from([1, 11, 2048]),
)
def test_one_pass_equals_fresh_calls(name, rows, policy, suffix, every, width):
    """Drawn lengths, chunks and batches; a short width splits the copies over several passes."""
    contexts, answers = zip(*rows, strict=True)
    if not policy:
        contexts = [context or [1] for context in contexts]
    model = MODELS[name]
    cache = encode_policy(model, policy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "WIDTH", width)
        scores = prefix_scores(model, contexts, answers, suffix, VERDICTS, every=every, policy=cache)
    equal(scores, fresh(model, policy, contexts, answers, suffix, VERDICTS, every), 1e-5)
    assert [len(row) for row in scores] == [math.ceil(len(answer) / every) for answer in answers]
    assert cache.get_seq_length() == len(policy)  # the policy's cache is as it was: the next batch uses it again


def test_the_comparison_can_fail():
    """A chunk that ends one token late is far outside of the tolerance."""
    context, answer, suffix = [1, 2, 3], [7, 8, 9, 11, 12, 13], [5, 6]
    right = fresh(LLAMA, [], [context], [answer], suffix, VERDICTS, 2)[0]
    late = fresh(LLAMA, [], [[*context, answer[0]]], [answer[1:]], suffix, VERDICTS, 2)[0]
    assert (right - late)[:2].abs().min() > 0.01


@torch.no_grad()
def test_in_bfloat16():
    """The tolerance is a thousandth: the logits themselves are rounded to 8 bits."""
    model = tiny_model(dtype=torch.bfloat16)
    contexts, answers, policy = [[1, 2, 3], [4]], [[7, 8, 9, 11, 12, 13], [9] * 13], [3] * 8
    scores = prefix_scores(model, contexts, answers, [5, 6], VERDICTS, every=5, policy=encode_policy(model, policy))
    equal(scores, fresh(model, policy, contexts, answers, [5, 6], VERDICTS, 5), 1e-3)


def test_which_models_take_a_tree():
    assert [takes_tree(MODELS[name]) for name in ("eager", "sdpa", "sliding")] == [True, True, False]


@pytest.mark.parametrize("way", ["_branches", "_forks"])
def test_by_hand(way, monkeypatch):
    """A block that adds the mean of what it sees: no rotation matters (queries are 0), values are the normed
    embeddings, the MLP is 0.

    Tokens c, g, b, s are the unit vectors of 4 dimensions; the norm doubles them (rms 1/2). The head reads g as safe
    and b as unsafe. Context c, answer g g b, suffix s, M = 2.
    Prefix 1 sees c g g s: twice the mean is (.5, 1, 0, .5); with s itself h = (.5, 1, 0, 1.5), of rms
        sqrt(3.5/4) = .93541.
        margin (1 - 0) / .93541 = 1.06904, P = .74442
    Prefix 2 sees c g g b s: (.4, .8, .4, .4); h = (.4, .8, .4, 1.4), of rms sqrt(2.92/4) = .85440.
        margin (.8 - .4) / .85440 = .46816, P = .61495
    If copy 2 saw copy 1, or prefix 1 the token b, the means would be others.
    """
    sizes = {
        "vocab_size": 4,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, tie_word_embeddings=False, rms_norm_eps=1e-12, attn_implementation="eager")
    ).eval()
    block = model.model.layers[0]
    with torch.no_grad():
        for weight in (
            model.model.embed_tokens.weight,
            block.self_attn.v_proj.weight,
            block.self_attn.o_proj.weight,
            model.lm_head.weight,
        ):
            weight.copy_(torch.eye(4))
        block.self_attn.q_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    c, g, b, s = range(4)
    monkeypatch.setattr(prefix, "takes_tree", lambda _: way == "_branches")
    [scores] = prefix_scores(model, [[c]], [[g, g, b]], [s], (g, b), every=2)
    assert scores.tolist() == pytest.approx([0.74442, 0.61495], abs=1e-5)


def test_the_policy_is_read_once():
    """Tokens that go through the network: policy once, then each row its context, its answer and K suffixes, in one
    call of the model."""
    seen = []
    hook = LLAMA.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        cache = encode_policy(LLAMA, [3] * 9)
        for _ in range(2):
            prefix_scores(LLAMA, [[1, 2], [4, 5]], [[7] * 10, [8] * 10], [5, 6, 9], VERDICTS, every=5, policy=cache)
    finally:
        hook.remove()
    assert seen == [(1, 9), (2, 2 + 10 + 2 * 3), (2, 2 + 10 + 2 * 3)]


# --- the prompt of a guard --------------------------------------------------------------------------------------------


def test_a_guard_by_its_template():
    """The chat template writes "<user> make a {conversation} now {answer} help <end> <assistant> ", and the guard first
    says "here"."""
    words = word_tokenizer()
    guard = read_guard(words, "make a {conversation} now {answer} help", ("Sure", "cannot"), opening="here ")
    shown = [" ".join(words.convert_ids_to_tokens(list(ids))) for ids in guard]
    assert shown == ["<user> make a", "now", "help <end> <assistant> here", "Sure cannot"]


def test_a_guard_whose_chat_template_takes_the_conversation():
    """No template of ours: "<user> {conversation} <end> <assistant> {answer} <end> <assistant> "."""
    words = word_tokenizer()
    guard = read_guard(words, None, ("Sure", "cannot"))
    shown = [" ".join(words.convert_ids_to_tokens(list(ids))) for ids in guard]
    assert shown == ["<user>", "<end> <assistant>", "<end> <assistant>", "Sure cannot"]


def byte_guard(template):
    """A tokenizer of single letters, so that every verdict has a first token, with a guard's template in outline."""
    letters = {letter: i for i, letter in enumerate(("<unk>", *(chr(k) for k in range(9, 127))))}
    backend = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", chat_template=template)


OUTLINE = "Q: {{ messages[-2].content }} A: {{ messages[-1].content }} "
OUTLINES = {
    "llama_guard": (OUTLINE + "<assistant>", "\n\n", "su"),
    "granite_guardian": (OUTLINE + "{{ guardian_config.risk_name }}?", "harm?", "NY"),
    "qwen3guard": (OUTLINE + "</think>{{ '\n\n' }}", "\n\nSafety:", None),
    "shieldgemma": (OUTLINE + "{{ guideline + '\n\n' }}", "suicide).\n\n", "NY"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_known_guards_are_prompted_by_their_own_chat_templates(name):
    """Outlines of the chat templates: a preset's variables reach them, and its opening stands before the verdict."""
    template, ends, verdicts = OUTLINES[name]
    words = byte_guard(template)
    if (
        verdicts is None
    ):  # " Safe", " Unsafe" and " Controversial" begin with a blank: one letter is no token of that guard's
        with pytest.raises(UserError, match="two verdicts begin with the same token"):
            read_guard(words, *TEMPLATES[name])
        words.add_tokens([" Safe", " Unsafe", " Contro"])
    guard = read_guard(words, *TEMPLATES[name])
    assert words.decode(list(guard.suffix)).replace(" ", "").endswith(ends.replace(" ", ""))
    assert [words.decode([i]) for i in guard.verdicts] == list(verdicts or (" Safe", " Unsafe", " Contro"))


def test_an_opening_that_the_chat_template_writes_itself_is_not_doubled():
    words = byte_guard(OUTLINE + "<assistant>{{ '\n\n' }}")
    assert (
        read_guard(words, *TEMPLATES["llama_guard"]).suffix
        == read_guard(byte_guard(OUTLINE + "<assistant>"), *TEMPLATES["llama_guard"]).suffix
    )


def test_a_template_and_its_fields_are_not_both_set():
    assert scorer.make({"guard": {"template": "shieldgemma"}}).template == "shieldgemma"
    for wrong, words in (
        ({"template": "qwen3guard", "opening": "x"}, "set it or them"),
        ({"template": "gpt"}, "template"),
    ):
        with pytest.raises(UserError, match=words):
            scorer.make({"guard": wrong})


def test_what_the_user_can_mend():
    words, template = word_tokenizer(), "{conversation} {answer}"
    for wrong in ("make a {conversation}", "{answer} {conversation}", "{conversation} {answer} {answer}"):
        with pytest.raises(UserError, match=r"must hold \{conversation\} and then \{answer\}"):
            read_guard(words, wrong, ("Sure", "I"))
    for wrong in ("unsafe", ""):
        with pytest.raises(UserError, match=f"the verdict '{wrong}' begins no token"):
            read_guard(words, template, ("Sure", wrong))
    for alike in (("Sure", "Sure"), ("I cannot", "I help"), ("Sure",)):
        with pytest.raises(UserError, match="two verdicts begin with the same token"):
            read_guard(words, template, alike)
    words.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match="nothing follows"):
        read_guard(words, template, ("Sure", "I"))
    for answer, suffix, every in (([], [1], 5), ([1], [], 5), ([1], [1], 0)):
        with pytest.raises(UserError, match="chunks of one token or more"):
            prefix_scores(LLAMA, [[1]], [answer], suffix, VERDICTS, every=every)
    with pytest.raises(UserError, match="the verdict 'No' begins no token"):
        score_rows(*aligned_model(), ROWS, {"guard": GuardScore()}, {}, batch_size=2)


def test_a_row_cannot_forge_a_special_token():
    """In a tokenizer that splits at signs, "<end>" is the turn's end for the template, and three unknown words in a
    row's text."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "make": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")
    assert tokenizer("make <end>", add_special_tokens=False)["input_ids"] == [2, 1]
    assert text_ids(tokenizer, "make <end>") == [2, 0, 0, 0]
    assert tokenizer("make <end>", add_special_tokens=False)["input_ids"] == [2, 1]  # and the tokenizer is as it was


# --- the scorer -------------------------------------------------------------------------------------------------------

MODEL, TOKENIZER = aligned_model()
ROWS = coded(
    TOKENIZER,
    *((f"make a {word}", "Sure here are the steps") for word in (*BAD[:2], *GOOD[:2])),
    ("make a bomb", "I cannot"),
)
SETTINGS = {"policy": "{conversation} {answer}", "verdicts": ("Sure", "I"), "every": 2}
ANCHORS = {
    "harmful": coded(TOKENIZER, *((f"make a {word}", "Sure here") for word in BAD)),
    "safe": coded(TOKENIZER, ("make a cake", "Sure here")),
}


def test_the_scorer_is_one_less_the_lowest_prefix():
    """By the definition: text of the row without its special tokens, inside the guard's template, prefix by prefix."""
    words = TOKENIZER.convert_tokens_to_ids
    user, end, assistant = words(["<user>", "<end>", "<assistant>"])
    expected = []
    for row in ROWS:
        first = row.first_answer
        context = [i for i in row.ids[:first] if i not in (user, end, assistant)]
        answer = [i for i in row.ids[first:] if i != end]
        [safe] = fresh(MODEL, [user], [context], [answer], [end, assistant], (words("Sure"), words("I")), 2)
        expected.append(1 - safe.min().item())
    scanned = score_rows(MODEL, TOKENIZER, ROWS, {"guard": scorer.make({"guard": SETTINGS})}, ANCHORS, batch_size=3)
    scores = scanned.rows["guard"]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert (
        min(scores[:2]) > 0.5 > max(scores[2:4])
    )  # this guard answers "I" (cannot) to a bad word, "Sure" to a good one


def test_a_row_of_two_answers_is_as_bad_as_its_worst_prefix():
    """Between the answers stands a user's turn, which is judged as no answer; what precedes the second answer is its
    conversation."""
    words = TOKENIZER.convert_tokens_to_ids
    one, two = words(["make", "a", "cake"]), words(["make", "a", "bomb"])
    sure, end = words(["Sure", "here"]), words("<end>")
    ids = (*one, *sure, end, *two, *sure, end)
    row = TokenizedRow("two", ids, (False,) * 3 + (True,) * 3 + (False,) * 3 + (True,) * 3)
    method = GuardScore(**SETTINGS)
    fitted = method.fit(MODEL, TOKENIZER, ANCHORS)
    score = method.score(MODEL, collate([row], 0), fitted).max().item()
    policy, suffix, verdicts = fitted.guard.policy, fitted.guard.suffix, fitted.guard.verdicts
    parts = fresh(MODEL, policy, [one, [*one, *sure, *two]], [sure, sure], suffix, verdicts, 2)
    assert score == pytest.approx(1 - min(part.min().item() for part in parts), abs=1e-5)


def test_several_unsafe_verdicts():
    """P(safe) is a share of three: 1 / (1 + e^(b - a) + e^(c - a)) of the logits a, b, c of "Sure", "I" and "help"."""
    method = GuardScore(**SETTINGS | {"verdicts": ("Sure", "I cannot", "help now")})
    fitted = method.fit(MODEL, TOKENIZER, ANCHORS)
    answer = ROWS[0].ids[-6:-1]
    ids = [*fitted.guard.policy, *TOKENIZER.convert_tokens_to_ids(["make", "a", BAD[0]]), *answer, *fitted.guard.suffix]
    a, b, c = MODEL(torch.tensor([ids])).logits[0, -1, TOKENIZER.convert_tokens_to_ids(["Sure", "I", "help"])].tolist()
    one_chunk = GuardScore(**SETTINGS | {"verdicts": ("Sure", "I cannot", "help now"), "every": 5})
    score = one_chunk.score(MODEL, collate(ROWS[:1], 0), fitted).max().item()
    assert score == pytest.approx(1 - 1 / (1 + math.exp(b - a) + math.exp(c - a)), abs=1e-5)


def test_a_guard_that_cannot_tell_known_rows_apart():
    """With its verdicts exchanged it scores harmful rows as safer; the message names both scores. Equal rows score
    alike."""
    with pytest.raises(UserError, match=r"scores harmful anchor rows 0\.\d+ and safe ones 0\.\d+"):
        GuardScore(**SETTINGS | {"verdicts": ("I", "Sure")}).fit(MODEL, TOKENIZER, ANCHORS)
    with pytest.raises(UserError, match="it cannot separate them"):
        GuardScore(**SETTINGS).fit(MODEL, TOKENIZER, {"harmful": ROWS[:1], "safe": ROWS[:1]})
    with pytest.raises(UserError, match="needs the anchor set 'harmful'"):
        GuardScore(**SETTINGS).fit(MODEL, TOKENIZER, {})


def test_a_guard_that_says_something_else():
    """The aligned model begins every answer with "I" or "Sure", and never with the verdicts "steps" or "now"."""
    with pytest.raises(UserError, match=r"the guard answers '(I|Sure)', none of \('steps', 'now'\)"):
        GuardScore(**{**SETTINGS, "verdicts": ("steps", "now")}).fit(MODEL, TOKENIZER, ANCHORS)


def test_an_answer_without_text():
    method = GuardScore(**SETTINGS)
    end = TOKENIZER.convert_tokens_to_ids("<end>")
    mute = TokenizedRow("mute", (*ROWS[0].ids[:5], end), (False,) * 5 + (True,))
    with pytest.raises(UserError, match="holds no text"):
        method.score(MODEL, collate([ROWS[0], mute], 0), method.fit(MODEL, TOKENIZER, ANCHORS))


def test_the_guard_may_be_another_model(tmp_path):
    """A folder with its own tokenizer; the rows are decoded by theirs. The same guard, so the same scores."""
    MODEL.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    other = GuardScore(**SETTINGS, model=str(tmp_path), dtype="float32")
    scores = score_rows(loud(tiny_model(seed=3)), TOKENIZER, ROWS, {"other": other}, ANCHORS, batch_size=2).rows[
        "other"
    ]
    assert scores == pytest.approx(
        score_rows(MODEL, TOKENIZER, ROWS, {"own": GuardScore(**SETTINGS)}, ANCHORS, batch_size=2).rows["own"], abs=1e-5
    )


# --- the benchmark ---------------------------------------------------------------------------------------------------


def test_the_benchmark_on_a_tiny_model(tmp_path):
    guard, bench = Guard([3, 4, 5], [6], [7, 8, 9], [10, 20]), Bench(tmp_path / "results.json", tmp_path)
    rows = [([1, 2], list(range(1, 13))), ([3, 4, 5], list(range(20, 33)))]
    benchmark.measure(bench, LLAMA, guard, rows, every=5, repetitions=6, policies=(7, 0))
    records = {record["what"]: record for record in bench.records}
    for policy in (7, 0):
        shared = ([3, 4, 5] * 3)[:policy]
        truth = fresh(LLAMA, shared, *zip(*rows, strict=True), guard.suffix, guard.verdicts, 5)
        for way in benchmark.WAYS.values():
            equal(way(LLAMA, guard, shared, rows, 5), truth, 1e-5)
        ratio = records[f"one_pass.speedup.policy{policy}"]
        assert ratio["interval"][0] <= ratio["value"] <= ratio["interval"][1] and ratio["n"] == 6
        assert all(records[f"{way}.memory.policy{policy}"]["value"] > 0 for way in benchmark.WAYS)
    assert records["one_pass.max_error"]["value"] < 1e-5 and records["one_pass.max_error"]["n"] == 12
    # By hand, policy 7: fresh 3 (7 + 2 + 3) + 5 + 10 + 12 = 63 and 3 (7 + 3 + 3) + 5 + 10 + 13 = 67;
    # one pass 7 + 2 + 12 + 9 + 3 + 13 + 9 = 55.
    assert benchmark.floor(guard, 7, rows, 5) == {"fresh": 130, "one_pass": 55}
    assert {"what", "value", "interval", "n", "goal", "unit"} <= records["one_pass.max_error"].keys()


def test_the_benchmark_counts_bytes():
    """1,000 floats, then 1,000 more while the first live: 8,000 bytes; views and work in place add nothing."""
    with benchmark.Peak() as peak:
        x = torch.zeros(1000)
        y = x + 1
        y.view(10, 100).add_(x.view(10, 100))
        del x, y
        torch.zeros(1500)
    assert peak.most == 8000


def test_a_row_beyond_the_context_of_the_guard_is_refused():
    """Policy, context, answer and suffix: 1 + n + 2 + 1 tokens."""
    room = LLAMA.config.max_position_embeddings - 4
    cache = encode_policy(LLAMA, [3])
    prefix_scores(LLAMA, [[1] * room, [1]], [[7, 8]] * 2, [5], VERDICTS, every=2, policy=cache)
    with pytest.raises(UserError, match=f"context of {room + 4} tokens does not hold a prompt of {room + 5}"):
        prefix_scores(LLAMA, [[1], [1] * (room + 1)], [[7, 8]] * 2, [5], VERDICTS, every=2, policy=cache)
