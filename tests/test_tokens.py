"""Texts as tokens, together and by their bytes, against what the tokenizer says of each text alone."""

import numpy as np
import pytest
from aligned import word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from benchmarks.scan.by_row import HOW, inside
from safebasin.tokens import TokenizedTexts, _byte_tokens

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|im|>"]
MERGES = [("Ġ", "a"), ("a", "a"), ("Ã", "©"), ("o", "n"), ("on", "e"), ("ð", "Ł"), ("Ģ", "a"), ("Ġ", "Ġ")]


def byte_tokenizer(*, normalizer=None, after=None, removed=False, **flags):
    """Bytes and a few merges, one of which joins the bytes of é, one the first two of an emoji, and control tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in MERGES)])}
    backend = Tokenizer(models.BPE(vocabulary, MERGES))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split("~", "removed" if removed else "isolated")
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([split, level]), decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    if after:
        backend.post_processor = after
    backend.add_special_tokens([AddedToken(token, **flags) for token in SPECIAL])
    backend.add_tokens([AddedToken("<own>", normalized=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def lacking():
    """Without a token for one byte of the two of é: it is left out."""
    tokenizer = byte_tokenizer()
    state = tokenizer.backend_tokenizer.to_str().replace('"Ã":', '"ĠĠĠ":').replace('"Ã©":', '"ĠĠĠĠ":')
    state = state.replace('["Ã","©"]', '["ĠĠ","ĠĠ"]').replace('[\n        "Ã",\n        "©"\n      ]', '["ĠĠ","ĠĠ"]')
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(state), eos_token="<|im_end|>")


BY_BYTES = {
    "bytes": byte_tokenizer(),
    "composed": byte_tokenizer(normalizer=normalizers.NFC()),
    "offsets that are not trimmed": byte_tokenizer(after=processors.ByteLevel(trim_offsets=False)),
    "a byte without a token": lacking(),
}
BY_OFFSETS = {
    "offsets that are trimmed": byte_tokenizer(after=processors.ByteLevel(trim_offsets=True)),
    "lower case": byte_tokenizer(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])),
    "a piece is removed": byte_tokenizer(removed=True),
    "a control token takes white space": byte_tokenizer(rstrip=True),
    "words": word_tokenizer(),
}
TEXTS = st.lists(
    st.sampled_from(
        ["a", " ", "  ", "one", "\n", "é", "e\u0301", "\u2126", "\U0001f600", "~", "A", "<", "make", "<own>", *SPECIAL]
    ),
    max_size=8,
).map("".join)


def test_which_are_taken_by_their_bytes():
    assert all(_byte_tokens(tokenizer, len(tokenizer)) for tokenizer in BY_BYTES.values())
    assert not any(_byte_tokens(tokenizer, len(tokenizer)) for tokenizer in BY_OFFSETS.values())


@pytest.mark.parametrize("name", [*BY_BYTES, *BY_OFFSETS])
@settings(max_examples=40, deadline=None)
@given(data=st.data(), texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_tokens_and_their_places_are_the_tokenizers(name, data, texts):
    tokenizer = (BY_BYTES | BY_OFFSETS)[name]
    cuts = [sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6))) for text in texts]
    spans = [list(zip(cut[::2], cut[1::2], strict=False)) for cut in cuts]
    tokens = TokenizedTexts(tokenizer, texts)
    coded = tokenizer(texts, **HOW)
    assert [part.tolist() for part in np.split(tokens.ids, tokens.first[1:-1])] == coded["input_ids"]
    expected = [
        [int(tokens.first[i]) + k for k in run]
        for i in range(len(texts))
        for run in inside(coded["offset_mapping"][i], spans[i])
    ]
    owners, low, high = tokens.inside(spans)
    assert owners.tolist() == [i for i, each in enumerate(spans) for _ in each]
    parts = [tokens.covered(low[k : k + 1], high[k : k + 1]).nonzero()[0].tolist() for k in range(len(low))]
    assert parts == expected


def test_what_a_call_left_in_the_tokenizer_does_not_count():
    """A call that truncates or reads control tokens as text leaves that in its backend."""
    tokenizer = byte_tokenizer()
    tokenizer("one", truncation=True, max_length=2, split_special_tokens=True)
    tokens = TokenizedTexts(tokenizer, ["one a<|im_end|>", ""])
    assert tokenizer.convert_ids_to_tokens(tokens.ids.tolist()) == ["one", "Ġa", "<|im_end|>"]
    assert tokens.first.tolist() == [0, 3, 3]
