"""A request's prompt as the tokens that its worker will see, for placement by KV events.

Token ids in the request are taken as they are; text and chat messages need the workers' tokenizer (`--tokenizer-path`). A
request that cannot be read is no error here: the worker refuses it in its own words, and placement does without. Batches are
not read: their prompts go to one worker together. Neighbours: `text` (the same code as in the workers), `kv_index`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from baton.protocol.errors import RequestError
from baton.router.body import RequestView
from baton.router.kv_index import Prompt
from baton.text.errors import ModelError
from baton.text.messages import chat_prompt, join_keys

if TYPE_CHECKING:
    from baton.text.chat_template import ChatTemplate
    from baton.text.encoder import TextEncoder


class _Fields(msgspec.Struct):
    """What decides the tokens of a prompt, and what isolates its cache."""

    text: str | None = None
    input_ids: list[int] | None = None
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    continue_final_message: bool | None = None
    cache_salt: str | None = None
    extra_key: str | None = None
    lora_path: str | None = None


_decode = msgspec.json.Decoder(_Fields).decode


class PromptReader:
    """`tokenizer`, `template`: None where the router was given none."""

    def __init__(self, encoder: "TextEncoder | None" = None, template: "ChatTemplate | None" = None) -> None:
        self._encoder = encoder
        self._template = template

    async def read(self, view: RequestView, body: bytes) -> Prompt | None:
        """None: the tokens cannot be known here. `view`: what was read of `body` already."""
        if self._encoder is None and not view.input_ids and not bytes(view.prompt).startswith(b"["):
            return None
        try:
            fields = _decode(body)
            token_ids = await self._token_ids(fields)
            if not token_ids:
                return None
            return Prompt(token_ids, join_keys(fields.cache_salt, fields.extra_key, fields.lora_path) or "")
        except (msgspec.ValidationError, RequestError, OverflowError):
            return None

    async def _token_ids(self, fields: _Fields) -> list[int] | None:
        if fields.input_ids is not None:
            return fields.input_ids
        if isinstance(fields.prompt, list):
            return fields.prompt
        if self._encoder is None:
            return None
        if fields.messages:
            if self._template is None:
                return None
            text = chat_prompt(
                self._template,
                fields.messages,
                template_kwargs=fields.chat_template_kwargs,
                reasoning_effort=fields.reasoning_effort,
                continue_final_message=bool(fields.continue_final_message),
            )
            return await self._encoder.encode_async(text, add_special_tokens=False)
        text_or_none = fields.text if fields.text is not None else fields.prompt
        return None if text_or_none is None else await self._encoder.encode_async(text_or_none)


def open_prompt_reader(tokenizer: str | None, chat_template: str | None) -> PromptReader:
    """`tokenizer`: a directory with a `tokenizer.json`. Raises `ModelError` naming the file that cannot be used."""
    if tokenizer is None:
        return PromptReader()
    # Function-level imports: most routers place by text, and these double the time a router takes to start.
    from baton.text.chat_template import ChatTemplate
    from baton.text.encoder import TextEncoder, read_text_files

    path = Path(tokenizer)
    encoder = TextEncoder(read_text_files(path if path.is_dir() else path.parent))
    source, name = encoder.chat_template, tokenizer
    if chat_template is not None:
        name = f"--chat-template {chat_template}"
        try:
            source = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{name}: {error}") from None
    try:
        return PromptReader(encoder, None if source is None else ChatTemplate(source, encoder.special_tokens))
    except Exception as error:  # a template is foreign code to Jinja's parser: any error means it cannot be used
        raise ModelError(f"{name}: the chat template does not parse: {error}") from None
