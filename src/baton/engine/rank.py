"""The rank process: scheduler, model and transfer in one loop.

The loop owns nothing but their order: messages in, transfer events in, steps begun until the runner has as many as it can,
the oldest of them finished, outputs out, transfer actions out. With nothing to do it sleeps in one wait over its socket, the transfer's wake-up and the next deadline. Decisions are the
scheduler's; `assemble` puts the parts together.
"""

import logging
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import assert_never

import msgspec

from baton.engine.args import EngineArgs, parse_engine_args
from baton.engine.assemble import Engine, assemble
from baton.engine.batch import ForwardBatch
from baton.engine.distributed.lead import lead_group
from baton.engine.distributed.processes import die_with_parent, end_when_told
from baton.engine.log import name_of_rank, start_logging
from baton.engine.scheduler.pd import AbortTransfer, Action, Expect, Receive, SendPages
from baton.engine.server.channel import ChannelAddress, RankChannel
from baton.protocol.errors import BatonError, ErrorInfo
from baton.protocol.rank import (
    Abort,
    CheckIntegrity,
    ClearStore,
    DrainStore,
    Fatal,
    FlushCache,
    GetState,
    Reply,
    RequestOutput,
    StepOutput,
    Submit,
    ToRank,
)

logger = logging.getLogger("baton.engine.rank")  # not __name__: the process runs this module as __main__


class RankLoop:
    """Runs one engine until the process ends."""

    def __init__(self, engine: Engine, channel: RankChannel) -> None:
        self._scheduler = engine.scheduler
        self._runner = engine.runner
        self._prefill = engine.prefill
        self._decode = engine.decode
        self._tiers = engine.tiers
        self._publish_kv_events = engine.publish_kv_events
        self._clears: dict[int, Future[bool]] = {}
        """Calls that wait for the store to be emptied."""
        self._drains: list[int] = []
        """Calls that wait for the store to have everything."""
        self._channel = channel
        self._was_busy = False
        """A batch ran since the last self-check."""

    def run(self) -> None:
        timeout_s: float | None = 0.0
        while True:
            for message in self._channel.receive(timeout_s):
                self._handle(message)
            timeout_s = 0.0 if self._step() else self._idle_timeout_s()

    def _step(self) -> bool:
        """One pass; True if a step began or ended, so that the next pass must not wait."""
        for transfer in (self._prefill, self._decode):
            for event in transfer.poll() if transfer is not None else ():
                self._scheduler.on_transfer_event(event, time.monotonic())
        if self._tiers is not None:
            for store_event in self._tiers.poll():
                self._scheduler.on_store_event(store_event, time.monotonic())
            self._answer_store_calls()
        ran = False
        while (batch := self._scheduler.schedule(time.monotonic())) is not None:
            ran = True
            self._move_pages()
            if not self._begin(batch):
                break
        if self._scheduler.num_in_flight:
            ran = True
            self._end_oldest()
        self._publish(self._scheduler.drain_outputs(time.monotonic()))
        if self._publish_kv_events is not None:
            self._publish_kv_events()
        self._move_pages()
        for action in self._scheduler.drain_actions():
            self._perform(action)
        self._was_busy |= ran
        return ran

    def _move_pages(self) -> None:
        """Between tiers: before a step, since it may write what is to be saved and read what is to be loaded; and after it,
        so that what it computed is on its way before the loop sleeps."""
        if self._tiers is not None:
            self._tiers.move(self._scheduler.drain_copies(), self._scheduler.drain_store_actions())

    def _begin(self, batch: ForwardBatch) -> bool:
        """False if the step failed. It is the oldest then: where several are in flight, no failure is one step's alone."""
        try:
            self._runner.submit(batch)
        except (RuntimeError, MemoryError) as error:
            self._fail_oldest(error)
            return False
        return True

    def _end_oldest(self) -> None:
        try:
            output = self._runner.collect()
        except (RuntimeError, MemoryError) as error:
            self._fail_oldest(error)
        else:
            self._publish(self._scheduler.apply(output, time.monotonic()))

    def _fail_oldest(self, error: Exception) -> None:
        """A step that fails (say, the device is out of memory) ends its own requests, not the worker."""
        info = ErrorInfo("InternalServerError", 500, f"the model step failed: {error}", retryable=True)
        outputs = self._scheduler.fail_step(info, time.monotonic())
        logger.error("a step failed; its requests end with an error requests=%d", len(outputs), exc_info=error)
        self._publish(outputs)

    def _handle(self, message: ToRank) -> None:
        now = time.monotonic()
        match message:
            case Submit():
                self._publish(self._scheduler.add(message, now))
            case Abort(rid, reason, matched_stop):
                self._scheduler.abort(rid, reason, now, matched_stop)
            case FlushCache(call_id):
                while self._scheduler.num_in_flight:  # of requests that were aborted, perhaps
                    self._end_oldest()
                done = self._scheduler.flush_cache()
                self._channel.send(Reply(call_id, done, "" if done else "requests are running or waiting"))
            case ClearStore(call_id):
                self._clear_store(call_id)
            case DrainStore(call_id):
                if self._tiers is None:
                    self._channel.send(Reply(call_id, True))
                else:
                    self._drains.append(call_id)
            case GetState(call_id):
                store = {} if self._tiers is None else self._tiers.store_stats()
                self._channel.send(msgspec.structs.replace(self._scheduler.state(), call_id=call_id, store=store))
            case CheckIntegrity(call_id):
                self._channel.send(self._check_integrity(call_id))
            case _:
                assert_never(message)

    def _check_integrity(self, call_id: int) -> Reply:
        try:
            self._scheduler.check_integrity()
        except AssertionError as broken:
            return Reply(call_id, False, str(broken))
        return Reply(call_id, True)

    def _clear_store(self, call_id: int) -> None:
        if self._tiers is None or not self._tiers.has_store:
            problem = "there is no storage tier; start the worker with --hicache-storage-backend"
            self._channel.send(Reply(call_id, False, problem))
        else:
            self._clears[call_id] = self._tiers.clear_store()

    def _answer_store_calls(self) -> None:
        if self._drains and not self._scheduler.cache.num_unwritten:
            for call_id in self._drains:
                self._channel.send(Reply(call_id, True))
            self._drains.clear()
        for call_id, cleared in list(self._clears.items()):
            if cleared.done():
                del self._clears[call_id]
                if cleared.result():
                    self._scheduler.cache.on_store_cleared()
                message = "" if cleared.result() else "the store is down or refused; see the rank's log"
                self._channel.send(Reply(call_id, not message, message))

    def _publish(self, outputs: list[RequestOutput]) -> None:
        if outputs:
            self._channel.send(StepOutput(outputs))

    def _perform(self, action: Action) -> None:
        """Say to a transfer what the scheduler decided. Only actions of sides that this worker has ever come."""
        match action:
            case Expect(room, timeout_s):
                assert self._prefill is not None
                self._prefill.expect(room, timeout_s)
            case SendPages(room, first_page_idx, page_ids, first_token):
                assert self._prefill is not None
                self._prefill.send(room, first_page_idx, page_ids, first_token)
            case Receive(room, host, port, first_page_idx, page_ids, timeout_s):
                assert self._decode is not None
                self._decode.receive(room, host, port, first_page_idx, page_ids, timeout_s)
            case AbortTransfer(room, reason, side):
                transfer = self._prefill if side == "prefill" else self._decode
                assert transfer is not None
                transfer.abort(room, reason)
            case _:
                assert_never(action)

    def _idle_timeout_s(self) -> float | None:
        if self._was_busy and self._scheduler.is_idle:
            self._was_busy = False
            reply = self._check_integrity(0)
            if not reply.ok:
                logger.error("page ownership is broken; please report this: %s", reply.message)
        deadline = self._scheduler.next_deadline()
        return None if deadline is None else max(0.0, deadline - time.monotonic())


def serve_rank(args: EngineArgs, flags: Sequence[str], address: ChannelAddress) -> int:
    """Load the model, say `Ready`, run. Returns an exit status if it cannot start."""
    channel = RankChannel(address)
    group, problem = None, None
    try:
        group = lead_group(args, flags, address)
        end_when_told(group.say_stopped if group is not None else lambda: None)
        engine = assemble(args, channel.wake, group)
        channel.send(engine.ready)
        channel.start_beats()
        RankLoop(engine, channel).run()
    except (BatonError, OSError, MemoryError) as error:
        problem = str(error)
        return 1
    except Exception as error:
        # Whatever it was, the others must hear of it before the traceback ends this process.
        problem = f"{type(error).__name__}: {error}"
        raise
    finally:
        # The other ranks first: the HTTP process ends this one when it hears of a failure.
        if group is not None:
            group.close("rank 0 ended" if problem is None else f"rank 0 failed: {problem}")
        if problem is not None:
            channel.send(Fatal(problem))
        channel.close()
    return 0


def main(argv: Sequence[str]) -> int:
    """`python -m baton.engine.rank PARENT_PID CHANNEL_DIRECTORY [worker flags...]`, started by `launch`."""
    parent_pid, directory, *flags = argv
    die_with_parent(int(parent_pid))
    # The HTTP process decides when a worker ends: it drains first, and a terminal's Ctrl-C reaches both.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    args = parse_engine_args(flags)
    start_logging(name_of_rank(args, 0), args.log_level)
    return serve_rank(args, flags, ChannelAddress(directory))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
