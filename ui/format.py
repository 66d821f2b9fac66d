"""Numbers, sizes and times as people read them."""

from __future__ import annotations

from datetime import UTC, datetime


def size(n_bytes: float | None) -> str:
    """Bytes in decimal units with three digits, e.g. `4.21 MB`; a dash if unknown."""
    if n_bytes is None:
        return "-"
    value, unit = float(n_bytes), "B"
    for next_unit in ("kB", "MB", "GB", "TB"):
        if abs(value) < 1000:
            break
        value, unit = value / 1000, next_unit
    return f"{value:.0f} B" if unit == "B" else f"{significant(value)} {unit}"


def significant(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits and no exponent, e.g. 4.21, 42.1, 421."""
    if value == 0:
        return "0"
    whole = len(f"{abs(value):.0f}") if abs(value) >= 1 else 1
    return f"{value:.{max(0, digits - whole)}f}"


def count(n: float | None) -> str:
    """A large count, e.g. `8.03 billion`, `1.52 million`, `970 thousand`; a dash if unknown."""
    if n is None:
        return "-"
    for scale, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if n >= scale:
            return f"{significant(n / scale)} {word}"
    return f"{n:.0f}"


def duration(seconds: float | None) -> str:
    """Seconds as `42 s`, `3 min 05 s` or `2 h 10 min`; a dash if unknown."""
    if seconds is None:
        return "-"
    total = max(0, round(seconds))
    if seconds < 10:
        return f"{max(0.0, seconds):.1f} s"
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def moment(value: object) -> datetime | None:
    """A stored time (datetime, ISO text or Unix seconds) as an aware datetime; None if there is none that reads."""
    if value is None or value == "":
        return None
    try:
        if isinstance(value, datetime):
            found = value
        elif isinstance(value, (int, float)):
            found = datetime.fromtimestamp(value, UTC)
        else:
            found = datetime.fromisoformat(str(value))
    except (ValueError, OverflowError, OSError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def ago(value: object, now: datetime | None = None) -> str:
    """How long ago a stored time was: `just now`, `5 min ago`, `3 h ago`, then the date."""
    at = moment(value)
    if at is None:
        return "-"
    seconds = ((now or datetime.now(UTC)) - at).total_seconds()
    if seconds < 60:
        return "just now"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min ago"
    if seconds < 86400:
        return f"{seconds // 3600:.0f} h ago"
    return at.astimezone().strftime("%Y-%m-%d")


def elapsed(start: object, end: object = None) -> float | None:
    """Seconds from `start` to `end` (to now if `end` is not set); None before the start."""
    begin = moment(start)
    if begin is None:
        return None
    return max(0.0, ((moment(end) or datetime.now(UTC)) - begin).total_seconds())


def clock(value: object) -> str:
    """A stored time as day and clock of this machine, `2026-01-31 14:05:09`; a dash if there is none."""
    at = moment(value)
    return f"{at.astimezone():%Y-%m-%d %H:%M:%S}" if at else "-"
