"""How long a customer's files and the folders of runs stay."""

import shutil
import time

from sqlmodel import col, func, select

from safebasin.service.files import Storage
from safebasin.service.policy import Settings
from safebasin.service.store import LIVE, OVER, File, Job, Store


def sweep(store: Store, storage: Storage, settings: Settings, owner: str) -> None:
    """Remove files and run folders that are older than the policy keeps them and that no job waits for.

    ``owner``: the server whose run folders they are.
    """
    with store.session() as session:
        used = select(Job.training_file).where(col(Job.phase).in_(LIVE))
        held_out = select(func.coalesce(Job.validation_file, "")).where(col(Job.phase).in_(LIVE))
        before = time.time() - 86400 * settings.policy.limits.files_days
        old = select(File).where(File.created < before, col(File.id).not_in(used), col(File.id).not_in(held_out))
        for file in session.exec(old).all():
            storage.remove(storage.path(file.tenant, file.id))
            session.delete(file)
        over = select(Job.id).where(col(Job.owner) == owner, col(Job.phase).in_(OVER), col(Job.finished) < before)
        folders = [settings.job_folder(name) for name in session.exec(over).all()]
    for folder in folders:  # the rows and the run; the model and the table's lines stay
        shutil.rmtree(folder, ignore_errors=True)
