"""Watches: turning committed changes into a stream of events.

Owns `watch`. A watch has a position (a revision) in the resource's change log and no queue of its own, so a slow
client costs no memory; when compaction passes its position it gets 410 and lists again. The wire form of a change is
made once and shared by all watchers who see it the same way. Not here: the log (see `store`).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass
from typing import Any

from baton.cluster.apiserver import tables
from baton.cluster.apiserver.errors import Cause, StatusError, expired, invalid
from baton.cluster.apiserver.http import Request, dump, send_chunk, start_stream
from baton.cluster.apiserver.reading import Selection, parse_revision
from baton.cluster.apiserver.store import ADDED, DELETED, MODIFIED, Change, Store

JSON = dict[str, Any]
BOOKMARK_S = 60.0


@dataclass(slots=True)
class WatchOptions:
    """Query of a watch. `start` None: begin with what exists."""

    start: int | None
    bookmarks: bool
    initial_events: bool
    timeout_s: float

    @classmethod
    def parse(cls, request: Request) -> WatchOptions:
        revision = parse_revision(request)
        match = request.query.get("resourceVersionMatch", "")
        initial = request.flag("sendInitialEvents")
        if "sendInitialEvents" in request.query and match != "NotOlderThan":
            text = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"
            raise invalid("ListOptions", "meta.k8s.io", "", [Cause.forbidden("resourceVersionMatch", text)])
        if match and "sendInitialEvents" not in request.query:
            text = "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided"
            raise invalid("ListOptions", "meta.k8s.io", "", [Cause.forbidden("resourceVersionMatch", text)])
        timeout = request.number("timeoutSeconds") or 0
        synthetic = initial or (not revision and "sendInitialEvents" not in request.query)
        return cls(
            None if synthetic else (revision or 0),
            request.flag("allowWatchBookmarks"),
            initial,
            float(timeout) if timeout > 0 else 1800 + 1800 * random.random(),
        )


class _Encoder:
    """Events of one watch as bytes."""

    def __init__(self, request: Request, selection: Selection) -> None:
        self._form, self._selection = request.form, selection
        self._columns_sent = False

    def event(self, kind: str, obj: JSON) -> bytes:
        selection = self._selection
        shown = selection.resource.convert(obj, selection.version)
        if self._form.table:
            meta = {"resourceVersion": shown["metadata"]["resourceVersion"]}
            table = tables.table(selection.resource, selection.version, [shown], meta, self._form.include_object)
            if self._columns_sent:
                table["columnDefinitions"] = None
            self._columns_sent = True
            shown = table
        elif self._form.metadata_only:
            shown = tables.partial(shown)
        return dump({"type": kind, "object": shown}) + b"\n"

    def change(self, kind: str, change: Change) -> bytes:
        """As `event`, kept with the change unless it is a Table (whose first event differs)."""
        if self._form.table:
            return self.event(kind, change.object)
        key = (kind, self._selection.version.api_version, self._form.metadata_only)
        if key not in change.encoded:
            change.encoded[key] = self.event(kind, change.object)
        return change.encoded[key]

    def bookmark(self, revision: int, *, initial_end: bool = False) -> bytes:
        selection = self._selection
        meta: JSON = {"resourceVersion": str(revision)}
        if initial_end:
            meta["annotations"] = {"k8s.io/initial-events-end": "true"}
        obj: JSON = {"kind": selection.resource.kind, "apiVersion": selection.version.api_version, "metadata": meta}
        if self._form.table:
            obj = tables.table(selection.resource, selection.version, [], meta, "None")
            if initial_end:
                # A Table list carries no annotations; the row's object is where clients look for the mark.
                partial = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": meta}
                obj["rows"] = [{"cells": [], "object": partial}]
        elif self._form.metadata_only:
            obj = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": meta}
        return dump({"type": "BOOKMARK", "object": obj}) + b"\n"


def _error_event(error: StatusError) -> bytes:
    return dump({"type": "ERROR", "object": error.status()}) + b"\n"


async def watch(request: Request, selection: Selection, store: Store) -> None:
    """Streams until the client leaves, the time is over, the history is lost or the store closes."""
    options = WatchOptions.parse(request)
    await start_stream(request, "application/json")
    streaming = asyncio.create_task(_stream(request, selection, store, options), name="watch")
    leaving = asyncio.create_task(request.gone(), name="watch-disconnect")
    try:
        await asyncio.wait({streaming, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (streaming, leaving):
            task.cancel()
        results = await asyncio.gather(streaming, leaving, return_exceptions=True)
    if isinstance(results[0], Exception):
        raise results[0]
    if not isinstance(results[0], asyncio.CancelledError):
        await send_chunk(request, b"", more=False)


async def _stream(request: Request, selection: Selection, store: Store, options: WatchOptions) -> None:
    encoder = _Encoder(request, selection)
    log = store.resource(selection.resource.store_name)
    position = options.start
    if position is None:
        position = store.committed_revision
        present = [encoder.event(ADDED, o) for o in log.select(selection.namespace) if selection.matches(o)]
        if options.initial_events and options.bookmarks:
            present.append(encoder.bookmark(position, initial_end=True))
        await send_chunk(request, b"".join(present))
    elif position < log.floor:
        await send_chunk(request, _error_event(expired(f"too old resource version: {position} ({log.floor})")))
        return
    else:
        await send_chunk(request, b"")  # the headers leave now: a client waits for them
    loop = asyncio.get_running_loop()
    end = loop.time() + options.timeout_s
    bookmark_at = loop.time() + BOOKMARK_S
    while not store.closed and loop.time() < end:
        if position < log.floor:
            await send_chunk(request, _error_event(expired(f"too old resource version: {position} ({log.floor})")))
            return
        changes = log.since(position)
        out = [e for c in changes if (e := _event_for(c, selection, encoder)) is not None]
        position = max(position, store.committed_revision)
        if options.bookmarks and loop.time() >= bookmark_at:
            out.append(encoder.bookmark(position))
            bookmark_at = loop.time() + BOOKMARK_S
        if out:
            await send_chunk(request, b"".join(out))
        if log.changes and log.changes[-1].revision > position:
            continue
        # Not `wait_for`: before Python 3.12 it starts its coroutine a loop turn later, and a commit in between is missed.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(end, bookmark_at) - loop.time()):
                await log.wait()


def _event_for(change: Change, selection: Selection, encoder: _Encoder) -> bytes | None:
    """What this watch sees of a change: objects that enter or leave the selection come and go."""
    had = change.previous is not None and selection.matches(change.previous)
    has = change.type != DELETED and selection.matches(change.object)
    if had and has:
        return encoder.change(MODIFIED, change)
    if has:
        return encoder.change(ADDED, change)
    if had:
        if change.type == DELETED:
            return encoder.change(DELETED, change)
        # The object as it was when it matched, at the revision at which it left.
        assert change.previous is not None
        meta = {**change.previous["metadata"], "resourceVersion": str(change.revision)}
        return encoder.event(DELETED, {**change.previous, "metadata": meta})
    return None
