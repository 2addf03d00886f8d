"""One client request from its last byte to the last byte of its answer: tries, retries, migration, deadline, abort.

Everything that happens to a request passes through here, and every request ends in exactly one of: the worker's answer,
an error of the router, or silence to a client that has left. `attempt` does one try; `retry` decides whether another
helps; `relay` keeps what a broken stream needs to go on; `dispatch` knows what each worker is sent.
"""

import asyncio
import logging
from typing import Literal

from baton.protocol.errors import ABORTED_CODE, ErrorInfo, RequestError, Stage
from baton.protocol.hops import STAGE_HEADER, TIMEOUT_HEADER
from baton.router import body as bodies
from baton.router.attempt import Attempt
from baton.router.core import Core
from baton.router.dispatch import Dispatch
from baton.router.downstream import Request
from baton.router.errors import error_body, router_error
from baton.router.httpbytes import JSON_TYPE, header, passed_on
from baton.router.kv_index import Prompt
from baton.router.relay import DONE_EVENT
from baton.router.retry import Answer, Failure, RetryState, backoff_s, blames, hold_s, next_try_s
from baton.router.workers import Worker

log = logging.getLogger("baton.router")
_TIMEOUT_HEADER = TIMEOUT_HEADER.encode()
_STAGE_HEADER = STAGE_HEADER.encode()
MAX_LOOK_AGAIN_S = 0.25
"""How long a request that waits for a pair may miss one that is there."""


class Exchange:
    """Owns the request's deadline timer, its task and the current attempt. `Sink` of the attempt."""

    def __init__(self, core: Core, request: Request) -> None:
        self._core = core
        self._request = request
        self._loop = core.loop
        self._view = bodies.RequestView()
        self._dispatch: Dispatch | None = None
        self._state = RetryState()
        self._began = False
        self._ended_by: Literal["", "client", "deadline", "abort", "shutdown"] = ""
        self._prompt: Prompt | None = None
        self._deadline_s = request.received_s + core.config.request_timeout_s
        self._task: asyncio.Task[None] | None = None
        self.status = 0

    def start(self) -> None:
        self._task = self._loop.create_task(self._run())

    # What the client's connection tells

    def on_disconnect(self) -> None:
        self._end("client")

    def pause(self) -> None:
        if (attempt := self.attempt) is not None:
            attempt.pause()

    def resume(self) -> None:
        if (attempt := self.attempt) is not None:
            attempt.resume()

    @property
    def attempt(self) -> Attempt | None:
        """The try that is on its way, if any."""
        attempt = self._dispatch.attempt if self._dispatch is not None else None
        return attempt if attempt is not None and attempt.is_unfinished else None

    @property
    def pair(self) -> str:
        """The workers of the last try."""
        return self._dispatch.pair if self._dispatch is not None else ""

    def abort(self) -> None:
        """The request is aborted by its rid (`/abort_request`)."""
        self._end("abort")

    def shut_down(self) -> None:
        """The router stops and cannot wait any longer."""
        self._end("shutdown")

    def rid_starts_with(self, prefix: str) -> bool:
        rid = self._dispatch.first_rid if self._dispatch is not None else ""
        return rid.startswith(prefix) if isinstance(rid, str) else any(item.startswith(prefix) for item in rid)

    def _end(self, why: Literal["client", "deadline", "abort", "shutdown"]) -> None:
        if not self._ended_by and self._task is not None and not self._task.done():
            self._ended_by = why
            self._task.cancel()

    # The life of the request

    async def _run(self) -> None:
        core, request = self._core, self._request
        timer: asyncio.TimerHandle | None = None
        admitted = False
        core.exchanges.add(self)
        try:
            self._read_request()
            timer = self._loop.call_at(self._deadline_s, self._end, "deadline")
            if not core.admission.is_unlimited:
                await core.admission.enter()
                admitted = True
            await self._serve()
        except RequestError as error:
            self._answer_error(error.info)
        except asyncio.CancelledError:
            self._cancelled()
        except Exception:  # our bug: the client must still get its end
            log.exception("request failed request_id=%s", request.request_id)
            self._answer_error(router_error(500, "Internal error of the router.").info)
        finally:
            if timer is not None:
                timer.cancel()
            if self._dispatch is not None:
                self._dispatch.abandon()
            if self._prompt is not None:
                self._prompt.release()
            if admitted:
                core.admission.leave()
            core.exchanges.discard(self)
            core.on_exchange_end(self, request, self.status, self._began)

    def _read_request(self) -> None:
        request = self._request
        if (left := request.headers.get(_TIMEOUT_HEADER)) is not None:
            try:
                seconds = float(left)
            except ValueError:
                seconds = -1.0
            if not 0 < seconds < 1e9:
                raise router_error(400, f"{TIMEOUT_HEADER} must be a positive number of seconds.", param=TIMEOUT_HEADER)
            self._deadline_s = min(self._deadline_s, request.received_s + seconds)
        self._view = bodies.parse_body(request.body)
        if self._core.config.pd and self._view.names_peers:
            message = "kv_transfer_params is set by the router: whom a worker meets is not for clients to say."
            raise router_error(400, message, param="kv_transfer_params")
        self._dispatch = Dispatch(self._core, request, self._view, self, self._deadline_s)

    async def _serve(self) -> None:
        core, dispatch = self._core, self._dispatch
        assert dispatch is not None
        if core.wants_prompts and dispatch.batch_size is None:
            self._prompt = await core.prompts.read(self._view, self._request.body)
        while True:
            prefill, decode = await self._pick()
            if prefill is not None and core.protocol == "vllm" and self._request.path == b"/generate":
                message = "/generate is SGLang's: this router's workers speak vLLM's protocol; use /v1/completions."
                raise router_error(501, message)
            outcome = await dispatch.send(prefill, decode, has_begun=self._began)
            if isinstance(outcome, Answer):
                self._respond(outcome)
                return
            if not isinstance(outcome, Failure):
                self._request.connection.end_stream()
                return
            delay_s = self._learn(outcome)
            if delay_s is None:
                self._give_up(outcome)
                return
            if delay_s:
                await asyncio.sleep(delay_s)

    async def _pick(self) -> tuple[Worker | None, Worker]:
        """A prefill (PD) and a decode or regular worker. Waits for one as `retry` says, then raises `RequestError` (503)."""
        core, state, config = self._core, self._state, self._core.config.retry
        give_up_s = self._loop.time() + hold_s(state, config)
        looks = 0
        pair = core.pick_pair(self._view, state.tried, self._prompt)
        while pair is None:
            left_s = give_up_s - self._loop.time()
            if left_s <= 0:
                raise core.nobody_there()
            if not looks:
                log.info("request waits for a pair request_id=%s", self._request.request_id)
            await asyncio.sleep(min(left_s, backoff_s(looks, config, core.rng), MAX_LOOK_AGAIN_S))
            looks += 1
            if not core.registry.missing():  # looking alone neither counts as a choice nor teaches the policies
                pair = core.pick_pair(self._view, state.tried, self._prompt)
        state.had_pair = True
        return pair

    # After a failed try

    def _learn(self, failure: Failure) -> float | None:
        """What the failure means for the worker and for this request; seconds until the next try, None: give up."""
        core, state = self._core, self._state
        core.on_failure(failure, blames(failure))
        state.note(failure)
        if self._began and not self._prepare_migration(failure):
            return None
        if self._began:
            state.lost_worker = True
        delay_s = next_try_s(failure, state, core.config.retry, core.rng)
        if delay_s is not None:
            core.metrics.retries[failure.role, failure.kind] += 1
            log.info(
                "request tries again request_id=%s after=%s reason=%r delay_s=%.3f",
                self._request.request_id, failure.kind, failure.message, delay_s,
            )  # fmt: skip
        return delay_s

    def _prepare_migration(self, failure: Failure) -> bool:
        """Whether the begun stream can go on elsewhere; sets what the next worker gets."""
        dispatch, state, config = self._dispatch, self._state, self._core.config.retry
        assert dispatch is not None
        relay, attempt = dispatch.relay, dispatch.attempt
        assert relay is not None
        assert attempt is not None
        if attempt.decode_began:
            attempt.decode_began = False  # a failed connect leaves this attempt in place: look at it once
            num_choices = self._view.num_choices()
            if not relay.can_resume() or not failure.can_retry or state.migrations >= config.migration_limit:
                return False
            if relay.all_finished(num_choices) and not self._view.wants_usage:
                return False
            dispatch.resume = relay.resume(num_choices)
            state.migrations += 1
            self._core.metrics.migrations["started"] += 1
            log.warning(
                "stream migrates request_id=%s from=%s reason=%r", self._request.request_id, self.pair, failure.message
            )
        return failure.can_retry

    def _give_up(self, failure: Failure) -> None:
        if self._began:
            self._end_broken_stream(failure)
        elif failure.answer is not None:
            self._respond(_with_stage(failure.answer, failure.role))
        elif failure.kind == "event":
            self._respond_event(failure)
        else:
            status = 503 if failure.kind == "connect" else 502
            stage: Stage = "prefill" if failure.role == "prefill" else "decode"
            kind = "no_handover" if failure.kind == "handover" else "worker_lost"
            self._answer_error(router_error(status, failure.message, kind=kind, stage=stage, retryable=True).info)

    def _end_broken_stream(self, failure: Failure) -> None:
        relay, connection = self._dispatch.relay if self._dispatch is not None else None, self._request.connection
        assert relay is not None
        if failure.kind == "lost" and relay.all_finished(self._view.num_choices()) and not self._view.wants_usage:
            connection.write(DONE_EVENT)
        elif failure.kind == "event" and failure.event:
            self.status = 502
            connection.write(failure.event)
        else:
            self.status = 502
            info = router_error(502, failure.message, kind="stream_lost", stage="decode", retryable=True).info
            connection.write(self._error_event(info))
        if self._state.migrations or self.status == 502:
            self._core.metrics.migrations["failed"] += 1
        connection.end_stream()

    def _respond_event(self, failure: Failure) -> None:
        """A stream whose first event is an error: an error answer instead of a 200."""
        code = failure.info.get("code")
        status = code if isinstance(code, int) and 400 <= code <= 599 else 500
        data = failure.event.partition(b"data:")[2].strip() or error_body(
            router_error(status, failure.message).info, self._request.request_id
        )
        self._respond(Answer(status, [(b"content-type", b"application/json")], data))

    # Answers

    def _respond(self, answer: Answer) -> None:
        request = self._request
        self.status = answer.status
        request.connection.respond(answer.status, passed_on(answer.headers, request.request_id), answer.body)

    def begin_stream(self, headers: list[tuple[bytes, bytes]], events: bytes) -> None:
        connection = self._request.connection
        if self._began:  # a migrated stream: the client's head went out long ago
            self._core.metrics.migrations["resumed"] += 1
            connection.write(events)
            return
        self._began = True
        self.status = 200
        self._core.metrics.first_event.observe(self._loop.time() - self._request.received_s)
        connection.start_stream(200, passed_on(headers, self._request.request_id), events)

    def write_events(self, events: bytes) -> None:
        self._request.connection.write(events)

    def _error_event(self, info: ErrorInfo) -> bytes:
        return b"data: " + error_body(info, self._request.request_id) + b"\n\n"

    def _answer_error(self, info: ErrorInfo) -> None:
        connection, request = self._request.connection, self._request
        self.status = info.code
        if self._began:
            connection.write(self._error_event(info))
            connection.end_stream()
        else:
            headers = JSON_TYPE + b"x-request-id: %b\r\n" % request.request_id.encode()
            connection.respond(info.code, headers, error_body(info, request.request_id))

    def _cancelled(self) -> None:
        """Ended from outside: by the client's leaving, the deadline, an abort, or the router's own end."""
        stage: Stage = "router"
        if (attempt := self.attempt) is not None:
            stage = "prefill" if attempt.waiting_for() == "prefill" else "decode"
        if self._ended_by == "client":
            self.status = ABORTED_CODE
        elif self._ended_by == "deadline":
            waited_for = f"{stage} ({self.pair})" if stage != "router" else self._core.who_is_missing() or "another try"
            message = f"The request did not end within its deadline; it was waiting for {waited_for}."
            self._answer_error(router_error(504, message, kind="deadline_exceeded", stage=stage).info)
        elif self._ended_by == "abort":
            self._answer_error(router_error(ABORTED_CODE, "The request was aborted.", kind="aborted", stage=stage).info)
        else:
            message = "The router is shutting down."
            self._answer_error(router_error(503, message, kind="shutting_down", retryable=True).info)


def _with_stage(answer: Answer, stage: str) -> Answer:
    """A worker's error answer, which says whose it is where the worker did not."""
    if header(answer.headers, _STAGE_HEADER):
        return answer
    return answer._replace(headers=[*answer.headers, (_STAGE_HEADER, stage.encode())])
