"""SGLang's bootstrap server: where decode ranks find out how to reach the ranks of a prefill worker.

`bootstrap_app()` is served by the prefill worker's HTTP process on `--disaggregation-bootstrap-port`; its ranks register
by `register`, decode ranks ask by `look_up`. Requests and answers of /route are SGLang's to the key and the error text; /ranks is ours:
all ranks in one answer, with the part of every page that each holds. No KV and no room passes through here.
"""

import contextlib
from dataclasses import dataclass, field

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from baton.transfer.errors import TransferError
from baton.transfer.http import http_call
from baton.transfer.slices import Slice

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
    slice: Slice | None = None
    """What the rank holds of every page; None: all of it, as the only rank. (SGLang's bodies have no such key.)"""

    @property
    def dp_size(self) -> int:
        return self.attn_dp_size if self.system_dp_size == 1 else self.system_dp_size

    @property
    def dp_group(self) -> int:
        return self.attn_dp_rank if self.system_dp_size == 1 else self.system_dp_rank


class HoldingRank(msgspec.Struct, frozen=True):
    """A rank of a prefill worker as /ranks lists it."""

    rank_ip: str
    rank_port: int
    slice: Slice | None


class PrefillRanks(msgspec.Struct, frozen=True):
    """Answer of /ranks for one of `dp_size` dp groups (0: nobody has registered): the ranks that have registered, stage after stage, of `size` that it has."""

    dp_size: int
    size: int
    ranks: list[HoldingRank]

    def need_all(self) -> None:
        """Raises `TransferError` where some have not registered yet."""
        if not self.ranks:
            raise TransferError("no prefill rank has registered yet")
        if len(self.ranks) != self.size:
            raise TransferError(f"only {len(self.ranks)} of {self.size} prefill ranks have registered yet")


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
    ranks: dict[tuple[int, int, int], Registration] = field(default_factory=dict)
    """By (dp group, pp rank, tp rank)."""

    def put(self, entry: Registration) -> None:
        sizes = ParallelSizes(entry.attn_tp_size, entry.dp_size, entry.pp_size)
        if sizes != self.sizes:
            self.sizes = sizes
            self.ranks.clear()
        self.ranks[entry.dp_group, entry.pp_rank, entry.attn_tp_rank] = entry

    def of_group(self, dp_group: int) -> PrefillRanks:
        ranks = [
            HoldingRank(entry.rank_ip, entry.rank_port, entry.slice)
            for key, entry in sorted(self.ranks.items())
            if key[0] == dp_group
        ]
        sizes = self.sizes
        num_ranks = (sizes.prefill_attn_tp_size or 0) * (sizes.prefill_pp_size or 0)
        return PrefillRanks(sizes.prefill_dp_size or 0, num_ranks, ranks)


def bootstrap_app() -> Starlette:
    """A new ASGI application with an empty registry."""
    registry = _Registry()

    async def route(request: Request) -> Response:
        return await _put_route(registry, request) if request.method == "PUT" else _get_route(registry, request)

    async def ranks(request: Request) -> Response:
        dp_group = request.query_params.get("target_dp_group", "0")
        if not dp_group.isdecimal():
            return PlainTextResponse(f"target_dp_group must be a whole number, got {dp_group!r}.", 400)
        return JSONResponse(msgspec.to_builtins(registry.of_group(int(dp_group))))

    async def health(_: Request) -> Response:
        return PlainTextResponse("OK")

    routes = [Route("/route", route, methods=["GET", "PUT"]), Route("/ranks", ranks), Route("/health", health)]
    return Starlette(routes=routes)


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
    entry = registry.ranks.get((key[0], key[2], key[1]))
    if entry is None:
        return PlainTextResponse("Bootstrap info not Found", 404)
    return JSONResponse({"rank_ip": entry.rank_ip, "rank_port": entry.rank_port})


async def register(host: str, port: int, entry: Registration) -> None:
    """Tell the bootstrap server about a rank. Raises OSError or `TransferError`."""
    status, body = await http_call("PUT", host, port, "/route", msgspec.json.encode(entry))
    if status != 200:
        raise TransferError(f"bootstrap server {host}:{port} refused the registration ({status}): {_text(body)}")


async def look_up(host: str, port: int, dp_group: int = 0) -> PrefillRanks:
    """The ranks of one dp group of a prefill worker, as far as they have registered. Raises OSError or `TransferError`."""
    status, body = await http_call("GET", host, port, f"/ranks?target_dp_group={dp_group}")
    if status == 404:
        raise TransferError(
            "the bootstrap server has no /ranks: the prefill worker is of another version than this one"
        )
    if status != 200:
        raise TransferError(f"bootstrap server answered {status}: {_text(body)}")
    try:
        answer = msgspec.json.decode(body, type=PrefillRanks)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TransferError(f"bootstrap server answered nonsense: {error}") from None
    return answer


def _text(body: bytes) -> str:
    with contextlib.suppress(UnicodeDecodeError):
        return body.decode()[:200]
    return repr(body[:200])
