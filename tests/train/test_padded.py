"""Where the rows of a stream run padded, training says so once, with the reason."""

import pytest
from tiny import LORA, PAD, random_rows, tiny_model

from safebasin.models.adapter import fresh_adapter
from safebasin.train.compose import Composition
from safebasin.train.settings import training_arguments
from safebasin.train.trainer import OracleTrainer, streams_of


@pytest.mark.parametrize(("dropout", "reason"), [(0.0, ""), (0.1, "dropout")])
def test_a_padded_stream_is_said_once(tmp_path, capsys, dropout, reason):
    """Two streams with one reason are one line; packed ones are none."""
    model = fresh_adapter(tiny_model(), LORA | {"lora_dropout": dropout}, seed=0)
    args = training_arguments({"max_steps": 3, "save_strategy": "no", "per_device_train_batch_size": 2}, tmp_path)
    streams = streams_of({"task": random_rows(8, 1), "align": random_rows(4, 2)}, args, PAD)
    host = OracleTrainer(model, args, Composition.of([{"safegrad": {"align": "sft"}}]), streams)
    host.train()
    notices = [line for line in capsys.readouterr().err.splitlines() if "padded" in line]
    assert len(notices) == len(set(host.padded.values())) == bool(reason)
    if reason:
        assert "task, align" in notices[0] and reason in notices[0] and set(host.padded) == {"task", "align"}
