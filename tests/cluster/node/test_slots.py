"""Slots and addresses: one holder each, kept over restarts, and several clusters side by side."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from baton.cluster.node.slots import AddressError, AddressPool, SlotStore


def test_an_address_has_one_holder_and_survives_a_restart(tmp_path: Path) -> None:
    pool = AddressPool(tmp_path / "network.json", tmp_path)
    first, second = pool.take("a"), pool.take("b")
    assert first != second
    assert pool.take("a") == first
    again = AddressPool(tmp_path / "network.json", tmp_path)
    assert (again.take("a"), again.take("b")) == (first, second)


def test_a_released_address_is_used_again_only_after_the_others(tmp_path: Path) -> None:
    pool = AddressPool(tmp_path / "network.json", tmp_path)
    first = pool.take("a")
    pool.release("a")
    assert pool.take("b") != first


def test_addresses_can_be_listened_on_and_never_end_in_0_or_255(tmp_path: Path) -> None:
    pool = AddressPool(tmp_path / "network.json", tmp_path)
    found = [pool.take(str(number)) for number in range(300)]
    assert len(set(found)) == 300
    assert not any(address.endswith((".0", ".255")) for address in found)
    with socket.socket() as one:
        one.bind((found[-1], 0))


def test_no_free_address_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.cluster.node.slots.LAST_HOST", 258)
    pool = AddressPool(tmp_path / "network.json", tmp_path)
    assert {pool.take("a"), pool.take("b")} == {f"127.{pool.octet}.1.1", f"127.{pool.octet}.1.2"}
    with pytest.raises(AddressError, match="no free address"):
        pool.take("c")
    pool.release("a")
    assert pool.take("c") == f"127.{pool.octet}.1.1"


def test_two_homes_do_not_share_a_network_in_use(tmp_path: Path) -> None:
    pool = AddressPool(tmp_path / "one.json", tmp_path)
    with socket.socket() as one:
        one.bind((pool.take("a"), 0))
        one.listen()
        other = AddressPool(tmp_path / "two.json", tmp_path)
    assert other.octet != pool.octet


def test_slots_are_found_again(tmp_path: Path) -> None:
    store = SlotStore(tmp_path)
    slot = store.open("uid-1", "default", "web-0", "node-0")
    (slot.directory.parent / "half").mkdir()
    again = SlotStore(tmp_path)
    assert list(again.existing()) == [slot]
    again.remove(slot)
    assert list(again.existing()) == []
    assert not slot.directory.exists()
    assert not slot.shm.exists()
    store.shm_root.rmdir()
