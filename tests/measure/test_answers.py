"""Answers kept on disk: what is read is what would be said, and whatever decides an answer makes it be asked again."""

import json

import pytest
import torch
from aligned import BAD, GOOD, aligned_model, word_tokenizer
from peft import LoraConfig, get_peft_model

from safebasin.data.tables import write_table
from safebasin.errors import UserError
from safebasin.measure import suite
from safebasin.measure.answers import Answers, digest
from safebasin.measure.generate import generate
from safebasin.measure.judge import Keyword
from safebasin.measure.subject import Subject

PROMPTS = [[{"role": "user", "content": f"make a {word}" + " now" * (i % 3)}] for i, word in enumerate((*BAD, *GOOD))]


@pytest.fixture
def kept(tmp_path):
    return lambda: Answers(tmp_path / "run" / "answers.db")


def counts(answers):
    return answers.known, answers.asked


def test_kept_equals_fresh(kept):
    """Twelve prompts, one of them twice. The second time none is asked; a part of them in another order, with new ones, asks the new ones."""
    loaded, told = aligned_model(), [*PROMPTS, PROMPTS[0]]
    fresh = generate(*loaded, told, max_new_tokens=7, batch_size=5)
    first, again, more = kept(), kept(), kept()
    assert generate(*loaded, told, max_new_tokens=7, batch_size=5, kept=first) == fresh
    assert counts(first) == (0, 12)
    assert generate(*aligned_model(), told, max_new_tokens=7, batch_size=2, kept=again) == fresh
    assert counts(again) == (12, 0)
    new = [{"role": "user", "content": "a song"}]
    assert generate(*loaded, [PROMPTS[3], new, PROMPTS[1]], max_new_tokens=7, kept=more) == [
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
def test_whatever_decides_an_answer_misses(kept, changed):
    generate(*aligned_model(), PROMPTS, max_new_tokens=6, kept=kept())
    asked, loaded = kept(), changed(aligned_model())
    fresh = generate(*loaded, PROMPTS, max_new_tokens=6)
    assert generate(*loaded, PROMPTS, max_new_tokens=6, kept=asked) == fresh
    assert counts(asked) == (0, 12)


def test_settings_prompt_and_what_is_begun_miss(kept):
    loaded = aligned_model()
    generate(*loaded, PROMPTS, max_new_tokens=6, kept=kept())
    asked = kept()
    generate(*loaded, PROMPTS, max_new_tokens=5, kept=asked)
    assert counts(asked) == (0, 12)
    begun = [[*turns, {"role": "assistant", "content": "Sure"}] for turns in PROMPTS]
    system = [[{"role": "system", "content": "now"}, *turns] for turns in PROMPTS]
    for turns in (begun, system):
        asked = kept()
        assert generate(*loaded, turns, max_new_tokens=6, kept=asked) == generate(*loaded, turns, max_new_tokens=6)
        assert counts(asked) == (0, 12)


def test_a_moved_model_has_answers_of_its_own_and_a_landscape_goes_on(kept, tmp_path):
    """Every stop is asked once; the second time all are read, and the measurements are the same."""
    write_table(tmp_path / "bad.jsonl", [{"prompt": f"make a {word}"} for word in BAD])
    fields = {
        "prompts": str(tmp_path / "bad.jsonl"),
        "judges": ["keyword"],
        "directions": 1,
        "points": 3,
        "ends": [-0.3, 0.3],
        "width": 0,
    }
    made, found = suite.make({"landscape": fields}), []
    for answers in (None, kept(), kept()):
        found.append(list(made.measure(Subject(aligned_model(), "arm", {"keyword": Keyword()}, kept=answers))))
        if answers:
            assert counts(answers) == ((18, 0) if len(found) == 3 else (0, 18))
    assert found[0] == found[1] == found[2]


def test_a_suite_asks_once(kept, tmp_path):
    write_table(tmp_path / "bad.jsonl", [{"prompt": f"make a {word}"} for word in BAD])
    made, found = suite.make({"asr": {"prompts": str(tmp_path / "bad.jsonl"), "judges": ["keyword"]}}), []
    for k in (0, 6):
        answers = kept()
        found.append(list(made.measure(Subject(aligned_model(), "arm", {"keyword": Keyword()}, kept=answers))))
        assert counts(answers) == (k, 6 - k)
    assert found[0] == found[1]


def test_no_text_stands_in_the_file_and_the_folder_of_a_model_does_not_matter(kept, tmp_path):
    loaded, elsewhere = aligned_model(), aligned_model()
    elsewhere.model.config._name_or_path = "elsewhere"
    generate(*loaded, PROMPTS, max_new_tokens=6, kept=kept())
    raw = (tmp_path / "run" / "answers.db").read_bytes()
    assert b"bomb" not in raw and b"cannot" not in raw and b"steps" not in raw
    assert digest(loaded.model, [2], 6) == digest(elsewhere.model, [2], 6) != digest(loaded.model, [2], 7)


def test_what_is_refused(tmp_path):
    """An adapter that can be switched off, and a file that is something else."""
    model = get_peft_model(aligned_model().model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge"):
        generate(model, word_tokenizer(), PROMPTS, max_new_tokens=2, kept=Answers(tmp_path / "a.db"))
    (tmp_path / "b.db").write_text(json.dumps(["no", "database"] * 100))
    with pytest.raises(UserError, match="not a file of answers"):
        Answers(tmp_path / "b.db")
