"""A plan: the recipe with its methods built and everything refused that can be refused without a model.

More than 250 lines, since what can be refused without a model is refused here, by one class that holds the methods.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safebasin.attack import attack
from safebasin.console import line
from safebasin.data.source import SetName, Source, check_file, is_remote
from safebasin.data.tables import KINDS, endings, kind_of, row_file
from safebasin.errors import UserError
from safebasin.measure import suite
from safebasin.measure.engine import Served, make_served
from safebasin.measure.judging import check_judges
from safebasin.models.adapter import why_off_is_not_start
from safebasin.models.lend import Lender
from safebasin.models.load import load_tokenizer
from safebasin.models.quantized import check_nf4
from safebasin.pipeline.config import OWN, Cut, Mix, Recipe, Spec
from safebasin.pipeline.parse import plain
from safebasin.pipeline.secrets import refuse_secrets
from safebasin.registry import split_spec
from safebasin.repair.walk import gives_dense, make_edits, needs
from safebasin.report.limits import Gate, parse_gate
from safebasin.report.roles import check_limits, roles_of
from safebasin.scan import scorer
from safebasin.spread import make_engine
from safebasin.template import check_arguments
from safebasin.train.compose import Composition
from safebasin.train.ema import read_ema
from safebasin.train.settings import check_settings, training_arguments


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will do. ``Plan.of`` is the only way to make one, and whatever it returns was checked."""

    recipe: Recipe
    scorers: Mapping[str, Any]
    attack: Any
    compositions: Mapping[str, Composition]  # of the arms that are tuned
    edits: Mapping[str, tuple[Any, ...]]  # of the arms that are repaired
    guards: Mapping[str, Any]  # of the arms whose answers are mixed where a guard says so
    suites: tuple[Any, ...]
    gate: Gate
    models: Lender = dataclasses.field(default_factory=Lender, compare=False)  # the start model, once in memory

    @classmethod
    def of(cls, recipe: Recipe) -> "Plan":
        """Build every method of a recipe.

        Raises:
            UserError: a method, field, set, setting or secret that is refused.
        """
        refuse_secrets(plain(recipe))
        names = [split_spec(spec, "scan")[0] for spec in recipe.scan.scorers]
        if len(set(names)) < len(names):
            raise UserError(
                "scan.scorers names one scorer twice, and both would write one column; scan it in its own folder"
            )
        compositions = {name: Composition.of(arm.train) for name, arm in recipe.arms.items() if arm.train is not None}
        plan = cls(
            recipe=recipe,
            scorers={name: scorer.make(spec) for name, spec in zip(names, recipe.scan.scorers, strict=True)},
            attack=attack.make(recipe.data.attack),
            compositions=compositions,
            edits={name: make_edits(specs) for name, specs in _repairs(recipe, compositions).items()},
            guards={name: scorer.make(arm.mix.guard) for name, arm in recipe.arms.items() if arm.mix and arm.mix.guard},
            suites=tuple(suite.make(spec) for spec in recipe.measure.suites),
            gate=parse_gate(recipe.gate, list(recipe.arms)),
        )
        plan._check_methods()
        for name in recipe.arms:
            plan._check_arm(name)
        return plan

    def _check_methods(self) -> None:
        recipe = self.recipe
        names = ", ".join(self.scorers)
        if unknown := [name for name in self.attacked_scorers if name not in self.scorers]:
            raise UserError(f"data.attack adapts to {unknown[0]!r}, which is not among scan.scorers ({names})")
        check_judges(self.judges, recipe.measure.judges)
        self._check_suites()
        make_engine(recipe.engine)
        check_arguments(recipe.model.template)
        if unknown := [arm for arm in (self.served_by.models if self.served_by else ()) if arm not in recipe.arms]:
            raise UserError(
                f"measure.engine.endpoint.models: no arm {unknown[0]!r}; there are: {', '.join(recipe.arms)}"
            )
        training_arguments(recipe.arguments, Path("unused"))
        read_ema(recipe.train.get("ema"))
        self._check_form()
        steps, warmup = recipe.train.get("max_steps", -1), recipe.train.get("warmup_steps", 0)
        if steps > 0 and "num_train_epochs" in recipe.train:
            line("train.num_train_epochs has no effect beside train.max_steps")
        at_test_time = any(self.attack.entry.implements(name) for name in ("ask", "system", "prefill"))
        if not recipe.data.poison_share and (
            recipe.data.poison or (recipe.data.attack != "explicit" and not at_test_time)
        ):
            line(f"data.{'poison' if recipe.data.poison else 'attack'} has no effect: data.poison_share is 0")
        if 0 < steps <= warmup:
            line(f"train.warmup_steps is {warmup:g} of {steps} steps: the learning rate is never reached")
        for name, composition in self.compositions.items():
            if shared := next((key for key in recipe.arms[name].settings if key in OWN), ""):
                raise UserError(f"arms.{name}.settings.{shared}: it holds for all arms; set train.{shared}")
            adapter = None if recipe.full else recipe.adapter
            check_settings(self.arguments(name), adapter, composition, recipe.align_share)
            training_arguments(self.arguments(name), Path("unused"))
            if self.recipe.arms[name].of and "buffer" in composition.needs("roles"):
                raise UserError(
                    f"arms.{name}: buffer_reinforce starts from the model; leave out of: {self.recipe.arms[name].of}"
                )
        if self.compositions and not recipe.adapter and not recipe.full:
            raise UserError(
                "train.adapter is missing: name at least r and target_modules, or set it to null: full fine-tuning"
            )

    def _check_suites(self) -> None:
        """UserError: one name of two suites, arms or judges of a suite; settings of a judge that nobody asks."""
        names, arms = [each.name for each in self.suites], {name.lower() for name in self.recipe.arms}
        twice = next((name for name in names if names.count(name) > 1), "")
        echo = next((each.name for each in self.suites if len(set(j := getattr(each, "judges", ()))) < len(j)), "")
        unread = next((name for name in self.recipe.measure.judges if name not in self.judges), "")
        for wrong, text in (
            (twice, f"measure.suites: two are named {twice!r}; give one a name of its own: name: {twice}_2"),
            (echo, f"measure.suites: {echo} names a judge twice, which would agree with itself"),
            (unread, f"measure.judges.{unread} has no effect: no suite names this judge; leave it out"),
            (
                len(arms) < len(self.recipe.arms),
                "arms: two names differ in case alone, and name one folder on some disks",
            ),
        ):
            if wrong:
                raise UserError(text)

    def _check_form(self) -> None:
        """UserError: what full fine-tuning, or a model in four bits, cannot do."""
        recipe = self.recipe
        if (reference := recipe.train.get("reference", "stored")) not in ("stored", "copy"):
            raise UserError(f"train.reference: {reference!r} is neither stored nor copy")
        if "reference" in recipe.train and not recipe.full:
            raise UserError("train.reference is of full fine-tuning; with an adapter it is the adapter switched off")
        if recipe.full and recipe.train.get("ema") is not None:
            raise UserError("train.ema averages the factors of LoRA; leave it out, or give train.adapter")
        if recipe.model.quantization is None:
            return
        check_nf4()
        if recipe.full:
            raise UserError("model.quantization: weights in four bits cannot be tuned; give train.adapter")
        for kind, methods in (
            ("train", [each for composition in self.compositions.values() for each in composition.methods]),
            ("repair", [each for edits in self.edits.values() for each in edits]),
        ):
            for each in methods:
                if "base" in each.entry.roles or "gradients" in each.entry.reads:
                    raise UserError(
                        f"{kind}: {each.entry.name} reads the weights themselves, and model.quantization: nf4 rounds"
                        " them; leave out one of the two"
                    )

    def _check_arm(self, name: str) -> None:
        arm, names = self.recipe.arms[name], ", ".join(self.scorers)
        self._check_repair(name)
        self._check_mix(name)
        for scorer_name in arm.cut.scorers if arm.cut else ():
            if scorer_name not in self.scorers:
                raise UserError(f"arms.{name}.cut.scorer: {scorer_name!r} is not among scan.scorers ({names})")
        if arm.cut and arm.cut.threshold is not None and arm.cut.estimator != Cut.estimator:
            raise UserError(f"arms.{name}.cut.estimator has no effect beside cut.threshold; leave one of them out")
        if arm.train is None:
            if arm.cut or arm.columns or arm.settings:
                raise UserError(f"arms.{name}: a cut, a column or settings need an arm that is trained: train: [sft]")
            return
        composition = self.compositions[name]
        for stream in composition.needs("streams"):
            if not isinstance(getattr(self.recipe.data, stream, None), Source):
                raise UserError(f"arms.{name}: its methods need the stream {stream!r}: set data.{stream}")
        needed = composition.needs("columns")
        if unread := [column for column in arm.columns if column not in needed]:
            raise UserError(
                f"arms.{name}.columns.{unread[0]}: its methods do not read it; they read: {', '.join(needed) or 'none'}"
            )
        for column in needed:
            source = arm.columns.get(column)
            if source is None:
                raise UserError(
                    f"arms.{name}: its methods read the column {column!r}: set columns.{column} to a scorer or a file"
                )
            if source in self.scorers:
                continue
            try:
                row_file(source)
            except UserError as error:
                raise UserError(
                    f"arms.{name}.columns.{column}: {source!r} is not among scan.scorers ({names}): {error}"
                ) from None
        composition.format_messages(())  # a secret that is missing is said before any time is spent

    def check_gate(self) -> None:
        """UserError where it is not said which arm a report of this run would judge, or a limit compares it with
        itself."""
        roles = roles_of(plain(self.recipe.arms), self.gate)
        if roles.judged is None:
            names = ", ".join(roles.defended or self.recipe.arms)
            raise UserError(f"gate.arm is missing: name the arm that the gate judges, one of {names}")
        check_limits(self.recipe.gate, roles)

    @property
    def attacked_scorers(self) -> tuple[str, ...]:
        """The scorers whose scores the attack is handed."""
        reads = self.attack.entry.reads
        return tuple(self.attack.against) if "scores" in reads else (self.attack.against,) if "score" in reads else ()

    def _check_repair(self, name: str) -> None:
        arm = self.recipe.arms[name]
        if arm.of is not None:
            others, way = [other for other in self.recipe.arms if self.has_adapter(other) and other != name], arm.of
            for _ in self.recipe.arms:
                way = self.recipe.arms[way].of or "" if way in others else way
            if arm.of not in others or way:
                tuned = ", ".join(others) or "none"
                raise UserError(f"arms.{name}.of: {arm.of!r} is no tuned arm that comes before it; tuned: {tuned}")
            if arm.train is None and arm.repair is None and arm.mix is None:
                raise UserError(f"arms.{name}: name what is done to {arm.of}: repair, train or mix")
        if name not in self.edits:
            return
        if arm.of is None and arm.train is None:
            raise UserError(f"arms.{name}: a repair needs the arm that it repairs: of: plain")
        edits = self.edits[name]
        if gives_dense(edits) and not self.recipe.full:
            raise UserError(
                f"arms.{name}.repair: its result is dense and no adapter; end with truncate: {{rank: 64}}, whose energy"
                " is reported, or write full weights: safebasin repair"
            )
        if "base" in needs(edits, "roles") and not self.recipe.roles.base:
            raise UserError(f"arms.{name}.repair needs the model before its alignment: set roles.base")

    def _check_mix(self, name: str) -> None:
        arm = self.recipe.arms[name]
        if arm.mix is None:
            return
        if arm.of is None:
            raise UserError(
                f"arms.{name}: a mix needs the tuned arm whose answers are mixed with the start's: of: plain"
            )
        if arm.train is not None or arm.repair is not None:
            raise UserError(
                f"arms.{name}: a mix has no weights of its own, so nothing is trained or repaired; give that to an "
                "arm of its own, and name it in of"
            )
        if reason := why_off_is_not_start(self.recipe.adapter):
            raise UserError(f"arms.{name}: a mix needs the start, which is the adapter switched off, and {reason}")
        guard = self.guards.get(name)
        if guard is None and arm.mix.above != Mix.above:
            raise UserError(f"arms.{name}.mix.above has no effect without mix.guard; leave it out, or name a guard")
        if guard is not None and not guard.entry.probability:
            guards = " or ".join(entry.name for entry in scorer if entry.probability)
            raise UserError(
                f"arms.{name}.mix.guard: {guard.entry.name} gives no probability that a request is unsafe: {guards}"
            )
        if other := [each.name for each in self.suites if "answers" not in each.entry.reads]:
            raise UserError(
                f"arms.{name}: the suite {other[0]} reads one model's weights or logits, and a mix is two models; "
                "measure the mix in a recipe without it"
            )

    def has_adapter(self, arm: str) -> bool:
        """Whether an arm ends with an adapter: it is tuned or repaired."""
        return arm in self.compositions or arm in self.edits

    def arguments(self, arm: str) -> dict[str, Any]:
        """TrainingArguments of an arm, by name."""
        return {**self.recipe.arguments, **self.recipe.arms[arm].settings}

    @property
    def served_by(self) -> Served | None:
        """The server that generates answers; None: they are generated here."""
        return make_served(self.recipe.measure.engine)

    @property
    def judges(self) -> tuple[str, ...]:
        """The judges that the suites name, each once."""
        return tuple(dict.fromkeys(name for each in self.suites for name in getattr(each, "judges", ())))

    @property
    def mixes(self) -> bool:
        """Whether an attack's rows are mixed into the task."""
        return self.recipe.data.poison is not None or self.recipe.data.poison_share > 0

    @property
    def keeps_form(self) -> bool:
        """Whether the training file holds the user's own rows in their own form."""
        return (
            not self.mixes
            and kind_of(self.recipe.data.task.path) in KINDS
            and not is_remote(self.recipe.data.task.path)
        )

    @property
    def train_file(self) -> str:
        """The name of the training file in ``data/``."""
        return "train" + endings(self.recipe.data.task.path) if self.keeps_form else "train.jsonl"

    @property
    def anchors(self) -> dict[str, Source]:
        """The anchor sets of a scan, and the streams that its scorers read where the run has them."""
        names = (
            "probe",
            "harmful",
            "safe",
            *(stream for each in self.scorers.values() for stream in each.entry.streams),
        )
        return {name: source for name in names if (source := getattr(self.recipe.data, name))}

    def needs_scores(self, arm: str) -> bool:
        """Whether an arm rests on the scan, by its cut or by a column."""
        return bool(self.recipe.arms[arm].cut) or self.reads_scores(arm)

    def column_files(self, arm: str) -> dict[str, str]:
        """The columns of a tuned arm that come from a file of the user's: column -> file."""
        return {
            column: source for column, source in self.recipe.arms[arm].columns.items() if source not in self.scorers
        }

    def reads_scores(self, arm: str) -> bool:
        """Whether a column of the arm comes from the scan, not from a file of the user's."""
        return any(source in self.scorers for source in self.recipe.arms[arm].columns.values())

    def served(self, arm: str, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """A conversation as an arm's server sends it to the model."""
        before = self.recipe.arms[arm].of
        if arm not in self.compositions and before:  # a repaired model is asked as the one that it was
            return self.served(before, messages)
        return self.compositions[arm].format_messages(messages) if arm in self.compositions else messages

    def system_prompt(self, arm: str) -> str | None:
        """The system prompt that an arm's model is served with."""
        system = self.recipe.measure.system
        messages = self.served(arm, ({"role": "system", "content": system},) if system else ())
        return messages[0]["content"] if messages else None

    def check_files(self) -> None:
        """UserError where a set is to be read from a file that is not there, or the model from a folder that is none or
        whose tokenizer does not read ``model.template``; the Hub is asked for neither, and no model is built."""
        if not is_remote(name := self.recipe.model.name) and not name.startswith("builtin:"):
            load_tokenizer(name, **self.recipe.model.source)
        for source in vars(self.recipe.data).values():
            if isinstance(source, Source):
                check_file(source.path)
        for method in (*self.suites, *self.scorers.values(), self.attack):
            for name, hint in typing.get_type_hints(type(method), include_extras=True).items():
                value = getattr(method, name)
                if isinstance(value, Source):
                    check_file(value.path)
                elif value is not None and SetName in (hint, *typing.get_args(hint)):
                    check_file(value)


def _repairs(recipe: Recipe, compositions: Mapping[str, Composition]) -> dict[str, list[Spec]]:
    """The edits of every arm that is repaired, those that its training methods end with first."""
    edits: dict[str, list[Spec]] = {}
    for name, arm in recipe.arms.items():
        methods = compositions[name].methods if name in compositions else ()
        own = [spec for each in methods if each.entry.implements("repair") for spec in each.repair]
        if own or arm.repair is not None:
            edits[name] = own + list(arm.repair or ())
    return edits
