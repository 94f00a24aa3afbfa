"""Figures for the link: ``python tests/link/bench.py``. A child process plays the agent over two pipes.

Prints messages per second and MB/s in both directions, and the round trip of a small message.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
import time

from sandbox_gateway.link import Link
from sandbox_gateway.wire.endpoint import AgentEndpoint
from sandbox_gateway.wire.events import Message
from sandbox_gateway.wire.reliable import Outbox

SMALL = [b"kernel.stream.stdout", b"<IDS|MSG>", b"s" * 64, b"h" * 200, b"p" * 200, b"{}", b"c" * 60]


def agent(read_fd: int, write_fd: int) -> None:
    """Blocking loop: ``N size`` on channel 1 asks for N messages on channel 4, other messages are sent back."""
    endpoint = AgentEndpoint(Outbox(1 << 30, 1 << 30))
    while data := os.read(read_fd, 1 << 20):
        for event in endpoint.feed(data):
            if isinstance(event, Message) and event.channel == 1:
                count, size = map(int, bytes(event.parts[0]).split())
                big = os.urandom(size) if size else b""
                for _ in range(count):
                    endpoint.send(4, [*SMALL, big] if size else SMALL)
            elif isinstance(event, Message) and event.channel == 2:
                endpoint.send(2, event.parts)
            elif isinstance(event, Message) and event.channel == 3 and bytes(event.parts[0]) == b"end":
                endpoint.send(3, [b"end"])
        endpoint.request_ack()
        while endpoint.wants_write:
            buffers = endpoint.output()
            if buffers:
                endpoint.wrote(os.writev(write_fd, buffers))
    os._exit(0)


async def measure() -> None:
    """Run the child and time it."""
    host_read, agent_write = os.pipe()
    agent_read, host_write = os.pipe()
    for fd in (host_read, host_write):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 1 << 20)
    pid = os.fork()
    if not pid:
        os.close(host_read)
        os.close(host_write)
        agent(agent_read, agent_write)
    os.close(agent_read)
    os.close(agent_write)
    got = 0
    size = 0
    wanted: tuple[int, asyncio.Future[None]] | None = None

    def on_message(channel: int, parts: list[bytes | memoryview]) -> None:
        nonlocal got, size
        got += 1
        size += sum(map(len, parts))
        if wanted is not None and got >= wanted[0]:
            wanted[1].set_result(None)

    link = Link(
        host_read,
        host_write,
        on_message=on_message,
        on_gap=lambda *args: print("gap", args),
        on_event=print,
        on_lost=print,
        limit_bytes=1 << 30,
    )
    await link.attach(owner="bench", timeout=5)

    async def run(label: str, count: int, start: list[tuple[int, list[bytes]]], sent: int = 0) -> None:
        nonlocal got, size, wanted
        got = size = 0
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        wanted = count, done
        began, cpu = time.perf_counter(), time.process_time()
        for channel, parts in start:
            link.send(channel, parts)
        await done
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
        moved, number = max(size, sent), max(got, len(start) - 1)
        print(
            f"{label:34} {number / took:10,.0f} messages/s {moved / took / 1e6:8,.0f} MB/s  host CPU {cpu / took:4.0%}"
        )

    small = sum(map(len, SMALL))
    for _ in range(2):
        await run("agent -> host, small", 100_000, [(1, [b"100000 0"])])
        await run("host -> agent, small", 1, [(4, SMALL)] * 50_000 + [(3, [b"end"])], 50_000 * small)
        await run("agent -> host, 12 MB", 20, [(1, [b"20 12000000"])])
        big = os.urandom(12_000_000)
        await run("host -> agent, 12 MB", 1, [(4, [*SMALL, big])] * 20 + [(3, [b"end"])], 20 * len(big))
    times = []
    for _ in range(1000):
        began = time.perf_counter()
        got = 0
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        wanted = 1, done
        link.send(2, SMALL)
        await done
        times.append(time.perf_counter() - began)
    print(f"{'round trip of a small message':34} {sorted(times)[500] * 1e6:10,.0f} us (median)")
    await link.close()
    os.waitpid(pid, 0)


if __name__ == "__main__":
    sys.exit(asyncio.run(measure()))
