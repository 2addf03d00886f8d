"""Sampling parameters: SGLang's names and defaults (`/generate`'s `sampling_params`), validated in one pass."""

import math

import msgspec

from baton.protocol.errors import bad_request

GREEDY_TEMPERATURE = 1e-6
"""Below this temperature sampling is greedy (SGLang: temperature < 1e-6 means top_k = 1)."""


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the next token is chosen and when a request stops. `stop` strings are matched where text is made (the HTTP
    process); everything else is applied by the rank."""

    max_new_tokens: int | None = 128
    """None: up to the context length."""
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    """-1: no limit."""
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    n: int = 1
    seed: int | None = None
    """With a seed the drawn tokens depend on (seed, position, logits) only, never on the batch."""
    logit_bias: dict[str, float] | None = None
    """token id (as text, JSON has no other keys) -> value added to its logit."""
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def validate(self, vocab_size: int) -> None:
        """Raise `RequestError` (400) naming the first field that is out of range."""
        for name in (
            "temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
        ):  # fmt: skip
            if not math.isfinite(getattr(self, name)):
                raise bad_request(f"{name} must be a finite number, got {getattr(self, name)}.", name)
        checks = (
            ("temperature", self.temperature >= 0, "be non-negative", self.temperature),
            ("top_p", 0 < self.top_p <= 1, "be in (0, 1]", self.top_p),
            ("min_p", 0 <= self.min_p <= 1, "be in [0, 1]", self.min_p),
            ("top_k", self.top_k == -1 or self.top_k >= 1, "be -1 (disable) or at least 1", self.top_k),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "be in [-2, 2]", self.frequency_penalty),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "be in [-2, 2]", self.presence_penalty),
            ("repetition_penalty", 0 < self.repetition_penalty <= 2, "be in (0, 2]", self.repetition_penalty),
            ("min_new_tokens", self.min_new_tokens >= 0, "be at least 0", self.min_new_tokens),
            ("n", 1 <= self.n <= 128, "be in [1, 128]", self.n),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "fit in 64 bits", self.seed),
        )
        for name, good, rule, value in checks:
            if not good:
                raise bad_request(f"{name} must {rule}, got {value}.", name)
        if self.max_new_tokens is not None:
            if self.max_new_tokens < 0:
                raise bad_request(f"max_new_tokens must be at least 0, got {self.max_new_tokens}.", "max_new_tokens")
            if self.min_new_tokens > self.max_new_tokens:
                raise bad_request(
                    f"min_new_tokens must be in [0, max_new_tokens({self.max_new_tokens})], got {self.min_new_tokens}.",
                    "min_new_tokens",
                )
        self._validate_token_ids(vocab_size)

    def _validate_token_ids(self, vocab_size: int) -> None:
        for token_id in self.stop_token_ids or ():
            if not 0 <= token_id < vocab_size:
                raise bad_request(f"stop_token_ids must be in [0, {vocab_size}), got {token_id}.", "stop_token_ids")
        for key, bias in (self.logit_bias or {}).items():
            if not key.isdigit() or int(key) >= vocab_size:
                raise bad_request(f"logit_bias keys must be token ids in [0, {vocab_size}), got {key!r}.", "logit_bias")
            if not math.isfinite(bias):
                raise bad_request(f"logit_bias[{key}] must be a finite number, got {bias}.", "logit_bias")
        if any(text == "" for text in self.stop_strings):
            raise bad_request("stop must not hold an empty string.", "stop")
