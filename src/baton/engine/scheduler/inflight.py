"""The steps in flight: begun by `schedule`, not applied yet, oldest first. In a pipeline of several stages there are several.

Owns their plans and what waits for them: ends of requests that are in one, and pages that nobody but them still reads or
writes. Whether another step may begin, and with whom, is `scheduler`'s decision.

Micro-batches. A request that decodes can be in one step only, since the step draws the token that the next one reads. So
the running requests are spread: a step takes at most a `depth`-th of them (rounded up, `DecodeBatch.due`), those that waited
longest, and the other stages have work meanwhile. With P stages of t(n) seconds for n rows, all rows in one step give every
row a token each P * t(n) seconds; spread, each P * t(n / P), which is never more. SGLang bounds each of P running batches
(--pp-max-micro-batch-size, by default the P-th part of what may run), which packs a worker that is not full into few of
them. vLLM's batch queue takes whoever is in no step, up to its budget, and the groups are as uneven as prompts happened to
end (its issue 41682); its pull request 57433 measured 23 % more output with decode rows spread evenly, and 8 % less where
prompts were bounded too. So prompts are not bounded here: the next chunk of a prompt needs no result of the chunk before it
and follows it at once (SGLang's chunked pipeline), and chunks go before decode rows as they do with one stage.
"""

from collections import deque
from collections.abc import Iterable

from baton.engine.scheduler.assemble import StepPlan
from baton.engine.scheduler.request import Request
from baton.kvcache.prefix_cache import PrefixCache
from baton.protocol.rank import Finish


class StepsInFlight:
    def __init__(self, depth: int, cache: PrefixCache) -> None:
        """`depth`: how many there may be."""
        self.depth = depth
        self._cache = cache
        self._plans: deque[StepPlan] = deque()
        self._ends: dict[Request, Finish] = {}

    def __len__(self) -> int:
        return len(self._plans)

    def __contains__(self, req: Request) -> bool:
        return any(req in plan for plan in self._plans)

    @property
    def prefilling(self) -> list[Request]:
        """Whose prompt is being computed, each once, oldest step first."""
        found = (chunk.req for plan in self._plans for chunk in plan.chunks)
        return list(dict.fromkeys(found))

    @property
    def leftover_pages(self) -> list[int]:
        return [page for plan in self._plans for page in plan.leftover_pages]

    def begin(self, plan: StepPlan) -> None:
        assert len(self._plans) < self.depth, f"{self.depth} steps are in flight"
        self._plans.append(plan)

    def take_oldest(self) -> StepPlan:
        """It was computed, or never will be."""
        assert self._plans, "no step is in flight"
        plan = self._plans.popleft()
        self._cache.free(plan.leftover_pages)
        return plan

    def free(self, pages: Iterable[int]) -> None:
        """Pages that no request has any more: they are free when the steps that are in flight now were applied."""
        if self._plans:
            self._plans[-1].leftover_pages.extend(pages)
        else:
            self._cache.free(pages)

    def put_off(self, req: Request, finish: Finish) -> None:
        """`req` is in a step. The first end is the one that counts."""
        self._ends.setdefault(req, finish)

    def is_ending(self, req: Request) -> bool:
        return req in self._ends

    def take_ends(self) -> list[tuple[Request, Finish]]:
        """Ends that need to wait no longer. The request may have had another one meanwhile."""
        due = [(req, finish) for req, finish in self._ends.items() if req not in self]
        for req, _ in due:
            del self._ends[req]
        return due
