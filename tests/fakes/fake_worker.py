"""Workers for router tests: the real HTTP protocol on loopback sockets, in the test's own loop, with faults on demand.

A `Fabric` joins prefill and decode workers as the KV transfer would: a decode worker waits until the prefill worker named
in the request has taken the same room. Tokens are a pure function of (prompt, choice, position), so any test can say
what a whole answer must be (`expected_text`), whoever served which part of it.
"""

import asyncio
import json
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import httptools

TOKENS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "omicron",
    "pi",
]


def token_at(prompt: str, choice: int, position: int) -> int:
    return zlib.crc32(f"{prompt}|{choice}|{position}".encode())


def text_of(token_id: int) -> str:
    return " " + TOKENS[token_id % len(TOKENS)] + str(token_id % 97)


def expected_text(prompt: str, choice: int, num_tokens: int) -> str:
    return "".join(text_of(token_at(prompt, choice, position)) for position in range(num_tokens))


def prompts_of(path: str, body: dict[str, Any]) -> list[str]:
    if path == "/v1/chat/completions":
        return [json.dumps(body["messages"])]
    given = body.get("text", body.get("prompt", body.get("input_ids")))
    if isinstance(given, list) and given and isinstance(given[0], (str, list)):
        return [item if isinstance(item, str) else json.dumps(item) for item in given]
    return [given if isinstance(given, str) else json.dumps(given)]


class Fabric:
    """Rooms that prefill workers have taken; stands for the KV transfer."""

    def __init__(self) -> None:
        self._rooms: dict[int, asyncio.Event] = {}

    def room(self, room: int) -> asyncio.Event:
        return self._rooms.setdefault(room, asyncio.Event())


@dataclass
class Faults:
    """What goes wrong; counters count down, 0 is healthy."""

    status: int = 0
    """Answer generations with this status..."""
    status_count: int = 1 << 30
    """...this often."""
    error_body: bytes = b'{"error":{"message":"injected"}}'
    error_headers: str = ""
    die_after_tokens: int | None = None
    """Abort the connection of a stream after so many tokens of a choice (once per `die_count`)."""
    die_count: int = 1
    die_before_answer: int = 0
    """Abort the connection of so many generations without an answer."""
    error_event_after: int | None = None
    """Send an error event after so many tokens, then [DONE] (once)."""
    error_event: bytes = b'{"error":{"message":"kv lost","code":503,"retryable":true}}'
    hang: bool = False
    """Take generations and never answer."""
    queue_full_over: int | None = None
    """503 for a generation while so many are running."""
    no_answer: bool = False
    """Prefill: hand over, then never answer."""
    no_transfer: bool = False
    """Prefill: take the room's request, never hand over."""


@dataclass
class Seen:
    """A generation as the worker got it."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    raw: bytes


class FakeWorker:
    """`role`: prefill, decode or regular. Start with `await start()`, end with `stop()` or die with `kill()`."""

    def __init__(self, role: str, fabric: Fabric | None = None, *, sends_token_ids: bool = True) -> None:
        self.key: str | None = None
        """The `authorization` that whatever is not open needs."""
        self.takes_aborts = True
        self.role = role
        self.fabric = fabric or Fabric()
        self.sends_token_ids = sends_token_ids
        """False: behaves like a worker that is not ours (no token ids, no resume)."""
        self.faults = Faults()
        self.seen: list[Seen] = []
        self.aborts: list[dict[str, Any]] = []
        self.violations: list[str] = []
        """Requests that break the protocol; a bed fails at its end if there are any."""
        self.calls: Counter[str] = Counter()
        self.healthy = True
        self.info: dict[str, Any] = {}
        """More of what /get_server_info answers."""
        self.frozen = False
        """Takes requests and never answers, health checks neither."""
        self.port = 0
        self.running = 0
        self.disconnects = 0
        self.gate: asyncio.Event | None = None
        """When set, streams wait on it between tokens `gate_at` and the next."""
        self.gate_at = 0
        self.at_gate = 0
        self.pace: Callable[[], Any] = lambda: asyncio.sleep(0)
        self.connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None

    # What another kind of worker does otherwise

    async def meet(self, body: dict[str, Any], headers: dict[str, str], raw: bytes) -> dict[str, Any] | None:
        """Hand over or take over; what the answer says of it."""
        rooms = body.get("bootstrap_room")
        rooms = rooms if isinstance(rooms, list) else [rooms]
        if self.role == "prefill":
            if self.faults.no_transfer:
                await asyncio.Event().wait()
            for room in rooms:
                self.fabric.room(room).set()
            if self.faults.no_answer:
                await asyncio.Event().wait()
        elif self.role == "decode":
            for room in rooms:
                await self.fabric.room(room).wait()
        return None

    def makes_one_token(self, body: dict[str, Any]) -> bool:
        return self.role == "prefill"

    def answer_id(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> str:
        rid = body.get("rid") or "norid"
        return rid if isinstance(rid, str) else rid[0].rpartition("_")[0]

    def is_open(self, path: str) -> bool:
        """Needs no key."""
        return path == "/health"

    def small_answer(self, path: str) -> tuple[int, bytes]:
        """Of routes that neither generate nor abort."""
        if path in ("/health_generate", "/flush_cache"):
            return 200, b"ok"
        if path == "/get_server_info":
            return 200, _json({"internal_states": [{"port": self.port}], "version": "fake", **self.info})
        if path == "/get_model_info":
            return 200, b'{"model_path":"fake","is_generation":true}'
        if path == "/v1/models":
            return 200, b'{"object":"list","data":[{"id":"fake","object":"model","created":1,"owned_by":"sglang"}]}'
        return 404, b'{"detail":"Not Found"}'

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, port: int = 0) -> "FakeWorker":
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def kill(self) -> None:
        """As SIGKILL looks from outside: connections reset, nobody listens."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self.connections):
            connection.die()

    async def stop(self) -> None:
        self.kill()
        tasks = [connection.task for connection in self.connections if connection.task is not None]
        if tasks:
            await asyncio.wait(tasks)


@dataclass
class _Parsed:
    method: str = ""
    url: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class _Connection(asyncio.Protocol):
    def __init__(self, worker: FakeWorker) -> None:
        self.worker = worker
        self.parser = httptools.HttpRequestParser(self)
        self.request = _Parsed()
        self.task: asyncio.Task[None] | None = None
        self.transport: asyncio.Transport | None = None
        self.busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but type
        self.worker.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.worker.connections.discard(self)
        self.transport = None
        if self.busy:
            self.worker.disconnects += 1
        if self.task is not None:
            self.task.cancel()

    def die(self) -> None:
        if self.transport is not None:
            self.busy = False
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.request = _Parsed()

    def on_url(self, url: bytes) -> None:
        self.request.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.request.headers[name.decode().lower()] = value.decode()

    def on_body(self, data: bytes) -> None:
        self.request.body += data

    def on_message_complete(self) -> None:
        self.request.method = self.parser.get_method().decode()
        self.task = asyncio.get_running_loop().create_task(self._handle(self.request))

    # Answers

    async def _handle(self, request: _Parsed) -> None:
        path = request.url.decode()
        worker = self.worker
        worker.calls[path] += 1
        if worker.key is not None and not worker.is_open(path) and request.headers.get("authorization") != worker.key:
            self.reply(401, b'{"error":"Unauthorized"}')
            return
        if worker.frozen:
            await asyncio.Event().wait()
        if path in ("/generate", "/v1/chat/completions", "/v1/completions"):
            worker.running += 1
            self.busy = True
            try:
                await self._generate(path, request)
            except AssertionError as error:
                worker.violations.append(str(error))
                self.die()
            finally:
                worker.running -= 1
                self.busy = False
            return
        if path == "/abort_request" and worker.takes_aborts:
            worker.aborts.append(json.loads(request.body))
            self.reply(200, b"")
        elif path == "/health":
            self.reply(200 if worker.healthy else 503, b"")
        else:
            self.reply(*worker.small_answer(path))

    def write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def reply(self, status: int, body: bytes, kind: str = "application/json", headers: str = "") -> None:
        self.busy = False
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
        self.write(head.encode() + body)

    async def _generate(self, path: str, request: _Parsed) -> None:
        worker, faults = self.worker, self.worker.faults
        body = json.loads(request.body)
        worker.seen.append(Seen(path, body, request.headers, request.body))
        if faults.die_before_answer > 0:
            faults.die_before_answer -= 1
            self.die()
            return
        if faults.hang:
            await asyncio.Event().wait()
        if faults.status and faults.status_count > 0:
            faults.status_count -= 1
            self.reply(faults.status, faults.error_body, headers=faults.error_headers)
            return
        if faults.queue_full_over is not None and worker.running > faults.queue_full_over:
            self.reply(503, b'{"object":"error","message":"The request queue is full.","code":503}')
            return
        handed = await worker.meet(body, request.headers, request.body)
        answer = _Answer(worker, path, body, request.headers)
        if worker.makes_one_token(body):
            answer.limit, answer.resume = 1, None
        if body.get("stream") is True:
            await self._stream(answer)
        else:
            await worker.pace()
            document = answer.document()
            self.reply(200, document if handed is None else _json(json.loads(document) | handed))

    async def _stream(self, answer: "_Answer") -> None:
        worker, faults = self.worker, self.worker.faults
        self.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for count, event in answer.events():
            if worker.gate is not None and count == worker.gate_at:
                worker.at_gate += 1
                await worker.gate.wait()
            if faults.die_after_tokens is not None and count >= faults.die_after_tokens and faults.die_count > 0:
                faults.die_count -= 1
                self.write(b"%x\r\n%b" % (len(event), event[: len(event) // 2]))  # half an event, then nothing
                await asyncio.sleep(0)
                if self.transport is not None:
                    self.busy = False
                    self.transport.close()
                return
            if faults.error_event_after is not None and count >= faults.error_event_after:
                faults.error_event_after = None
                event = b"data: " + faults.error_event + b"\n\n"
                self.write(b"%x\r\n%b\r\n" % (len(event), event) + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
                return
            self.write(b"%x\r\n%b\r\n" % (len(event), event))
            await worker.pace()
        self.busy = False
        self.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


class _Answer:
    """What one request generates, as documents or events, with resume and token ids as protocol/hops.py says."""

    def __init__(self, worker: FakeWorker, path: str, body: dict[str, Any], headers: dict[str, str]) -> None:
        self.path = path
        self.body = body
        self.role = worker.role
        self.prompts = prompts_of(path, body)
        sampling = body.get("sampling_params") or {}
        self.n = int(body.get("n") or sampling.get("n") or 1)
        self.limit = int(body.get("max_tokens") or sampling.get("max_new_tokens") or 8)
        self.is_openai = path != "/generate"
        self.with_ids = worker.sends_token_ids and headers.get("x-baton-token-ids", "0") != "0"
        self.resume = body.get("baton_resume") if worker.sends_token_ids else None
        self.rid = worker.answer_id(path, body, headers)
        self.created = (self.resume or {}).get("created") or 1700000000 + worker.port
        self.num_choices = len(self.prompts) * self.n

    def tokens(self, choice: int) -> list[int]:
        prompt = self.prompts[choice // self.n]
        return [token_at(prompt, choice % self.n, position) for position in range(self.length(choice))]

    def length(self, choice: int) -> int:
        """Choices end one after another, so that some have finished when a worker dies."""
        return max(1, self.limit - 3 * choice)

    def document(self) -> bytes:
        texts = ["".join(map(text_of, self.tokens(choice))) for choice in range(self.num_choices)]
        if not self.is_openai:
            results = [self._result(choice, self.tokens(choice), True) for choice in range(self.num_choices)]
            return _json(results if self.num_choices > 1 or isinstance(self.body.get("text"), list) else results[0])
        chat = self.path == "/v1/chat/completions"
        choices = [
            {
                "index": i,
                "finish_reason": "length",
                **({"message": {"role": "assistant", "content": t}} if chat else {"text": t}),
            }
            for i, t in enumerate(texts)
        ]
        kind = "chat.completion" if chat else "text_completion"
        return _json({"id": self.rid, "object": kind, "created": self.created, "model": "fake", "choices": choices, "usage": self._usage()})  # fmt: skip

    def _usage(self) -> dict[str, int]:
        ended = [ids is None for ids in self.resume["output_ids"]] if self.resume else [False] * self.num_choices
        completion = sum(self.length(choice) for choice in range(self.num_choices) if not ended[choice])
        return {"prompt_tokens": 7, "total_tokens": 7 + completion, "completion_tokens": completion}

    def _result(self, choice: int, ids: list[int], is_last: bool) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "id": self.rid,
            "finish_reason": {"type": "length", "length": len(ids)} if is_last else None,
            "prompt_tokens": 7,
        }
        if self.body.get("return_logprob"):
            meta["input_token_logprobs"] = [[-1.0, 1, None]] if self.role == "prefill" else []
        meta["completion_tokens"] = len(ids)
        result: dict[str, Any] = {"text": "".join(map(text_of, ids)), "output_ids": ids, "meta_info": meta}
        if self.num_choices > 1:
            result["index"] = choice
        return result

    def events(self) -> Any:
        """(tokens of this choice so far, event bytes); choices take turns."""
        given = self.resume["output_ids"] if self.resume else [[] for _ in range(self.num_choices)]
        done = [None if ids is None else len(ids) for ids in given]
        for choice, ids in enumerate(given):
            assert ids is None or ids == self.tokens(choice)[: len(ids)], "resumed with wrong ids"
        if self.resume is None and self.path == "/v1/chat/completions":
            for choice in range(self.num_choices):
                yield 0, self._event(choice, [], {"delta": {"role": "assistant", "content": ""}, "finish_reason": None})
        while any(count is not None for count in done):
            for choice in range(self.num_choices):
                count = done[choice]
                if count is None:
                    continue
                tokens = self.tokens(choice)
                is_last = count + 1 >= len(tokens)
                new = tokens[count : count + 1]
                if self.is_openai:
                    yield count, self._openai_event(choice, new, is_last)
                else:
                    comment = self._comment(choice, new)
                    yield (
                        count,
                        comment + b"data: " + _json(self._result(choice, tokens[: count + 1], is_last)) + b"\n\n",
                    )
                done[choice] = None if is_last else count + 1
        if self.is_openai and (self.body.get("stream_options") or {}).get("include_usage"):
            chunk = self._chunk([]) | {"usage": self._usage()}
            yield self.limit, b"data: " + _json(chunk) + b"\n\n"

    def _openai_event(self, choice: int, new: list[int], is_last: bool) -> bytes:
        text = "".join(map(text_of, new))
        if self.path == "/v1/completions":
            return self._event(choice, new, {"text": text, "finish_reason": "length" if is_last else None})
        event = self._event(choice, new, {"delta": {"content": text}, "finish_reason": None})
        if is_last:
            event += self._event(choice, [], {"delta": {}, "finish_reason": "length"})
        return event

    def _chunk(self, choices: list[Any]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.path == "/v1/chat/completions" else "text_completion"
        return {"id": self.rid, "object": kind, "created": self.created, "model": "fake", "choices": choices}

    def _event(self, choice: int, ids: list[int], fields: dict[str, Any]) -> bytes:
        comment = self._comment(choice, ids)
        return comment + b"data: " + _json(self._chunk([{"index": choice, **fields}])) + b"\n\n"

    def _comment(self, choice: int, ids: list[int]) -> bytes:
        return b": tokens %d %b\n" % (choice, ",".join(map(str, ids)).encode()) if self.with_ids else b""


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
