"""A model for the serving endpoint: the adapter as it is, or merged into its base by a process that has torch."""

import shutil
import subprocess
import sys
from pathlib import Path

from safebasin.errors import UserError
from safebasin.pipeline.config import Model
from safebasin.service.executor import environment
from safebasin.service.policy import Settings

_MERGE = """
import sys
from safebasin.models.load import load
name, dtype, adapter, target = sys.argv[1:]
model, tokenizer = load(name, dtype=dtype, adapter=adapter)
model.save_pretrained(target)
tokenizer.save_pretrained(target)
"""


def merged(model: Model, adapter: Path, target: Path, *, merge: bool, settings: Settings) -> None:
    """Put a model where the serving endpoint finds it, whole or not at all.

    Raises:
        UserError: the merge failed.
    """
    if target.is_dir():
        return
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    if merge:
        words = [sys.executable, "-c", _MERGE, model.name, model.dtype, str(adapter), str(part)]
        names = environment(settings.policy.child.environment)
        done = subprocess.run(words, env=names, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the adapter could not be merged: {done.stderr.strip().splitlines()[-1:]}")
    else:
        shutil.copytree(adapter, part)
    part.rename(target)
