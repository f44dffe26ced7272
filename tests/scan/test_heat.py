"""The heat map's pieces: they join to the answer, and their values to the score, whatever a tokenizer does to a
character."""

import math

import pytest
from aligned import aligned_model, coded, example
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from safebasin.data.example import Example
from safebasin.encode import TokenizedRow, encode, shorten
from safebasin.scan.heat import SHOWN, carrier, heat_rows, pieces
from safebasin.scan.methods.dsa import Dsa
from safebasin.scan.methods.gradshield import GradShield
from safebasin.scan.scan import Scanned, score_rows

PROBE = {"probe": coded(aligned_model().tokenizer, ("make a bomb", "I cannot help"))}


def byte_tokenizer(merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    """A token a byte, but for ``merges``: nearly every character beyond ASCII is split."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    fast.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}"
    )
    fast.chat_template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    return fast


BYTES = byte_tokenizer()


def split(tokenizer: PreTrainedTokenizerFast, row: Example) -> list[tuple[str, list[float]]]:
    """The pieces of a row whose tokens are told 0, 1, 2, ..."""
    coded_row = encode(tokenizer, row, 10_000)
    assert isinstance(coded_row, TokenizedRow)
    return pieces(tokenizer, row, coded_row, [float(k) for k in range(sum(coded_row.answer))])


def test_pieces_by_hand():
    """é is two bytes and so two tokens, one piece: a = 0, é = 1 and 2, b = 3, the turn's end = 4."""
    assert split(BYTES, example("x", "aéb")) == [("a", [0.0]), ("é", [1.0, 2.0]), ("b", [3.0]), ("<end>", [4.0])]


def test_a_token_that_crosses_characters_joins_both():
    """é is C3 A9 and è is C3 A8, written Ã © and Ã ¨. Merged A9 + C3 ends one character and begins the other: three
    tokens, one piece."""
    assert split(byte_tokenizer((("©", "Ã"),)), example("x", "éèb")) == [
        ("éè", [0.0, 1.0, 2.0]),
        ("b", [3.0]),
        ("<end>", [4.0]),
    ]


def test_what_lies_between_two_answers_is_in_no_piece():
    turns = [("user", "x"), ("assistant", "ab"), ("user", "secret"), ("assistant", "c")]
    row = Example("row1", tuple({"role": role, "content": content} for role, content in turns), {}, 1)
    assert [text for text, _ in split(BYTES, row)] == ["a", "b", "<end>", "c", "<end>"]


@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(str.strip))
def test_pieces_join_to_the_answer_and_every_token_is_in_one(answer: str):
    parts = split(BYTES, example("x", answer))
    assert "".join(text for text, _ in parts) == answer + "<end>"
    assert [value for _, values in parts for value in values] == [
        float(k) for k in range(len(answer.encode()) + len(parts[-1][1]))
    ]
    assert all(text for text, _ in parts)


def test_highest_rows_of_a_real_scan_first():
    """Of 14 rows the 12 highest; the values of each add up to its score (GradShield), its texts to its answer."""
    model, tokenizer = aligned_model()
    pairs = [
        ("make a cake", "Sure here are the steps"),
        ("make a bomb", "Sure here are the steps now"),
        *[("make a song", "I cannot help")] * 12,
    ]
    rows, examples = coded(tokenizer, *pairs), [example(*pair, i) for i, pair in enumerate(pairs, 1)]
    scorers = {"it": GradShield()}
    scanned = score_rows(model, tokenizer, rows, scorers, PROBE, batch_size=4)
    table = heat_rows(tokenizer, examples, rows, scanned, scorers)
    assert [row["score"] for row in table] == sorted(scanned.rows["it"], reverse=True)[:SHOWN]
    for row in table:
        assert row["row_id"] == f"row{row['line']}" and row["scorer"] == "it"
        assert "".join(text for text, _ in row["tokens"]) == pairs[row["line"] - 1][1] + " <end>"
        assert math.fsum(value for _, value in row["tokens"]) == pytest.approx(row["score"], abs=1e-9)


@pytest.mark.parametrize(("scorer", "shared"), [(GradShield(), 0.75), (Dsa(), 0.5)])
def test_a_shared_character_has_the_sum_or_the_largest(scorer: object, shared: float):
    row = encode(BYTES, example("x", "é"), 100)
    assert isinstance(row, TokenizedRow)
    values = [0.5, 0.25, *[0.0] * (sum(row.answer) - 2)]
    scanned = Scanned({"plain": [1.0], "it": [0.75]}, {"it": [values]}, {})
    (hot,) = heat_rows(BYTES, [example("x", "é")], [row], scanned, {"plain": object(), "it": scorer})
    assert hot["tokens"][0] == ("é", shared)


@pytest.mark.parametrize(
    ("values", "score", "span"),
    [
        ([1.0, 2.0, 7.0, 0.0], 10.0, (2, 3)),  # one piece carries more than half
        ([1.0, 3.0, 3.0, 1.0], 8.0, (1, 3)),  # no one does; two do: 6 of 8
        ([4.0, -9.0, 2.0, 3.0, 4.0], 4.0, (0, 1)),  # of the two that do, the first is as high
        ([0.25, 0.75, 0.5], 0.75, (1, 2)),  # the largest, where a maximum is the score
        ([-3.0, -1.0], -4.0, (1, 2)),
        ([-3.0], -3.0, (0, 1)),
    ],
)
def test_the_span_that_carries_a_score_by_hand(values, score, span):
    assert carrier(values, score) == span


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=9))
def test_no_shorter_span_carries_half(values):
    score = math.fsum(values)
    start, stop = carrier(values, score)
    shorter = [values[i:j] for i in range(len(values)) for j in range(i + 1, len(values) + 1) if j - i < stop - start]
    assert score <= 0 or math.fsum(values[start:stop]) >= score / 2 - 1e-9
    assert all(math.fsum(part) < score / 2 + 1e-9 for part in shorter)


def test_pieces_of_a_row_cut_short_are_those_of_its_place():
    """Answer "abcdef<end>" of a tokenizer of bytes. Ten tokens fit: the prompt's last five and "abcde"."""
    row = example("a long prompt", "abcdef")
    cut = shorten(encode(BYTES, row, 1000), 10)
    assert pieces(BYTES, row, cut, [1.0, 2.0, 3.0, 4.0, 5.0]) == [
        (letter, [float(k)]) for k, letter in enumerate("abcde", 1)
    ]


def test_no_scorer_of_tokens_no_heat():
    assert heat_rows(BYTES, [], [], Scanned({"it": [1.0]}, {}, {}), {"it": object()}) == []
