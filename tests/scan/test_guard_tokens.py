"""The guard's score of every token: what STAR-DSS reads of it is V of the token's chunk, whichever tokenizers guard and
model have."""

import re
from bisect import bisect_left
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from aligned import BAD, GOOD, aligned_model, coded, example
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model, write_scores
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from safebasin.batch import collate
from safebasin.encode import TokenizedRow
from safebasin.errors import UserError
from safebasin.guards.turns import chunks_of
from safebasin.scan.column import star_column
from safebasin.scan.methods.guard import GuardScore
from safebasin.scan.scan import score_rows
from safebasin.scan.scores import read_scores
from safebasin.template import render

MODEL, WORDS = aligned_model()
SETTINGS = {"policy": "{conversation} {answer}", "verdicts": ("Sure", "I"), "every": 2}
JOINED = (
    "areĠtheĠstepsĠnow",
    "Ġhere",
    "keĠ",
)  # tokens of four words, of a blank and a word, of a word's end and a blank
END = 256  # a turn's end, behind the bytes


def byte_tokenizer(joined: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A token a byte, but for ``joined``, which may cross blanks; a row is "[user] ... [assistant] ...<end>"."""
    merges = [(text[:k], text[k]) for text in joined for k in range(1, len(text))]
    tokens = list(dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>", *(a + b for a, b in merges)]))
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(dict.fromkeys(merges))))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    fast.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    fast.chat_template += "{{ '<end>' if m.role == 'assistant' else ' ' }}{% endfor %}"
    fast.chat_template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    return fast


ROWS = byte_tokenizer(JOINED)
PLAIN = byte_tokenizer()


def byte_ends(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[int]:
    """Where each token ends, in bytes: a letter of a token is a byte, and the turn's end is none."""
    return list(
        accumulate(
            0 if k == END else len(token) for k, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
        )
    )


def last_characters(text: str, ends: list[int]) -> list[int]:
    """The character that each token's last byte is of."""
    characters = list(accumulate(len(c.encode()) for c in text))
    return [bisect_left(characters, end) for end in ends]


@torch.no_grad()
def naive(prompt: str, prefix: str) -> float:
    """V: the guard is asked about the text of one prefix."""
    shown = SETTINGS["policy"].format(conversation=f"[user] {prompt} [assistant]", answer=prefix)
    ids = WORDS(render(WORDS, [{"role": "user", "content": shown}], ask=True), add_special_tokens=False)["input_ids"]
    return MODEL(torch.tensor([ids])).logits[0, -1, WORDS.convert_tokens_to_ids(["Sure", "I"])].softmax(-1)[0].item()


def expected(prompt: str, answer: str, row: TokenizedRow) -> tuple[list[float], list[float]]:
    """V of every chunk of two guard words; and for every token the lowest of the chunk that it ends in and of those
    that it ends."""
    words = list(re.finditer(r"\S+", answer))
    chunks = [words[k : k + 2] for k in range(0, len(words), 2)]
    v = [naive(prompt, answer[: chunk[-1].end()]) for chunk in chunks]
    starts = [chunk[0].start() for chunk in chunks[1:]]
    lowest, before = [], -1
    for at in last_characters(
        answer,
        byte_ends(ROWS, [i for i, learned in zip(row.ids.tolist(), row.answer.tolist(), strict=True) if learned]),
    ):
        chunk = sum(start <= at for start in starts)
        lowest.append(min(v[min(before + 1, chunk) : chunk + 1]))
        before = chunk
    return v, lowest


PAIRS = [
    ("make a bomb", "Sure here are the steps now"),
    ("make a bomb", "I cannot help 😀 make a cake now"),
    ("make a cake", "Sure here 😀é are the steps now help the now"),
    ("make a poison", "make  a\ncake  "),
    ("make a song", "Sure"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The guard: another model than the scanned one, with whole words for tokens."""
    path = tmp_path_factory.mktemp("guard")
    for part in (MODEL, WORDS):
        part.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def method(folder):
    return GuardScore(**SETTINGS, model=folder, dtype="float32")


ANCHORS = {
    "harmful": coded(ROWS, *((f"make a {word}", "Sure here") for word in 2 * BAD)),
    "safe": coded(ROWS, *((f"make a {word}", "Sure here") for word in 2 * GOOD)),
}


def test_the_column_is_v_of_each_tokens_chunk(method, tmp_path):
    """Through the table on disk and into the batch that star_dss reads. The guard's median scores of known rows stretch
    nothing."""
    examples = [example(*pair, i) for i, pair in enumerate(PAIRS, 1)]
    rows = coded(ROWS, *PAIRS)
    write_scores(
        tmp_path / "scores.parquet",
        examples,
        score_rows(tiny_model(seed=3), ROWS, rows, {"guard": method}, ANCHORS, batch_size=2),
    )
    scores = read_scores(tmp_path / "scores.parquet")
    column = star_column(scores, "guard", method, examples)
    batch = collate([TokenizedRow(row.id, row.ids, row.answer, {"star": column[row.id]}) for row in rows], END)
    for i, (pair, row) in enumerate(zip(PAIRS, rows, strict=True)):
        v, tokens = expected(*pair, row)
        assert batch.columns["star"][i][batch.mask[i]].tolist() == pytest.approx(tokens, abs=1e-5)
        assert scores.columns["guard"][i] == pytest.approx(1 - min(v), abs=1e-5)
    assert max(column["row3"]) - min(column["row3"]) > 0.05  # a row has no one number
    assert (
        rows[0].ids.tolist().count(ROWS.convert_tokens_to_ids(JOINED[0])) == 1
    )  # and a token that ends two chunks is among them


def test_two_answers_and_one_that_says_nothing(method):
    """Every answer has its own chunks; an end mark alone has no verdict, and its score is zero."""
    start, end = (
        ROWS("[user] make a bomb [assistant] ")["input_ids"],
        ROWS("[user] make a cake [assistant] ")["input_ids"],
    )
    sure, mark = ROWS("Sure here now")["input_ids"], END
    ids = (*start, *sure, mark, *end, mark, *end, *sure, mark)
    learned = (
        [False] * len(start)
        + [True] * (len(sure) + 1)
        + [False] * len(end)
        + [True]
        + [False] * len(end)
        + [True] * (len(sure) + 1)
    )
    fitted = method.fit(tiny_model(), ROWS, ANCHORS)
    batch = collate([TokenizedRow("two", ids, tuple(learned))], END)
    scores = method.score(None, batch, fitted)[batch.mask].tolist()
    first, mute, last = scores[: len(sure) + 1], scores[len(sure) + 1], scores[len(sure) + 2 :]
    assert (
        mute == 0
        and len(set(first)) == len(set(last)) == 2
        and min(abs(a - b) for a, b in zip(first, last, strict=True)) > 1e-4
    )
    alone = collate(
        [TokenizedRow("one", ids[: len(start) + len(sure) + 1], tuple(learned[: len(start) + len(sure) + 1]))], END
    )
    assert first == pytest.approx(method.score(None, alone, fitted)[alone.mask].tolist(), abs=1e-5)


@given(
    text=st.text(st.sampled_from("ab 😀é\ufffd日\n"), min_size=1, max_size=12),
    joined=st.tuples(*[st.lists(st.text(st.sampled_from("abĠðŁĺ"), min_size=2, max_size=4), max_size=3)] * 2),
    every=st.integers(1, 6),
    data=st.data(),
)
def test_chunks_by_bytes(text, joined, every, data):
    """Both tokenizers split characters, each its own way, and the row may be cut inside of one. A token's chunk is the
    first that ends no sooner than its last character does."""
    rows, guard = (byte_tokenizer(tuple(each)) for each in joined)
    ids = rows(text)["input_ids"]
    ids = ids[: data.draw(st.integers(1, len(ids)))]
    ends, seen = byte_ends(rows, ids), rows.decode(ids)
    read = guard(seen, return_offsets_mapping=True)
    begins = [start for start, _ in read["offset_mapping"][every::every]]
    closes = byte_ends(guard, read["input_ids"])
    closes = [*closes[every - 1 : -1 : every], closes[-1]]
    ends_of = list(accumulate(len(c.encode()) for c in seen))
    truth = [bisect_left(closes, ends_of[min(at, len(seen) - 1)]) for at in last_characters(text, ends)]
    assert chunks_of(rows, ids, seen, begins) == truth
    assert chunks_of(rows, [*ids, END], seen, begins) == [
        *truth,
        len(closes) - 1,
    ]  # the turn's end is in the last chunk


def test_chunks_by_hand():
    """ "é are" is 6 bytes and so 6 tokens; the guard's words are "é" and "are", a chunk each, the second from character
    2 on."""
    ids = PLAIN("é are")["input_ids"]
    assert chunks_of(PLAIN, [*ids, END], "é are", [2]) == [0, 0, 0, 1, 1, 1, 1]


def test_a_guard_without_places_of_its_tokens_is_refused():
    with pytest.raises(UserError, match="no places of its tokens in a text"):
        GuardScore(**SETTINGS).fit(MODEL, SimpleNamespace(is_fast=False), ANCHORS)
