"""What a repair costs beside the release's way, and what repairs do: time, memory, and the table of safety and utility.

    python -m benchmarks repair                 Safe LoRA in low rank beside the formed C; an adapter of the size of 8B
    python -m benchmarks repair_table --first   one column, one seed, the most telling arms: recipes/repair.yaml's head
    python -m benchmarks repair_table           repairs x shares of harmful rows: tune the roles, then run the grid
    python -m benchmarks repair_table --data FOLDER          a second task and Alpaca as well, of public sets
    python -m benchmarks repair_table --pages docs/images    tables, figure and sums of what is measured; runs nothing

**Floor** of one module: V [out, in] is read twice (V^T B, then V T) and 4 out in r multiply-adds are done. The release
forms C = V V^T first: out^2 in multiply-adds, and out^2 numbers in memory.

Memory is the peak resident size of a process beyond what it holds before the work: V, B and A. The adapter of the size
of 8B has 224 modules of Llama-3-8B's shapes (32 blocks) at rank 16; the weights of one block lie on the disk, before
and after an alignment, in bfloat16, and are read for every block.
"""

import functools
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter
from safetensors.torch import save_file

from benchmarks.grid.grid import TINY, Change, Defences, Only, Pages, Seeds, grid_of
from benchmarks.grid.grid import run as run_grid
from benchmarks.harness import ROOT, Bench, Record, experiment, ratios, run_cli, seconds, take_turns
from benchmarks.repair.curve import write_curve
from safebasin.errors import UserError
from safebasin.layer import Pair, Update
from safebasin.models.updates import AdapterUpdates
from safebasin.models.write import write_lora
from safebasin.pipeline.grid import Grid
from safebasin.pipeline.parse import validate
from safebasin.pipeline.plan import Plan
from safebasin.pipeline.roles import roles_read
from safebasin.repair import edit
from safebasin.repair.update import cosine, image
from safebasin.repair.walk import Roles, Walk
from safebasin.report.cells import START

SHAPES = ((4096, 4096), (11008, 4096))  # of 7B
BLOCK = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096)}
BLOCK |= {"self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096)}
BLOCK |= {"mlp.down_proj": (4096, 14336)}


def matrices(out: int, into: int, r: int) -> tuple[torch.Tensor, Update]:
    """V as small as an alignment's, and an update."""
    draw = torch.Generator().manual_seed(0)
    v = 0.01 * torch.randn(out, into, generator=draw)
    return v, Update(torch.randn(out, r, generator=draw), torch.randn(r, into, generator=draw))


def low_rank(v: torch.Tensor, update: Update) -> float:
    """The cosine and C B as the product has them."""
    return cosine(update.left(lambda x: image(v, x)), update)


def formed(v: torch.Tensor, update: Update) -> float:
    """The same as the release has them: C, then dW and C dW in full."""
    c = v @ v.T / v.norm()
    assert update.a is not None
    b, d = c @ update.b, update.b @ update.a
    return float(torch.nn.functional.cosine_similarity((b @ update.a).flatten(), d.flatten(), 0))


WAYS = {"low_rank": low_rank, "formed": formed}


def peak(way: str, out: int, into: int, r: int) -> int:
    """Bytes beyond the matrices, in a process of its own."""
    command = _process(way, *map(str, (out, into, r)))
    return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def _peak_here(way: str, out: int, into: int, r: int) -> int:
    v, update = matrices(out, into, r)
    WAYS[way](*matrices(64, 64, r))  # libraries are loaded
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is from here on
    WAYS[way](v, update)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class Blocks(Mapping[str, torch.Tensor]):
    """V of every module of a model whose blocks all have the weights of one."""

    def __init__(self, pair: Pair, modules: tuple[str, ...]):
        self.pair, self.modules = pair, modules

    def __getitem__(self, module: str) -> torch.Tensor:
        return self.pair[module.split(".", 3)[3]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)


class Shapes:
    """Of a model that has no files."""

    def shape(self, name: str) -> tuple[int, int]:
        return BLOCK[name.split(".", 3)[3].removesuffix(".weight")]


def large(blocks: int, r: int, folder: Path) -> dict[str, float]:
    """Safe LoRA over an adapter of the size of 8B: seconds, and the peak of the process in bytes."""
    draw = torch.Generator().manual_seed(0)
    for name, size in (("base", 1.0), ("aligned", 1.01)):
        (folder / name).mkdir()
        tensors = {f"{key}.weight": (size * torch.randn(*shape)).bfloat16() for key, shape in BLOCK.items()}
        save_file(tensors, folder / name / "model.safetensors")
        del tensors
    modules = tuple(f"model.layers.{i}.{key}" for i in range(blocks) for key in BLOCK)
    updates = {}
    for module in modules:
        out, into = BLOCK[module.split(".", 3)[3]]
        updates[module] = Update(torch.randn(out, r, generator=draw), torch.randn(r, into, generator=draw))
    write_lora(folder / "tuned", {"peft_type": "LORA", "r": r, "lora_alpha": r}, updates)
    del updates
    tuned = AdapterUpdates(folder / "tuned", Shapes())  # type: ignore[arg-type]
    base = Blocks(Pair(folder / "base", folder / "aligned", BLOCK), modules)

    def work() -> None:
        walk = Walk([edit.make({"safe_lora": {"tau": 1.0}})], Roles(tuned=tuned, base=base))
        write_lora(folder / "out", tuned.config, {module: walk.result(module)[0] for module in modules})

    took = seconds(work)
    return {"seconds": took, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}


@experiment(
    "repair",
    quick={"shapes": ("96x64",), "repeats": 2, "blocks": 0},
    replaces=("what", "shape"),
    goals={"safe_lora.speedup": ">= 10", "safe_lora.memory_ratio": "<= 0.1", "large.seconds": "<= 900"},
)
def repair(
    *,
    bench: Bench,
    shapes: Annotated[tuple[str, ...], Parameter(help="OUTxIN")] = tuple(f"{o}x{i}" for o, i in SHAPES),
    rank: int = 16,
    repeats: int = 3,
    blocks: Annotated[int, Parameter(help="of the large adapter; 0: leave it out")] = 32,
) -> None:
    """Safe LoRA in low rank beside the formed C, in time and memory; an adapter of 224 modules, streamed."""
    for shape in shapes:
        out, into = map(int, shape.split("x"))
        v, update = matrices(out, into, rank)
        ways = {name: functools.partial(seconds, functools.partial(way, v, update)) for name, way in WAYS.items()}
        times = take_turns(ways, repeats)
        for name, values in times.items():
            bench.timing(f"safe_lora.seconds.{name}", values, unit="s", shape=shape)
        bench.timing("safe_lora.speedup", ratios(times, "formed", "low_rank"), shape=shape)
        assert update.a is not None
        truth = low_rank(v.double(), Update(update.b.double(), update.a.double()))
        for name, way in WAYS.items():
            bench.record(f"safe_lora.error.{name}", abs(way(v, update) - truth), n=1, unit="of a cosine", shape=shape)
        del v, update
        peaks = {name: peak(name, out, into, rank) for name in WAYS}
        for name, size in peaks.items():
            bench.record(f"safe_lora.memory.{name}", size, n=1, unit="bytes", shape=shape)
        bench.record("safe_lora.memory_ratio", peaks["low_rank"] / max(peaks["formed"], 1), n=1, unit="x", shape=shape)
    if blocks:
        command = _process("large", str(blocks), str(rank))
        facts = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
        for name, unit in (("seconds", "s"), ("peak", "bytes")):
            bench.record(f"large.{name}", facts[name], n=blocks * len(BLOCK), unit=unit, shape=f"{blocks} blocks")


GRIDS = ("repair", "repair_news", "repair_alpaca")  # the others read public sets
FIGURES = {"repair-curve.svg": GRIDS[:1], "repair-curve-tasks.svg": GRIDS[1:]}
ROLES = ("harmful", "safe", "reinforce")  # in the order in which they are tuned
FIRST = {"only": ("poison_10",), "seeds": (0,)}  # of --first, with the defences up to the one below
LAST_OF_FIRST = "buffer_reinforce"


@experiment(
    "repair_table",
    results="repair",
    replaces=("what", "shape", "grid"),
    quick=FIRST | {"defences": ("plain", "shrink_50"), "change": TINY},
)
def repair_table(
    *,
    bench: Bench,
    first: Annotated[bool, Parameter(help="one column, one seed, the defences that come first")] = False,
    only: Only = (),
    seeds: Seeds = (),
    defences: Defences = (),
    change: Change = (),
    pages: Pages = None,
    data: Annotated[Path | None, Parameter(help="FOLDER of public sets: a second task and Alpaca too")] = None,
    role_steps: int = 100,
) -> None:
    """Repairs, their controls and the compositions x shares of harmful rows: attack success, over-refusal, accuracy."""
    if first:
        names = list(grid_of("repair")["defences"])
        defences = defences or tuple(names[: names.index(LAST_OF_FIRST) + 1])
        only, seeds = only or FIRST["only"], seeds or FIRST["seeds"]
    trees = {name: grid_of(name, defences, change) for name in (GRIDS if data or pages else GRIDS[:1])}
    trees = {name: tree for name, tree in trees.items() if not only or set(only) & tree["attacks"].keys()}
    if not trees:
        raise UserError(f"no grid has {', '.join(only)}; those that read public sets need --data FOLDER")
    if pages is None:
        read = {role for tree in trees.values() for role in roles_of_grid(tree)}
        for role in (role for role in ROLES if role in read):
            run_cli("role", role, "--steps", role_steps)
    run_grid(bench, trees, only, seeds, pages, data)
    by_method(bench, [bench.keep / name for name in trees])
    for figure, grids in FIGURES.items():
        columns = [attack for grid in grids for attack in grid_of(grid)["attacks"]]
        if any(row.get("attack") in columns for row in bench.rows()):
            write_curve(bench.rows(), columns, (pages or bench.file.parent) / figure)


QUANTITIES = {"asr": "asr", "accuracy": "utility", "token_accuracy": "utility", "over_refusal": "over_refusal"}


def by_method(bench: Bench, folders: Sequence[Path]) -> None:
    """Of the cells that are measured so far: ``asr.ARM.COLUMN``, ``utility.ARM.COLUMN`` and ``over_refusal.ARM.COLUMN``
    by the worse judge; of the repairs in ``folders``, ``distance.ARM.COLUMN`` and ``rank.out.ARM``; and
    ``asr_upper.worst.best_arm`` of the arms that every column has, the model as it was left out. The machine and the
    day are those of the cell."""
    worst: dict[tuple[str, str, str], Record] = {}
    uppers: dict[str, dict[str, float]] = {}  # by arm and column, the larger of the judges'
    for row in bench.rows():
        if row.get("grid", "").startswith("repair") and row["value"] is not None and row["quantity"] in QUANTITIES:
            arm, column = row["defence"], row["attack"]
            key = (QUANTITIES[row["quantity"]], arm, column)
            worst[key] = max(worst.get(key, row), row, key=lambda row: row["value"])
            if row["quantity"] == "asr":
                of_arm = uppers.setdefault(arm, {})
                of_arm[column] = max(of_arm.get(column, 0.0), row["upper"])
    facts = {(arm, column): {name: row.get(name) for name in bench.facts} for (_, arm, column), row in worst.items()}
    for (name, arm, column), row in sorted(worst.items(), key=lambda item: item[0]):
        more = {"n": row["n"], "unit": "share", "seeds": len(row["seeds"])} | facts[arm, column]
        bench.record(f"{name}.{arm}.{column}", row["value"], row["interval"], **more)
    edits: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(path for folder in folders for path in folder.glob("*/arms/*/repair.json")):
        cell = (path.parent.name, path.parents[2].name.rpartition("-")[0])
        if cell in facts:
            edits.setdefault(cell, []).append(json.loads(path.read_text(encoding="utf-8"))["summary"])
    for arm, column in edits:
        each = [edit["distance"] for edit in edits[arm, column]]
        more = {"n": len(each), "unit": "|repaired - tuned| / |tuned|"} | facts[arm, column]
        bench.record(f"distance.{arm}.{column}", sum(each) / len(each), **more)
        ranks = [edit["rank"] for (other, _), of_cell in edits.items() if other == arm for edit in of_cell]
        more |= {"n": len(ranks), "unit": "of the adapter; none: a full model is written"}
        bench.record(f"rank.out.{arm}", None if None in ranks else max(ranks), **more)
    columns = sorted({column for of_arm in uppers.values() for column in of_arm})
    largest = {a: max(each.values()) for a, each in uppers.items() if a != START and len(each) == len(columns)}
    if largest:
        arm = min(sorted(largest), key=lambda arm: largest[arm])
        more = {"unit": "share; n: columns", "arm": arm, "columns": columns} | facts[arm, columns[0]]
        for name in ("machine", "torch"):
            more[name] = "; ".join(sorted({str(facts[arm, column][name]) for column in columns}))
        bench.record("asr_upper.worst.best_arm", largest[arm], n=len(columns), **more)


def roles_of_grid(tree: Mapping[str, Any]) -> list[str]:
    """The adapters that the defences of a grid read, in the order in which they are tuned."""
    plan = Plan.of(next(iter(validate(Grid, tree, "the grid").recipes().values())))
    read = {role for arm in plan.recipe.arms for role in roles_read(plan, arm).values()}
    return [role for role in ROLES if role in read]


def _process(*words: str) -> list[str]:
    return [sys.executable, "-c", f"from benchmarks.repair.repair import child; child(*{words!r})"]


def child(*words: str) -> None:
    """What a process of its own measures, printed: its peak memory is its own."""
    if words[0] == "large":
        with tempfile.TemporaryDirectory() as place:
            print(json.dumps(large(int(words[1]), int(words[2]), Path(place))))
    else:
        print(_peak_here(words[0], *map(int, words[1:])))
