"""Log-probabilities in OpenAI's words: what a token is called, and the lists of the completions route (both dialects')."""

from collections.abc import Sequence

from baton.engine.detokenizer import Vocabulary
from baton.protocol.openai import CompletionLogprobs
from baton.protocol.rank import TokenLogprobs


def completion_logprobs(
    vocabulary: Vocabulary | None, positions: Sequence[TokenLogprobs], first_offset: int
) -> CompletionLogprobs:
    """`first_offset` is the first token's place in the text, in characters."""
    logprobs = CompletionLogprobs([], [], [], [])
    offset = first_offset
    for one in positions:
        token = token_text(vocabulary, one.token_id)
        logprobs.text_offset.append(offset)
        logprobs.token_logprobs.append(one.logprob)
        logprobs.tokens.append(token)
        top = None if one.logprob is None else {token_text(vocabulary, other): logprob for other, logprob in one.top}
        logprobs.top_logprobs.append(top)
        offset += len(token)
    return logprobs


def token_text(vocabulary: Vocabulary | None, token_id: int) -> str:
    return f"token_id:{token_id}" if vocabulary is None else vocabulary.token_text(token_id)


def token_bytes(vocabulary: Vocabulary | None, token_id: int) -> list[int]:
    return [] if vocabulary is None else list(vocabulary.logprob_bytes(token_id))
