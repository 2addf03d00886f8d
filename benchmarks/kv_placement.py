"""CPU time of the router's placement alone, per request: by text, by KV events with token ids, and with a tokenizer.

Eight workers, each with conversations of its own cached; requests are conversations with a new end. No sockets: what
`Exchange` adds to a request before it is sent (reading the prompt, choosing, releasing). `tokens` is the prompt's length.

    python benchmarks/kv_placement.py [--tokenizer-path DIR]
"""

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from random import Random
from typing import Any

from baton.protocol.kv_events import BlockStored, EventBatch, decode_batch, encode_batch
from baton.router.body import parse_body
from baton.router.config import CacheAwareConfig, PolicyName
from baton.router.policies import CacheAware, make_policy
from baton.router.prompts import PromptReader, open_prompt_reader
from host import describe_machine

NUM_WORKERS = 8
CONVERSATIONS_PER_WORKER = 32


class Worker:
    def __init__(self, url: str) -> None:
        self.url = url
        self.active = 0


def filled(page_size: int, num_tokens: int, rng: Random) -> tuple[CacheAware, list[Worker], list[list[int]], float]:
    """A policy that knows every conversation, its workers, the conversations, and seconds per block of applying events."""
    policy = CacheAware(CacheAwareConfig())
    workers = [Worker(f"http://10.0.0.{n}:8000") for n in range(NUM_WORKERS)]
    conversations = []
    payloads = []
    for worker in workers:
        policy.index.add(worker.url)
        for _ in range(CONVERSATIONS_PER_WORKER):
            token_ids = [rng.randrange(32000) for _ in range(num_tokens)]
            conversations.append(token_ids)
            count = num_tokens // page_size
            hashes = [rng.getrandbits(63) for _ in range(count)]
            event = BlockStored(hashes, None, token_ids[: count * page_size], page_size)
            payloads.append((worker.url, encode_batch(EventBatch(0.0, [event]))))
    started = time.process_time()
    for url, payload in payloads:
        for event in decode_batch(payload).events:
            policy.index.apply(url, event)
    num_blocks = sum(policy.index.num_blocks(worker.url) for worker in workers)
    return policy, workers, conversations, (time.process_time() - started) / max(1, num_blocks)


async def cost_us(bodies: list[bytes], one: Callable[[bytes], Any]) -> float:
    started = time.process_time()
    for body in bodies:
        await one(body)
    return (time.process_time() - started) / len(bodies) * 1e6


async def by_events(policy: CacheAware, workers: list[Worker], reader: PromptReader, body: bytes) -> None:
    view = parse_body(body)
    prompt = await reader.read(view, body)
    policy.choose(view.cache_key, workers, prompt)
    if prompt is not None:
        prompt.release()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer-path", help="also measure text prompts through this tokenizer")
    args = parser.parse_args()
    print(json.dumps(describe_machine()))
    rng = Random(1)
    for num_tokens, page_size in ((512, 16), (2048, 16), (8192, 16), (2048, 64), (2048, 1)):
        policy, workers, conversations, apply_s = filled(page_size, num_tokens, rng)
        asked = [
            rng.choice(conversations)[: num_tokens - 32] + [rng.randrange(32000) for _ in range(32)] for _ in range(300)
        ]
        bodies = [json.dumps({"input_ids": ids, "sampling_params": {}}).encode() for ids in asked]
        row: dict[str, Any] = {
            "tokens": num_tokens,
            "page_size": page_size,
            "apply_us_per_block": round(apply_s * 1e6, 2),
        }
        for name in ("round_robin", "cache_aware"):
            other = make_policy(name_of(name), CacheAwareConfig(), rng)

            async def plain(body: bytes, other: Any = other, workers: list[Worker] = workers) -> None:
                other.choose(parse_body(body).cache_key, workers, None)

            row[f"{name}_us"] = round(await cost_us(bodies, plain), 1)
        reader = open_prompt_reader(None, None)
        row["kv_events_us"] = round(
            await cost_us(bodies, lambda body, p=policy, w=workers, r=reader: by_events(p, w, r, body)), 1
        )
        if args.tokenizer_path:
            reader = open_prompt_reader(args.tokenizer_path, None)
            texts = [json.dumps({"messages": [{"role": "user", "content": "word " * num_tokens}]}).encode()] * 30
            row["kv_events_chat_us"] = round(
                await cost_us(texts, lambda body, p=policy, w=workers, r=reader: by_events(p, w, r, body)), 1
            )
        print(json.dumps(row))


def name_of(name: str) -> PolicyName:
    assert name in ("round_robin", "cache_aware")
    return name  # type: ignore[return-value]


if __name__ == "__main__":
    asyncio.run(main())
