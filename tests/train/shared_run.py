"""A run that processes share: ``torchrun shared_run.py RECIPE FOLDER`` runs a recipe by DDP, and again by FSDP2."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "equal"))

from worker import LAYERS, shard_on_cpu

from safebasin.pipeline.parse import read
from safebasin.pipeline.run import Run
from safebasin.runtime import processes

if __name__ == "__main__":
    recipe, folder = map(Path, sys.argv[1:])
    with Run(read(recipe), folder / "ddp") as run:
        report = run.report()
    assert (report is not None) == processes().is_main_process
    shard_on_cpu()
    sharded = ["train.fsdp=true", f"train.fsdp_config={json.dumps(LAYERS)}"]
    with Run(read(recipe, sharded), folder / "fsdp2") as run:
        run.ensure("defended")
    processes().destroy_process_group()
