"""Questions that every write asks: does the body fit the URL, is the namespace there, did anything change.

Owns plain functions for `Operations`. Not here: rules of a kind (see `rules`), the schema walk (see `conform`).
"""

from __future__ import annotations

from typing import Any

from baton.cluster.apiserver.errors import Cause, bad_request, forbidden, not_found
from baton.cluster.apiserver.resources import Resource, Version
from baton.cluster.apiserver.store import Key, Store
from baton.cluster.apiserver.target import Target, WriteOptions

JSON = dict[str, Any]


def check_place(target: Target, obj: JSON) -> None:
    """apiVersion, kind, name and namespace of the body must be those of the URL."""
    version, kind = target.version, target.resource.kind
    given, given_kind = obj.get("apiVersion"), obj.get("kind")
    if given is not None and given_kind is not None and (given, given_kind) != (version.api_version, kind):
        raise bad_request(
            f'{given_kind} in version "{given}" cannot be handled as a {kind}: no kind "{given_kind}" is registered for version "{version.api_version}"'
        )
    meta = obj.get("metadata")
    if meta is not None and not isinstance(meta, dict):
        raise bad_request(
            f'{kind} in version "{version.api_version}" cannot be handled as a {kind}: metadata must be an object'
        )
    name = (meta or {}).get("name")
    if target.name and name and name != target.name:
        raise bad_request(f"the name of the object ({name}) does not match the name on the URL ({target.name})")
    namespace = (meta or {}).get("namespace")
    if target.resource.namespaced and namespace and namespace != target.namespace:
        raise bad_request("the namespace of the provided object does not match the namespace sent on the request")


def check_namespace(store: Store, target: Target) -> None:
    """The namespace must exist and stay."""
    if not target.resource.namespaced:
        return
    namespace = store.latest(Key("namespaces", "", target.namespace))
    if namespace is None:
        raise not_found("namespaces", "", target.namespace)
    if namespace["metadata"].get("deletionTimestamp"):
        plural = target.resource.store_name
        text = f"unable to create new content in namespace {target.namespace} because it is being terminated"
        name = target.name or ""
        cause = {
            "reason": "NamespaceTerminating",
            "message": f"namespace {target.namespace} is being terminated",
            "field": "metadata.namespace",
        }
        raise forbidden(
            f'{plural} "{name}" is forbidden: {text}',
            {"name": name, "kind": target.resource.plural, "causes": [cause]},
        )


def report_unknown(resource: Resource, version: Version, unknown: list[str], options: WriteOptions) -> None:
    """Refuses, warns of or ignores fields that the schema does not know."""
    texts = [f'unknown field "{path}"' for path in unknown]
    if not texts or options.validation == "Ignore":
        return
    if options.validation == "Strict":
        what = f'{resource.kind} in version "{version.version}" cannot be handled as a {resource.kind}: '
        raise bad_request(f"{what if resource.builtin else ''}strict decoding error: {', '.join(texts)}")
    options.warnings += texts


def decode_error(resource: Resource, version: Version, cause: Cause) -> str:
    """A wrong type in a built-in kind, as Go's decoder says it."""
    got = cause.message.split('"')[1]
    wanted = cause.message.split("must be of type ")[1].split(":")[0]
    what = f'{resource.kind} in version "{version.version}" cannot be handled as a {resource.kind}'
    return f"{what}: json: cannot unmarshal {got} into field {resource.kind}.{cause.field} of type {wanted}"


def finished(obj: JSON) -> bool:
    """Marked for deletion and nothing holds it any more."""
    meta = obj["metadata"]
    if not meta.get("deletionTimestamp") or meta.get("finalizers"):
        return False
    if obj.get("kind") == "Namespace":
        return not (obj.get("spec") or {}).get("finalizers")
    return not meta.get("deletionGracePeriodSeconds")


def content(obj: JSON) -> JSON:
    """What generation counts: everything but metadata and status."""
    return {k: v for k, v in obj.items() if k not in ("metadata", "status", "apiVersion", "kind")}


def same(new: JSON, old: JSON) -> bool:
    """Equal but for the resourceVersion: writing it would change nothing."""

    def plain(obj: JSON) -> JSON:
        return {k: v for k, v in obj.items() if k != "metadata"}

    def meta(obj: JSON) -> JSON:
        return {k: v for k, v in obj["metadata"].items() if k != "resourceVersion" and v not in (None, [], {})}

    return plain(new) == plain(old) and meta(new) == meta(old)
