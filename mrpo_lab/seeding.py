"""Independent, named streams of random numbers from one seed."""

import zlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Seeds:
    """Random streams of one run. Each depends only on ``root`` and the stream's own name.

    Attributes:
        root: the seed that a paper reports, 0 or more.
    """

    root: int

    def __post_init__(self) -> None:
        if self.root < 0:
            raise ValueError(f"root must be 0 or more, got {self.root}")

    def value(self, stream: str, *index: int) -> int:
        """A 32-bit seed for ``stream``, a pure function of (root, stream, index)."""
        entropy = [self.root, zlib.crc32(stream.encode()), *index]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def rng(self, stream: str, *index: int) -> np.random.Generator:
        """A new numpy generator for ``stream``, seeded by ``value``."""
        return np.random.default_rng(self.value(stream, *index))
