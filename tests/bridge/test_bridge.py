"""The bridge against real ZMQ sockets: routing, subscriptions, slow clients, bad ones, the end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import socket
import stat
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio
from bridging import KEY, Connect, Requests

from sandbox_gateway import bridge_peer, messages, zmtp
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.wire.frames import Channel
from sandbox_gateway.zmq_bridge import ZmqBridge

BODY = [messages.DELIMITER, b"sig", b"{}", b"{}", b"{}", b"{}"]


def message(msg_type: str, text: str = "", parent: bytes = b'{"msg_id":"p"}') -> list[messages.Buffer]:
    return messages.build(KEY, msg_type, {"text": text}, topic=msg_type.encode(), parent=parent)


async def received(sock: zmq.asyncio.Socket) -> list[bytes]:
    return await asyncio.wait_for(sock.recv_multipart(), 20)


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


async def subscribed(connect: Connect, topic: bytes = b"", **options: Any) -> zmq.asyncio.Socket:
    sock = connect("iopub", **options)
    sock.subscribe(topic)
    assert b"iopub_welcome" in b"".join(await received(sock))
    return sock


def type_and_content(parts: list[bytes]) -> tuple[str, dict[str, Any]]:
    at = parts.index(messages.DELIMITER)
    return json.loads(parts[at + 2])["msg_type"], json.loads(parts[at + 5])


async def test_requests_come_with_their_identity_and_answers_find_it(
    bridge: ZmqBridge, requests: Requests, client: Connect
):
    one, two, unnamed = client("shell", b"one"), client("shell", b"two"), client("shell")
    for sock in (one, two, unnamed):
        await sock.send_multipart(BODY)
    await until(lambda: len(requests) == 3)
    by_identity = {parts[0]: parts for _, parts in requests}
    assert by_identity[b"one"] == [b"one", *BODY]
    (other,) = by_identity.keys() - {b"one", b"two"}
    assert other.startswith(b"\0")
    for identity in by_identity:
        bridge.deliver(Channel.SHELL, [identity, messages.DELIMITER, b"for", memoryview(identity)])
    assert (await received(two))[-1] == b"two"
    assert (await received(one))[-1] == b"one"
    assert (await received(unnamed))[-1] == other


@pytest.mark.parametrize("name", ["shell", "control", "stdin"])
async def test_each_channel_is_its_own(bridge: ZmqBridge, requests: Requests, client: Connect, name: str):
    sock = client(name, b"me")
    await sock.send_multipart(BODY)
    await until(lambda: requests)
    channel = Channel[name.upper()]
    assert requests[0][0] == channel
    for other in (Channel.SHELL, Channel.CONTROL, Channel.STDIN):
        bridge.deliver(other, [b"me", str(int(other)).encode()])
    assert await received(sock) == [str(int(channel)).encode()]


async def test_an_answer_to_somebody_elses_client_is_passed_over(
    bridge: ZmqBridge, client: Connect, requests: Requests
):
    bridge.deliver(Channel.SHELL, [b"nobody", *BODY])
    bridge.deliver(Channel.SHELL, [])
    bridge.deliver(Channel.SHELL, [b"me"])
    bridge.deliver(99, [b"me", *BODY])
    sock = client("shell", b"me")
    await sock.send_multipart(BODY)
    await until(lambda: requests)


async def test_a_client_that_comes_again_takes_its_identity_over(
    bridge: ZmqBridge, requests: Requests, client: Connect
):
    first = client("shell", b"me", reconnect_ivl=-1)
    await first.send_multipart(BODY)
    await until(lambda: len(requests) == 1)
    second = client("shell", b"me")
    await second.send_multipart(BODY)
    await until(lambda: len(requests) == 2)
    bridge.deliver(Channel.SHELL, [b"me", b"answer"])
    assert await received(second) == [b"answer"]


async def test_the_heartbeat_is_answered(bridge: ZmqBridge, client: Connect):
    sock = client("hb")
    for n in range(3):
        await sock.send(b"ping%d" % n)
        assert await received(sock) == [b"ping%d" % n]


async def test_a_subscriber_is_welcomed_as_ipykernel_does(bridge: ZmqBridge, client: Connect):
    everything = client("iopub")
    everything.subscribe(b"")
    parts = await received(everything)
    assert parts[0] == messages.DELIMITER, "no topic frame for the empty topic"
    signature = hmac.new(KEY, b"".join(parts[2:]), hashlib.sha256).hexdigest().encode()
    assert parts[1] == signature
    assert type_and_content(parts) == ("iopub_welcome", {"subscription": ""})
    some = client("iopub")
    some.subscribe(b"stream")
    parts = await received(some)
    assert parts[0] == b"stream"
    assert type_and_content(parts) == ("iopub_welcome", {"subscription": "stream"})


async def test_a_topic_selects_by_prefix(bridge: ZmqBridge, client: Connect):
    streams = await subscribed(client, b"stream")
    for topic in (b"status", b"stream.stdout", b"str", b"stream"):
        bridge.deliver(Channel.IOPUB, [memoryview(topic), *BODY])
    assert (await received(streams))[0] == b"stream.stdout"
    assert (await received(streams))[0] == b"stream"
    streams.unsubscribe(b"stream")
    streams.subscribe(b"status")
    assert (await received(streams))[0] == b"status"
    bridge.deliver(Channel.IOPUB, [b"stream", *BODY])
    bridge.deliver(Channel.IOPUB, [b"status", *BODY])
    assert (await received(streams))[0] == b"status"


async def test_all_of_a_burst_arrives_in_order_at_each_subscriber(bridge: ZmqBridge, client: Connect):
    subscribers = [await subscribed(client) for _ in range(3)]
    count = 5000

    async def take(sock: zmq.asyncio.Socket) -> None:
        for n in range(count):
            assert (await received(sock))[-1] == b"%d" % n

    async def give() -> None:
        for n in range(count):
            bridge.deliver(Channel.IOPUB, [b"t", b"%d" % n])
            if n % 500 == 0:
                await asyncio.sleep(0)

    await asyncio.gather(give(), *(take(sock) for sock in subscribers))


async def test_large_messages_pass_both_ways(bridge: ZmqBridge, requests: Requests, client: Connect):
    large = os.urandom(1 << 20) * 24
    subscriber, shell = await subscribed(client), client("shell", b"me")
    await shell.send_multipart([*BODY, large])
    await until(lambda: requests)
    assert requests[0][1] == [b"me", *BODY, large]
    bridge.deliver(Channel.IOPUB, [b"t", memoryview(large), b"after"])
    assert await received(subscriber) == [b"t", large, b"after"]


# Slow clients


async def test_a_slow_subscriber_slows_and_loses_only_for_itself_and_is_told(bridge: ZmqBridge, client: Connect):
    slow = await subscribed(client, rcvhwm=1, rcvbuf=4096)
    quick = await subscribed(client)
    text = "x" * 10_000
    count = 1500
    parent = b'{"msg_id":"cell"}'
    got = 0
    for n in range(count):
        bridge.deliver(Channel.IOPUB, message("stream", f"{n} {text}", parent))
        if n % 100 == 50:
            bridge.deliver(Channel.IOPUB, message("status", str(n), parent))
        assert bridge.backlog < 2 << 20, "memory is bounded"
        while n - got > 20:
            kind, content = type_and_content(await received(quick))
            if kind == "stream":
                assert content["text"].startswith(f"{got} "), "the quick one misses nothing"
                got += 1
    bridge.deliver(Channel.IOPUB, message("error", "last", parent))
    statuses, streams, notices, left_out = [], [], [], 0
    while True:
        parts = await received(slow)
        kind, content = type_and_content(parts)
        if kind == "error":
            break
        if kind == "status":
            statuses.append(int(content["text"]))
        elif content.get("name") == "stderr":
            notices.append(content["text"])
            assert parts[parts.index(messages.DELIMITER) + 3] == parent, "shown under the cell it belongs to"
            left_out += int(content["text"].split()[1])
        else:
            streams.append(int(content["text"].split()[0]))
    assert statuses == list(range(50, count, 100)), "nothing but output is left out"
    assert notices and left_out > 0
    assert len(streams) + left_out == count, "all that is missing is accounted for"
    assert streams == sorted(streams)


async def test_flushed_lines_that_wait_for_a_slow_subscriber_are_joined_and_none_is_lost(
    bridge: ZmqBridge, client: Connect, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sandbox_gateway.bridge_queue.JOIN_ABOVE", 64 << 10)
    slow = await subscribed(client, rcvhwm=1, rcvbuf=4096)
    wanted = []
    for cell in range(3):
        parent = b'{"msg_id":"cell%d"}' % cell
        for n in range(10_000):
            name = "stderr" if n % 1000 == 500 else "stdout"
            text = f"{cell} {n} \u00e9\U0001f600\n"
            topic = f"stream.{name}".encode()
            content = {"name": name, "text": text}
            bridge.deliver(Channel.IOPUB, messages.build(KEY, "stream", content, topic=topic, parent=parent))
            wanted.append((parent, name, text))
            assert bridge.backlog < 2 << 20
        bridge.deliver(Channel.IOPUB, message("status", str(cell), parent))
    seen, lines, count = 0, [], 0
    while seen < 3:
        parts = await received(slow)
        at = parts.index(messages.DELIMITER)
        assert parts[at + 1] == messages.sign(KEY, parts[at + 2 : at + 6]), "joined messages are signed again"
        kind, content = type_and_content(parts)
        if kind == "status":
            seen += 1
            continue
        count += 1
        assert parts[0] == f"stream.{content['name']}".encode()
        lines += [(parts[at + 3], content["name"], line) for line in content["text"].splitlines(keepends=True)]
    assert lines == wanted, "order, request and stream of each line are kept"
    assert count < 5000, "most were joined"


async def test_the_notice_stands_where_the_output_is_missing(bridge: ZmqBridge, client: Connect):
    slow = await subscribed(client, rcvhwm=1, rcvbuf=4096)
    text = "x" * 10_000
    for cell in range(4):
        parent = b'{"msg_id":"cell%d"}' % cell
        for n in range(200):
            bridge.deliver(Channel.IOPUB, message("stream", f"{n} {text}", parent))
        bridge.deliver(Channel.IOPUB, message("status", str(cell), parent))
    seen = []
    while len(seen) < 4:
        parts = await received(slow)
        kind, content = type_and_content(parts)
        cell = parts[parts.index(messages.DELIMITER) + 3]
        assert cell == b'{"msg_id":"cell%d"}' % len(seen), "each message comes under its own cell, in order"
        if kind == "status":
            seen.append(content["text"])


@pytest.mark.parametrize("size", [10_000, 200_000])
async def test_notices_for_ever_new_parents_do_not_grow_beyond_the_bound(bridge: ZmqBridge, client: Connect, size: int):
    """A hostile kernel may invent a long parent for each message: what stands in for those must not keep them all."""
    await subscribed(client, rcvhwm=1, rcvbuf=4096)
    tracemalloc.start()
    try:
        for n in range(20_000_000 // size):
            parent = json.dumps({"msg_id": f"{n:x}".ljust(size, "x")}).encode()
            bridge.deliver(Channel.IOPUB, message("stream", "", parent))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 6 << 20, "the bound is 1 MiB, and 2 MiB disconnect"


async def test_a_client_that_reads_no_replies_is_disconnected_at_twice_the_bound(
    bridge: ZmqBridge, requests: Requests, client: Connect
):
    deaf = client("shell", b"deaf", rcvhwm=1, rcvbuf=4096, reconnect_ivl=-1)
    good = client("shell", b"good")
    await deaf.send_multipart(BODY)
    await good.send_multipart(BODY)
    await until(lambda: len(requests) == 2)
    for _ in range(600):
        bridge.deliver(Channel.SHELL, [b"deaf", *message("execute_reply", "x" * 10_000)[1:]])
        assert bridge.backlog < 3 << 20
    bridge.deliver(Channel.SHELL, [b"good", b"answer"])
    assert await received(good) == [b"answer"]
    assert bridge.backlog == 0


async def test_a_subscriber_that_was_cut_off_is_told_when_it_comes_back(bridge: ZmqBridge, client: Connect):
    deaf = await subscribed(client, rcvhwm=1, rcvbuf=4096, reconnect_ivl=-1)
    for _ in range(600):
        bridge.deliver(Channel.IOPUB, message("execute_result", "x" * 10_000))
    deaf.close()
    again = await subscribed(client)
    kind, content = type_and_content(await received(again))
    assert kind == "stream" and "missing" in content["text"]


async def test_one_message_above_the_bound_still_passes(bridge: ZmqBridge, client: Connect):
    sock = await subscribed(client)
    for n in range(3):
        bridge.deliver(Channel.IOPUB, message("display_data", str(n) * (3 << 20)))
        assert type_and_content(await received(sock))[1]["text"][0] == str(n)


async def test_it_is_settled_when_each_client_has_every_message_whole(bridge: ZmqBridge, client: Connect):
    slow = await subscribed(client, rcvhwm=1, rcvbuf=4096)
    await until(lambda: bridge.settled)
    count = 40
    for n in range(count):
        bridge.deliver(Channel.IOPUB, [b"t", b"%d" % n, bytes(20_000)])
        assert not bridge.settled
    await asyncio.sleep(0.05)
    assert not bridge.settled, "a socket is full"
    for n in range(count):
        assert (await received(slow))[1] == b"%d" % n
    await until(lambda: bridge.settled)


# Bad clients


@pytest.mark.parametrize(
    "frames",
    [[b""], [b"x"], [messages.DELIMITER], [b"a", *BODY[:-1]], [b"a"] * 10],
    ids=["empty", "text", "delimiter", "short", "many"],
)
async def test_a_malformed_request_is_dropped_with_a_log(
    bridge: ZmqBridge, requests: Requests, client: Connect, frames: list[bytes], caplog: pytest.LogCaptureFixture
):
    sock = client("shell", b"me")
    await sock.send_multipart(frames)
    await sock.send_multipart(BODY)
    await until(lambda: requests)
    assert requests == [(Channel.SHELL, [b"me", *BODY])]
    assert "malformed" in caplog.text


async def test_a_handler_that_fails_does_not_end_the_connection(directory: Path, caplog: pytest.LogCaptureFixture):
    seen: list[int] = []

    def fail(channel: int, parts: list[bytes]) -> None:
        seen.append(channel)
        raise ValueError("x")

    bridge = ZmqBridge(directory, KEY, fail)
    context = zmq.asyncio.Context()
    sock = context.socket(zmq.DEALER)
    sock.connect(f"ipc://{bridge.connection_info['ip']}-1")
    for _ in range(2):
        await sock.send_multipart(BODY)
    await until(lambda: len(seen) == 2)
    sock.close(linger=0)
    context.term()
    bridge.close()
    assert "a request failed" in caplog.text


async def test_who_does_not_speak_zmtp_is_disconnected(bridge: ZmqBridge, client: Connect, requests: Requests):
    info = bridge.connection_info
    for channel in range(1, 6):
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", zmtp.GREETING + b"\xff" * 100, zmtp.GREETING + b"\x00\x01x"):
            reader, writer = await asyncio.open_unix_connection(f"{info['ip']}-{channel}")
            with contextlib.suppress(ConnectionError):
                writer.write(garbage)
                await asyncio.wait_for(reader.read(), 20)
            writer.close()
    sock = client("shell", b"me")
    await sock.send_multipart(BODY)
    await until(lambda: requests)


async def test_who_subscribes_by_zmtp_31_commands_and_pings_is_understood(bridge: ZmqBridge):
    reader, writer = await asyncio.open_unix_connection(f"{bridge.connection_info['ip']}-{Channel.IOPUB}")
    writer.write(
        zmtp.GREETING + zmtp.ready(b"SUB") + zmtp.command(b"PING", b"\0\0ctx") + zmtp.command(b"SUBSCRIBE", b"a")
    )
    decoder, found = zmtp.Decoder(), []
    while len(found) < 3:
        found += decoder.feed(await asyncio.wait_for(reader.read(1000), 20))
    assert found[1] == zmtp.Command(b"PONG", b"ctx")
    assert type_and_content(found[2])[0] == "iopub_welcome"
    writer.write(zmtp.command(b"CANCEL", b"a") + zmtp.command(b"SUBSCRIBE", b"b"))
    found += decoder.feed(await asyncio.wait_for(reader.read(1000), 20))
    bridge.deliver(Channel.IOPUB, [b"a", b"1"])
    bridge.deliver(Channel.IOPUB, [b"b", b"2"])
    found += decoder.feed(await asyncio.wait_for(reader.read(1000), 20))
    assert found[-1] == [b"b", b"2"]
    writer.close()


async def test_clients_wait_while_there_are_no_descriptors_left(
    bridge: ZmqBridge, requests: Requests, client: Connect, monkeypatch: pytest.MonkeyPatch
):
    real = socket.socket.accept
    failures = [OSError(24, "Too many open files")]

    def accept(self: socket.socket) -> Any:
        if failures:
            raise failures.pop()
        return real(self)

    monkeypatch.setattr(socket.socket, "accept", accept)
    sock = client("shell", b"me")
    await sock.send_multipart(BODY)
    await until(lambda: requests)


# Endpoints


async def test_connection_info_is_what_jupyter_client_wants(bridge: ZmqBridge, directory: Path):
    info = bridge.connection_info
    assert info["key"] == KEY and info["transport"] == "ipc" and info["signature_scheme"] == "hmac-sha256"
    files = sorted(os.listdir(directory))
    ports = ("shell_port", "control_port", "stdin_port", "iopub_port", "hb_port")
    assert files == sorted([bridge.connection_file.name, *(f"{Path(info['ip']).name}-{info[port]}" for port in ports)])
    assert json.loads(bridge.connection_file.read_text()) == {**info, "key": KEY.decode(), "kernel_name": ""}
    for name in files:
        assert name.startswith("owner")
        assert stat.S_IMODE(os.stat(directory / name).st_mode) == 0o600


async def test_endpoints_are_made_again_when_somebody_removed_them(
    bridge: ZmqBridge, directory: Path, requests: Requests, client: Connect
):
    before = client("shell", b"before")
    await before.send_multipart(BODY)
    await until(lambda: requests)
    for name in os.listdir(directory):
        os.unlink(directory / name)
    bridge.publish_endpoints()
    bridge.publish_endpoints()
    after = client("shell", b"after")
    await after.send_multipart(BODY)
    await before.send_multipart(BODY)
    await until(lambda: len(requests) == 3)


async def test_what_a_killed_owner_left_is_replaced(directory: Path):
    for number in range(1, 6):
        (directory / f"owner.z-{number}").touch()
        (directory / f"owner.z-{number}~").touch()
    bridge = ZmqBridge(directory, KEY, Requests())
    context = zmq.asyncio.Context()
    sock = context.socket(zmq.REQ)
    sock.connect(f"ipc://{bridge.connection_info['ip']}-5")
    await sock.send(b"x")
    assert await received(sock) == [b"x"]
    sock.close(linger=0)
    context.term()
    bridge.close()


async def test_a_directory_that_cannot_be_used_is_an_error(directory: Path):
    for unusable in (directory / "absent", directory / ("x" * 100)):
        with pytest.raises(SandboxGatewayError) as caught:
            ZmqBridge(unusable, KEY, Requests())
        assert caught.value.code == "data_directory"


async def test_the_last_replies_arrive_although_the_bridge_is_closed_at_once(
    directory: Path, requests: Requests, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bridge_peer, "LINGER", 60.0)
    bridge = ZmqBridge(directory, KEY, requests)
    context = zmq.asyncio.Context()
    sock = context.socket(zmq.DEALER)
    sock.connect(f"ipc://{bridge.connection_info['ip']}-2")
    await sock.send_multipart(BODY)
    await until(lambda: requests)
    large = bytes(4 << 20)
    for n in range(3):
        bridge.deliver(Channel.CONTROL, [requests[0][1][0], b"shutdown_reply%d" % n, large])
    bridge.close()
    bridge.close()
    bridge.deliver(Channel.CONTROL, [requests[0][1][0], b"too late"])
    assert os.listdir(directory) == []
    for n in range(3):
        assert (await received(sock)) == [b"shutdown_reply%d" % n, large]
    sock.close(linger=0)
    context.term()


async def test_close_leaves_no_descriptor(directory: Path):
    async def cycle() -> None:
        bridge = ZmqBridge(directory, KEY, Requests())
        reader, writer = await asyncio.open_unix_connection(f"{bridge.connection_info['ip']}-1")
        await reader.readexactly(len(zmtp.GREETING))
        bridge.close()
        await reader.read()
        writer.close()
        await writer.wait_closed()

    await cycle()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        await cycle()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_reply_that_waits_for_its_client_is_not_settled(bridge: ZmqBridge, client: Connect):
    """Else the owner's next but one would not know that it has to come again."""
    assert bridge.settled
    bridge.deliver(Channel.SHELL, [b"late", *BODY])
    assert not bridge.settled
    late = client("shell", b"late")
    assert await received(late) == BODY
    await until(lambda: bridge.settled)
