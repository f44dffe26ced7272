"""Two ranks: DDP's settings arrive, a mark waits for every rank, and all resume from the same checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from two_ranks import FLAGS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(Path(__file__).with_name("two_ranks.py")), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "outcomes.json").read_text())


@pytest.mark.parametrize("name", FLAGS)
def test_settings_of_ddp_arrive_and_change_no_number(name, outcomes):
    assert outcomes["ddp"][name] != outcomes["ddp"]["none"]
    assert outcomes["numbers"][name] == outcomes["numbers"]["none"]


def test_a_checkpoint_is_marked_when_every_rank_has_written_its_part(outcomes):
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "method_state.safetensors"} <= set(outcomes["marked"])


def test_every_rank_resumes_from_what_the_first_one_finds(outcomes):
    """The second one looked into a folder without checkpoints."""
    assert outcomes["resumed"] == ["late/checkpoint-4"] * 2
