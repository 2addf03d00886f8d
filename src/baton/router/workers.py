"""The workers a router knows: their address, load, health and breaker; who may get the next request.

`Registry.pick` is the only place where health, breaker, draining, exclusion and policy meet. Checking health is
`health`'s job; forwarding is `attempt`'s.
"""

from collections.abc import Collection
from urllib.parse import urlsplit

from baton.router.breaker import CircuitBreaker
from baton.router.config import BreakerConfig, Role, WorkerSpec
from baton.router.dialects import Software
from baton.router.kv_index import Prompt
from baton.router.policies import Policy
from baton.router.upstream import Pool


def parse_url(url: str) -> tuple[str, str, int]:
    """(normal form, host, port) of a worker's URL; raises ValueError naming what is wrong."""
    text = url if "//" in url else f"http://{url}"
    parts = urlsplit(text)
    if parts.scheme != "http":
        raise ValueError(f"worker URL {url!r}: only http:// is supported")
    if not parts.hostname:
        raise ValueError(f"worker URL {url!r} has no host")
    if parts.path not in ("", "/") or parts.query:
        raise ValueError(f"worker URL {url!r} must have no path")
    port = parts.port or 80  # raises ValueError when it is not a port
    return f"http://{wrap_ipv6(parts.hostname)}:{port}", parts.hostname, port


def wrap_ipv6(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class Worker:
    """One worker. `active` requests are on it now; `healthy` is None until the first check has answered."""

    def __init__(self, spec: WorkerSpec, breaker: BreakerConfig, connect_timeout_s: float) -> None:
        self.url, host, port = parse_url(spec.url)
        self.role: Role = spec.role
        self.bootstrap_host = wrap_ipv6(host)
        self.bootstrap_port = spec.bootstrap_port
        self.pool = Pool(host, port, connect_timeout_s)
        self.breaker = CircuitBreaker(breaker)
        self.active = 0
        self.healthy: bool | None = None
        self.draining = False
        self.is_both = False
        """Its server is known in another role too."""
        self.software = Software()
        self.problem = "not checked yet"
        """Why it is not healthy."""
        self.selections = 0
        self._authority = f"{wrap_ipv6(host)}:{port}".encode()
        self._heads: dict[bytes, bytes] = {}

    def head(self, method_and_path: bytes) -> bytes:
        """First lines of a request: `POST /generate` -> request line and host."""
        head = self._heads.get(method_and_path)
        if head is None:
            head = method_and_path + b" HTTP/1.1\r\nhost: " + self._authority + b"\r\n"
            self._heads[method_and_path] = head
        return head

    @property
    def is_available(self) -> bool:
        return self.healthy is True and not self.draining


class Registry:
    """All workers by role, and the policy of each role."""

    def __init__(self, policies: dict[Role, Policy], breaker: BreakerConfig, connect_timeout_s: float) -> None:
        self.policies = policies
        self._breaker = breaker
        self._connect_timeout_s = connect_timeout_s
        self.by_role: dict[Role, list[Worker]] = {role: [] for role in policies}

    def find(self, url: str) -> list[Worker]:
        """The worker, or two: one server may be given as prefill and as decode (vLLM's kv_both)."""
        normal = parse_url(url)[0]
        return [worker for worker in self.all() if worker.url == normal]

    def of_role(self, url: str, role: str) -> Worker | None:
        return next((worker for worker in self.find(url) if worker.role == role), None)

    def all(self) -> list[Worker]:
        return [worker for workers in self.by_role.values() for worker in workers]

    def add(self, spec: WorkerSpec) -> Worker:
        """Raises ValueError for a bad URL, a role this router does not have, or a worker it knows already."""
        if spec.role not in self.by_role:
            raise ValueError(f"this router has no {spec.role} workers, only {' and '.join(self.by_role)}")
        if self.of_role(spec.url, spec.role) is not None:
            raise ValueError(f"{spec.role} worker {spec.url} is known already")
        worker = Worker(spec, self._breaker, self._connect_timeout_s)
        self.by_role[spec.role].append(worker)
        same = self.find(spec.url)
        for one in same:
            one.is_both = len(same) > 1
        return worker

    def remove(self, worker: Worker) -> None:
        self.by_role[worker.role].remove(worker)
        self.policies[worker.role].forget(worker.url)
        worker.pool.close()

    def pick(
        self, role: Role, key: bytes, exclude: Collection[str], now_s: float, prompt: Prompt | None = None
    ) -> Worker | None:
        """Who gets the request; None: no worker of `role` is available.

        Workers in `exclude` and those with an open breaker are avoided while there are others: a breaker protects from
        a broken worker, it never makes the service unavailable by itself.
        """
        healthy = [worker for worker in self.by_role[role] if worker.healthy and not worker.draining]
        view = [worker for worker in healthy if worker.breaker.state == "closed" or worker.breaker.allows(now_s)]
        view = view or healthy
        if exclude:
            view = [worker for worker in view if worker.url not in exclude] or view
        if not view:
            return None
        chosen = self.policies[role].choose(key, view, prompt)
        chosen.selections += 1
        return chosen

    def missing(self) -> dict[str, str]:
        """role -> why no worker of it is available; empty: ready."""
        out: dict[str, str] = {}
        for role, workers in self.by_role.items():
            if any(worker.is_available for worker in workers):
                continue
            reasons = [f"{w.url}: {'draining' if w.draining else w.problem}" for w in workers]
            out[role] = "; ".join(reasons) or "none configured"
        return out
