"""Hidden states between stages: nobody waits for a busy neighbour, and one that is gone or talks nonsense is named."""

import socket

import pytest
import torch

from baton.engine.distributed.control import GroupError
from baton.engine.distributed.ring import MAX_BYTES, Ring

CPU = torch.device("cpu")


def pairs() -> list[tuple[socket.socket, socket.socket]]:
    return [socket.socketpair() for _ in range(2)]


def test_everyone_can_send_more_than_the_sockets_hold_before_anyone_receives() -> None:
    (out, there), (back, home) = pairs()
    first, last = Ring(("last", out), ("last", home)), Ring(("first", back), ("first", there))
    chunks = [torch.randn(rows, 64) for rows in (20000, 1, 0)]
    for chunk in chunks:
        first.send(chunk)
        last.send(-chunk)
    for chunk in chunks:
        assert torch.equal(last.receive(64, torch.float32, CPU), chunk)
        assert torch.equal(first.receive(64, torch.float32, CPU), -chunk)
    first.close()
    last.close()


def test_a_neighbour_that_is_gone_is_named() -> None:
    (out, there), (back, home) = pairs()
    ring = Ring(("rank 1 (node 1)", out), ("rank 2 (node 2)", home))
    there.close()
    back.close()
    with pytest.raises(GroupError, match=r"^rank 2 \(node 2\) is gone"):
        ring.receive(64, torch.float32, CPU)
    with pytest.raises(GroupError, match=r"^rank 1 \(node 1\) is gone"):
        ring.send(torch.zeros(20000, 64))
    ring.close()


@pytest.mark.parametrize(
    ("data", "problem"),
    [((10).to_bytes(8, "little") + bytes(10), "10 bytes, which are no rows"),
     ((MAX_BYTES + 1).to_bytes(8, "little"), "that is no rank of ours")],
)  # fmt: skip
def test_nonsense_is_named(data: bytes, problem: str) -> None:
    (out, there), (back, home) = pairs()
    with there:
        ring = Ring(("next", out), ("previous", home))
        back.sendall(data)
        with pytest.raises(GroupError, match=f"^previous sent .*{problem}"):
            ring.receive(64, torch.float32, CPU)
        ring.close()
        back.close()
