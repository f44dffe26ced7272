"""The pages: commands exist, links resolve, numbers are those of the results, and the site builds without a warning."""

import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import cyclopts
import pytest
import yaml
from pydantic import TypeAdapter

from safebasin.cli import main as cli
from safebasin.pipeline.folder import REPORT, RunFolder
from safebasin.report.gate import CODES

app = cli.app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
spec = importlib.util.spec_from_file_location("site_reference", ROOT / "scripts" / "reference.py")
assert spec and spec.loader
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)

GENERATED = {DOCS / "changelog.md", *(DOCS / "reference" / f"{name}.md" for name in reference.pages())}
WRITTEN = sorted(set(DOCS.rglob("*.md")) - GENERATED)
TOP = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG", "benchmarks/README")]
PAGES = [*TOP, *WRITTEN]
GUIDES = [page for page in PAGES if page.name != "log.md" and page.parent.name != "decisions"]
OTHERS = ("torchrun --nproc-per-node 8 -m ", "accelerate launch -m ", ".venv/bin/", "run: ")  # what may stand before it


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """Code spans of the prose."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))


def commands(text: str) -> list[list[str]]:
    """Every call of safebasin in shell blocks and in code spans, split as a shell splits it."""
    lines = [
        line.split(" #")[0].strip(" -")
        for block in re.findall(r"^ *```(?:sh|yaml)\n(.*?)```", text, re.M | re.S)
        for line in block.split("\n")
    ]
    commands = []
    for line in [*lines, *spans(text)]:
        for other in OTHERS:
            line = line.removeprefix(other)
        if line.startswith("safebasin "):
            commands.append(shlex.split(line)[1:])
    return commands


def options() -> set[str]:
    """Every option of every verb."""
    text = app.generate_docs()
    return set(re.findall(r"(--[a-z][\w-]*)", text)) | {"--help", "--version"}


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_commands_parse(page):
    """Whole commands must parse; a mention of a verb alone (`safebasin run`) must name one that exists."""
    for words in commands(page.read_text(encoding="utf-8")):
        if words[0].startswith("-"):
            assert words[0] in ("--help", "--version"), words
            continue
        assert words[0] in app, f"{name(page)}: no verb {words[0]!r}"
        if len(words) > 1 and words[1] != "...":
            try:
                app.parse_args(words, exit_on_error=False, print_error=False)
            except cyclopts.CycloptsError as error:
                pytest.fail(f"{name(page)}: safebasin {shlex.join(words)}: {error}")


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_options_exist(page):
    """An option that a page names by itself is one of some verb."""
    available = options()
    for span in spans(page.read_text(encoding="utf-8")):
        if span.startswith("--"):
            assert re.split("[=.]", span.split()[0])[0] in available, f"{name(page)}: {span}"


def test_commands_of_the_readme_are_there():
    """The scripts and the make targets that README and CONTRIBUTING name."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for page in TOP[:2]:
        text = page.read_text(encoding="utf-8")
        for script in re.findall(r"\bscripts/\w+", text):
            assert os.access(ROOT / script, os.X_OK), script
        assert set(re.findall(r"\bmake ([\w-]+)", text)) <= targets | {"check"}
    assert commands((ROOT / "README.md").read_text(encoding="utf-8"))


def test_benchmarks_that_pages_name_are_there():
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "benchmarks").glob("*/*.py"))
    experiments = set(re.findall(r'@experiment\(\s*"(\w+)"', sources))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"python -m benchmarks ([a-z]\w*)", text)) <= experiments, name(page)
        assert page not in GUIDES or not re.search(r"benchmarks/\w+/\w+\.py", text), name(page)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page):
    """Links to files and pages; links to headings are checked by the build of the site."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if re.match(r"https?://|#", target):
            continue
        path = (page.parent / target.split("#")[0]).resolve()
        assert path.exists() or path in GENERATED, f"{name(page)}: {target}"
        if page.is_relative_to(DOCS):
            assert path.is_relative_to(DOCS), f"{name(page)}: {target} leads out of the site"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_words_and_lines(page):
    text = page.read_text(encoding="utf-8")
    assert "../shared" not in text
    assert [line for line in text.split("\n") if len(line) > 120 and not line.lstrip().startswith("|")] == []


def test_no_address_of_a_package_registry():
    """Packages come through their ordinary clients; no page and no script fetches one by its address."""
    files = [*PAGES, *(ROOT / "scripts").iterdir(), ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".ci" / "run"]
    registry = re.compile(r"pythonhosted|pypi\.org|download\.pytorch\.org|npmjs|anaconda\.org|--(extra-)?index-url")
    for file in (*files, *(ROOT / ".github").rglob("*.yml")):
        assert not registry.search(file.read_text(encoding="utf-8")), file


def pages_of(nav) -> list[str]:
    return (
        [nav]
        if isinstance(nav, str)
        else [page for each in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(each)]
    )


def test_every_page_is_in_the_navigation():
    nav = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(nav) == sorted(page.relative_to(DOCS).as_posix() for page in {*WRITTEN, *GENERATED})


def test_every_decision_is_in_the_index():
    index = (DOCS / "decisions" / "index.md").read_text(encoding="utf-8")
    for page in (DOCS / "decisions").glob("0*.md"):
        number = int(page.name[:4])
        assert f"| {number} | [" in index and f"]({page.name})" in index
        assert page.read_text(encoding="utf-8").startswith(f"# {number}. ")


def test_entries_of_the_log_are_titled_dated_and_judged():
    entries = re.split(r"^## ", (DOCS / "log.md").read_text(encoding="utf-8"), flags=re.M)[1:]
    dates = [re.match(r"(\d{4}-\d\d-\d\d): \S", entry) for entry in entries]
    assert all(dates) and (order := [match[1] for match in dates if match]) == sorted(order)
    for entry in entries:
        assert "- **Question.**" not in entry or "- **Verdict.**" in entry, entry.split("\n")[0]


def test_numbers_of_the_quickstart_are_those_of_its_results():
    """The page of results, the start page, the README and the picture."""
    records = {r["what"]: r for r in json.loads((ROOT / "benchmarks" / "quickstart" / "results.json").read_text())}
    percent = {what: f"{100 * record['value']:.1f} %".replace("100.0 %", "100 %") for what, record in records.items()}
    table = (DOCS / "results" / "quickstart.md").read_text(encoding="utf-8")
    rows = {"asr": "success, keyword", "asr.classifier": "success, classifier", "over_refusal": "refused, keyword"}
    rows |= {"over_refusal.classifier": "refused, classifier", "accuracy": "task accuracy"}
    for key, words in rows.items():
        quantity, _, judge = key.partition(".")
        line = next(line for line in table.split("\n") if words in line)
        cells = [cell.strip().split(" [")[0] for cell in line.split("|")[2:5]]
        assert cells == [
            percent[".".join(filter(None, (quantity, arm, judge)))] for arm in ("start", "plain", "defended")
        ]
    picture = (DOCS / "images" / "three-arms.svg").read_text(encoding="utf-8")
    bars = re.findall(r'class="n"[^>]*>([^<]+)<', picture)
    arms = ("start", "plain", "defended")
    assert bars == [percent[f"{quantity}.{arm}"] for arm in arms for quantity in ("asr", "accuracy")]


FURTHER = "repair, further arms"  # the grid of those that one column and seed have


def test_numbers_of_the_repairs_are_those_of_their_results():
    """The page of repairs: every arm in three tables, by the worse judge; how far and to which rank an arm was
    moved."""
    records = {r["what"]: r for r in json.loads((ROOT / "benchmarks" / "repair" / "results.json").read_text())}
    text = (DOCS / "results" / "repair.md").read_text(encoding="utf-8")

    def value(name: str) -> float | None:
        return records[name]["value"] if name in records else None

    def shown(cell: str) -> float | None:
        number = cell.split(" %")[0].strip(" *")
        return None if number in ("", "–") else float(number) / (100 if "%" in cell else 1)

    def arms(*grids: str) -> set[str]:
        return {r["defence"] for r in records.values() if r.get("grid") in grids and r["value"] is not None} - {""}

    quantities = {"Attack success": "asr", "Task accuracy": "utility", "Look-alikes refused": "over_refusal"}
    second = text.split("## A second task, and Alpaca\n")[1].split("\n## ")[0]
    parts = [(text, "\n## ", arms("repair")), (second, "\n### ", arms("repair_news", "repair_alpaca"))]
    for (part, mark, measured), (title, quantity) in itertools.product(parts, quantities.items()):
        table = part.split(f"{mark}{title}\n")[1].split("\n#")[0]
        head = next(line for line in table.splitlines() if line.startswith("| arm"))
        columns = re.findall(r"`(\w+)`", head)
        rows = re.findall(r"^\| `(\w+)` \|(.+)\|$", table, re.M)
        assert {arm for arm, _ in rows} == measured, title
        for arm, line in rows:
            values = [value(f"{quantity}.{arm}.{column}") for column in columns]
            if "rank" in head:
                distances = [value(f"distance.{arm}.{column}") for column in columns]
                moved = [each for each in distances if each is not None]
                values += [sum(moved) / len(moved) if moved else None, value(f"rank.out.{arm}")]
            assert [shown(cell) for cell in line.split("|")] == pytest.approx(values, abs=6e-3), (title, arm)
    table = text.split("## Further strengths and controls\n")[1].split("\n#")[0]
    further = re.findall(r"^\| `(\w+)` \|(.+)\|$", table, re.M)
    assert {arm for arm, _ in further} == arms(FURTHER) != set()
    for arm, line in further:
        names = [f"{quantity}.{arm}.poison_10" for quantity in ("asr", "utility", "over_refusal")]
        values = [value(name) for name in (*names, f"distance.{arm}.poison_10", f"rank.out.{arm}")]
        assert [shown(cell) for cell in line.split("|")] == pytest.approx(values, abs=0.0051), arm


def test_the_readme_counts_what_there_is():
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    words = ["four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen"]
    words += ["fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty", "twenty-one", "twenty-two"]
    count = {
        page: words[len(list(reference.registry_of(path))) - 4] for page, (_, path, *_) in reference.STAGES.items()
    }
    assert (
        f"{count['scan'].capitalize()} ways to score a row, {count['train']} to train, {count['repair']} to repair"
        in text
    )
    assert f"to measure, {count['judges']} judges and {count['attack']} attacks are built in" in text


def cells(page: Path) -> list[str]:
    """The first column of the tables of a page."""
    return re.findall(r"^\| `?([^`|]+?)`? \|", page.read_text(encoding="utf-8"), re.M)


def test_the_page_of_files_names_what_the_folder_owns():
    listed, folder = cells(DOCS / "reference" / "files.md"), RunFolder(Path("RUN"))
    paths = [getattr(folder, key) for key, value in vars(RunFolder).items() if isinstance(value, property)]
    paths += [getattr(folder, key)("ARM") for key in ("cut", "arm", "adapter", "answers", "measurements")]
    for path in paths:
        text = path.relative_to("RUN").as_posix()
        assert any(each.startswith(text) for each in listed), text
    assert {"manifest.json", "run.yaml", *REPORT} <= set(listed)


def test_the_page_of_exit_codes_is_whole():
    stated = set(re.findall(r"\b(\d+)\s[a-z]", (cli.__doc__ or "").split("Exit codes:")[1]))
    listed = {cell for cell in cells(DOCS / "reference" / "exit-codes.md") if cell.isdecimal()}
    assert listed == stated >= {str(code) for code in CODES.values()}


def test_the_reference_states_every_field_and_where_it_comes_from():
    """By the smallest method: its equations, a field with its bound and default, its paper."""
    page = reference.pages()["train"]()
    part = page.split("## safegrad {")[1].split("\n## ")[0]
    assert "g_u' = g_u" in part and "[arXiv:2508.07172](https://arxiv.org/abs/2508.07172)" in part
    assert '| `align` | `kl` or `sft` | `"kl"` | L_align' in part
    for entry in reference.registry_of("safebasin.train:method"):
        assert f"## {entry.name} {{ #{entry.name} }}" in page


@pytest.mark.parametrize("path", [path for _, path, *_ in reference.STAGES.values()])
def test_every_field_says_what_it_is(path):
    for entry in reference.registry_of(path):
        table = reference.fields_table(TypeAdapter(entry.kind).json_schema(), reference.comments(entry.kind))
        assert "|  |" not in table.split("\n", 2)[-1], f"{entry.name}: a field without a comment"


def test_a_docstring_as_markdown():
    doc = "What.\n\n    a = b * c\n\nDeparts from x: <i> and ``k*``.\n\n"
    doc += "Args:\n    one: first,\n        on two lines.\n    two: second.\n\n>>> 1 + 1\n2"
    assert reference.markdown(doc).split("\n\n") == [
        "What.",
        "``` { .text .no-copy }\na = b * c\n```",
        "Departs from x: &lt;i> and ``k*``.",
        "**Args**",
        "- one: first, on two lines.\n- two: second.",
        "```pycon\n>>> 1 + 1\n2\n```",
    ]


@pytest.mark.slow
def test_the_example_of_the_guide_runs(tmp_path):
    """The method and the test of guides/write-a-method.md, as two files."""
    method, test = fences((DOCS / "guides" / "write-a-method.md").read_text(encoding="utf-8"), "python")
    (tmp_path / "on_conflict.py").write_text(method, encoding="utf-8")
    (tmp_path / "test_on_conflict.py").write_text(test, encoding="utf-8")
    code = (
        "import sys, pytest, safebasin.train.methods as m; m.__path__.append(sys.argv[1]); "
        "sys.exit(pytest.main(['-p', 'no:cacheprovider', '--rootdir', sys.argv[1], sys.argv[1]]))"
    )
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "tests" / "train")])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_nothing_of_a_network(tmp_path):
    """Strict: a link to a page or a heading that is not there is an error."""
    pytest.importorskip("zensical")
    for path in ("docs", "mkdocs.yml"):
        subprocess.run(["cp", "-r", str(ROOT / path), str(tmp_path)], check=True)
    reference.main(tmp_path / "docs" / "reference")
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"], cwd=tmp_path, capture_output=True, text=True
    )
    assert built.returncode == 0 and "Warning" not in built.stdout + built.stderr, built.stdout + built.stderr
    for page in {*WRITTEN, *GENERATED}:
        html = (tmp_path / "site" / page.relative_to(DOCS).with_suffix(".html")).read_text(encoding="utf-8")
        assert not re.search(r'<(?:link|script|img|iframe)[^>]+(?:src|href)="?(?:https?:)?//', html), page


def test_every_fault_has_a_test_that_exists():
    """In ``docs/project/faults.md`` a name without a file is of the file before it."""
    text = (ROOT / "docs" / "project" / "faults.md").read_text(encoding="utf-8")
    where, seen = "", 0
    for file, test in re.findall(r"`(?:((?:tests/)?[\w/]*test_\w+\.py)(?:::)?)?(test_\w+)?`", text):
        if not file and not test:
            continue
        where = str(next((ROOT / "tests").rglob(file.rpartition("/")[2]))) if file else where
        assert not file.startswith("tests/") or where.endswith(file), file
        if test:
            assert f"def {test}(" in Path(where).read_text(encoding="utf-8"), f"{where}: {test}"
        seen += 1
    assert seen > 40
