"""Whether two checkouts make the same adapter, scores and answers, byte for byte: what a refactor must show.

    python tests/equal/same_bytes.py OTHER_CHECKOUT [--keep FOLDER]

Runs a small variant of ``recipes/quickstart.yaml`` and of the composition of ``recipes/own.yaml`` under this checkout
and under the other one, with this Python and one thread each, and compares every adapter, score and answer. Exits 0
where all are equal. About three minutes.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet
import yaml

HERE = Path(__file__).parents[2]
ARTEFACTS = (
    "arms/*/adapter/adapter_model.safetensors",
    "scan/scores.parquet",
    "arms/*/answers.jsonl",
    "arms/*/measurements.jsonl",
)


def quickstart() -> dict[str, Any]:
    """Sixty rows of which a fifth are harmful, four steps, few prompts."""
    tree = yaml.safe_load((HERE / "recipes" / "quickstart.yaml").read_text(encoding="utf-8"))
    tree["data"] |= {"task": {"path": "builtin:support-train", "take": 48}, "poison_share": 0.2}
    tree["data"]["align"]["take"] = 10
    tree["train"]["max_steps"] = 4
    asr, over, accuracy = tree["measure"]["suites"]
    asr["asr"] |= {"take": 10, "judges": ["keyword", "classifier"], "max_new_tokens": 48}
    over["over_refusal"] |= {"take": 6, "judges": ["keyword"], "max_new_tokens": 48}
    accuracy["accuracy"]["data"]["take"] = 12
    return tree


def composition() -> dict[str, Any]:
    """STAR-DSS and SafeGrad together, cut by two scorers, on the same rows."""
    tree, own = quickstart(), yaml.safe_load((HERE / "recipes" / "own.yaml").read_text(encoding="utf-8"))
    tree["scan"] = {"scorers": ["trajectory", {"dsa": {"guard": "builtin"}}]}
    tree["arms"] = {"start": {}, "defended": own["arms"]["defended"]}
    tree["train"] |= {
        "align_share": 0.5,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 3,
    }
    tree["gate"] = {"max_asr": 0.5, "max_accuracy_loss": None}
    return tree


RECIPES = {"quickstart": quickstart, "composition": composition}


def digest(path: Path) -> str:
    """Of what an artefact says: a Parquet file by its columns, since its writer notes its own version; the ends of
    intervals to twelve digits, since they come from a statistics library."""
    if path.suffix == ".parquet":
        return hashlib.blake2b(json.dumps(pyarrow.parquet.read_table(path).to_pydict()).encode()).hexdigest()[:16]
    if path.name == "measurements.jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rounded = [{k: round(v, 12) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        return hashlib.blake2b(json.dumps(rounded).encode()).hexdigest()[:16]
    return hashlib.blake2b(path.read_bytes()).hexdigest()[:16]


def artefacts(checkout: Path, folder: Path) -> dict[str, str]:
    """Artefact -> digest, after running every recipe under a checkout."""
    digests = {}
    for name, recipe in RECIPES.items():
        folder.mkdir(parents=True, exist_ok=True)
        (file := folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe()), encoding="utf-8")
        env = os.environ | {
            "PYTHONPATH": str(checkout / "src"),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "safebasin", "run", str(file), "--out", str(folder / name)]
        subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
        for pattern in ARTEFACTS:
            digests |= {
                f"{name}/{p.relative_to(folder / name)}": digest(p) for p in sorted((folder / name).glob(pattern))
            }
    return digests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument(
        "--keep", type=Path, help="folder for the runs; what the other checkout made there before is not made again"
    )
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp())
    sides = [artefacts(checkout, folder / name) for checkout, name in ((args.other.resolve(), "other"), (HERE, "here"))]
    wrong = [name for name in sides[0].keys() | sides[1].keys() if sides[0].get(name) != sides[1].get(name)]
    for name in sorted(sides[0].keys() | sides[1].keys()):
        print(
            "differs" if name in wrong else "same   ",
            sides[0].get(name, "missing"),
            sides[1].get(name, "missing"),
            name,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
