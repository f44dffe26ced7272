"""Settings of all tests."""

from hypothesis import settings

settings.register_profile("house", deadline=None)  # these machines are noisy: no test is timed
settings.load_profile("house")
