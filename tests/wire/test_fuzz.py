"""A bounded fuzz run; ``python tests/wire/fuzz.py --seconds N`` goes on for longer."""

from __future__ import annotations

import random

from fuzz import fuzz


def test_no_mutated_stream_raises_hangs_or_grows() -> None:
    seed = random.SystemRandom().randrange(2**40)
    assert fuzz(5.0, seed, inputs=400) > 0, seed
