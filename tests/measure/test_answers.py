"""Answers on disk: what is read equals what would be generated, and whatever decides an answer makes it a miss."""

import json
import shutil
import sqlite3

import pytest
import torch
from aligned import BAD, GOOD, aligned_model, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from safebasin.data.tables import write_table
from safebasin.errors import UserError
from safebasin.measure import suite
from safebasin.measure.answers import AnswerCache, _tokens, digest
from safebasin.measure.generate import generate
from safebasin.measure.judges.keyword import Keyword
from safebasin.measure.subject import Subject

PROMPTS = [[{"role": "user", "content": f"make a {word}" + " now" * (i % 3)}] for i, word in enumerate((*BAD, *GOOD))]


@pytest.fixture
def open_cache(tmp_path):
    return lambda: AnswerCache(tmp_path / "run" / "answers.db")


def counts(cache):
    return cache.hits, cache.misses


def test_read_equals_generated(open_cache):
    """Twelve prompts, one of them twice. The second time all are hits; among others in another order, the old ones."""
    loaded, turns = aligned_model(), [*PROMPTS, PROMPTS[0]]
    fresh = generate(*loaded, turns, max_new_tokens=7, batch_size=5)
    first, again, more = open_cache(), open_cache(), open_cache()
    assert generate(*loaded, turns, max_new_tokens=7, batch_size=5, cache=first) == fresh
    assert counts(first) == (0, 12)
    assert generate(*aligned_model(), turns, max_new_tokens=7, batch_size=2, cache=again) == fresh
    assert counts(again) == (12, 0)
    new = [{"role": "user", "content": "a song"}]
    assert generate(*loaded, [PROMPTS[3], new, PROMPTS[1]], max_new_tokens=7, cache=more) == [
        fresh[3],
        *generate(*loaded, [new], max_new_tokens=7),
        fresh[1],
    ]
    assert counts(more) == (2, 1)


def one_weight(loaded):
    with torch.no_grad():
        loaded.model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] += 1e-6
    return loaded


def dtype(loaded):
    loaded.model.bfloat16()
    return loaded


def template(loaded):
    loaded.tokenizer.chat_template = loaded.tokenizer.chat_template.replace("<{{", "now <{{")
    return loaded


def config(loaded):
    loaded.model.config.rms_norm_eps *= 1.5
    return loaded


def stops(loaded):
    loaded.model.generation_config.eos_token_id = [2, 7]
    return loaded


@pytest.mark.parametrize("changed", [one_weight, dtype, template, config, stops])
def test_whatever_decides_an_answer_misses(open_cache, changed):
    generate(*aligned_model(), PROMPTS, max_new_tokens=6, cache=open_cache())
    cache, loaded = open_cache(), changed(aligned_model())
    fresh = generate(*loaded, PROMPTS, max_new_tokens=6)
    assert generate(*loaded, PROMPTS, max_new_tokens=6, cache=cache) == fresh
    assert counts(cache) == (0, 12)


def test_settings_prompt_and_what_is_begun_miss(open_cache):
    loaded = aligned_model()
    generate(*loaded, PROMPTS, max_new_tokens=6, cache=open_cache())
    cache = open_cache()
    generate(*loaded, PROMPTS, max_new_tokens=5, cache=cache)
    assert counts(cache) == (0, 12)
    begun = [[*turns, {"role": "assistant", "content": "Sure"}] for turns in PROMPTS]
    system = [[{"role": "system", "content": "now"}, *turns] for turns in PROMPTS]
    for turns in (begun, system):
        cache = open_cache()
        assert generate(*loaded, turns, max_new_tokens=6, cache=cache) == generate(*loaded, turns, max_new_tokens=6)
        assert counts(cache) == (0, 12)


def test_a_moved_model_has_answers_of_its_own_and_a_landscape_goes_on(open_cache, tmp_path):
    """Every stop is asked once; the second time all are read, and the measurements are the same."""
    write_table(tmp_path / "bad.jsonl", [{"prompt": f"make a {word}"} for word in BAD])
    fields = {
        "prompts": str(tmp_path / "bad.jsonl"),
        "judges": ["keyword"],
        "max_new_tokens": 24,
        "directions": 1,
        "points": 3,
        "ends": [-0.3, 0.3],
        "width": 0,
    }
    landscape, runs = suite.make({"landscape": fields}), []
    for cache, expected in ((None, None), (open_cache(), (0, 18)), (open_cache(), (18, 0))):
        subject = Subject(aligned_model(), "arm", {"keyword": Keyword()}, cache=cache)
        runs.append(list(landscape.measure(subject)))
        assert cache is None or counts(cache) == expected
    assert runs[0] == runs[1] == runs[2]


def test_a_suite_asks_once(open_cache, tmp_path):
    write_table(tmp_path / "bad.jsonl", [{"prompt": f"make a {word}"} for word in BAD])
    asr, runs = suite.make({"asr": {"prompts": str(tmp_path / "bad.jsonl"), "judges": ["keyword"]}}), []
    for hits in (0, 6):
        cache = open_cache()
        runs.append(list(asr.measure(Subject(aligned_model(), "arm", {"keyword": Keyword()}, cache=cache))))
        assert counts(cache) == (hits, 6 - hits)
    assert runs[0] == runs[1]


def test_no_text_stands_in_the_file_and_the_folder_of_a_model_does_not_matter(open_cache, tmp_path):
    loaded, elsewhere = aligned_model(), aligned_model()
    elsewhere.model.config._name_or_path = "elsewhere"
    generate(*loaded, PROMPTS, max_new_tokens=6, cache=open_cache())
    raw = (tmp_path / "run" / "answers.db").read_bytes()
    assert b"bomb" not in raw and b"cannot" not in raw and b"steps" not in raw
    assert digest(loaded.model, [2], 6) == digest(elsewhere.model, [2], 6) != digest(loaded.model, [2], 7)


def test_an_adapter_that_can_be_switched_off_is_refused(tmp_path):
    model = get_peft_model(aligned_model().model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="switched off"):
        generate(model, word_tokenizer(), PROMPTS, max_new_tokens=2, cache=AnswerCache(tmp_path / "a.db"))


@pytest.mark.parametrize(
    "damage",
    ["no json", "", "[", "{}", "[]", '["1"]', "[1.5]", "[true]", "[-1]", "[1e99]", "null", "[" * 5000, b"\xff\xfe", 7],
)
def test_a_damaged_row_is_generated_again(open_cache, tmp_path, damage):
    """One row of twelve is damaged: eleven hits, and the answers are right again, also on disk."""
    fresh = generate(*aligned_model(), PROMPTS, max_new_tokens=6, cache=open_cache())
    with sqlite3.connect(tmp_path / "run" / "answers.db") as file:
        [key] = file.execute("SELECT min(key) FROM generated").fetchone()
        file.execute("UPDATE generated SET tokens = ? WHERE key = ?", (damage, key))
    for expected in ((11, 1), (12, 0)):
        cache = open_cache()
        assert generate(*aligned_model(), PROMPTS, max_new_tokens=6, cache=cache) == fresh
        assert counts(cache) == expected


@given(
    st.one_of(st.binary(), st.text().map(lambda text: text.encode("utf-8", "surrogatepass")), st.none(), st.floats())
)
def test_any_stored_value_is_token_ids_or_nothing(stored):
    ids = _tokens(stored)
    assert ids is None or (ids and all(type(i) is int and i >= 0 for i in ids))


def test_a_file_that_is_no_cache_or_is_cut_short_is_one_line(open_cache, tmp_path):
    other = tmp_path / "other.db"
    for content in (json.dumps(["no", "database"] * 100).encode(), b"SQLite format 3\0" + b"\xff" * 2000):
        other.write_bytes(content)
        with pytest.raises(UserError, match=rf"^{other} is no cache of answers, or damaged .*remove it[^\n]*$"):
            AnswerCache(other)
    generate(*aligned_model(), PROMPTS, max_new_tokens=6, cache=open_cache())
    whole_file = (tmp_path / "run" / "answers.db").read_bytes()
    other.write_bytes(whole_file[:4096] + b"\x00" * (len(whole_file) - 4096))
    with pytest.raises(UserError, match=rf"^{other} [^\n]*remove it[^\n]*$"):
        generate(*aligned_model(), PROMPTS, max_new_tokens=6, cache=AnswerCache(other))
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be used"):
        open_cache()


@pytest.mark.parametrize("pragma", ["query_only = 1", "max_page_count = 1"])
def test_a_file_that_cannot_be_written_is_one_line_and_keeps_what_it_has(open_cache, tmp_path, pragma):
    """Read-only, and a full disk as SQLite reports one."""
    cache = open_cache()
    cache.write(b"m", {(1,): [2]})
    cache._file.execute(f"PRAGMA {pragma}")
    many = {(i,): list(range(2000)) for i in range(10)}
    with pytest.raises(UserError, match=rf"^the cache of answers {tmp_path}.*cannot be used: [^\n]*$"):
        cache.write(b"m", many)
    assert open_cache().read(b"m", [(1,), (2,)]) == {(1,): [2]}


def test_a_locked_file_is_one_line(open_cache, tmp_path):
    path = tmp_path / "run" / "answers.db"
    open_cache()
    with sqlite3.connect(path) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match=r"answers\.db cannot be used: database is locked"):
            AnswerCache(path, timeout=0.01)
