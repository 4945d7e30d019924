"""The small files of a model's folder: configurations, and what tokenizers and templates are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mrpo_lab.errors import UserError, first_line

OBJECTS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
"""Small files that hold a JSON object each, as far as a folder has them."""


def check_small_files(folder: Path, name: str) -> None:
    """Check that what there is of a folder's configurations and templates can be read.

    Libraries pass over some of these files if they are damaged, and compute something else.

    Args:
        name: what messages call the model.

    Raises:
        UserError: names the file that is damaged.
    """
    for file in (folder / object_ for object_ in OBJECTS):
        if os.path.lexists(file):
            read_object(file, name)
    for file in (folder / "tokenizer.json", *sorted(folder.glob("*.jinja"))):
        if os.path.lexists(file):
            try:
                if file.suffix == ".jinja":
                    file.read_text(encoding="utf-8")
                else:
                    file.open("rb").close()
            except (OSError, ValueError) as error:
                raise _damaged(file, name, error) from error


def read_object(file: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a model's folder.

    Raises:
        UserError: it is no file, or holds no JSON object.
    """
    try:
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, name, error) from error
    return content


def _damaged(file: Path, name: str, error: Exception) -> UserError:
    problem = error.strerror if isinstance(error, OSError) else first_line(error)
    return UserError(f"{name}: {file} is damaged ({problem}): download it again")
