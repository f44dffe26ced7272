"""Scores on disk: what was written is read again, and a damaged file is one line with its path."""

import json
import random
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from aligned import GOOD, example
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_scores

from safebasin.data.files import write_json
from safebasin.errors import UserError
from safebasin.scan.heat import HEAT, worst_rows
from safebasin.scan.scan import Scanned
from safebasin.scan.scores import ANCHORS, Scores, read_scores

EXAMPLES = [example(f"make a {word}", "Sure", line) for line, word in enumerate(GOOD, 1)]
ROWS = {"a": [0.25 * i for i in range(6)], "b": [1.0] * 6}
TOKENS = {"b": [[0.25] * i for i in range(6)]}
ANCHOR_SCORES = {"a": {"harmful": [9.0], "safe": [-1.0, 0.1]}}
SCANNED = Scanned(ROWS, TOKENS, ANCHOR_SCORES, frozenset({"row2"}))
COLUMNS = {"row_id": ["one", "two"], "line": [1, 2], "score_a": [0.5, 1.5], "tokens_a": [[0.5], [1.0, 0.5]]}


@pytest.fixture
def path(tmp_path):
    write_scores(tmp_path / "scores.parquet", EXAMPLES, SCANNED)
    return tmp_path / "scores.parquet"


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    write_scores(folder / "scores.parquet", EXAMPLES, SCANNED)
    return folder / "scores.parquet"


def refused(path, words=""):
    """The message, which is one line and names the path."""
    with pytest.raises(UserError, match=words) as caught:
        read_scores(path)
    assert "\n" not in str(caught.value) and str(path.parent) in str(caught.value)
    return str(caught.value)


def test_scores_on_disk(path, tmp_path):
    table = read_scores(path)
    ids = [each.id for each in EXAMPLES]
    assert table == Scores(ids, [1, 2, 3, 4, 5, 6], ROWS, TOKENS, ANCHOR_SCORES, frozenset({"row2"}))
    assert table.of("a", EXAMPLES[::-2]) == [1.25, 0.75, 0.25]  # paired by id, not by place
    assert {file.name for file in tmp_path.iterdir()} == {"scores.parquet", "anchors.json"}
    with pytest.raises(UserError, match="no scores by 'c'; the table has: a, b"):
        table.of("c", EXAMPLES)
    with pytest.raises(UserError, match="row row7"):
        table.of("a", [example("new", "row", 7)])
    with pytest.raises(UserError, match="5 scores by 'a' for 6 rows"):
        write_scores(path, EXAMPLES, Scanned({"a": [0.0] * 5}, {}, {}))


def test_a_cut_reads_no_tokens(path):
    assert read_scores(path).tokens == TOKENS
    assert read_scores(path, tokens=False) == read_scores(path)._replace(tokens={})


def test_without_anchors_or_short_rows(path):
    path.with_name(ANCHORS).unlink()
    assert read_scores(path).anchors == {}
    pyarrow.parquet.write_table(pyarrow.table(COLUMNS), path)
    assert read_scores(path) == Scores(["one", "two"], [1, 2], {"a": [0.5, 1.5]}, {"a": [[0.5], [1.0, 0.5]]}, {})


def test_a_file_that_is_no_table(path, tmp_path):
    refused(tmp_path / "none.parquet", "run the scan first")
    refused(tmp_path, "run the scan first")
    raw = path.read_bytes()
    for damaged in (b"", b"no table", raw[:100], raw[: len(raw) // 2], raw[:-1], raw[1:], b"PAR1" + raw[-400:]):
        path.write_bytes(damaged)
        refused(path, r"cannot read .*scores\.parquet: .*; scan again")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"row_id": None}, "row_ids"),
        ({"line": None}, "lines"),
        ({"row_id": [1, 2]}, r"row_ids\.0: Input should be a valid string"),
        ({"row_id": ["one", None]}, r"row_ids\.1"),
        ({"row_id": [["one"], ["two"]]}, r"row_ids\.0"),
        ({"line": ["1", "2"]}, r"lines\.0"),
        ({"line": [1.5, 2.5]}, r"lines\.0"),
        ({"score_a": ["high", "low"]}, r"columns\.a\.0: Input should be a valid number"),
        ({"score_a": [0.5, None]}, r"columns\.a\.1"),
        ({"score_a": [[0.5], [1.5]]}, r"columns\.a\.0"),
        ({"tokens_a": [0.5, 1.0]}, r"tokens\.a\.0"),
        ({"tokens_a": [[0.5], None]}, r"tokens\.a\.1"),
        ({"tokens_a": [["x"], ["y"]]}, r"tokens\.a\.0\.0"),
        ({"row_id": pyarrow.array([b"\xff\xfe", b"two"], pyarrow.binary()).view(pyarrow.utf8())}, "cannot read"),
    ],
)
def test_columns_of_another_kind(path, change, words):
    columns = {name: values for name, values in (COLUMNS | change).items() if values is not None}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    refused(path, words)


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b"{", b"\xff\xfe", b"[]", b"null", b'"a"', b'{"a": []}', b'{"a": {"safe": 1}}', b"[" * 100_000),
        *(b'{"a": {"safe": ["1"]}}', b'{"a": {"safe": [1.0]}', b'{"a": {"safe": [null]}}'),
    ],
)
def test_damaged_anchors(path, raw):
    path.with_name(ANCHORS).write_bytes(raw)
    refused(path, r"anchors\.json is damaged \(.*\); scan again")


@given(st.integers(0, 2**32), st.sampled_from([None, ANCHORS]))
def test_no_damage_is_a_traceback(parquet, seed, name):
    """Some bytes are lost, changed or inserted: the file is refused in one line, or is a table still."""
    chance, file = random.Random(seed), parquet if name is None else parquet.with_name(name)
    before = file.read_bytes()
    at, length = chance.randrange(len(before)), chance.choice((0, 1, 4, 60, len(before)))
    try:
        file.write_bytes(before[:at] + chance.randbytes(chance.choice((0, 1, length))) + before[at + length :])
        assert isinstance(read_scores(parquet), Scores)
    except UserError as error:
        assert "\n" not in str(error) and str(file) in str(error)
    finally:
        file.write_bytes(before)


def test_the_worst_rows_of_a_folder(path, tmp_path):
    """The highest of 'a' has no tokens and so no reason; that of 'b' has: 0.75 of its 1.0."""
    heat = {"row_id": "row6", "line": 6, "score": 1.0, "scorer": "b", "tokens": [["Su", 0.75], ["re", 0.25]]}
    write_json(tmp_path / HEAT, [heat | {"span": [0, 1]}])
    worst = worst_rows(tmp_path, 6)
    assert [row.line for row in worst[:6]] == [6, 5, 4, 3, 2, 1] and worst[0].why == ""
    assert [(row.why, row.share) for row in worst if row.scorer == "b" and row.line == 6] == [("Su", 0.75)]
    assert [row.line for row in worst if row.cut_short] == [2, 2]


@pytest.mark.parametrize("raw", [None, b"", b"{}", b"[1]", b'[{"row_id": "one"}]', b"\xff", b'[{"span": [0, "x"]}]'])
def test_a_damaged_heat_map(path, tmp_path, raw):
    if raw is not None:
        (tmp_path / HEAT).write_bytes(raw)
    with pytest.raises(UserError, match=r"no such file: .*heat\.json|heat\.json is damaged") as caught:
        worst_rows(tmp_path, 1)
    assert "\n" not in str(caught.value)


def test_a_cut_needs_no_torch():
    """Reading scores and cutting rows start fast."""
    code = "import sys; import safebasin.scan.cut, safebasin.scan.column; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", f"import json; {code}"], capture_output=True, check=True).stdout
    assert not {"torch", "transformers", "jaxtyping"} & set(json.loads(out))
