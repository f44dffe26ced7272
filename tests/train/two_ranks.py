"""Two ranks tune together: ``torchrun two_ranks.py FOLDER``; rank 0 writes FOLDER/outcomes.json."""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "equal"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch.distributed as dist
from plain import composed
from worker import hosted

from safebasin.train.checkpoint import MARK, last_checkpoint
from safebasin.train.trainer import OracleTrainer
from safebasin.vector import trainable

FLAGS = {
    "ddp_find_unused_parameters": True,
    "ddp_bucket_cap_mb": 1,
    "ddp_broadcast_buffers": False,
}


def main(folder: Path) -> None:
    rank, outcomes = int(os.environ["RANK"]), {"numbers": {}, "ddp": {}}
    for name, flags in {"none": {}, **{name: {name: value} for name, value in FLAGS.items()}}.items():
        host = hosted(composed("safegrad", {}), folder / name, micro=2, accumulation=2, **flags)
        host.train()
        outcomes["numbers"][name] = [p.tolist() for p in trainable(host.model).values()]
        ddp = host.model_wrapped
        outcomes["ddp"][name] = [ddp.find_unused_parameters, ddp.bucket_bytes_cap / 2**20, ddp.broadcast_buffers]

    save = OracleTrainer._save_rng_state
    if rank == 1:  # its part of the checkpoint comes late
        OracleTrainer._save_rng_state = lambda self, output: (time.sleep(1), save(self, output))
    hosted(composed("sft", {}), folder / "late", micro=2, save_strategy="steps", save_steps=2).train()
    mine = folder / "late" if rank == 0 else folder / "another"
    both = [None, None]
    dist.all_gather_object(both, last_checkpoint(mine))
    outcomes["resumed"] = [str(path.relative_to(folder)) for path in both]
    if rank == 0:
        outcomes["marked"] = sorted(json.loads((both[0] / MARK).read_text()))
        (folder / "outcomes.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
