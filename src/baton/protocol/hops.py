"""What our router and our workers add to SGLang's HTTP protocol: request ids, deadlines, typed
errors, and stream migration.

Migration. A router that can continue a broken stream asks for token ids with the `TOKEN_IDS_HEADER`; the worker then puts
one SSE comment line before each `data:` line of a stream: `: tokens INDEX ID,ID,...` (INDEX is the choice; the ids are
those whose text the event carries or still holds back). SSE clients ignore comments, and workers that are not ours never send them. To go on
elsewhere, the router sends the original body with `RESUME_FIELD` added; the new worker treats the ids as generated
already, sends nothing that was sent, and its usage counts them as completion tokens.
"""

import msgspec

REQUEST_ID_HEADER = "x-request-id"
TIMEOUT_HEADER = "x-baton-timeout-s"
"""Seconds left of the request's one deadline, as a decimal number."""
TOKEN_IDS_HEADER = "x-baton-token-ids"
STAGE_HEADER = "x-baton-error-stage"
RETRYABLE_HEADER = "x-baton-retryable"
"""On a worker's error answers, "1" or "0": `ErrorInfo.stage` and `.retryable`, for which OpenAI's error bodies have no room."""
RESUME_FIELD = "baton_resume"
TOKENS_COMMENT = b": tokens "


class Resume(msgspec.Struct, frozen=True):
    """Value of `RESUME_FIELD`."""

    created: int | None
    """`created` of the chunks sent so far, so that the client sees one response."""
    output_ids: list[list[int] | None]
    """Per choice: tokens generated so far; None: this choice has finished and is not sent again."""


def tokens_comment(index: int, token_ids: list[int]) -> bytes:
    """The comment line (with its newline) that precedes a stream event."""
    return TOKENS_COMMENT + str(index).encode() + b" " + ",".join(map(str, token_ids)).encode() + b"\n"


def parse_tokens_comment(line: bytes) -> tuple[int, list[int]]:
    """Choice index and token ids of one comment line. Raises ValueError if it is not one."""
    if not line.startswith(TOKENS_COMMENT):
        raise ValueError(f"not a tokens comment: {line[:40]!r}")
    index, _, ids = line[len(TOKENS_COMMENT) :].partition(b" ")
    return int(index), [int(token_id) for token_id in ids.split(b",") if token_id.strip()]
