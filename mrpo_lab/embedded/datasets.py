"""The data sets ``synthetic`` and ``starter``, which need no download."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

from mrpo_lab.data.dataset import Dataset
from mrpo_lab.data.rows import Row
from mrpo_lab.embedded.synthetic import synthetic_rows


@dataclass(kw_only=True)
class SyntheticDataset(Dataset):
    """Pairs from a synthetic world with a known preference and noisy labels (``synthetic.py``)."""

    pairs: int
    """Number of pairs to generate."""
    label_noise: float = 0.1
    """Probability that a pair's labels are swapped."""
    data_seed: int = 0
    """Seed of the generator, independent of the run's seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_noise < 0.5:
            raise ValueError(f"label_noise must be in [0, 0.5), got {self.label_noise}")
        if self.data_seed < 0:
            raise ValueError(f"data_seed must be 0 or more, got {self.data_seed}")
        if self.pairs < 3:
            raise ValueError(f"pairs must be at least 3, got {self.pairs}")

    def rows(self) -> Iterator[tuple[str, Row]]:
        rows = synthetic_rows(self.pairs, self.data_seed, self.label_noise)
        return ((f"synthetic pair {index}", row) for index, row in enumerate(rows))


@dataclass(kw_only=True)
class StarterDataset(Dataset):
    """450 pairs written for this project.

    The chosen reply is, for example, correct, safe, concise or in the requested format, and the
    rejected one is not.
    """

    def rows(self) -> Iterator[tuple[str, Row]]:
        text = (resources.files("mrpo_lab.embedded") / "starter.jsonl").read_text(encoding="utf-8")
        lines = enumerate(text.strip().split("\n"), start=1)
        return ((f"starter.jsonl line {number}", json.loads(line)) for number, line in lines)
