"""The project's dependencies: their lower bounds as pins, and their licences as a page.

``python tests/dependencies.py oldest`` prints constraints for pip; ``licenses`` prints
docs/licenses.md and fails on a licence that it does not know.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAMILIES = {
    "Apache-2.0": r"apache",
    "BSD": r"\bbsd\b",
    "MIT": r"\bmit\b",
    "MPL-2.0": r"\bmpl\b|mozilla",
    "PSF-2.0": r"\bpsf\b",
    "ISC": r"\bisc\b",
    "0BSD": r"\b0bsd\b",
    "Zlib": r"\bzlib\b",
    "BSL-1.0": r"\bbsl\b",
    "CC0-1.0": r"\bcc0\b",
    "CNRI-Python": r"\bcnri\b",
    "LLVM-exception": r"\bllvm-exception\b",
}
"""Licences that the project can be used and given away with, and how packages write them."""


def oldest() -> Iterator[str]:
    """Each direct dependency at its lower bound; torch stays at the pin of requirements.lock."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        bound = re.match(r"([\w-]+)>=([\w.]+)", requirement)
        if bound is None:
            raise ValueError(f"pyproject.toml: {requirement} has no lower bound")
        if bound[1] != "torch":
            yield f"{bound[1]}=={bound[2]}"


def locked() -> list[str]:
    """Names of all packages in requirements.lock."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [line.partition("==")[0] for line in lines if "==" in line]


def licence(package: str) -> str:
    """What an installed package says of its licence, in a line.

    Raises:
        ValueError: that is none of ``FAMILIES``.
    """
    found = metadata(package)
    classifiers = found.get_all("Classifier") or []
    named = [c.rpartition(" :: ")[2] for c in classifiers if c.startswith("License :: ")]
    texts = found.get_all("License") or [""]
    first = texts[0].strip().partition("\n")[0].strip()
    for text in (*(found.get_all("License-Expression") or []), " OR ".join(named), first):
        if text and all(known(term) for term in re.split(r" AND | OR | WITH ", text)):
            return str(text)
    raise ValueError(f"{package}: unknown licence {named or first!r}: read it, then add it here")


def known(term: str) -> bool:
    return any(re.search(pattern, term, re.I) for pattern in FAMILIES.values())


def page() -> str:
    """docs/licenses.md.

    Raises:
        ValueError: a licence is unknown.
        PackageNotFoundError: a package of requirements.lock is not installed.
    """
    rows = [f"| {name} | {licence(name)} |" for name in sorted(locked(), key=str.lower)]
    return "\n".join(
        [
            "# Licences of the dependencies",
            "",
            "mrpo_lab is under Apache-2.0 ([LICENSE](../LICENSE)). `make licenses` writes this",
            "page from what the packages of `requirements.lock` say of themselves, and stops at a",
            "licence that is not known to allow use and redistribution.",
            "",
            "| package | licence |",
            "| --- | --- |",
            *rows,
            "",
        ]
    )


def main(what: str) -> None:
    try:
        sys.stdout.write(page() if what == "licenses" else "\n".join([*oldest(), ""]))
    except (ValueError, PackageNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1])
