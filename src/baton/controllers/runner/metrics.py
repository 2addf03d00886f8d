"""What the runner counts, for /metrics. One instance a process; its own registry, so that tests do not share one."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class RunnerMetrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconciles = Counter(
            "baton_reconciles", "Passes by outcome", ["controller", "outcome"], registry=self.registry
        )
        self.seconds = Histogram(
            "baton_reconcile_seconds", "Time of one pass with its writes", ["controller"], registry=self.registry
        )
        self.actions = Counter(
            "baton_actions", "Writes that succeeded", ["controller", "action", "kind"], registry=self.registry
        )
        self.waiting = Gauge("baton_queue_keys", "Keys that wait for a worker", ["controller"], registry=self.registry)
        self.leader = Gauge("baton_leader", "1 while this process leads", registry=self.registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)
