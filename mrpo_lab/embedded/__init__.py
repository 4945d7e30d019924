"""Models and data sets that need no download from the hub."""

import functools
import logging
from pathlib import Path

from filelock import FileLock

from mrpo_lab.errors import UserError
from mrpo_lab.storage import cache
from mrpo_lab.storage.files import replacing_folder
from mrpo_lab.storage.manifests import check_manifest, write_manifest

logger = logging.getLogger(__name__)


def folder(name: str) -> Path:
    """The folder of an embedded model.

    Args:
        name: ``smollm2``, which ``make smollm2`` fetches, or ``tiny7/SLUG``, built at first use.

    Raises:
        UserError: there is no such model, smollm2 was not fetched yet, or a file is damaged.
    """
    models = cache.root() / "models"
    if name == "smollm2":
        if not (models / name).is_dir():
            raise UserError("embedded:smollm2 is not there yet: run `make smollm2` once")
        _check(models / name, "run `make smollm2` again")
        return models / name
    from mrpo_lab.embedded import tiny7  # imports torch

    group, _, slug = name.partition("/")
    if group != "tiny7" or slug not in tiny7.SLUGS:
        known = ["smollm2", *(f"tiny7/{slug}" for slug in tiny7.SLUGS)]
        raise UserError(f"embedded:{name}: there is no such model; choose from {', '.join(known)}")
    root = models / f"tiny7-{tiny7.DIGEST}"
    if not root.exists():
        with cache.writing():
            models.mkdir(parents=True, exist_ok=True)
            with FileLock(models / ".tiny7.lock"):
                if not root.exists():
                    with replacing_folder(root) as draft:
                        tiny7.build(draft)
                        write_manifest(draft, root.name)
    _check(root, "it will be built again")
    return root / slug


@functools.cache  # once a process
def _check(root: Path, remedy: str) -> None:
    """Check the files of a model against their checksums.

    Raises:
        UserError: a file is damaged, missing or new.
    """
    if not check_manifest(root, remedy):
        logger.info("%s: built by an earlier version: its files have no checksums", root)
