"""From rows on the hub or on disk to pairs and lists, filters and splits."""

from mrpo_lab.data.dataset import Dataset, FileDataset, Prepared
from mrpo_lab.data.items import Items
from mrpo_lab.data.lists import ListDataset
from mrpo_lab.data.rows import parse_item, read_rows

__all__ = ["Dataset", "FileDataset", "Items", "ListDataset", "Prepared", "parse_item", "read_rows"]
