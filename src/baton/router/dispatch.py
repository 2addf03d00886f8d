"""Sends one request to workers, try after try: connections, ids, heads and bodies in the hand-over protocol of the group.

SGLang's protocol asks prefill and decode at once, who meet in a bootstrap room; vLLM's asks the prefill first and takes its answer to
the decode (`vllm_pd`). Neighbours: `exchange` decides who is tried and what an outcome means; `attempt` is one try.
"""

from contextlib import suppress

import msgspec

from baton.protocol.hops import TIMEOUT_HEADER, TOKEN_IDS_HEADER, Resume
from baton.router import body as bodies
from baton.router import vllm_pd
from baton.router.attempt import Attempt, Outcome, Sink
from baton.router.core import Core
from baton.router.downstream import Request
from baton.router.httpbytes import forwarded
from baton.router.relay import StreamRelay
from baton.router.retry import Answer, Failure
from baton.router.upstream import Upstream
from baton.router.workers import Worker

_TIMEOUT_HEADER = TIMEOUT_HEADER.encode()
_TOKEN_IDS_LINE = TOKEN_IDS_HEADER.encode() + b": 1\r\n"
MAX_ID_CHARS = 200
"""Of a client's own id, where it becomes the beginning of ours."""


class Dispatch:
    """`attempt` is the try on its way, or the last one; `pair` its workers, for logs and errors."""

    def __init__(self, core: Core, request: Request, view: bodies.RequestView, sink: Sink, deadline_s: float) -> None:
        self._core = core
        self._request = request
        self._view = view
        self._sink = sink
        self._deadline_s = deadline_s
        self._is_vllm = core.protocol == "vllm"
        self.batch_size = view.batch_size()
        self.relay = StreamRelay() if view.is_stream else None
        self.attempt: Attempt | None = None
        self.pair = ""
        self.resume: Resume | None = None
        """What the next worker is to go on from."""
        self._rid: str | list[str] = self._chosen_id()
        self.first_rid = self._rid
        self._tries = 0
        self._members: vllm_pd.Members | None = None

    def _chosen_id(self) -> str | list[str]:
        view, request = self._view, self._request
        if not self._is_vllm and (rid := bodies.client_rids(view)) is not None:
            return rid
        if self._is_vllm and (view.request_id or not request.request_id_is_ours):
            return self._unique_id()
        return request.request_id if request.request_id_is_ours else self._core.new_id()

    def _unique_id(self) -> str:
        """Begins with the client's, but is no other's: vLLM's prefill keeps blocks under it, and would mix two up."""
        given = self._request.request_id
        with suppress(msgspec.DecodeError):
            given = msgspec.json.decode(self._view.request_id, type=str)
        is_id = len(given) <= MAX_ID_CHARS and given.isascii() and given.isprintable()
        return f"{given}-{self._core.new_id()[:16]}" if is_id else self._core.new_id()

    def abandon(self) -> None:
        if self.attempt is not None and self.attempt.is_unfinished:
            self.attempt.abandon()

    async def send(self, prefill: Worker | None, decode: Worker, *, has_begun: bool) -> Outcome:
        """One try. `has_begun`: the client has seen the head of its stream."""
        self._next_id(has_begun)
        self._is_vllm = self._core.protocol == "vllm"
        self.pair = decode.url
        if prefill is None:
            fields = bodies.rid_field(self._rid, self.batch_size) + self._resume_field()
            return await self._one(self._new_attempt(), decode, bodies.splice(self._request.body, fields))
        if not self._is_vllm:
            self.pair = f"{prefill.url},{decode.url}"
            return await self._at_once(prefill, decode)
        # vLLM's prefill gives KV away once: what several sequences would need, the decode server computes by itself.
        is_one = self._view.num_choices() == 1 or (prefill.software.is_baton and decode.software.is_baton)
        if prefill.url == decode.url or not is_one:
            return await self._by_decode_alone(decode)
        self.pair = f"{prefill.url},{decode.url}"
        return await self._in_turn(prefill, decode)

    # The two protocols

    async def _at_once(self, prefill: Worker, decode: Worker) -> Outcome:
        connections: list[Upstream] = []
        for worker in (prefill, decode):
            try:
                found = await self._connect(worker)
            except BaseException:
                for opened in connections:
                    opened.close()
                raise
            if isinstance(found, Failure):
                for opened in connections:
                    opened.close()
                return found
            connections.append(found)
        rooms = [self._core.new_room() for _ in range(self.batch_size or 1)]
        host, port = prefill.bootstrap_host, prefill.bootstrap_port
        fields = bodies.rid_field(self._rid, self.batch_size)
        fields += b"," + bodies.bootstrap_fields(host, port, rooms, self.batch_size) + self._resume_field()
        body = bodies.splice(self._request.body, fields)
        merges = self._view.wants_logprobs and self._request.path == b"/generate"
        self.attempt = attempt = self._new_attempt(merges=merges)
        self._core.metrics.handovers["sglang", "paired"] += 1
        attempt.start((prefill, connections[0]), (decode, connections[1]), self._path(), self._head(len(body)), body)
        return await attempt.outcome

    async def _in_turn(self, prefill: Worker, decode: Worker) -> Outcome:
        core, members, rid = self._core, self._request_members(), self._own_id()
        began_s = core.loop.time()
        asked = Attempt(core.loop, self._sink, rid, None, False, self._abort)
        outcome = await self._one(asked, prefill, vllm_pd.prefill_body(members, rid, self.resume))
        if not isinstance(outcome, Answer):
            return outcome
        core.metrics.prefill.observe(core.loop.time() - began_s)
        try:
            params = vllm_pd.handed_over(outcome)
        except vllm_pd.NoHandoverError as error:
            return Failure("handover", prefill.role, prefill.url, f"prefill worker {prefill.url}: {error}")
        if params is None:
            return await self._by_decode_alone(decode)
        core.metrics.handovers["vllm", "paired"] += 1
        return await self._one(
            self._new_attempt(held=prefill), decode, vllm_pd.decode_body(members, rid, params, self.resume)
        )

    async def _by_decode_alone(self, decode: Worker) -> Outcome:
        self._core.metrics.handovers["vllm", "alone"] += 1
        body = vllm_pd.decode_body(self._request_members(), self._own_id(), None, self.resume)
        return await self._one(self._new_attempt(), decode, body)

    # What both need

    async def _one(self, attempt: Attempt, worker: Worker, body: bytes) -> Outcome:
        """`attempt` on one worker."""
        self.attempt = attempt
        found = await self._connect(worker)
        if isinstance(found, Failure):
            attempt.settle(found)
        elif attempt.outcome.done():  # whom it needs was lost meanwhile
            found.close()
        else:
            attempt.start(None, (worker, found), self._path(), self._head(len(body)), body)
        return await attempt.outcome

    async def _connect(self, worker: Worker) -> Upstream | Failure:
        connection = worker.pool.get_idle()
        if connection is not None:
            return connection
        try:
            return await worker.pool.connect()
        except (OSError, TimeoutError) as error:
            reason = str(error) or "connection timed out"
            self._core.on_connect_failure(worker, reason)
            return Failure("connect", worker.role, worker.url, f"{worker.role} worker {worker.url}: {reason}")

    def _next_id(self, has_begun: bool) -> None:
        if self._tries:  # the first pair may still hold the old one: never the same id, never one a prefix of the other
            tag = f"{self._core.new_id()[:16]}-"
            rid = self.first_rid
            self._rid = tag + rid if isinstance(rid, str) else [tag + item for item in rid]
            if self.relay is not None:
                if not has_begun:
                    self.relay = StreamRelay()
                self.relay.next_worker(tag)
        self._tries += 1

    def _own_id(self) -> str:
        """The one id of a request in vLLM's protocol."""
        return self._rid if isinstance(self._rid, str) else self._rid[0]

    def _new_attempt(self, *, merges: bool = False, held: Worker | None = None) -> Attempt:
        rid = self._own_id() if self._is_vllm else self._rid
        return Attempt(self._core.loop, self._sink, rid, self.relay, merges, self._abort, held)

    def _abort(self, worker: Worker, rid: str | list[str]) -> None:
        self._core.abort(worker, rid, self._core.authorization_for(self._request))

    def _request_members(self) -> vllm_pd.Members:
        if self._members is None:
            self._members = vllm_pd.members_of(self._request.body)
        return self._members

    def _resume_field(self) -> bytes:
        return b"," + bodies.resume_field(self.resume) if self.resume is not None else b""

    def _path(self) -> bytes:
        return b"POST " + self._request.path

    def _head(self, length: int) -> bytes:
        request = self._request
        content_type = request.headers.get(b"content-type", b"")
        # vLLM takes this header for its own id, before any in the body: it must be another one for each try.
        request_id = self._own_id() if self._is_vllm else request.request_id
        return b"".join(
            (
                b"content-type: %b\r\n" % content_type if content_type else b"",
                b"content-length: %d\r\nx-request-id: %b\r\n%b: %.3f\r\n"
                % (length, request_id.encode(), _TIMEOUT_HEADER, self._deadline_s - self._core.loop.time()),
                _TOKEN_IDS_LINE if self.relay is not None else b"",
                forwarded(request.headers),
                self._core.authorization if b"authorization" not in request.headers else b"",
                b"\r\n",
            )
        )
