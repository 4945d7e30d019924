"""One integer fans out into independent named streams."""

import zlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Seeds:
    """``root`` is what a paper reports; a stream depends on it and on its own name alone."""

    root: int

    def __post_init__(self) -> None:
        if self.root < 0:
            raise ValueError(f"root must be 0 or more, got {self.root}")

    def value(self, stream: str, *index: int) -> int:
        """A 32-bit seed, a pure function of (root, stream, index)."""
        entropy = [self.root, zlib.crc32(stream.encode()), *index]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def rng(self, stream: str, *index: int) -> np.random.Generator:
        """A fresh numpy generator for ``stream``."""
        return np.random.default_rng(self.value(stream, *index))
