"""A run that processes share: ``torchrun shared_run.py recipe.yaml folder`` runs the recipe as it is (DDP), and again sharded (FSDP2)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "equal"))

from worker import LAYERS, shard_on_cpu

from safebasin.pipeline.config import read
from safebasin.pipeline.run import Run
from safebasin.runtime import processes

if __name__ == "__main__":
    recipe, folder = map(Path, sys.argv[1:])
    with Run(read(recipe), folder / "ddp") as run:
        report = run.report()
    assert (report is not None) == processes().is_main_process
    shard_on_cpu()
    layers = ",".join(LAYERS["transformer_layer_cls_to_wrap"])
    wrap = f'train.fsdp_config={{"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["{layers}"]}}'
    with Run(read(recipe, ["train.fsdp=true", wrap]), folder / "fsdp2") as run:
        run.ensure("defended")
    processes().destroy_process_group()
