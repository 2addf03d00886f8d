"""Input logprobs come from the prefill worker, everything else from decode: joins the two answers (`/generate`)."""

from typing import Any

import msgspec

_decode = msgspec.json.decode
_encode = msgspec.json.encode
_KEYS = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")


def merge_answers(prefill: bytes, decode: bytes) -> bytes:
    """Whole answers (an object, or a list for a batch); `decode` unchanged when either cannot be read."""
    try:
        ours, theirs = _decode(decode), _decode(prefill)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return decode
    if isinstance(ours, dict) and isinstance(theirs, dict):
        _prepend(ours, theirs)
    elif isinstance(ours, list) and isinstance(theirs, list):
        for mine, other in zip(ours, theirs, strict=False):
            _prepend(mine, other)
    else:
        return decode
    return _encode(ours)


def needs_prefill(decode: bytes) -> bool:
    """Whether a whole answer has to wait for the prefill's. What a user aborted may never have reached it."""
    try:
        answer = _decode(decode)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return any(not _was_aborted(one) for one in (answer if isinstance(answer, list) else [answer]))


class StreamMerger:
    """The same for streams: the prefill's first chunk of each index goes before the input logprobs of every chunk."""

    def __init__(self) -> None:
        self._first: dict[int, dict[str, Any]] = {}
        self._buffer = b""

    def feed_prefill(self, data: bytes) -> None:
        *events, self._buffer = (self._buffer + data).split(b"\n\n")
        for event in events:
            chunk = _chunk(event)
            if chunk is not None:
                self._first.setdefault(chunk.get("index", 0), chunk)

    def can_merge(self, events: bytes) -> bool:
        """Whether the prefill's chunk is here for every index in `events`, or not to be waited for: see `needs_prefill`."""
        chunks = [chunk for event in events.split(b"\n\n") if (chunk := _chunk(event)) is not None]
        waiting = (chunk for chunk in chunks if "meta_info" in chunk and chunk.get("index", 0) not in self._first)
        return all(_was_aborted(chunk) for chunk in waiting)

    def merge(self, events: bytes) -> bytes:
        """Whole events of the decode worker."""
        out: list[bytes] = []
        for event in events.split(b"\n\n")[:-1]:
            chunk = _chunk(event)
            first = self._first.get(chunk.get("index", 0)) if chunk is not None else None
            if chunk is None or first is None:
                out.append(event + b"\n\n")
            else:
                _prepend(chunk, first)
                out.append(b"data: " + _encode(chunk) + b"\n\n")
        return b"".join(out)


def _chunk(event: bytes) -> dict[str, Any] | None:
    if event.startswith(b":"):  # comments: token ids of our workers
        event = event[event.rfind(b"\n") + 1 :]
    if not event.startswith(b"data: {"):
        return None
    try:
        chunk = _decode(event[6:])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return chunk if isinstance(chunk, dict) else None


def _was_aborted(chunk: Any) -> bool:
    meta = chunk.get("meta_info") if isinstance(chunk, dict) else None
    finish = meta.get("finish_reason") if isinstance(meta, dict) else None
    return isinstance(finish, dict) and finish.get("type") == "abort"


def _prepend(mine: Any, other: Any) -> None:
    """`mine` (of decode) gets the input logprobs of `other` (of prefill) in front of its own."""
    if not isinstance(mine, dict) or not isinstance(other, dict):
        return
    meta, prefill_meta = mine.get("meta_info"), other.get("meta_info")
    if not isinstance(meta, dict) or not isinstance(prefill_meta, dict):
        return
    for key in _KEYS:
        values = prefill_meta.get(key)
        if isinstance(values, list) and values:
            meta[key] = values + (meta.get(key) or [])
