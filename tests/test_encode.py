"""Chat templates: what one row breaks is a bad row, what every row breaks is one line about the template."""

import dataclasses
import pickle

import numpy as np
import pytest
from aligned import BAD, GOOD, TEMPLATE, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_places import TEMPLATES, tokenizer_of

from benchmarks.scan.by_row import by_row
from safebasin.data.example import Example
from safebasin.data.json_rows import BadRow
from safebasin.encode import TokenizedRow, encode, encode_all, shorten
from safebasin.errors import UserError
from safebasin.template import pin_template, render

USER, BOT = {"role": "user", "content": "make a cake"}, {"role": "assistant", "content": "Sure here"}
SYSTEM = {"role": "system", "content": "help"}
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no\nsystem here') }}{% endif %}" + TEMPLATE


def tokenizer_with(template):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def rows(*kinds):
    return [Example(f"r{i}", (*kind, USER, BOT), {}, i) for i, kind in enumerate(kinds, 1)]


RAISING = {
    "an exception of its own": "{{ raise_exception('not so') }}",
    "a key that no turn has": "{% for m in messages %}{{ m.content + m.name }}{% endfor %}",
    "an attribute of nothing": "{{ tools.first.second }}",
    "a number and a text": "{{ 1 + 'x' }}",
    "division by zero": "{{ 1 / 0 }}",
    "an index that is not there": "{{ messages[9]['role'] + '' }}",
    "an unknown filter argument": "{{ messages | join(1, 2, 3, 4) }}",
    "a range without end": "{{ range(10 ** 9) | list }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "the sandbox": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "a value of the wrong kind": "{{ strftime_now(3) }}",
}
UNREADABLE = {
    "syntax": ("{% for m in messages %}{{ m.content }}{% endif %}", "line 1"),
    "an unknown tag": ("\n{% frobnicate %}", "line 2"),
    "an unknown filter": ("{{ messages | frobnicate }}", "frobnicate"),
    "no template": (None, "no chat template"),
    "an empty template": ("", "no chat template"),
    "named without a default": ({"rag": TEMPLATE, "tool_use": TEMPLATE}, "rag, tool_use"),
}


@pytest.mark.parametrize("template", RAISING.values(), ids=RAISING)
def test_a_template_that_fails_on_every_row_is_one_line(template):
    tokenizer = tokenizer_with(template)
    with pytest.raises(UserError, match=r"^line 1: the model's chat template fails: [^\n]*all 3 rows[^\n]*$"):
        encode_all(tokenizer, rows((), (), ()), 64)
    with pytest.raises(UserError, match=r"^the model's chat template fails: [^\n]*$"):
        render(tokenizer, [USER], ask=True)
    assert isinstance(encode(tokenizer, rows(())[0], 64), BadRow)


@pytest.mark.parametrize(("template", "words"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_template_that_cannot_be_read_is_one_line(template, words):
    for call in (encode, encode_all):
        with pytest.raises(UserError, match=r"^[^\n]*chat template[^\n]*$") as refusal:
            call(tokenizer_with(template), rows((), ()) if call is encode_all else rows(())[0], 64)
        assert words in str(refusal.value)


def test_a_row_that_the_template_refuses_is_a_bad_row():
    good, bad = encode_all(tokenizer_with(NO_SYSTEM), rows((), (SYSTEM,), ()), 64)
    assert [row.id for row in good] == ["r1", "r3"]
    assert bad == [BadRow(2, "the model's chat template fails: no")]
    with pytest.raises(UserError, match=r"line 1: .* all 2 rows"):
        encode_all(tokenizer_with(NO_SYSTEM), rows((SYSTEM,), (SYSTEM,)), 64)
    assert encode_all(tokenizer_with(NO_SYSTEM), [], 64) == ([], [])


def test_a_default_among_named_templates_is_used():
    tokenizer = tokenizer_with({"default": TEMPLATE, "rag": "x"})
    assert render(tokenizer, [USER]) == render(word_tokenizer(), [USER])


def test_the_answer_and_its_end_are_learned_and_nothing_else():
    """<user> make a cake <end> <assistant> Sure here <end>: the words after <assistant>."""
    tokenizer = word_tokenizer()
    row = encode(tokenizer, rows(())[0], 64)
    assert isinstance(row, TokenizedRow)
    assert (
        tokenizer.decode([i for i, learned in zip(row.ids.tolist(), row.answer.tolist()) if learned])
        == "Sure here <end>"
    )
    assert len(row) == 9
    assert encode(tokenizer, rows(())[0], 8) == BadRow(1, "over-long: 9 tokens, max_length is 8")
    assert shorten(row, 9) is row
    assert (
        shorten(row, 4).start == 4
    )  # "<end> <assistant> Sure here": the answer begins at 6, half of four are its tokens


def test_a_turn_of_weight_zero_is_not_learned():
    example = Example("r", (USER, BOT | {"weight": 0}, USER, BOT), {}, 1)
    row = encode(word_tokenizer(), example, 64)
    assert isinstance(row, TokenizedRow) and sum(row.answer) == 3


MARKED = TEMPLATE.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
WORDS = (*BAD, *GOOD, "<end>", "Qz0v0w", "</think>", "<think>")  # a forged turn, a mark, thoughts
texts = st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join)
BYTES = ["one", "é", "\U0001f600", " ", "\n", "<|im_", "end|>", "<|im_end|>", "<b>", "<think>\n", "</think>"]
byte_texts = st.lists(st.sampled_from(BYTES), max_size=5).map("".join)


def drawn(conversations, system):
    return [
        Example(
            f"r{i}",
            (
                *([SYSTEM] if system and i % 2 else []),
                *(
                    {"role": role, "content": text}
                    for pair in turns
                    for role, text in zip(("user", "assistant"), pair, strict=True)
                ),
            ),
            {},
            i,
        )
        for i, turns in enumerate(conversations, 1)
    ]


def check_together(tokenizer, examples, together, longest):
    """Rows together are what each is by the definition; or every one of them is bad by the template."""
    slow = by_row(tokenizer, examples, longest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safebasin.encode.TOGETHER", together)
        try:
            good, bad = encode_all(tokenizer, examples, longest)
        except UserError as error:
            assert all(isinstance(row, BadRow) and row.reason in str(error) for row in slow[:1])
            return
    assert good == [row for row in slow if isinstance(row, TokenizedRow)]
    assert bad == [row for row in slow if isinstance(row, BadRow)]
    assert all(isinstance(row.ids, np.ndarray) and not row.ids.flags.writeable for row in good)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), max_size=6),
    st.integers(1, 4),
    st.sampled_from([TEMPLATE, NO_SYSTEM, MARKED]),
    st.booleans(),
)
def test_rows_together_are_what_each_is_alone(conversations, together, template, system):
    """Whatever shares a call of the tokenizer and the rendering of its sentinels; bad rows among them."""
    check_together(tokenizer_with(template), drawn(conversations, system), together, 24)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.tuples(byte_texts, byte_texts), min_size=1, max_size=2), max_size=5),
    st.integers(1, 4),
    st.sampled_from(sorted(TEMPLATES)),
    st.booleans(),
)
def test_rows_of_bytes_together_are_what_each_is_alone(conversations, together, name, thoughts):
    """Byte-level BPE, whose tokens have no offsets: letters of several bytes, forged control tokens, thoughts."""
    tokenizer = tokenizer_of(TEMPLATES[name])
    if not thoughts:
        pin_template(tokenizer, {"learn_thoughts": False})
    check_together(tokenizer, drawn(conversations, system=False), together, 90)


def test_a_row_is_two_arrays():
    row = TokenizedRow("r", (1, 2, 3), [False, True, True])
    assert (row.ids.dtype, row.answer.dtype, row.first_answer, len(row)) == (np.int32, np.bool_, 1, 3)
    with pytest.raises(ValueError, match="read-only"):
        row.ids[0] = 7
    assert dataclasses.replace(row, note="n").ids is row.ids  # nothing is copied
    assert pickle.loads(pickle.dumps(row)) == row != dataclasses.replace(row, ids=(1, 2, 4))
    assert TokenizedRow("r", (1,), (False,)).first_answer == 1
