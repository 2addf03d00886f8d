"""Manifests to the API server, one object at a time: what was created, changed, left alone or refused.

Owns the order (as written), server-side apply under one field manager, and turning a server's refusal into lines that
point into the file. A refused object does not stop the ones after it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from baton.api import validate
from baton.api.resources import Object, Resource, resource_of
from baton.cluster.manifests import Manifest, Problem
from baton.cluster_client import ApiError, Client, ClientError, NotFound

FIELD_MANAGER = "baton-up"
_PATH_IN_TEXT = re.compile(r'field "?(?:[A-Z]\w*\.)?([a-z][\w.\[\]/-]*[\w\]])')
"""Where a decoding error names the field, since it has no causes."""
Outcome = Literal["created", "configured", "unchanged"]


@dataclass(frozen=True, slots=True)
class Applied:
    """One object that is in the cluster now."""

    manifest: Manifest
    resource: Resource
    object: Object
    outcome: Outcome

    @property
    def title(self) -> str:
        return f"{self.manifest.kind.lower()}/{self.object['metadata']['name']}"

    @property
    def namespace(self) -> str | None:
        namespace = self.object["metadata"].get("namespace")
        return str(namespace) if namespace else None


class Applier:
    """Applies manifests with one client, asking the server once for each group it has not seen."""

    def __init__(self, client: Client, namespace: str = "default") -> None:
        self._client = client
        self._namespace = namespace
        self._served: dict[str, dict[str, Resource]] = {}

    async def apply(self, manifest: Manifest) -> Applied | list[Problem]:
        """Server-side apply (create for `generateName`). Raises `Unreachable` when there is no server to ask."""
        try:
            resource = await self._resource(manifest)
            if resource is None:
                return [manifest.problem(await self._unknown_kind(manifest), "kind")]
            content = self._placed(manifest, resource)
            # A server of another make takes a group that its controller refuses later; here the file's line is known.
            wrong = validate(content) if resource.kind == "RoleBasedGroup" else []
            if wrong:
                return [manifest.problem(str(error), error.field) for error in wrong]
            metadata = content["metadata"]
            namespace = metadata.get("namespace")
            if not metadata.get("name"):
                if not metadata.get("generateName"):
                    return [manifest.problem("metadata.name: is missing; give the object a name", "metadata")]
                return Applied(manifest, resource, await self._client.create(resource, content, namespace), "created")
            before = await self._existing(resource, metadata["name"], namespace)
            after = await self._client.request(
                "PATCH",
                resource.path(namespace, metadata["name"]),
                params={"fieldManager": FIELD_MANAGER, "force": "true", "fieldValidation": "Strict"},
                body=content,
                content_type="application/apply-patch+yaml",
            )
        except ApiError as error:
            return refusals(manifest, error)
        return Applied(manifest, resource, after, _outcome(before, after))

    async def _resource(self, manifest: Manifest) -> Resource | None:
        try:
            return resource_of(manifest.content)
        except LookupError:
            served = await self._discover(str(manifest.content["apiVersion"]))
            return served.get(manifest.kind)

    async def _discover(self, api_version: str) -> dict[str, Resource]:
        """Kinds that the server knows in a group and version, by name; none when it does not know the group."""
        if api_version not in self._served:
            group, _, version = api_version.rpartition("/")
            try:
                found = await self._client.request("GET", f"/apis/{group}/{version}" if group else f"/api/{version}")
            except NotFound:
                found = {}
            self._served[api_version] = {
                one["kind"]: Resource(group, version, one["name"], one["kind"], namespaced=bool(one["namespaced"]))
                for one in found.get("resources") or []
                if "/" not in one["name"]
            }
        return self._served[api_version]

    async def _unknown_kind(self, manifest: Manifest) -> str:
        """What to do about a kind that is not served: another version of it, or the list of what there is."""
        version = str(manifest.content["apiVersion"])
        try:
            groups = await self._client.request("GET", "/apis")
        except ClientError:
            groups = {}
        versions = ["v1", *(v["groupVersion"] for g in groups.get("groups") or [] for v in g.get("versions") or [])]
        elsewhere = [one for one in versions if one != version and manifest.kind in await self._discover(one)]
        hint = f"write apiVersion: {' or '.join(elsewhere)}" if elsewhere else "this cluster does not know that kind"
        return f"no kind {manifest.kind} in apiVersion {version}; {hint}"

    def _placed(self, manifest: Manifest, resource: Resource) -> Object:
        metadata = manifest.content.get("metadata")
        metadata = dict(metadata) if isinstance(metadata, dict) else {}
        if resource.namespaced:
            metadata.setdefault("namespace", self._namespace)
        return {**manifest.content, "metadata": metadata}

    async def _existing(self, resource: Resource, name: str, namespace: str | None) -> Object | None:
        try:
            return await self._client.get(resource, name, namespace)
        except NotFound:
            return None


def refusals(manifest: Manifest, error: ApiError) -> list[Problem]:
    """One line for each field that the server complains about, at that field's line."""
    named = [cause for cause in error.causes if cause.get("field")]
    if not named:
        text = " ".join(error.message.split())
        path = _PATH_IN_TEXT.search(text)
        return [manifest.problem(text, path[1] if path else "")]
    return [manifest.problem(f"{cause['field']}: {cause.get('message')}", str(cause["field"])) for cause in named]


def _outcome(before: Object | None, after: Object) -> Outcome:
    if before is None:
        return "created"
    # Field ownership may move (apply after create) without a change of the object itself.
    return "unchanged" if _content(before) == _content(after) else "configured"


def _content(obj: Object) -> Object:
    metadata = {k: v for k, v in obj["metadata"].items() if k not in ("managedFields", "resourceVersion", "generation")}
    return {k: v for k, v in obj.items() if k != "status"} | {"metadata": metadata}
