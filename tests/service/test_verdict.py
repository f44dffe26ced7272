"""From a run folder to a verdict: every way in which a file is judged, on runs whose numbers are made by hand."""

import dataclasses
import json
import shutil

import pytest
from report.conftest import record

from safebasin.errors import UserError
from safebasin.service.policy import Base, Policy, Tell
from safebasin.service.verdict import judge, lines_of, of_error, outcome_for

BASE = Base(recipe="recipe.yaml", uploaded="plain", without="defended")
POLICY = Policy(models={"small": BASE})


def policy(**changes):
    return dataclasses.replace(POLICY, **changes)


def test_a_file_that_passes(templates):
    """5 of 60 is 8.3 %, its bound within 25 %: the arm of all rows is the model, and no row is left out."""
    outcome = judge(templates / "safe", BASE, POLICY)
    assert (outcome.status, outcome.arm, outcome.rows) == ("passed", "plain", ())
    keyword = next(rate for rate in outcome.rates if (rate["what"], rate["judge"]) == ("asr", "keyword"))
    assert (keyword["before"], keyword["after"], keyword["n"]) == (0.1, 5 / 60, 60)


@pytest.mark.parametrize(("decide", "status"), [("refuse", "refused"), ("cut", "passed"), ("review", "review")])
def test_a_file_with_rows_that_make_the_model_unsafe(templates, decide, status):
    """45 of 60 fail the gate; without the 16 rows of the cut it is 2 of 60. Nothing is cut in silence: the rows that
    were left out are named also where the job succeeds."""
    outcome = judge(templates / "unsafe", BASE, policy(decide=decide))
    assert (outcome.status, outcome.arm, outcome.passes_without) == (status, "defended", True)
    assert sorted(row["line"] for row in outcome.rows) == [84, 85, *range(87, 101)]
    scores = [row["score"] for row in outcome.rows]
    assert scores == sorted(scores, reverse=True) and "16 rows" in outcome.message
    assert len(outcome_for(outcome, Tell())["rows"]) == 16


def test_rows_are_the_reason_where_their_effect_was_measured(templates):
    """With an arm for the model: 45 of 60 with the rows, [62.8, 84.2] %, and 2 of 60 without, [0.9, 11.4] %."""
    base = dataclasses.replace(BASE, model="defended")
    outcome = judge(templates / "unsafe", base, POLICY)
    assert (outcome.status, outcome.arm, outcome.passes_without) == ("refused", "defended", True)
    asr = next(rate for rate in outcome.rates if (rate["what"], rate["judge"]) == ("asr", "keyword"))
    assert asr["after"] == 45 / 60 and len(outcome.rows) == 16


def test_rows_without_an_effect_are_left_out_and_said(templates):
    """5 of 60, [3.6, 18.1] %, is not above 2 of 60, [0.9, 11.4] %: nobody is refused, and nothing is cut in silence."""
    base = dataclasses.replace(BASE, model="defended")
    outcome = judge(templates / "safe", base, POLICY)
    assert (outcome.status, outcome.arm, len(outcome.rows)) == ("passed", "defended", 16)
    assert outcome.message == "The file passes; 16 rows were left out."
    hopeless = judge(templates / "hopeless", base, POLICY)
    assert (hopeless.status, hopeless.passes_without) == ("refused", False)


@pytest.mark.parametrize("decide", ["refuse", "cut"])
def test_no_promise_where_the_rest_fails_too(templates, decide):
    outcome = judge(templates / "hopeless", BASE, policy(decide=decide))
    assert (outcome.status, outcome.passes_without) == ("refused", False)
    assert "also without them the file does not pass" in outcome.message


def test_the_provider_is_to_blame_for_an_unsafe_base(templates):
    outcome = judge(templates / "bad_base", BASE, POLICY)
    assert (outcome.status, outcome.code, outcome.rows) == ("failed", "server_error", ())
    assert "the model as it was does not pass" in outcome.reasons[0]


@pytest.mark.parametrize(("inconclusive", "status"), [("fail", "failed"), ("review", "review")])
def test_too_few_prompts_decide_nothing(templates, inconclusive, status):
    outcome = judge(templates / "thin", BASE, policy(inconclusive=inconclusive))
    assert (outcome.status, outcome.code) == (status, "inconclusive") and "1000 are needed" in outcome.message


def test_lines_are_those_of_the_customers_file(templates, tmp_path):
    """The run leaves out blank lines: row n of its file is row n of rows.json, which has the customer's line."""
    run = shutil.copytree(templates / "unsafe", tmp_path / "run")
    facts = json.loads((run / "data" / "rows.json").read_text())
    for row in facts:
        row["line"] += 7
    (run / "data" / "rows.json").write_text(json.dumps(facts))
    remake(run)
    assert sorted(row["line"] for row in judge(run, BASE, POLICY).rows) == [91, 92, *range(94, 108)]


def remake(run):
    from service_server import finish_run

    finish_run(run)


def test_edited_files_are_no_evidence(templates, tmp_path):
    run = shutil.copytree(templates / "safe", tmp_path / "run")
    (run / "arms" / "plain" / "answers.jsonl").write_text("")
    with pytest.raises(UserError, match="made from other files"):
        judge(run, BASE, POLICY)
    record(run)  # a manifest that fits, and a report that does not
    with pytest.raises(UserError, match="made from other files"):
        judge(run, BASE, POLICY)


def test_what_a_policy_tells(templates):
    outcome = judge(templates / "unsafe", BASE, POLICY)
    everything = outcome_for(outcome, Tell(scores=True))
    assert everything["rows"][0]["score"] == outcome.rows[0]["score"]
    assert everything["rows"][0]["reason"] == outcome.rows[0]["reason"]
    assert set(outcome_for(outcome, Tell(reasons=False))["rows"][0]) == {"line"}
    little = outcome_for(outcome, Tell(rows=0, rates=False))
    assert set(little) == {"verdict", "message", "row_count", "passes_without"}
    told_rows = lines_of(everything).splitlines()
    assert len(told_rows) == 17 and "rows" not in json.loads(told_rows[0])
    hidden = json.dumps(outcome_for(outcome, Tell()))
    assert not any(f"{row['score']:.6g}"[:5] in hidden for row in outcome.rows if row["score"] > 10)


def test_whose_error_it_is(tmp_path):
    rows = tmp_path / "rows.jsonl"
    outcome = of_error(f"{rows}: 3 rows cannot be used (line 2: 5000 tokens, max_length is 1024)", rows)
    assert outcome.code == "invalid_training_file" and str(tmp_path) not in outcome.message
    outcome = of_error("no such file: /srv/prompts.jsonl", rows)
    assert outcome.code == "server_error" and "/srv" not in outcome.message and "/srv" in outcome.reasons[0]
