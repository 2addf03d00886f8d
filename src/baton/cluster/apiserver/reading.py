"""GET of one object and of lists: selectors, pages, resourceVersion semantics.

Owns `Selection` (what a list or watch is about) and `list_objects`. Not here: watches (`watching`), tables (`tables`).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from baton.cluster.apiserver.errors import Cause, bad_request, expired, future_revision, invalid
from baton.cluster.apiserver.http import Request, query_error
from baton.cluster.apiserver.resources import Resource, Version
from baton.cluster.apiserver.selectors import FieldSelector, LabelSelector, SelectorError
from baton.cluster.apiserver.store import Store
from baton.cluster.apiserver.target import Target

JSON = dict[str, Any]
_MATCHES = ("", "Exact", "NotOlderThan")


@dataclass(frozen=True, slots=True)
class Selection:
    """Objects of one resource, seen in one version. `namespace` None: all of them."""

    resource: Resource
    version: Version
    namespace: str | None
    labels: LabelSelector
    fields: FieldSelector

    @classmethod
    def parse(cls, request: Request, target: Target) -> Selection:
        """Raises 400 for selectors that cannot be read."""
        known = ("metadata.name", "metadata.namespace", *target.version.selectable_fields)
        try:
            labels = LabelSelector.parse(request.query.get("labelSelector", ""))
            fields = FieldSelector.parse(request.query.get("fieldSelector", ""), known.__contains__)
        except SelectorError as error:
            raise bad_request(str(error)) from None
        namespace = target.namespace if target.resource.namespaced and target.namespace else None
        return cls(target.resource, target.version, namespace, labels, fields)

    def matches(self, obj: JSON) -> bool:
        """`obj` in stored form or any version: selectable fields of built-in kinds do not differ between them."""
        meta = obj["metadata"]
        if self.namespace is not None and meta.get("namespace") != self.namespace:
            return False
        if self.labels.requirements and not self.labels.matches(meta.get("labels") or {}):
            return False
        if not self.fields.terms:
            return True
        return self.fields.matches(self.resource.convert(obj, self.version))


def parse_revision(request: Request) -> int | None:
    """resourceVersion of the query; None when absent."""
    text = request.query.get("resourceVersion", "")
    if not text:
        return None
    if not text.isdigit():
        raise query_error("invalid resource version", text)
    return int(text)


def list_objects(request: Request, selection: Selection, store: Store) -> tuple[list[JSON], JSON]:
    """The page asked for, in the selection's version, and the list's metadata."""
    revision, match = parse_revision(request), request.query.get("resourceVersionMatch", "")
    _check_list_options(request, revision, match)
    limit = request.number("limit") or 0
    token = request.query.get("continue", "")
    current = store.committed_revision
    if token:
        at, after = _read_token(token)
    elif match == "Exact" and revision is not None:
        at, after = revision, None
    else:
        at, after = current, None
    if max(at, revision or 0) > current:
        raise future_revision(max(at, revision or 0), current)
    if at < store.floor:
        raise expired(
            "The provided continue parameter is too old to display a consistent list result."
            if token
            else f"The resourceVersion for the provided list is too old: {at}"
        )
    found = [o for o in _objects(store, selection, at, after) if selection.matches(o)]
    meta: JSON = {"resourceVersion": str(at)}
    if limit and len(found) > limit and not (revision == 0 and not token):
        meta["remainingItemCount"] = len(found) - limit
        if selection.labels.requirements or selection.fields.terms:
            del meta["remainingItemCount"]
        found = found[:limit]
        last = found[-1]["metadata"]
        meta["continue"] = _make_token(at, last.get("namespace", ""), last["name"])
    return [selection.resource.convert(o, selection.version) for o in found], meta


def _check_list_options(request: Request, revision: int | None, match: str) -> None:
    causes = []
    if request.flag("sendInitialEvents"):
        causes.append(Cause.forbidden("sendInitialEvents", "sendInitialEvents is forbidden for list"))
    if match not in _MATCHES:
        causes.append(Cause.not_supported("resourceVersionMatch", match, _MATCHES[1:]))
    elif match and revision is None:
        text = "resourceVersionMatch is forbidden unless resourceVersion is provided"
        causes.append(Cause.forbidden("resourceVersionMatch", text))
    elif match == "Exact" and revision == 0:
        causes.append(
            Cause.forbidden("resourceVersionMatch", 'resourceVersionMatch "exact" is forbidden for resourceVersion "0"')
        )
    if causes:
        raise invalid("ListOptions", "meta.k8s.io", "", causes)


def _objects(store: Store, selection: Selection, at: int, after: tuple[str, str] | None) -> Iterator[JSON]:
    log = store.resource(selection.resource.store_name)
    if at == store.committed_revision and after is None:
        return log.select(selection.namespace)
    state = log.at(at)
    places = sorted(p for p in state if after is None or p > after)
    return (state[p] for p in places if selection.namespace in (None, p[0]))


def _make_token(revision: int, namespace: str, name: str) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode([revision, namespace, name])).decode()


def _read_token(token: str) -> tuple[int, tuple[str, str]]:
    try:
        revision, namespace, name = msgspec.json.decode(base64.urlsafe_b64decode(token), type=tuple[int, str, str])
    except (binascii.Error, ValueError, msgspec.MsgspecError) as error:
        raise bad_request(f"invalid continue token: {error}") from None
    return revision, (namespace, name)


def list_body(selection: Selection, items: list[JSON], meta: JSON) -> JSON:
    """A `XList`. Items of built-in lists carry no kind and apiVersion."""
    resource = selection.resource
    if resource.builtin:
        items = [{k: v for k, v in o.items() if k not in ("kind", "apiVersion")} for o in items]
    return {"kind": resource.list_kind, "apiVersion": selection.version.api_version, "metadata": meta, "items": items}
