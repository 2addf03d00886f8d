"""vLLM's hand-over between prefill and decode servers (`kv_transfer_params`, NixlConnector's words), over our own transfer.

A proxy asks a prefill server first, with `do_remote_decode`, then sends the request with the answer's params to a decode server.
Here the prefill answers at once with the room in which it will meet the decode, and computes when the decode has come: what vLLM
holds finished under a lease, we compute while the decode connects. Params are ours only: prefill and decode must both be Baton's.
"""

import random
from collections.abc import Mapping
from typing import Any

import msgspec

from baton.engine.server.handover import Handover
from baton.protocol.errors import bad_request
from baton.protocol.rank import FAKE_BOOTSTRAP_HOST, Mode

MAX_ROOM = 2**53
"""Proxies of any language carry it through JSON."""
ENGINE_ID_PREFIX = "baton:"


class KvTransferParams(msgspec.Struct, kw_only=True):
    """What a request says. Other connectors' keys are passed over."""

    do_remote_decode: bool = False
    do_remote_prefill: bool = False
    remote_engine_id: str | None = None
    remote_block_ids: list[Any] | None = None
    remote_host: str | None = None
    remote_port: int | str | None = None


def handover_of_params(mode: Mode, raw: Mapping[str, Any] | None, own_address: tuple[str, int]) -> Handover:
    """Which half of the request this server is, and where it meets the other. `own_address`: of this server, where decode
    servers meet it.

    Raises `RequestError` (400) for what this server's mode cannot be.
    """
    params = _parse(raw or {})
    problem = _problem(mode, params)
    if problem is not None:
        raise bad_request(problem, "kv_transfer_params")
    if params.do_remote_decode:
        return Handover(*own_address, random.randrange(MAX_ROOM), "prefill")
    if params.do_remote_prefill:
        return _meeting_place(params)
    return Handover(FAKE_BOOTSTRAP_HOST, None, random.randrange(MAX_ROOM))


def _problem(mode: Mode, params: KvTransferParams) -> str | None:
    """What of the request a server of this mode does not serve."""
    if mode == "prefill" and not params.do_remote_decode:
        return "this server is a kv_producer: kv_transfer_params.do_remote_decode must be true."
    if mode in ("null", "decode") and params.do_remote_decode:
        return "this server is no kv_producer: do_remote_decode is not served."
    if mode == "null" and params.do_remote_prefill:
        return "do_remote_prefill needs --kv-transfer-config with kv_role kv_consumer or kv_both on this server."
    if mode == "both" and params.do_remote_decode and params.do_remote_prefill:
        return "do_remote_decode and do_remote_prefill: a server is one half of a request, not both."
    return None


def params_of_answer(handover: Handover) -> dict[str, Any]:
    """A prefill server's answer."""
    return {
        "do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": f"{ENGINE_ID_PREFIX}{handover.host}:{handover.port}",
        "remote_block_ids": [handover.room], "remote_host": handover.host, "remote_port": handover.port, "tp_size": 1,
    }  # fmt: skip


def _parse(raw: Mapping[str, Any]) -> KvTransferParams:
    try:
        return msgspec.convert(raw, KvTransferParams)
    except msgspec.ValidationError as error:
        raise bad_request(f"kv_transfer_params: {error}", "kv_transfer_params") from None


def _meeting_place(params: KvTransferParams) -> Handover:
    if not (params.remote_engine_id or "").startswith(ENGINE_ID_PREFIX):
        message = "kv_transfer_params.remote_engine_id is of no Baton prefill server, and others cannot hand over to this one."
        raise bad_request(message, "kv_transfer_params")
    rooms = params.remote_block_ids or []
    if not params.remote_host or len(rooms) != 1 or not isinstance(rooms[0], int):
        raise bad_request(
            "kv_transfer_params must be what the prefill server answered: remote_host and one of remote_block_ids.",
            "kv_transfer_params",
        )
    try:
        port = int(params.remote_port or "")
    except ValueError:
        raise bad_request(
            f"kv_transfer_params.remote_port must be a port number, got {params.remote_port!r}.", "kv_transfer_params"
        ) from None
    return Handover(params.remote_host, port, rooms[0], "decode")
