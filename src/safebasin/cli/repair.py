"""Verbs that edit what was tuned: repair, and role, which tunes the adapters that repairs read."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from safebasin.cli.options import Dtype, Model, refuse_processes, say, start_torch
from safebasin.errors import UserError
from safebasin.runtime import resolved


def repair_verb(
    *,
    model: Annotated[str, Parameter(help="What tuning started from: a folder, a Hub id or a built-in model.")],
    adapter: Annotated[str, Parameter(help="What was tuned: a LoRA adapter, or the folder of a full model.")],
    method: Annotated[
        tuple[str, ...], Parameter(help="An edit: shrink, or 'safe_merge: {w: 0.2}'. Several: from left to right.")
    ],
    out_: Annotated[Path, Parameter(name="--out", help="Folder for the adapter or the model, and repair.json.")],
    base: Annotated[str, Parameter(help="The model before its alignment, for edits that need it.")] = "",
    safe: Annotated[str, Parameter(help="A safe adapter; by default that of `safebasin role safe`.")] = "",
    harmful: Annotated[str, Parameter(help="A harmful adapter; by default that of `safebasin role harmful`.")] = "",
    rows: Annotated[tuple[str, ...], Parameter(help="KIND=SET: probe, harmful or task, for edits that need it.")] = (),
    dtype: Annotated[str, Parameter(help="Of the model, where an edit reads its layers' inputs.")] = "float32",
    trust_remote_code: Annotated[bool, Parameter(help="Run the code that a model brings.")] = False,
) -> int:
    """Bring a tuned model back towards its start: adapter in, adapter out; full weights in, full weights out.

    Nothing is measured: `safebasin measure --adapter DIR` does, and so does an arm of a recipe.
    """
    refuse_processes()
    start_torch()
    from safebasin.data.files import write_json
    from safebasin.data.source import Source
    from safebasin.pipeline import yaml12
    from safebasin.pipeline.config import Model
    from safebasin.pipeline.parse import validate
    from safebasin.pipeline.repair import CALIBRATION, Job, words
    from safebasin.pipeline.roles import role_adapter
    from safebasin.repair.walk import make_edits, needs

    specs: list[Any] = []
    for text in method:
        spec = yaml12.load(text, "--method")
        specs += spec if isinstance(spec, list) else [spec]
    edits = make_edits(specs)
    if out_.exists() and (not out_.is_dir() or (any(out_.iterdir()) and not (out_ / "repair.json").is_file())):
        raise UserError(f"{out_} is there and is no repair of before; name another folder: --out DIR")
    pairs = [item.partition("=") for item in rows]
    if wrong := [item for item, (kind, _, name) in zip(rows, pairs, strict=True) if kind not in KINDS or not name]:
        raise UserError(f"--rows {wrong[0]}: it takes KIND=SET, where KIND is one of {', '.join(KINDS)}")
    start = validate(Model, {"name": model, "dtype": dtype, "trust_remote_code": trust_remote_code}, "--model")
    names = {"safe": safe, "harmful": harmful}
    job = Job(
        model=start,
        adapter=adapter,
        edits=edits,
        base=base,
        roles={role: role_adapter(start, role, name) for role, name in names.items() if role in needs(edits, "roles")},
        rows={**CALIBRATION, **{kind: Source(path=name) for kind, _, name in pairs}},
    )
    report = job.run(out_)
    write_json(out_ / "repair.json", report)
    say(words(report))
    say(f"{report['summary']['form']}: {out_}")
    return 0


KINDS = ("probe", "harmful", "task")


def role_verb(
    role: Annotated[Literal["safe", "harmful", "reinforce"], Parameter(help="Which adapter.")],
    *,
    model: Model = "builtin:smollm2-aligned",
    rows: Annotated[str, Parameter(help="A set in place of the project's own rows.")] = "",
    steps: Annotated[int, Parameter(help="Optimizer steps of four rows.")] = 100,
    learning_rate: Annotated[float, Parameter(help="7e-4 for a model of 135M; 2e-4 is usual at 7B.")] = 7e-4,
    rank: Annotated[int, Parameter(help="Of the adapter.")] = 8,
    dtype: Dtype = "auto",
) -> int:
    """Tune the adapter of a role, once a model.

    `harmful` is tuned on requests with openers and no more, `safe` on refusals and harmless rows, `reinforce` as safe
    with the harmful one switched on. It stays in the cache; a harmful one is never copied into a run.
    """
    refuse_processes()
    start_torch()
    from safebasin.pipeline.config import Model
    from safebasin.pipeline.parse import validate
    from safebasin.pipeline.tune_role import tune_role

    train = {
        "adapter": {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"},
        "per_device_train_batch_size": 4,
        "max_steps": steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "bf16": resolved(dtype) == "bfloat16",
    }
    folder = tune_role(role, validate(Model, {"name": model, "dtype": dtype}, "--model"), train, rows)
    say(f"role {role} of {model}: {folder}")
    return 0
