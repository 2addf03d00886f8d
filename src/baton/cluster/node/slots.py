"""Slots: the place of each pod on this machine. One loopback address, one directory, one memory-backed directory.

Owns the addresses: one 127.X.0.0/16 per BATON_HOME (so that several clusters run side by side) and one address per living
pod, both persisted. The upper part of the network is left to Services, whose addresses the API server chooses. Invariant: an address has at most one holder, and a released one is
handed out again only after every other free one. What runs in a slot is `container`'s.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baton.cluster.node.ended import EndedLogs

FIRST_HOST = 256
"""127.X.0.* stays free for the daemon's own listeners."""
LAST_HOST = 57343
"""127.X.224.0 and up are Services."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A pod's place. `shm` lies on tmpfs where the machine has one."""

    uid: str
    namespace: str
    name: str
    node: str
    address: str
    directory: Path
    shm: Path

    @property
    def hosts(self) -> Path:
        return self.directory / "hosts"

    @property
    def volumes(self) -> Path:
        return self.directory / "volumes"

    def container_dir(self, container: str) -> Path:
        return self.directory / "containers" / container

    def log_path(self, container: str, attempt: int) -> Path:
        return self.directory / "logs" / container / f"{attempt}.log"


class AddressError(Exception):
    """Every loopback address of this cluster is taken."""


class AddressPool:
    """Addresses of one /16 and who holds them, kept in `path`."""

    def __init__(self, path: Path, home: Path) -> None:
        self._path = path
        content = read_json(path)
        self.octet = int(content.get("octet") or _choose_octet(home))
        self._holders: dict[str, int] = {str(k): int(v) for k, v in (content.get("holders") or {}).items()}
        self._next = int(content.get("next") or FIRST_HOST)
        self._save()

    @property
    def network(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network(f"127.{self.octet}.0.0/16")

    def take(self, holder: str) -> str:
        """The holder's address, a new one at the first call. Raises `AddressError`."""
        if holder not in self._holders:
            taken = set(self._holders.values())
            for number in [*range(self._next, LAST_HOST + 1), *range(FIRST_HOST, self._next)]:
                if number not in taken and number % 256 not in (0, 255):
                    break
            else:
                raise AddressError(f"no free address in {self.network}")
            self._holders[holder] = number
            self._next = number + 1
            self._save()
        number = self._holders[holder]
        return f"127.{self.octet}.{number // 256}.{number % 256}"

    def claim(self, holder: str, address: str) -> bool:
        """Record an address that somebody else chose; False when another holder has it or it is not of this network."""
        if ipaddress.ip_address(address) not in self.network:
            return False
        number = int(address.split(".")[2]) * 256 + int(address.split(".")[3])
        if self._holders.get(holder) == number:
            return True
        if number in self._holders.values():
            return False
        self._holders[holder] = number
        self._save()
        return True

    def release(self, holder: str) -> None:
        if self._holders.pop(holder, None) is not None:
            self._save()

    def _save(self) -> None:
        write_json(self._path, {"octet": self.octet, "holders": self._holders, "next": self._next})


class SlotStore:
    """All slots of one agent. Slots outlive the agent: `existing` finds them again."""

    def __init__(self, home: Path) -> None:
        self.root = home / "node"
        (self.root / "slots").mkdir(parents=True, exist_ok=True, mode=0o700)
        self.addresses = AddressPool(self.root / "network.json", home)
        self.shm_root = _shm_root(home, self.root)
        self.ended = EndedLogs(self.root / "ended")

    def open(self, uid: str, namespace: str, name: str, node: str) -> Slot:
        """The pod's slot, made at the first call. Raises `AddressError`, OSError."""
        directory = self.root / "slots" / uid
        shm = self.shm_root / uid
        for path in (directory, shm):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        slot = Slot(uid, namespace, name, node, self.addresses.take(uid), directory, shm)
        record = {key: str(value) for key, value in asdict(slot).items()}
        if read_json(directory / "slot.json") != record:
            write_json(directory / "slot.json", record)
        return slot

    def existing(self) -> Iterator[Slot]:
        for path in sorted((self.root / "slots").glob("*/slot.json")):
            record = read_json(path)
            try:
                slot = Slot(
                    **{key: str(record[key]) for key in ("uid", "namespace", "name", "node", "address")},
                    directory=path.parent, shm=Path(record["shm"]),
                )  # fmt: skip
            except KeyError:
                continue  # half written by an agent that was killed at that moment: `open` makes it again
            self.addresses.claim(slot.uid, slot.address)
            slot.shm.mkdir(parents=True, exist_ok=True, mode=0o700)  # a reboot empties tmpfs
            yield slot

    def remove(self, slot: Slot) -> None:
        """Forget the pod: its files but for its logs, and its address. Volumes that are links are not followed."""
        self.ended.keep(slot.namespace, slot.name, slot.directory / "logs")
        shutil.rmtree(slot.shm, ignore_errors=True)
        shutil.rmtree(slot.directory, ignore_errors=True)
        self.addresses.release(slot.uid)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: object) -> None:
    """Whole or not at all for whoever reads it, also when this process is killed. Not forced to disk: what these files tell
    of are processes, which a power failure ends too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    with os.fdopen(descriptor, "w") as file:
        json.dump(content, file)
    Path(part).rename(path)


def _shm_root(home: Path, fallback: Path) -> Path:
    digest = hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:8]
    root = Path("/dev/shm") / f"baton-{os.getuid()}-{digest}"
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        if root.stat().st_uid == os.getuid() and os.access(root, os.W_OK):
            return root
    except OSError:
        pass
    return fallback / "shm"


def _choose_octet(home: Path) -> int:
    """A 127.X that no listener of this machine uses, starting where the home's name points."""
    start = int.from_bytes(hashlib.sha256(str(home.resolve()).encode()).digest()[:4], "big")
    busy = _listening_octets()
    for step in range(250):
        octet = 2 + (start + step) % 250
        if octet not in busy:
            return octet
    return 2 + start % 250


def _listening_octets() -> set[int]:
    """Second octets of the loopback addresses with a listener, from /proc/net/tcp (addresses little-endian hex)."""
    found = set()
    try:
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    except OSError:
        return set()
    for line in lines:
        address, state = line.split()[1].partition(":")[0], line.split()[3]
        if state == "0A" and address.endswith("7F"):
            found.add(int(address[4:6], 16))
    return found
