"""What the router reads of a request body, and the fields it splices in. Pure.

The body is parsed once, into raw slices; it is never re-serialised. New fields go before its closing brace: in JSON the
last of two equal keys wins in every parser the workers use, so a field that the client sent is overridden.
"""

from typing import Any

import msgspec

from baton.protocol.hops import RESUME_FIELD, Resume
from baton.router.errors import router_error

_encode = msgspec.json.Encoder().encode
_RAW_EMPTY = msgspec.Raw(b"")


class RequestView(msgspec.Struct):
    """The fields of a request that matter to the router, as raw JSON (empty: absent). Their types are not checked here:
    a worker refuses a wrong one in its own words."""

    text: msgspec.Raw = _RAW_EMPTY
    input_ids: msgspec.Raw = _RAW_EMPTY
    prompt: msgspec.Raw = _RAW_EMPTY
    messages: msgspec.Raw = _RAW_EMPTY
    stream: msgspec.Raw = _RAW_EMPTY
    return_logprob: msgspec.Raw = _RAW_EMPTY
    rid: msgspec.Raw = _RAW_EMPTY
    request_id: msgspec.Raw = _RAW_EMPTY
    kv_transfer_params: msgspec.Raw = _RAW_EMPTY
    n: msgspec.Raw = _RAW_EMPTY
    sampling_params: msgspec.Raw = _RAW_EMPTY
    stream_options: msgspec.Raw = _RAW_EMPTY

    @property
    def is_stream(self) -> bool:
        return bytes(self.stream) == b"true"

    @property
    def wants_logprobs(self) -> bool:
        raw = bytes(self.return_logprob)
        return raw == b"true" or raw.startswith(b"[")

    @property
    def wants_usage(self) -> bool:
        """A last chunk with the usage is expected in the stream (OpenAI routes)."""
        options = msgspec.json.decode(self.stream_options) if self.stream_options else None
        return isinstance(options, dict) and options.get("include_usage") is True

    @property
    def names_peers(self) -> bool:
        """The client says from whom a worker is to take KV."""
        return bytes(self.kv_transfer_params) not in (b"", b"null")

    @property
    def cache_key(self) -> bytes:
        """The request's prompt as bytes, the same from its start for requests that share a prefix."""
        return bytes(self.messages or self.text or self.prompt or self.input_ids)

    def batch_size(self) -> int | None:
        """Number of prompts of a batch; None for a single prompt.

        A list of texts, or of lists of ids, is a batch; a list of ids (`input_ids`, or `prompt` of completions) is one.
        """
        for raw, is_text in ((self.text, True), (self.prompt, True), (self.input_ids, False)):
            if not raw or bytes(raw)[:1] != b"[":
                continue
            items = msgspec.json.decode(raw, type=list[msgspec.Raw])
            first = bytes(items[0])[:1] if items else b""
            if first == b"[" or (is_text and first == b'"'):
                return len(items)
        return None

    def num_choices(self) -> int:
        """Streams of tokens in the answer: prompts times `n`. Wrong types count as 1 (the worker refuses them)."""
        n: Any = 1
        if self.n:
            n = msgspec.json.decode(self.n)
        elif self.sampling_params:
            sampling = msgspec.json.decode(self.sampling_params)
            if isinstance(sampling, list):
                sampling = sampling[0] if sampling else {}
            n = sampling.get("n", 1) if isinstance(sampling, dict) else 1
        return (self.batch_size() or 1) * (n if isinstance(n, int) and n > 0 else 1)


_view_decoder = msgspec.json.Decoder(RequestView)


def parse_body(body: bytes) -> RequestView:
    """Raises `RequestError` (400) unless the body is one JSON object."""
    try:
        return _view_decoder.decode(body)
    except msgspec.ValidationError:
        raise router_error(400, "The request body must be a JSON object.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise router_error(400, f"The request body is not valid JSON: {error}.") from None


def client_rids(view: RequestView) -> list[str] | str | None:
    """The `rid` that the client chose, if it is one that workers accept."""
    if not view.rid:
        return None
    rid = msgspec.json.decode(view.rid)
    if isinstance(rid, str) and rid:
        return rid
    if isinstance(rid, list) and rid and all(isinstance(item, str) and item for item in rid):
        return rid
    return None


def rid_field(rid: str | list[str], batch_size: int | None) -> bytes:
    """`"rid":...`: one id, or one per prompt of a batch, all with the same prefix so that one abort ends them all."""
    if batch_size is None or isinstance(rid, list):
        return b'"rid":' + _encode(rid)
    return b'"rid":' + _encode([f"{rid}_{index}" for index in range(batch_size)])


def bootstrap_fields(host: str, port: int | None, rooms: list[int], batch_size: int | None) -> bytes:
    """`bootstrap_host`, `bootstrap_port`, `bootstrap_room`: three values, or for a batch three lists."""
    if batch_size is None:
        port_text = b"null" if port is None else b"%d" % port
        return b'"bootstrap_host":"%s","bootstrap_port":%s,"bootstrap_room":%d' % (host.encode(), port_text, rooms[0])
    fields = {
        "bootstrap_host": [host] * batch_size,
        "bootstrap_port": [port] * batch_size,
        "bootstrap_room": rooms,
    }
    return _encode(fields)[1:-1]


def resume_field(resume: Resume) -> bytes:
    return b'"%s":%s' % (RESUME_FIELD.encode(), _encode(resume))


def splice(body: bytes, fields: bytes) -> bytes:
    """`body` (a JSON object, checked by `parse_body`) with `fields` added as its last members."""
    end = body.rindex(b"}")
    comma = b"" if body[:end].rstrip().endswith(b"{") else b","
    if end == len(body) - 1 and comma:
        return b"".join((memoryview(body)[:end], b",", fields, b"}"))
    return body[:end] + comma + fields + b"}"
