"""Chat messages as clients send them, to the prompt text that the model's template makes of them.

Workers and the router both call `chat_prompt`, so that they see the same prompt. Not here: the template language
(`chat_template`), token ids (`encoder`), tools, images.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from baton.protocol.errors import bad_request

if TYPE_CHECKING:  # the router reads token ids without a template, and without loading the template engine
    from baton.text.chat_template import ChatTemplate


def chat_prompt(
    template: "ChatTemplate",
    messages: Sequence[Mapping[str, Any]],
    *,
    template_kwargs: Mapping[str, Any] | None,
    reasoning_effort: str | None,
    continue_final_message: bool,
    add_generation_prompt: bool = True,
) -> str:
    """Prompt text, special tokens included. Raises `RequestError` (400) naming the field that is wrong."""
    converted = [_message(one, index, template.takes_content_parts) for index, one in enumerate(messages)]
    prefix = ""
    if continue_final_message:
        if converted[-1]["role"] != "assistant" or not isinstance(converted[-1].get("content"), str):
            raise bad_request("continue_final_message needs a last message of the assistant, with text.", "messages")
        prefix = converted.pop()["content"]
    extra = dict(template_kwargs or {})
    if reasoning_effort is not None:
        extra.setdefault("reasoning_effort", reasoning_effort)
    return template.render(converted, extra=extra, add_generation_prompt=add_generation_prompt) + prefix


def join_keys(*parts: str | None) -> str | None:
    """cache_salt and extra_key make one isolation key, as in SGLang."""
    return "".join(part for part in parts if part) or None


def _message(raw: Mapping[str, Any], index: int, takes_parts: bool) -> dict[str, Any]:
    """One message as a template expects it: text content, tool-call arguments as objects."""
    where = f"messages[{index}]"
    message = dict(raw)
    if not isinstance(message.get("role"), str):
        raise bad_request(f"{where}.role must be text.", f"{where}.role")
    content = message.get("content")
    if isinstance(content, list):
        texts = [_part_text(part, f"{where}.content[{place}]") for place, part in enumerate(content)]
        message["content"] = content if takes_parts else " ".join(texts)
    elif content is None and (message["role"] == "assistant" and message.get("tool_calls")):
        message["content"] = ""
    elif not isinstance(content, str):
        raise bad_request(f"{where}.content must be text or a list of parts.", f"{where}.content")
    for call in message.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except ValueError:
                raise bad_request(f"{where}.tool_calls: arguments must be JSON.", f"{where}.tool_calls") from None
    return message


def _part_text(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise bad_request(f"{where}.type {kind!r} is not supported: only text.", f"{where}.type")
    if not isinstance(part.get("text"), str):
        raise bad_request(f"{where}.text must be text.", f"{where}.text")
    return str(part["text"])
