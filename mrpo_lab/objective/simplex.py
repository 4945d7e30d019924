"""Grid points of the probability simplex."""

import itertools
import math
from collections.abc import Iterator


def grid(resolution: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yield all ways to divide ``resolution`` units among ``parts``, in lexicographic order."""
    for bars in itertools.combinations(range(resolution + parts - 1), parts - 1):
        ends = (-1, *bars, resolution + parts - 1)
        yield tuple(b - a - 1 for a, b in itertools.pairwise(ends))


def grid_size(resolution: int, parts: int) -> int:
    """Number of points that ``grid`` yields."""
    return math.comb(resolution + parts - 1, parts - 1)
