"""A small load client for OpenAI-style servers: streams `/v1/completions` over raw asyncio sockets and times every token.

Prompts are token ids, so that no server is charged for tokenising and every server gets the same work.
"""

import asyncio
import json
import random
import time
from dataclasses import dataclass

RESPONSE_TIMEOUT_S = 600.0


@dataclass
class Timing:
    """One request, in seconds from its sending: when each token came."""

    token_times_s: list[float]
    started_s: float

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0]

    @property
    def tpot_s(self) -> float:
        return (self.token_times_s[-1] - self.token_times_s[0]) / max(1, len(self.token_times_s) - 1)


def random_prompts(count: int, length: int, seed: int, vocab_size: int = 40_000) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(1000, vocab_size) for _ in range(length)] for _ in range(count)]


async def complete(host: str, port: int, model: str, prompt: list[int], max_tokens: int) -> Timing:
    """Stream one greedy completion of exactly `max_tokens` tokens."""
    body = {
        "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    payload = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(payload)}\r\nconnection: close\r\n\r\n"
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    try:
        writer.write(head.encode() + payload)
        times: list[float] = []
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{status!r} {(await reader.read(2000))!r}")
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if event.get("choices"):
                    times.append(time.perf_counter() - started)
                elif "error" in event:
                    raise RuntimeError(f"error in the stream: {event['error']}")
        return Timing(times, started)
    finally:
        writer.close()


async def burst(host: str, port: int, model: str, prompts: list[list[int]], max_tokens: int) -> list[Timing]:
    """All prompts at once; every stream to its end."""
    requests = (complete(host, port, model, prompt, max_tokens) for prompt in prompts)
    return list(await asyncio.wait_for(asyncio.gather(*requests), RESPONSE_TIMEOUT_S))
