"""The test process itself: what is imported for the tests stays until the end, so the garbage collector need not look at it."""

import gc

# The collector would walk the same modules over and over while they are imported: half of the time of a collection.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
