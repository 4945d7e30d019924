"""Bytes on disk: the cache, tables of numbers, the hub; knows nothing of prompts and replies."""
