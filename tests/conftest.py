"""For all tests: how long an example takes says something of the host, and nothing of the code."""

from hypothesis import settings

settings.register_profile("forky", deadline=None)
settings.load_profile("forky")
