"""One run of a workload: who sends what when, up to the barrier between rounds, until every conversation has ended.

Owns the order of sending. A request that fails ends its conversation: it is recorded and named, its later turns are not
asked, and nobody waits for them. With a round barrier the order is the same in every run: the seed alone decides it. Neighbours: `conversation` (what is said), `client` (one request), `report` (figures). Not here:
printing.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import aiohttp

from baton.bench.args import MultiturnArgs
from baton.bench.client import Answer, chat, flush_cache, generate
from baton.bench.conversation import Conversation, TextCodec
from baton.bench.errors import RequestFailedError
from baton.bench.workload import Workload


@dataclass(slots=True)
class Record:
    """One request that was sent."""

    client: int
    round_idx: int
    sent_s: float
    """Since the run began."""
    answer: Answer | None = None
    """None: it failed."""
    error: str = ""


@dataclass
class Run:
    records: list[Record] = field(default_factory=list)
    """In the order of sending."""
    histories: list[list[int]] = field(default_factory=list)
    """Token ids of each conversation at its end (`--prompt-format ids` only): a request's prompt is a prefix of it."""
    num_unsent: int = 0
    """Turns that were never asked, since an earlier one failed."""
    duration_s: float = 0.0
    """From the beginning until the last answer."""

    @property
    def failures(self) -> list[Record]:
        return [one for one in self.records if one.answer is None]


class Observer(Protocol):
    """Hears of progress; called in the event loop."""

    def on_record(self, record: Record) -> None: ...

    def on_round(self, round_idx: int, records: list[Record]) -> None: ...


BetweenRounds = Callable[[int], Awaitable[None]]
"""Called at the barrier with the index of the round that has ended; the next begins when it returns."""


class Runner:
    """Use once: `await Runner(...).run()`."""

    def __init__(
        self,
        args: MultiturnArgs,
        workload: Workload,
        codec: TextCodec,
        session: aiohttp.ClientSession,
        observer: Observer,
        *,
        request_rate: float,
        model: str = "",
        between_rounds: BetweenRounds | None = None,
    ) -> None:
        self._args = args
        self._session = session
        self._observer = observer
        self._rate = request_rate
        self._model = model
        self._between_rounds = between_rounds
        self._order = random.Random(args.seed)
        self._pauses = random.Random(args.seed + 1)
        self._conversations = [
            Conversation(client, questions, args, codec) for client, questions in enumerate(workload.questions)
        ]
        self._ready = list(self._conversations)
        self._behind_barrier: list[Conversation] = []
        self._open_in_round = {index: workload.clients_in(index) for index in range(workload.num_rounds)}
        self._num_open = workload.num_requests
        self._num_in_flight = 0
        self._changed = asyncio.Event()
        self._result = Run()
        self._started = 0.0

    async def run(self) -> Run:
        """Raises `BenchError` if a flush between rounds fails; a failing request is a record."""
        self._started = time.perf_counter()
        next_send = 0.0
        async with asyncio.TaskGroup() as group:
            while await self._may_send():
                await asyncio.sleep(max(0.0, next_send - time.perf_counter()))
                conversation = self._take_ready()
                self._num_in_flight += 1
                group.create_task(self._turn(conversation), name=f"client-{conversation.client}")
                next_send = time.perf_counter() + self._pause_s()
        if self._args.api_format == "sglang" and self._args.prompt_format == "ids":
            self._result.histories = [conversation.token_ids for conversation in self._conversations]
        return self._result

    async def _may_send(self) -> bool:
        """True once a client is ready and a place is free, False when there will be no other client. Requests have a
        time-out, so something changes."""
        while not self._ready or self._num_in_flight >= self._args.max_parallel:
            if self._num_open == 0:
                return False
            self._changed.clear()
            await self._changed.wait()
        return True

    def _take_ready(self) -> Conversation:
        is_random = self._args.ready_queue_policy == "random"
        return self._ready.pop(self._order.randrange(len(self._ready)) if is_random else 0)

    def _pause_s(self) -> float:
        if self._args.distribution == "poisson":
            return self._pauses.expovariate(self._rate)
        return self._pauses.uniform(0, 2 / self._rate)

    async def _turn(self, conversation: Conversation) -> None:
        record = Record(conversation.client, conversation.round_idx, time.perf_counter() - self._started)
        self._result.records.append(record)
        try:
            record.answer = await self._ask(conversation)
        except RequestFailedError as error:
            record.error = str(error)
        self._result.duration_s = time.perf_counter() - self._started
        self._num_in_flight -= 1
        self._observer.on_record(record)
        await self._after(conversation, record)
        self._changed.set()

    async def _ask(self, conversation: Conversation) -> Answer:
        if self._args.api_format == "openai":
            return await chat(
                self._session, f"{self._args.base_url}/v1/chat/completions", conversation.chat_body(self._model)
            )
        return await generate(self._session, f"{self._args.base_url}/generate", conversation.generate_body())

    async def _after(self, conversation: Conversation, record: Record) -> None:
        """Book a turn's end; the last one of a round opens the barrier."""
        num_left = conversation.num_left
        self._num_open -= 1
        self._open_in_round[record.round_idx] -= 1
        if record.answer is None:
            self._result.num_unsent += num_left
            self._num_open -= num_left
            for round_idx in range(record.round_idx + 1, record.round_idx + 1 + num_left):
                self._open_in_round[round_idx] -= 1
        elif num_left:
            conversation.go_on(record.answer)
            (self._behind_barrier if self._args.enable_round_barrier else self._ready).append(conversation)
        else:
            conversation.end(record.answer)
        if self._open_in_round[record.round_idx] == 0:
            await self._end_round(record.round_idx)

    async def _end_round(self, round_idx: int) -> None:
        self._observer.on_round(round_idx, [one for one in self._result.records if one.round_idx == round_idx])
        if not self._args.enable_round_barrier or not self._behind_barrier:
            return
        if self._args.flush_between_rounds:
            await flush_cache(self._session, self._args.flush_url or f"{self._args.base_url}/flush_cache")
        if self._between_rounds is not None:
            await self._between_rounds(round_idx)
        # By client and not by completion: then the seed alone decides the order of sending.
        self._ready += sorted(self._behind_barrier, key=lambda conversation: conversation.client)
        self._behind_barrier = []
