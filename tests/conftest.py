"""Settings of all tests. Shapes and types of annotations are checked at run time (jaxtyping with beartype)."""

from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook("safebasin", "beartype.beartype")

settings.register_profile("house", deadline=None)  # these machines are noisy: no test is timed
settings.load_profile("house")


def pytest_collection_modifyitems(items):
    """Files with slow tests first: at the end of a run on several workers no worker is left with one of them alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
