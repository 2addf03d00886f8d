"""Chat messages to prompt text, by the model's own Jinja template.

Templates come with models, hence from strangers: they run in Jinja's immutable sandbox, with the settings and helper
functions that transformers gives them (the oracle of the tests), and with nothing else. Not here: tokenising.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox
from jinja2 import nodes, parser
from jinja2.ext import Extension, loopcontrols

from baton.protocol.errors import RequestError, bad_request


class ChatTemplate:
    """One compiled template. Raises `jinja2.TemplateSyntaxError` on construction for a broken one."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_IgnoreGeneration, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """Prompt text. Raises `RequestError` (400, param "messages") when the template refuses the messages."""
        variables = {"tools": None, "documents": None, **self._special_tokens, **(extra or {})}
        variables |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(variables)
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise bad_request(f"the chat template refused these messages: {error}", "messages") from None

    @cached_property
    def takes_content_parts(self) -> bool:
        """Whether the template itself goes through a list of content parts; if not, parts are joined before."""
        probe = "baton-content-probe"
        message = {"role": "user", "content": [{"type": "text", "text": probe}]}
        try:
            text = self.render([message])
        except RequestError:
            return False
        return probe in text and "'type'" not in text and '"type"' not in text


class _IgnoreGeneration(Extension):
    """Templates mark what an assistant generated with {% generation %}; for serving the mark means nothing."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 reads this class attribute)

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which would change prompts.
    allowed = {key: options[key] for key in ("separators", "sort_keys") if key in options}
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **allowed)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002  (templates pass it by this name)
    return datetime.now().strftime(format)
