"""What a recipe's ``train`` may hold: the TrainingArguments that have an effect, LoraConfig and ``align_share``.

More than 250 lines, since a third of them are the keys themselves, and the refusals go by the keys.
"""

import copy
import inspect
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    with_config,
)
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

from safebasin.errors import UserError
from safebasin.models.adapter import OTHERS, RANDOM_INIT
from safebasin.registry import explain, nearest
from safebasin.runtime import hardware
from safebasin.train.compose import Composition

FP16 = "fp16 is refused: small inner products vanish in it; set bf16: true, or leave both out: the hardware decides"
DEEPSPEED = (
    "DeepSpeed steps inside its own backward, and methods hand the optimizer a direction of their own; use DDP or FSDP2"
)
NEEDS_DATA = ("eva", "corda", "loftq", "lora_ga")  # without its rows PEFT quietly begins at another start, or fails
UNREAD = {  # names of LoraConfig: what is set here, where an adapter came from, and starts that need rows
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
NOT_THE_START = "does not start fresh, so switching the adapter off is not the starting model"

Level = Literal["debug", "info", "warning", "error", "critical", "passive"]
Optimizer = Literal[  # those whose step is a function of .grad alone; of bitsandbytes' none is run in our tests
    "adamw_torch",
    "adamw_torch_fused",
    "adafactor",
    "sgd",
    "adagrad",
    "rmsprop",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
]


@with_config(ConfigDict(strict=True, allow_inf_nan=False, extra="forbid"))
class Settings(TypedDict, total=False):
    """The names of ``transformers.TrainingArguments`` that have an effect here and work, with types and bounds.

    Left out are: those of a data loader, since rows come from seeded streams (``dataloader_*``, ``data_seed``); of a
    loss, since methods define it (``label_smoothing_factor``); of evaluation, since a model is measured after tuning
    (``eval_*``, ``load_best_model_at_end``); of the process group, which is up before (``ddp_backend``); a checkpoint
    that cannot be resumed (``save_only_model``); and what breaks under the oracle, which takes several gradients a step
    (``ddp_static_graph``), or changes its forward or batch (``use_liger_kernel``, ``auto_find_batch_size``).
    """

    max_steps: Annotated[int, Field(ge=1)] | Literal[-1]
    num_train_epochs: PositiveFloat
    per_device_train_batch_size: PositiveInt
    gradient_accumulation_steps: PositiveInt
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    full_determinism: bool

    optim: Optimizer
    optim_args: Annotated[str, Field(pattern=r"^[^,=]+=[^,=]+(,[^,=]+=[^,=]+)*$")] | None  # "key=value,key=value"
    learning_rate: PositiveFloat
    lr_scheduler_type: str
    lr_scheduler_kwargs: dict[str, Any] | None
    warmup_steps: NonNegativeFloat  # below 1: a share of the run
    weight_decay: NonNegativeFloat
    adam_beta1: Annotated[float, Field(ge=0, lt=1)]
    adam_beta2: Annotated[float, Field(ge=0, lt=1)]
    adam_epsilon: PositiveFloat
    max_grad_norm: NonNegativeFloat  # 0: no clipping

    bf16: bool | Literal["auto"]  # auto, the default: where the weights are in bfloat16
    tf32: bool | None
    use_cpu: bool
    torch_compile: bool
    activation_checkpointing: bool | None
    activation_checkpointing_kwargs: dict[str, Any] | None
    gradient_checkpointing: bool | None
    gradient_checkpointing_kwargs: dict[str, Any] | None

    save_strategy: Literal["no", "steps", "epoch"]
    save_steps: PositiveFloat  # below 1: a share of the run
    save_total_limit: PositiveInt | None

    logging_strategy: Literal["no", "steps", "epoch"]
    logging_steps: PositiveFloat
    logging_first_step: bool
    log_level: Level
    log_level_replica: Level
    log_on_each_node: bool
    report_to: str | list[str] | None
    run_name: str | None
    project: str  # trackio
    trackio_space_id: str | None
    trackio_bucket_id: str | None
    trackio_static_space_id: str | Literal[False] | None

    ddp_find_unused_parameters: bool | None
    ddp_bucket_cap_mb: PositiveInt | None
    ddp_broadcast_buffers: bool | None
    fsdp: bool | str | None
    fsdp_config: dict[str, Any] | str | None


@with_config(ConfigDict(strict=True, allow_inf_nan=False, extra="allow"))
class Adapter(TypedDict, total=False):
    """Bounds that ``peft.LoraConfig`` itself does not check. All its other names pass."""

    r: PositiveInt
    lora_alpha: PositiveFloat
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
        | None
    )
    bias: Literal["none", "all", "lora_only"]
    use_dora: bool
    use_rslora: bool
    rank_pattern: dict[str, PositiveInt] | None
    alpha_pattern: dict[str, PositiveFloat] | None
    inference_mode: Literal[False]  # nothing would be tuned


def training_arguments(settings: Mapping[str, Any], folder: str | Path) -> TrainingArguments:
    """``TrainingArguments`` from the flat names of a recipe, passed through as they are, over our own defaults.

    By default a checkpoint is written after every tenth of the run, and only the newest is left.

    Raises:
        UserError: a name that does not exist, has no effect here or is not supported; a value of the wrong type or out
            of bounds; an optimizer, schedule or tracker that cannot be built; fp16, DeepSpeed.
    """
    refuse_names(settings)
    if settings.get("bf16") == "auto":
        settings = {**settings, "bf16": hardware().dtype == "bfloat16"}
    ours: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 0.1,
        "save_total_limit": 1,
        "report_to": "none",
        "logging_steps": 10,
        "use_cpu": not torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,  # the oracle refuses a parameter without a gradient anyway
    }
    fixed = {
        "output_dir": str(folder),
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
    }
    try:
        TypeAdapter(Settings).validate_python(dict(settings))
        args = TrainingArguments(**{**ours, **copy.deepcopy(dict(settings)), **fixed})  # it writes into fsdp_config
        refuse_without_effect(args, settings)
    except ValidationError as error:
        raise UserError(f"train: {explain(error)}") from None
    except (ValueError, TypeError, ImportError, OSError) as error:  # ImportError: an optimizer's package is not there
        raise UserError(f"train: {(str(error).strip() or repr(error)).splitlines()[0]}") from error
    if args.mixed_precision == "fp16":  # the launcher's word
        raise UserError(FP16)
    return args


def refuse_names(settings: Mapping[str, Any]) -> None:
    """UserError: the first name that is unknown, has no effect here or is not supported."""
    if settings.get("fp16") or settings.get("fp16_full_eval"):
        raise UserError(FP16)
    if settings.get("deepspeed"):
        raise UserError(DEEPSPEED)
    for name in settings:
        if name not in inspect.signature(TrainingArguments).parameters:
            raise UserError(
                f"train: unknown key {name!r}; it is neither ours nor a name of transformers.TrainingArguments"
                + nearest(name, [*Settings.__annotations__, "adapter", "align_share", "ema"])
            )
        if name not in Settings.__annotations__:
            raise UserError(f"train.{name} has no effect here or is not supported; leave it out")


def refuse_without_effect(args: TrainingArguments, settings: Mapping[str, Any]) -> None:
    """Build the optimizer and the schedule once, on one number, before any time is spent.

    Raises:
        UserError: a tracker that is not installed; a setting that the chosen optimizer or schedule does not read.
        ValueError, TypeError, ImportError: an optimizer or a schedule that cannot be built.
    """

    def optimizer(**changes: Any) -> tuple[Any, dict[str, Any]]:
        changed = copy.copy(args)
        vars(changed).update(changes)
        return Trainer.get_optimizer_cls_and_kwargs(changed)

    kind, options = optimizer()
    built = kind([torch.nn.Parameter(torch.zeros(1))], **options)
    get_scheduler(args.lr_scheduler_type, built, args.get_warmup_steps(10), 10, settings.get("lr_scheduler_kwargs"))
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if name in settings and optimizer(**{name: settings[name] + 0.01})[1] == options:
            raise UserError(f"train.{name} has no effect with this train.optim; leave it out")
    pairs = (settings.get("optim_args") or "").split(",")
    for pair in pairs:
        if pair and optimizer(optim_args=",".join(other for other in pairs if other != pair))[1] == options:
            raise UserError(f"train.optim_args: {pair.strip()!r} has no effect with this train.optim; leave it out")
    unread = {"constant": ("warmup_steps", "lr_scheduler_kwargs"), "constant_with_warmup": ("lr_scheduler_kwargs",)}
    for name in unread.get(args.lr_scheduler_type, ()):
        if settings.get(name):
            raise UserError(f"train.{name} has no effect with this train.lr_scheduler_type; leave it out")
    for needed, read, without in (
        (
            "gradient_checkpointing",
            args.gradient_checkpointing or settings.get("activation_checkpointing"),
            ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        ),
        ("fsdp", args.fsdp, ("fsdp_config",)),
        ("save_strategy: steps", args.save_strategy == "steps", ("save_steps",)),
        ("save_strategy", args.save_strategy != "no", ("save_total_limit",)),
        ("logging_strategy: steps", args.logging_strategy == "steps", ("logging_steps",)),
        (
            "report_to",
            args.report_to,
            ("run_name", "project", *(name for name in Settings.__annotations__ if "trackio" in name)),
        ),
    ):
        if not read and (idle := next((name for name in without if settings.get(name) is not None), "")):
            raise UserError(f"train.{idle} has no effect without train.{needed}; leave it out")
    installed = get_available_reporting_integrations()
    for tracker in args.report_to or ():
        if tracker not in installed:
            names = ", ".join(installed) or "none"
            raise UserError(f"train.report_to: {tracker!r} is not installed here; installed: {names}")


def check_settings(
    settings: Mapping[str, Any], adapter: Mapping[str, Any] | None, methods: Composition, align_share: object = 0.25
) -> None:
    """Refuse what can be refused without a model, so in a dry run too.

    Args:
        settings: names of TrainingArguments; their values are checked by ``training_arguments``.
        adapter: names of LoraConfig; None: full fine-tuning.
        methods: of one arm.
        align_share: as in ``streams_of``.

    Raises:
        UserError: a name or value that is refused, or an adapter that the methods cannot be tuned with.
    """
    refuse_names(settings)
    check_align_share(align_share)
    if adapter is None:
        if "buffer" in methods.needs("roles"):
            raise UserError("buffer_reinforce adds the factors of adapters; give train.adapter in the place of null")
        return
    check_adapter(adapter)
    if "reference" not in methods.needs("roles"):
        return
    if (init := adapter.get("init_lora_weights", True)) not in (True, "gaussian"):
        raise UserError(f"train.adapter.init_lora_weights: {init!r} {NOT_THE_START}")
    if (bias := adapter.get("bias", "none")) != "none":
        raise UserError(f"train.adapter.bias: {bias!r} {NOT_THE_START}: it trains biases of the model's own")


def check_adapter(adapter: Mapping[str, Any]) -> None:
    """UserError: what ``peft.LoraConfig`` does not take, or takes and cannot be tuned."""
    from peft import LoraConfig  # seconds

    names, init = inspect.signature(LoraConfig).parameters, str(adapter.get("init_lora_weights"))
    if unknown := next((name for name in adapter if name not in names), ""):
        raise UserError(f"train.adapter: unknown key {unknown!r} of peft.LoraConfig{nearest(unknown, names)}")
    if unread := next((name for name in adapter if name in UNREAD), ""):
        raise UserError(f"train.adapter: {unread} has no effect here; leave it out")
    if reason := next((why for key, why in OTHERS.items() if adapter.get(key)), ""):
        raise UserError(f"train.adapter: {reason}")
    if init.startswith("pissa_niter"):
        raise UserError(f"train.adapter: {RANDOM_INIT}")
    if init in NEEDS_DATA:
        raise UserError(f"train.adapter: init_lora_weights {init!r} is computed from rows, which is not done here")
    try:
        TypeAdapter(Adapter).validate_python(dict(adapter))
        for name in ("target_modules", "exclude_modules"):  # one text is a pattern of modules
            re.compile(value if isinstance(value := adapter.get(name), str) else "")
        LoraConfig(task_type="CAUSAL_LM", **adapter)
    except ValidationError as error:
        raise UserError(f"train.adapter: {explain(error)}") from None
    except (ValueError, TypeError, ImportError, re.error) as error:
        raise UserError(f"train.adapter: {str(error).strip().splitlines()[0]}") from error


def check_align_share(share: object) -> None:
    """UserError: not a number above 0."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < math.inf:
        raise UserError(f"train.align_share: {share!r} is not a number above 0 (rows of a stream to one of the task)")
