"""Keys, tokens and passwords: recognized by their form, so that none is stored with a run."""

from __future__ import annotations

import re

SECRET = re.compile(
    r"""
      \b(?:sk|rk|pk)-[\w-]{16,}                        # OpenAI, Anthropic and others
    | \bhf_\w{16,}                                     # Hugging Face
    | \bgh[pousr]_\w{16,} | \bgithub_pat_\w{16,} | \bglpat-[\w-]{16,}
    | \bwandb_v\d_\w{16,} | \bxox[a-z]-[\w-]{10,}
    | \bAKIA[0-9A-Z]{16}\b | \bAIza[\w-]{30,}
    | \beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+             # JSON web token
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----
    | (?<=://)[^\s/@:]*:[^\s/@]+(?=@)                  # https://user:password@host
    | (?<![^\W_])(?:password|passwd|secret|token|api_?key|access_?key)["']?\s*[=:]\s*
      (?!["']?(?:[$<\s]|null\b|None\b|true\b|false\b|$))\S+
    | (?<!revision[=:])(?<!revision[=:]["'\ ])(?<!commit[=:])(?<!commit[=:]["'\ ])
      (?<![\w/.@-])[0-9a-f]{40}(?![\w/.@-])            # W&B; after revision= it is a commit
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""Matches what looks like a key, token or password."""


def redact(text: str) -> str:
    """``text`` with ``[redacted]`` in place of everything that looks like a secret."""
    return SECRET.sub("[redacted]", text)


def holds_secret(text: str) -> bool:
    """Whether some part of ``text`` looks like a key, token or password."""
    return SECRET.search(text) is not None
