"""A scan that is killed (SIGKILL) at random points, again and again: are its files those of an undisturbed scan?

The model is the tests' tiny aligned one: the code of the scan is the same for every model.
"""

import sys
import tempfile
from pathlib import Path

from benchmarks.harness import ROOT, Bench, experiment

UNIT = "kills after which the files were those of an undisturbed scan; n: rows"


@experiment("kill", results="scan", replaces=("what",), goals={"kill.equal": ">= 10"}, quick={"rows": 1500, "kills": 1})
def kill(*, bench: Bench, rows: int = 20_000, kills: int = 10) -> None:
    """Is a scan that is killed ten times the scan that is not?"""
    sys.path.insert(0, str(ROOT / "tests"))
    from runs import trial

    with tempfile.TemporaryDirectory() as folder:
        outcome = trial(Path(folder), rows, kills)
    bench.record("kill.equal", outcome["kills"], n=outcome["rows"], unit=UNIT)
