"""Names as cluster DNS would answer them, written as hosts-file lines."""

from __future__ import annotations

from typing import Any

from baton.cluster.services import names


def service(name: str, address: str = "None", namespace: str = "default", **spec: Any) -> dict[str, Any]:
    selector = spec.pop("selector", {"app": name})
    return {
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"clusterIP": address, "selector": selector, **spec},
    }


def pod(name: str, address: str, *, ready: bool = True, namespace: str = "default", **more: Any) -> dict[str, Any]:
    labels = more.pop("labels", {"app": "web"})
    meta = {"name": name, "namespace": namespace, "labels": labels, **more.pop("meta", {})}
    status = {
        "podIP": address,
        "phase": more.pop("phase", "Running"),
        "conditions": [{"type": "Ready", "status": str(ready)}],
    }
    return {"metadata": meta, "spec": {"hostname": name, "subdomain": "web", **more}, "status": status}


def resolve(text: str, name: str) -> list[str]:
    found = [line.split() for line in text.splitlines() if not line.startswith("#")]
    return [words[0] for words in found if name in words[1:]]


def seen_from(namespace: str, services: Any, pods: Any) -> str:
    return names.lines(names.records(services, pods), namespace)


def test_a_service_and_its_pods_have_all_their_names() -> None:
    text = seen_from("default", [service("web")], [pod("web-0", "127.1.0.1"), pod("web-1", "127.1.0.2")])
    for suffix in ("", ".default", ".default.svc", ".default.svc.cluster.local"):
        assert resolve(text, f"web{suffix}") == ["127.1.0.1", "127.1.0.2"]
        assert resolve(text, f"web-1.web{suffix}") == ["127.1.0.2"]
    assert resolve(text, "web-1") == []


def test_a_service_with_an_address_is_that_address() -> None:
    text = seen_from("default", [service("web", "127.1.224.1")], [pod("web-0", "127.1.0.1")])
    assert resolve(text, "web") == ["127.1.224.1"]
    assert resolve(text, "web-0.web") == []


def test_names_of_both_eras_reach_the_same_pod() -> None:
    both = [service("web"), service("s-web", selector={"app": "web"}, publishNotReadyAddresses=True)]
    text = seen_from("default", both, [pod("web-0", "127.1.0.1")])
    assert resolve(text, "web-0.web") == resolve(text, "web-0.s-web") == ["127.1.0.1"]


def test_who_is_not_ready_has_no_name_unless_the_service_says_so() -> None:
    pods = [
        pod("web-0", "127.1.0.1", ready=False), pod("web-1", "127.1.0.2", meta={"deletionTimestamp": "x"}),
        pod("web-2", "127.1.0.3", phase="Failed"), pod("web-3", ""),
    ]  # fmt: skip
    assert seen_from("default", [service("web")], pods) == ""
    text = seen_from("default", [service("web", publishNotReadyAddresses=True)], pods)
    assert resolve(text, "web") == ["127.1.0.1", "127.1.0.2"]


def test_a_name_without_a_namespace_is_the_readers_own() -> None:
    services = [service("web", "127.1.224.1"), service("web", "127.1.224.2", namespace="other")]
    assert resolve(seen_from("default", services, []), "web") == ["127.1.224.1"]
    assert resolve(seen_from("other", services, []), "web") == ["127.1.224.2"]
    assert resolve(seen_from("default", services, []), "web.other") == ["127.1.224.2"]


def test_external_names_and_services_without_a_selector_have_none() -> None:
    services = [service("a", "", type="ExternalName"), service("b", selector={}), service("c", selector=None)]
    assert seen_from("default", services, [pod("web-0", "127.1.0.1")]) == ""


def test_a_pods_own_lines() -> None:
    one = pod("web-0", "127.1.0.1", hostAliases=[{"ip": "10.0.0.1", "hostnames": ["a", "b"]}])
    text = names.header(one, "127.1.0.1")
    assert resolve(text, "localhost") == resolve(text, "web-0") == ["127.1.0.1"]
    assert resolve(text, "web-0.web.default.svc.cluster.local") == ["127.1.0.1"]
    assert resolve(text, "b") == ["10.0.0.1"]
