"""vLLM's hand-over between prefill and decode servers (`kv_transfer_params`, NixlConnector's words), over our own transfer.

A proxy asks a prefill server first, with `do_remote_decode`, then sends the request with the answer's params to a decode server.
Here the prefill answers at once with the room in which it will meet the decode, and computes when the decode has come: what vLLM
holds finished under a lease, we compute while the decode connects. Params are ours only: prefill and decode must both be Baton's.
"""

import random
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from baton.engine.server.handover import Handover
from baton.protocol.errors import bad_request
from baton.protocol.rank import FAKE_BOOTSTRAP_HOST

Mode = Literal["null", "prefill", "decode"]
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
    """Where the request meets its other half. `own_address`: of this prefill server, for decode servers.

    Raises `RequestError` (400) for what this server's part cannot be.
    """
    params = _parse(raw or {})
    if mode == "prefill":
        if not params.do_remote_decode:
            message = "this server is a kv_producer: kv_transfer_params.do_remote_decode must be true."
            raise bad_request(message, "kv_transfer_params")
        return Handover(*own_address, random.randrange(MAX_ROOM))
    if params.do_remote_decode:
        raise bad_request("this server is no kv_producer: do_remote_decode is not served.", "kv_transfer_params")
    if mode == "null" and params.do_remote_prefill:
        raise bad_request(
            "do_remote_prefill needs --kv-transfer-config with kv_role kv_consumer on this server.",
            "kv_transfer_params",
        )
    if not params.do_remote_prefill:
        return Handover(FAKE_BOOTSTRAP_HOST, None, random.randrange(MAX_ROOM))
    return _meeting_place(params)


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
    return Handover(params.remote_host, port, rooms[0])
