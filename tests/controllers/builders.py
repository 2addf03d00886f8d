"""Groups, StatefulSets, Deployments and LeaderWorkerSets for tests, by what matters in them."""

from __future__ import annotations

from typing import Any

Object = dict[str, Any]


def pod_template(image: str = "img:1", **spec: Any) -> Object:
    env = [{"name": "X", "value": spec.pop("env")}] if "env" in spec else []
    container = {"name": "main", "image": image, **({"env": env} if env else {})}
    return {"metadata": {"labels": {"app": "x"}}, "spec": {"containers": [container], **spec}}


def role(name: str, replicas: int = 1, image: str = "img:1", *, env: str | None = None, **more: Any) -> Object:
    """``more``: wire fields of the role; ``rolling`` is short for rolloutStrategy.rollingUpdate."""
    rolling = more.pop("rolling", None)
    template = pod_template(image, **({"env": env} if env is not None else {}))
    found: Object = {"name": name, "replicas": replicas, "standalonePattern": {"template": template}, **more}
    if rolling is not None:
        found["rolloutStrategy"] = {"type": "RollingUpdate", "rollingUpdate": rolling}
    return found


def group(*roles: Object, name: str = "g") -> Object:
    return {
        "apiVersion": "workloads.x-k8s.io/v1alpha2",
        "kind": "RoleBasedGroup",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"roles": list(roles)},
    }


def stateful_set(replicas: int = 3, image: str = "img:1", **spec: Any) -> Object:
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {
            "replicas": replicas,
            "serviceName": "web",
            "selector": {"matchLabels": {"app": "x"}},
            "template": pod_template(image),
            **spec,
        },
    }


def deployment(replicas: int = 3, image: str = "img:1", **spec: Any) -> Object:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": "x"}},
            "template": pod_template(image),
            **spec,
        },
    }


def leader_worker_set(
    replicas: int = 1,
    size: int = 2,
    image: str = "img:1",
    *,
    rolling: Object | None = None,
    annotations: dict[str, str] | None = None,
    template: Object | None = None,
    **spec: Any,
) -> Object:
    """``rolling`` is short for rolloutStrategy.rollingUpdateConfiguration, ``template`` adds to leaderWorkerTemplate."""
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": "x", "namespace": "default", **({"annotations": annotations} if annotations else {})},
        "spec": {
            "replicas": replicas,
            "leaderWorkerTemplate": {"size": size, "workerTemplate": pod_template(image), **(template or {})},
            "rolloutStrategy": {"type": "RollingUpdate", "rollingUpdateConfiguration": rolling or {}},
            **spec,
        },
    }
