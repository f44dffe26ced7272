"""Every way to run a step equals the plain loop, to 1e-5 of the length of the whole update."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny import LORA, tiny_model

sys.path.insert(0, str(Path(__file__).parent))
from plain import loop
from worker import STEPS, tune

from safebasin.model import fresh_adapter
from safebasin.vector import trainable


def error(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Distance over the length of the update from the start."""
    start = trainable(fresh_adapter(tiny_model(), LORA, seed=0))
    assert found.keys() == truth.keys() == start.keys()
    off = sum(float((found[name] - truth[name]).square().sum()) for name in truth)
    way = sum(float((truth[name] - start[name]).square().sum()) for name in truth)
    assert way > 0.1
    return (off / way) ** 0.5


@pytest.mark.parametrize("rule", ["sft", "safegrad"])
@pytest.mark.parametrize(("micro", "accumulation"), [(8, 1), (2, 4), (1, 8)])
def test_accumulation_equals_the_plain_loop(rule, micro, accumulation, tmp_path):
    assert error(tune([rule], tmp_path, micro=micro, accumulation=accumulation), loop(rule, STEPS)) < 1e-5


@pytest.mark.parametrize("rule", ["sft", "safegrad"])
def test_two_ranks_equal_the_plain_loop(rule, tmp_path):
    out = tmp_path / "found.safetensors"
    for writer in (0, 1):  # both replicas are the truth, not only the first
        asked = {"methods": [rule], "folder": str(tmp_path), "micro": 2, "accumulation": 2, "out": str(out), "writer": writer}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run(
            [*command, str(Path(__file__).parent / "worker.py"), json.dumps(asked)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert error(safetensors.torch.load_file(out), loop(rule, STEPS)) < 1e-5


@pytest.mark.parametrize("rule", ["sft", "safegrad"])
def test_resume_in_mid_run_equals_the_plain_loop(rule, tmp_path):
    tune([rule], tmp_path, save_strategy="steps", save_steps=2)
    found = tune([rule], tmp_path / "again", resume=str(tmp_path / "checkpoint-2"))
    assert error(found, loop(rule, STEPS)) < 1e-5


def test_the_usual_subclass_would_fail_this_test():
    """The test can fail: surgery after every micro-batch, as published trainers do it, is far from the definition."""
    truth, other = loop("safegrad", STEPS), loop("sft", STEPS)
    assert error(other, truth) > 0.05
