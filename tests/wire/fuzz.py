"""A fuzz run of the wire: ``python tests/wire/fuzz.py --seconds 60 [--seed N]``.

Streams of valid frames are mutated (bits, cuts, repeats, swaps, insertions, forged lengths with a right checksum) and
fed to fresh or attached endpoints of both roles. Nothing may raise, memory stays within the bound, and no call may
take long. A failure prints the seed that repeats it.
"""

from __future__ import annotations

import argparse
import random
import struct
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from sandbox_gateway.wire.endpoint import AgentEndpoint, Endpoint, HostEndpoint
from sandbox_gateway.wire.events import StreamOpened
from sandbox_gateway.wire.frames import Frame, Kind, encode
from sandbox_gateway.wire.handshake import Attach, Hello
from sandbox_gateway.wire.messages import pack
from sandbox_gateway.wire.reliable import Gap, Outbox, encode_ack, encode_gap

NONCE = "0123456789abcdef"
MAX_MEMORY = 24 * 1024 * 1024
MAX_SECONDS = 2.0
"""Of this thread's processor time, for one input of at most about 300 KB, with memory tracing: far above the usual
milliseconds."""


def endpoints() -> list[Endpoint]:
    """One of each role, new and attached, with some messages under way."""
    fresh_agent = AgentEndpoint(Outbox(100_000, 200_000), max_message=1_000_000)
    attaching = HostEndpoint(Outbox(), max_message=1_000_000)
    attaching.attach(NONCE)
    host = HostEndpoint(Outbox(), max_message=1_000_000)
    agent = AgentEndpoint(Outbox(100_000, 200_000, keep_acked=True), max_message=1_000_000)
    agent.send(4, [b"x" * 1000])
    host.attach(NONCE)
    agent.feed(b"".join(host.output()))
    host.feed(b"".join(agent.output()))
    host.send(1, [b"y" * 1000])
    host.open_stream("log", {})
    return [fresh_agent, attaching, host, agent]


def frame(source: random.Random) -> bytes:
    """One frame that is valid as such, but not necessarily in its place."""
    kind = source.choice(list(Kind))
    payload: bytes
    match kind:
        case Kind.ATTACH:
            payload = Attach(NONCE, received={4: source.randrange(3)}).to_payload()
        case Kind.HELLO:
            payload = Hello(NONCE, received={1: source.randrange(2)}, resumes={4: source.randrange(3)}).to_payload()
        case Kind.MESSAGE:
            payload = b"".join(
                pack([source.randbytes(source.choice([0, 5, 3000])) for _ in range(source.randrange(5))])
            )
        case Kind.ACK:
            payload = encode_ack({source.randrange(5): source.randrange(3)})
        case Kind.GAP:
            payload = encode_gap(Gap(4, 1, 3, 3, 10))
        case Kind.OPEN:
            payload = b'{"kind":"log","params":{}}'
        case _:
            payload = source.choice([b"", source.randbytes(4), b'{"error":"x"}', b"[" * 5000])
    channel = source.choice([0, 1, 4, 16, 17, 19, source.randrange(0x10000)])
    return b"".join(
        encode(
            Frame(kind, channel, source.choice([0, 1, 1, 1, 1, 2]), source.randrange(4), source.randrange(5), payload)
        )
    )


def forged(source: random.Random) -> bytes:
    """A header with random fields and a right checksum."""
    payload = source.randbytes(source.randrange(40))
    head = struct.pack(
        "!2sBBHHIQI",
        b"SG",
        source.randrange(14),
        source.randrange(256),
        source.randrange(0x10000),
        source.choice([0, 0, 0, 1]),
        source.choice([1, source.randrange(2**32)]),
        source.choice([1, source.randrange(2**64)]),
        source.choice([len(payload), source.randrange(2**32)]),
    )
    return head + struct.pack("!I", zlib.crc32(payload, zlib.crc32(head))) + payload


def mutated(source: random.Random) -> bytes:
    """A stream of frames with up to ten accidents."""
    pieces = [source.choice([frame, frame, frame, forged])(source) for _ in range(source.randrange(1, 40))]
    data = bytearray(b"".join(pieces))
    for _ in range(source.choice([0, 0, 1, 3, 10])):
        if not data:
            break
        at = source.randrange(len(data))
        upto = min(len(data), at + source.choice([1, 10, 1000]))
        match source.randrange(5):
            case 0:
                data[at] ^= 1 << source.randrange(8)
            case 1:
                del data[at:upto]
            case 2:
                data[at:at] = data[at:upto] * source.choice([1, 50])
            case 3:
                data[at:at] = source.randbytes(source.randrange(100))
            case _:
                data[at:at] = b"SG" * source.randrange(1000)
    return bytes(data[:300_000])


def run_one(seed: int) -> None:
    """One input to all endpoints; raises AssertionError when a bound is broken."""
    source = random.Random(seed)
    data = mutated(source)
    for endpoint in endpoints():
        began = time.thread_time()
        pos = 0
        while pos < len(data):
            size = source.choice([1, 7, 29, 1000, 100_000])
            for event in endpoint.feed(data[pos : pos + size]):
                if isinstance(event, StreamOpened):
                    endpoint.stream_abort(event.stream, "no")
            pos += size
        endpoint.wrote(sum(map(len, endpoint.output())))
        assert time.thread_time() - began < MAX_SECONDS, f"seed {seed}: {len(data)} bytes took too long"


def fuzz(seconds: float, seed: int, inputs: int | None = None) -> int:
    """Run for ``seconds`` or ``inputs``; return how many inputs were tried."""
    tracemalloc.start()
    deadline = time.monotonic() + seconds
    tried = 0
    try:
        while time.monotonic() < deadline and (inputs is None or tried < inputs):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                run_one(seed + tried)
            except Exception as error:
                error.add_note(f"seed {seed + tried}")
                raise
            grown = tracemalloc.get_traced_memory()[1] - before
            assert grown < MAX_MEMORY, f"seed {seed + tried}: {grown} bytes"
            tried += 1
    finally:
        tracemalloc.stop()
    return tried


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**40)
    print(f"{fuzz(options.seconds, seed)} inputs from seed {seed}: nothing found")


if __name__ == "__main__":
    main()
