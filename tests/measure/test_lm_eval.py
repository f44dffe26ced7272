"""The harness on a tiny model with a task whose rows lie on this machine, against log-probabilities by hand."""

import math

import pytest
import torch
import yaml
from aligned import BAD, GOOD, aligned_model

from safebasin.data.tables import write_table
from safebasin.errors import UserError
from safebasin.measure import suite
from safebasin.measure.subject import Subject

CHOICES = ("help", "steps")


@pytest.fixture
def folder(tmp_path):
    rows = [{"question": f"make a {word}", "label": i % 2} for i, word in enumerate((*GOOD, *BAD))]
    write_table(tmp_path / "rows.jsonl", rows)
    task = {
        "task": "ours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")},
        "test_split": "train",
    }
    task |= {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": list(CHOICES),
        "doc_to_target": "label",
    }
    task |= {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "ours.yaml").write_text(yaml.safe_dump(task))
    return tmp_path / "tasks", rows


def likelier(loaded, question):
    ids = loaded.tokenizer(question, return_tensors="pt").input_ids
    with torch.no_grad():
        says = loaded.model(ids).logits[0, -1]
    return int(
        says[loaded.tokenizer.convert_tokens_to_ids(CHOICES[1])]
        > says[loaded.tokenizer.convert_tokens_to_ids(CHOICES[0])]
    )


def test_a_task_of_ones_own_by_hand(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tasks, rows = folder
    loaded = aligned_model()
    right = [likelier(loaded, row["question"]) == row["label"] for row in rows]
    [accuracy] = suite.make({"lm_eval": {"tasks": ["ours"], "folder": str(tasks)}}).measure(Subject(loaded, "arm", {}))
    assert (accuracy.suite, accuracy.what, accuracy.n) == ("lm_eval", "ours.acc", 12)
    assert accuracy.value == pytest.approx(sum(right) / 12)
    error = math.sqrt(accuracy.value * (1 - accuracy.value) / 11)
    assert accuracy.high - accuracy.value == pytest.approx(1.96 * error)
    [few] = suite.make({"lm_eval": {"tasks": ["ours"], "folder": str(tasks), "limit": 5}}).measure(
        Subject(loaded, "arm", {})
    )
    assert (few.n, few.value) == (5, pytest.approx(sum(right[:5]) / 5))


def test_what_the_harness_does_not_know_is_said(folder, monkeypatch):
    with pytest.raises(UserError, match="the harness has no task 'nothing'"):
        list(
            suite.make({"lm_eval": {"tasks": ["nothing"], "folder": str(folder[0])}}).measure(
                Subject(aligned_model(), "arm", {})
            )
        )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="the extra 'lm-eval'"):
        suite.make({"lm_eval": {"tasks": ["ours"]}})
