"""An agent and a succession of hosts over two byte pipes, moved and torn at will. No I/O."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from sandbox_gateway.wire.endpoint import AgentEndpoint, HostEndpoint
from sandbox_gateway.wire.events import Attached, Dropped, Event, Lost, Message
from sandbox_gateway.wire.reliable import Outbox

EVERYTHING = 1 << 30


class Simulation:
    """``to_agent`` and ``to_host`` are what lies in the pipes."""

    def __init__(self, outbox: Outbox | None = None, max_message: int = EVERYTHING) -> None:
        self.agent = AgentEndpoint(outbox or Outbox(keep_acked=True), max_message=max_message)
        self.to_agent = bytearray()
        self.to_host = bytearray()
        self.agent_events: list[Event] = []
        self.host_events: list[Event] = []
        self.nonces = (f"{number:016x}" for number in itertools.count(1))
        self.delivered: dict[int, int] = {}
        """What a host's application has of each channel, across hosts."""
        self.host = HostEndpoint(Outbox())

    def attach(self, *, pad: bool = False, named: bool = True) -> None:
        """The present host attaches, naming what was delivered."""
        self.host_events += self.host.attach(next(self.nonces), self.delivered if named else None, pad=pad)

    def kill_host(self, cut: int = 0) -> None:
        """A new host takes over. The old one has written ``cut`` bytes of what it wanted to write."""
        self.to_agent += b"".join(self.host.output())[:cut]
        self.host = HostEndpoint(Outbox())

    def write_host(self, size: int = EVERYTHING) -> int:
        """The host writes up to ``size`` bytes."""
        return self._write(self.host, self.to_agent, size)

    def write_agent(self, size: int = EVERYTHING) -> int:
        """The agent writes up to ``size`` bytes."""
        return self._write(self.agent, self.to_host, size)

    @staticmethod
    def _write(endpoint: AgentEndpoint | HostEndpoint, pipe: bytearray, size: int) -> int:
        data = b"".join(endpoint.output())[:size]
        endpoint.wrote(len(data))
        pipe += data
        return len(data)

    def read_host(self, size: int = EVERYTHING) -> int:
        """The host reads up to ``size`` bytes."""
        data = bytes(self.to_host[:size])
        del self.to_host[:size]
        events = self.host.feed(data)
        for event in events:
            if isinstance(event, Message):
                self.delivered[event.channel] = event.seq
            elif isinstance(event, Dropped):
                self.delivered[event.channel] = event.last
        self.host_events += events
        return len(data)

    def read_agent(self, size: int = EVERYTHING) -> int:
        """The agent reads up to ``size`` bytes."""
        data = bytes(self.to_agent[:size])
        del self.to_agent[:size]
        self.agent_events += self.agent.feed(data)
        return len(data)

    def settle(self) -> None:
        """Move everything until both sides are silent."""
        while self.write_host() + self.read_agent() + self.write_agent() + self.read_host():
            self.host.request_ack()
            self.agent.request_ack()

    def recover(self) -> None:
        """What a new host does: attach, and once more behind padding if nothing comes."""
        self.attach()
        self.settle()
        if not self.host.attached:
            self.attach(pad=True)
            self.settle()
        assert self.host.attached

    def got(self, channel: int) -> list[bytes]:
        """First parts of the messages that the hosts got on a channel."""
        return _first_parts(self.host_events, channel)

    def agent_got(self, channel: int) -> list[bytes]:
        """First parts of the messages that the agent got on a channel."""
        return _first_parts(self.agent_events, channel)

    def count(self, kind: type[Event]) -> int:
        """Events of a kind at the hosts."""
        return sum(isinstance(event, kind) for event in self.host_events)


def _first_parts(events: Iterable[Event], channel: int) -> list[bytes]:
    return [bytes(event.parts[0]) for event in events if isinstance(event, Message) and event.channel == channel]


__all__ = ["EVERYTHING", "Attached", "Lost", "Simulation"]
