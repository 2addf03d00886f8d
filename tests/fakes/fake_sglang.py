"""A server with SGLang's native and OpenAI routes, in the test's own loop: answers are a pure function of the prompt, the
cache is unbounded, faults come on demand."""

import asyncio
import json
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

PAGE_SIZE = 4


def byte_tokenizer_dir(directory: Path) -> Path:
    """A model directory with nothing but a tokenizer: one token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@dataclass
class Asked:
    """A generation as the server got it; `prompt` is token ids, text or messages."""

    prompt: Any
    body: dict[str, Any]
    num_running: int
    """With this one."""
    num_answered: int
    """Before it came."""


Fault = Callable[[Asked], str | None]
"""Per generation: None (healthy), "status", "abort", "error event", "cut", "hang", "late" (after some other)."""


@dataclass
class FakeSglang:
    model_path: str
    text: str = "ab"
    """Of every answer's last token."""
    fault: Fault = lambda asked: None
    flush_status: int = 200
    asked: list[Asked] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    """Every request's path, in order."""
    url: str = ""
    _known: set[tuple[Any, ...]] = field(default_factory=set)
    _num_running: int = 0
    _num_answered: int = 0
    _another_answered: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = body.get("input_ids") or body["text"]
        fault = self._begin(prompt, body)
        if fault == "status":
            self._num_running -= 1
            return web.json_response({"error": {"message": "no room"}}, status=503)
        cached = self._cached(prompt)
        count = body["sampling_params"]["max_new_tokens"]
        ids = [zlib.crc32(f"{prompt}{index}".encode()) % 256 for index in range(count)]
        response = await self._stream(request)
        for index in range(count):
            finish = {"type": "length", "length": count} if index == count - 1 else None
            if fault == "abort":
                finish = {"type": "abort", "message": "taken away"}
            meta = {"prompt_tokens": len(prompt), "cached_tokens": cached, "completion_tokens": index + 1}
            meta |= {"finish_reason": finish, "cached_tokens_details": {"device": cached, "host": 0}}
            if fault == "cut" and finish:
                break
            await self._send(response, {"text": self.text, "output_ids": ids[: index + 1], "meta_info": meta}, fault)
        return await self._end(response)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        fault = self._begin(body["messages"], body)
        flat = json.dumps(body["messages"])[1:-1]
        cached = self._cached(flat)
        response = await self._stream(request)
        await self._send(response, {"choices": [{"delta": {"role": "assistant", "content": ""}}]}, fault)
        for index in range(body["max_tokens"]):
            finish = "length" if index == body["max_tokens"] - 1 else None
            await self._send(response, {"choices": [{"delta": {"content": self.text}, "finish_reason": finish}]}, fault)
        usage = {"prompt_tokens": len(flat), "completion_tokens": body["max_tokens"]}
        usage["prompt_tokens_details"] = {"cached_tokens": cached}
        await self._send(response, {"choices": [], "usage": usage}, fault)
        return await self._end(response)

    def _begin(self, prompt: Any, body: dict[str, Any]) -> str | None:
        self._num_running += 1
        asked = Asked(prompt, body, self._num_running, self._num_answered)
        self.asked.append(asked)
        return self.fault(asked)

    def _cached(self, prompt: Sequence[Any]) -> int:
        prefixes = [tuple(prompt[:end]) for end in range(PAGE_SIZE, len(prompt) + 1, PAGE_SIZE)]
        found = sum(prefix in self._known for prefix in prefixes[: (len(prompt) - 1) // PAGE_SIZE])
        self._known.update(prefixes)
        return found * PAGE_SIZE

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        return response

    async def _send(self, response: web.StreamResponse, event: dict[str, Any], fault: str | None) -> None:
        if fault == "hang":
            await asyncio.Event().wait()
        if fault == "late":
            await self._another_answered.wait()
        if fault == "error event":
            event = {"error": {"message": "page lost", "code": 503}}
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    async def _end(self, response: web.StreamResponse) -> web.StreamResponse:
        self._num_running -= 1
        self._num_answered += 1
        self._another_answered.set()
        self._another_answered = asyncio.Event()
        await response.write(b"data: [DONE]\n\n")
        return response

    async def flush(self, request: web.Request) -> web.Response:
        self._known.clear()
        return web.Response(text="Cache flushed.\n", status=self.flush_status)

    async def info(self, request: web.Request) -> web.Response:
        return web.json_response({"model_path": self.model_path})

    async def served(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny"}]})

    @asynccontextmanager
    async def running(self) -> AsyncIterator["FakeSglang"]:
        @web.middleware
        async def note(request: web.Request, handler: Any) -> web.StreamResponse:
            self.calls.append(request.path)
            response: web.StreamResponse = await handler(request)
            return response

        app = web.Application(middlewares=[note], client_max_size=1 << 24)
        app.add_routes(
            [
                web.post("/generate", self.generate),
                web.post("/v1/chat/completions", self.chat),
                web.post("/flush_cache", self.flush),
                web.get("/get_model_info", self.info),
                web.get("/v1/models", self.served),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        try:
            yield self
        finally:
            await runner.cleanup()
