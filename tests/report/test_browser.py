"""The report and the grid in a real browser, at the width of a phone and of a desktop, light and dark.

No script runs, no request goes to a network, nothing is wider than the screen, and every text has enough contrast.
``probe.html`` measures this; a bad page shows that it can.

``SAFEBASIN_PICTURES=docs/images`` writes the pictures of the docs there.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import BROWSER, browse, probe
from conftest import make_run, measured, record

from safebasin.data.tables import write_table
from safebasin.report import table
from safebasin.report.cells import MEASURED, NOT_MADE, Cell
from safebasin.report.grid import Published, write_grid
from safebasin.report.limits import Gate

PICTURES = os.environ.get("SAFEBASIN_PICTURES")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome is installed"),
]

ASK = '<img src="http://evil.example/seen">'
RUN = f"<script>window.ran = true</script><img src=x onerror='window.ran = true'><svg onload='window.ran = true'>{ASK}"
HOSTILE = f"{RUN}\u202egpj.exe\u2066\u200b {'W' * 100_000}"
BAD = f"<!doctype html><body>{RUN}<p style='width: 2000px; color: #ddd'>faint and wide</p>"


def make_grid(folder: Path) -> None:
    """Two attacks by two defences, hostile where names and reasons may be, with a cell that has no number."""
    cells = []
    for attack in ("explicit", "trigger"):
        run = folder / f"{attack}-0"
        for defence, hits in (("plain", 58), ("steady", 3)):
            (run / "arms" / defence).mkdir(parents=True)
            row = measured("asr", HOSTILE[:200], hits, 60, unscored=2, off_task=1)
            write_table(run / "arms" / defence / "measurements.jsonl", [row])
            cells.append(Cell(attack, 0, defence, run, MEASURED, ""))
        (run / "manifest.json").write_text(json.dumps({"machine": "a machine", "model": "tiny", "steps": {}}))
    cells.append(Cell("guard", 0, "plain", folder, NOT_MADE, HOSTILE))
    write_grid(
        folder, cells, {"steady": Published(value=0.04, setting=HOSTILE, source=HOSTILE, attack="explicit")}, Gate()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with its texts in clear, and a grid; removed rows, answers and tokens of the heat map are hostile."""
    run = make_run(tmp_path_factory.mktemp("browser") / "run")
    for path in (*run.glob("arms/*/answers.jsonl"), run / "data" / "problems.json"):
        path.write_text(path.read_text().replace("<script>alert('row')</script>", json.dumps(HOSTILE)[1:-1]))
    tokens = [[HOSTILE[k : k + 5000], 1.0 - k] for k in (0, 5000)] + [
        [" Sure", 4.0],
        [", no", -2.0],
        *[["x", 0.1 * k] for k in range(50)],
    ]
    heat = {"row_id": HOSTILE[:90], "line": 3, "score": 4.5, "scorer": "gradshield", "tokens": tokens}
    (run / "scan" / "heat.json").write_text(json.dumps([heat]))
    table.write_report(record(run), show_text=True)
    make_grid(run)
    return run


@pytest.fixture(scope="module", params=[False, True], ids=["light", "dark"])
def seen(folder: Path, request: pytest.FixtureRequest) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
    results, requests = probe(folder, "report.html", "grid.html", dark=request.param)
    assert [each["dark"] for each in results] == [request.param] * 4, "the browser shows other colours than it should"
    assert min(each["texts"] for each in results) > 30, "a page was not measured"
    yield results, requests


def test_no_script_runs_and_no_network_is_used(seen):
    results, requests = seen
    assert requests == []
    for each in results:
        alive = each["ran"], each["scripts"], each["handlers"], each["requests"], each["hidden"]
        assert alive == (False, 0, 0, [], 0), each["page"]


def test_nothing_is_wider_than_the_screen(seen):
    assert {(each["page"], each["width"]): each["wide"] for each in seen[0]} == {
        (each["page"], each["width"]): each["width"] for each in seen[0]
    }


def test_every_text_can_be_read(seen):
    """Contrast of 4.5, WCAG's AA, and letters of 10 px or more, figures included."""
    for each in seen[0]:
        assert each["faint"][0] >= 4.5, (each["page"], each["faint"])
        assert each["small"][0] >= 10, (each["page"], each["small"])


def test_the_probe_sees_what_is_bad(folder: Path):
    """A page with everything that the others must not have."""
    (folder / "bad.html").write_text(BAD)
    [phone, _], requests = probe(folder, "bad.html")
    assert phone["ran"] and phone["scripts"] == 1 and phone["handlers"] == 2
    assert all(any("evil.example" in name for name in names) for names in (phone["requests"], requests))
    assert phone["wide"] > 1900 and phone["faint"][0] < 1.5


@pytest.mark.skipif(PICTURES is None, reason="SAFEBASIN_PICTURES names no folder")
@pytest.mark.parametrize(
    ("name", "size", "dark"),
    [("desktop", "1280,1500", False), ("dark", "1280,1500", True), ("phone", "390,1500", False)],
)
def test_pictures_for_the_docs(tmp_path: Path, name: str, size: str, dark: bool):
    run = make_run(tmp_path / "quickstart")
    table.write_report(run)
    picture = Path(str(PICTURES)).absolute() / f"report-{name}.png"
    browse(tmp_path, f"--window-size={size}", f"--screenshot={picture}", (run / "report.html").as_uri(), dark=dark)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 200_000
