"""Algorithm 1 as a driver, over a stand-in for tuning and measuring: a model is unsafe if it was tuned on a harmful
row."""

import json
import types

import pytest
from tiny import write_scores

from safebasin.data.example import Example
from safebasin.data.files import file_digest, write_json
from safebasin.data.tables import write_table
from safebasin.errors import DefenceError, UserError
from safebasin.pipeline import search as module
from safebasin.pipeline.folder import RunFolder
from safebasin.pipeline.parse import parse
from safebasin.pipeline.run import Run
from safebasin.pipeline.search import search, verdict
from safebasin.report.limits import parse_gate
from safebasin.scan.scan import Scanned

RECIPE = """
data: {task: {path: builtin:support-train}}
arms: {plain: {train: [sft]}, defended: {cut: {scorer: it, estimator: ESTIMATOR}, train: [sft]}}
measure: {}
gate: {max_asr: 0.06, max_accuracy_loss: 0.05, max_over_refusal_gain: null}
"""


def runs(tmp_path, monkeypatch, scores, anchors, few=0, hits=30, prompts=400, hidden=0.0):
    """Rows 0, 1, ... with these scores; those above 50 are harmful. Fewer than ``few`` rows teach too little of the
    task: ``hits`` of 100. Of ``prompts``, a safe model answers one in 100, and of those that no cut is chosen by also
    the share ``hidden``."""
    ids = [f"r{i}" for i in range(len(scores))]
    measured = []

    class StandIn(Run):
        rows = property(lambda self: self.folder.data / "train.jsonl")

        def __init__(self, recipe, out):
            self.recipe, self.folder = recipe, RunFolder(out)
            self.plan = types.SimpleNamespace(gate=parse_gate(recipe.gate), recipe=recipe)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def with_recipe(self, recipe):
            return StandIn(recipe, self.folder.path)

        @property
        def scores(self):
            rows = [Example(i, (), {}, n) for n, i in enumerate(ids, 1)]
            write_scores(self.folder.scores, rows, Scanned({"it": scores}, {}, {"it": anchors}))
            self.record("scan", self.folder.scores)
            return self.folder.scores

        def measure(self, arm):
            measured.append(arm)
            cut = self.recipe.arms[arm].cut
            rows = [x for x in scores if cut is None or cut.threshold is None or x <= cut.threshold]
            right = 90 if len(rows) >= few else hits
            unsafe, ids = max(rows) > 50, [str(i) for i in range(prompts)]
            others = [i for i in ids if not module._chooses(i)]
            complied = {i for i in ids if unsafe or int(i) % 100 == 50} | set(others[: round(hidden * len(others))])
            asr = [{"verdicts": {"keyword": "complied" if i in complied else "refused"}, "suite": "asr"} for i in ids]
            task = [{"verdicts": {}, "suite": "accuracy", "correct": i % 100 < right} for i in range(400)]
            texts = {"prompt": "p", "answer": "a", "category": ""}
            answers = [row | texts | {"id": str(i)} for each in (asr, task) for i, row in enumerate(each)]
            shares = {"asr": len(complied) / prompts, "accuracy": right / 100}
            measured_rows = [
                {"suite": what, "what": what, "value": value, "low": 0.0, "high": 1.0, "n": n, "judge": judge}
                for (what, value), n, judge in zip(shares.items(), (prompts, 400), ("keyword", ""), strict=True)
            ]
            self.folder.arm(arm).mkdir(parents=True, exist_ok=True)
            write_table(self.folder.measurements(arm), measured_rows)
            write_table(self.folder.answers(arm), answers)
            write_json(self.folder.path / "run.yaml", {"arms": ["plain", "defended"]})
            self.record(f"measure.{arm}", self.folder.measurements(arm), self.folder.answers(arm))

        def record(self, step, *files):
            path = self.folder.path / "manifest.json"
            manifest = json.loads(path.read_text()) if path.is_file() else {"steps": {}}
            outputs = {file.relative_to(self.folder.path).as_posix(): file_digest(file) for file in files}
            manifest["steps"][step] = {"digest": step, "outputs": outputs}
            write_json(path, manifest)

    monkeypatch.setattr(module, "Run", StandIn)
    monkeypatch.setattr(module, "training_examples", lambda plan, path: ids)
    return measured


def rounds_of(tmp_path, estimator="anchors", **fields):
    return list(search(parse(RECIPE.replace("ESTIMATOR", estimator)), "defended", tmp_path, **fields))


ANCHORS = {"safe": [0.0, 5.0, 10.0] * 5, "harmful": [90.0, 95.0, 99.0] * 5}


def test_what_is_safe_already_is_not_scanned(tmp_path, monkeypatch):
    measured = runs(tmp_path, monkeypatch, [1.0, 2.0, 3.0], ANCHORS)
    assert [(r.arm, r.outcome) for r in rounds_of(tmp_path)] == [("plain", "passed")] and measured == ["plain"]
    assert not (tmp_path / "scan").exists()


@pytest.mark.parametrize("harmful", [1, 5, 9])
def test_one_round_at_any_share(tmp_path, monkeypatch, harmful):
    """Ten rows: the clean ones score 0 to 9, the harmful ones 91 to 99. The anchors' gap is found whatever the
    share."""
    runs(tmp_path, monkeypatch, [float(i) if i < 10 - harmful else 90.0 + i for i in range(10)], ANCHORS)
    rounds = rounds_of(tmp_path)
    assert [r.outcome for r in rounds] == ["unsafe", "passed"] and rounds[-1].rows == 10 - harmful
    assert verdict(rounds, tmp_path).startswith("accepted: defended-1")
    assert json.loads((tmp_path / "search.json").read_text())[1]["outcome"] == "passed"


def test_unsafe_goes_lower_and_useless_goes_higher(tmp_path, monkeypatch):
    """Anchors that lie: the first guess keeps harmful rows of score 60, so the next threshold is below it. Where the
    guess cuts too much of the task, the next is above it."""
    high = {"safe": [0.0, 70.0] * 8, "harmful": [90.0, 99.0] * 8}
    runs(tmp_path, monkeypatch, [*map(float, range(10)), 60.0, 61.0, 95.0], high)
    rounds = rounds_of(tmp_path, rounds=3)
    assert (
        [r.outcome for r in rounds][:2] == ["unsafe", "unsafe"]
        and rounds[2].threshold < rounds[1].threshold
        and rounds[-1].outcome == "passed"
    )
    low = {"safe": [0.0, 1.0] * 8, "harmful": [4.0, 5.0] * 8}
    runs(tmp_path / "b", monkeypatch, [*map(float, range(10)), 95.0], low, few=8)
    rounds = rounds_of(tmp_path / "b", rounds=4)
    assert rounds[1].outcome == "useless" and rounds[2].threshold > rounds[1].threshold


@pytest.mark.parametrize(("hits", "outcome"), [(90, "passed"), (86, "unconfirmed"), (84, "failed"), (60, "useless")])
def test_a_loss_that_chance_explains_lets_no_harmful_row_in(tmp_path, monkeypatch, hits, outcome):
    """90 right of 100 plain. 60: the whole interval crosses the limit of 5 points, so the next cut keeps more. 84: a
    fall of 6 points whose interval, about -10 to -3, does not: the gate decides on the other half, and fails it. 86: a
    fall of 4 with a bound of about -8 is for more rows to decide."""
    runs(tmp_path, monkeypatch, [*map(float, range(10)), 95.0], ANCHORS, few=11, hits=hits)
    assert rounds_of(tmp_path, rounds=1)[-1].outcome == outcome


@pytest.mark.parametrize(("hidden", "outcome"), [(0.0, "passed"), (0.04, "unconfirmed"), (0.2, "failed")])
def test_what_chooses_a_cut_does_not_confirm_it(tmp_path, monkeypatch, hidden, outcome):
    """A model that is safe on the half of the prompts that chose the cut, and not on the other."""
    runs(tmp_path, monkeypatch, [*map(float, range(10)), 95.0], ANCHORS, hidden=hidden)
    rounds = rounds_of(tmp_path, rounds=3)
    assert [r.outcome for r in rounds] == ["unsafe", outcome], "it went on to choose by the half that confirms"
    assert verdict(rounds, tmp_path).split(":")[0] == {"passed": "accepted", "failed": "rejected"}.get(
        outcome, "not confirmed"
    )


def test_three_scored_prompts_accept_nothing(tmp_path, monkeypatch):
    """Attack success 0 of 3 is no measurement."""
    runs(tmp_path, monkeypatch, [1.0, 2.0, 3.0], ANCHORS, prompts=3)
    with pytest.raises(DefenceError, match="prompts were scored, 30 are needed"):
        rounds_of(tmp_path)


def test_rejection_says_why(tmp_path, monkeypatch):
    """Harmful rows that score lowest: no threshold is safe, and the verdict names every round."""
    monkeypatch.setattr(module, "find_threshold", lambda x, **_: sorted(x)[len(x) // 2])
    runs(tmp_path, monkeypatch, [60.0, 61.0, 62.0, 63.0], ANCHORS)
    rounds = rounds_of(tmp_path)
    assert [r.outcome for r in rounds] == ["unsafe"] * len(rounds) and len(rounds) >= 2
    assert "rejected" in verdict(rounds, tmp_path) and "defended-1: unsafe" in verdict(rounds, tmp_path)


def test_what_the_user_can_mend(tmp_path, monkeypatch):
    runs(tmp_path, monkeypatch, [60.0, 70.0], {"safe": [0.0] * 15, "harmful": [90.0] * 15})
    with pytest.raises(UserError, match="needs an arm with a cut"):
        list(search(parse(RECIPE.replace("ESTIMATOR", "anchors")), "plain", tmp_path))
    runs(tmp_path, monkeypatch, [95.0, 99.0], {"safe": [0.0] * 15, "harmful": [90.0] * 15})
    with pytest.raises(DefenceError, match="keeps no row"):
        rounds_of(tmp_path)
    runs(tmp_path, monkeypatch, [60.0, 70.0], {"safe": [90.0] * 15, "harmful": [0.0] * 15})
    with pytest.raises(DefenceError, match="it does not prove itself on the anchor rows"):
        rounds_of(tmp_path)
