"""The step that tunes one arm: arms/ARM/adapter or arms/ARM/model, with train.json and problems.json beside it.

It goes on from its last complete checkpoint."""

import contextlib
import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from safebasin.console import progress
from safebasin.data.example import Example
from safebasin.data.files import write_json
from safebasin.events import emit
from safebasin.layer import Update
from safebasin.models.adapter import all_weights, every_weight, fresh_adapter
from safebasin.models.load import ModelAndTokenizer
from safebasin.models.parts import context_length
from safebasin.models.tensors import Tensors
from safebasin.models.updates import PREFIX, AdapterUpdates, switched_on
from safebasin.models.write import write_lora
from safebasin.pipeline.fingerprint import fingerprint
from safebasin.pipeline.folder import CARD, PROBLEMS, RunFolder, files_of
from safebasin.pipeline.parse import plain
from safebasin.pipeline.plan import Plan
from safebasin.pipeline.read import encoded_rows, encoded_set, load_start
from safebasin.pipeline.roles import arm_roles
from safebasin.runtime import processes
from safebasin.scan.column import Column, column_from_file, keep_column, star_column
from safebasin.scan.scores import read_scores
from safebasin.train.checkpoint import REFERENCE, clear_checkpoints, last_checkpoint
from safebasin.train.ema import read_ema
from safebasin.train.reference import ReferenceCache, copied_reference, stored_reference
from safebasin.train.settings import training_arguments
from safebasin.train.stream import Stream
from safebasin.train.trainer import OracleTrainer, streams_of, total_steps
from safebasin.vector import gather_full, trainable


def write_adapter(plan: Plan, folder: RunFolder, arm: str, rows_file: Path, before: Path | None = None) -> Path:
    """The step ``train.ARM`` on the rows of a file. Processes share the rows of a step, and rank 0 writes. The adapter,
    or with full fine-tuning the model, is returned.

    Args:
        before: an adapter that the arm goes on from: it is on while its own is tuned, and both become one. Or a model,
            whose weights are tuned further.
    """
    recipe, composition = plan.recipe, plan.compositions[arm]
    target = folder.tuned(arm) if arm in plan.edits else folder.result(arm, full=recipe.full)
    buffer = "buffer" in composition.needs("roles")
    frozen = arm_roles(plan, arm)["harmful"] if buffer else before
    inputs = {
        "rows": rows_file,
        "model": recipe.model,
        "methods": composition.methods,
        "settings": {**recipe.train, **recipe.arms[arm].settings},
        "frozen": files_of(frozen) if frozen else None,
        "seed": recipe.seed,
        "max_length": recipe.data.max_length,
        "on_bad": recipe.data.on_bad,
        "streams": {stream: getattr(recipe.data, stream) for stream in composition.needs("streams")},
        "columns": recipe.arms[arm].columns,
        "scores": [folder.scores, folder.anchors] if plan.reads_scores(arm) else [],
        "scorers": plan.scorers if plan.reads_scores(arm) else {},
    }
    outputs = [target, folder.arm(arm) / "train.json", folder.arm(arm) / PROBLEMS]
    with folder.step(f"train.{arm}", inputs, outputs, shared=True) as work:
        if work:
            shutil.rmtree(folder.result(arm, full=not recipe.full), ignore_errors=True)  # of an earlier recipe
            # a step of more processes has more rows, so that its checkpoints are of another tuning
            key = fingerprint([work, processes().num_processes])[:12]
            _tune(plan, folder, arm, rows_file, folder.arm(arm) / "checkpoints" / key, frozen, target)
    if processes().is_main_process:  # the adapter is in the manifest: nothing goes on from a checkpoint any more
        clear_checkpoints(folder.arm(arm) / "checkpoints")
    return target


def _tune(
    plan: Plan, folder: RunFolder, arm: str, rows_file: Path, checkpoints: Path, frozen: Path | None, target: Path
) -> None:
    """Tune, and write the adapter. The folder of the checkpoints is named by all that goes into the tuning: those of
    another one go."""
    ranks, recipe, composition = processes(), plan.recipe, plan.compositions[arm]
    if ranks.is_main_process:
        for old in set(checkpoints.parent.glob("*/")) - {checkpoints}:
            shutil.rmtree(old)
    loaded = load_start(plan, dtype="float32" if recipe.full else "")  # in bfloat16 small steps are rounded away
    examples, rows, problems = encoded_rows(plan, rows_file, loaded, folder.tokens)
    columns = {name: arm_column(plan, folder, arm, name, examples) for name in composition.needs("columns")}
    rows = [
        dataclasses.replace(row, columns={name: column[row.id] for name, column in columns.items()}) for row in rows
    ]
    encoded: dict[str, Sequence[Any]] = {"task": rows}
    limit = min(recipe.data.max_length, context_length(loaded.model))
    for stream in composition.needs("streams"):
        format_rows = composition.align_rows if stream == "align" else list
        encoded[stream] = encoded_set(getattr(recipe.data, stream), loaded.tokenizer, limit, format_rows)
    args = training_arguments(plan.arguments(arm), checkpoints)
    streams = streams_of(encoded, args, loaded.tokenizer.pad_token_id, recipe.align_share)
    reference = None
    if recipe.full:
        model, reference = _full_model(plan, arm, loaded, streams, args, frozen)
    else:
        model = fresh_adapter(loaded.model, recipe.adapter, recipe.seed)
    checkpoint = last_checkpoint(checkpoints)
    start = Tensors(recipe.model.name) if not recipe.full and (frozen or recipe.train.get("ema")) else None
    before = AdapterUpdates(frozen, start) if frozen and start else None
    switch = switched_on(model, before, PREFIX) if before else contextlib.nullcontext()
    total = total_steps(args, streams)
    with switch, progress(f"{arm}: train", total) as advance:

        def show(loss: float) -> None:
            step = trainer.state.global_step
            emit("loss", arm=arm, step=step, total=total, loss=loss)
            advance(step, f"loss {loss:.3f}")

        ema = read_ema(recipe.train.get("ema"))
        trainer = OracleTrainer(model, args, composition, streams, advance=show, ema=ema, reference=reference)
        outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    weights = gather_full(every_weight(model) if recipe.full else trainable(model))  # every process gathers
    if not ranks.is_main_process:
        return
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part, state_dict=weights)
    if recipe.full:
        loaded.tokenizer.save_pretrained(part)
    (part / CARD).unlink(missing_ok=True)  # PEFT's empty card; ours is written with the report
    facts = {"steps": outcome.global_step, "seconds": outcome.metrics["train_runtime"], "loss": trainer.curve}
    facts |= {"numbers": trainer.numbers, "padded": trainer.padded}
    if start is not None:
        tuned = AdapterUpdates(part, start)
        updates: dict[str, Update] = dict(tuned)
        if trainer.average is not None:
            facts["ema_lost"] = trainer.average.lost
            for module, update in trainer.average.updates().items():
                updates[module] = update * tuned.scale(module, tuned.rank(module))
        config = tuned.config
        if before is not None and recipe.arms[arm].of:
            for module, update in before.items():
                updates[module] = update + updates[module] if module in updates else update
            config = {**config, "target_modules": list(updates)}
        write_lora(part, config, updates)
    part.rename(target)
    write_json(folder.arm(arm) / PROBLEMS, [bad._asdict() for bad in problems])
    write_json(folder.arm(arm) / "train.json", facts | {"methods": plain(recipe.arms[arm].train), "rows": len(rows)})


def _full_model(
    plan: Plan,
    arm: str,
    loaded: ModelAndTokenizer,
    streams: Mapping[str, Stream],
    args: TrainingArguments,
    before: Path | None,
) -> tuple[Any, ReferenceCache | None]:
    """The model with all of its weights to be tuned; and the reference, if a method of the arm reads one: the model of
    the recipe, also where an arm goes on from another."""
    start, reference = loaded.model, None
    if "reference" in plan.compositions[arm].needs("roles"):
        if plan.recipe.train.get("reference") == "copy":
            reference = copied_reference(load_start(plan).model)
        else:
            rows = [row for stream in streams.values() for row in stream.rows]
            how: dict[str, Any] = {"size": args.per_device_train_batch_size, "bf16": args.bf16}
            folder = Path(str(args.output_dir)) / REFERENCE
            reference = stored_reference(start, rows, folder, loaded.tokenizer.pad_token_id, **how)
    return all_weights(load_start(plan, before).model if before else start), reference


def arm_column(plan: Plan, folder: RunFolder, arm: str, name: str, examples: Sequence[Example]) -> Column:
    """A column that the arm's methods read: from the scan, or from a file of the user's."""
    source = plan.recipe.arms[arm].columns[name]
    if source not in plan.scorers:
        return column_from_file(source, name, examples)
    scores = read_scores(folder.scores)
    if name == "keep":
        return keep_column(scores, source, examples)
    return star_column(scores, source, plan.scorers[source], examples)
