"""The adapters of the roles: a safe and a harmful one, tuned once a model from the project's own rows, in the cache.

    roles/harmful-DIGEST      on harmful requests with openers and no more
    roles/safe-DIGEST         on refusals and harmless rows
    roles/reinforce-DIGEST    the same, with the harmful one switched on

A harmful adapter is never copied into a run: a run names it by its digest.
"""

from pathlib import Path

from safebasin.data.tables import shown
from safebasin.errors import UserError
from safebasin.models.adapter import adapter_folder
from safebasin.models.bundled import cache
from safebasin.models.fingerprint import model_fingerprint
from safebasin.models.lora import Tensors, tuned_updates
from safebasin.pipeline.config import Model
from safebasin.pipeline.plan import Plan
from safebasin.repair.walk import needs


def role_folder(model: Model, role: str) -> Path:
    """Where a role's adapter is in the cache: by the weights of the model, whatever they are called."""
    quantized = f"-{model.quantization}" if model.quantization else ""
    return cache() / "roles" / f"{role}-{model_fingerprint(model.name)[:12]}{quantized}"


def role_adapter(model: Model, role: str, name: str) -> Path:
    """The adapter of a role: the one that is named, or that of the cache.

    Raises:
        UserError: none is named and none is in the cache.
    """
    if name:
        return Path(name) if Path(name).exists() else adapter_folder(name)
    folder = role_folder(model, role)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"the role {role} has no adapter for {shown(model.name)} yet; tune it once: safebasin role {role} --model "
            f"{shown(model.name)} (or name one: --{role}, roles.{role})"
        )
    return folder


def arm_roles(plan: Plan, arm: str) -> dict[str, Path]:
    """The adapters that an arm reads, by role: ``harmful`` of a buffer, ``safe`` and ``harmful`` of its edits.

    The safe adapter of buffer_reinforce is the one that was tuned with the harmful one on.

    Raises:
        UserError: one that is not there.
    """
    names, model, composition = plan.recipe.roles, plan.recipe.model, plan.compositions.get(arm)
    buffer = composition is not None and "buffer" in composition.needs("roles")
    roles = {"harmful": role_adapter(model, "harmful", names.harmful)} if buffer else {}
    for role in needs(plan.edits.get(arm, ()), "roles"):
        if role in ("safe", "harmful"):
            kind = "reinforce" if buffer and role == "safe" else role
            roles[role] = role_adapter(model, kind, getattr(names, kind))
    return roles


def check_roles(plan: Plan) -> None:
    """UserError where an arm reads a role that is not there, or is of another model: before anything is tuned."""
    adapters = {path for arm in plan.recipe.arms for path in arm_roles(plan, arm).values()}
    based = any("base" in needs(edits, "roles") for edits in plan.edits.values())
    start = Tensors(plan.recipe.model.name) if adapters or based else None
    if based:
        Tensors(plan.recipe.roles.base)
    for path in sorted(adapters):
        assert start is not None
        tuned_updates(path, start)
