"""Token ids in, text out, one token at a time: incremental decoding and stop strings.

The one invariant: the text released after k tokens is a function of those k token ids (and of the prompt's tail), never
of how they were grouped into steps or streams. A stream that is continued elsewhere by replaying its ids therefore neither
repeats nor loses a character. Neighbours: `tokenizer` opens the vocabulary; `server.generation` owns a request. Not here:
stop token ids, which the rank matches.
"""

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer, decoders

REPLACEMENT = "\ufffd"
WINDOW_TOKENS = 5
"""Prompt tokens that a window decoder takes as context, so that a leading space survives (SGLang takes as many)."""
MAX_PENDING_TOKENS = 8


class Decoder(Protocol):
    """Turns one sequence's tokens into text pieces."""

    def push(self, token_id: int) -> str:
        """Text that is certain after this token; "" while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What is left at the end; an incomplete character becomes U+FFFD."""
        ...


class Vocabulary:
    """What decoding needs to know of a tokenizer, shared by all sequences."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special_ids = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self.is_byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._bytes: dict[int, bytes] = {}

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a byte-level token stands for; b"" for an id that the vocabulary does not hold."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = _byte_level_bytes(self.tokenizer.id_to_token(token_id) or "")
        return known

    def token_text(self, token_id: int) -> str:
        """One token on its own, as logprobs show it."""
        return self.tokenizer.decode([token_id], skip_special_tokens=False)

    def logprob_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token; exact where the vocabulary is byte-level, even for half a character."""
        if self.is_byte_level:
            return self.token_bytes(token_id)
        return self.token_text(token_id).encode("utf-8", errors="replace")

    def decoder(self, prompt_ids: Sequence[int], *, skip_special_tokens: bool) -> Decoder:
        if self.is_byte_level:
            return ByteLevelDecoder(self, skip_special_tokens=skip_special_tokens)
        return WindowDecoder(self, prompt_ids[-WINDOW_TOKENS:], skip_special_tokens=skip_special_tokens)


def _byte_table() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 stands for itself, the rest for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(0x100 + offset): byte for offset, byte in enumerate(rest)})
    return table


_BYTE_OF_CHAR = _byte_table()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    except KeyError:
        # An added token is plain text, not byte-level characters.
        return token.encode()


class ByteLevelDecoder:
    """For GPT-2 style vocabularies, where the text is the tokens' bytes joined: one dictionary look-up a token."""

    def __init__(self, vocabulary: Vocabulary, *, skip_special_tokens: bool) -> None:
        self._vocabulary = vocabulary
        self._skipped = vocabulary.special_ids if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(self._vocabulary.token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", True)


class WindowDecoder:
    """For every other vocabulary (sentencepiece and the like), whose decoder looks at neighbours.

    Decodes a window of tokens twice, without and with the new ones, and gives out the difference once it ends in a whole
    character. Invariant: the first `_num_given` tokens of the window are context whose text was given out.
    """

    def __init__(self, vocabulary: Vocabulary, context: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._tokenizer = vocabulary.tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids = list(context)
        self._num_given = len(self._ids)

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        # No character has more than four bytes: a longer wait means bytes that are no text at all.
        return self._advance(at_end=len(self._ids) - self._num_given > MAX_PENDING_TOKENS)

    def flush(self) -> str:
        return self._advance(at_end=True)

    def _advance(self, *, at_end: bool) -> str:
        before = self._decode(self._ids[: self._num_given])
        after = self._decode(self._ids)
        if not at_end and (len(after) <= len(before) or after.endswith(REPLACEMENT)):
            return ""
        del self._ids[: self._num_given]
        self._num_given = len(self._ids)
        return after[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


class OutputText:
    """The text of one sequence with stop strings applied.

    Text that could be the start of a stop string is held back until it is certain. `released_text` is what a client may
    see; invariant: no stop string crosses the border between it and what is held back.
    """

    def __init__(
        self, decoder: Decoder, stops: Sequence[str] = (), *, min_new_tokens: int = 0, no_stop_trim: bool = False
    ) -> None:
        self._decoder = decoder
        self._stops = tuple(stops)
        self._min_new_tokens = min_new_tokens
        self._no_stop_trim = no_stop_trim
        self._num_tokens = 0
        self._held = ""
        self.released_text = ""
        self.matched_stop: str | None = None

    def push(self, token_id: int) -> bool:
        """Add one token. True: a stop string is complete, the text is final and later tokens must not be pushed."""
        self._num_tokens += 1
        piece = self._decoder.push(token_id)
        return bool(piece) and self._add(piece)

    def flush(self) -> None:
        """The sequence ended without a stop string: release everything."""
        if self.matched_stop is None and not self._add(self._decoder.flush()):
            self.released_text += self._held
            self._held = ""

    def _add(self, piece: str) -> bool:
        if not self._stops or self._num_tokens <= self._min_new_tokens:
            self.released_text += piece
            return False
        text = self._held + piece
        found = [(text.find(stop), order) for order, stop in enumerate(self._stops) if stop in text]
        if found:
            start, order = min(found)
            self.matched_stop = self._stops[order]
            end = start + len(self.matched_stop) if self._no_stop_trim else start
            self.released_text += text[:end]
            self._held = ""
            return True
        num_held = max(_longest_start(text, stop) for stop in self._stops)
        self.released_text += text[: len(text) - num_held]
        self._held = text[len(text) - num_held :]
        return False


def _longest_start(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop` (and not all of it)."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
