"""When the agent looks at a fast source: by being woken, by the clock, not while it is held back, and always again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from sandbox_gateway.agent.loop import Loop
from sandbox_gateway.agent.sources import Source


class Reader:
    """A pipe and the source that reads it, one byte at a look."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.reading, self.writing = os.pipe2(os.O_NONBLOCK)
        self.allowed = True
        self.found = 0
        self.source = Source(self.loop, self.reading, self.take, lambda: self.allowed)

    def take(self) -> tuple[int, bool]:
        try:
            count = len(os.read(self.reading, 1))
        except BlockingIOError:
            count = 0
        self.found += count
        return count, False

    def until(self, count: int) -> None:
        """Turn the loop until so many bytes were found, or half a minute is over."""
        deadline = time.monotonic() + 30
        while self.found < count and time.monotonic() < deadline:
            self.loop.later(0.01, lambda: None)
            self.loop.turn()
        assert self.found == count

    def close(self) -> None:
        self.source.close()
        self.loop.close()
        os.close(self.reading)
        os.close(self.writing)


@pytest.fixture
def reader() -> Iterator[Reader]:
    made = Reader()
    yield made
    made.close()


def test_all_of_a_burst_is_found(reader: Reader):
    os.write(reader.writing, b"x" * 200)
    reader.until(200)


def test_a_source_that_was_held_back_when_somebody_asked_is_looked_at_again(reader: Reader):
    """A flood is paced; the reply comes while the link takes no more; then the link takes again."""
    os.write(reader.writing, b"x" * 60)
    reader.until(50)
    assert reader.source._pace.paced
    reader.allowed = False
    reader.source.relax()
    reader.source.look()
    for _ in range(5):
        reader.loop.later(0.01, lambda: None)
        reader.loop.turn()
    assert reader.found == 50, "nothing is taken while it is held back"
    reader.allowed = True
    reader.until(60)
    os.write(reader.writing, b"x")
    reader.until(61)
