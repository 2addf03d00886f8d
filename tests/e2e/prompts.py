"""Mixed prompts for tests that compare outputs: short, long, shared prefixes, stop strings, chat and plain text."""

import random
from typing import Any

TOPICS = (
    "rivers", "the moon", "bread", "prime numbers", "a lighthouse", "winter", "trains", "honey bees", "chess", "salt",
    "volcanoes", "libraries", "bicycles", "the number zero", "paper", "whales", "glass", "maps", "clocks", "tea",
)  # fmt: skip
SHARED = "You are a careful assistant. Answer briefly, name your sources, and never guess a number. " * 6


def mixed_bodies(count: int, seed: int = 7) -> list[dict[str, Any]]:
    """`/generate` bodies, greedy, each a different request; the same for the same seed."""
    generator = random.Random(seed)
    return [_body(index, generator) for index in range(count)]


def _body(index: int, generator: random.Random) -> dict[str, Any]:
    topic = generator.choice(TOPICS)
    kind = index % 5
    sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": generator.choice((4, 12, 24, 32))}
    if kind == 0:
        text = f"{topic.capitalize()} {index} is"
    elif kind == 1:
        words = [generator.choice(TOPICS) for _ in range(generator.randrange(80, 500))]
        text = f"List {index}: {', '.join(words)}. The list begins with"
    elif kind == 2:
        text = f"{SHARED}Question {generator.randrange(10)}: what is known about {topic}?\nAnswer:"
    elif kind == 3:
        text = f"Write three short lines about {topic} ({index % 7}).\n1."
        sampling["stop"] = generator.choice(["\n", ".", " the", ["3.", "\n\n"]])
    else:
        text = f"<|im_start|>user\nTell me about {topic} in {index} words.<|im_end|>\n<|im_start|>assistant\n"
        sampling["ignore_eos"] = index % 2 == 0
    return {"text": text, "sampling_params": sampling}
