"""Every file that the report reads, with any content: an inconclusive report, or one line of error with the path."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from conftest import make_run, record
from hypothesis import HealthCheck, given, settings

from safebasin.errors import UserError
from safebasin.report import figure, gate, table

JSON_FILES = [
    *("manifest.json", "data/rows.json", "data/problems.json", "scan/heat.json", "cut/defended/cut.json"),
    "arms/plain/train.json",
]
LINES = ["arms/defended/answers.jsonl", "arms/defended/measurements.jsonl", "data/train.jsonl"]
HEAT = [{"row_id": "a", "line": 1, "scorer": "s", "score": 1.0, "tokens": [["x", 1.0], ["y", None]]}]
text = st.text(st.characters(codec=None), max_size=20)  # lone surrogates too
scalars = st.one_of(
    st.sampled_from([None, True, 0, -1, 1e308, math.nan, math.inf, 10**400, 2**63, "", "share", "complied", "\ud800"]),
    st.floats(allow_nan=True),
    text,
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=6
)
fuzz = settings(
    max_examples=int(os.environ.get("SAFEBASIN_FUZZ", "12")),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One run for all examples: each changes one file and puts it back. No figures: they take seconds."""
    run = make_run(tmp_path_factory.mktemp("hostile") / "run")
    (run / "scan" / "heat.json").write_text(json.dumps(HEAT))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("arms", "scores", "loss"):
            patch.setattr(figure, name, lambda *_: None)
        assert table.write_report(record(run)).verdict.code == 0
        yield run


def check(run: Path, name: str, content: bytes) -> None:
    """Write the report over a file of this content. A file that is not as it was measured never passes."""
    path, before = run / name, (run / name).read_bytes()
    path.write_bytes(content)
    try:
        report = table.write_report(run, show_text=True)
        assert report.verdict.code == 4 or content == before or name in ("manifest.json", "run.yaml")
        json.loads((run / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert gate.read_verdict(run) == report.verdict
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        assert str(path) in str(error) or (name == "run.yaml" and str(error).startswith(("gate", str(run)))), error
    finally:
        path.write_bytes(before)


def replaced(data: st.DataObject, value: Any) -> Any:
    """The value with one part of it, at any depth, removed or replaced by anything."""
    if isinstance(value, dict | list) and value and data.draw(st.integers(0, 5)):
        copy = value.copy()
        key = data.draw(st.sampled_from(list(value) if isinstance(value, dict) else range(min(len(value), 3))))
        if data.draw(st.integers(0, 5)):
            copy[key] = replaced(data, value[key])
        else:
            del copy[key]
        return copy
    return data.draw(values)


@pytest.mark.parametrize("name", JSON_FILES)
@fuzz
@given(data=st.data())
def test_any_json_in_any_place(folder: Path, name: str, data: st.DataObject):
    check(folder, name, json.dumps(replaced(data, json.loads((folder / name).read_text()))).encode())


@pytest.mark.parametrize("name", LINES)
@fuzz
@given(data=st.data())
def test_any_json_in_a_line(folder: Path, name: str, data: st.DataObject):
    first, *others = (folder / name).read_text().splitlines()
    content = "\n".join([json.dumps(replaced(data, json.loads(first))), *others])
    check(folder, name, content.encode())


@fuzz
@given(data=st.data())
def test_any_value_in_the_recipe(folder: Path, data: st.DataObject):
    tree = replaced(data, yaml.safe_load((folder / "run.yaml").read_text()))
    content = json.dumps(tree, ensure_ascii=data.draw(st.booleans()))  # JSON is YAML, or nearly so
    check(folder, "run.yaml", content.encode("utf-8", "replace"))


@fuzz
@given(data=st.data())
def test_any_json_in_the_report(folder: Path, data: st.DataObject):
    """What the gate reads: a verdict with its own exit code, or one line of error."""
    stated = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps(replaced(data, stated)))
    try:
        verdict = gate.read_verdict(folder)
        assert gate.CODES[verdict.status] == verdict.code and verdict.reasons
    except UserError as error:
        assert "\n" not in str(error) and str(folder / "report.json") in str(error)
    finally:
        (folder / "report.json").write_text(json.dumps(stated))


columns = st.sampled_from(
    [
        [1.0, math.nan],
        [1e308, -1e308],
        [5e-324, 1e300],
        [2**62, -(2**62)],
        ["a", "b"],
        [None, None],
        [[1.0], []],
        [True, False],
    ]
)


@fuzz
@given(ids=columns | st.none(), scores=columns | st.none())
def test_any_columns_of_scores(folder: Path, tmp_path: Path, ids: list[Any] | None, scores: list[Any] | None):
    rows = [row["id"] for row in json.loads((folder / "data" / "rows.json").read_text())[:2]]
    table_of = {"line": [1, 2], "row_id": ids or rows} | ({"score_gradshield": scores} if scores else {})
    pyarrow.parquet.write_table(pyarrow.table(table_of), tmp_path / "scores.parquet")
    check(folder, "scan/scores.parquet", (tmp_path / "scores.parquet").read_bytes())


@pytest.mark.parametrize("name", [*JSON_FILES, *LINES, "run.yaml", "scan/scores.parquet"])
@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"{", b"null", b"[" * 3000, b"1" * 5000, b"\0", b"!!int ''", b"&a [*a]", b"PAR1"]
)
def test_any_bytes(folder: Path, name: str, content: bytes):
    check(folder, name, content)


@pytest.mark.parametrize(
    "name", ["manifest.json", "report.json", "run.yaml", "scan/heat.json", "arms/plain/train.json"]
)
def test_a_folder_in_the_place_of_a_file(run: Path, name: str, no_figures: None):
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()
    for read in (table.collect, gate.read_verdict):
        try:
            assert read(run)
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("arm", ["..", "", ".", "a/b", "../../other", "\u202e", "x" * 200, "a\\b", "line\nline"])
def test_an_arm_is_a_folder_of_the_run(run: Path, arm: str, no_figures: None):
    """The report writes a card beside an arm's adapter: no name leads out of the run."""
    (run / "run.yaml").write_text(yaml.safe_dump({"arms": ["start", arm]}))
    with pytest.raises(UserError, match="an arm's name is a plain folder name"):
        table.write_report(run)


def test_a_damaged_copy_of_a_run(run: Path, tmp_path: Path, no_figures: None):
    """Any single file cut in half; half a recipe can be a recipe, and is no evidence."""
    for path in sorted(path for path in run.rglob("*") if path.is_file() and path.name != "run.yaml"):
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        half = copy / path.relative_to(run)
        half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
        try:
            assert table.write_report(copy).verdict.code == 4, path
        except UserError as error:
            assert str(copy) in str(error) or str(error).startswith("gate")
        shutil.rmtree(copy)
