"""Log lines as `time level logger message key=value ...`, for a process that runs controllers."""

from __future__ import annotations

import json
import logging

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class KeyValueFormatter(logging.Formatter):
    """The message stays constant; what varies is appended as key=value, values that need it in JSON quotes."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the name is logging's)
        pairs = [f"{key}={_text(value)}" for key, value in record.__dict__.items() if key not in _STANDARD]
        return " ".join([super().formatMessage(record), *pairs])


def _text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return json.dumps(text) if isinstance(value, str) and (not text or any(c in text for c in ' "=\n')) else text


def configure(level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(KeyValueFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
