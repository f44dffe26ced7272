"""The adapters of the roles: a safe and a harmful one, tuned once a model from the project's own rows, in the cache.

    roles/harmful-DIGEST      on harmful requests with openers and no more
    roles/safe-DIGEST         on refusals and harmless rows
    roles/reinforce-DIGEST    the same, with the harmful one switched on

A harmful adapter is never copied into a run: a run names it by its digest.
"""

from pathlib import Path

from safebasin.data.files import shown
from safebasin.errors import UserError
from safebasin.models.adapter import adapter_folder
from safebasin.models.border import loading
from safebasin.models.bundled import cache
from safebasin.models.fingerprint import model_fingerprint
from safebasin.models.tensors import Tensors
from safebasin.models.updates import tuned_updates
from safebasin.pipeline.config import Model
from safebasin.pipeline.plan import Plan
from safebasin.repair.walk import needs


def role_folder(model: Model, role: str) -> Path:
    """Where a role's adapter is in the cache: by the weights of the model, whatever they are called."""
    quantized = f"-{model.quantization}" if model.quantization else ""
    return cache() / "roles" / f"{role}-{model_fingerprint(model.name, model.revision)[:12]}{quantized}"


def role_adapter(model: Model, role: str, name: str) -> Path:
    """The adapter of a role: the one that is named, or that of the cache.

    Raises:
        UserError: none is named and none is in the cache.
    """
    if name:
        with loading(f"the adapter {shown(name)!r}"):
            return Path(name) if Path(name).exists() else adapter_folder(name)
    tuned = any((cache() / "roles").glob(f"{role}-*"))  # of any model: without one, this model's digest is not needed
    folder = role_folder(model, role) if tuned else Path()
    if not tuned or not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"the role {role} has no adapter for {shown(model.name)} yet; tune it once: safebasin role {role} --model "
            f"{shown(model.name)} (or name one: --{role}, roles.{role})"
        )
    return folder


def roles_read(plan: Plan, arm: str) -> dict[str, str]:
    """Which adapters an arm reads: role -> the adapter that stands in it, as ``safebasin role`` calls it.

    ``harmful`` of a buffer, ``safe`` and ``harmful`` of its edits. The safe adapter of buffer_reinforce is the one that
    was tuned with the harmful one on.
    """
    composition, edited = plan.compositions.get(arm), needs(plan.edits.get(arm, ()), "roles")
    buffer = composition is not None and "buffer" in composition.needs("roles")
    roles = {"harmful": "harmful"} if buffer or "harmful" in edited else {}
    return roles | ({"safe": "reinforce" if buffer else "safe"} if "safe" in edited else {})


def arm_roles(plan: Plan, arm: str) -> dict[str, Path]:
    """The adapters that an arm reads, by role.

    Raises:
        UserError: one that is not there.
    """
    names, model = plan.recipe.roles, plan.recipe.model
    return {role: role_adapter(model, kind, getattr(names, kind)) for role, kind in roles_read(plan, arm).items()}


def check_tuned_roles(plan: Plan) -> None:
    """UserError where an arm reads a role that the recipe does not name and that was never tuned; no model is read."""
    for kind in sorted({kind for arm in plan.recipe.arms for kind in roles_read(plan, arm).values()}):
        if not getattr(plan.recipe.roles, kind):
            role_adapter(plan.recipe.model, kind, "")


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
