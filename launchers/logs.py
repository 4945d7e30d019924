"""The last output of a run and its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from launchers.sweep import Record, Sweep
from mrpo_lab.errors import UserError
from mrpo_lab.wording import format_count


def show_log(sweeps: Sequence[Sweep], part: str, lines: int) -> str:
    """The last ``lines`` of output and the traceback of the task whose title contains ``part``.

    Raises:
        UserError: no task or several have such a title.
    """
    found: dict[str, Record | None] = {}
    for sweep in sweeps:
        found.update(sweep.last_records())
    titles = [part] if part in found else [title for title in found if part in title]
    if not titles:
        close = difflib.get_close_matches(part, found, n=1)
        guess = f", did you mean {close[0]}?" if close else ""
        raise UserError(
            f"{part}: none of {format_count(len(found), 'task')} has that in its name{guess}"
        )
    if len(titles) > 1:
        shown = "\n  ".join(titles[:20])
        raise UserError(f"{part}: {len(titles)} tasks have that in their name:\n  {shown}")
    (title,) = titles
    record = found[title]
    if record is None:
        return f"{title}: its job has not begun, or was cancelled before it did"
    tail = []
    if record.log and Path(record.log).is_file():
        text = Path(record.log).read_text(errors="replace").replace("\r", "\n")
        tail = [line for line in text.splitlines() if line.strip()][-lines:]
    head = f"{title}: {record.state}, job {record.job} on {record.host}, log {record.log}"
    output, raised = "\n".join(tail), record.traceback.strip()
    parts = [head, output, "" if raised in output else raised]
    return "\n".join(each for each in parts if each)
