"""The command line in processes of its own: a tiny aligned model and rows on disk, a scan, a scan that is killed."""

import contextlib
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
from aligned import BAD, GOOD, aligned_model

from safebasin.data.files import file_digest
from safebasin.data.tables import write_table

JOURNAL = Path("scan") / "parts" / "000000.jsonl"
KEY = 33  # bytes of the journal's first line, which holds the key and no row


def prepare(folder: Path, count: int) -> tuple[Path, Path, Path]:
    """A model, ``count`` rows and probes on disk."""
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


def start(model: Path, rows: Path, probe: Path, out: Path) -> subprocess.Popen[bytes]:
    """A scan that runs."""
    words = ["scan", str(rows), "--model", str(model), "--probe", str(probe), "--out", str(out), "--batch-size", "32"]
    command = [sys.executable, "-m", "safebasin", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait(running: subprocess.Popen[bytes], journal: Path) -> None:
    """Until it has written new rows to its journal, or has ended."""
    before = journal.stat().st_size if journal.is_file() else 0
    while running.poll() is None and (not journal.is_file() or journal.stat().st_size <= max(before, KEY)):
        time.sleep(0.005)


def end(running: subprocess.Popen[bytes]) -> None:
    """Let it end; AssertionError with its last words where it fails."""
    error = running.communicate()[1]
    assert running.returncode == 0, error.decode()[-2000:]


def trial(folder: Path, count: int, kills: int, seed: int = 0) -> dict[str, int]:
    """Kill a scan ``kills`` times at random points of its work, then let it end.

    Raises:
        AssertionError: its files are not those of an undisturbed scan.
    """
    files = prepare(folder, count)
    undisturbed = start(*files, folder / "undisturbed")
    wait(undisturbed, folder / "undisturbed" / JOURNAL)
    began = time.monotonic()
    end(undisturbed)
    seconds, chance, killed, journal = time.monotonic() - began, random.Random(seed), 0, folder / "killed" / JOURNAL
    lines = 0
    while killed < kills:
        running = start(*files, folder / "killed")
        wait(running, journal)
        time.sleep(chance.uniform(0, seconds / (kills + 2)))
        if running.poll() is None:
            running.kill()
            killed += 1
        running.communicate()
        if not journal.is_file():
            break  # it ended before the next kill: there are fewer, as the returned number shows
        lines = journal.read_bytes().count(b"\n")
    end(start(*files, folder / "killed"))
    for name in ("scores.parquet", "anchors.json"):
        pair = [file_digest(folder / run / "scan" / name) for run in ("undisturbed", "killed")]
        assert pair[0] == pair[1], f"{name} differs after {killed} kills"
    return {"rows": count, "kills": killed, "journal_lines_at_last_kill": lines}


SCAN = """
import sys
from pathlib import Path
from safebasin.pipeline.parse import parse
from safebasin.pipeline.run import Run
with Run(parse(Path(sys.argv[1]).read_text()), Path(sys.argv[2])) as run:
    run.measure("start") if sys.argv[3] == "measure" else getattr(run, sys.argv[3])
status = Path("/proc/self/status").read_text()  # of this program alone: ru_maxrss begins with that of its parent
(Path(sys.argv[2]) / "peak").write_text(status.partition("VmHWM:")[2].split()[0])  # KiB
"""


def shard_recipe(
    folder: Path, files: tuple[Path, Path, Path], shard: int, engine: str, scorers: str, suites: str = "[]"
) -> Path:
    """A recipe on disk that scans ``files`` (see ``prepare``) in shards."""
    model, rows, probe = files
    path, safe = folder / "recipe.yaml", folder / "safe.jsonl"  # not the rows themselves: anchors are read as a whole
    write_table(safe, [{"prompt": f"make a {word}", "completion": "Sure here are the steps"} for word in GOOD])
    path.write_text(
        f"model: {{name: {model}, dtype: float32}}\n"
        f"data: {{task: {{path: {rows}}}, probe: {{path: {probe}}},\n"
        f"  harmful: {{path: {probe}}}, safe: {{path: {safe}}}}}\n"
        f"scan: {{scorers: {scorers}, batch_size: 8, shard: {shard}}}\n"
        f"arms: {{start: {{}}}}\nmeasure: {{suites: {suites}}}\nengine: {engine}\n"
    )
    return path


def scan_in_shards(recipe: Path, out: Path, what: str = "scores") -> subprocess.Popen[bytes]:
    """The steps up to ``what`` (rows, scores, measure) of a recipe, in a process of their own."""
    command = [sys.executable, "-c", SCAN, str(recipe), str(out), what]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_an_actor(driver: subprocess.Popen[bytes], parts: Path) -> int:
    """SIGKILL one of the actors of a scan when the first part is there; its pid, 0 where the scan ended before."""
    while driver.poll() is None and not list(parts.glob("*.parquet")):
        time.sleep(0.01)
    for process in psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else ():
        with contextlib.suppress(psutil.Error):
            if "ray::Remote" in " ".join(process.cmdline()):
                process.kill()
                return process.pid
    return 0
