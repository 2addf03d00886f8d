"""The worker's ASGI application: which path means which handler, who may call, and what an error looks like.

Not here: what handlers do, sockets and processes (`main`).
"""

import hmac
import logging
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from baton.engine.server import admin
from baton.engine.server.chat import chat_completions
from baton.engine.server.client import RankLostError
from baton.engine.server.completions import completions
from baton.engine.server.context import ServerContext
from baton.engine.server.intake import request_id_header
from baton.engine.server.native import generate
from baton.engine.server.respond import error_response
from baton.engine.server.vllm_routes import OPEN_PATHS, VLLM_ROUTES
from baton.protocol.errors import ErrorInfo, RequestError

logger = logging.getLogger(__name__)

Handler = Callable[[ServerContext, Request], Awaitable[Response]]
Routes = tuple[tuple[str, tuple[str, ...], Handler], ...]

COMMON_ROUTES: Routes = (
    ("/health", ("GET",), admin.health),
    ("/v1/chat/completions", ("POST",), chat_completions),
    ("/v1/completions", ("POST",), completions),
    ("/v1/embeddings", ("POST",), admin.not_served),
    ("/v1/score", ("POST",), admin.not_served),
    ("/v1/rerank", ("POST",), admin.not_served),
    ("/v1/responses", ("POST",), admin.not_served),
    ("/get_server_info", ("GET",), admin.server_info),
    ("/server_info", ("GET",), admin.server_info),
    ("/flush_cache", ("GET", "POST"), admin.flush_cache),
    ("/abort_request", ("POST",), admin.abort_request),
    ("/generate", ("POST", "PUT"), generate),
)
"""Of every worker: our router uses SGLang's."""
SGLANG_ROUTES: Routes = (
    ("/health_generate", ("GET",), admin.health_generate),
    ("/get_model_info", ("GET",), admin.model_info),
    ("/model_info", ("GET",), admin.model_info),
    ("/get_weight_version", ("GET",), admin.weight_version),
    ("/weight_version", ("GET",), admin.weight_version),
    ("/get_load", ("GET",), admin.load),
    ("/clear_hicache_storage_backend", ("GET", "POST"), admin.clear_store),
    ("/v1/models", ("GET",), admin.models),
    ("/v1/models/{model:path}", ("GET",), admin.model),
    ("/tokenize", ("POST",), admin.tokenize),
    ("/v1/tokenize", ("POST",), admin.tokenize),
    ("/detokenize", ("POST",), admin.detokenize),
    ("/v1/detokenize", ("POST",), admin.detokenize),
    ("/encode", ("POST", "PUT"), admin.not_served),
    ("/classify", ("POST", "PUT"), admin.not_served),
    ("/load_lora_adapter", ("POST",), admin.not_served),
    ("/update_weights_from_disk", ("POST",), admin.not_served),
)


def build_app(ctx: ServerContext) -> ASGIApp:
    """The application of one worker."""
    table = (*COMMON_ROUTES, *{"sglang": SGLANG_ROUTES, "vllm": VLLM_ROUTES}[ctx.dialect.name])
    routes = [Route(path, _endpoint(ctx, handler, path), methods=list(methods)) for path, methods, handler in table]
    if ctx.args.enable_metrics:
        routes.append(Route("/metrics", _endpoint(ctx, admin.metrics, "/metrics"), methods=["GET"]))
    app: ASGIApp = Starlette(routes=routes, exception_handlers={HTTPException: partial(_http_error, ctx)})
    return app if ctx.args.api_key is None else ApiKey(app, ctx.args.api_key, only_v1=ctx.dialect.name == "vllm")


def _endpoint(ctx: ServerContext, handler: Handler, path: str) -> Callable[[Request], Awaitable[Response]]:
    is_openai = path.startswith("/v1/")

    async def endpoint(request: Request) -> Response:
        try:
            return await handler(ctx, request)
        except RequestError as error:
            info = error.info
        except RankLostError as error:
            info = ErrorInfo("ServiceUnavailableError", 503, str(error), retryable=True)
        except Exception:
            # Our own bug: the traceback goes to the log, and the client still gets an answer of the usual shape.
            logger.exception("a request failed path=%s", path)
            info = ErrorInfo("InternalServerError", 500, "the server failed; its log says how.")
        if info.stage == "server":
            info = msgspec.structs.replace(info, stage=ctx.stage)
        if info.request_id is None:
            info = msgspec.structs.replace(info, request_id=request_id_header(request))
        return error_response(ctx.dialect, info, is_openai=is_openai)

    return endpoint


async def _http_error(ctx: ServerContext, request: Request, error: Exception) -> Response:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    kind = {404: "NotFoundError", 405: "MethodNotAllowedError"}.get(error.status_code, "BadRequestError")
    message = f"{request.method} {request.url.path}: {error.detail}"
    info = ErrorInfo(kind, error.status_code, message)
    response = error_response(ctx.dialect, info, is_openai=request.url.path.startswith("/v1/"))
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


class ApiKey:
    """Lets a request through that carries the key as a Bearer token; health and metrics are open, as in SGLang.

    `only_v1`: and everything else that is not below /v1, as in vLLM.
    """

    def __init__(self, app: ASGIApp, key: str, *, only_v1: bool) -> None:
        self._app = app
        self._only_v1 = only_v1
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = (
            scope["type"] != "http"
            or scope["method"] == "OPTIONS"
            or scope["path"].startswith("/health")
            or scope["path"].startswith("/metrics")
            or (self._only_v1 and scope["path"] in OPEN_PATHS)
        )
        if not is_open:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(given, self._expected):
                response = Response(b'{"error":"Unauthorized"}', 401, media_type="application/json")
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)
