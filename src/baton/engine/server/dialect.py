"""What the answers of a worker look like: the one switch between SGLang's and vLLM's HTTP.

Route files decide what is answered and when; they ask `ctx.dialect` for the shape. Implementations: `sglang_dialect`,
`vllm_dialect`. Not here: which routes there are (`app`), what they do.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from prometheus_client import CollectorRegistry

from baton.engine.args import EngineArgs
from baton.engine.detokenizer import Vocabulary
from baton.engine.server.generation import Generation
from baton.engine.server.handover import Handover
from baton.engine.server.metrics import RequestObserver, StateCollector
from baton.protocol.errors import ErrorInfo
from baton.protocol.openai import Usage
from baton.protocol.rank import Finish, Ready, TokenLogprobs

Kind = Literal["chat", "completion"]


@dataclass(frozen=True, slots=True)
class Head:
    """What all documents and events of one response have in common."""

    id: str
    created: int
    model: str
    vocabulary: Vocabulary | None
    """For the tokens of log-probabilities; None: they are shown by number."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice of a document, or what is new of it in an event."""

    generation: Generation
    text: str
    logprobs: Sequence[TokenLogprobs] | None
    """None: not asked for."""
    finish: Finish | None
    has_news: bool = True
    """There is text, or something else that belongs to new tokens."""
    text_offset: int = 0
    """Where `text` begins in the whole text of the choice, in characters."""

    @property
    def index(self) -> int:
        return self.generation.index

    @property
    def finish_reason(self) -> str | None:
        return None if self.finish is None else self.finish.type


class Dialect(Protocol):
    """Documents and events are values that msgspec encodes."""

    @property
    def name(self) -> Literal["sglang", "vllm"]: ...

    @property
    def refused_fields(self) -> Mapping[str, str]:
        """Request field -> why it is refused."""

    @property
    def ignored_fields(self) -> Collection[str]: ...

    def fields(self, raw: dict[str, Any]) -> dict[str, Any]:
        """A request's body under the names of `protocol.openai`. Raises `RequestError`."""

    def served_model(self, args: EngineArgs, asked: str | None) -> str | None:
        """The name to answer with; None for a model that is not served."""

    def handover(self, args: EngineArgs, fields: Mapping[str, Any]) -> Handover:
        """Where a request (its body under our names) meets its other half."""

    def early_answer(self, handover: Handover) -> dict[str, Any] | None:
        """What the prefill half of a request is answered before it is computed; None: it is answered afterwards."""

    def response_id(self, kind: Kind, request_id: str) -> str: ...

    def logprob_vocabulary(self, raw: Mapping[str, Any], vocabulary: Vocabulary | None) -> Vocabulary | None:
        """`Head.vocabulary` of an answer."""

    def wants_usage(self, asked: bool) -> bool:
        """Whether a stream ends with its usage."""

    def chat_document(
        self, head: Head, choices: Sequence[Choice], usage: Usage, early: dict[str, Any] | None = None
    ) -> object:
        """`early`: what `early_answer` said."""

    def chat_role_chunk(self, head: Head, index: int) -> object:
        """The first event of a choice."""

    def chat_chunks(self, head: Head, choice: Choice, usage: Usage | None) -> Sequence[object]: ...

    def completion_document(
        self, head: Head, choices: Sequence[Choice], usage: Usage, early: dict[str, Any] | None = None
    ) -> object: ...

    def completion_chunk(self, head: Head, choice: Choice, usage: Usage | None) -> object: ...

    def usage_chunk(self, head: Head, kind: Kind, usage: Usage) -> object: ...

    def error(self, info: ErrorInfo, *, is_openai: bool) -> object:
        """An error body; `is_openai`: of a /v1 route."""

    def request_metrics(self, args: EngineArgs, registry: CollectorRegistry) -> RequestObserver: ...

    def scheduler_metrics(
        self, args: EngineArgs, readies: Sequence[Ready], startup_s: float, registry: CollectorRegistry
    ) -> StateCollector: ...
