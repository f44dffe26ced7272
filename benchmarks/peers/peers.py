"""What peers cost beside safebasin: seconds of theirs over seconds of ours, turn by turn in one run.

    python -m benchmarks peers --trl FOLDER --safetune FOLDER --safelora FOLDER

Nothing of a peer's code is copied. What is installed is called (`transformers.Trainer`); a `FOLDER` is a checkout of
the peer's repository, or for TRL where `pip install --no-deps --target FOLDER trl` put it, and is imported from there;
what is a formula in a script and no function is written from the formula, as that code computes it.

    hf.plain                  a step of transformers.Trainer on padded rows / our plain step on the same rows
    trl.plain                 a step of TRL's SFTTrainer, gradient checkpointing and bf16 (its defaults) off / the same
    safetune.safegrad         a step of SafeTune's SafeGradTrainer by KL, its reference a second model / ours
    safetune.safegrad.first   the same / ours where the reference of the alignment row is not cached yet
    safetune.asft             a step of its AsFTTrainer / ours
    safetune.star_dss         a step of its STARDSSTrainer, its reference a second model / ours
    safetune.star_dss.first   the same / ours where the reference of the rows is not cached yet
    safelora                  IBM's SafeLoRA on an adapter, ten modules, folders given / our edit `safe_lora`, the same
    safelora.4096             the same on one block of the shapes of 7B, all seven modules
    asft.official.4096        |(I - d d^T / |d|) B A|_F^2 and its gradient for one matrix of 4096 x 4096, with I, B A
                              and the product formed as PKU-YuanGroup/AsFT forms them, d d^T / |d| given / ours
    guard.prefixes            a guard's call for every prefix of an answer / all in one pass, a policy of 300 tokens

Floors: of `hf.plain` and `trl.plain` 1 (the same products); of `safetune.*` what the reference's forward adds; of
`asft.official.4096`, counting multiply-adds at rank 8, three products of 4096^3 over two passes over d: 3 * 4096 /
(2 * 8) = 768, less what memory costs; of `guard.prefixes` see `benchmarks/guard`.
"""

import copy
import functools
import importlib
import sys
import tempfile
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
from cyclopts import Parameter
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from benchmarks import recipe
from benchmarks.guard.guard import WAYS, inputs, policy_of
from benchmarks.harness import Bench, experiment, ratios, seconds, take_turns
from benchmarks.train.train import WARM_UP, Setting, Turn, methods, setting
from safebasin.batch import Batch
from safebasin.console import line
from safebasin.errors import UserError
from safebasin.layer import Pair
from safebasin.models.adapter import fresh_adapter
from safebasin.models.load import load
from safebasin.models.tensors import Tensors
from safebasin.models.updates import AdapterUpdates
from safebasin.models.write import write_lora
from safebasin.repair import edit
from safebasin.repair.walk import Roles, Walk
from safebasin.train.anchor_projector import AnchorProjector, Departure
from safebasin.vector import trainable

# Of a step of theirs: the step of ours on the same rows.
STEPS = {"hf.plain": "sft", "trl.plain": "sft", "safetune.safegrad": "safegrad"}
STEPS |= {"safetune.safegrad.first": "safegrad_first", "safetune.asft": "asft"}
STEPS |= {"safetune.star_dss": "star_dss", "safetune.star_dss.first": "star_dss_first"}
OTHERS = ("safelora", "asft.official", "guard.prefixes")
GOALS = dict.fromkeys((*STEPS, *OTHERS), ">= 1.5") | {"asft.official.4096": ">= 20", "safelora.4096": ">= 1.5"}
BASE = "builtin:smollm2"  # the weights before the alignment
RANK = 8
POLICY = 300  # tokens


def imported(name: str, folder: Path) -> Any:
    """A module of a peer's checkout. Its packages' ``__init__`` are left out: they import what is not needed here.

    ``folder`` is that of the first package.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give a checkout of the peer's repository")
    parents = name.split(".")[:-1]
    for i, part in enumerate(parents):
        folder = folder / part if i else folder
        package = types.ModuleType(".".join(parents[: i + 1]))
        package.__path__ = [str(folder)]
        sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(name)


class Hosted:
    """A step of a Trainer of theirs on the shared model, with an adapter and an optimizer of its own."""

    def __init__(self, shared: Setting, trainer: Any, weights: bool = False):
        self.shared, self.trainer, self.weights, self.steps = shared, trainer, weights, 0
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.create_optimizer()
        self.point = {name: p.detach().clone() for name, p in trainable(shared.model).items()}

    def step(self) -> float:
        """Seconds of one optimizer step; copying the adapter is not timed."""
        trainer, parameters = self.trainer, trainable(self.shared.model)
        batches = [padded(batch, self.weights) for batch in self.shared.streams["task"].at(self.steps)]
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(self.point[name])

        def update() -> None:
            for batch in batches:
                trainer.training_step(trainer.model, batch)
            trainer.accelerator.clip_grad_norm_(parameters.values(), trainer.args.max_grad_norm)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()

        duration = seconds(update)
        self.steps += 1
        for name, p in parameters.items():
            self.point[name].copy_(p.detach())
        return duration


def padded(batch: Batch, weights: bool = False) -> dict[str, torch.Tensor]:
    """A batch as trainers have it: prompts and padding are labelled -100; ``weights``: SafeTune's, of every token."""
    labels = torch.full_like(batch.input_ids, -100)
    tail = labels[:, -batch.mask.shape[1] :]
    tail[batch.mask] = batch.labels[batch.mask]
    rows = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}
    if weights:
        rows["safety_weights"] = torch.ones(labels.shape)
        rows["safety_weights"][:, -batch.mask.shape[1] :] = batch.columns["star"].reshape(len(labels), -1)
    return rows


def trainers(shared: Setting, turns: int, trl: Path | None, safetune: Path | None) -> dict[str, Callable[[], Hosted]]:
    """The peers whose steps can be timed, by the names of ``STEPS``."""
    args = copy.deepcopy(shared.args)
    hosted = {"hf.plain": lambda: Hosted(shared, Trainer(model=shared.model, args=args))}
    if trl is not None:
        hosted["trl.plain"] = lambda: Hosted(shared, sft_trainer(shared, trl))
    if safetune is not None:

        def trainer(name: str, kind: str, weights: bool = False, **settings: Any) -> Hosted:
            imported(f"safetune.core.optim.{name}", safetune / "src" / "safetune")
            module = imported(f"safetune.interventions.harden.{name}", safetune / "src" / "safetune")
            return Hosted(shared, getattr(module, kind)(model=shared.model, args=args, **settings), weights)

        align = [padded(batch) for step in range(turns) for batch in shared.streams["align"].at(step)]
        hosted["safetune.safegrad"] = lambda: trainer(
            "safegrad", "SafeGradTrainer", safety_dataset=align, reference_model=load(recipe.MODEL).model
        )
        hosted["safetune.asft"] = lambda: trainer(
            "asft",
            "AsFTTrainer",
            aligned_state_dict=load(recipe.MODEL).model.state_dict(),
            base_state_dict=load(BASE).model.state_dict(),
        )
        hosted["safetune.star_dss"] = lambda: trainer(
            "star_dss", "STARDSSTrainer", weights=True, ref_model=load(recipe.MODEL).model
        )
    return hosted


def sft_trainer(shared: Setting, folder: Path) -> Any:
    """TRL's, with the settings of ours; its own, gradient checkpointing and bf16, are off."""
    from datasets import Dataset

    sys.path.append(str(folder))
    module = importlib.import_module("trl")
    settings = {name: getattr(shared.args, name) for name in ("output_dir", "learning_rate", "seed", "max_grad_norm")}
    settings |= {"per_device_train_batch_size": shared.args.per_device_train_batch_size, "report_to": "none"}
    args = module.SFTConfig(**settings, gradient_checkpointing=False, bf16=False, use_cpu=shared.args.use_cpu)
    rows = [
        {"input_ids": row.ids.tolist(), "completion_mask": row.answer.astype(int).tolist()}
        for row in shared.streams["task"].rows[:8]
    ]
    return module.SFTTrainer(
        shared.model, args, train_dataset=Dataset.from_list(rows), processing_class=load(recipe.MODEL).tokenizer
    )


def steps_beside(bench: Bench, chosen: Mapping[str, Callable[[], Hosted]], shared: Setting, steps: int) -> None:
    """Records of the peers whose steps are timed; all take turns with ours."""
    own = methods(BASE, recipe.MODEL)
    pairs = {what: ours for what, ours in STEPS.items() if what.removesuffix(".first") in chosen}
    turns: dict[str, Any] = {name: Turn(own[name], shared) for name in dict.fromkeys(pairs.values())}
    turns |= {what: build() for what, build in chosen.items()}
    next(turn.host for turn in turns.values() if isinstance(turn, Turn)).accelerator.prepare_model(shared.model)
    values = take_turns({name: turn.step for name, turn in turns.items()}, steps, warm_up=WARM_UP)
    for what, ours in pairs.items():
        bench.timing(what, ratios(values, what.removesuffix(".first"), ours), model=recipe.MODEL)


def penalties(size: int) -> dict[str, Callable[[], float]]:
    """Seconds of AsFT's penalty and its gradient at B and A, as the official code computes it and as ours does."""
    torch.manual_seed(0)
    d = torch.randn(size, size) / size**0.5
    b = torch.randn(size, RANK).div_(size).requires_grad_()
    a = torch.randn(RANK, size).requires_grad_()
    given, ours = d @ d.T / d.norm(), AnchorProjector.of(d, "official", 1)

    def official() -> torch.Tensor:
        departure = (torch.eye(size) - given) @ (b @ a)
        return departure.norm().square()

    def low_rank() -> torch.Tensor:
        return Departure.apply([ours], b, a)

    def gradient(penalty: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        return list(torch.autograd.grad(penalty(), (b, a)))

    pairs: Any = zip(gradient(official), gradient(low_rank), strict=True)
    if not all(torch.allclose(theirs, own, rtol=1e-3, atol=1e-4 * float(own.abs().max())) for theirs, own in pairs):
        raise UserError("the two penalties have other gradients, so their seconds cannot be compared")
    return {"theirs": lambda: seconds(lambda: gradient(official)), "ours": lambda: seconds(lambda: gradient(low_rank))}


def block(size: int) -> dict[str, Any]:
    """A model of one block before and after an alignment, both random: at 4096 of the shapes of 7B."""
    torch.manual_seed(0)
    settings = {"hidden_size": size, "intermediate_size": size * 11008 // 4096, "num_attention_heads": size // 32}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **settings))
    aligned = copy.deepcopy(base)
    for p in aligned.parameters():
        p.data += 0.01 * torch.randn_like(p)
    return {"base": base, "aligned": aligned}


def repairs(checkout: Path, folder: Path, ends: dict[str, Any]) -> dict[str, Callable[[], float]]:
    """Seconds of IBM's SafeLoRA and of ours on an adapter of the quickstart's kind, its B random.

    ``ends``: the models ``base`` and ``aligned`` in float32; both read them from folders.

    Raises:
        UserError: the two results differ.
    """
    for name, end in ends.items():
        end.save_pretrained(folder / name)
    model = fresh_adapter(ends.pop("aligned"), recipe.ADAPTER, 0)
    torch.manual_seed(0)
    for name, p in trainable(model).items():
        if ".lora_B." in name:
            torch.nn.init.normal_(p.data, std=0.01)
    model.save_pretrained(folder / "tuned")
    theirs = imported("safe_lora.model", checkout)
    read = theirs.AutoModelForCausalLM.from_pretrained  # the keyword of 4.x is none of transformers 5

    def from_pretrained(*args: Any, load_in_8bit: bool, **settings: Any) -> Any:
        return read(*args, **settings)

    config = importlib.import_module("safe_lora.config").SafeLoRAConfig(
        base_model_path=str(folder / "base"),
        aligned_model_path=str(folder / "aligned"),
        num_proj_layers=10,
        devices="cpu",
    )
    tuned = AdapterUpdates(folder / "tuned", Tensors(folder / "aligned"))

    def official(given: Any) -> Any:
        with mock.patch.object(theirs.AutoModelForCausalLM, "from_pretrained", from_pretrained):
            return theirs.SafeLoRA(given, config).model

    def ours() -> None:
        base = Pair(folder / "base", folder / "aligned", tuned.names)
        walk = Walk([edit.make({"safe_lora": {"tau": None, "lowest": 10}})], Roles(tuned=tuned, base=base))
        write_lora(folder / "out", tuned.config, {module: walk.result(module)[0] for module in tuned})

    def copied() -> Any:
        return copy.deepcopy(model)  # theirs changes the model that it is given

    ours()
    factors, own = trainable(official(copied())), AdapterUpdates(folder / "out", tuned.start)
    for module in tuned:
        b, a = (factors[f"base_model.model.{module}.lora_{side}.default.weight"].detach() for side in "BA")
        scale, product = recipe.ADAPTER["lora_alpha"] / recipe.ADAPTER["r"], own[module].b @ own[module].a
        if not (product - scale * b @ a).norm() <= 1e-3 * product.norm():
            raise UserError(f"the two repairs of {module} differ, so their seconds cannot be compared")

    def timed() -> float:
        given = copied()
        return seconds(lambda: official(given))

    return {"theirs": timed, "ours": lambda: seconds(ours)}


def prefixes(rows: int, answer_tokens: int) -> dict[str, Callable[[], float]]:
    """Seconds of a guard over all prefixes of answers, a call for each and in one pass."""
    network, reader, pairs = inputs(BASE, "float32", rows, answer_tokens)
    policy = policy_of(reader, POLICY)
    calls = {way: functools.partial(call, network, reader, policy, pairs, 5) for way, call in WAYS.items()}
    return {
        "theirs": lambda: seconds(calls["fresh"]),
        "ours": lambda: seconds(calls["one_pass"]),
    }


@experiment(
    "peers", replaces=("what",), goals=GOALS, quick={"steps": 2, "size": 256, "only": ("asft.official", "hf.plain")}
)
def peers(
    *,
    bench: Bench,
    only: Annotated[tuple[str, ...], Parameter(help="some of the records; default all whose folder is given")] = (),
    trl: Annotated[Path | None, Parameter(help="FOLDER of pip install --no-deps --target")] = None,
    safetune: Annotated[Path | None, Parameter(help="FOLDER: checkout of Lexsi-Labs/SafeTune")] = None,
    safelora: Annotated[Path | None, Parameter(help="FOLDER: checkout of IBM/SafeLoRA")] = None,
    steps: Annotated[int, Parameter(help="of each, side by side; two or more")] = 6,
    size: Annotated[int, Parameter(help="of the matrices of asft.official and of safelora's block")] = 4096,
    answer_tokens: Annotated[int, Parameter(help="of the guard's rows")] = 64,
) -> None:
    """What do the steps, penalties, repairs and guards of HF, TRL, SafeTune, AsFT and Safe LoRA cost beside ours?"""
    shared = setting(recipe.MODEL)
    available = trainers(shared, WARM_UP + steps, trl, safetune)
    names = (*available, "asft.official", "guard.prefixes", *["safelora"] * (safelora is not None))
    if missing := sorted(set(only) - set(names)):
        raise UserError(f"--only {' '.join(missing)}: without its folder there is only {' '.join(names)}")
    for name in sorted({*STEPS, *OTHERS} - {*names, *(f"{name}.first" for name in names)}):
        line(f"  {name} is left out: its folder is not given")
    chosen = only or names
    if "asft.official" in chosen:
        values = take_turns(penalties(size), steps)
        bench.timing(f"asft.official.{size}", ratios(values, "theirs", "ours"), rank=RANK)
    if "guard.prefixes" in chosen:
        values = take_turns(prefixes(2, answer_tokens), steps)
        bench.timing("guard.prefixes", ratios(values, "theirs", "ours"), policy=POLICY, answer_tokens=answer_tokens)
    if "safelora" in chosen and safelora is not None:
        models = {"base": load(BASE, dtype="float32").model, "aligned": load(recipe.MODEL, dtype="float32").model}
        for what, ends, turns in (("safelora", models, steps), (f"safelora.{size}", block(size), 2)):
            with tempfile.TemporaryDirectory() as place:
                values = take_turns(repairs(safelora, Path(place), ends), turns, warm_up=0)
            bench.timing(what, ratios(values, "theirs", "ours"))
    if timed := {name: available[name] for name in available if name in chosen}:
        steps_beside(bench, timed, shared, steps)
