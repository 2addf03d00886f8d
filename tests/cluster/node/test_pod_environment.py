"""What our own programs make of the variables of a pod."""

import pytest

from baton.protocol.pod import listen_host, manifest_path


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_all_addresses_means_the_pods_own(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_POD_IP", "127.9.8.7")
    assert listen_host(host) == "127.9.8.7"
    monkeypatch.delenv("BATON_POD_IP")
    assert listen_host(host) == host


def test_a_named_address_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_POD_IP", "127.9.8.7")
    assert listen_host("127.0.0.1") == "127.0.0.1"


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/slot/root/models/Qwen3-32B/", "/models/Qwen3-32B/"),
        ("/slot/root/models/Qwen3-32B", "/models/Qwen3-32B"),
        ("/slot/root/models/Qwen3-32B-other", "/slot/root/models/Qwen3-32B-other"),
        ("/elsewhere", "/elsewhere"),
    ],
)
def test_a_volume_is_called_by_its_manifest_path(path: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_VOLUME_PATHS", "/slot/root/models/Qwen3-32B=/models/Qwen3-32B:/slot/root/x=/x")
    assert manifest_path(path) == shown
    monkeypatch.delenv("BATON_VOLUME_PATHS")
    assert manifest_path(path) == path
