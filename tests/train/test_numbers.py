"""What methods measure of themselves goes to the trackers and into the record of a run."""

import math

import pytest
from away import adapted
from tiny import PAD, random_rows
from transformers import TrainerCallback

from safebasin.train.compose import Composition
from safebasin.train.settings import training_arguments
from safebasin.train.trainer import OracleTrainer, streams_of


def test_safegrad_logs_ratio_and_conflicts(tmp_path):
    logs: list[dict] = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs_=None, **kwargs):
            logs.append(kwargs["logs"])

    settings = {"max_steps": 4, "learning_rate": 0.05, "per_device_train_batch_size": 2, "logging_steps": 2}
    args = training_arguments({**settings, "save_strategy": "steps", "save_steps": 2}, tmp_path)
    streams = streams_of({"task": random_rows(8, 1), "align": random_rows(4, 2)}, args, PAD)
    host = OracleTrainer(adapted(), args, Composition.of([{"safegrad": {"align": "sft"}}]), streams)
    host.add_callback(Tracker())
    host.train()
    ratios, conflicts = host.numbers["safegrad.ratio"], host.numbers["safegrad.conflict"]
    assert [step for step, _ in ratios] == [0, 1, 2, 3] and all(x > 0 and math.isfinite(x) for _, x in ratios)
    assert {x for _, x in conflicts} <= {0.0, 1.0}
    means = [log["safegrad.ratio"] for log in logs if "loss" in log]
    assert means == pytest.approx([(ratios[i][1] + ratios[i + 1][1]) / 2 for i in (0, 2)])
    resumed = OracleTrainer(adapted(), args, Composition.of([{"safegrad": {"align": "sft"}}]), streams)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.numbers == host.numbers
