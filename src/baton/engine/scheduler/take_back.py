"""Pages for prompts that a peer waits for, taken back from requests that wait for a peer.

Only a worker of mode "both" needs it. Its pool holds what peers send (RECEIVING) and what it computes for peers (part
"prefill"), and two such workers may each have filled theirs with the first kind while each waits for room for the second.
Everything else that holds pages ends without a peer's scheduler: a prompt is only computed for a peer that has its pages
(so SENDING ends), and what runs ends or is retracted. So when nothing runs and such a prompt lacks pages, the last of the
received is withdrawn: its transfer ends, and it is computed here. Nobody is withdrawn twice, so the cycle opens on whichever
worker acts first. What comes by itself is given some time before that, since withdrawing computes a prompt twice.
"""

from baton.engine.scheduler import pd
from baton.engine.scheduler.places import Places
from baton.engine.scheduler.request import Request, Status

_ENDING = (Status.SENDING, Status.CANCELLING, Status.WITHDRAWING)
"""Holding pages of a room that needs no page of ours to end."""


class TakeBack:
    def __init__(self, at: Places, after_s: float) -> None:
        self._at = at
        self._after_s = after_s
        self._since_s: float | None = None
        """From when on a prompt has lacked pages."""
        self.deadline: float | None = None
        """When `check` must be called again, whatever happens."""

    def check(self, lacks_pages: bool, now: float) -> None:
        """At the end of a schedule. `lacks_pages`: nothing runs, and something that waits got no pages."""
        self.deadline = None
        receiving = self._receiving() if lacks_pages else []
        if not receiving:
            self._since_s = None
            return
        if any(req.status in _ENDING for req in self._at.rooms):
            return  # their end is an event, and after it this is looked at again
        if self._since_s is None:
            self._since_s = now
        if now < self._since_s + self._after_s:
            self.deadline = self._since_s + self._after_s
        else:
            self._withdraw(max(receiving, key=lambda req: req.arrival_idx))

    def _receiving(self) -> list[Request]:
        """Who could give pages; nobody, unless a prompt for a peer waits."""
        at = self._at
        waiting = [*at.waiting] if at.chunked is None else [*at.waiting, at.chunked]
        if not any(req.part == "prefill" for req in waiting):
            return []
        return [req for req in at.rooms if req.status is Status.RECEIVING]

    def _withdraw(self, req: Request) -> None:
        assert req.bootstrap is not None
        req.move_to(Status.WITHDRAWING)
        req.num_retractions += 1
        self._at.counters.num_retracted_total += 1
        reason = "the decode worker needs the pages for a prompt that another waits for, and computes this one itself"
        self._at.rooms.act(pd.AbortTransfer(req.bootstrap.room, reason, "decode"))
