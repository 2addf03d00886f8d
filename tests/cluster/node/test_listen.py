"""The address behind "all addresses" for our own servers."""

import pytest

from baton.protocol.listen import listen_host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_all_addresses_means_the_pods_own(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_POD_IP", "127.9.8.7")
    assert listen_host(host) == "127.9.8.7"
    monkeypatch.delenv("BATON_POD_IP")
    assert listen_host(host) == host


def test_a_named_address_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_POD_IP", "127.9.8.7")
    assert listen_host("127.0.0.1") == "127.0.0.1"
