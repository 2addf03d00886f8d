"""One asynchronous Kubernetes client: verbs over HTTP, nothing more.

Owns the connection pool and the translation of answers into objects or errors. It keeps no state about objects
(that is `cache`), retries nothing but "too many requests", and works against any API server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import aiohttp
import msgspec

from baton.cluster_client.config import ClusterConfig
from baton.cluster_client.errors import ApiError, Unreachable, from_status
from baton.cluster_client.resources import Object, Resource

PatchType = Literal["json", "merge", "strategic", "apply"]
Propagation = Literal["Background", "Foreground", "Orphan"]
Params = Mapping[str, str]

_PATCH_CONTENT_TYPE: dict[str, str] = {
    "json": "application/json-patch+json",
    "merge": "application/merge-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "apply": "application/apply-patch+yaml",
}
# A request that takes longer than this is not slow but lost.
_REQUEST_TIMEOUT_S = 60.0
_MAX_THROTTLE_RETRIES = 5
_LIST_PAGE = 500


@dataclass(frozen=True, slots=True)
class ObjectList:
    """A complete list (all pages) and the resourceVersion to watch from."""

    items: list[Object]
    resource_version: str


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """``type`` is ADDED, MODIFIED, DELETED or BOOKMARK; a bookmark's object carries only its resourceVersion."""

    type: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]
    object: Object


class Client:
    """Use as an async context manager. All methods raise :class:`ApiError` kinds or :class:`Unreachable`."""

    def __init__(self, config: ClusterConfig, *, user_agent: str = "baton", field_manager: str = "baton") -> None:
        self.config = config
        self.field_manager = field_manager
        self.user_agent = user_agent
        self.num_requests = 0
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self.config.ssl_context(), limit=0, keepalive_timeout=60),
            headers={"User-Agent": self.user_agent, "Accept": "application/json"},
            auto_decompress=True,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str | None = None,
        field_selector: str | None = None,
    ) -> ObjectList:
        """Every object, page by page. Items get apiVersion and kind, which a list leaves out."""
        params = _selectors(label_selector, field_selector) | {"limit": str(_LIST_PAGE)}
        items: list[Object] = []
        while True:
            page = await self.request("GET", resource.path(namespace), params=params)
            for item in page.get("items") or []:
                item.setdefault("apiVersion", resource.api_version)
                item.setdefault("kind", resource.kind)
                items.append(item)
            meta = page.get("metadata") or {}
            if not meta.get("continue"):
                return ObjectList(items, str(meta.get("resourceVersion") or ""))
            params = {**params, "continue": meta["continue"]}

    async def get(
        self, resource: Resource, name: str, namespace: str | None = None, *, subresource: str | None = None
    ) -> Object:
        return await self.request("GET", resource.path(namespace, name, subresource))

    async def create(
        self, resource: Resource, obj: Object, namespace: str | None = None, *, dry_run: bool = False
    ) -> Object:
        """Create ``obj``; its own metadata.namespace is used when ``namespace`` is not given."""
        namespace = namespace or obj.get("metadata", {}).get("namespace")
        if resource.namespaced and not namespace:
            raise ValueError(f"create {resource.kind}: a namespace is needed")
        return await self.request("POST", resource.path(namespace), body=obj, params=self._write_params(dry_run))

    async def update(
        self, resource: Resource, obj: Object, *, subresource: str | None = None, dry_run: bool = False
    ) -> Object:
        """Replace the object; with metadata.resourceVersion set the server refuses a lost race (`Conflict`)."""
        meta = obj["metadata"]
        path = resource.path(meta.get("namespace"), meta["name"], subresource)
        return await self.request("PUT", path, body=obj, params=self._write_params(dry_run))

    async def patch(
        self,
        resource: Resource,
        name: str,
        namespace: str | None,
        body: Object | Sequence[Object],
        *,
        kind: PatchType = "merge",
        subresource: str | None = None,
        force: bool = False,
        dry_run: bool = False,
    ) -> Object:
        """``kind`` "apply" is server-side apply under our field manager; ``force`` takes fields over from others."""
        params = self._write_params(dry_run)
        if kind == "apply" and force:
            params["force"] = "true"
        return await self.request(
            "PATCH",
            resource.path(namespace, name, subresource),
            body=body,
            params=params,
            content_type=_PATCH_CONTENT_TYPE[kind],
        )

    async def delete(
        self,
        resource: Resource,
        name: str,
        namespace: str | None = None,
        *,
        propagation: Propagation | None = None,
        grace_period_s: int | None = None,
        uid: str | None = None,
    ) -> Object:
        """Delete; ``uid`` makes it a precondition, so that a new object of the same name is never hit."""
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if propagation is not None:
            options["propagationPolicy"] = propagation
        if grace_period_s is not None:
            options["gracePeriodSeconds"] = grace_period_s
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        return await self.request("DELETE", resource.path(namespace, name), body=options)

    async def update_status(self, resource: Resource, obj: Object) -> Object:
        return await self.update(resource, obj, subresource="status")

    async def get_scale(self, resource: Resource, name: str, namespace: str) -> Object:
        return await self.get(resource, name, namespace, subresource="scale")

    async def set_scale(self, resource: Resource, name: str, namespace: str, replicas: int) -> Object:
        body = {"spec": {"replicas": replicas}}
        return await self.patch(resource, name, namespace, body, kind="merge", subresource="scale")

    async def watch(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        resource_version: str | None = None,
        label_selector: str | None = None,
        field_selector: str | None = None,
        timeout_s: int = 300,
    ) -> AsyncIterator[WatchEvent]:
        """One watch request, ending when the server ends it. Use `watch.follow` for one that goes on for ever.

        Raises :class:`errors.Gone` when ``resource_version`` is too old, whether as an answer or as an ERROR event.
        """
        params = _selectors(label_selector, field_selector)
        params |= {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(timeout_s)}
        if resource_version is not None:
            params["resourceVersion"] = resource_version
        timeout = aiohttp.ClientTimeout(total=timeout_s + 30, sock_connect=10)
        try:
            async with self._open("GET", resource.path(namespace), params=params, timeout=timeout) as response:
                await _raise_for_status(response)
                async for line in _lines(response):
                    yield _watch_event(msgspec.json.decode(line))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unreachable(f"watch {resource.full_name} at {self.config.server}: {_text(error)}") from error

    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Params | None = None,
        body: object = None,
        content_type: str = "application/json",
    ) -> Object:
        """One request and its decoded JSON answer (``{}`` when the body is empty). Waits out "too many requests"."""
        data = None if body is None else msgspec.json.encode(body)
        for attempt in range(_MAX_THROTTLE_RETRIES + 1):
            try:
                return await self._once(method, path, params or {}, data, content_type)
            except ApiError as error:
                if error.code != 429 or attempt == _MAX_THROTTLE_RETRIES:
                    raise
                await asyncio.sleep(1.0 if error.retry_after_s is None else error.retry_after_s)
        raise AssertionError("the loop above always returns or raises")

    async def text(self, path: str, *, params: Params | None = None) -> str:
        """A plain-text answer, such as a log or /healthz."""
        timeout = aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT_S)
        try:
            async with self._open("GET", path, params=dict(params or {}), timeout=timeout) as response:
                await _raise_for_status(response)
                return await response.text()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unreachable(f"GET {path} at {self.config.server}: {_text(error)}") from error

    async def _once(self, method: str, path: str, params: Params, data: bytes | None, content_type: str) -> Object:
        timeout = aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT_S, sock_connect=10)
        headers = {"Content-Type": content_type} if data is not None else {}
        try:
            async with self._open(
                method, path, params=dict(params), data=data, headers=headers, timeout=timeout
            ) as response:
                await _raise_for_status(response)
                raw = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unreachable(f"{method} {path} at {self.config.server}: {_text(error)}") from error
        try:
            decoded = msgspec.json.decode(raw) if raw else {}
        except msgspec.DecodeError as error:
            raise Unreachable(f"{method} {path}: the answer is not JSON: {error}") from error
        if not isinstance(decoded, dict):
            raise Unreachable(f"{method} {path}: the answer is not a JSON object")
        return decoded

    def _open(self, method: str, path: str, **options: Any) -> _Request:
        if self._session is None:
            raise RuntimeError("Client is used outside its `async with` block")
        self.num_requests += 1
        return _Request(self._session, self.config, method, path, options)

    def _write_params(self, dry_run: bool) -> dict[str, str]:
        params = {"fieldManager": self.field_manager}
        if dry_run:
            params["dryRun"] = "All"
        return params


class _Request:
    """An aiohttp request whose credentials are fetched on entry (a plug-in may have to run first)."""

    def __init__(
        self, session: aiohttp.ClientSession, config: ClusterConfig, method: str, path: str, options: dict[str, Any]
    ) -> None:
        self._session, self._config, self._method, self._path = session, config, method, path
        self._options = options
        self._response: aiohttp.ClientResponse | None = None

    async def __aenter__(self) -> aiohttp.ClientResponse:
        headers = dict(self._options.pop("headers", {}))
        headers.update(await self._config.auth_headers())
        hostname = self._config.tls_server_name
        self._response = await self._session.request(
            self._method, self._config.server + self._path, headers=headers, server_hostname=hostname, **self._options
        )
        return self._response

    async def __aexit__(self, *_: object) -> None:
        if self._response is not None:
            self._response.release()


async def _raise_for_status(response: aiohttp.ClientResponse) -> None:
    if response.status < 400:
        return
    raw = await response.read()
    try:
        body: object = msgspec.json.decode(raw)
    except msgspec.DecodeError:
        body = raw.decode(errors="replace")
    retry_after = response.headers.get("Retry-After", "")
    raise from_status(response.status, body, retry_after_s=float(retry_after) if retry_after.isdigit() else None)


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    # Not StreamReader.readline: it refuses lines longer than its buffer, and one object may be a mebibyte.
    pending = b""
    async for chunk in response.content.iter_any():
        *complete, pending = (pending + chunk).split(b"\n")
        for line in complete:
            if line.strip():
                yield line


def _watch_event(raw: Any) -> WatchEvent:
    kind, obj = raw.get("type"), raw.get("object") or {}
    if kind == "ERROR":
        raise from_status(int(obj.get("code") or 500), obj)
    return WatchEvent(kind, obj)


def _selectors(label_selector: str | None, field_selector: str | None) -> dict[str, str]:
    params = {}
    if label_selector:
        params["labelSelector"] = label_selector
    if field_selector:
        params["fieldSelector"] = field_selector
    return params


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
