"""Counts and durations in words."""


def format_count(number: int, noun: str) -> str:
    """A number with its noun: 1 run, 2 runs, 1,000 runs."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_duration(seconds: float) -> str:
    """A duration with at most two units: 1 d 3 h, 2 h 10 min, 4 min or 12 s."""
    minutes = round(seconds / 60)
    if minutes >= 24 * 60:
        return f"{minutes // (24 * 60)} d {minutes // 60 % 24} h"
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes >= 2 else f"{seconds:.0f} s"
