"""The provider's policy: one YAML file. Unknown keys are refused, every number is bounded."""

import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from safebasin.errors import UserError
from safebasin.pipeline import yaml12
from safebasin.pipeline.config import ArmName, Recipe
from safebasin.pipeline.parse import plain, read, validate
from safebasin.pipeline.secrets import refuse_secrets
from safebasin.report.limits import parse_gate

_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
# What would be a token of its own if it stood in a row: the turn marks of the usual templates.
MARKS = r"<[|｜][\w ▁-]{1,40}[|｜]>|</?s>|\[/?INST\]|<</?SYS>>|</?(start|end)_of_turn>"


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Base:
    """A model that customers may tune."""

    recipe: Path  # relative to the policy's folder
    uploaded: ArmName = "uploaded"  # the arm that is tuned on all rows of the file
    without: ArmName = "without"  # the arm that is tuned in the same way without the rows that its cut names
    model: ArmName | Literal[""] = ""  # the arm that customers get; empty: `uploaded`, or `without` by the policy
    served: str = ""  # what the serving endpoint calls the model; empty: as customers do
    special: str = MARKS  # a regular expression: a row that holds a match is refused


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Range:
    low: PositiveFloat
    high: PositiveFloat


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Hyperparameters:
    """What a customer may set, and how far."""

    n_epochs: Range = Range(low=1, high=3)
    batch_size: Range = Range(low=4, high=32)
    learning_rate_multiplier: Range = Range(low=0.1, high=2)


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Tell:
    """What a customer learns about rows. Exact scores are a tool for attackers."""

    rows: Annotated[int, Field(ge=0)] = 100  # in the event; the result file names all of them. 0: no row is named
    reasons: bool = True
    scores: bool = False
    rates: bool = True


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Limits:
    """Of one customer, except where it says otherwise."""

    file_megabytes: PositiveFloat = 512.0
    files_megabytes: PositiveFloat = 4096.0  # all files of a customer together
    rows: PositiveInt = 100_000
    row_characters: PositiveInt = 100_000
    jobs_waiting: PositiveInt = 3
    jobs_running: PositiveInt = 1
    jobs_refused_day: PositiveInt = 10  # after so many refusals in 24 hours no job is accepted
    gpu_hours_month: NonNegativeFloat = 100.0
    streams: PositiveInt = 8  # of events, at once
    files_days: PositiveFloat = 30.0
    log_megabytes: PositiveFloat = 100.0  # what a job may print
    job_hours: PositiveFloat = 48.0


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Child:
    """The process of a job."""

    slots: PositiveInt = 1  # jobs at once on this machine
    # in front of "run RECIPE ...": a sandbox, torchrun, another Python
    command: Annotated[tuple[str, ...], Field(min_length=1)] = (sys.executable, "-m", "safebasin")
    environment: tuple[str, ...] = ()  # names of variables that it inherits beside PATH, HOME and LANG
    grace: PositiveFloat = 20.0  # seconds between SIGTERM and SIGKILL


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Serving:
    """The server behind ``/v1/chat/completions``."""

    url: Annotated[str, Field(pattern=r"^https?://")]  # of an OpenAI-compatible server, with its /v1
    key: str = ""  # the name of the environment variable that holds its key
    merge: bool = False  # the adapter is merged into its base: for servers that load no adapters
    name: Literal["id", "path"] = "id"  # how it calls a tuned model: by its id, or by the path of its folder
    timeout: PositiveFloat = 600.0


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Policy:
    models: Annotated[dict[ModelName, Base], Field(min_length=1)]
    folder: Path = Path("service")  # of run folders and the database; relative to the policy's folder
    database: str = ""  # a URL of SQLAlchemy, or env:NAME of the variable that holds it; empty: SQLite in the folder
    storage: str = ""  # a URL of fsspec for files and models; empty: in the folder
    # what happens where the file as uploaded makes the model unsafe, and without some rows it does not
    decide: Literal["refuse", "cut", "review"] = "refuse"
    inconclusive: Literal["fail", "review"] = "fail"
    search: Annotated[int, Field(ge=0, le=10)] = 0  # rounds of `safebasin search` where the first cut does not pass
    hyperparameters: Hyperparameters = Hyperparameters()
    tell: Tell = Tell()
    limits: Limits = Limits()
    child: Child = Child()
    serving: Serving | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """A policy with its recipes read."""

    policy: Policy
    text: str  # of the file, as the operator's page shows it
    recipes: Mapping[str, Recipe]

    @property
    def folder(self) -> Path:
        return self.policy.folder

    def job_folder(self, job: str) -> Path:
        """The folder of a job: its rows, its run, and what its child says."""
        return self.folder / "jobs" / job

    @property
    def database(self) -> str:
        """The URL of the database.

        Raises:
            UserError: it is to stand in a variable of the environment, and does not.
        """
        url = self.policy.database or f"sqlite:///{self.folder / 'service.db'}"
        if not url.startswith("env:"):
            return url
        if not (value := os.environ.get(name := url.removeprefix("env:"))):
            raise UserError(f"database: the variable {name} of the environment is empty; it holds the URL")
        return value

    @property
    def storage(self) -> str:
        return self.policy.storage or str(self.folder / "storage")


def read_policy(path: Path) -> Settings:
    """A policy and its recipes.

    Raises:
        UserError: a file cannot be read, an unknown key, a value outside its bounds, a recipe that a service cannot
            use: it mixes in an attack, lacks an arm, or its gate limits no attack success.
    """
    text = yaml12.read(path, "policy")
    policy: Policy = validate(Policy, yaml12.load(text, str(path)), str(path))
    refuse_secrets(plain(policy))
    home = path.resolve().parent
    models = {name: dataclasses.replace(base, recipe=home / base.recipe) for name, base in policy.models.items()}
    policy = dataclasses.replace(policy, models=models, folder=home / policy.folder)
    for name, limits in plain(policy.hyperparameters).items():
        if limits["low"] > limits["high"]:
            raise UserError(f"{path}: hyperparameters.{name}: low is above high")
    return Settings(policy, text, {name: _recipe(path, name, base) for name, base in models.items()})


def _recipe(path: Path, name: str, base: Base) -> Recipe:
    where, recipe = f"{path}: models.{name}", read(base.recipe)
    try:
        re.compile(base.special)
    except re.error as error:
        raise UserError(f"{where}.special is not a regular expression: {error}") from None
    if recipe.data.poison or recipe.data.poison_share:
        raise UserError(f"{where}: {base.recipe} mixes in an attack (data.poison): that is for experiments")
    if recipe.full:
        raise UserError(
            f"{where}: {base.recipe} tunes every weight (train.adapter: null), and a service serves adapters"
        )
    for arm in filter(None, (base.uploaded, base.without, base.model)):
        if arm not in recipe.arms or recipe.arms[arm].train is None:
            raise UserError(f"{where}: {base.recipe} has no arm {arm!r} that is tuned")
    if recipe.arms[base.uploaded].cut is not None:
        raise UserError(f"{where}: the arm {base.uploaded!r} leaves rows out; uploaded takes the arm of all rows")
    for arm in filter(None, (base.without, base.model)):
        if recipe.arms[arm].cut is None:
            raise UserError(f"{where}: the arm {arm!r} has no cut, so it can name no rows")
    first = next(iter(recipe.arms))
    if recipe.arms[first].train is not None:
        raise UserError(f"{where}: the first arm of {base.recipe} must be the model as it was, and {first!r} is tuned")
    gate = parse_gate(recipe.gate, list(recipe.arms))
    if gate.max_asr is None and gate.max_asr_upper is None:
        raise UserError(f"{where}: the gate of {base.recipe} limits no attack success (gate.max_asr)")
    return recipe
