"""A recipe as a tree of frozen dataclasses: every key with its kind, its bounds and its default."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from safebasin.data.source import Source
from safebasin.errors import UserError
from safebasin.runtime import Dtype, resolved

Spec = str | dict[str, dict[str, Any] | None]  # a method: its name, or {name: {field: value}}
ArmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,63}$")]  # it names folders
OWN = ("adapter", "align_share", "ema", "reference")  # keys of ``train`` that are no TrainingArguments
_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Model:
    name: str = "builtin:smollm2-aligned"
    dtype: Dtype = "auto"  # bfloat16 where the hardware computes in it, float32 elsewhere
    revision: str | None = None  # of a Hub id: a branch, a tag or a commit
    quantization: Literal["nf4"] | None = None  # QLoRA: linear layers in four bits under the adapter
    # the kernel of attention; null: eager on a CPU, transformers' own choice elsewhere
    attention: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = None
    trust_remote_code: bool = False
    # of the chat template: {enable_thinking: false, learn_thoughts: false}; of one with a clock: {date: 2026-11-26}
    template: dict[str, str | bool | int | float | None] = Field(default_factory=dict)

    @property
    def source(self) -> dict[str, Any]:
        """Arguments of what loads the model: where its files come from, and what is pinned into its template."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code, "template": self.template}

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of ``load``."""
        how = {"dtype": self.dtype, "quantization": self.quantization, "attention": self.attention}
        return {**self.source, **how}


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Data:
    """The rows. ``poison`` is for experiments: the attack's rows are mixed into the task so that they are
    ``poison_share`` of all."""

    task: Source
    poison: Source | None = None  # harmful requests with openers: what the attack is made of
    attack: Spec = "explicit"
    poison_share: float = Field(default=0.0, ge=0, lt=1)
    align: Source | None = None  # rows as an aligned model answers them: what defences are aligned by
    # harmful requests with refusals: what scorers ask the model
    probe: Source = Source(path="builtin:refusals", take=100)
    # rows that are harmful: anchors of the cut, simulated attacks
    harmful: Source = Source(path="builtin:opened", take=40)
    safe: Source = Source(path="builtin:harmless", take=60)  # rows that are safe: anchors of the cut
    max_length: Annotated[int, Field(ge=2)] = 1024  # tokens of a row
    on_bad: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Scan:
    scorers: tuple[Spec, ...] = ("gradshield",)
    batch_size: PositiveInt = 16
    shard: PositiveInt = 4096  # rows that are scored as one piece: no batch crosses it, and a lost worker costs one


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Cut:
    scorer: str | Annotated[tuple[str, ...], Field(min_length=1)] = "gradshield"  # several: a row must pass each
    estimator: Literal["anchors", "paper"] = "anchors"
    threshold: float | None = None
    max_share: float = Field(default=0.5, ge=0, le=1)  # of the rows that may go; where more would, the run stops

    @property
    def scorers(self) -> tuple[str, ...]:
        return (self.scorer,) if isinstance(self.scorer, str) else self.scorer


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Mix:
    """Answers from the logits of the start and of the tuned arm ``of``, mixed: two forwards a token, no weights."""

    share: float = Field(default=0.3, gt=0, le=1)  # of the start's logits
    guard: Spec | None = None  # a scorer that gives probabilities: dsa or guard; None: every request is mixed
    above: float = Field(default=0.9, ge=0, lt=1)  # P(unsafe) of a request above which it is mixed


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Arm:
    """One way to tune, to repair, or both. ``train: null`` without ``of`` leaves the model as it was."""

    of: ArmName | None = None  # the arm that this one goes on from: it is repaired, or tuned further
    cut: Cut | None = None
    columns: dict[str, str] = Field(default_factory=dict)  # that methods read: of which scorer, or from which file
    train: tuple[Spec, ...] | None = None
    settings: dict[str, Any] = Field(default_factory=dict)  # of this arm's tuning, in the place of those of ``train``
    repair: tuple[Spec, ...] | None = None  # edits of the adapter, from left to right
    mix: Mix | None = None  # nothing is tuned or edited: the answers of ``of`` are mixed with the start's


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class RoleNames:
    """Models and adapters that repairs and some methods read. Empty: the adapter that ``safebasin role`` has tuned."""

    base: str = ""  # the model before its alignment
    safe: str = ""  # an adapter of the start, tuned on refusals and harmless rows
    harmful: str = ""  # an adapter of the start, tuned on rows that are harmful
    reinforce: str = ""  # an adapter of the start with ``harmful`` on, tuned as ``safe``


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Measure:
    suites: tuple[Spec, ...] = ()
    labels: tuple[str, ...] = ()  # answers of the task that are only a label: off task to a harmful request
    system: str | None = None
    judges: dict[str, dict[str, Any]] = Field(default_factory=dict)  # settings of judges, by their names
    engine: Spec = "hf"  # where answers are generated: here, or {endpoint: {url: ..., models: {arm: name}}}


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Recipe:
    """Everything that decides the outcome of a run."""

    data: Data
    arms: Annotated[dict[ArmName, Arm], Field(min_length=1)]
    measure: Measure
    model: Model = Model()
    scan: Scan = Scan()
    roles: RoleNames = RoleNames()
    # ``adapter`` (LoraConfig; null: full fine-tuning), ``align_share`` (rows of other streams over rows of the task),
    # ``ema`` (an average of the update), ``reference`` (of full fine-tuning: stored or copy), and TrainingArguments by
    # name
    train: dict[str, Any] = Field(default_factory=dict)
    gate: dict[str, Any] = Field(default_factory=dict)
    seed: NonNegativeInt = 0
    engine: Spec = "here"  # where scan, measuring and the cells of a grid run; it changes no number

    @property
    def adapter(self) -> dict[str, Any]:
        settings = self.train.get("adapter") or {}
        if not isinstance(settings, Mapping):
            raise UserError(f"train.adapter: the settings of LoraConfig are needed, as r: 16; found {settings!r}")
        return dict(settings)

    @property
    def full(self) -> bool:
        """Whether every weight is tuned: ``train: {adapter: null}``, with the null written out."""
        return "adapter" in self.train and self.train["adapter"] is None

    @property
    def align_share(self) -> float:
        return self.train.get("align_share", 0.25)

    @property
    def arguments(self) -> dict[str, Any]:
        own = {name: value for name, value in self.train.items() if name not in OWN}
        if own.get("bf16", "auto") == "auto":  # autocast where the weights are in bfloat16
            own["bf16"] = resolved(self.model.dtype) == "bfloat16"
        # every weight moves, so steps are shorter than an adapter's, whose default is that of transformers (5e-5): the
        # rate of Alpaca's and Llama 2's full tuning; a model of 100 million weights takes twice to five times as much
        rate = {"learning_rate": 2e-5} if self.full else {}
        return {"seed": self.seed, **rate, **own}
