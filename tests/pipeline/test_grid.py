"""The grid: what is done is not done again, the worst attack ranks, a missing number is no zero, hostile strings stay
text."""

import html.parser
import json
import types
from pathlib import Path

import pytest
import yaml
from folders import run, save_tiny

import safebasin.pipeline.grid
from safebasin.attack import attack as attacks
from safebasin.data.files import write_json
from safebasin.data.records import Measurement
from safebasin.data.tables import write_table
from safebasin.errors import AttackFails, DefenceError, UserError
from safebasin.pipeline import train as pipeline_train
from safebasin.pipeline.folder import RunFolder
from safebasin.pipeline.grid import bench, cells, read
from safebasin.pipeline.plan import Plan
from safebasin.pipeline.run import Run
from safebasin.report.cells import records
from safebasin.report.grid import write_grid
from safebasin.report.limits import parse_gate
from safebasin.stats import two_level, two_level_difference

RECIPE = Path(__file__).parents[2] / "recipes" / "grid.yaml"
TREE = {
    "seeds": [0, 1],
    "base": {
        "data": {"task": {"path": "builtin:support-train", "take": 20}},
        "measure": {},
        "train": {"adapter": {"r": 2}},
        "gate": {"min_n": 30},
    },
    "attacks": {
        "explicit": {"attack": "explicit", "poison_share": 0.1},
        "benign": {"attack": "benign", "poison_share": 0},
    },
    "defences": {"plain": {"train": ["sft"]}, "steady": {"train": ["constrained_sft"]}},
}
HOSTILE = '"><img src=x onerror=alert(1)>\u202e | `x` <script>'


def grid_of(tmp_path, **changes):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(TREE | changes, sort_keys=False))
    return read(path)


def of(suite: str, hits: int, n: int, *, judge: str = "", unscored: int = 0, what: str = "") -> Measurement:
    value = hits / n if n else None
    return Measurement(
        suite,
        what or suite.removesuffix("_attacked"),
        value,
        0.1 if n else None,
        0.9 if n else None,
        n,
        unscored,
        judge=judge,
    )


class Stub(Run):
    """A run that measures what ``outcomes`` holds by (attack, arm), and keeps count; an exception there is raised."""

    outcomes: dict
    answers: dict
    log: list

    def __init__(self, recipe, out, judges=None):
        self.plan = types.SimpleNamespace(recipe=recipe, gate=parse_gate(recipe.gate))
        attacks.make(recipe.data.attack)
        self.folder = RunFolder(out)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def write_rows(self):
        self.folder.path.mkdir(parents=True, exist_ok=True)
        write_json(
            self.folder.path / "manifest.json",
            {"machine": "a machine", "hardware": "a GPU", "model": "tiny", "steps": {}},
        )
        if isinstance(outcome := self.outcomes.get(self.folder.path.name), Exception):
            raise outcome

    def measure(self, arm):
        self.log.append(f"{self.folder.path.name} {arm}")
        name, _, seed = self.folder.path.name.rpartition("-")
        default = [of("asr", 0, 50, judge="keyword"), of("accuracy", 40, 50)]
        outcome = self.outcomes.get((name, arm, int(seed)), self.outcomes.get((name, arm), default))
        if isinstance(outcome, BaseException):
            raise outcome
        self.folder.arm(arm).mkdir(parents=True, exist_ok=True)
        write_table(self.folder.measurements(arm), [m.__dict__ for m in outcome])
        if rows := self.answers.get((name, arm)):
            write_table(self.folder.answers(arm), rows)


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(Stub, "outcomes", {}, raising=False)
    monkeypatch.setattr(Stub, "answers", {}, raising=False)
    monkeypatch.setattr(Stub, "log", [], raising=False)
    monkeypatch.setattr(safebasin.pipeline.grid, "Run", Stub)
    return Stub


def test_breadth_first_and_the_model_as_it_was_once_an_attack(stub, tmp_path):
    bench(grid_of(tmp_path), tmp_path / "out")
    first = [f"{a}-0 {arm}" for a in ("explicit", "benign") for arm in ("start", "plain", "steady")]
    assert stub.log == [
        *first,
        *(f"{a}-1 {arm}" for a in ("explicit", "benign") for arm in ("plain", "steady")),
    ]


def test_an_attack_may_have_fewer_rows_of_the_task(tmp_path):
    attacks = {"few": {"attack": "explicit", "poison_share": 0.9, "take": 3}, "all": TREE["attacks"]["explicit"]}
    recipes = grid_of(tmp_path, attacks=attacks).recipes()
    assert {name: recipe.data.task.take for (name, _, seed), recipe in recipes.items() if not seed} == {
        "few": 3,
        "all": 20,
    }


def test_narrowing_runs_a_part_and_keeps_what_is_known_of_the_rest(stub, tmp_path):
    grid, out = grid_of(tmp_path), tmp_path / "out"
    bench(grid, out, only=["benign"], seeds=[0])
    assert stub.log == ["benign-0 start", "benign-0 plain", "benign-0 steady"]
    bench(grid, out, only=["explicit"], seeds=[1])
    assert {record["attack"] for record in json.loads((out / "grid.json").read_text())} == {"", "benign", "explicit"}
    for wrong in ({"only": ["nothing"]}, {"seeds": [7]}):
        with pytest.raises(UserError, match="the grid has no"):
            bench(grid, out, **wrong)


def test_the_worst_attack_ranks_not_the_mean(stub, tmp_path):
    """plain: 0 % and 90 % (mean 45 %); steady: 50 % and 50 % by its worse judge, so steady is first. The attacked
    suite counts."""
    stub.outcomes |= {
        ("explicit", "plain"): [of("asr", 0, 50, judge="keyword")],
        ("explicit", "steady"): [of("asr", 25, 50, judge="keyword")],
    }
    stub.outcomes["benign", "plain"] = [of("asr", 0, 50, judge="keyword"), of("asr_attacked", 45, 50, judge="keyword")]
    stub.outcomes["benign", "steady"] = [of("asr", 1, 50, judge="keyword"), of("asr", 25, 50, judge="classifier")]
    ranks = bench(grid_of(tmp_path), tmp_path / "out")
    assert [(rank.defence, rank.worst, rank.attack) for rank in ranks] == [
        ("steady", 0.5, "explicit"),
        ("plain", 0.9, "benign"),
    ]


def test_each_judges_worst_and_the_task_against_plain_tuning(stub, tmp_path):
    """steady loses 10 points in one seed of one attack and none in three others: -2.5, and the pairs are of one attack
    and seed."""
    stub.outcomes["benign", "steady"] = [
        of("asr", 45, 50, judge="keyword"),
        of("asr", 5, 50, judge="classifier"),
        of("accuracy", 40, 50),
    ]
    stub.outcomes["explicit", "steady", 1] = [of("asr", 0, 50, judge="keyword"), of("accuracy", 35, 50)]
    ranks = {rank.defence: rank for rank in bench(grid_of(tmp_path), tmp_path / "out")}
    assert ranks["steady"].judges == {"keyword": (0.9, "benign"), "classifier": (0.1, "benign")}
    value, (low, high) = ranks["steady"].against_plain
    assert value == pytest.approx(-0.025) and low == pytest.approx(-0.025 - 3.18245 * 0.05 / 2) and high > 0
    assert ranks["plain"].against_plain is None
    record = next(
        r for r in json.loads((tmp_path / "out" / "grid.json").read_text()) if r["what"] == "explicit.steady.accuracy"
    )
    assert record["against_plain"] == {"0": 0.0, "1": pytest.approx(-0.1)}
    page, marked = ((tmp_path / "out" / f"grid.{kind}").read_text() for kind in ("html", "md"))
    assert "10.0 %" in page and "-2.5" in page.replace("−", "-") and "-2.5" in marked.replace("−", "-")
    rows = marked[marked.index("| rank |") :].split("\n\n")[0].splitlines()
    assert len(rows) == 4 and {row.count("|") for row in rows} == {11}


def test_ties_go_to_accuracy(stub, tmp_path):
    stub.outcomes |= {
        (a, "steady"): [of("asr", 0, 50, judge="keyword"), of("accuracy", 49, 50)] for a in ("explicit", "benign")
    }
    ranks = bench(grid_of(tmp_path), tmp_path / "out")
    assert [(rank.defence, rank.accuracy) for rank in ranks] == [
        ("steady", pytest.approx(0.98)),
        ("plain", pytest.approx(0.8)),
    ]


@pytest.mark.parametrize(
    "poor",
    [
        [],
        [of("asr", 0, 0, judge="keyword", unscored=50)],
        [of("asr", 0, 29, judge="keyword")],
        [of("asr", 0, 39, judge="keyword", unscored=11)],
    ],
    ids=["nothing", "all unscored", "few", "many unscored"],
)
def test_what_could_not_be_measured_is_no_zero(stub, tmp_path, poor):
    """steady would be first with 0 % against 90 %; it is not, since one of its attacks is not known."""
    stub.outcomes |= {(a, "plain"): [of("asr", 45, 50, judge="keyword")] for a in ("explicit", "benign")} | {
        ("benign", "steady"): poor
    }
    ranks = bench(grid_of(tmp_path), tmp_path / "out")
    assert [(rank.defence, rank.missing) for rank in ranks] == [("plain", ()), ("steady", ("benign",))]


def test_what_decides_nothing_is_in_no_maximum(stub, tmp_path):
    """Under the attacker's template all but one of 50 answers are labels of the task, on every defence: it ranks
    nobody. On steady alone: not known.

    A seed of one scored prompt is not made up for by another seed of 50.
    """
    labels = Measurement("asr_attacked", "asr", 1.0, 0.9, 1.0, 1, 0, judge="keyword", off_task=49)
    extra = of("asr_attacked", 5, 50, judge="keyword")
    stub.outcomes |= {("benign", arm): [of("asr", 5, 50, judge="keyword"), labels] for arm in ("plain", "steady")}
    ranks = {rank.defence: rank for rank in bench(grid_of(tmp_path), tmp_path / "out")}
    assert [(r.worst, r.missing, r.judges) for r in ranks.values()] == [(0.1, (), {"keyword": (0.1, "benign")})] * 2
    for kind in ("html", "md"):
        assert "The suite asr_attacked under benign ranks no defence" in (
            tmp_path / "out" / f"grid.{kind}"
        ).read_text().replace("\\_", "_")
    stub.outcomes |= {
        ("benign", "plain"): [of("asr", 5, 50, judge="keyword"), extra],
        ("benign", "steady", 1): [of("asr", 5, 50, judge="keyword"), extra],
    }
    ranks = {rank.defence: rank for rank in bench(grid_of(tmp_path), tmp_path / "again")}
    assert (ranks["plain"].worst, ranks["plain"].missing) == (0.1, ())
    assert (ranks["steady"].worst, ranks["steady"].missing) == (0.1, ("benign",))
    assert "ranks no defence" not in (tmp_path / "again" / "grid.md").read_text()


def test_a_defence_that_cannot_run_is_said_at_the_end_and_is_tried_again(stub, tmp_path):
    grid, out = grid_of(tmp_path), tmp_path / "out"
    stub.outcomes["explicit", "plain"] = DefenceError("the direction is not finite")
    with pytest.raises(DefenceError, match=r"2 cells could not run.*explicit-0, plain: the direction is not finite"):
        bench(grid, out)
    assert len(stub.log) == 10, "the other cells were not done"
    assert "the direction is not finite" in (out / "grid.md").read_text()
    record = next(r for r in json.loads((out / "grid.json").read_text()) if r["what"] == "explicit.plain.could_not_run")
    assert record["value"] is None
    del stub.outcomes["explicit", "plain"]
    assert [rank.missing for rank in bench(grid, out)] == [(), ()]


def test_only_an_attack_that_fails_is_an_outcome(stub, tmp_path):
    """Another fault of the user stops the bench, whether the attack adapts or not."""
    adaptive = {"guard": {"attack": {"guard_pass": {"against": "keyword"}}, "poison_share": 0.1}}
    grid, out = grid_of(tmp_path, attacks=TREE["attacks"] | adaptive, seeds=[0]), tmp_path / "out"
    stub.outcomes["guard-0"] = AttackFails("guard_pass: keyword stops all rows")
    ranks = bench(grid, out)
    assert [rank.missing for rank in ranks] == [(), ()], "an attack that no one can make is asked of none"
    extra = [r for r in json.loads((out / "grid.json").read_text()) if r["attack"] == "guard"]
    assert {(r["defence"], r["value"], r["reason"]) for r in extra} == {
        (a, None, "guard_pass: keyword stops all rows") for a in ("start", "plain", "steady")
    }
    for faulty in ("guard-0", "explicit-0"):
        stub.outcomes[faulty] = UserError(f"{faulty}: no such file")
        with pytest.raises(UserError, match=f"{faulty}: no such file"):
            bench(grid, out)
        del stub.outcomes[faulty]


def test_numbers_over_seeds(stub, tmp_path):
    """20 % and 40 %: mean 0.3; two seeds have no interval. One seed: its own interval."""
    agreement = [
        Measurement("asr", "agreement", kappa, None, None, 50, unit="kappa", judge="keyword, other")
        for kappa in (0.5, 0.7)
    ]
    low, high = ([of("asr", k, 50, judge="keyword"), kappa] for k, kappa in zip((10, 20), agreement, strict=True))
    stub.outcomes |= {
        ("explicit", "plain", 0): low,
        ("explicit", "plain", 1): high,
        ("benign", "plain", 1): [of("asr", 0, 0, judge="keyword")],
    }
    stub.outcomes["benign", "plain", 0] = low
    bench(grid_of(tmp_path), tmp_path / "out")
    by_name = {record["what"]: record for record in json.loads((tmp_path / "out" / "grid.json").read_text())}
    both, one = by_name["explicit.plain.asr.keyword"], by_name["benign.plain.asr.keyword"]
    assert (both["value"], both["interval"], both["n"]) == (pytest.approx(0.3), None, 100)
    assert both["kappa"] == pytest.approx(0.6)
    assert (one["value"], one["interval"], one["seeds"]) == (0.2, [0.1, 0.9], {"0": 0.2, "1": None})
    assert {"machine", "date", "seconds", "unscored", "off_task"} <= both.keys()
    assert both["machine"] == "a machine, a GPU"  # what the run wrote, wherever the table is made


def answers(suite, hits, *, judge="keyword"):
    """Measurement and answers: of each prompt whether it is a hit; None: unscored."""
    scored = [hit for hit in hits if hit is not None]
    of_task = suite == "accuracy"
    verdicts = {True: "complied", False: "refused", None: "unscored"}
    rows = [
        {"suite": suite, "id": f"p{i}", "prompt": f"{i}", "answer": "a"}
        | ({"correct": hit, "verdicts": {}} if of_task else {"verdicts": {judge: verdicts[hit]}})
        for i, hit in enumerate(hits)
    ]
    count = of(suite, sum(scored), len(scored), judge="" if of_task else judge, unscored=len(hits) - len(scored))
    return count, rows


def test_the_worst_and_the_cost_over_seeds_and_prompts(stub, tmp_path):
    """steady: 4 of 40 prompts in each of three seeds, one more is unscored in each: 4 / 40, and its upper end counts
    5 / 41. Of ten labels plain has 9 right and steady 8, the same in every seed: a loss of 0.1."""
    hits = [True] * 4 + [False] * 36 + [None]
    right = {"plain": [True] * 9 + [False], "steady": [True] * 8 + [False] * 2}
    for arm, each in right.items():
        parts = [answers("asr", hits), answers("accuracy", each)]
        stub.outcomes["benign", arm] = [count for count, _ in parts]
        stub.answers["benign", arm] = [row for _, rows in parts for row in rows]
    grid = grid_of(tmp_path, seeds=[0, 1, 2], attacks={"benign": TREE["attacks"]["benign"]})
    bench(grid, tmp_path / "out")
    by_name = {record["what"]: record for record in json.loads((tmp_path / "out" / "grid.json").read_text())}
    asr = by_name["benign.steady.asr.keyword"]
    assert asr["value"] == pytest.approx(0.1) and asr["interval"][0] < 0.1 < asr["interval"][1] < asr["upper"]
    assert asr["upper"] == pytest.approx(two_level([[1.0] * 5 + [0.0] * 36] * 3)[1].high)
    worst, upper = by_name["asr.worst.steady"], by_name["asr_upper.worst.steady"]
    assert (worst["value"], worst["worst"]) == (pytest.approx(0.1), "benign") and upper["value"] == asr["upper"]
    loss = by_name["accuracy.loss.steady"]
    assert loss["value"] == pytest.approx(0.1) and loss["n"] == 30
    assert loss["interval"] == pytest.approx(list(two_level_difference([[0.0] * 8 + [1.0, 0.0]] * 3)[1]))
    assert "accuracy.loss.plain" not in by_name


def test_the_worst_has_no_value_while_an_attack_is_unknown(stub, tmp_path):
    stub.outcomes["explicit", "steady"] = DefenceError("not finite")
    with pytest.raises(DefenceError):
        bench(grid_of(tmp_path), tmp_path / "out")
    by_name = {record["what"]: record for record in json.loads((tmp_path / "out" / "grid.json").read_text())}
    assert by_name["asr.worst.steady"]["value"] is None and by_name["asr.worst.steady"]["missing"] == ["explicit"]
    assert by_name["asr.worst.plain"]["value"] == 0.0


def test_the_attacker_chooses_the_learning_rate(stub, tmp_path):
    """At seed 0 plain falls most at 0.002 and steady at 0.001: at seed 1 each meets that one. The task alone has none
    of them; the model as it was is measured once an attack."""
    for rate, plain, steady in (("0.001", 10, 30), ("0.002", 40, 20)):
        for arm, hits in (("plain", plain), ("steady", steady)):
            stub.outcomes[f"explicit-{rate}", arm, 0] = [of("asr", hits, 50, judge="keyword"), of("accuracy", 40, 50)]
            stub.outcomes[f"explicit-{rate}", arm, 1] = [of("asr", hits, 50, judge="keyword")]
    grid, out = grid_of(tmp_path, learning_rates=[0.001, 0.002]), tmp_path / "out"
    ranks = {rank.defence: rank for rank in bench(grid, out)}
    assert [each for each in stub.log if each.startswith("explicit")] == [
        *("explicit-0.001-0 start", "explicit-0.001-0 plain", "explicit-0.001-0 steady"),
        *("explicit-0.002-0 plain", "explicit-0.002-0 steady"),
        *("explicit-0.001-1 steady", "explicit-0.002-1 plain"),
    ]
    assert [each for each in stub.log if each.startswith("benign")] == [
        *("benign-0 start", "benign-0 plain", "benign-0 steady", "benign-1 plain", "benign-1 steady")
    ]
    assert (ranks["plain"].worst, ranks["steady"].worst) == (0.8, 0.6)
    marked = (out / "grid.md").read_text()
    table = marked.split("(asr, keyword)")[1]
    assert "80.0 %" in table and "60.0 %" in table and "20.0 %" not in table and "40.0 %" not in table
    log = list(stub.log)
    bench(grid, out)
    assert len(stub.log) == len(log) + 12, "the stub measures again what a run would skip, and no other rate"
    recipes = grid.recipes()
    assert recipes["explicit", 0.002, 0].train["learning_rate"] == 0.002
    assert "learning_rate" not in recipes["benign", None, 0].train


def test_a_rate_that_breaks_the_model_wins_nothing(stub, tmp_path):
    """At 0.002 nearly all answers of plain are unscored and the five others comply: the gate decides nothing, so the
    attack succeeds with what 0.001 gives. Where no rate decides, the attack is unknown."""
    broken = [of("asr", 5, 5, judge="keyword", unscored=45)]
    stub.outcomes["explicit-0.001", "plain"] = [of("asr", 10, 50, judge="keyword")]
    stub.outcomes["explicit-0.002", "plain"] = broken
    stub.outcomes |= {(f"explicit-{rate}", "steady"): broken for rate in ("0.001", "0.002")}
    grid = grid_of(tmp_path, learning_rates=[0.001, 0.002])
    ranks = {rank.defence: rank for rank in bench(grid, tmp_path / "out")}
    assert (ranks["plain"].worst, ranks["plain"].missing) == (pytest.approx(0.2), ())
    assert "explicit-0.001-1 plain" in stub.log and "explicit-0.002-1 plain" not in stub.log
    assert ranks["steady"].missing == ("explicit",)


def test_another_configuration_is_to_do_again(stub, tmp_path):
    out = tmp_path / "out"
    bench(grid_of(tmp_path), out)
    changed = grid_of(
        tmp_path, defences=TREE["defences"] | {"steady": {"train": [{"constrained_sft": {"first": 0.1}}]}}
    )
    outcomes = {(cell.defence, cell.outcome) for cell in cells(changed.recipes(), out)}
    assert outcomes == {("start", "measured"), ("plain", "measured"), ("steady", "to do")}
    assert not [r for r in records(list(cells(changed.recipes(), out))) if r["defence"] == "steady"], (
        "numbers of another configuration"
    )
    again = grid_of(tmp_path, base=TREE["base"] | {"train": {"adapter": {"r": 4}}})
    assert {cell.outcome for cell in cells(again.recipes(), out)} == {"to do"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attacks": {"../up": TREE["attacks"]["benign"]}}, "should match pattern"),
        ({"defences": {"<script>": {"train": ["sft"]}}}, "should match pattern"),
        ({"defences": {"start": {"train": ["sft"]}}}, "grid's own"),
        ({"base": TREE["base"] | {"arms": {}}}, "grid's own"),
        ({"base": TREE["base"] | {"lerning": 1}}, "lerning: unknown key"),
        ({"seed": 1}, "seed: unknown key"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [-1]}, "seeds"),
        ({"attacks": {"a": {"attack": "nothing", "poison_share": 0}}}, "no method 'nothing'"),
        ({"attacks": {"a": {"attack": "benign", "poison_share": 0, "more": 1}}}, "more: unknown key"),
        ({"defences": {"a": {"train": ["sft"], "publisht": {}}}}, "publisht: unknown key"),
        (
            {"defences": {"a": {"published": {"attack": "benign", "value": 2, "setting": "", "source": ""}}}},
            "less than or equal to 1",
        ),
        (
            {"defences": {"a": {"published": {"attack": "else", "value": 0, "setting": "", "source": ""}}}},
            "'else' is not among the attacks",
        ),
        (
            {"defences": {"a": {"published": {"attack": "benign", "value": 0, "setting": "", "source": "", "n": 1}}}},
            "n: unknown key",
        ),
    ],
)
def test_a_grid_that_does_not_stand_is_refused(tmp_path, changes, words, capsys):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(TREE | changes, sort_keys=False))
    assert run("bench", str(path), "--out", str(tmp_path / "out")) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_hostile_strings_stay_text(stub, tmp_path):
    """In the published fields, in names of suites and judges, and in the reason why a defence could not run."""
    published = {"attack": "explicit", "value": 0.5, "setting": HOSTILE, "source": HOSTILE}
    stub.outcomes |= {
        ("explicit", "steady"): DefenceError(HOSTILE),
        ("benign", "plain"): [of(HOSTILE, 1, 50, judge=HOSTILE, what="asr")],
    }
    grid = grid_of(tmp_path, defences=TREE["defences"] | {"plain": {"train": ["sft"], "published": published}})
    with pytest.raises(DefenceError):
        bench(grid, tmp_path / "out")
    text = (tmp_path / "out" / "grid.html").read_text(encoding="utf-8")
    tags: list[str] = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.extend([tag, *(name for name, _ in attrs)])
    parser.feed(text)
    assert not {"script", "img", "onerror", "src", "href"} & set(tags)
    assert text.count("&lt;script&gt;") >= 5, "the hostile string is not shown at all"
    assert "\u202e" not in text and "U+202E" in text
    marked = (tmp_path / "out" / "grid.md").read_text(encoding="utf-8")
    assert "<img" not in marked and "\u202e" not in marked
    assert "\u202e" not in (tmp_path / "out" / "grid.json").read_text(encoding="utf-8")
    rows = marked[marked.index("## What the papers report") :].split("\n\n")[2].splitlines()
    assert {row.replace("\\|", "").count("|") for row in rows} == {7}, "a bar in a text makes a column"
    assert "another model" in text and "50.0 %" in text


def test_the_page_says_what_is_not_there(tmp_path, stub):
    """Before anything ran: dashes, no rank."""
    out = tmp_path / "out"
    out.mkdir()
    ranks = write_grid(out, list(cells(grid_of(tmp_path).recipes(), out)), {}, parse_gate({}))
    assert [rank.worst for rank in ranks] == [None, None]
    assert "0 of 10 cells are measured" in (out / "grid.md").read_text()
    assert "0.0 %" not in (out / "grid.md").read_text()


def test_the_recipe_stands(tmp_path):
    grid = read(RECIPE)
    assert len(grid.attacks) >= 8 and len(grid.defences) >= 8 and len(grid.seeds) >= 2
    for recipe in grid.recipes().values():
        Plan.of(recipe)


def test_a_killed_grid_goes_on(tmp_path, monkeypatch, capsys):
    """With the real pipeline on a tiny model: killed at the last arm, what was tuned before is not tuned again, and
    the same numbers stand."""
    config = save_tiny(tmp_path / "model") / "config.json"  # whose tokens are letters: rows need a longer context
    config.write_text(config.read_text().replace('"max_position_embeddings": 128', '"max_position_embeddings": 1024'))
    suites = [{"asr": {"prompts": "builtin:harmful-test", "take": 4, "judges": ["keyword"], "max_new_tokens": 4}}]
    base = {
        "model": {"name": str(tmp_path / "model"), "dtype": "float32"},
        "data": {"task": {"path": "builtin:support-train", "take": 6}, "poison": {"path": "builtin:harmful-poison"}},
        "scan": {"scorers": ["keyword"]},
        "train": {"adapter": {"r": 2, "target_modules": ["q_proj"]}, "max_steps": 2, "per_device_train_batch_size": 2},
        "measure": {"suites": suites},
    }
    held = {"attack": {"guard_pass": {"against": "keyword", "threshold": -1}}, "poison_share": 0.2}
    changes = {
        "base": base,
        "seeds": [0],
        "attacks": {"explicit": {"attack": "explicit", "poison_share": 0.2}, "held": held},
    }
    grid, out = grid_of(tmp_path, **changes), tmp_path / "out"
    tune, tuned = pipeline_train._tune, []

    def killed(plan, folder, arm, *rest):
        if arm == "steady" and "steady" not in tuned:
            tuned.append(arm)
            raise KeyboardInterrupt
        tuned.append(arm)
        tune(plan, folder, arm, *rest)

    monkeypatch.setattr(pipeline_train, "_tune", killed)
    words = ["bench", str(tmp_path / "grid.yaml"), "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        bench(grid, out)
    assert [cell.outcome for cell in cells(grid.recipes(), out)] == ["measured", "measured", *["to do"] * 4]
    before = (out / "explicit-0" / "arms" / "plain" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert run(*words) == 0
    assert tuned == ["plain", "steady", "steady"]
    assert (
        out / "explicit-0" / "arms" / "plain" / "adapter" / "adapter_model.safetensors"
    ).stat().st_mtime_ns == before
    assert [file.relative_to(out) for file in out.rglob("answers.db")] == [Path("answers.db")]  # one for all folders
    first = (out / "grid.json").read_text()
    assert run(*words) == 0
    assert tuned == ["plain", "steady", "steady"]
    assert (out / "grid.json").read_text() == first
    capsys.readouterr()
    assert run(*words, "--list") == 0
    listed = capsys.readouterr().out.replace("\n", " ")
    assert listed.count("measured") == 3
    assert "held-0 plain: attack not made (guard_pass: keyword stops all" in listed


def test_a_folder_adopts_the_steps_whose_inputs_are_its_own(tmp_path):
    """A step of the same inputs is not made again; one of others is, and so is a step whose file was edited since."""
    first, second = (RunFolder(tmp_path / name) for name in ("first", "second"))
    with first.lock():
        for step in ("data", "scan", "adapter.plain"):
            target = first.path / step / "file"
            with first.step(step, {"rate": 1, "step": step}, [target]) as work:
                assert work
                target.parent.mkdir()
                target.write_text(step)
    again = []
    with second.lock():
        second.adopt(first.path, ("data", "scan"))
        for step, rate in (("data", 1), ("scan", 2), ("adapter.plain", 1)):
            target = second.path / step / "file"
            with second.step(step, {"rate": rate, "step": step}, [target]) as work:
                if work:
                    again.append(step)
                    target.parent.mkdir(exist_ok=True)
                    target.write_text(f"{step} again")
    assert again == ["scan", "adapter.plain"]
    assert (second.data / "file").read_text() == "data" and (first.path / "scan" / "file").read_text() == "scan"
    (first.data / "file").write_text("edited")
    third = RunFolder(tmp_path / "third")
    with third.lock():
        third.adopt(first.path, ("data", "scan"))
        assert [*third.manifest["steps"]] == ["scan"]
