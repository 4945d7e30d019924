"""Reading rows of preference data from files and the hub."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mrpo_lab.data.rows import Row
from mrpo_lab.errors import UserError, first_line
from mrpo_lab.storage import hub
from mrpo_lab.storage.files import local_path

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

DAMAGE = (OSError, EOFError, ValueError, MemoryError, zlib.error, csv.Error)
"""What pyarrow, gzip, csv and the system raise for a file that is damaged."""


def read_rows(
    path: str, split: str = "train", config: str | None = None
) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) from a local file, a local copy of a hub data set, or the hub.

    Args:
        path: a .jsonl, .json, .csv (each also .gz) or .parquet file, a folder in the hub's layout,
            or the name of a hub data set.
        split: the split of a hub data set; files have none.
        config: the configuration of a hub data set that has several.

    Raises:
        UserError: ``path`` does not exist, cannot be read or has no rows, or the hub cannot be
            reached.
    """
    local = local_path(path)
    if local.is_file():
        rows = _file_rows(local)
    elif local.is_dir() or not _looks_local(path):
        hub_rows = enumerate(_hub_rows(path, split, config))
        rows = ((f"{path}[{split}] row {index}", row) for index, row in hub_rows)
    else:
        raise UserError(f"dataset.path: there is no file or folder {path}")
    empty = True
    for where, row in rows:
        yield where, row
        empty = False
    if empty:
        raise UserError(f"{path}: no rows")


def _looks_local(path: str) -> bool:
    return (
        path.startswith(("/", ".", "~"))
        or path.endswith((*SUFFIXES, ".gz"))
        or not (re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path))
    )


def _hub_rows(path: str, split: str, config: str | None) -> Iterator[Row]:
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # They show downloads file by file, and log what is raised as well.
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    folder = local_path(path)
    reason = None if folder.is_dir() else hub.use_cache_if_unreachable()
    try:
        if any((folder / f).is_file() for f in ("dataset_info.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(folder)
            if isinstance(saved, datasets.DatasetDict) and split not in saved:
                raise ValueError(f"there is none, choose from {', '.join(saved)}")
            rows = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            rows = datasets.load_dataset(str(folder), config, split=split)
    except (ConnectionError, OfflineModeIsEnabled, HfHubHTTPError, DatasetNotFoundError) as error:
        refusal = reason or f"the hub refused it ({first_line(error)})"
        raise hub.NotAtHandError(path, refusal) from error
    except (OSError, KeyError, ValueError, DatasetsError) as error:
        hub.refuse_full_disk(error, datasets.config.HF_DATASETS_CACHE)
        damage = folder.is_dir() and isinstance(error, DatasetsError) and _damage(folder)
        problem = damage or _explained(error)
        raise UserError(f"dataset.path: {path}, split {split}: {problem}") from error
    yield from rows


def _explained(error: BaseException) -> str:
    """An error of ``datasets`` in one line, with the cause that its message leaves out."""
    text = str(error)
    if "Config name is missing" in text or "BuilderConfig" in text:
        choices = re.search(r"\[.*?\]", text, re.DOTALL)
        return f"choose its configuration, dataset.config, from {choices[0] if choices else text}"
    root = error
    while root.__cause__ is not None and not isinstance(root, (ConnectionError, KeyError)):
        root = root.__cause__
    lines = dict.fromkeys([first_line(error), first_line(root)])
    return ": ".join(lines)


def _damage(folder: Path) -> str | None:
    """Why ``datasets`` cannot read a folder's files as one table: which file is damaged, or which
    two differ in their columns; None if neither is found."""
    columns: dict[Path, list[str]] = {}
    for file in sorted(folder.rglob("*")):
        if not file.name.removesuffix(".gz").endswith((".jsonl", ".csv", ".parquet")):
            continue
        try:
            for where, row in _file_rows(file):
                if not isinstance(row, Mapping):
                    return f"{where}: expected an object, got {type(row).__name__}"
                columns.setdefault(file, list(row))
        except UserError as error:
            return str(error)
    for file, names in columns.items():
        first, expected = next(iter(columns.items()))
        odd = sorted({*names} ^ {*expected})
        if odd:
            return (
                f"{first} and {file} differ in their columns ({', '.join(odd)}): give one of the "
                "files as dataset.path, or each its own configuration"
            )
    return None


def _file_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a file.

    Raises:
        UserError: names the file, and the last row before the damage if some could be read.
    """
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: expected {', '.join(SUFFIXES)}, the text ones also with .gz")
    after = ""
    try:
        for where, row in _parquet(path) if suffix == ".parquet" else _text_rows(path, suffix):
            after = f" after {where.removeprefix(f'{path} ')}"
            yield where, row
    except DAMAGE as error:
        what = "damaged or no parquet file" if suffix == ".parquet" else "damaged"
        raise UserError(f"{path}: {what}{after}: {first_line(error)}") from error


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    _check_columns(file.schema_arrow.names, str(path))
    # The default, 65,536 rows, takes much memory as Python objects.
    rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
    yield from ((f"{path} row {index}", row) for index, row in enumerate(rows))


def _text_rows(path: Path, suffix: str) -> Iterator[tuple[str, Row]]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as raw:
        # utf-8-sig drops the byte order mark of spreadsheets; newline="" keeps line ends in texts.
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        yield from {".jsonl": _jsonl, ".json": _json, ".csv": _csv}[suffix](path, text)


def _jsonl(path: Path, text: io.TextIOWrapper) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(text, start=1):
        if line.strip():
            yield f"{path} line {number}", _loads(line, f"{path} line {number}")


def _json(path: Path, text: io.TextIOWrapper) -> Iterator[tuple[str, Row]]:
    content = text.read()
    try:
        rows = _loads(content, str(path))
    except UserError:
        first = content.lstrip().partition("\n")[0]
        if first.startswith("{") and first.rstrip().endswith("}"):  # one object a line
            rows = None
        else:
            raise
    if not isinstance(rows, list):
        raise UserError(
            f"{path}: expected a list of objects, one a pair; for one a line use .jsonl"
        )
    yield from ((f"{path} row {index}", row) for index, row in enumerate(rows))


def _csv(path: Path, text: io.TextIOWrapper) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader(text, strict=True)
    _check_columns(reader.fieldnames or (), str(path))
    for row in reader:
        if None in row:
            raise UserError(f"{path} line {reader.line_num}: more cells than columns")
        if None in row.values():
            raise UserError(f"{path} line {reader.line_num}: fewer cells than columns")
        yield f"{path} line {reader.line_num}", row


def _check_columns(names: Sequence[str], where: str) -> None:
    """Refuse a name that stands for two columns, of which only one could be read."""
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{where}: two columns are called {twice[0][:40]!r}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ."""
    made = dict(pairs)
    if len(made) < len(pairs):
        _check_columns([key for key, _ in pairs], "an object")
    return made


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:  # numbers of too many digits, too deep a nesting
        problem = first_line(error).partition(";")[0]
        raise UserError(f"{where}: JSON that cannot be read: {problem}") from error
