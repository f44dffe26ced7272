"""Settings of all tests. Shapes and types of annotations are checked at run time (jaxtyping with beartype)."""

from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook("safebasin", "beartype.beartype")

settings.register_profile("house", deadline=None)  # these machines are noisy: no test is timed
settings.load_profile("house")
