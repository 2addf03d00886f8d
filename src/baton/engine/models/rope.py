"""Rotary embedding parameters as models state them, validated; the arithmetic lives with the model code.

Only variants whose frequencies are fixed for a model are accepted. "dynamic" (and "longrope") change them with the
length of the sequence, so cached keys would depend on how long their request once grew: refused by name.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

RopeType = Literal["linear", "llama3", "yarn"]

KNOWN_ROPE_TYPES: tuple[RopeType, ...] = ("linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How inverse frequencies are changed. Fields that a type does not use keep their defaults."""

    type: RopeType
    factor: float
    """linear: positions are divided by it; llama3, yarn: the context grows by it."""
    original_max_position_embeddings: int = 0
    """llama3, yarn: context length in tokens before scaling."""
    low_freq_factor: float = 1.0
    """llama3."""
    high_freq_factor: float = 4.0
    """llama3."""
    beta_fast: float = 32.0
    """yarn."""
    beta_slow: float = 1.0
    """yarn."""
    attention_factor: float = 1.0
    """yarn: cos and sin are multiplied by it."""
    truncate: bool = True
    """yarn: the correction range is rounded to whole dimensions."""


def parse_rope(raw: dict[str, Any], max_position_embeddings: int) -> tuple[float, RopeScaling | None]:
    """(rope_theta, scaling) of an HF config, old style (`rope_theta`, `rope_scaling`) or new (`rope_parameters`).

    Raises `ValueError` whose text names the field.
    """
    field = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    stated = raw.get(field) or {}
    if not isinstance(stated, dict):
        raise ValueError(f"field {field} must be an object, got {stated!r}.")
    theta = _number(stated.get("rope_theta", raw.get("rope_theta", 10000.0)), f"{field}.rope_theta", above=0.0)
    partial = stated.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"field partial_rotary_factor is {partial}; only whole heads are rotated (1.0).")
    kind = stated.get("rope_type", stated.get("type", "default"))
    if kind == "default" and "mrope_section" not in stated:
        return theta, None
    if kind not in KNOWN_ROPE_TYPES:
        kind = "mrope" if "mrope_section" in stated else kind
        raise ValueError(f"field {field}: rotary type {kind!r} is not supported; known: default, {_known()}.")
    return theta, _scaling(kind, stated, raw, field, max_position_embeddings)


def yarn_attention_factor(factor: float) -> float:
    """The factor that YaRN's paper derives when a config states none."""
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0


def _known() -> str:
    return ", ".join(KNOWN_ROPE_TYPES)


def _scaling(
    kind: RopeType, stated: dict[str, Any], raw: dict[str, Any], field: str, max_position_embeddings: int
) -> RopeScaling:
    factor = _number(stated.get("factor"), f"{field}.factor", above=0.0)
    if kind == "linear":
        return RopeScaling("linear", factor)
    original = stated.get("original_max_position_embeddings", raw.get("original_max_position_embeddings"))
    if original is None and kind == "yarn":
        original = max_position_embeddings
    if not isinstance(original, int) or isinstance(original, bool) or original < 1:
        raise ValueError(
            f"field {field}.original_max_position_embeddings must be a positive integer, got {original!r}."
        )
    if kind == "llama3":
        low = _number(stated.get("low_freq_factor"), f"{field}.low_freq_factor", above=0.0)
        high = _number(stated.get("high_freq_factor"), f"{field}.high_freq_factor", above=low)
        return RopeScaling("llama3", factor, original, low_freq_factor=low, high_freq_factor=high)
    for name in ("mscale", "mscale_all_dim"):
        if stated.get(name):
            raise ValueError(f"field {field}.{name} (DeepSeek's YaRN) is not supported.")
    attention_factor = stated.get("attention_factor")
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=_number(stated.get("beta_fast") or 32.0, f"{field}.beta_fast", above=0.0),
        beta_slow=_number(stated.get("beta_slow") or 1.0, f"{field}.beta_slow", above=0.0),
        attention_factor=yarn_attention_factor(factor)
        if attention_factor is None
        else _number(attention_factor, f"{field}.attention_factor", above=0.0),
        truncate=bool(stated.get("truncate", True)),
    )


def _number(value: Any, name: str, *, above: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"field {name} must be a number, got {value!r}.")
    if value <= above:
        raise ValueError(f"field {name} must be above {above}, got {value}.")
    return float(value)
