"""A model for the serving endpoint: the adapter as it is, or merged into its base by a process that has torch."""

import shutil
import subprocess
import sys
from pathlib import Path

from safebasin.errors import UserError
from safebasin.service.executor import environment
from safebasin.service.policy import Policy


def deliver(run: Path, arm: str, target: Path, policy: Policy) -> None:
    """Put a model where the serving endpoint finds it, complete or not at all.

    Raises:
        UserError: the merge failed.
    """
    if target.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if policy.serving is not None and policy.serving.merge:
        words = [sys.executable, "-m", "safebasin", "export", str(run), "--arm", arm, "--to", str(target), "--merge"]
        names = environment(policy.child.environment)
        done = subprocess.run(words, env=names, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the adapter could not be merged: {''.join(done.stderr.strip().splitlines()[-1:])}")
        return
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(run / "arms" / arm / "adapter", part)
    part.rename(target)
