"""A run that processes share: ``torchrun shared_run.py RECIPE FOLDER`` runs a recipe by DDP, and again by FSDP2."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "equal"))

from worker import LAYERS, shard_on_cpu

from safebasin.pipeline.config import read
from safebasin.pipeline.old import Pipeline
from safebasin.runtime import processes

if __name__ == "__main__":
    recipe, folder = map(Path, sys.argv[1:])
    report = Pipeline(read(recipe), folder / "ddp").run()
    assert (report is not None) == processes().is_main_process
    shard_on_cpu()
    changes = ["train.fsdp=true", f"train.fsdp_config={json.dumps(LAYERS)}"]
    sharded = Pipeline(read(recipe, changes), folder / "fsdp2")
    sharded.prepare()
    sharded.scan()
    sharded.train("defended")
    processes().destroy_process_group()
