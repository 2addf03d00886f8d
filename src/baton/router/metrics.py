"""Counters of the router and their Prometheus text; names follow sglang-router's `smg_*` where the meaning is the same.

Hand-written, because a request touches several series and the client library costs more than the proxying.
"""

from bisect import bisect_left
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from baton.router.workers import Worker

_BREAKER_STATES = {"closed": 0, "open": 1, "half_open": 2}
Labels = tuple[tuple[str, str], ...]


class Histogram:
    """Counts per bucket; `le` bounds in seconds."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, labels: Labels) -> list[str]:
        out: list[str] = []
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            out.append(_line(f"{name}_bucket", (*labels, ("le", bound)), total))
        out.append(_line(f"{name}_sum", labels, self._sum))
        out.append(_line(f"{name}_count", labels, total))
        return out


class Metrics:
    """Everything counted since the start. Keys are label values in the order of `render`."""

    def __init__(self, buckets_s: tuple[float, ...]) -> None:
        self._buckets_s = buckets_s
        self.http_requests: Counter[tuple[bytes, bytes]] = Counter()
        self.http_responses: Counter[tuple[bytes, int]] = Counter()
        self.upstream_responses: Counter[tuple[str, str, str]] = Counter()
        self.retries: Counter[tuple[str, str]] = Counter()
        self.migrations: Counter[str] = Counter()
        self.handovers: Counter[tuple[str, str]] = Counter()
        self.prefill = Histogram(buckets_s)
        self.aborts = 0
        self.first_event = Histogram(buckets_s)
        self._durations: dict[bytes, Histogram] = {}

    def ended(self, path: bytes, status: int, duration_s: float) -> None:
        """One request of an API route has got its end."""
        self.http_responses[path, status] += 1
        histogram = self._durations.get(path)
        if histogram is None:
            histogram = self._durations[path] = Histogram(self._buckets_s)
        histogram.observe(duration_s)

    def render(self, workers: "list[Worker]", roles: list[str], gauges: dict[str, int]) -> str:
        """The exposition; `gauges` are unlabelled ones of the moment."""
        out: list[str] = []
        kind = "pd" if "prefill" in roles else "regular"
        for name, value in gauges.items():
            out += _family(name, "gauge", _HELP[name], [((), value)])
        out += _family(
            "smg_http_requests_total", "counter", "Requests received.",
            [((("method", _text(method)), ("path", _text(path))), n) for (method, path), n in self.http_requests.items()],
        )  # fmt: skip
        out += _family(
            "smg_http_responses_total", "counter", "Answers to clients; 499: the client left.",
            [
                ((("path", _text(path)), ("status_code", str(code))), n)
                for (path, code), n in self.http_responses.items()
            ],
        )  # fmt: skip
        totals: Counter[bytes] = Counter()
        for (path, _), n in self.http_responses.items():
            totals[path] += n
        out += _family(
            "smg_router_requests_total", "counter", "Generation requests that have ended.",
            [((("router_type", kind), ("endpoint", _text(path))), n) for path, n in totals.items()],
        )  # fmt: skip
        out += ["# HELP smg_http_request_duration_seconds From the request's last byte to its answer's last byte."]
        out += ["# TYPE smg_http_request_duration_seconds histogram"]
        for path, histogram in self._durations.items():
            out += histogram.lines("smg_http_request_duration_seconds", (("path", _text(path)),))
        out += ["# HELP baton_router_time_to_first_event_seconds From a streaming request to its first event."]
        out += ["# TYPE baton_router_time_to_first_event_seconds histogram"]
        out += self.first_event.lines("baton_router_time_to_first_event_seconds", ())
        out += ["# HELP baton_router_prefill_seconds From asking a prefill to its answer, in vLLM's protocol."]
        out += ["# TYPE baton_router_prefill_seconds histogram"]
        out += self.prefill.lines("baton_router_prefill_seconds", ())
        out += self._router_lines()
        out += _worker_lines(workers, roles)
        return "\n".join(out) + "\n"

    def _router_lines(self) -> list[str]:
        out = _family(
            "smg_router_upstream_responses_total", "counter", "Failed tries by worker and what went wrong.",
            [
                ((("worker_type", role), ("worker", url), ("result", result)), n)
                for (role, url, result), n in self.upstream_responses.items()
            ],
        )  # fmt: skip
        out += _family(
            "smg_router_retries_total", "counter", "Further tries by the side and kind of failure.",
            [((("worker_type", role), ("reason", reason)), n) for (role, reason), n in self.retries.items()],
        )  # fmt: skip
        out += _family(
            "baton_router_migrations_total", "counter", "Streams whose worker died: started, resumed, failed.",
            [((("outcome", outcome),), self.migrations[outcome]) for outcome in ("started", "resumed", "failed")],
        )  # fmt: skip
        out += _family(
            "baton_router_handovers_total", "counter",
            "Tries of pairs by protocol; alone: decode was to compute the prompt by itself.",
            [((("protocol", protocol), ("outcome", outcome)), n) for (protocol, outcome), n in self.handovers.items()],
        )  # fmt: skip
        out += _family(
            "baton_router_worker_aborts_total", "counter", "Aborts sent to workers for requests given up.",
            [((), self.aborts)],
        )  # fmt: skip
        return out


_KV_COUNTERS = {
    "batches": "Batches of KV events heard.",
    "gaps": "Times batches were missing; they are asked for again, or the worker's blocks are unknown.",
    "unreadable": "Batches that could not be read; the worker's blocks are unknown after one.",
}
_HELP = {
    "smg_http_connections_active": "Open client connections.",
    "smg_router_requests_active": "Requests in progress.",
    "smg_router_requests_queued": "Requests waiting for --max-concurrent-requests.",
}


def _worker_lines(workers: "list[Worker]", roles: list[str]) -> list[str]:
    def labels(worker: "Worker") -> Labels:
        return (("worker_type", worker.role), ("worker", worker.url))

    pools = Counter(worker.role for worker in workers)
    out = _family(
        "smg_worker_pool_size",
        "gauge",
        "Known workers.",
        [((("worker_type", role),), pools[role]) for role in roles],  # type: ignore[index]
    )
    out += _family("smg_worker_health", "gauge", "1: healthy.", [(labels(w), int(w.healthy is True)) for w in workers])
    out += _family(
        "baton_router_worker_info", "gauge", "What a worker was found to be.",
        [((*labels(w), ("dialect", w.software.dialect), ("version", w.software.version)), 1) for w in workers],
    )  # fmt: skip
    out += _family("smg_worker_requests_active", "gauge", "Requests on it.", [(labels(w), w.active) for w in workers])
    out += _family(
        "smg_worker_selection_total", "counter", "Times chosen.", [(labels(w), w.selections) for w in workers]
    )
    out += _family(
        "smg_worker_cb_state", "gauge", "Circuit breaker: 0 closed, 1 open, 2 half open.",
        [(labels(w), _BREAKER_STATES[w.breaker.state]) for w in workers],
    )  # fmt: skip
    out += _family(
        "smg_worker_cb_transitions_total", "counter", "State changes of the circuit breaker.",
        [(labels(w), w.breaker.transitions) for w in workers],
    )  # fmt: skip
    return out


def kv_event_lines(stats: list[tuple[str, int, dict[str, int]]]) -> str:
    """Of the workers whose KV events are heard: (worker, blocks known, counters)."""
    blocks: list[tuple[Labels, int]] = [((("worker", url),), known) for url, known, _ in stats]
    out = _family("baton_router_kv_blocks", "gauge", "Blocks a worker is known to have, by its KV events.", blocks)
    for name, text in _KV_COUNTERS.items():
        samples: list[tuple[Labels, int]] = [((("worker", url),), counters[name]) for url, _, counters in stats]
        out += _family(f"baton_router_kv_event_{name}_total", "counter", text, samples)
    return "\n".join(out) + "\n" if stats else ""


def _family(name: str, kind: str, text: str, samples: list[tuple[Labels, int]]) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *(_line(name, labels, n) for labels, n in samples)]


def _line(name: str, labels: Labels, value: float) -> str:
    if not labels:
        return f"{name} {value}"
    text = ",".join(f'{key}="{_escape(label)}"' for key, label in labels)
    return f"{name}{{{text}}} {value}"


def _text(path: bytes) -> str:
    return path.decode("latin-1")


def _escape(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
