"""vLLM's prefill/decode protocol: what each side is sent, and what the prefill's answer hands over. Pure.

The prefill server is asked first, for one token and with `do_remote_decode`; the `kv_transfer_params` of its answer go, unread,
into the client's own request to the decode server. Source: vLLM's NixlConnector and the proxy of its tests. Unlike SGLang's
bodies (`body`), these are written anew from the raw members, since fields have to go.
"""

from typing import Any

import msgspec

from baton.protocol.hops import RESUME_FIELD, Resume
from baton.router.retry import Answer

_encode = msgspec.json.encode
_members_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
Members = dict[str, msgspec.Raw]
PARAMS_FIELD = "kv_transfer_params"
_OURS = frozenset(
    ("rid", "request_id", PARAMS_FIELD, RESUME_FIELD, "bootstrap_host", "bootstrap_port", "bootstrap_room")
)
"""Fields by which a client could choose ids twice, or whom a worker meets."""
ASK_FOR_HANDOVER = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class NoHandoverError(Exception):
    """The prefill's answer has no `kv_transfer_params` where it must."""


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _PrefillAnswer(msgspec.Struct):
    kv_transfer_params: dict[str, msgspec.Raw] | None = None
    choices: list[_Choice] = []


_answer_decoder = msgspec.json.Decoder(_PrefillAnswer)


def members_of(body: bytes) -> Members:
    """The members of a request (an object, checked by `parse_body`) that the client decides on; of equal names the last counts."""
    return {name: raw for name, raw in _members_decoder.decode(body).items() if name not in _OURS}


def prefill_body(members: Members, request_id: str, resume: Resume | None) -> bytes:
    """One token, not streamed. What is in `resume` has been generated already and counts as such."""
    num_before = max((len(ids) for ids in resume.output_ids if ids), default=0) if resume is not None else 0
    fields: dict[str, Any] = {name: raw for name, raw in members.items() if name != "stream_options"}
    fields["stream"] = False
    fields["max_tokens"] = num_before + 1
    if "max_completion_tokens" in members:
        fields["max_completion_tokens"] = num_before + 1
    if (wanted := _positive_int(members.get("min_tokens"))) is not None:
        # More than max_tokens is an error. None at all would let the first token be the end, where a client forbids it.
        fields["min_tokens"] = min(wanted, num_before + 1)
    fields[PARAMS_FIELD] = ASK_FOR_HANDOVER
    return _with_ours(fields, request_id, resume)


def decode_body(members: Members, request_id: str, params: Members | None, resume: Resume | None) -> bytes:
    """The client's request. `params`: what the prefill answered; None: the decode server computes the prompt itself."""
    fields: dict[str, Any] = dict(members)
    if params is not None:
        fields[PARAMS_FIELD] = params
    return _with_ours(fields, request_id, resume)


def _with_ours(fields: dict[str, Any], request_id: str, resume: Resume | None) -> bytes:
    fields["request_id"] = request_id
    if resume is not None:
        fields[RESUME_FIELD] = resume
    return _encode(fields)


def _positive_int(raw: msgspec.Raw | None) -> int | None:
    """None for what is absent or no such number: the worker refuses it in its own words."""
    value = msgspec.json.decode(raw) if raw else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def handed_over(answer: Answer) -> Members | None:
    """`kv_transfer_params` of a prefill's answer; None: its first token ended the request, so it kept nothing (vLLM before 0.11).

    Raises `NoHandoverError`.
    """
    try:
        found = _answer_decoder.decode(answer.body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NoHandoverError(f"its answer cannot be read: {error}") from None
    if found.kv_transfer_params:
        return found.kv_transfer_params
    if found.choices and found.choices[0].finish_reason == "stop":
        return None
    raise NoHandoverError(
        "its answer has no kv_transfer_params: start it with --kv-transfer-config and a kv_role of kv_producer or kv_both"
    )
