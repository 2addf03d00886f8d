"""Every route that is not a generation: health, models, worker administration, fan-outs, metrics.

A handler takes the `Router` (see `app`) and the request and returns a `Reply`; it raises `RequestError` for an error.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import unquote

import msgspec

from baton.router.config import Role, WorkerSpec
from baton.router.downstream import Request
from baton.router.errors import router_error
from baton.router.httpbytes import JSON_TYPE, TEXT_TYPE, passed_on
from baton.router.retry import Answer
from baton.router.workers import Worker

if TYPE_CHECKING:
    from baton.router.app import Router

_encode = msgspec.json.encode
FAN_OUT_TIMEOUT_S = 30.0
METRICS_TYPE = b"content-type: text/plain; version=0.0.4; charset=utf-8\r\n"
_NO_STATES = [{"last_gen_throughput": 0.0, "avg_spec_accept_length": None}]


class Reply(NamedTuple):
    status: int
    body: bytes
    headers: bytes = JSON_TYPE


T = TypeVar("T")
Handler = Callable[["Router", Request], Awaitable[Reply]]


class AddWorker(msgspec.Struct):
    url: str
    worker_type: Role | None = None
    bootstrap_port: int | None = None


class RemoveWorker(msgspec.Struct):
    url: str


class Register(msgspec.Struct):
    """What SGLang 0.4.10 servers send when started with `--pdlb-url`."""

    mode: Role
    registry_url: str
    bootstrap_port: int | None = None


class AbortRequest(msgspec.Struct):
    rid: str = ""
    abort_all: bool = False


def _parse(request: Request, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(request.body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise router_error(400, f"Bad request body: {error}.") from None


def _key(router: "Router", request: Request) -> bytes:
    return router.core.authorization_for(request)


async def health(router: "Router", request: Request) -> Reply:
    """200 as long as the router runs; whether it can serve is `/readiness`."""
    return Reply(200, b"OK", TEXT_TYPE)


async def readiness(router: "Router", request: Request) -> Reply:
    missing = router.core.registry.missing()
    counts = {
        role: sum(worker.is_available for worker in workers) for role, workers in router.core.registry.by_role.items()
    }
    if missing or router.closing:
        state = {"status": "not ready", "missing": missing, "healthy_workers": counts, "closing": router.closing}
        return Reply(503, _encode(state))
    return Reply(200, _encode({"status": "ready", "healthy_workers": counts}))


async def health_generate(router: "Router", request: Request) -> Reply:
    """200 when every worker generates; else 503 with what each said."""
    answers = await router.core.fan_out(
        b"GET", b"/health_generate", FAN_OUT_TIMEOUT_S, authorization=_key(router, request)
    )
    return _summary(answers, b"OK")


async def flush_cache(router: "Router", request: Request) -> Reply:
    answers = await router.core.fan_out(
        b"POST", b"/flush_cache", FAN_OUT_TIMEOUT_S, authorization=_key(router, request)
    )
    text = (
        b"Cache flushed.\nPlease check backend logs for more details. "
        b"(When there are running or waiting requests, the operation will not be performed.)\n"
    )
    return _summary(answers, text)


def _summary(answers: dict[str, Answer | str], text: bytes) -> Reply:
    """`text` when all workers answered 200, else the first worker's error status (503 if it gave none) and a list."""
    failed = {
        url: answer if isinstance(answer, str) else f"{answer.status} {answer.body.decode(errors='replace')[:500]}"
        for url, answer in answers.items()
        if isinstance(answer, str) or answer.status != 200
    }
    if not answers:
        raise router_error(503, "This router has no workers.", kind="no_healthy_worker", retryable=True)
    if not failed:
        return Reply(200, text, TEXT_TYPE)
    first = answers[next(iter(failed))]
    status = first.status if isinstance(first, Answer) and first.status >= 400 else 503
    return Reply(status, _encode({"failed": failed, "ok": [url for url in answers if url not in failed]}))


async def abort_request(router: "Router", request: Request) -> Reply:
    """Ends requests of this router by rid (a prefix, as in SGLang), and passes the abort on to every worker."""
    wanted = _parse(request, AbortRequest)
    if not wanted.rid and not wanted.abort_all:
        raise router_error(400, "rid is missing (or set abort_all).", param="rid")
    for exchange in list(router.core.exchanges):
        if wanted.abort_all or exchange.rid_starts_with(wanted.rid):
            exchange.abort()
    workers = router.core.registry.all()
    listening = [worker for worker in workers if worker.software.takes_aborts]
    if workers and not listening:
        return Reply(200, b"", TEXT_TYPE)
    answers = await router.core.fan_out(
        b"POST", b"/abort_request", FAN_OUT_TIMEOUT_S, request.body, listening, _key(router, request)
    )
    return _summary(answers, b"")


async def from_first(router: "Router", request: Request) -> Reply:
    """The answer of the first worker that gives one (prefill before decode): model info, model list."""
    reasons: list[str] = []
    for worker in router.core.registry.all():
        if not worker.is_available:
            continue
        try:
            answer = await router.core.call(
                worker, b"GET", request.path, FAN_OUT_TIMEOUT_S, authorization=_key(router, request)
            )
        except (OSError, TimeoutError) as error:
            reasons.append(f"{worker.url}: {str(error) or 'no answer in time'}")
            continue
        return Reply(answer.status, answer.body, passed_on(answer.headers, request.request_id))
    if reasons:
        raise router_error(502, f"No worker answered: {'; '.join(reasons)}.")
    raise router.core.nobody_there()


async def server_info(router: "Router", request: Request) -> Reply:
    """mini_lb's shape: the decode workers' internal states, and every worker's whole answer."""
    registry = router.core.registry
    answers = await router.core.fan_out(
        b"GET", b"/get_server_info", FAN_OUT_TIMEOUT_S, authorization=_key(router, request)
    )
    infos: dict[str, list[Any]] = {role: [] for role in registry.by_role}
    for role, workers in registry.by_role.items():
        for worker in workers:
            infos[role].append(_info(worker, answers[worker.url]))
    states: list[Any] = []
    for info in infos.get("decode", infos.get("regular", [])):
        states += info.get("internal_states") or []
    return Reply(200, _encode({"internal_states": states or _NO_STATES, **infos}))


def _info(worker: Worker, answer: Answer | str) -> dict[str, Any]:
    if isinstance(answer, str):
        return {"url": worker.url, "error": answer}
    try:
        info = msgspec.json.decode(answer.body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        info = None
    return info if isinstance(info, dict) else {"url": worker.url, "error": f"answered {answer.status}"}


async def metrics(router: "Router", request: Request) -> Reply:
    return Reply(200, router.metrics_text().encode(), METRICS_TYPE)


async def list_workers(router: "Router", request: Request) -> Reply:
    workers = [
        {
            "url": worker.url,
            "worker_type": worker.role,
            "bootstrap_port": worker.bootstrap_port,
            "dialect": worker.software.dialect,
            "version": worker.software.version,
            "is_healthy": worker.healthy is True,
            "problem": worker.problem,
            "load": worker.active,
            "circuit_breaker": worker.breaker.state,
            "draining": worker.draining,
        }
        for worker in router.core.registry.all()
    ]
    return Reply(200, _encode({"workers": workers, "total": len(workers)}))


async def add_worker(router: "Router", request: Request) -> Reply:
    wanted = _parse(request, AddWorker)
    role: Role = wanted.worker_type or ("decode" if router.core.config.pd else "regular")
    if router.core.config.pd and wanted.worker_type is None:
        raise router_error(400, "worker_type must be prefill or decode.", param="worker_type")
    worker = _add(router, WorkerSpec(wanted.url, role, wanted.bootstrap_port))
    return Reply(202, _encode({"status": "added", "url": worker.url, "worker_type": worker.role}))


async def register(router: "Router", request: Request) -> Reply:
    wanted = _parse(request, Register)
    if wanted.mode == "prefill" and wanted.bootstrap_port is None:
        raise router_error(400, "bootstrap_port is required for a prefill worker.", param="bootstrap_port")
    try:
        known = router.core.registry.of_role(wanted.registry_url, wanted.mode)
    except ValueError as error:
        raise router_error(400, f"{error}.", param="registry_url") from None
    if known is not None:  # a worker that restarted
        known.bootstrap_port = wanted.bootstrap_port
        known.draining = False
        router.core.wake(known)
    else:
        _add(router, WorkerSpec(wanted.registry_url, wanted.mode, wanted.bootstrap_port))
    return Reply(200, b"OK", TEXT_TYPE)


def _add(router: "Router", spec: WorkerSpec) -> Worker:
    try:
        return router.add_worker(spec)
    except ValueError as error:
        raise router_error(400, f"{error}.", param="url") from None


async def remove_worker(router: "Router", request: Request) -> Reply:
    """`DELETE /workers/URL` (percent-encoded) or with a body `{"url"}`. In-flight requests end first."""
    path = unquote(request.path.decode("latin-1"))
    url = path.removeprefix("/workers").strip("/") or _parse(request, RemoveWorker).url
    try:
        found = router.core.registry.find(url)
    except ValueError as error:
        raise router_error(400, f"{error}.", param="url") from None
    if not found:
        raise router_error(404, f"There is no worker {url}.", param="url")
    for worker in found:
        router.drain_worker(worker)
    load = sum(worker.active for worker in found)
    return Reply(202, _encode({"status": "draining", "url": found[0].url, "load": load}))


async def run(handler: Handler, router: "Router", request: Request) -> Reply:
    """The handler under the router's own deadline."""
    try:
        async with asyncio.timeout(FAN_OUT_TIMEOUT_S * 2):
            return await handler(router, request)
    except TimeoutError:
        raise router_error(504, f"No answer within {FAN_OUT_TIMEOUT_S * 2:g} s.") from None


ROUTES: dict[bytes, dict[bytes, Handler]] = {
    b"/health": {b"GET": health},
    b"/liveness": {b"GET": health},
    b"/readiness": {b"GET": readiness},
    b"/health_generate": {b"GET": health_generate, b"POST": health_generate},
    b"/flush_cache": {b"GET": flush_cache, b"POST": flush_cache},
    b"/abort_request": {b"POST": abort_request},
    b"/get_server_info": {b"GET": server_info},
    b"/server_info": {b"GET": server_info},
    b"/get_model_info": {b"GET": from_first},
    b"/model_info": {b"GET": from_first},
    b"/v1/models": {b"GET": from_first},
    b"/metrics": {b"GET": metrics},
    b"/workers": {b"GET": list_workers, b"POST": add_worker, b"DELETE": remove_worker},
    b"/register": {b"POST": register},
}
OPEN_ROUTES = frozenset((b"/health", b"/liveness", b"/readiness", b"/metrics"))
"""No API key needed: probes and scrapers have none."""
