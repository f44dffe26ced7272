"""Encoded rows on disk: read back they are what was encoded, and never those of other rows, templates or bytes."""

import dataclasses
import datetime
import tempfile
from pathlib import Path

import pytest
from aligned import BAD, GOOD, TEMPLATE, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from safebasin.data.example import Example
from safebasin.encode import Refused, encoded, fit, shorten
from safebasin.pipeline import token_files
from safebasin.pipeline.token_files import TokenFiles, row_digest

TOKENIZER = word_tokenizer()
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE


def example(request, answer="Sure here", line=1, **more):
    turns = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    return Example(f"row{line}", tuple(turns), {}, line, **more)


@pytest.fixture
def encoders(monkeypatch):
    """How many rows were encoded, call by call."""
    calls = []

    def counted(tokenizer, examples):
        calls.append(len(examples))
        return encoded(tokenizer, examples)

    monkeypatch.setattr(token_files, "encoded", counted)
    return lambda: sum(calls)


TEXT = st.lists(st.sampled_from((*BAD[:2], *GOOD[:2], "make", "<end>")), max_size=6).map(" ".join)  # a forged turn


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=9), st.integers(1, 4), st.integers(3, 12), st.data())
def test_what_is_read_is_what_was_encoded(pairs, per_file, longest, data):
    """Rows of several files, some of them equal, some bad or cut short; then some in another order under other ids."""
    examples = [example(*pair, line=i) for i, pair in enumerate(pairs, 1)]
    expected = encoded(TOKENIZER, examples)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "ROWS", per_file)
        assert TokenFiles(Path(folder), TOKENIZER).encoded(examples) == expected
        patch.setattr(token_files, "encoded", lambda _, rows: [] if not rows else pytest.fail("encoded again"))
        coded = TokenFiles(Path(folder), TOKENIZER).encoded(examples)
        assert coded == expected
        chosen = data.draw(st.lists(st.sampled_from(range(len(examples))), max_size=6))
        others = [dataclasses.replace(examples[i], id=f"other{k}", line=k) for k, i in enumerate(chosen)]
        assert TokenFiles(Path(folder), TOKENIZER).encoded(others) == encoded(TOKENIZER, others)
    rows = [[row for row in each if not isinstance(row, Refused)] for each in (coded, expected)]
    assert [shorten(row, longest) for row in rows[0]] == [shorten(row, longest) for row in rows[1]]


def test_rows_lie_in_the_file(tmp_path):
    [row] = TokenFiles(tmp_path, TOKENIZER).encoded([example("make a cake")])
    assert not row.ids.flags.owndata and not row.answer.flags.owndata and not row.ids.flags.writeable


def damaged(file, how):
    content = file.read_bytes()
    changed = bytes([content[len(content) // 2] ^ 1])
    middle = content[: len(content) // 2] + changed + content[len(content) // 2 + 1 :]
    file.write_bytes({"a bit": middle, "cut off": content[:-9], "nothing": b"", "more": content + b"\0"}[how])


@pytest.mark.parametrize("how", ["a bit", "cut off", "nothing", "more", "gone"])
@pytest.mark.parametrize("few", [False, True], ids=["all rows", "some rows"])
def test_a_damaged_file_is_made_again(tmp_path, encoders, how, few):
    examples = [example(f"make a {word}", line=i) for i, word in enumerate(GOOD)]
    TokenFiles(tmp_path, TOKENIZER).encoded(examples)
    [file] = tmp_path.rglob("*.arrow")
    content = file.read_bytes()
    file.unlink() if how == "gone" else damaged(file, how)
    wanted = examples[2:4] if few else examples
    assert encoders() == len(GOOD)
    assert TokenFiles(tmp_path, TOKENIZER).encoded(wanted) == encoded(TOKENIZER, wanted)
    assert encoders() == len(GOOD) + len(wanted)
    assert few or file.read_bytes() == content


def test_of_a_set_with_one_more_row_one_is_encoded(tmp_path, encoders):
    examples = [example(f"make a {word}", line=i) for i, word in enumerate(GOOD)]
    TokenFiles(tmp_path, TOKENIZER).encoded(examples[1:])
    TokenFiles(tmp_path, TOKENIZER).encoded(examples)
    assert encoders() == len(GOOD)
    assert len(list(tmp_path.rglob("*.arrow"))) == 2


def test_whatever_decides_tokens_makes_another_key(tmp_path, monkeypatch):
    row = [example("make a cake")]
    seen = set()

    def used(tokenizer):
        coded = TokenFiles(tmp_path, tokenizer).encoded(row)
        assert coded == encoded(tokenizer, row)
        [folder] = tmp_path.iterdir()  # of the others nothing is left
        seen.add(folder.name)
        return len(seen)

    plain = word_tokenizer()
    assert used(plain) == 1
    plain("make a cake", truncation=True, max_length=2)  # what a call leaves in the tokenizer is no part of it
    assert used(plain) == 1
    template = word_tokenizer()
    template.chat_template = TEMPLATE.replace("<end> {%", "<end> a {%")
    assert used(template) == 2
    grown = word_tokenizer()
    grown.add_tokens(["cakes"])
    assert used(grown) == 3
    ended = word_tokenizer()
    ended.eos_token = "<assistant>"
    assert used(ended) == 4
    monkeypatch.setattr(token_files, "package_digest", lambda: "another line of code")
    assert used(plain) == 5


def test_rows_differ_by_whatever_a_template_may_read():
    turn = {"role": "user", "content": "a"}
    values = [
        ({"role": "user", "content": "b"},),
        (turn,),
        (turn, turn),
        ({**turn, "weight": 0},),
        ({**turn, "weight": 1},),
        ({**turn, "weight": True},),
        ({"content": "a", "role": "user"},),
        ({"role": "system", "content": "a"},),
        ({**turn, "name": "x"},),
    ]
    digests = [row_digest(Example("r", messages, {}, 1)) for messages in values]
    tools = [({"name": "f"},), ({"name": "f", "n": 1},), ({"n": 1, "name": "f"},), ({"name": "f", "n": 1.0},)]
    digests += [row_digest(Example("r", (turn,), {}, 1, each)) for each in tools]
    assert len(set(digests)) == len(digests) and None not in digests
    assert row_digest(Example("other", (turn,), {"x": 1}, 7)) == digests[1]
    for value in (datetime.date(2026, 1, 1), {1: "a key that JSON makes a text"}, b"bytes"):
        assert row_digest(Example("r", (turn,), {}, 1, ({"name": value},))) is None


def test_a_row_that_json_does_not_have_is_not_stored(tmp_path, encoders):
    rows = [example("make a cake", line=1), example("make a song", line=2, tools=({"name": b"x"},))]
    for _ in range(2):
        assert TokenFiles(tmp_path, TOKENIZER).encoded(rows) == encoded(TOKENIZER, rows)
    assert encoders() == 1 + 2 * 1


def test_a_template_that_fails_on_every_row_fails_the_same_when_it_is_read(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    system = {"role": "system", "content": "help"}
    examples = [Example(f"r{i}", (system, *example("a").messages), {}, i) for i in (1, 2)]
    for _ in range(2):
        coded = TokenFiles(tmp_path, tokenizer).encoded(examples)
        with pytest.raises(Exception, match=r"line 1: .*no system.* all 2 rows"):
            fit(coded, examples, 64)
