"""What a terminal, a pipe and a calling shell get: text, exit codes, locks of files."""

import io
import logging
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from filelock import FileLock
from rich.text import Text

from launchers.sweep import Plan, Sweep
from launchers.tasks import Train
from launchers.watching import show_status, watch
from mrpo_lab.cli import exit_on_user_error, fail
from mrpo_lab.console import UNPRINTABLE, plain_text, printable, show, text_table
from mrpo_lab.errors import UserError
from mrpo_lab.progress import quiet_libraries
from mrpo_lab.storage.files import is_locked
from mrpo_lab.wording import format_count

LONG = "paper/saferlhf/qwen2_5_0_5b/mdpo-vaw-paper7/s0__" + "loss.beta=0.5," * 20 + ":x:[red]"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 60 columns, to which stdout can be redirected."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def test_plain_table_is_aligned_and_never_cut() -> None:
    table = text_table("run", "val", "error", right=("val",))
    table.add_row(LONG, "0.5", "")
    table.add_row("b", "0.25", "[Errno 2] none")
    head, first, second = plain_text(table).splitlines()
    assert head == f"{'run':<{len(LONG)}}   val  error"
    assert first == f"{LONG}   0.5"
    assert second == f"{'b':<{len(LONG)}}  0.25  [Errno 2] none"


def test_a_pipe_gets_plain_text_in_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show(Text(LONG, style="red"))
    show(f"runs: {LONG}")
    assert capsys.readouterr().out == f"{LONG}\nruns: {LONG}\n"


def test_a_terminal_gets_every_character_of_a_name(terminal: Terminal) -> None:
    table = text_table("run")
    table.add_row("long" * 30)
    with redirect_stdout(terminal):
        show(table)
        show(LONG)
    cells = terminal.getvalue().splitlines()[1:-1]
    assert len(cells) == 2
    assert "".join(cell.strip() for cell in cells) == "long" * 30
    assert LONG in terminal.getvalue()  # the terminal wraps it


def sweep_of_one_run(folder: Path) -> Sweep:
    sweep = Sweep(folder / "sweeps" / "s")
    sweep.folder.mkdir(parents=True)
    sweep.write_plan(Plan(runs={LONG: {"overrides": [], "conf": "", "scores": []}}))
    return sweep


def test_status_in_a_pipe_has_whole_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = sweep_of_one_run(tmp_path)
    sweep.new_array([Train("", LONG, [], "", [])], "local")
    show_status(sweep)
    assert f"\n      {LONG}\n" in capsys.readouterr().out


def test_watching_is_live_on_a_terminal_and_a_line_elsewhere(
    tmp_path: Path, terminal: Terminal
) -> None:
    sweep = sweep_of_one_run(tmp_path)
    with redirect_stdout(terminal):
        assert not watch(sweep)
    assert "\x1b[" in terminal.getvalue()
    assert "s: 1 run: 1 new" in terminal.getvalue()
    pipe = io.StringIO()
    with redirect_stdout(pipe):
        assert not watch(sweep)
    assert pipe.getvalue() == "s: 1 run: 1 new\n"


@pytest.mark.parametrize(
    ("raised", "code", "shown"),
    [
        (None, 7, ""),
        (UserError("seed: what?"), 2, "error: seed: what?\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(
    raised: BaseException | None, code: int, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @exit_on_user_error
    def main(number: int) -> int:
        if raised:
            raise raised
        return number

    assert main(7) == code
    assert capsys.readouterr().err == shown


def test_lock_of_a_file_is_seen_while_it_is_held(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    assert not is_locked(file)
    with FileLock(file):
        assert is_locked(file)
    assert not is_locked(file)


def test_counts_in_words() -> None:
    assert [format_count(n, "run") for n in (0, 1, 1200)] == ["0 runs", "1 run", "1,200 runs"]


HOSTILE = "a\x1b]0;title\x07\x1b[2Jb\u202ec\x9b31m\udc80"


def test_names_and_texts_of_runs_cannot_control_a_terminal(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    table = text_table("run")
    table.add_row(HOSTILE)
    with redirect_stdout(terminal):
        show(table)
        show(HOSTILE)
    show(HOSTILE)
    show(table)
    fail(HOSTILE)
    quiet_libraries()
    with redirect_stdout(io.StringIO()) as log:
        handler = logging.StreamHandler(log)
        handler.emit(logging.getLogger("x").makeRecord("x", 20, "f", 1, "%s", (HOSTILE,), None))
    printed, error = capsys.readouterr()
    (_, *lines) = terminal.getvalue().splitlines()  # the header of the table is bold
    for text in (printed, error, log.getvalue(), "".join(line.strip() for line in lines)):
        assert not UNPRINTABLE.search(text), repr(text)
        assert "\\x1b[2Jb\\u202ec" in text
    assert printable("tab\tnewline\n日本 é") == "tab\tnewline\n日本 é"
