"""One streamed request to a server under test, timed event by event, in SGLang's or OpenAI's format.

A token counts when its event arrives, whatever its text: a token of half a character has an empty one. Not here: what is
asked and when (`runner`).
"""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from baton.bench.errors import BenchError, RequestFailedError

CALL_TIMEOUT_S = 30.0
_LINE_LIMIT_BYTES = 1 << 22
"""Longest line of a stream: cumulative token ids make long ones."""


@dataclass(slots=True)
class Answer:
    ttft_s: float = 0.0
    latency_s: float = 0.0
    prompt_len: int = 0
    output_len: int = 0
    cached_tokens: int = 0
    cached_by_tier: dict[str, int] = field(default_factory=dict)
    """`cached_tokens` by where they came from, if the server says so."""
    text: str = ""
    output_ids: list[int] | None = None
    """None if the server does not say."""


def open_session(timeout_s: float) -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(timeout_s, CALL_TIMEOUT_S))
    return aiohttp.ClientSession(
        timeout=timeout, connector=aiohttp.TCPConnector(limit=0), read_bufsize=_LINE_LIMIT_BYTES
    )


async def get_json(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """Raises `BenchError` naming `url`."""
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(CALL_TIMEOUT_S)) as response:
            if response.status != 200:
                raise BenchError(f"{url} answered {response.status}")
            value = await response.json(content_type=None)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise BenchError(f"{url}: {_reason(error)}") from None
    if not isinstance(value, dict):
        raise BenchError(f"{url} answered no JSON object")
    return value


async def flush_cache(session: aiohttp.ClientSession, url: str) -> None:
    """Raises `BenchError` unless the cache was flushed: figures of a warm cache would say something else."""
    try:
        async with session.post(url, timeout=aiohttp.ClientTimeout(CALL_TIMEOUT_S)) as response:
            text = (await response.text())[:200]
            if response.status != 200:
                raise BenchError(f"{url} answered {response.status}: {text.strip()}")
    except (aiohttp.ClientError, TimeoutError) as error:
        raise BenchError(f"{url}: {_reason(error)}") from None


async def generate(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Answer:
    """POST to SGLang's /generate. Raises `RequestFailedError`."""
    answer, started, finish = Answer(), time.perf_counter(), None
    async for event in _events(session, url, body):
        now = time.perf_counter() - started
        answer.ttft_s = answer.ttft_s or now
        answer.latency_s = now
        answer.text = event.get("text", answer.text)
        meta = event.get("meta_info") or {}
        answer.prompt_len = meta.get("prompt_tokens", answer.prompt_len)
        answer.cached_tokens = meta.get("cached_tokens", answer.cached_tokens)
        answer.output_len = meta.get("completion_tokens", answer.output_len)
        answer.cached_by_tier = _tiers(meta.get("cached_tokens_details")) or answer.cached_by_tier
        ids = event.get("output_ids")
        if isinstance(ids, list):
            # Cumulative, unless the server streams only what is new (--stream-output).
            is_all = len(ids) == answer.output_len
            answer.output_ids = ids if is_all else [*(answer.output_ids or []), *ids]
        finish = meta.get("finish_reason") or finish
    if finish is None:
        raise RequestFailedError("the stream ended before the answer did")
    if finish.get("type") == "abort":
        raise RequestFailedError(f"aborted by the server: {finish.get('message')}")
    return answer


async def chat(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Answer:
    """POST to OpenAI's /v1/chat/completions. Raises `RequestFailedError`."""
    answer, started, is_finished = Answer(), time.perf_counter(), False
    async for event in _events(session, url, body):
        now = time.perf_counter() - started
        for choice in event.get("choices") or []:
            delta = choice.get("delta") or {}
            is_finished = is_finished or choice.get("finish_reason") is not None
            piece = (delta.get("reasoning_content") or "") + (delta.get("content") or "")
            # A first event with nothing but the role comes before any token on some servers.
            if piece or is_finished:
                answer.ttft_s = answer.ttft_s or now
            answer.latency_s = now
            answer.text += piece
        usage = event.get("usage")
        if usage:
            details = usage.get("prompt_tokens_details") or {}
            answer.prompt_len, answer.output_len = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
            answer.cached_tokens = details.get("cached_tokens") or 0
            answer.cached_by_tier = _tiers(details.get("cached_tokens_details"))
    if not is_finished:
        raise RequestFailedError("the stream ended before the answer did")
    return answer


def _tiers(details: Any) -> dict[str, int]:
    if not isinstance(details, dict):
        return {}
    return {name: count for name, count in details.items() if isinstance(count, int)}


async def _events(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, [DONE] and comments left out."""
    try:
        async with session.post(url, json=body) as response:
            if response.status != 200:
                raise RequestFailedError(f"HTTP {response.status}: {(await response.text())[:500].strip()}")
            async for line in response.content:
                data = line.removeprefix(b"data:").strip()
                if not line.startswith(b"data:") or data == b"[DONE]":
                    continue
                event = json.loads(data)
                if not isinstance(event, dict):
                    raise RequestFailedError(f"an event of the stream is no JSON object: {data[:100]!r}")
                if "error" in event:
                    error = event["error"]
                    raise RequestFailedError(str(error.get("message") if isinstance(error, dict) else error))
                yield event
    except (TimeoutError, aiohttp.ClientError, ValueError) as error:
        raise RequestFailedError(_reason(error)) from None


def _reason(error: Exception) -> str:
    return "timed out" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
