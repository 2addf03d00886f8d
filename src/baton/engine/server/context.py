"""What every route of one worker shares; built once by `main` (or a test) before the first request."""

import asyncio
import logging
import time
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from baton.engine.args import EngineArgs
from baton.engine.server.dialect import Dialect
from baton.engine.server.engines import Engines
from baton.engine.server.metrics import StateCollector
from baton.engine.server.sglang_dialect import SGLANG
from baton.engine.tokenizer import TextTokenizer
from baton.protocol.errors import Stage, bad_request
from baton.protocol.rank import STAGE_OF_MODE, Ready
from baton.text.chat_template import ChatTemplate

logger = logging.getLogger(__name__)


@dataclass
class ServerContext:
    args: EngineArgs
    ready: Ready
    """What every engine can do."""
    engines: Engines
    tokenizer: TextTokenizer | None
    """None with --skip-tokenizer-init."""
    chat_template: ChatTemplate | None
    registry: CollectorRegistry
    scheduler_metrics: StateCollector
    created: int = field(default_factory=lambda: int(time.time()))
    is_warm: bool = False
    is_stopping: bool = False
    unknown_fields: dict[str, int] = field(default_factory=dict)
    """Request field nobody knows -> how often it came."""
    sampling_defaults: dict[str, float] = field(default_factory=dict)
    """Of the OpenAI routes, under SamplingParams' names."""
    dialect: Dialect = SGLANG
    background: set[asyncio.Task[None]] = field(default_factory=set)
    """Requests that were answered before they ended."""

    @property
    def stage(self) -> Stage:
        """What errors name that are of no request's part."""
        return STAGE_OF_MODE[self.args.disaggregation_mode]

    @property
    def is_disaggregated(self) -> bool:
        return self.args.disaggregation_mode != "null"

    def need_tokenizer(self) -> TextTokenizer:
        """The tokenizer. Raises `RequestError` (400) when this worker has none."""
        if self.tokenizer is None:
            raise bad_request("this worker runs with --skip-tokenizer-init: send token ids and read output_ids.")
        return self.tokenizer

    def note_unknown(self, name: str) -> None:
        """Count a request field that nobody knows; say so once."""
        if name not in self.unknown_fields:
            if len(self.unknown_fields) >= 1000:
                return  # a client that makes up names must not fill the memory
            logger.warning("request field ignored: %s (said once)", name[:100])
        self.unknown_fields[name] = self.unknown_fields.get(name, 0) + 1
