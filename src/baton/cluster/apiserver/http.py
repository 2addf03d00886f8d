"""Requests and responses: the typed edge over raw ASGI.

Owns `Request` (path, query, negotiated answer form, bounded body) and the senders. Raw ASGI rather than a framework
because watches write many small messages. Not here: routing (see `app`), meaning.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import parse_qsl

import msgspec
import yaml

from baton.cluster.apiserver.errors import StatusError, bad_request, too_large, unsupported_media_type

JSON = dict[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MAX_BODY_BYTES = 3 * 1024 * 1024
JSON_TYPE, YAML_TYPE = "application/json", "application/yaml"
BODY_TYPES = (JSON_TYPE, YAML_TYPE)
_TRUE = ("true", "1", "t", "yes")


class ClientGoneError(Exception):
    """The client closed the connection before its request was complete."""


@dataclass(slots=True, frozen=True)
class AnswerForm:
    """What the client accepts: a Table, only metadata, or the object itself."""

    table: bool = False
    metadata_only: bool = False
    include_object: str = "Metadata"


@dataclass
class Request:
    scope: Scope
    receive: Receive
    send: Send
    path: str
    prefix: str = ""  # what was cut from the front of the path (the capability prefix)
    warnings: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        return str(self.scope.get("method", "GET"))

    @cached_property
    def headers(self) -> dict[str, str]:
        return {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in self.scope["headers"]}

    @cached_property
    def query_items(self) -> list[tuple[str, str]]:
        return parse_qsl(self.scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)

    @cached_property
    def query(self) -> dict[str, str]:
        """First value of each parameter."""
        out: dict[str, str] = {}
        for name, value in self.query_items:
            out.setdefault(name, value)
        return out

    def flag(self, name: str) -> bool:
        return self.query.get(name, "").lower() in _TRUE

    def number(self, name: str) -> int | None:
        """A whole number from the query; raises 400 for anything else."""
        text = self.query.get(name, "")
        if not text:
            return None
        try:
            return int(text)
        except ValueError:
            raise bad_request(f'{name}: strconv.ParseInt: parsing "{text}": invalid syntax') from None

    def text_list(self, name: str) -> list[str]:
        return [v for k, v in self.query_items if k == name]

    @property
    def user_agent(self) -> str:
        return self.headers.get("user-agent", "")

    @property
    def manager(self) -> str:
        """The field manager: asked for, or the first word of the user agent."""
        return self.query.get("fieldManager") or self.user_agent.partition("/")[0][:128] or "unknown"

    @cached_property
    def form(self) -> AnswerForm:
        for offer in self.headers.get("accept", "*/*").split(","):
            kind, *parameters = (p.strip() for p in offer.split(";"))
            asked = dict(p.split("=", 1) for p in parameters if "=" in p)
            if kind not in (JSON_TYPE, "*/*", "application/*"):
                continue
            if asked.get("as") == "Table" and asked.get("g") == "meta.k8s.io" and asked.get("v") == "v1":
                return AnswerForm(table=True, include_object=self.query.get("includeObject", "Metadata"))
            if asked.get("as") in ("PartialObjectMetadata", "PartialObjectMetadataList"):
                return AnswerForm(metadata_only=True)
            if "as" not in asked:
                return AnswerForm()
        return AnswerForm()

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def body(self) -> bytes:
        """The whole body; raises 413 over 3 MiB."""
        declared = self.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
            raise too_large(MAX_BODY_BYTES)
        parts, size = [], 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > MAX_BODY_BYTES:
                raise too_large(MAX_BODY_BYTES)
            parts.append(chunk)
            if not message.get("more_body"):
                return b"".join(parts)

    async def gone(self) -> None:
        """Returns when the client has left (or its connection is closed after the answer)."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def json_object(self, *, accepted: tuple[str, ...] = BODY_TYPES) -> JSON:
        """The body as an object. A missing Content-Type means JSON (kubectl's scale sends none)."""
        kind = self.content_type or JSON_TYPE
        if kind not in accepted:
            raise unsupported_media_type(accepted)
        value = decode(await self.body(), yaml_too=kind != JSON_TYPE)
        if not isinstance(value, dict):
            raise bad_request("the body of the request must be an object")
        return value


def decode(raw: bytes, *, yaml_too: bool = False) -> Any:
    """JSON (or YAML, which contains it); raises 400 with the parser's words."""
    try:
        return msgspec.json.decode(raw)
    except msgspec.DecodeError as error:
        if not yaml_too:
            raise bad_request(f"error decoding body: {error}") from None
    try:
        return _plain(yaml.load(raw, Loader=_Loader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise bad_request(f"error decoding body as YAML: {' '.join(str(error).split())}") from None


class _Loader(yaml.SafeLoader):
    """YAML as Kubernetes reads it: no dates, and no anchors (they can blow a small body up without bound)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("anchors and aliases are not accepted")
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k if isinstance(k, str) else str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def dump(value: Any) -> bytes:
    return msgspec.json.encode(value)


async def send_bytes(
    request: Request, code: int, body: bytes, *, content_type: str = JSON_TYPE, headers: dict[str, str] | None = None
) -> None:
    raw = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode())]
    raw += [(k.lower().encode(), v.encode("latin-1", "replace")) for k, v in (headers or {}).items()]
    raw += warning_headers(request.warnings)
    await request.send({"type": "http.response.start", "status": code, "headers": raw})
    await request.send({"type": "http.response.body", "body": body if request.method != "HEAD" else b""})


async def send_json(request: Request, code: int, value: Any, **headers: str) -> None:
    body = dump(value)
    if request.user_agent.startswith(("curl/", "Mozilla/", "Wget/")):
        body = msgspec.json.format(body, indent=2) + b"\n"
    await send_bytes(request, code, body, headers=headers)


async def send_status(request: Request, error: StatusError) -> None:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    await send_json(request, error.code, error.status(), **headers)


async def start_stream(request: Request, content_type: str) -> None:
    raw = [(b"content-type", content_type.encode()), (b"cache-control", b"no-cache, private")]
    await request.send(
        {"type": "http.response.start", "status": 200, "headers": raw + warning_headers(request.warnings)}
    )


async def send_chunk(request: Request, data: bytes, *, more: bool = True) -> None:
    await request.send({"type": "http.response.body", "body": data, "more_body": more})


def warning_headers(warnings: list[str]) -> list[tuple[bytes, bytes]]:
    out = []
    for text in dict.fromkeys(warnings):
        quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ").replace("\r", " ")
        out.append((b"warning", f'299 - "{quoted}"'.encode()))
    return out[:64]


def query_error(what: str, text: str) -> StatusError:
    return bad_request(f'{what}: strconv.ParseUint: parsing "{text}": invalid syntax')
