"""transformers is the oracle: the same ids for the same text, the same prompt for the same messages."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from baton.engine.errors import ModelError
from baton.engine.tokenizer import TextTokenizer, open_tokenizer
from baton.protocol.errors import RequestError
from baton.text.chat_template import ChatTemplate

TEXTS = ["Hello", " two  spaces", "line\nbreak\t", "🏃🏽‍♀️ é 漢字", "<|im_start|>user\nhi<|im_end|>", "1234567 + 1", ""]
MESSAGES: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "<x> & 'y'"}],
]
# Exercises what real templates use: trim_blocks, tojson, namespace, loop controls, strftime_now, special tokens, tools.
RICH = """{{ bos_token }}{%- set ns = namespace(n=0) %}
{% if tools is not none %}TOOLS{{ tools | tojson(indent=2) }}{% endif %}
{% for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.n = ns.n + 1 %}
[{{ ns.n }}|{{ message.role }}] {{ message['content'] | trim }} {{ {'k': message.content, 'ü': 1} | tojson }}
{% generation %}{{ strftime_now('%Y')[:2] }}{% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}<go>{% endif %}{% if enable_thinking is defined %}T{{ enable_thinking }}{% endif %}"""


@pytest.fixture(scope="module")
def oracle(demo_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(demo_dir))


def test_ids_are_transformers(tokenizer: TextTokenizer, oracle: Any) -> None:
    for text in TEXTS:
        assert tokenizer.encode(text) == oracle(text)["input_ids"], text
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True), text


async def test_long_texts_are_encoded_alike_in_a_thread(tokenizer: TextTokenizer) -> None:
    text = "word " * 5000
    assert await tokenizer.encode_async(text) == tokenizer.encode(text)


def test_bos_is_added_where_the_config_asks_for_it(demo_dir: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((demo_dir / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"add_bos_token": True, "bos_token": {"content": "<|im_start|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    changed = open_tokenizer(tmp_path)
    assert changed.encode("a")[0] == changed.tokenizer.token_to_id("<|im_start|>")
    assert changed.encode("a", add_special_tokens=False) == changed.encode("a")[1:]


def test_templates_render_as_transformers_does(tokenizer: TextTokenizer, oracle: Any) -> None:
    assert tokenizer.chat_template is not None
    for source in (tokenizer.chat_template, RICH):
        template = ChatTemplate(source, tokenizer.special_tokens)
        for messages in MESSAGES:
            for add in (True, False):
                expected = oracle.apply_chat_template(
                    messages, chat_template=source, tokenize=False, add_generation_prompt=add
                )
                assert template.render(messages, add_generation_prompt=add) == expected
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": "<é>"}}}]
    expected = oracle.apply_chat_template(
        MESSAGES[0], chat_template=RICH, tokenize=False, tools=tools, enable_thinking=False
    )
    extra = {"tools": tools, "enable_thinking": False}
    assert ChatTemplate(RICH, tokenizer.special_tokens).render(
        MESSAGES[0], add_generation_prompt=False, extra=extra
    ) == expected  # fmt: skip


def test_templates_are_caged_and_their_refusals_are_bad_requests() -> None:
    for source, problem in (
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
    ):
        with pytest.raises(RequestError) as caught:
            ChatTemplate(source, {}).render(MESSAGES[0])
        assert problem in caught.value.info.message
        assert caught.value.info.param == "messages"


def test_content_parts_go_to_templates_that_take_them() -> None:
    takes = ChatTemplate("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}", {})
    assert takes.takes_content_parts
    assert not ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {}).takes_content_parts


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json: "):
        open_tokenizer(tmp_path)


def test_generation_config_gives_sampling_defaults(demo_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((demo_dir / "tokenizer.json").read_bytes())
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7, "top_k": 20, "do_sample": true}')
    (tmp_path / "chat_template.jinja").write_text("{{ 1 }}")
    opened = open_tokenizer(tmp_path)
    assert opened.sampling_defaults == {"temperature": 0.7, "top_k": 20}
    assert opened.chat_template == "{{ 1 }}"
    assert open_tokenizer(demo_dir).sampling_defaults == {}
