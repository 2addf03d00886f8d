"""What to do when the pages run out: whom to send back to the queue, and how careful to be afterwards.

Pure decisions; the scheduler carries them out. A retracted request keeps its tokens and computes them again later, which
costs time and never changes a token.
"""

from collections.abc import Iterable

from baton.engine.scheduler.request import Request

INITIAL_RATIO = 0.7
MIN_RATIO_FACTOR = 0.14
DECAY_STEPS = 600
HEADROOM_STEPS = 20
"""After a retraction there is room for this many decode steps, so that the next one is not due at once."""


class NewTokenRatio:
    """The part of the output limit that requests are expected to use. It falls while nothing runs out, and jumps up when
    something did (SGLang's constants)."""

    def __init__(self, conservativeness: float) -> None:
        self._initial = min(INITIAL_RATIO * conservativeness, 1.0)
        self._least = min(self._initial * MIN_RATIO_FACTOR, 1.0)
        self._decay = (self._initial - self._least) / DECAY_STEPS
        self.value = self._initial

    def on_decode_step(self, share: float = 1.0) -> None:
        """`share` of the running requests got a token."""
        self.value = max(self.value - self._decay * share, self._least)

    def on_retraction(self, running: Iterable[Request]) -> None:
        decoded = limits = count = 0
        for req in running:
            decoded += len(req.output_ids)
            limits += req.output_limit
            count += 1
        self.value = min(1.0, (decoded + HEADROOM_STEPS * count) / (limits + 1))

    def on_idle(self) -> None:
        self.value = self._initial


def next_victim(running: Iterable[Request]) -> Request:
    """Fewest output tokens first (least is lost), then the longest prompt (most is gained), then the latest arrival."""
    return min(running, key=lambda req: (len(req.output_ids), -len(req.prompt_ids), -req.arrival_idx))
