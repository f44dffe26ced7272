"""The host is ``transformers.Trainer``: schedules, checkpoints, trackers, mixed precision and sharding are its work.

One optimizer step is one ``training_step``: the loader that the Trainer sees only counts steps, the oracle gathers the
micro-batches of the step by itself, and the direction that the methods return becomes ``.grad``. Clipping and the
optimizer come after, once. A checkpoint counts once it is marked (``train/checkpoint.py``).

More than 250 lines, since it is one class of hooks, each where the Trainer calls it.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from safebasin.batch import packed_or_why
from safebasin.console import line
from safebasin.encode import TokenizedRow
from safebasin.errors import DefenceError, UserError
from safebasin.train.check import check
from safebasin.train.checkpoint import mark_complete, remove_checkpoint, rotate
from safebasin.train.compose import Composition
from safebasin.train.ema import Ema, UpdateAverage
from safebasin.train.oracle import TASK, Oracle
from safebasin.train.reference import ReferenceCache
from safebasin.train.settings import DEEPSPEED, check_align_share
from safebasin.train.stream import Stream
from safebasin.vector import Vector, gather_full, trainable

# In a checkpoint: what methods carry from step to step, as full tensors by "key:parameter"; the loss curve, which
# streams have had a gradient and whether an update has been applied stand in its metadata.
METHOD_STATE = "method_state.safetensors"


class OracleTrainer(Trainer):
    """A Trainer whose gradient comes from methods through the oracle.

    Args:
        model: with its trainable parameters (a PEFT model, or full weights).
        args: gradient accumulation is read from here and done by the oracle.
        methods: the composition of the run.
        streams: "task" and what the methods ask for; see ``streams_of``.
        advance: called after every step with the loss, for a progress bar.
        ema: an average of the update is kept beside it; see ``average``.
        reference: of full fine-tuning, where a method needs one (``train/reference.py``).

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
        ema: Ema | None = None,
        reference: ReferenceCache | None = None,
    ):
        check(model, args, methods, streams, reference)
        self._reference = reference
        self.methods = methods
        self.streams = streams
        self.curve: list[tuple[int, float]] = []  # (step, loss of the task)
        self.numbers: dict[str, list[tuple[int, float]]] = {}  # of methods, by name: (step, number)
        self._logged = 0  # the step up to which they were logged
        self.method_state: dict[str, Vector] = {}
        self.average = UpdateAverage(ema) if ema else None
        self._alive: set[str] = set()  # streams that have had a gradient
        self._moved = False  # whether an update has been applied
        self._advance = advance
        self._loss = math.nan  # what the bar shows
        self._oracle: Oracle | None = None
        self.padded: dict[str, str] = {}  # stream -> why its rows are not packed
        self._save_limit = args.save_total_limit
        # The oracle accumulates, so for the Trainer a step is a step. It removes no checkpoint: rotate does.
        save_steps = math.ceil(args.save_steps * (total_steps(args, streams) if args.save_steps < 1 else 1))
        args = dataclasses.replace(args, gradient_accumulation_steps=1, save_steps=save_steps, save_total_limit=None)
        args._n_gpu = min(args.n_gpu, 1)  # one process, one device: the Trainer would split batches by nn.DataParallel
        callbacks: list[Any] = [_StepCallback(self)]
        super().__init__(model=model, args=args, train_dataset=self._steps, callbacks=callbacks)
        if args.fsdp and not self.is_fsdp_enabled:  # accelerate drops it silently where there is no accelerator
            raise UserError(
                f"train.fsdp shards over accelerators, and this run is on {args.device.type}; leave it out to run DDP"
            )
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise UserError(
                "FSDP1 hides shards in plain tensors, so that inner products are of one rank's part: "
                "set train.fsdp_config.version: 2"
            )
        if self.is_deepspeed_enabled:  # by the launcher: no recipe sets it
            raise UserError(DEEPSPEED)
        self.remove_callback(PrinterCallback)  # the bar shows the loss

    @property
    def _steps(self) -> Any:
        """What the Trainer counts: the steps of an epoch."""
        return range(self.streams["task"].steps)

    def get_train_dataloader(self) -> DataLoader:
        """Counts the steps of an epoch; it is not sharded over ranks, since streams shard their rows themselves."""
        return DataLoader(self._steps, batch_size=1, collate_fn=lambda step: {"step": torch.tensor(step)})

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """An epoch, unless the run is over: the Trainer, resumed at its end amid an epoch, would take one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

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
                reference=self._reference,
            )
            self._oracle.optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # inside accelerate's wrapper
            self._oracle.state, self._oracle.alive, self._oracle.moved = self.method_state, self._alive, self._moved
            self._say_what_is_padded(model)
        step = self.state.global_step
        direction, point = self.methods.direction(self._oracle.at_step(step)), self._oracle.parameters
        if direction.keys() != point.keys():
            names = sorted(direction.keys() ^ point.keys())[:3]
            raise DefenceError(
                f"step {step}: the direction and the trainable parameters differ at {', '.join(names)}; "
                "nothing was updated"
            )
        if not math.isfinite(direction.norm()):
            raise DefenceError(f"step {step}: the direction is not finite; nothing was updated")
        for name, parameter in point.items():
            parameter.grad = direction[name].to(parameter.dtype)
        for name, number in self._oracle.numbers.items():
            if math.isfinite(number):
                self.numbers.setdefault(name, []).append((step, number))
        losses = self._oracle.losses
        if "task" in losses:
            self.curve.append((step, losses["task"]))
        # A step of alignment alone shows its own loss.
        self._loss = losses["task"] if "task" in losses else next(iter(losses.values()))
        return torch.tensor(self._loss, device=self.args.device)

    def _say_what_is_padded(self, model: Any) -> None:
        """Streams whose rows run padded, by their first batch, with the reason: once, and in ``padded``."""
        for name, stream in self.streams.items():
            rows = packed_or_why(model, stream.at(self.state.global_step)[0])
            if isinstance(rows, str):
                self.padded[name] = rows
        for reason in dict.fromkeys(self.padded.values()):
            names = ", ".join(name for name, why in self.padded.items() if why == reason)
            line(f"  rows of {names} are padded, not packed into one sequence: {reason}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """To the trackers: what the Trainer logs, and the means of the methods' numbers since the last time."""
        since, self._logged = self._logged, self.state.global_step
        new = {name: [x for step, x in pairs if step >= since] for name, pairs in self.numbers.items()}
        super().log({**logs, **{name: sum(xs) / len(xs) for name, xs in new.items() if xs}}, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint, marked once every rank has written its part. Only then what it replaces is removed."""
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():  # broken: a complete one would have been resumed from
            remove_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder)
            rotate(folder, self._save_limit)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        tensors = gather_full(
            {f"{key}:{name}": tensor for key, vector in self.method_state.items() for name, tensor in vector.items()}
        )
        facts = {"curve": self.curve, "numbers": self.numbers, "alive": sorted(self._alive), "moved": self._moved}
        if self.args.should_save:
            metadata = {name: json.dumps(value) for name, value in facts.items()}
            safetensors.torch.save_file(tensors, Path(output_dir) / METHOD_STATE, metadata)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        file = Path(checkpoint) / METHOD_STATE
        if not file.is_file():
            raise UserError(
                f"{checkpoint} holds no {METHOD_STATE}, so the methods cannot go on from it; "
                "remove the folder to start anew"
            )
        with safetensors.safe_open(file, "pt") as state:
            facts = {name: json.loads(value) for name, value in state.metadata().items()}
            tensors = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118 - no mapping
        self.curve, self._alive = [(step, loss) for step, loss in facts["curve"]], set(facts["alive"])
        self._moved = facts["moved"]
        self.numbers = {name: [(step, x) for step, x in pairs] for name, pairs in facts["numbers"].items()}
        for key in dict.fromkeys(name.partition(":")[0] for name in tensors):
            vector = self.method_state[key] = Vector()
            for name, like in trainable(self.model).items():  # in their order: it is that of summing, down to the bits
                part = tensors[f"{key}:{name}"].to(like.device)
                mesh = (like.device_mesh, like.placements) if isinstance(like, DTensor) else ()
                vector[name] = distribute_tensor(part, *mesh) if mesh else part
        if self.average is not None:
            self.average.vector = self.method_state.get("ema", Vector())

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the loader carries no rows to count


class _StepCallback(TrainerCallback):
    """After a step with a learning rate above zero the parameters have left the start; the progress bar advances."""

    def __init__(self, host: OracleTrainer):
        self.host = host

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.host._get_learning_rate() > 0 and self.host._oracle is not None:
            self.host._moved = self.host._oracle.moved = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        average = self.host.average
        if average is not None and self.host._oracle is not None:
            average.update(self.host._oracle.parameters)
            self.host.method_state["ema"] = average.vector
        if self.host._advance:
            self.host._advance(self.host._loss)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.host.curve and TASK not in self.host._alive:
            raise DefenceError("no step had a gradient of the task: the methods of the run took nothing of any row")


def total_steps(args: TrainingArguments, streams: Mapping[str, Stream]) -> int:
    """Optimizer steps of a run."""
    return args.max_steps if args.max_steps > 0 else math.ceil(streams["task"].steps * args.num_train_epochs)


def streams_of(
    rows: Mapping[str, Sequence[TokenizedRow]], args: TrainingArguments, pad: int, align_share: float = 0.25
) -> dict[str, Stream]:
    """Streams of a run: the task at the batch size of ``args`` over all ranks, every other at ``align_share`` of it.

    Raises:
        UserError: a stream without rows, or an ``align_share`` that is not above 0.
    """
    check_align_share(align_share)
    micro = args.per_device_train_batch_size
    batch = micro * args.gradient_accumulation_steps * args.world_size
    small = max(1, round(batch * align_share))
    return {
        name: Stream(name, tuple(part), batch if name == "task" else min(small, len(part)), micro, args.seed, pad)
        for name, part in rows.items()
    }
