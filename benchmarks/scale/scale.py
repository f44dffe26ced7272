"""Sizes: does a scan's memory grow with the rows, do actors make the bytes of one process, and how long does it take to
go on and to report at 100,000?

The floor, named before the measurement: reading 100,000 lines of JSON costs 0.5 s of a CPU, listing 100,000 names
0.1 s. The model is the tests' tiny aligned one. Seconds of `resume` and `report` are CPU seconds of one process, so
that other jobs of the machine do not count; on an idle machine they are those of a clock.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from benchmarks.harness import ROOT, Bench, experiment
from safebasin.data.files import write_json
from safebasin.data.tables import write_table
from safebasin.errors import UserError

PARTS = Path("scan") / "parts"
GOALS = {
    "scan.memory.growth": "<= 1.1",
    "ray.equal": ">= 1",
    "ray.speedup": ">= 1.8",
    "resume.seconds.100k": "<= 5",
    "report.seconds.100k": "<= 6",
}
QUICK = {"rows": (64, 512), "parts": 1000, "report_rows": 1000}
SCANNED = "files of a scan by two actors, one of them killed, equal those of one process; n: rows"


@experiment("scale", replaces=("what",), goals=GOALS, quick=QUICK)
def scale(
    *,
    bench: Bench,
    only: Annotated[str, Parameter(help="memory, ray, speedup, resume or report; default all but speedup")] = "",
    rows: Annotated[tuple[int, int], Parameter(help="of the scans whose memory is compared")] = (2_000, 200_000),
    parts: int = 100_000,
    report_rows: int = 100_000,
) -> None:
    """Does memory grow with the rows, do killed actors change a byte, and what do 100,000 rows and parts cost?"""
    sys.path.insert(0, str(ROOT / "tests"))
    ways: dict[str, Callable[[Path], None]] = {
        "resume": lambda folder: _resume(bench, folder, parts),
        "report": lambda folder: _report(bench, folder, report_rows),
        "ray": lambda folder: _equal(bench, folder),
        "memory": lambda folder: _memory(bench, folder, rows),
        "speedup": lambda folder: _speedup(bench, folder),
    }
    if only and only not in ways:
        raise UserError(f"--only takes one of {', '.join(ways)}, found {only}")
    for name in [only] if only else [name for name in ways if name != "speedup"]:
        with tempfile.TemporaryDirectory() as folder:
            ways[name](Path(folder))


def _memory(bench: Bench, folder: Path, rows: tuple[int, int]) -> None:
    """Peak resident memory of the process that scans; another one has written the rows."""
    from runs import prepare, scan_in_shards, shard_recipe

    peaks = []
    for count in rows:
        place = folder / str(count)
        recipe = shard_recipe(place, prepare(place, count), 4096, "here", "[self_refusal]")
        _finish(scan_in_shards(recipe, place / "out", "rows"))
        _finish(scan_in_shards(recipe, place / "out"))
        peaks.append(int((place / "out" / "peak").read_text()) / 1024)
        bench.record(f"scan.memory.{count}", peaks[-1], n=count, unit="MiB, peak of the process that scans")
    bench.record("scan.memory.growth", peaks[1] / peaks[0], n=rows[1], unit=f"peak at {rows[1]} rows / at {rows[0]}")


def _equal(bench: Bench, folder: Path) -> None:
    from runs import kill_an_actor, prepare, scan_in_shards, shard_recipe

    files, outcomes = prepare(folder, 512), []
    for engine in ("here", "{ray: {workers: 2}}"):
        out = folder / f"out{len(outcomes)}"
        recipe = shard_recipe(folder, files, 32, engine, "[gradshield, self_refusal, hidden_text]")
        running = scan_in_shards(recipe, out)
        if outcomes and not kill_an_actor(running, out / PARTS):
            raise UserError("no actor was killed: the scan had ended")
        _finish(running)
        outcomes.append({file.name: file.read_bytes() for file in (out / "scan").iterdir()})
    bench.record("ray.equal", int(outcomes[0] == outcomes[1]), n=512, unit=SCANNED)


def _speedup(bench: Bench, folder: Path) -> None:
    """Parts a second between the first parts and the last, so that starting processes does not count."""
    from runs import prepare, scan_in_shards, shard_recipe

    files, rates = prepare(folder, 16_384), []
    for engine in ("here", "{ray: {workers: 2}}"):
        out = folder / f"out{len(rates)}"
        running = scan_in_shards(shard_recipe(folder, files, 256, engine, "[gradshield]"), out)
        times: list[float] = []
        while running.poll() is None:
            there = len(list((out / PARTS).glob("*.parquet")))
            times += [time.monotonic()] * max(0, there - len(times))
            time.sleep(0.02)
        _finish(running)
        rates.append((len(times) - 5) / (times[-1] - times[4]))
    load = os.getloadavg()[0]
    bench.record("ray.speedup", rates[1] / rates[0], n=64, unit="x one process, shards a second", load=round(load, 1))


def _resume(bench: Bench, folder: Path, parts: int) -> None:
    """Cut the shards, open the folder, and see that nothing is missing."""
    from safebasin.scan.shard import cut_shards
    from safebasin.spread.parts import Parts

    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "make a cake", "completion": "Sure here are the steps"}\n' * parts)
    Parts(folder / "parts", "key", ".parquet").open()
    for shard in cut_shards(rows, 1):
        (folder / "parts" / f"{shard.name}.parquet").touch()
    start = time.process_time()
    again = Parts(folder / "parts", "key", ".parquet")
    again.open()
    missing = again.missing(cut_shards(rows, 1))
    seconds = time.process_time() - start
    if missing:
        raise UserError(f"{len(missing)} parts are missing")
    bench.record(f"resume.seconds.{parts // 1000}k", seconds, n=parts, unit="CPU seconds until nothing is missing")


def _report(bench: Bench, folder: Path, rows: int) -> None:
    """`safebasin report` on a run folder of two arms, 300 answers each, whose scan has scores of tokens."""
    run = report_folder(folder / "run", rows)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "safebasin", "report", str(run)], env=environment, stdout=subprocess.DEVNULL
    )
    usage = _finish(process)
    seconds = usage.ru_utime + usage.ru_stime
    bench.record(f"report.seconds.{rows // 1000}k", seconds, n=rows, unit="CPU seconds of `safebasin report`")


def report_folder(run: Path, rows: int) -> Path:
    """A run folder with ``rows`` scanned rows of which 2 % are cut: harmless words and random scores."""
    import numpy as np
    import pyarrow.parquet

    from safebasin.data.example import read_examples
    from safebasin.data.files import file_digest
    from safebasin.scan.scan import Scanned, score_table

    chance = np.random.default_rng(0)
    table = [{"prompt": f"route message {k}: my bill is late", "completion": "billing"} for k in range(rows)]
    for name in ("data", "scan", "cut/defended", *(f"arms/{arm}" for arm in ("start", "defended"))):
        (run / name).mkdir(parents=True)
    write_table(run / "data" / "train.jsonl", table)
    examples = read_examples(enumerate(table, 1)).examples
    scores = chance.normal(size=rows)
    tokens = chance.normal(size=(rows, 8)).tolist()
    scanned = Scanned({"gradshield": scores.tolist()}, {"gradshield": tokens}, {})
    pyarrow.parquet.write_table(score_table(examples, scanned), run / "scan" / "scores.parquet")
    write_json(run / "scan" / "anchors.json", {})
    origins = ["poison" if score > 2 else "task" for score in scores]
    write_json(
        run / "data" / "rows.json",
        [{"id": e.id, "line": e.line, "origin": o} for e, o in zip(examples, origins, strict=True)],
    )
    removed = [
        {"row_id": e.id, "line": e.line, "score": score, "reason": "score above the threshold"}
        for e, score in zip(examples, scores.tolist(), strict=True)
        if score > 2.05
    ]
    cut: dict[str, Any] = {
        "scorer": "gradshield",
        "threshold": 2.05,
        "estimator": "anchors",
        "kept": rows - len(removed),
    }
    write_json(run / "cut" / "defended" / "cut.json", cut | {"removed": removed})
    for file in ("data/problems.json", "scan/problems.json", "scan/heat.json"):
        write_json(run / file, [])
    for arm, complied in (("start", 10), ("defended", 12)):
        answer = {
            "suite": "asr",
            "category": "",
            "prompt": "a request",
            "answer": "I cannot help.",
            "expected": None,
            "correct": None,
            "scores": {},
        }
        write_table(
            run / "arms" / arm / "answers.jsonl",
            [
                answer | {"id": str(k), "verdicts": {"keyword": "complied" if k < complied else "refused"}}
                for k in range(300)
            ],
        )
        share = complied / 300
        write_table(
            run / "arms" / arm / "measurements.jsonl",
            [
                {
                    "suite": "asr",
                    "what": "asr",
                    "value": share,
                    "low": share / 2,
                    "high": share * 2,
                    "n": 300,
                    "unscored": 0,
                    "off_task": 0,
                    "unit": "share",
                    "judge": "keyword",
                    "category": "",
                    "evidence": "answers.jsonl",
                }
            ],
        )
    (run / "run.yaml").write_text("arms: [start, defended]\n")
    files = {file.relative_to(run).as_posix(): file_digest(file) for file in run.rglob("*") if file.is_file()}
    step = {"digest": "0" * 32, "inputs": {}, "outputs": files, "versions": {}, "seconds": 1.0}
    write_json(
        run / "manifest.json", {"model": "tiny", "seed": 0, "versions": {}, "machine": "", "steps": {"data": step}}
    )
    return run


def _finish(running: "subprocess.Popen[bytes]") -> resource.struct_rusage:
    """What a process used, when it has ended.

    Raises:
        UserError: it failed.
    """
    error = running.stderr.read().decode() if running.stderr else ""
    _, status, usage = (0, running.returncode, None) if running.returncode is not None else os.wait4(running.pid, 0)
    running.returncode = running.returncode if running.returncode is not None else os.waitstatus_to_exitcode(status)
    if running.stderr:
        running.stderr.close()
    if running.returncode:
        raise UserError(f"a process ended with {running.returncode}: {error[-2000:]}")
    return usage or resource.getrusage(resource.RUSAGE_CHILDREN)
