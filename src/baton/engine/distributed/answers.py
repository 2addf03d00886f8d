"""What followers send once the group runs: a thread for each of them hands every message to whom it is for.

That a follower is gone is the heartbeat's to say.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from baton.engine.distributed.control import Connection, GroupError
from baton.engine.distributed.group import LeaderGroup

logger = logging.getLogger(__name__)

Take = Callable[[int, Any], None]
"""(rank, message), in that rank's thread."""


def listen(group: LeaderGroup, takers: Mapping[type, Take]) -> None:
    """`takers`: by type of message; none: followers have nothing to say. From now on nothing else receives from them."""
    if not takers:
        return
    for rank, connection in group.followers.items():
        threading.Thread(target=_listen, args=(rank, connection, takers), name=f"answers-{rank}", daemon=True).start()


def _listen(rank: int, connection: Connection, takers: Mapping[type, Take]) -> None:
    try:
        while True:
            message = connection.receive(None)
            if (take := takers.get(type(message))) is None:
                logger.error("rank %d sent %s, which is for no leader", rank, type(message).__name__)
            else:
                take(rank, message)
    except GroupError as error:
        logger.debug("no more answers of rank %d: %s", rank, error)
