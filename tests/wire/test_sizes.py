"""Reads grow with what comes, and shrink again."""

from __future__ import annotations

from sandbox_gateway.wire.sizes import LARGE, PATIENCE, SMALL, ReadSize


def test_a_read_that_is_filled_is_followed_by_large_ones_until_little_comes_for_a_while() -> None:
    size = ReadSize()
    assert size.next == SMALL and not size.filled(300) and size.next == SMALL
    assert size.filled(SMALL) and size.next == LARGE
    for _ in range(PATIENCE - 1):
        assert not size.filled(300) and size.next == LARGE
    assert size.filled(LARGE) and not size.filled(SMALL) and size.next == LARGE
    for _ in range(PATIENCE):
        assert size.next == LARGE and not size.filled(0)
    assert size.next == SMALL
