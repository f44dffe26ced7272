"""The model card: the Hub's own reader reads what was measured, and no name breaks its YAML or its Markdown."""

import re
from pathlib import Path

import markdown_it
import pytest
from conftest import COMPLIED, measured, measurements_of, record, write_lines
from huggingface_hub import ModelCard
from test_table import reading

from safebasin.console import printable
from safebasin.errors import UserError
from safebasin.report import table

pytestmark = pytest.mark.usefixtures("no_figures")
HOSTILE = (
    "---\nlicense: mit\n---",
    "a: b\n- c",
    "\"quoted\" 'twice'",
    "!!python/object/apply:os.system [id]",
    "*alias &anchor",
    "{{ 7*7 }}",
    "# comment",
    "<script>alert(1)</script>",
    "bidi\u202e\u2028 | bar",
    "null",
)


@pytest.fixture
def card(run: Path) -> Path:
    for arm in ("plain", "defended"):
        (run / "arms" / arm / "adapter").mkdir()
    return run / "arms" / "defended" / "adapter" / "README.md"


def test_the_hub_reads_what_was_measured(run: Path, card: Path):
    """2 of 60 by the keyword judge, 1 of 57 by the other, whose other three answers were unscored or off the task."""
    report = table.write_report(record(run, model="example/base-model"))
    data = ModelCard.load(card).data
    assert (data.base_model, data.library_name, data.license) == ("example/base-model", "peft", None)
    assert data.tags == ["safebasin", "safety", "safegrad"]
    results = {(result.metric_type, result.metric_args["judge"]): result for result in data.eval_results}
    assert len(results) == 5
    keyword, likelihood = results["asr", "keyword"], results["asr", "likelihood"]
    assert (keyword.metric_value, keyword.metric_args["n"]) == (pytest.approx(COMPLIED["defended", "keyword"] / 60), 60)
    assert [likelihood.metric_args[name] for name in ("n", "unscored", "off_task")] == [57, 2, 1]
    stated = reading(report, "asr", "defended", "keyword")
    assert (keyword.metric_args["low"], keyword.metric_args["high"]) == (stated.low, stated.high)
    assert keyword.metric_name == "Attack success, judge keyword"


def test_the_text_says_defence_cut_numbers_and_limits(run: Path, card: Path):
    table.write_report(run)
    text = ModelCard.load(card).text
    assert "safegrad \\(rho=2.0\\); 100 steps" in text
    assert "16 of 100 rows were removed before tuning: gradshield above 2." in text
    rates = "3.3 % [0.9 to 11.4] n=60 | 10.0 % [4.7 to 20.1] n=60 | 75.0 % [62.8 to 84.2] n=60"
    assert f"| Attack success | asr | keyword | {rates} |" in text
    assert "nothing here stops somebody who owns open weights" in text and "**PASS**" in text
    plain = (card.parents[2] / "plain" / "adapter" / "README.md").read_text()
    assert "No row was removed before tuning." in plain and "**PASS**" not in plain, "the gate judges another arm"


def test_only_an_adapter_has_a_card(run: Path, card: Path):
    table.write_report(run)
    assert {path.parts[-3] for path in run.rglob("README.md")} == {"plain", "defended"}


def test_what_was_not_measured_is_not_in_the_index(run: Path, card: Path):
    rows = [
        row | ({"value": None, "n": 0, "unscored": 60} if row["what"] == "asr" else {})
        for row in measurements_of("defended")
    ]
    write_lines(run / "arms" / "defended" / "measurements.jsonl", rows)
    table.write_report(run)
    read = ModelCard.load(card)
    assert {result.metric_type for result in read.data.eval_results} == {"over_refusal", "accuracy", "agreement"}
    assert "| Attack success | asr | keyword | – n=0, 60 unscored |" in read.text


@pytest.mark.parametrize("text", HOSTILE)
def test_no_name_breaks_the_card(run: Path, card: Path, text: str):
    rows = [measured(text, text, 1, 60), measured("asr", "keyword", 2, 60)]
    write_lines(run / "arms" / "defended" / "measurements.jsonl", rows)
    table.write_report(record(run, model=text))
    read = ModelCard.load(card)
    assert set(read.data.to_dict()) == {"base_model", "library_name", "pipeline_tag", "tags", "model-index"}
    assert read.data.license is None
    [hostile] = [result for result in read.data.eval_results if result.dataset_type != "asr"]
    assert hostile.dataset_type == hostile.metric_args["judge"] == read.data.base_model == printable(text)
    assert not set(card.read_text(encoding="utf-8")) & set("\u202e\u2028")
    tokens = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").parse(read.text)
    kinds = {inner.type for token in tokens for inner in [token, *(token.children or [])]}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "fence"} and "49" not in read.text
    rows = [line for line in read.text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {7}, "a name made a column"


def test_what_the_user_wrote_stays(run: Path, card: Path):
    card.write_text("---\nlicense: apache-2.0\nlanguage: en\nlibrary_name: other\n---\nold text\n")
    table.write_report(run)
    table.write_report(run)
    read = ModelCard.load(card)
    assert (read.data.license, read.data.language, read.data.library_name) == ("apache-2.0", "en", "peft")
    assert "old text" not in read.text and len(read.data.eval_results) == 5, "the index grew by being written twice"


@pytest.mark.parametrize(
    "front",
    ["a: [", "- a list", "model-index: 3", "model-index: [3]", "model-index: [{}]", "text", "? [a]\n: b", "\xff"],
)
def test_a_front_matter_that_cannot_be_read_is_an_error(run: Path, card: Path, front: str):
    card.write_text(f"---\n{front}\n---\n", encoding="latin-1")
    with pytest.raises(UserError, match="front matter cannot be read"):
        table.write_report(run)
    assert front in card.read_text(encoding="latin-1"), "the user's text was overwritten"
