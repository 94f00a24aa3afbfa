"""The kernel WebSocket, with real clients."""

from __future__ import annotations

import pytest
from ws_harness import IOPUB, KEY, SHELL, gateway

from sandbox_gateway import messages


@pytest.mark.parametrize("v1", [True, False])
async def test_a_request_and_its_answers_cross_in_both_protocols(v1: bool) -> None:
    async with gateway() as served:
        client = await served.connect("a", v1=v1)
        await client.ask(code="1+1")
        while not served.kernel.asked:
            assert await client.quiet(0.01)
        channel, parts = served.kernel.asked[0]
        assert channel == SHELL
        assert parts[1] == messages.DELIMITER and parts[2] == messages.sign(KEY, parts[3:7])
        served.kernel.print("hello", parent=parts[3])
        served.kernel.publish("display_data", {"data": {}}, parent=parts[3], buffers=[b"\x00\xff", b""])
        served.kernel.reply(status="ok")
        stream, display, reply = [await client.read() for _ in range(3)]
        assert stream and stream["channel"] == "iopub" and stream["content"]["text"] == "hello"
        assert display and display["buffers"] == [b"\x00\xff", b""]
        assert reply and reply["channel"] == "shell" and reply["content"] == {"status": "ok"}
        assert reply["parent_header"]["msg_id"] == "m-1"
        assert IOPUB
