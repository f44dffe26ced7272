"""The host is ``transformers.Trainer``: schedules, checkpoints, resume, trackers, mixed precision and sharding are its work.

One optimizer step is one ``training_step``: the loader that the Trainer sees only counts steps, the oracle gathers the micro-batches
of the step by itself, and the direction that the methods return becomes ``.grad``. Clipping and the optimizer come after, once.
"""

import dataclasses
import inspect
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from safebasin.encode import TokenizedRow
from safebasin.errors import DefenceError, UserError
from safebasin.models.adapter import starts_fresh
from safebasin.train.compose import Composition
from safebasin.train.oracle import TASK, Oracle
from safebasin.train.stream import Stream
from safebasin.vector import Vector, gather_full, trainable

FP16 = "fp16 is refused: small inner products vanish in it; set bf16: true, or leave both out for float32"
DEEPSPEED = (
    "DeepSpeed steps inside its own backward, and methods hand the optimizer a direction of their own; use DDP or FSDP2"
)
NOT_THE_START = "does not start fresh, so switching the adapter off is not the starting model"
METHOD_STATE = "method_state.safetensors"  # of a checkpoint: what methods carry from step to step, whole tensors by "name:parameter"; what was seen so far


def arguments(settings: Mapping[str, Any], folder: Path) -> TrainingArguments:
    """``TrainingArguments`` from the flat names of a recipe, passed through untouched; ours are the safe choices beneath them.

    Raises:
        UserError: an unknown name, or fp16.
    """
    known = set(inspect.signature(TrainingArguments).parameters)
    odd = sorted(set(settings) - known)
    if odd:
        raise UserError(
            f"train: unknown key {odd[0]!r}; it is neither ours nor a name of transformers.TrainingArguments"
        )
    if settings.get("fp16") or settings.get("fp16_full_eval"):
        raise UserError(FP16)
    ours: dict[str, Any] = {
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 10,
        "use_cpu": not torch.cuda.is_available(),
    }
    ours["ddp_find_unused_parameters"] = False  # the oracle refuses a parameter without a gradient anyway
    fixed = {
        "output_dir": str(folder),
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
    }
    try:
        made = TrainingArguments(**{**ours, **settings, **fixed})
    except (ValueError, TypeError, ImportError) as error:  # ImportError: DeepSpeed is asked for and not there
        raise UserError(f"train: {str(error).strip().splitlines()[0]}") from error
    if made.mixed_precision == "fp16":  # the launcher's word
        raise UserError(FP16)
    return made


class OracleTrainer(Trainer):
    """A Trainer whose gradient comes from methods through the oracle.

    Args:
        model: with its trainable parameters (a PEFT model, or full weights).
        args: gradient accumulation is read from here and done by the oracle.
        methods: the composition of the run.
        streams: "task" and what the methods ask for; see ``streams_of``.
        advance: called after every step with the loss, for a progress bar.

    Raises:
        UserError: a stream or a role that the methods need is missing, DeepSpeed, FSDP1.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        methods: Composition,
        streams: Mapping[str, Stream],
        *,
        advance: Callable[[float], None] | None = None,
    ):
        check(model, args, methods, streams)
        self.methods = methods
        self.streams = streams
        self.curve: list[tuple[int, float]] = []  # (step, loss of the task)
        self.method_state: dict[str, Vector] = {}
        self._alive: set[str] = set()  # streams that have had a gradient
        self._advance = advance
        self._loss = math.nan  # what the bar shows
        self._oracle: Oracle | None = None
        # The oracle accumulates: for the Trainer, a step is a step.
        args = dataclasses.replace(args, gradient_accumulation_steps=1)
        args._n_gpu = min(
            args.n_gpu, 1
        )  # one process, one device: the Trainer would split batches over all by nn.DataParallel
        super().__init__(model=model, args=args, train_dataset=range(streams["task"].steps), callbacks=[_Moved(self)])  # type: ignore[arg-type]
        if args.fsdp and not self.is_fsdp_enabled:  # accelerate drops it without a word where there is no accelerator
            raise UserError(
                f"train.fsdp shards over accelerators, and this run is on {args.device.type}; leave it out to run DDP"
            )
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise UserError(
                "FSDP1 hides shards in plain tensors, so that inner products are of one rank's part: set train.fsdp_config.version: 2"
            )
        if self.is_deepspeed_enabled:  # by the launcher: no recipe says so
            raise UserError(DEEPSPEED)
        self.remove_callback(PrinterCallback)  # the bar says it

    def get_train_dataloader(self) -> DataLoader:  # type: ignore[override]
        """Counts the steps of an epoch; it is not sharded over ranks, since streams shard their rows themselves."""
        return DataLoader(
            range(self.streams["task"].steps), batch_size=1, collate_fn=lambda step: {"step": torch.tensor(step)}
        )  # type: ignore[arg-type]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        if self._oracle is None:
            self._oracle = Oracle(
                model,
                self.streams,
                seed=self.args.seed,
                loss=self.methods.loss,
                penalty=self.methods.penalty,
                accelerator=self.accelerator,
            )
            self._oracle.optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # inside accelerate's wrapper
            self._oracle.state, self._oracle.alive = self.method_state, self._alive
        step = self.state.global_step
        direction, point = self.methods.direction(self._oracle.at_step(step)), self._oracle.parameters
        if direction.keys() != point.keys():
            odd = sorted(direction.keys() ^ point.keys())[:3]
            raise DefenceError(
                f"step {step}: the direction and the trainable parameters differ at {', '.join(odd)}; nothing was updated"
            )
        if not math.isfinite(direction.norm()):
            raise DefenceError(f"step {step}: the direction is not finite; nothing was updated")
        for name, parameter in point.items():
            parameter.grad = direction[name].to(parameter.dtype)
        losses = self._oracle.losses
        if "task" in losses:
            self.curve.append((step, losses["task"]))
        self._loss = (
            losses["task"] if "task" in losses else next(iter(losses.values()))
        )  # a step of alignment alone shows its own
        return torch.tensor(self._loss, device=self.args.device)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        kept = gather_full(
            {f"{key}:{name}": tensor for key, vector in self.method_state.items() for name, tensor in vector.items()}
        )
        told = {"curve": self.curve, "alive": sorted(self._alive)}
        if self.args.should_save:
            safetensors.torch.save_file(
                kept, Path(output_dir) / METHOD_STATE, {name: json.dumps(value) for name, value in told.items()}
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if not (Path(checkpoint) / METHOD_STATE).is_file():
            raise UserError(
                f"{checkpoint} holds no {METHOD_STATE}, so the methods cannot go on from it; remove the folder to start anew"
            )
        with safetensors.safe_open(Path(checkpoint) / METHOD_STATE, "pt") as file:
            told = {name: json.loads(value) for name, value in file.metadata().items()}
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        self.curve, self._alive = [(step, loss) for step, loss in told["curve"]], set(told["alive"])
        point = trainable(self.model)
        for said, tensor in kept.items():
            key, _, name = said.partition(":")
            like, tensor = point[name], tensor.to(point[name].device)
            part = distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor
            self.method_state.setdefault(key, Vector())[name] = part

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the loader carries no rows to count


class _Moved(TrainerCallback):
    """After a step with a learning rate above zero the parameters have left the start; the progress bar advances."""

    def __init__(self, host: OracleTrainer):
        self.host = host

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.host._get_learning_rate() > 0 and self.host._oracle is not None:
            self.host._oracle.moved = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.host.curve and TASK not in self.host._alive:
            raise DefenceError("no step had a gradient of the task: the methods of the run took nothing of any row")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.host._advance:
            self.host._advance(self.host._loss)


def check(model: Any, args: TrainingArguments, methods: Composition, streams: Mapping[str, Stream]) -> None:
    """Everything that can be refused before any time is spent."""
    for name in methods.needs("streams"):
        if name not in streams:
            raise UserError(
                f"the methods {[type(m).__name__ for m in methods.methods]} need the stream {name!r}: set data.{name}"
            )
    for name in methods.needs("columns"):
        if any(name not in row.columns for row in streams["task"].rows):
            raise UserError(
                f"the methods need the column {name!r} on every row of the task; scan the rows first, or name a file"
            )
    check_columns(streams["task"].rows, methods.needs("columns"))
    if methods.penalty is not None:  # a missing base, wrong names or shapes are said before any time is spent
        with torch.no_grad():
            methods.penalty(trainable(model))
    if "reference" in methods.needs("roles"):
        if not hasattr(model, "disable_adapter"):
            raise UserError(
                "a method needs the reference model, which is the adapter switched off: tune with train.adapter"
            )
        if own := [name for name in trainable(model) if name.endswith("base_layer.bias")]:
            raise UserError(
                f"{own[0]} is tuned with the adapter, so switching that off is not the starting model; set bias: none"
            )
        if not starts_fresh(model):
            raise UserError(
                "the adapter does not start fresh (its B is not zero), so switching it off is not the starting model; merge it first"
            )
    if args.fsdp and args.world_size == 1:
        raise UserError(
            "train.fsdp shards over several processes and this is one; start the run with torchrun, or leave it out"
        )
    check_settings({"deepspeed": args.deepspeed}, {}, methods)


def check_columns(rows: Iterable[TokenizedRow], names: Iterable[str]) -> None:
    """A column with a number for every answer token, against the tokens of its row; or one with a number for every row."""
    rows = list(rows)
    for name in names:
        alike = [isinstance(row.columns[name], int | float) for row in rows]
        if len(set(alike)) > 1:
            raise UserError(
                f"the column {name!r} has one number for row {rows[alike.index(True)].id} and several for {rows[alike.index(False)].id}"
            )
    for row, name in itertools.product(rows, names):
        if not isinstance(told := row.columns[name], int | float) and len(told) != sum(row.answer):
            found = f"{len(told)} numbers for {sum(row.answer)} answer tokens"
            raise UserError(
                f"row {row.id}: the column {name!r} holds {found}; was it made with another tokenizer or template?"
            )


def check_settings(settings: Mapping[str, Any], adapter: Mapping[str, Any], methods: Composition) -> None:
    """What can be refused without a model, so by a dry run too: ``settings`` and ``adapter`` as a recipe's ``train`` has them."""
    if settings.get("deepspeed"):
        raise UserError(DEEPSPEED)
    if "reference" not in methods.needs("roles"):
        return
    if (how := adapter.get("init_lora_weights", True)) not in (True, "gaussian"):
        raise UserError(f"train.adapter.init_lora_weights: {how!r} {NOT_THE_START}")
    if (how := adapter.get("bias", "none")) != "none":
        raise UserError(f"train.adapter.bias: {how!r} {NOT_THE_START}: it trains biases of the model's own")


def streams_of(
    rows: Mapping[str, list[Any]], args: TrainingArguments, pad: int, align_share: float = 0.25
) -> dict[str, Stream]:
    """Streams of a run: the task at the batch size of ``args`` over all ranks, every other at ``align_share`` of it."""
    micro = args.per_device_train_batch_size
    batch = micro * args.gradient_accumulation_steps * args.world_size
    small = max(1, round(batch * align_share))
    return {
        name: Stream(name, tuple(chosen), batch if name == "task" else min(small, len(chosen)), micro, args.seed, pad)
        for name, chosen in rows.items()
    }
