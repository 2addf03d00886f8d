"""Counter-based uniforms: the draw of a request at a position is a function of (seed, position) and nothing else.

There is no generator and no state, so a draw cannot depend on the batch, on restarts, or on which worker makes it.
"""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits. `seed`: any 64-bit integer, signed or not; `position` >= 0."""
    key = _mix((seed & _MASK) ^ 0x5851F42D4C957F2D)
    return (_mix((key + (position + 1) * _GOLDEN) & _MASK) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    """The finaliser of splitmix64: each output bit depends on every input bit."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
