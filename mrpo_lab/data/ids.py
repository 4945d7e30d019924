"""Content hashes of prompts and replies: the keys under which tables store their numbers."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable

import numpy as np

from mrpo_lab.data.texts import Item
from mrpo_lab.storage.tables import ID, NONE


def reply_ids(items: Iterable[Item]) -> np.ndarray:
    """The ids of all replies, (N, R): 16-byte hashes, each of a prompt and one reply to it.

    R is the largest number of replies; ``NONE`` stands where an item has fewer.
    """
    return text_ids(items)[1]


def text_ids(items: Iterable[Item]) -> tuple[np.ndarray, np.ndarray]:
    """16-byte hashes of the prompts alone, (N,), and ``reply_ids``, (N, R)."""
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
