"""The ASGI application: authentication, routing by path, errors as Status.

Owns `ApiServer`, the front door of this room, which builds everything else. Routing is by hand because Kubernetes'
paths are regular: `/api/v1` or `/apis/GROUP/VERSION`, then `[/namespaces/NS]/PLURAL[/NAME[/SUBRESOURCE]]`. Not here:
listening (see `server`).
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from baton.cluster.apiserver import discovery, reading, subresources, tables, writing
from baton.cluster.apiserver.bootstrap import create_first_objects
from baton.cluster.apiserver.builtins import builtin_resources
from baton.cluster.apiserver.crd import CrdManager
from baton.cluster.apiserver.errors import StatusError, internal, method_not_allowed, no_such_resource, unauthorized
from baton.cluster.apiserver.gc import GarbageCollector
from baton.cluster.apiserver.http import (
    ClientGoneError,
    Receive,
    Request,
    Scope,
    Send,
    send_bytes,
    send_json,
    send_status,
)
from baton.cluster.apiserver.openapi import OpenApi, send_openapi_v2
from baton.cluster.apiserver.operations import Mutator, Operations, Validator
from baton.cluster.apiserver.reading import Selection
from baton.cluster.apiserver.resources import Conversion, Registry
from baton.cluster.apiserver.store import Store, StoreClosedError
from baton.cluster.apiserver.strategy import ServiceAddresses
from baton.cluster.apiserver.streams import Streams
from baton.cluster.apiserver.target import Target
from baton.cluster.apiserver.watching import watch
from baton.cluster.node_connector import NodeConnector

log = logging.getLogger(__name__)
JSON = dict[str, Any]
_HEALTH = ("/healthz", "/readyz", "/livez")
_STREAMS = ("log", "exec", "attach", "portforward")


class ApiServer:
    """A Kubernetes API server over `store`, as an ASGI application.

    `token` guards every path: as `Authorization: Bearer TOKEN`, or as the path prefix `/token/TOKEN`, which is how
    kubectl can carry it over plain http (it sends no Authorization header there). None: no authentication.
    `conversions` are the in-process conversion hooks of CRDs by `plural.group`, `validators` their rules beyond the
    schema (asked on create and when something but metadata and status changed), `mutators` what completes an object
    before that. `service_network` is where cluster addresses of Services come from. Call `start` once in the event loop before the first request, `stop` at the end.
    """

    def __init__(
        self,
        store: Store,
        nodes: NodeConnector,
        *,
        token: str | None,
        conversions: Mapping[str, Conversion] | None = None,
        validators: Mapping[str, Validator] | None = None,
        mutators: Mapping[str, Mutator] | None = None,
        service_network: str = "127.96.0.0/16",
    ) -> None:
        self.store, self._token = store, token
        self.registry = Registry()
        for resource in builtin_resources():
            self.registry.add(resource)
        self._crds = CrdManager(store, self.registry, conversions or {})
        addresses = ServiceAddresses(service_network)
        for service in store.resource("services").select(None):
            addresses.take((service.get("spec") or {}).get("clusterIP") or "")
        self.operations = Operations(store, self.registry, self._crds, addresses, validators or {}, mutators or {})
        self._openapi = OpenApi(self.registry)
        self._streams = Streams(store, nodes)
        self._collector = GarbageCollector(store, self.registry, self.operations)
        self._started = False

    async def start(self) -> None:
        """Creates the first namespaces and starts the garbage collector."""
        if not self._started:
            self._started = True
            await create_first_objects(self.operations, self.registry)
            self._collector.start()

    async def stop(self) -> None:
        await self._collector.stop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        request = Request(scope, receive, send, scope["path"])
        if scope["type"] == "websocket":
            await self._websocket(request)
            return
        try:
            await self._handle(request)
        except ClientGoneError:
            return
        except StatusError as error:
            await send_status(request, error)
        except StoreClosedError:
            await send_status(request, StatusError(503, "ServiceUnavailable", "the API server is shutting down"))
        except Exception as error:  # every request gets an answer; the cause goes to the log
            log.exception("request failed", extra={"path": request.path, "method": request.method})
            await send_status(request, internal(f"{type(error).__name__}: {error}"))

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.start()
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return

    # Authentication

    def _authenticate(self, request: Request) -> None:
        """Cuts the capability prefix from the path; raises 401 without a valid token (health needs none)."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if request.path.startswith("/token/"):
            given, slash, rest = request.path.removeprefix("/token/").partition("/")
            request.prefix = "/token/" + given
            request.path = slash + rest or "/"
        if self._token is None or request.path in _HEALTH:
            return
        if not hmac.compare_digest(given.encode(), self._token.encode()):
            raise unauthorized()

    # Routing

    async def _handle(self, request: Request) -> None:
        self._authenticate(request)
        parts = [p for p in request.path.split("/") if p]
        if parts and parts[0] in ("api", "apis"):
            await self._handle_api(request, parts)
        elif request.path in _HEALTH:
            await send_bytes(request, 200, b"ok", content_type="text/plain; charset=utf-8")
        elif parts == ["version"]:
            await send_json(request, 200, discovery.VERSION)
        elif parts[:2] == ["openapi", "v3"]:
            if len(parts) == 2:
                await self._openapi.send_index(request)
            else:
                await self._openapi.send_document(request, "/".join(parts[2:]))
        elif parts == ["openapi", "v2"]:
            await send_openapi_v2(request)
        elif not parts:
            await send_json(
                request, 200, {"paths": ["/api", "/apis", "/healthz", "/livez", "/openapi/v3", "/readyz", "/version"]}
            )
        else:
            await _page_not_found(request)

    async def _handle_api(self, request: Request, parts: list[str]) -> None:
        core = parts[0] == "api"
        size = 2 if core else 3
        if len(parts) < size:
            await self._handle_group(request, parts, core)
            return
        group, version, rest = "" if core else parts[1], parts[size - 1], parts[size:]
        if not rest:
            listed = discovery.resource_list(self.registry, group, version)
            if listed is None:
                await _page_not_found(request)
            else:
                await send_json(request, 200, listed)
            return
        if version not in self.registry.groups().get(group, {}):
            await _page_not_found(request)
            return
        watching = rest[0] == "watch" and len(rest) > 1
        target = self._target(group, version, rest[1:] if watching else rest)
        if target.version.warning:
            request.warnings.append(target.version.warning)
        await self._dispatch(request, target, watching=watching)

    async def _handle_group(self, request: Request, parts: list[str], core: bool) -> None:
        if len(parts) == 1:
            await discovery.send_groups(request, self.registry, core=core)
            return
        found = discovery.group(self.registry, parts[1])
        if found is None:
            await _page_not_found(request)
        else:
            await send_json(request, 200, found)

    def _target(self, group: str, version: str, parts: list[str]) -> Target:
        """The object or collection of a path; raises 404 for resources that do not exist."""
        namespace = ""
        if parts[0] == "namespaces" and len(parts) > 2 and parts[2] not in ("status", "finalize"):
            namespace, parts = parts[1], parts[2:]
        found = self.registry.lookup(group, version, parts[0])
        if found is None or len(parts) > 3 or (namespace and not found[0].namespaced):
            raise no_such_resource()
        name = parts[1] if len(parts) > 1 else ""
        sub = parts[2] if len(parts) > 2 else ""
        return Target(*found, namespace, name, sub)

    async def _dispatch(self, request: Request, target: Target, *, watching: bool) -> None:
        if target.subresource:
            await self._subresource(request, target)
        elif target.name and not watching:
            await self._object(request, target)
        else:
            await self._collection(request, target, watching=watching)

    async def _collection(self, request: Request, target: Target, *, watching: bool) -> None:
        if request.method in ("GET", "HEAD"):
            selection = Selection.parse(request, replace(target, name=""))
            if watching or request.flag("watch"):
                await watch(request, selection, self.store)
                return
            items, meta = reading.list_objects(request, selection, self.store)
            await self._send_list(request, selection, items, meta)
        elif request.method == "POST":
            if target.resource.namespaced and not target.namespace:
                raise method_not_allowed()
            await writing.create(request, target, self.operations)
        elif request.method == "DELETE":
            await writing.delete_collection(request, target, self.operations)
        else:
            raise method_not_allowed()

    async def _send_list(self, request: Request, selection: Selection, items: list[JSON], meta: JSON) -> None:
        form = request.form
        if form.table:
            body = tables.table(selection.resource, selection.version, items, meta, form.include_object)
        elif form.metadata_only:
            rows = [tables.partial(o) for o in items]
            body = {
                "kind": "PartialObjectMetadataList",
                "apiVersion": "meta.k8s.io/v1",
                "metadata": meta,
                "items": rows,
            }
        else:
            body = reading.list_body(selection, items, meta)
        await send_json(request, 200, body)

    async def _object(self, request: Request, target: Target) -> None:
        if target.resource.namespaced and not target.namespace:
            raise no_such_resource()
        if request.method in ("GET", "HEAD"):
            stored = self.store.get(target.key)
            if stored is None:
                raise target.missing()
            await writing.answer(request, target, 200, target.resource.convert(stored, target.version))
        elif request.method == "PUT":
            await writing.replace_object(request, target, self.operations)
        elif request.method == "PATCH":
            await writing.patch(request, target, self.operations)
        elif request.method == "DELETE":
            await writing.delete(request, target, self.operations)
        else:
            raise method_not_allowed()

    async def _subresource(self, request: Request, target: Target) -> None:
        sub = target.subresource
        if sub == "scale" and target.version.scale:
            await subresources.scale(request, target, self.operations)
        elif sub == "status" and target.version.has_status:
            if request.method in ("POST", "DELETE"):
                raise method_not_allowed()
            await self._object(request, target)
        elif sub not in target.resource.subresources:
            if sub in ("scale", "status"):
                raise target.missing()
            raise no_such_resource()
        elif sub in _STREAMS:
            await self._streams.http(request, target)
        elif sub == "finalize":
            await subresources.finalize(request, target, self.operations)
        elif sub in ("ephemeralcontainers", "resize"):
            await self._object(request, replace(target, subresource=sub))
        elif request.method != "POST":
            raise method_not_allowed()
        elif sub == "binding":
            await subresources.bind(request, target, self.operations)
        else:
            await subresources.evict(request, target, self.operations)

    async def _websocket(self, request: Request) -> None:
        """exec, attach and port-forward. A refusal before the handshake is an HTTP answer with a Status."""
        try:
            self._authenticate(request)
            parts = [p for p in request.path.split("/") if p]
            if parts[:2] != ["api", "v1"]:
                raise no_such_resource()
            target = self._target("", "v1", parts[2:])
            await self._streams.websocket(request, target)
        except StatusError as error:
            await self._streams.refuse(request, error)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # reported to the client and the log; the server lives on
            log.exception("stream failed", extra={"path": request.path})
            await self._streams.refuse(request, internal(f"{type(error).__name__}: {error}"))


async def _page_not_found(request: Request) -> None:
    await send_bytes(request, 404, b"404 page not found\n", content_type="text/plain; charset=utf-8")
