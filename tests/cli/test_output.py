"""What the commands write."""

from __future__ import annotations

import io
import threading
import time

import pytest

from sandbox_gateway.cli import output
from sandbox_gateway.cli.output import ProgressLine, age, clean, clean_log, size, write_table
from sandbox_gateway.model import timestamp


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, ""), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (50 * 1024**2, "50 MiB"), (3 * 1024**4, "3.0 TiB")],
)
def test_a_size_is_short(count: int | None, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (172800, "2 days")]
)
def test_an_age_is_short(seconds: float, text: str) -> None:
    assert age(1000.0, 1000.0 + seconds) == text


def test_a_timestamp_is_utc() -> None:
    assert timestamp(0.5) == "1970-01-01T00:00:00.500Z"


def test_text_of_others_is_one_line_without_control_characters() -> None:
    assert clean("a\nb\x1b[2J\u202ec\x9b") == "a b�[2J�c�"


def test_a_log_keeps_lines_tabs_and_colours_only() -> None:
    assert clean_log("a\tb\r\n\x1b[31mred\x1b[0m\x1b]52;c;x\x07\x08") == "a\tb\r\n\x1b[31mred\x1b[0m�]52;c;x��"


def test_a_table_leaves_out_columns_that_are_empty(capsys: pytest.CaptureFixture[str]) -> None:
    write_table(("ID", "MEMORY", "NAME"), [("abc", "", "x"), ("d", "", "yy")])
    assert capsys.readouterr().out == "ID   NAME\nabc  x\nd    yy\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_moves_on_one_line_and_leaves_none() -> None:
    stream = Terminal()
    with ProgressLine(stream) as progress:
        progress.update("building", "1 %")
        progress.update("building", "2 %")
    assert stream.getvalue() == "\r\x1b[Kbuilding 1 %\r\x1b[Kbuilding 2 %\r\x1b[K"


def test_what_ends_within_a_second_says_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "PATIENCE", 60.0)  # the machine may be busy
    stream = io.StringIO()
    with ProgressLine(stream) as progress:
        progress.update("quick")
    assert stream.getvalue() == ""


def test_what_takes_longer_says_what_it_does_once_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "PATIENCE", 0.01)
    shown = threading.Event()

    class Stream(io.StringIO):
        def flush(self) -> None:
            shown.set()

    stream = Stream()
    with ProgressLine(stream) as progress:
        progress.update("building a layer", "1 %")
        assert shown.wait(10)
        shown.clear()
        progress.update("building a layer", "2 %")
        progress.update("next")
        assert shown.wait(10)
    assert stream.getvalue() == "building a layer\nnext\n"


def test_many_steps_in_a_moment_are_one_line_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several sandboxes that are worked on at once take turns on the line."""
    monkeypatch.setattr(output, "PATIENCE", 0.2)
    stream = io.StringIO()
    begun = time.monotonic()
    with ProgressLine(stream) as progress:
        while time.monotonic() - begun < 0.7 or not stream.getvalue():
            progress.update(f"step at {time.monotonic()}")
    assert len(stream.getvalue().splitlines()) <= (time.monotonic() - begun) / 0.2 + 1


def test_a_closed_stderr_does_not_stop_the_work() -> None:
    stream = Terminal()
    progress = ProgressLine(stream)
    stream.close()
    progress.update("x")
