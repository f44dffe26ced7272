"""The model of a job that passed: its adapter in storage, and a model for the serving endpoint, which is the adapter
as it is, or merged into its base by a process that has torch."""

import shutil
import subprocess
import sys
from pathlib import Path

from safebasin.errors import UserError
from safebasin.service.executor import environment
from safebasin.service.files import Storage
from safebasin.service.policy import Policy, Settings
from safebasin.service.store import Job


def deliver(job: Job, arm: str, storage: Storage, settings: Settings) -> str:
    """Put the adapter of an arm into storage, and a model where the serving endpoint finds it; what that calls it.

    Raises:
        UserError: the merge failed.
        OSError: a folder that cannot be read or written.
    """
    run, name = settings.job_folder(job.id) / "run", job.id.removeprefix("ftjob-")
    storage.put_folder(storage.path(job.tenant, f"models/{name}"), run / "arms" / arm / "adapter")
    if settings.policy.serving is None:
        return name
    target = settings.folder / "models" / name
    _serve(run, arm, target, settings.policy)
    return str(target) if settings.policy.serving.name == "path" else name


def _serve(run: Path, arm: str, target: Path, policy: Policy) -> None:
    """Put a model where the serving endpoint finds it, complete or not at all."""
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
