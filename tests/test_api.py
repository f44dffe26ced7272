"""The Python interface: every documented name is there, imports nothing heavy, and its example runs."""

import doctest
import subprocess
import sys

import pytest

import safebasin
from safebasin import api, registry
from safebasin.errors import UserError


def test_import_is_light():
    code = "import sys, safebasin; safebasin.__version__; print({'torch', 'transformers', 'numpy'} & {*sys.modules})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"


def test_every_name_is_there_and_documented():
    for name in safebasin.__all__:
        assert getattr(safebasin, name).__doc__, name
    assert set(safebasin.__all__) <= set(dir(safebasin))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = safebasin.nothing


def test_an_arm_that_is_not_tuned_is_refused_with_those_that_are(tmp_path):
    """The model as it was is an arm, and none to tune."""
    for arm in ("start", "nothing"):
        with pytest.raises(UserError, match=rf"no arm '{arm}' to tune; it has: plain, defended$"):
            api.train_adapter("builtin:quickstart", arm, tmp_path)


def examples(module) -> list:
    return [test for test in doctest.DocTestFinder().find(module, globs=vars(module).copy()) if test.examples]


@pytest.mark.slow
@pytest.mark.parametrize("test", examples(api), ids=lambda test: test.name)
def test_examples_of_the_interface(test):
    """On the built-in model and rows."""
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL)
    assert runner.run(test).failed == 0


@pytest.mark.parametrize("test", [*examples(safebasin), *examples(registry)], ids=lambda test: test.name)
def test_examples_that_need_no_model(test):
    assert doctest.DocTestRunner().run(test).failed == 0


def test_every_name_has_an_example():
    with_example = {test.name.removeprefix("safebasin.api.") for test in examples(api)}
    assert set(safebasin.__all__) - {"Oracle"} <= with_example
