"""A real owner process killed with -9 at any moment: its successors continue with nothing lost and nothing doubled."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from pathlib import Path

from peer import Peer, fifos, open_both

from sandbox_gateway.link import Link

OWNER = """
import asyncio, os, sys
from sandbox_gateway.link import Link
out, into, journal = sys.argv[1:]
flags = os.O_RDWR | os.O_NONBLOCK
log = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

async def main():
    def received(channel, parts):
        os.write(log, bytes(parts[0]) + b"\\n")
    link = Link(os.open(out, flags), os.open(into, flags), on_message=received,
                on_gap=print, on_event=print, on_lost=print)
    with open(journal, "rb") as file:
        have = len(file.read().splitlines())
    await link.attach({4: have}, owner="child", timeout=20)
    while True:
        link.send(1, [b"request", os.urandom(100_000)])
        await link.drain(400_000)

asyncio.run(main())
"""


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


async def test_owners_killed_at_random_moments_lose_and_double_nothing(tmp_path: Path) -> None:
    source = random.Random(11)
    journal = tmp_path / "journal"
    journal.touch()
    total = 0
    with fifos() as (into, out):
        peer = Peer(open_both(into), open_both(out))
        for _ in range(6):
            owner = await asyncio.create_subprocess_exec(
                sys.executable, "-c", OWNER, str(out), str(into), str(journal), env=ENVIRONMENT
            )
            try:
                before = len(peer.messages)
                enough = source.randrange(5, 40)
                async with asyncio.timeout(30):
                    while len(peer.messages) - before < enough:
                        for _ in range(10):
                            peer.send(4, [b"%d" % total, source.randbytes(source.choice([10, 5_000, 90_000]))])
                            total += 1
                        seen = len(peer.messages)
                        await peer.until(lambda seen=seen: len(peer.messages) > seen, 20)
            finally:
                owner.send_signal(signal.SIGKILL)
                await owner.wait()
        got: list[bytes] = []
        have = len(journal.read_bytes().splitlines())
        done = asyncio.Event()

        def received(channel: int, parts: list[bytes | memoryview]) -> None:
            got.append(bytes(parts[0]))
            if len(got) + have == total:
                done.set()

        link = Link(
            open_both(out),
            open_both(into),
            on_message=received,
            on_gap=lambda *gap: got.append(b"gap"),
            on_event=lambda event: None,
            on_lost=lambda error: None,
        )
        total += 1
        await link.attach({4: have}, owner="last", timeout=20)
        peer.send(4, [b"%d" % (total - 1)])
        await asyncio.wait_for(done.wait(), 20)
        await link.close()
        peer.close()
    assert journal.read_bytes().splitlines() + got == [b"%d" % number for number in range(total)]
    assert all(channel == 1 and parts[0] == b"request" and len(parts[1]) == 100_000 for channel, parts in peer.messages)
