"""What ends a benchmark with a message instead of figures."""

from baton.protocol.errors import BatonError


class BenchError(BatonError):
    """The run cannot be made as asked: a flag, a file or the server is named."""


class RequestFailedError(BatonError):
    """One request of a run did not get its answer."""
