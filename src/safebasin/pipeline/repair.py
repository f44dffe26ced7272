"""Repair: the step that edits an arm's adapter (arms/ARM/adapter, arms/ARM/repair.json), and the same for anybody's
adapter or model."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safebasin.batch import by_length, collate
from safebasin.console import console
from safebasin.data.files import new_folder, shown, write_json
from safebasin.data.source import Source, check_file, open_examples
from safebasin.encode import encode_all
from safebasin.errors import UserError
from safebasin.layer import Pair, Update
from safebasin.models.load import ModelAndTokenizer, load
from safebasin.models.parts import context_length
from safebasin.models.tensors import Tensors, is_model
from safebasin.models.updates import AdapterUpdates, ModelUpdates, tuned_updates
from safebasin.models.write import write_lora, write_model
from safebasin.pipeline.config import Model
from safebasin.pipeline.folder import RunFolder, files_of
from safebasin.pipeline.parse import plain
from safebasin.pipeline.plan import Plan
from safebasin.pipeline.roles import arm_roles
from safebasin.repair.calibrate import Moments, SquaredGradients
from safebasin.repair.walk import SAME, Record, Roles, Walk, gives_dense, needs

CALIBRATION = {  # rows that edits read the inputs of layers on
    "probe": Source(path="builtin:refusals", take=100),
    "harmful": Source(path="builtin:opened", take=100),
}
BATCH = 8  # rows of a forward pass; squared gradients are of the means of such batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A repair: which model, tuned how, in which roles and by which edits.

    ``rows``: sets by the names of the streams; ``max_length``: tokens of a row. ``adapter`` is a folder or a Hub id of
    an adapter, or a full model that was tuned from ``model``.
    """

    model: Model
    adapter: str | Path
    edits: tuple[Any, ...]
    base: str = ""
    roles: Mapping[str, str | Path]
    rows: Mapping[str, Source]
    max_length: int = 1024

    def run(self, out: Path) -> dict[str, Any]:
        """Edit the update and write an adapter or a full model into ``out``; what was done is returned.

        Raises:
            UserError: a role or rows that are missing, an adapter or a model that cannot be edited; before any work.
            DefenceError: an edit that changed nothing.
        """
        for stream in needs(self.edits, "streams"):
            if stream not in self.rows:
                raise UserError(f"{_users(self.edits)} needs rows of the kind {stream}: --rows {stream}=FILE")
            check_file(self.rows[stream].path)
        start = Tensors(self.model.name)
        tuned = tuned_updates(self.adapter, start)
        walk = Walk(self.edits, self._roles(start, tuned))
        with new_folder(out) as part:
            facts = write_result(walk, tuned, part)
        return {"edits": [_spec(edit) for edit in self.edits], **facts}

    def _roles(self, start: Tensors, tuned: AdapterUpdates | ModelUpdates) -> Roles:
        needed, streams = needs(self.edits, "roles"), needs(self.edits, "streams")
        parts: dict[str, Any] = {}
        fits = gives_dense(self.edits) or any(edit.entry.truncates for edit in self.edits)
        if "base" in needed:
            if not self.base:
                raise UserError(
                    f"{_users(self.edits)} needs the role base: the model before its alignment (--base, or roles.base)"
                )
            base = Tensors(self.base)
            parts["base"] = Pair(base.folder, start.folder, tuned)
        for role in ("safe", "harmful"):
            if role in needed:
                parts[role] = tuned_updates(self.roles[role], start)
                if not fits and isinstance(parts[role], ModelUpdates) and isinstance(tuned, AdapterUpdates):
                    raise UserError(
                        f"the role {role} is a full model and the tuned one is an adapter, and so must be the role; "
                        f"name an adapter: --{role}, roles.{role}"
                    )
                if all(name in parts[role] and _same(parts[role][name], tuned[name]) for name in tuned):
                    raise UserError(f"the role {role} holds the update of the tuned model itself; name another adapter")
        shapes = {name: start.shape(f"{name}.weight") for name in tuned}
        two = {name: (shape[0], shape[1]) for name, shape in shapes.items()}
        moments = {stream: Moments(self._rows(stream, "tuned" in needed), two) for stream in streams}
        gradients = (
            SquaredGradients(self._rows("probe", False), two) if "gradients" in needs(self.edits, "reads") else None
        )
        return Roles(tuned=tuned, moments=moments, gradients=gradients, **parts)

    def _rows(self, stream: str, on_tuned: bool) -> Callable[[], tuple[Any, list[Any]]]:
        """The model that rows are read by, and the rows in batches; both once, when they are asked for."""

        @functools.cache
        def source() -> tuple[Any, list[Any]]:
            if on_tuned not in self._models:
                self._models[on_tuned] = self._load(on_tuned)
            model, tokenizer = self._models[on_tuned]
            rows, bad = encode_all(
                tokenizer, open_examples(self.rows[stream]), min(self.max_length, context_length(model))
            )
            if not rows:
                raise UserError(f"{shown(self.rows[stream].path)}: no row can be used ({bad[0].reason})")
            return model, [collate([rows[i] for i in part], tokenizer.pad_token_id) for part in by_length(rows, BATCH)]

        return source

    @functools.cached_property
    def _models(self) -> dict[bool, ModelAndTokenizer]:
        """The start, and the tuned model, once they are loaded."""
        return {}

    def _load(self, on_tuned: bool) -> ModelAndTokenizer:
        how = self.model.loading
        if on_tuned and is_model(self.adapter):
            return load(str(self.adapter), **how | {"revision": None})
        return load(self.model.name, adapter=self.adapter if on_tuned else None, **how)


def write_result(walk: Walk, tuned: AdapterUpdates | ModelUpdates, out: Path) -> dict[str, Any]:
    """The result of a walk, as an adapter where it is in low rank and as a full model where it is not."""
    records: dict[str, Record] = {}

    def result(module: str) -> Any:
        if module not in modules:
            return None
        update, records[module] = walk.result(module)
        return update

    modules, vanished, start = set(tuned), 0, tuned.start
    dense = isinstance(tuned, ModelUpdates) or gives_dense(walk.edits)
    if dense:
        assert isinstance(start, Tensors)
        vanished = write_model(out, tuned.tensors if isinstance(tuned, ModelUpdates) else start, start, result)
    else:
        assert isinstance(tuned, AdapterUpdates)
        write_lora(out, tuned.config, {module: result(module) for module in tuned})
    walk.check_changed()
    rows = [records[module] for module in tuned]
    size = sum(row.norm**2 for row in rows)
    facts = {
        "form": "model" if dense else "adapter",
        "modules": len(rows),
        "selected": sum(bool(row.selected) for row in rows),
        "skipped": list(walk.skipped),  # dW = 0: nothing is added to a module that was not tuned
        "untouched": list(tuned.others) if isinstance(tuned, ModelUpdates) else [],  # tuned, and no edit's
        "distance": (sum((row.norm * row.distance) ** 2 for row in rows) / size) ** 0.5,
        "norm_left": (sum(row.norm_after**2 for row in rows) / size) ** 0.5,
        "rank": max((row.rank_out for row in rows if row.rank_out is not None), default=None) if not dense else None,
        "energy": sum(row.energy * row.norm_after**2 for row in rows) / (sum(row.norm_after**2 for row in rows) or 1),
        "vanished": vanished,  # entries that the weights' type cannot hold
    }
    facts["is_start"] = facts["norm_left"] == 0
    return {"summary": facts, "rows": [dataclasses.asdict(row) for row in rows]}


def words(report: Mapping[str, Any]) -> str:
    """One line on what a repair did."""
    facts, rows = report["summary"], report["rows"]
    cosines = [row["cosine"] for row in rows if row["cosine"] is not None]
    parts = [
        f"{facts['selected']} of {facts['modules']} modules edited",
        f"moved by {facts['distance']:.1%} of the update's length, {facts['norm_left']:.1%} of it left",
        f"rank {facts['rank']}" if facts["rank"] else "full weights",
        *([f"energy {facts['energy']:.1%}"] if facts["energy"] < 0.9999 else []),
        *([f"median cosine {statistics.median(cosines):.3f}"] if cosines else []),
        *([f"{len(facts['skipped'])} modules without an update left out"] if facts["skipped"] else []),
        *(
            [f"{len(facts['untouched'])} tuned tensors outside of the blocks left as tuned"]
            if facts["untouched"]
            else []
        ),
        *([f"{facts['vanished']} entries too small for the weights' type"] if facts["vanished"] else []),
        *(["the result is the model that tuning started from"] if facts["is_start"] else []),
    ]
    return "; ".join(parts)


def _users(edits: Sequence[Any]) -> str:
    return " and ".join(edit.entry.name for edit in edits)


def _same(one: Update, other: Update) -> bool:
    return one.shape == other.shape and (one - other).norm() <= SAME * other.norm()


def _spec(edit: Any) -> dict[str, Any]:
    return {edit.entry.name: plain(edit)}


# --- in a run ---------------------------------------------------------------------------------------------------------


def job(plan: Plan, arm: str, source: Path) -> Job:
    """The repair of an arm."""
    recipe = plan.recipe
    sets = {name: getattr(recipe.data, name) for name in ("probe", "harmful", "task")}
    return Job(
        model=recipe.model,
        adapter=source,
        edits=plan.edits[arm],
        base=recipe.roles.base,
        roles=arm_roles(plan, arm),
        rows=sets,
        max_length=recipe.data.max_length,
    )


def write_repaired(plan: Plan, folder: RunFolder, arm: str, source: Path) -> Path:
    """The step ``repair.ARM``: the adapter or model of ``source``, edited. Rank 0 works; the new one is returned."""
    work, report = job(plan, arm, source), folder.arm(arm) / "repair.json"
    target = folder.result(arm, full=is_model(source))
    edits, streams = work.edits, needs(work.edits, "streams") + ("probe",) * ("gradients" in needs(work.edits, "reads"))
    inputs = {
        "adapter": files_of(source),
        "model": work.model,
        "edits": edits,
        "base": work.base if "base" in needs(edits, "roles") else None,
        "roles": {role: path for role, path in work.roles.items() if role in needs(edits, "roles")},
        "rows": {stream: work.rows[stream] for stream in streams},
        "max_length": work.max_length,
    }
    with folder.step(f"repair.{arm}", inputs, [target, report]) as todo:
        if todo:
            done = work.run(target)
            write_json(report, {"of": plan.recipe.arms[arm].of or arm, **done})
            console.print(f"  {arm}: {words(done)}", markup=False)
    return target
