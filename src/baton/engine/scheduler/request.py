"""One request as the scheduler knows it: tokens, page table, where it is. State only; the moves are in `lifecycle`,
`scheduler` and `pd`.
"""

import enum
from dataclasses import dataclass, field

from baton.kvcache.radix_tree import PrefixHandle
from baton.protocol.rank import Bootstrap, Part, TokenLogprobs
from baton.protocol.sampling import SamplingParams


class Status(enum.Enum):
    NEW = "new"
    BOOTSTRAPPING = "bootstrapping"
    """Prefill: the decode side has not asked for the KV yet. Holds no pages."""
    PREALLOC = "prealloc"
    """Decode: waits for pages to receive into. Holds none."""
    RECEIVING = "receiving"
    """Decode: the transfer writes its pages."""
    WITHDRAWING = "withdrawing"
    """Decode: the transfer was told to give its pages back; the request is computed here afterwards (`take_back`)."""
    READY = "ready"
    """Decode: KV and first token are here; waits for a place in the running batch."""
    WAITING = "waiting"
    """For prefill. Holds no pages."""
    PREFILLING = "prefilling"
    """Some of its prompt is computed (or is in a step in flight)."""
    RUNNING = "running"
    """In the decode batch."""
    SENDING = "sending"
    """Prefill: all computed, the transfer still reads its pages."""
    CANCELLING = "cancelling"
    """The client has its end, but the transfer owns the pages until the room's end event."""
    FINISHED = "finished"


LEGAL_TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.NEW: frozenset({Status.BOOTSTRAPPING, Status.PREALLOC, Status.WAITING, Status.FINISHED}),
    Status.BOOTSTRAPPING: frozenset({Status.WAITING, Status.CANCELLING, Status.FINISHED}),
    Status.PREALLOC: frozenset({Status.RECEIVING, Status.FINISHED}),
    Status.RECEIVING: frozenset({Status.READY, Status.WITHDRAWING, Status.CANCELLING, Status.FINISHED}),
    Status.WITHDRAWING: frozenset({Status.READY, Status.WAITING, Status.CANCELLING, Status.FINISHED}),
    Status.READY: frozenset({Status.RUNNING, Status.WAITING, Status.FINISHED}),
    Status.WAITING: frozenset({Status.PREFILLING, Status.CANCELLING, Status.FINISHED}),
    Status.PREFILLING: frozenset({Status.RUNNING, Status.SENDING, Status.WAITING, Status.CANCELLING, Status.FINISHED}),
    Status.RUNNING: frozenset({Status.WAITING, Status.FINISHED}),
    Status.SENDING: frozenset({Status.CANCELLING, Status.FINISHED}),
    Status.CANCELLING: frozenset({Status.FINISHED}),
    Status.FINISHED: frozenset(),
}


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """Invariants: num_computed <= num_tokens; num_computed <= len(pages) * page_size; pages[: handle.num_pages] are the
    prefix tree's, the rest are this request's alone; without a handle there are no pages. RUNNING: num_computed ==
    num_tokens - 1 (the KV of the last token is computed by the step that reads it).
    """

    rid: str
    prompt_ids: list[int]
    output_ids: list[int]
    """Starts with the tokens of `Submit.output_ids`; shared with `SampleRow`, append only."""
    sampling: SamplingParams
    seed: int
    arrival_s: float
    arrival_idx: int
    """Order of arrival; ties of `arrival_s` never matter."""
    deadline_s: float | None
    output_limit: int
    """Output tokens after which the request ends with "length": max_new_tokens, or what the context has room for."""
    stop_ids: frozenset[int]
    blocked_ids: tuple[int, ...]
    """Not to be drawn before min_new_tokens."""
    extra_key: str | None = None
    priority: int = 0
    part: Part = "null"
    """Of this worker."""
    bootstrap: Bootstrap | None = None
    """None unless KV really crosses: SGLang's fake bootstrap host counts as none."""
    return_logprob: bool = False
    top_logprobs_num: int = 0
    token_ids_logprob: tuple[int, ...] = ()
    logprob_start: int | None = None
    """First prompt position whose log-probability is wanted; None: none are."""

    status: Status = Status.NEW
    pages: list[int] = field(default_factory=list)
    """Page table: page i holds the KV of positions i * page_size ...."""
    handle: PrefixHandle | None = None
    num_computed: int = 0
    num_begun: int = 0
    """While PREFILLING: `num_computed`, and the tokens behind it that steps in flight compute."""
    num_cached: int | None = None
    """Prompt tokens that the first admission found in the cache; None before it."""
    cached_host: int = 0
    """Of `num_cached`: loaded from the host tier."""
    cached_store: int = 0
    """Of `num_cached`: brought from the store."""
    save_from: int = 0
    """Decode: pages before this one came from the prefill worker, which keeps them in the lower tiers itself."""
    queue_time_s: float | None = None
    num_retractions: int = 0
    num_bypassed: int = 0
    """Later arrivals that were admitted before it."""
    input_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Collected chunk by chunk, sent with the first output."""
    input_logprobs_sent: bool = False
    row_idx: int | None = None
    """Row of the decode batch. Invariant: not None if and only if RUNNING."""
    next_page_idx: int = 0
    """Prefill: first page not yet handed to the transfer."""
    first_logprobs: TokenLogprobs | None = None
    """Prefill: of the drawn token, until the transfer has ended."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_output_left(self) -> int:
        return max(0, self.output_limit - len(self.output_ids))

    @property
    def private_pages(self) -> list[int]:
        """Pages that are this request's alone."""
        return self.pages[self.handle.num_pages :] if self.handle is not None else []

    def token_slice(self, start: int, end: int) -> list[int]:
        """Tokens of positions start .. end - 1, prompt and output as one sequence."""
        num_prompt = len(self.prompt_ids)
        if end <= num_prompt:
            return self.prompt_ids[start:end]
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : end - num_prompt]
        return self.prompt_ids[start:] + self.output_ids[: end - num_prompt]

    def move_to(self, status: Status) -> None:
        """Change status; a move that `LEGAL_TRANSITIONS` does not list is our bug (AssertionError)."""
        assert status in LEGAL_TRANSITIONS[self.status], f"{self.rid}: illegal move {self.status.name} -> {status.name}"
        self.status = status
