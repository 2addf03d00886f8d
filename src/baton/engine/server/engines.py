"""All engines of a worker (`--dp-size`) behind what the handlers use: a request's sequences dealt out, calls to all, one end for all.

An engine that is lost takes the others with it: the worker ends, and whoever supervises it starts it again. Neighbours: `client` (one
engine), `dispatch` (who gets what). Not here: processes.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import msgspec

from baton.engine.server.client import CALL_TIMEOUT_S, EngineClient, RankLostError, duplicate_rid
from baton.engine.server.dispatch import Dispatcher, EngineLoad, RoundRobin
from baton.engine.server.generation import Generation, Job
from baton.protocol.errors import RequestError
from baton.protocol.rank import Ready, Reply, SchedulerState, Submit

DEADLINE_GRACE_S = 2.0
"""The rank ends a request at its deadline; this process only steps in when it has not."""


class Engines:
    """At least one. All methods run in the event loop."""

    def __init__(self, clients: Sequence[EngineClient]) -> None:
        self.clients = clients
        self._dispatcher = Dispatcher(RoundRobin())
        self._by_rank = {one.dp_rank: one for one in clients}
        self.on_lost: Callable[[], None] = lambda: None
        """Called when the worker can only end; more than once."""
        for client in clients:
            client.on_lost = partial(self._on_lost, client)

    @property
    def count(self) -> int:
        return len(self.clients)

    @property
    def num_in_flight(self) -> int:
        return sum(one.num_in_flight for one in self.clients)

    @property
    def num_requests(self) -> int:
        """HTTP requests in progress."""
        return len({id(job) for one in self.clients for job in one.jobs()})

    @property
    def lost_reason(self) -> str | None:
        return next((one.lost_reason for one in self.clients if one.lost_reason is not None), None)

    def dispatch_by(self, dispatcher: Dispatcher) -> None:
        """How requests are dealt out from now on; what that takes is known when the engines are ready."""
        self._dispatcher = dispatcher

    def is_in_flight(self, rid: str) -> bool:
        return any(one.is_in_flight(rid) for one in self.clients)

    def submit(
        self,
        submits: Sequence[Submit | None],
        *,
        stream_interval: int | None,
        dp_rank: int | None = None,
    ) -> Job:
        """Start every sequence of one HTTP request (None: that choice ended before a resume). `dp_rank`: on this engine.

        Raises `RequestError`: an engine is gone (503), id in use, no such engine (400).
        """
        given = [(index, one) for index, one in enumerate(submits) if one is not None]
        self._check([one for _, one in given])
        loads = [EngineLoad(one.num_in_flight, one.num_tokens) for one in self.clients]
        chosen = self._dispatcher.dispatch([one for _, one in given], loads, dp_rank)
        generations = [
            self.clients[engine].generation_of(one, index, is_measured=True)
            for (index, one), engine in zip(given, chosen, strict=True)
        ]
        return self._begin(generations, stream_interval)

    def submit_to_each(self, submits: Sequence[Submit]) -> Job:
        """One sequence for each engine, in their order: requests this worker makes itself, which metrics leave out. Raises as `submit`."""
        self._check(submits)
        generations = [
            client.generation_of(one, index, is_measured=False)
            for index, (client, one) in enumerate(zip(self.clients, submits, strict=True))
        ]
        return self._begin(generations, stream_interval=1)

    def _check(self, submits: Sequence[Submit]) -> None:
        lost = next((one for one in self.clients if one.lost_reason is not None), None)
        if lost is not None:
            raise RequestError(lost.lost_error())
        seen: set[str] = set()
        for one in submits:
            if one.rid in seen:
                raise duplicate_rid(one.rid)
            seen.add(one.rid)
            for client in self.clients:
                client.need_new_rid(one.rid)

    def _begin(self, generations: list[Generation], stream_interval: int | None) -> Job:
        job = Job(generations, stream_interval, lambda one, reason: self._by_rank[one.dp_rank].end(one, reason))
        timeouts = [one.submit.timeout_s for one in generations if one.submit.timeout_s is not None]
        if timeouts:
            job.deadline = time.monotonic() + min(timeouts) + DEADLINE_GRACE_S
        for generation in generations:
            self._by_rank[generation.dp_rank].begin(generation, job)
        return job

    def abort(self, rid_prefix: str, *, reason: str = "Aborted") -> int:
        """End every sequence whose id starts with `rid_prefix` ("": all) for its user. How many there were."""
        return sum(one.abort(rid_prefix, reason=reason) for one in self.clients)

    async def states(self, timeout_s: float = CALL_TIMEOUT_S) -> list[SchedulerState]:
        """A fresh snapshot of each. Raises `RankLostError` when one does not answer in time."""
        return list(await asyncio.gather(*(one.state(timeout_s) for one in self.clients)))

    async def snapshots(self, timeout_s: float) -> list[SchedulerState]:
        """Fresh ones, or the last of those that are busy."""
        return list(await asyncio.gather(*(_snapshot(one, timeout_s) for one in self.clients)))

    async def flush_cache(self) -> Reply:
        """`ok`: all are empty now. One that is busy keeps its cache."""
        return await self._all(EngineClient.flush_cache)

    async def clear_store(self) -> Reply:
        return await self._all(EngineClient.clear_store)

    async def drain_store(self, timeout_s: float) -> Reply:
        """Returns when the store has every page that is to go there. Raises `RankLostError` when that takes longer."""
        return await self._all(lambda one: one.drain_store(timeout_s))

    async def check_integrity(self, timeout_s: float) -> Reply:
        return await self._all(lambda one: one.check_integrity(timeout_s))

    async def _all(self, call: Callable[[EngineClient], Awaitable[Reply]]) -> Reply:
        """What all say together; who says no is named where there are several."""
        replies = await asyncio.gather(*(call(one) for one in self.clients))
        problems = [
            reply.message if self.count == 1 else f"engine {client.dp_rank}: {reply.message}"
            for client, reply in zip(self.clients, replies, strict=True)
            if not reply.ok
        ]
        return Reply(0, not problems, "; ".join(problems))

    def silence_s(self) -> float:
        """How long the oldest unanswered call has waited; 0 when none waits."""
        return max(one.silence_s() for one in self.clients)

    def heard_since(self, started: float) -> bool:
        """Whether every rank has said something since (monotonic clock)."""
        return all(one.last_heard > started for one in self.clients)

    def start(self) -> None:
        """Begin to listen, in the running loop."""
        for one in self.clients:
            one.start()

    async def wait_ready(self, timeout_s: float) -> list[Ready]:
        """What each has loaded. Raises `RankLostError` if one fails to start in time."""
        return list(await asyncio.gather(*(one.wait_ready(timeout_s) for one in self.clients)))

    async def watch(self, limit_s: float) -> None:
        """Call an engine lost that does not answer for `limit_s`. Runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            for one in self.clients:
                group.create_task(one.watch(limit_s), name=f"watchdog-{one.dp_rank}")

    async def watch_beats(self) -> None:
        """Call an engine lost whose process stands still. Runs until cancelled, or until one is lost."""
        async with asyncio.TaskGroup() as group:
            for one in self.clients:
                group.create_task(one.watch_beats(), name=f"beats-{one.dp_rank}")

    def fail(self, reason: str) -> None:
        """The worker cannot go on: end everything, with errors that say a retry elsewhere may help."""
        for one in self.clients:
            one.fail(reason)

    def end_all(self, reason: str) -> None:
        """End what is in flight, with an error that says a retry elsewhere may help; the ranks go on."""
        for one in self.clients:
            one.end_all(reason)

    def _on_lost(self, lost: EngineClient) -> None:
        for one in self.clients:
            one.fail(f"engine {lost.dp_rank} of this worker is lost: {lost.lost_reason}")
        self.on_lost()


async def _snapshot(client: EngineClient, timeout_s: float) -> SchedulerState:
    try:
        return await client.state(timeout_s)
    except RankLostError:
        return client.last_state


def common_ready(readies: Sequence[Ready]) -> Ready:
    """What every engine can do: the smallest pool, since any of them may get a request."""
    return msgspec.structs.replace(
        readies[0],
        max_total_num_tokens=min(one.max_total_num_tokens for one in readies),
        max_req_input_len=min(one.max_req_input_len for one in readies),
        load_weights_s=max(one.load_weights_s for one in readies),
    )
