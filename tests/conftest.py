"""The test process itself: its garbage collector, and what Hypothesis may not ask of a machine that does other work too."""

import gc

from hypothesis import HealthCheck, settings

settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")

# The collector would walk the same modules over and over while they are imported: half of the time of a collection.
gc.disable()


def pytest_collection_finish() -> None:
    """What is imported for the tests stays until the end: it need not be looked at again."""
    gc.freeze()
    gc.enable()
