"""SGLang's bootstrap server: where decode ranks find out how to reach the ranks of a prefill worker.

`bootstrap_app()` is served by the prefill worker's HTTP process on `--disaggregation-bootstrap-port`; its ranks register
by `register`, decode ranks ask by `look_up`. Requests and answers are SGLang's to the key and the error text. No KV and no
room passes through here.
"""

import contextlib
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from baton.transfer.errors import TransferError
from baton.transfer.http import http_call

T = TypeVar("T")

_MAX_BODY_BYTES = 64 << 10


class Registration(msgspec.Struct, frozen=True):
    """Body of PUT /route: one rank of a prefill worker."""

    role: str
    attn_tp_size: int
    attn_tp_rank: int
    attn_dp_size: int
    attn_dp_rank: int
    pp_size: int
    pp_rank: int
    system_dp_size: int
    system_dp_rank: int
    rank_ip: str
    rank_port: int

    @property
    def dp_size(self) -> int:
        return self.attn_dp_size if self.system_dp_size == 1 else self.system_dp_size

    @property
    def dp_group(self) -> int:
        return self.attn_dp_rank if self.system_dp_size == 1 else self.system_dp_rank


class RankAddress(msgspec.Struct, frozen=True):
    """Answer for one rank."""

    rank_ip: str
    rank_port: int


class ParallelSizes(msgspec.Struct, frozen=True):
    """Answer for engine_rank=-1; None before the first registration."""

    prefill_attn_tp_size: int | None = None
    prefill_dp_size: int | None = None
    prefill_pp_size: int | None = None


@dataclass(slots=True)
class _Registry:
    """What has registered. Invariant: all entries belong to one set of sizes; new sizes (a worker restarted with other
    flags) replace everything."""

    sizes: ParallelSizes = field(default_factory=ParallelSizes)
    ranks: dict[tuple[int, int, int], RankAddress] = field(default_factory=dict)
    """(dp group, tp rank, pp rank) -> address."""

    def put(self, entry: Registration) -> None:
        sizes = ParallelSizes(entry.attn_tp_size, entry.dp_size, entry.pp_size)
        if sizes != self.sizes:
            self.sizes = sizes
            self.ranks.clear()
        key = (entry.dp_group, entry.attn_tp_rank, entry.pp_rank)
        self.ranks[key] = RankAddress(entry.rank_ip, entry.rank_port)


def bootstrap_app() -> Starlette:
    """A new ASGI application with an empty registry."""
    registry = _Registry()

    async def route(request: Request) -> Response:
        return await _put_route(registry, request) if request.method == "PUT" else _get_route(registry, request)

    async def health(_: Request) -> Response:
        return PlainTextResponse("OK")

    return Starlette(routes=[Route("/route", route, methods=["GET", "PUT"]), Route("/health", health)])


async def _put_route(registry: _Registry, request: Request) -> Response:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _MAX_BODY_BYTES:
            return PlainTextResponse(f"Body is larger than {_MAX_BODY_BYTES} bytes.", 413)
    try:
        entry = msgspec.json.decode(body, type=Registration)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return PlainTextResponse(f"Bad registration: {error}", 400)
    if entry.role == "Prefill":  # As SGLang: other roles are accepted and have nothing to register.
        registry.put(entry)
    return PlainTextResponse("OK")


def _get_route(registry: _Registry, request: Request) -> Response:
    key = []
    for name in ("target_dp_group", "engine_rank", "target_pp_rank"):
        text = request.query_params.get(name)
        if not text:
            return PlainTextResponse("Missing inputs for bootstrap server.", 400)
        try:
            key.append(int(text))
        except ValueError:
            return PlainTextResponse(f"{name} must be an integer, got {text!r}.", 400)
    if key == [-1, -1, -1]:
        return JSONResponse(msgspec.to_builtins(registry.sizes))
    address = registry.ranks.get((key[0], key[1], key[2]))
    if address is None:
        return PlainTextResponse("Bootstrap info not Found", 404)
    return JSONResponse(msgspec.to_builtins(address))


async def register(host: str, port: int, entry: Registration) -> None:
    """Tell the bootstrap server about a rank. Raises OSError or `TransferError`."""
    status, body = await http_call("PUT", host, port, "/route", msgspec.json.encode(entry))
    if status != 200:
        raise TransferError(f"bootstrap server {host}:{port} refused the registration ({status}): {_text(body)}")


async def look_up(host: str, port: int, tp_rank: int, tp_size: int) -> RankAddress:
    """Address of the prefill rank that serves our rank. Raises OSError or `TransferError`."""
    sizes = await _get(host, port, -1, -1, ParallelSizes)
    if sizes.prefill_attn_tp_size is None:
        raise TransferError("no prefill rank has registered yet")
    if sizes.prefill_attn_tp_size != tp_size:
        raise TransferError(
            f"prefill and decode must have the same tp size: decode_tp={tp_size}, prefill_tp={sizes.prefill_attn_tp_size}"
        )
    if sizes.prefill_dp_size != 1 or sizes.prefill_pp_size != 1:
        raise TransferError(
            "a prefill worker with data or pipeline parallelism is not supported: "
            f"dp_size={sizes.prefill_dp_size}, pp_size={sizes.prefill_pp_size}"
        )
    return await _get(host, port, 0, tp_rank, RankAddress)


async def _get(host: str, port: int, dp_group: int, tp_rank: int, kind: type[T]) -> T:
    pp_rank = -1 if tp_rank == -1 else 0
    target = f"/route?engine_rank={tp_rank}&target_dp_group={dp_group}&target_pp_rank={pp_rank}"
    status, body = await http_call("GET", host, port, target)
    if status != 200:
        raise TransferError(f"bootstrap server answered {status}: {_text(body)}")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TransferError(f"bootstrap server answered nonsense: {error}") from None


def _text(body: bytes) -> str:
    with contextlib.suppress(UnicodeDecodeError):
        return body.decode()[:200]
    return repr(body[:200])
