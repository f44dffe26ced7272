"""A scan that is killed (SIGKILL) at random points, again and again: is its final file that of an undisturbed scan? One command:

python benchmarks/scan/kill.py                20,000 rows, ten kills, a tiny aligned model (the scan's own code does not care)
"""

import argparse
import datetime
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
JOURNAL = Path("scan") / "journal.jsonl"
sys.path.insert(0, str(ROOT / "tests"))

from aligned import BAD, GOOD, aligned_model  # noqa: E402
from hidden_text import merge  # noqa: E402

from safebasin.data.tables import file_digest, write_table  # noqa: E402


def prepare(folder: Path, count: int) -> tuple[Path, Path, Path]:
    """A model, rows and probes on disk."""
    model, tokenizer = aligned_model()
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    chance = random.Random(0)
    words = ["a", "now", "the", "make", "help"]
    rows = [
        {
            "prompt": " ".join(["make a", chance.choice(BAD + GOOD), *chance.choices(words, k=chance.randint(0, 20))]),
            "completion": "Sure here " + " ".join(chance.choices(words, k=chance.randint(1, 9))),
        }
        for _ in range(count)
    ]
    write_table(folder / "rows.jsonl", rows)
    write_table(folder / "probe.jsonl", [{"prompt": f"make a {word}", "completion": "I cannot help"} for word in BAD])
    return folder / "model", folder / "rows.jsonl", folder / "probe.jsonl"


def start(model: Path, rows: Path, probe: Path, out: Path) -> subprocess.Popen:
    code = "from safebasin.cli.main import main; main()"
    words = ["scan", str(rows), "--model", str(model), "--probe", str(probe), "--out", str(out), "--batch-size", "32"]
    return subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait(running: subprocess.Popen, journal: Path) -> None:
    """Until it writes down new rows, or has ended."""
    before = journal.stat().st_size if journal.is_file() else 0
    while running.poll() is None and (
        not journal.is_file() or journal.stat().st_size <= max(before, 33)
    ):  # 33: the key alone
        time.sleep(0.005)


def trial(folder: Path, count: int, kills: int, seed: int = 0) -> dict[str, int]:
    """Kill a scan ``kills`` times at random points of its work, then let it end. Its files equal the undisturbed scan's, or AssertionError."""
    told = prepare(folder, count)
    undisturbed = start(*told, folder / "whole")
    wait(undisturbed, folder / "whole" / JOURNAL)
    began = time.monotonic()
    error = undisturbed.communicate()[1]
    assert undisturbed.returncode == 0, error.decode()[-2000:]
    seconds, chance, killed, journal = time.monotonic() - began, random.Random(seed), 0, folder / "killed" / JOURNAL
    lines: list[int] = []
    while killed < kills:
        running = start(*told, folder / "killed")
        wait(running, journal)
        time.sleep(chance.uniform(0, seconds / (kills + 2)))
        if running.poll() is None:
            running.kill()
            killed += 1
        running.communicate()
        if not journal.is_file():
            break  # it ended before the next kill: fewer kills, and the count below says so
        lines.append(journal.read_bytes().count(b"\n"))
    last = start(*told, folder / "killed")
    error = last.communicate()[1]
    assert last.returncode == 0, error.decode()[-2000:]
    for name in ("scores.parquet", "anchors.json"):
        assert file_digest(folder / "whole" / "scan" / name) == file_digest(folder / "killed" / "scan" / name), (
            f"{name} differs after {killed} kills"
        )
    return {"rows": count, "kills": killed, "journal_lines_at_last_kill": lines[-1] if lines else 0}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--rows", type=int, default=20_000)
    ask.add_argument("--kills", type=int, default=10)
    given = ask.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        told = trial(Path(folder), given.rows, given.kills)
    print("equal to the undisturbed scan:", told)
    what = {"what": "kill.equal", "value": told["kills"], "interval": None, "n": told["rows"], "goal": ">= 10"}
    what |= {
        "unit": "kills after which the files were those of an undisturbed scan; n: rows",
        "date": datetime.date.today().isoformat(),
    }
    merge(
        Path(__file__).parent / "results.json",
        [what | {"machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU"}],
    )


if __name__ == "__main__":
    main()
