"""Bytes on disk: files, the cache, tables of numbers, the hub. Knows no prompts and replies."""
