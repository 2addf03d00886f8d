"""How long ago: the short forms that `kubectl get` shows.

Owns `age` and `duration_text`. Not here: reading the clock for anything else.
"""

from __future__ import annotations

from datetime import UTC, datetime


def age(stamp: str | None) -> str:
    """`4m45s` since an RFC 3339 time; `<unknown>` when there is none."""
    moment = parse_time(stamp)
    if moment is None:
        return "<unknown>"
    return duration_text((datetime.now(UTC) - moment).total_seconds())


def parse_time(stamp: str | None) -> datetime | None:
    if not stamp:
        return None
    try:
        moment = datetime.fromisoformat(stamp)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def duration_text(seconds: float) -> str:
    """Kubernetes' HumanDuration: two units at most, zero parts dropped."""
    if seconds < -1:
        return "<invalid>"
    total = max(0, int(seconds))
    if total < 120:
        return f"{total}s"
    minutes, hours, days = total // 60, total // 3600, total // 86400
    if minutes < 10:
        return _pair(minutes, "m", total % 60, "s")
    if minutes < 180:
        return f"{minutes}m"
    if hours < 8:
        return _pair(hours, "h", minutes % 60, "m")
    if hours < 48:
        return f"{hours}h"
    if days < 8:
        return _pair(days, "d", hours % 24, "h")
    if days < 730:
        return f"{days}d"
    return _pair(days // 365, "y", days % 365, "d") if days < 8 * 365 else f"{days // 365}y"


def _pair(big: int, big_unit: str, small: int, small_unit: str) -> str:
    return f"{big}{big_unit}{small}{small_unit}" if small else f"{big}{big_unit}"
