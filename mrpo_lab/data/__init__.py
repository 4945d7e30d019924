"""From rows on the hub or on disk to pairs, filters and splits."""

from mrpo_lab.data.dataset import Dataset, FileDataset, Prepared
from mrpo_lab.data.rows import parse_item, read_rows

__all__ = ["Dataset", "FileDataset", "Prepared", "parse_item", "read_rows"]
