"""Numbers in words."""


def counted(number: int, thing: str) -> str:
    """1 run, 2 runs."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """1 d 3 h, 2 h 10 min, 4 min or 12 s."""
    minutes = round(seconds / 60)
    if minutes >= 24 * 60:
        return f"{minutes // (24 * 60)} d {minutes // 60 % 24} h"
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes >= 2 else f"{seconds:.0f} s"
