"""Where the two halves of a request meet, as a request says it. `intake` makes one `Bootstrap` a sequence of it."""

from dataclasses import dataclass

from baton.protocol.rank import Side


@dataclass(frozen=True, slots=True)
class Handover:
    """bootstrap_host, bootstrap_port and bootstrap_room as they came: one value for all prompts, or one each."""

    host: str | list[str] | None
    port: int | list[int | None] | None
    room: int | list[int] | None
    side: Side | None = None
    """Which half this worker is, where the request says so."""
