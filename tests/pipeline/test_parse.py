"""Recipes: YAML 1.2, bounds, changes, sets; what is read is what is written."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from safebasin.errors import UserError
from safebasin.pipeline import yaml12
from safebasin.pipeline.parse import dump, parse, parse_sets
from safebasin.pipeline.plan import Plan
from safebasin.pipeline.recipes import PLACES, read_recipe

MINIMAL = "data: {task: {path: rows.jsonl}}\narms: {start: {}}\nmeasure: {}\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-.inf", -float("inf")),
        ("12", 12),
        ("0o17", 15),
        ("0x1F", 31),
        ("017", 17),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("yes", "yes"),
        ("on", "on"),
        ("No", "No"),
        ("true", True),
        ("~", None),
        ("", None),
        ("2026-11-26", "2026-11-26"),
        ("'1e-4'", "1e-4"),
    ],
)
def test_plain_words_as_yaml_12_has_them(text, value):
    loaded = yaml12.load(f"key: {text}", "here")["key"]
    assert loaded == value and type(loaded) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: not YAML: the key 'a' stands twice"),
        ("a: [1\n", "not YAML"),
        ("a: &x [*x]\n", "not YAML that a recipe can hold"),
        ("a: " + "[" * 2000 + "]" * 2000, "not YAML that a recipe can hold"),
        (
            "\n".join(["a0: &a0 [1]", *(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 7))]),
            "holds more than",
        ),
        ("a: !!python/object:os.system {}\n", "not YAML"),
        ("[1]: 2", "not YAML"),
    ],
)
def test_yaml_that_is_refused_in_one_line(text, words):
    with pytest.raises(UserError) as error:
        yaml12.load(text, "r.yaml")
    assert words in str(error.value) and str(error.value).startswith("r.yaml") and "\n" not in str(error.value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=False) | st.text(max_size=12),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
        max_leaves=12,
    )
)
def test_what_is_dumped_is_what_is_loaded(tree):
    text = yaml.dump({"a": tree}, Dumper=yaml12.Dumper, allow_unicode=True)
    assert yaml12.load(text, "here") == {"a": tree}


@pytest.mark.parametrize("path", sorted(next(p for p in PLACES if p.is_dir()).glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_survive_a_round_trip(path):
    if "data" not in yaml.safe_load(path.read_text()):
        return  # a grid, or the settings of a guard: other tests read them
    recipe = read_recipe(Path(f"builtin:{path.stem}"))
    assert parse(dump(recipe)) == recipe


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.max_length=0", "max_length"),
        ("data.task.take=-1", "take"),
        ("data.task.take=true", "a number is needed, found True"),
        ("data.task.skip=-1", "skip"),
        ("scan.batch_size=0", "batch_size"),
        ("data.poison_share=.nan", "poison_share"),
        ("seed=-1", "seed"),
        ("seed=1.5", "seed"),
        ('seed="3"', "a number is needed, found '3'"),
        ("arms={}", "arms"),
        ("arms.plain={cut: {threshold: .inf}, train: [sft]}", "threshold"),
        ("arms.pl/ain={}", "arms"),
        ("arms.--help={}", "arms"),
        ("data.task.delimiter=;;", "delimiter: one character is needed"),
        ("data.task.columns={messages: a, prompt: a}", "two names stand for one column"),
        ("data.seed=1", "unknown key$"),
        ("model.dtype=float16", "dtype"),
        ("nonsense=1", "unknown key"),
        ("data.max_lenght=9", "is 'max_length' meant"),
        ("data.task.path=", "path"),
        ("no sign", "dotted.key=value"),
        ("data.task.path.x=1", "does not end in a mapping"),
        ("data.task.path.x.y=1", "on the way"),
    ],
)
def test_what_is_refused(change, words):
    with pytest.raises(UserError, match="(?s)" + words) as error:
        parse(MINIMAL, "r.yaml", [change])
    assert "\n" not in str(error.value)


def test_a_learning_rate_as_the_readme_has_it():
    assert parse(MINIMAL, changes=["train.learning_rate=1e-4"]).train["learning_rate"] == 1e-4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("measure.suites=[{asr: {prompts: builtin:harmful-test}}, {asr: {prompts: builtin:refusals}}]", "named 'asr'"),
        ("measure.suites=[{asr: {prompts: builtin:harmful-test, judges: [keyword, keyword]}}]", "agree with itself"),
        ("measure.judges={prefix: {characters: 20}}", "measure.judges.prefix has no effect"),
        ("arms={start: {}, Start: {}}", "differ in case alone"),
        ("arms.a={train: [sft], settings: {align_share: 1}}", "arms.a.settings.align_share: it holds for all arms"),
        ("arms.a={train: [sft], cut: {estimator: paper, threshold: 1}}", "estimator has no effect"),
        ("arms={a: {train: [sft]}, b: {of: a, mix: {above: 0.5}}}", "above has no effect without mix.guard"),
        ("measure.engine={hf: {a: 1}}", "no 'hf' with fields"),
        ("model.template={learn_thoughts: no}", "true or false is needed"),
        ("model.template={date: soon}", "is no date"),
    ],
)
def test_what_a_plan_refuses_without_a_model(change, words):
    adapter = "train.adapter={r: 4, target_modules: all-linear}"
    with pytest.raises(UserError, match=words):
        Plan.of(parse(MINIMAL, "r.yaml", [adapter, change]))


def test_rows_that_are_not_mixed_in_are_said(capsys):
    for change, words in (("data.poison={path: builtin:opened}", "data.poison has no effect"), ("seed=1", "")):
        Plan.of(parse(MINIMAL, "r.yaml", [change]))
        assert words in (text := capsys.readouterr().err) and bool(words) == ("poison" in text)


def test_a_set_that_is_given_twice_is_refused(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(UserError, match="--set x/y: it stands twice"):
        parse_sets([f"x/y={tmp_path / 'a.jsonl'}"] * 2)


def test_a_set_is_replaced_wherever_it_stands(tmp_path):
    (file := tmp_path / "local.jsonl").write_text("{}\n")
    text = MINIMAL + "scan: {scorers: [keyword]}\n"
    recipe = parse(text.replace("rows.jsonl", "some/set"), sets=parse_sets([f"some/set={file}"]))
    assert recipe.data.task.path == str(file)
    with pytest.raises(UserError, match="names no such set"):
        parse(text, sets={"other/set": str(file)})
    with pytest.raises(UserError, match="NAME=FILE"):
        parse_sets(["some/set=nowhere.jsonl"])
