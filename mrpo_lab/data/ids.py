"""Content hashes of prompts and replies, under which tables store their numbers."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable

import numpy as np

from mrpo_lab.data.texts import Item
from mrpo_lab.storage.tables import ID, NONE


def reply_ids(items: Iterable[Item]) -> np.ndarray:
    """(N, R) ids, each the 16-byte hash of a prompt and one reply to it; ``NONE`` where an item
    has fewer than R replies."""
    return text_ids(items)[1]


def text_ids(items: Iterable[Item]) -> tuple[np.ndarray, np.ndarray]:
    """(N,) hashes of the prompts alone, and ``reply_ids``."""
    prompts, digests, replies = bytearray(), bytearray(), array("q")
    for item in items:
        turns = json.dumps([[m["role"], m["content"]] for m in item.prompt])
        prompt = hashlib.blake2b(turns.encode()).digest()
        prompts += prompt[: ID.itemsize]
        for reply in item.replies:
            content = prompt + reply.encode(errors="surrogatepass")
            digests += hashlib.blake2b(content, digest_size=ID.itemsize).digest()
        replies.append(len(item.replies))
    ids = np.full((len(replies), max(replies, default=1)), NONE, dtype=ID)
    ids[np.arange(ids.shape[1]) < np.array(replies)[:, None]] = np.frombuffer(digests, dtype=ID)
    return np.frombuffer(prompts, dtype=ID), ids
