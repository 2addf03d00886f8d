"""The router reads the very tokens that a worker computes for the same request."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.router_bed import bed, eventually
from tokenizers import Tokenizer

from baton.engine.weights.demo import prepare_demo_model
from baton.protocol.kv_events import BlockStored
from baton.router.body import parse_body
from baton.router.kv_index import Prompt
from baton.router.prompts import PromptReader, open_prompt_reader
from baton.text.errors import ModelError

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"}]
CHAT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
)
"""What the demo model's template makes of them (ChatML)."""


@pytest.fixture(scope="module")
def demo_dir() -> Path:
    return prepare_demo_model()


@pytest.fixture(scope="module")
def reader(demo_dir: Path) -> PromptReader:
    return open_prompt_reader(str(demo_dir), None)


async def read(reader: PromptReader, **fields: Any) -> Prompt | None:
    body = json.dumps(fields).encode()
    return await reader.read(parse_body(body), body)


async def test_text_and_chat_are_the_tokens_that_the_workers_see(reader, demo_dir):
    oracle = Tokenizer.from_file(str(demo_dir / "tokenizer.json"))
    text = "The quick brown fox " * 300
    for fields in ({"text": text}, {"prompt": text}):
        prompt = await read(reader, **fields)
        assert prompt is not None
        assert prompt.token_ids == Prompt(oracle.encode(text).ids).token_ids
    chat = await read(reader, messages=MESSAGES)
    assert chat is not None
    assert chat.token_ids == Prompt(oracle.encode(CHAT, add_special_tokens=False).ids).token_ids
    parts = [{**MESSAGES[0]}, {"role": "user", "content": [{"type": "text", "text": "Why is the sky blue?"}]}]
    same = await read(reader, messages=parts)
    assert same is not None
    assert same.token_ids == chat.token_ids


async def test_token_ids_need_no_tokenizer():
    reader = open_prompt_reader(None, None)
    for fields in ({"input_ids": [1, 2, 3]}, {"prompt": [1, 2, 3]}):
        prompt = await read(reader, **fields, cache_salt="s", extra_key="e")
        assert prompt is not None
        assert (prompt.token_ids, prompt.tenant) == (Prompt([1, 2, 3]).token_ids, "se")
    assert await read(reader, text="some text") is None
    assert await read(reader, messages=MESSAGES) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"input_ids": [1, -1]}, {"input_ids": "text"}, {"input_ids": []}, {"messages": [{"role": 1}]}, {"messages": [1]},
        {"text": 5}, {"prompt": ["a", "b"]}, {}, {"messages": [], "text": None},
        {"messages": MESSAGES, "continue_final_message": True},
    ],
)  # fmt: skip
async def test_what_a_worker_would_refuse_is_placed_without_tokens(reader, fields):
    assert await read(reader, **fields) is None


async def test_a_template_that_does_not_parse_is_an_error_that_names_the_file(demo_dir, tmp_path):
    file = tmp_path / "broken.jinja"
    file.write_text("{% if %}")
    with pytest.raises(ModelError, match=r"--chat-template .*broken\.jinja: the chat template does not parse"):
        open_prompt_reader(str(demo_dir), str(file))
    with pytest.raises(ModelError, match=r"there is no tokenizer\.json here"):
        open_prompt_reader(str(tmp_path), None)


async def test_a_chat_goes_where_its_tokens_are_cached(demo_dir, reader):
    prompt = await read(reader, messages=MESSAGES)
    assert prompt is not None
    ids = list(memoryview(prompt.token_ids).cast("I"))
    whole = len(ids) // 2 * 2
    async with bed(regular=3, decode_policy="cache_aware", tokenizer=str(demo_dir)) as found:
        index = found.router.core.registry.policies["regular"].index  # type: ignore[attr-defined]
        for worker in found.regular:
            index.add(worker.url)
        index.apply(found.regular[2].url, BlockStored(list(range(whole // 2)), None, ids[:whole], 2))
        reply = await found.ask("/v1/chat/completions", {"model": "m", "messages": MESSAGES})
        assert reply.status == 200
        assert [len(worker.seen) for worker in found.regular] == [0, 0, 1]
        await eventually(lambda: not found.router.core.exchanges)
        assert index.num_blocks(found.regular[2].url) == whole // 2, "the request has ended"
