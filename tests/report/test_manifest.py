"""The report and the gate against the manifest: a file that is not as its step wrote it proves nothing."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from conftest import STEPS, record

from safebasin.errors import UserError
from safebasin.report import gate, table
from safebasin.report.manifest import changed_outputs, evidence_digest, evidence_problems, read_manifest

pytestmark = pytest.mark.usefixtures("no_figures")
EVIDENCE = [
    *("data/train.jsonl", "data/rows.json", "data/problems.json", "scan/scores.parquet", "cut/defended/cut.json"),
    *("arms/start/measurements.jsonl", "arms/plain/answers.jsonl", "arms/defended/train.json"),
    "arms/defended/adapter/adapter_model.safetensors",
]
STALE = "the report was made from other files than the run holds now; make it again: safebasin report"


@pytest.fixture
def measured(run: Path) -> Path:
    """A run with an adapter, and its report, which passes."""
    adapter = run / "arms" / "defended" / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    assert table.write_report(record(run)).verdict.code == 0
    assert gate.read_verdict(run).code == 0
    return run


def edit(path: Path) -> None:
    """Other bytes with the same content."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(path), path, compression="none")
    else:
        path.write_bytes(path.read_bytes() + b"\n")


@pytest.mark.parametrize("name", EVIDENCE)
def test_an_edited_file_is_reported_and_decides_nothing(measured: Path, name: str):
    edit(measured / name)
    verdict = gate.read_verdict(measured)
    assert verdict.code == 4 and verdict.reasons == (f"{STALE} {measured}",)
    report = table.write_report(measured)
    reason = f"{name} was edited after it was measured"
    assert report.verdict.code == 4 and report.verdict.reasons[0] == reason
    assert [problem.reason for problem in report.problems if problem.place == "evidence"] == [reason]
    assert reason in (measured / "report.html").read_text() and gate.read_verdict(measured) == report.verdict


@pytest.mark.parametrize("name", ["arms/plain/train.json", "arms/defended/adapter/adapter_model.safetensors"])
def test_a_missing_file_is_reported_and_decides_nothing(measured: Path, name: str):
    (measured / name).unlink()
    assert gate.read_verdict(measured).reasons == (f"{STALE} {measured}",)
    assert table.write_report(measured).verdict.reasons[0] == f"{name} is missing"
    assert gate.read_verdict(measured).code == 4


@pytest.mark.parametrize("name", ["scan/heat.json", "scan/problems.json", "arms/plain/problems.json"])
def test_a_file_that_no_step_wrote_decides_nothing(measured: Path, name: str):
    (measured / name).write_text("[]")
    assert gate.read_verdict(measured).reasons == (f"{STALE} {measured}",)
    report = table.write_report(measured)
    assert report.verdict.reasons[0] == f"{name} is not in the manifest: no step of this run wrote it"
    assert report.verdict.code == 4


def test_an_arm_that_another_run_measured_decides_nothing(measured: Path):
    shutil.copytree(measured / "arms" / "start", measured / "arms" / "better")
    report = table.write_report(measured)
    assert report.verdict.code == 4
    assert [reason.split()[0] for reason in report.evidence_problems] == [
        f"arms/better/{name}.jsonl" for name in ("answers", "measurements")
    ]


def test_a_file_that_comes_back_counts_again(measured: Path):
    path = measured / "arms" / "plain" / "answers.jsonl"
    text = path.read_bytes()
    edit(path)
    table.write_report(measured)
    path.write_bytes(text)
    assert gate.read_verdict(measured).reasons == (f"{STALE} {measured}",), "the report still calls the file edited"
    table.write_report(measured)
    assert gate.read_verdict(measured).code == 0


@pytest.mark.parametrize("manifest", [None, {}, {"steps": {}}, {"model": "m"}])
def test_without_steps_nothing_was_measured_here(measured: Path, manifest: dict[str, Any] | None):
    path = measured / "manifest.json"
    path.unlink() if manifest is None else path.write_text(json.dumps(manifest))
    assert gate.read_verdict(measured).code == 4
    report = table.write_report(measured)
    assert report.verdict.code == 4 and "nothing shows that its numbers were measured here" in report.verdict.reasons[0]


def test_steps_without_outputs_prove_nothing(measured: Path):
    """A manifest of a version that did not record outputs: one reason, not one for every file."""
    manifest = json.loads((measured / "manifest.json").read_text())
    for step in manifest["steps"].values():
        del step["outputs"]
    (measured / "manifest.json").write_text(json.dumps(manifest))
    assert gate.read_verdict(measured).code == 4
    report = table.write_report(measured)
    assert report.verdict.code == 4 and len(report.evidence_problems) == 1


def test_a_step_that_ran_again_makes_the_report_stale(measured: Path):
    """The files are the same, but a step has other inputs; seconds alone change nothing."""
    path = measured / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["steps"]["scan"]["seconds"] = 99.0
    path.write_text(json.dumps(manifest))
    assert gate.read_verdict(measured).code == 0
    manifest["steps"]["scan"]["digest"] = "f" * 32
    path.write_text(json.dumps(manifest))
    assert gate.read_verdict(measured).reasons == (f"{STALE} {measured}",)


def test_the_card_may_be_edited(measured: Path):
    edit(measured / "arms" / "defended" / "adapter" / "README.md")
    assert gate.read_verdict(measured).code == 0


def test_the_digest_by_hand():
    """blake2b over the steps' digests and outputs, in the order of the names."""
    steps = {"scan": {"digest": "b", "seconds": 3.5}, "data": {"digest": "a", "outputs": {"data/rows.json": "0"}}}
    text = '{"data": ["a", {"data/rows.json": "0"}], "scan": ["b", {}]}'
    assert evidence_digest({"steps": steps}) == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    assert evidence_digest({}) == evidence_digest({"steps": {}, "model": "m"})


def test_two_steps_that_wrote_one_file(run: Path):
    """The later one counts."""
    old, new = "0" * 32, hashlib.blake2b(b"two", digest_size=16).hexdigest()
    (run / "data" / "rows.json").write_bytes(b"two")
    first, second = ({"digest": "", "outputs": {"data/rows.json": digest}} for digest in (old, new))
    assert changed_outputs(run, {"steps": {"a": first, "b": second}}) == []
    assert changed_outputs(run, {"steps": {"b": second, "a": first}}) == ["data/rows.json"]


@pytest.mark.parametrize(
    "manifest",
    [
        *(3, [], "text", None, {"steps": []}, {"steps": {"scan": 3}}, {"steps": {"scan": {}}}),
        *({"steps": {"scan": {"digest": "a"} | wrong}} for wrong in ({"outputs": []}, {"outputs": {"a": 1}})),
        *(
            {"steps": {"scan": {"digest": "a", "outputs": {path: "0"}}}}
            for path in ("../up", "a/../../b", "/etc/passwd", "a\0b")
        ),
        *({"steps": {"scan": {"digest": "a", "seconds": time}}} for time in ("1", None, float("nan"), -1)),
    ],
)
def test_a_manifest_of_another_shape_is_a_user_error(measured: Path, manifest: Any):
    (measured / "manifest.json").write_text(json.dumps(manifest))
    for read in (read_manifest, table.collect, gate.read_verdict):
        with pytest.raises(UserError, match=r"manifest\.json is not the manifest of a run"):
            read(measured)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000, b"[" * 60 + b"]" * 60, b"1" * 5000])
@pytest.mark.parametrize("name", ["manifest.json", "report.json"])
def test_a_damaged_file_is_a_user_error(measured: Path, name: str, text: bytes):
    (measured / name).write_bytes(text)
    with pytest.raises(UserError, match=rf"{name}[ ,:]"):
        gate.read_verdict(measured)


@pytest.mark.parametrize("name", ["x" * 5000, "data", "rows\u202e.json", "."])
def test_a_name_that_no_file_has_is_missing(run: Path, name: str):
    manifest = {"steps": {"scan": {"digest": "a", "outputs": {name: "0"}}}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert changed_outputs(run, read_manifest(run)) == [name]
    assert evidence_problems(run, read_manifest(run))[0].endswith(" is missing")


@pytest.mark.parametrize(
    "change",
    [
        *({"schema": schema} for schema in (1, "2", None)),
        {"evidence_digest": None},
        *({"verdict": verdict} for verdict in (None, 4, [], {}, {"code": 0, "status": "pass"})),
        *({"verdict": {"code": code, "status": "pass", "reasons": ["r"]}} for code in (3, 4, "0", None, False, 0.5)),
        *({"verdict": {"code": 0, "status": status, "reasons": ["r"]}} for status in ("fail", "PASS", None, [])),
        *({"verdict": {"code": 0, "status": "pass", "reasons": reasons}} for reasons in ("r", [], [3], None, {"r": 1})),
    ],
)
def test_a_report_of_another_shape_is_no_verdict(measured: Path, change: dict[str, Any]):
    path = measured / "report.json"
    report = json.loads(path.read_text()) | change
    path.write_text(json.dumps(report))
    if report["evidence_digest"] is None:
        assert gate.read_verdict(measured).code == 4
        return
    with pytest.raises(UserError, match=r"report.json is not a report of this version .* safebasin report"):
        gate.read_verdict(measured)


@pytest.mark.parametrize("key", ["schema", "verdict", "evidence_digest", "evidence_problems", "readings"])
def test_a_report_without_a_key_is_no_verdict(measured: Path, key: str):
    path = measured / "report.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))
    with pytest.raises(UserError, match=r"report.json is not a report of this version"):
        gate.read_verdict(measured)


def test_reasons_of_a_report_are_printable(measured: Path):
    path = measured / "report.json"
    report = json.loads(path.read_text())
    report["verdict"]["reasons"] = ["\x1b[31mred\u202e"]
    path.write_text(json.dumps(report))
    assert gate.read_verdict(measured).reasons == ("<U+001B>[31mred<U+202E>",)


def test_the_fixture_lists_every_step():
    assert set(STEPS) == {"data", "scan", "cut.defended", "repair.defended"} | {
        *("train.plain", "train.defended", "measure.start", "measure.plain", "measure.defended")
    }
