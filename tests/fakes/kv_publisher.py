"""A worker's KV event sockets as vLLM and SGLang have them, with every fault a test wants: gaps, garbage, no replay."""

import asyncio
import json

import zmq
import zmq.asyncio
from tests.fakes.fake_worker import FakeWorker

from baton.protocol.kv_events import END_SEQ, Event, EventBatch, encode_batch

HOST = "tcp://127.0.0.1"


class KvPublisher:
    """Announces itself in the worker's /get_server_info. `publish` waits until the router has subscribed."""

    def __init__(self, worker: FakeWorker, *, has_replay: bool = True, ports: tuple[int, int] = (0, 0)) -> None:
        self._context = zmq.asyncio.Context()
        self._pub = self._context.socket(zmq.XPUB)
        self._replay = self._context.socket(zmq.ROUTER)
        self.ports = (_bind(self._pub, ports[0]), _bind(self._replay, ports[1]))
        self.next_seq = 0
        self.kept: list[tuple[int, bytes]] = []
        self.num_replays = 0
        self._is_subscribed = False
        self._replayer = asyncio.get_running_loop().create_task(self._serve())
        config = {"publisher": "zmq", "endpoint": f"tcp://*:{self.ports[0]}"}
        if has_replay:
            config["replay_endpoint"] = f"tcp://*:{self.ports[1]}"
        worker.info["kv_events_config"] = json.dumps(config)

    async def publish(self, *events: Event, is_lost: bool = False) -> None:
        """`is_lost`: the batch has its number, and is kept, but nobody gets it."""
        await self.send(encode_batch(EventBatch(1.0, list(events))), is_lost=is_lost)

    async def send(self, payload: bytes, *, is_lost: bool = False, is_kept: bool = True) -> None:
        seq, self.next_seq = self.next_seq, self.next_seq + 1
        if is_kept:
            self.kept.append((seq, payload))
        if not is_lost:
            await self.send_frames(b"", seq.to_bytes(8, "big"), payload)

    async def send_frames(self, *frames: bytes) -> None:
        async with asyncio.timeout(20):
            while not self._is_subscribed:
                self._is_subscribed = (await self._pub.recv()).startswith(b"\x01")
        await self._pub.send_multipart(frames)

    async def _serve(self) -> None:
        while True:
            asker, _, start = await self._replay.recv_multipart()
            self.num_replays += 1
            for seq, payload in self.kept:
                if seq >= int.from_bytes(start, "big"):
                    await self._replay.send_multipart((asker, b"", seq.to_bytes(8, "big"), payload))
            await self._replay.send_multipart((asker, b"", END_SEQ, b""))

    async def close(self) -> None:
        self._replayer.cancel()
        await asyncio.wait([self._replayer])
        self._context.destroy(linger=0)


def _bind(socket: zmq.asyncio.Socket, port: int) -> int:
    if port:
        socket.bind(f"{HOST}:{port}")
        return port
    return int(socket.bind_to_random_port(HOST))
