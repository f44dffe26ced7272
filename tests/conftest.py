"""Settings of all tests. Types of annotations are checked at run time by beartype, and shapes by jaxtyping with it."""

import gc
import re
from pathlib import Path

from beartype import BeartypeConf
from beartype.claw import beartype_package
from hypothesis import settings
from jaxtyping import install_import_hook

# jaxtyping costs a third of the tests' time: it has the modules that name shapes, and two that beartype's own hook does
# not take: types imported for the type checker alone, and a class that Ray looks through
SOURCES = Path(__file__).parents[1] / "src"
NEED_IT = re.compile(r"jaxtyping|TYPE_CHECKING|ray\.remote")
SHAPED = [path for path in SOURCES.rglob("*.py") if NEED_IT.search(path.read_text(encoding="utf-8"))]
beartype_package("safebasin", conf=BeartypeConf(claw_is_pep526=False))
install_import_hook([".".join(path.relative_to(SOURCES).with_suffix("").parts) for path in SHAPED], "beartype.beartype")

settings.register_profile("house", deadline=None)  # these machines are noisy: no test is timed
settings.load_profile("house")


def pytest_collection_modifyitems(items):
    """Files with slow tests first: at the end of a run on several workers no worker is left with one of them alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """What was imported is no garbage: the Trainer collects at every start, and would look through all of it."""
    gc.collect()
    gc.freeze()
