"""The programs of the tutorial do what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from acceptance import Product

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorial" / "python-api.md"
PROGRAMS = re.findall(r"^## (.*?)\n.*?^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
PRINTED = {
    "Run a cell": ["it printed 2", "count=1)\nDone(status='ok', count=1)"],
    "All at once": ["hello\n 42 1", "error ZeroDivisionError", "hello world", "timeout"],
    "Suspend it in the middle of a cell": ["suspended None", "19\\n", "Done(status='ok', count=1)"],
    "Go on in another program": ["19\\n", "Done(status='ok', count=1)\n19\n"],
    "Multiply it": ["45 ", "46 ", "47 ", "\n10\n"],
}


def test_each_program_of_the_page_is_tried() -> None:
    assert [title for title, _ in PROGRAMS] == list(PRINTED)


@pytest.mark.parametrize(("title", "program"), PROGRAMS, ids=[title for title, _ in PROGRAMS])
def test_a_program_of_the_tutorial_prints_what_it_says(installation: Product, title: str, program: str) -> None:
    before = installation.ids()
    # On a busy machine a cell of two seconds may be over before it is suspended.
    program = program.replace("time.sleep(0.1)", "time.sleep(0.4)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    at = 0
    for text in PRINTED[title]:
        at = done.stdout.find(text, at)
        assert at >= 0, f"{text!r} in {done.stdout!r}"
    if title == "Multiply it":
        assert installation.command("snapshot", "rm", "prepared").returncode == 0
    assert installation.ids() == before
