"""A process that holds a bridge, driven by its stdin and stdout: what a test may kill with -9.

Lines of JSON. In: ``{"op": "received", "channel": n, "parts": [hex...]}`` and the like. Out: ``{"request": [channel,
[hex...]]}``, ``{"answer": ...}``.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sandbox_gateway import channels as kernel_channels
from sandbox_gateway.channels import KernelChannels
from sandbox_gateway.messages import Buffer
from sandbox_gateway.zmq_bridge import ZmqBridge

# On a busy machine clients come back late.
kernel_channels.GRACE = 60.0  # type: ignore[misc]


def say(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


class Link:
    """Tells the test what clients asked."""

    def send(self, channel: int, parts: Sequence[Buffer]) -> int:
        say(request=[channel, [bytes(part).hex() for part in parts]])
        return 1


async def main(directory: Path, key: bytes) -> None:
    channels = KernelChannels(key)
    bridge: ZmqBridge | None = None
    lines = asyncio.StreamReader(limit=1 << 26)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        order = json.loads(line)
        answer: Any = None
        match order["op"]:
            case "received":
                channels.received(order["channel"], [bytes.fromhex(part) for part in order["parts"]])
                continue
            case "open":
                bridge = ZmqBridge(directory, key, channels.request, kernel_name="sandbox-python3")
                bridge.follow(channels)
            case "connect":
                channels.connect(Link())
            case "sleep":
                channels.sleep(lambda: say(request=["wake", []]))
            case "retain":
                channels.retain()
            case "settle":
                answer = await channels.settle(20)
            case "facts":
                answer = channels.facts()
            case "recall":
                channels.recall(order["facts"])
            case "close":
                assert bridge is not None
                bridge.close()
        say(answer=answer)


asyncio.run(main(Path(sys.argv[1]), sys.argv[2].encode()))
