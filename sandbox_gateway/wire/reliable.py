"""Numbered messages that survive the loss of the other side: the :class:`Outbox` and the :class:`Inbox`.

The sender keeps every message until it has been acknowledged (and, where wanted, longer); a receiver that attaches
names the last number it has of each channel and gets what follows. At its bound an outbox drops what may be dropped,
oldest first, and leaves a :class:`Gap` in its place: the receiver is told, always.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from struct import Struct

from sandbox_gateway.wire.frames import CHANNELS, MAX_SEQ, Buffer, WireError

MESSAGE_COST = 256
"""Bytes charged for each message beside its parts; an estimate of what the interpreter needs for it."""
PART_COST = 48

ACK_MESSAGES = 64
"""Received messages after which an acknowledgement is due without being asked for."""
ACK_BYTES = 512 * 1024

_ACK = Struct("!HQ")
_GAP = Struct("!QQQ")


@dataclass(slots=True)
class Entry:
    """A message to be sent."""

    channel: int
    seq: int
    parts: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class Gap:
    """Stands in for the messages ``first`` to ``last`` of a channel, which were dropped."""

    channel: int
    first: int
    last: int
    count: int
    """Messages dropped: always ``last - first + 1``."""
    bytes: int
    """Bytes dropped, as far as known."""


class _Item:
    """A retained message, or (``parts`` None) the gap left by dropped ones. Both keep their place in the order."""

    __slots__ = ("acked", "channel", "last", "order", "parts", "sent", "seq", "size")

    def __init__(self, order: int, channel: int, seq: int, parts: Sequence[Buffer] | None, size: int) -> None:
        self.order = order
        self.channel = channel
        self.seq = seq
        self.last = seq
        self.parts = parts
        self.size = size
        self.sent = False
        self.acked = False


class Outbox:
    """Messages of all channels in order of arrival, with a send cursor.

    ``limit_bytes`` bounds what is kept (parts and a fixed cost each): beyond it acknowledged messages go first,
    oldest first, then messages that ``droppable(channel, parts)`` allows, oldest first; the newest, and such as are
    longer than half the limit, only beyond ``hard_limit_bytes``. Messages of that length, droppable or not, do not
    count for the limit: nothing else has to go for them. Other messages are never dropped: beyond the hard limit
    :attr:`full` asks the caller to stop reading where they come from. With ``keep_acked`` acknowledged messages stay,
    for a receiver that attaches with older numbers: up to ``keep_bytes`` of them (default: the limit).
    """

    def __init__(
        self,
        limit_bytes: int = 64 * 1024 * 1024,
        hard_limit_bytes: int = 256 * 1024 * 1024,
        droppable: Callable[[int, Sequence[Buffer]], bool] | None = None,
        keep_acked: bool = False,
        keep_bytes: int | None = None,
    ) -> None:
        self._limit = limit_bytes
        self._hard = hard_limit_bytes
        self._droppable = droppable
        self._keep = (limit_bytes if keep_bytes is None else keep_bytes) if keep_acked else 0
        self._order = 0
        self._last = [0] * CHANNELS
        self._acked_to = [0] * CHANNELS
        self._log: OrderedDict[int, _Item] = OrderedDict()
        self._unsent: OrderedDict[int, _Item] = OrderedDict()
        self._may_drop: OrderedDict[int, _Item] = OrderedDict()
        self._long: OrderedDict[int, _Item] = OrderedDict()
        self._may_drop_long: OrderedDict[int, _Item] = OrderedDict()
        self._long_bytes = 0
        self._kept: OrderedDict[int, _Item] = OrderedDict()
        self._pending: list[OrderedDict[int, _Item]] = [OrderedDict() for _ in range(CHANNELS)]
        self._gaps: list[_Item | None] = [None] * CHANNELS
        self.bytes = 0
        """Bytes kept now."""
        self._kept_bytes = 0
        self.dropped_messages = 0
        """Messages dropped so far that nobody had acknowledged."""
        self.dropped_bytes = 0

    # -- filling

    def append(self, channel: int, parts: Sequence[Buffer]) -> int:
        """Add a message; return its number. Never refuses: look at :attr:`full` before."""
        seq = self._last[channel] + 1
        self._last[channel] = seq
        self._order += 1
        size = MESSAGE_COST + PART_COST * len(parts) + sum(map(len, parts))
        item = _Item(self._order, channel, seq, parts, size)
        self._log[item.order] = item
        self._unsent[item.order] = item
        self._pending[channel][seq] = item
        self._note(item)
        self.bytes += size
        if self.bytes > self._limit:
            self._shrink(item)
        return seq

    @property
    def full(self) -> bool:
        """Whether more than the hard limit is kept, all of which must not be dropped."""
        return self.bytes > self._hard

    @property
    def backlog(self) -> int:
        """Bytes not acknowledged yet."""
        return self.bytes - self._kept_bytes

    @property
    def ready(self) -> bool:
        """Whether :meth:`next_ready` has something."""
        return bool(self._unsent)

    def last(self) -> dict[int, int]:
        """The last number given out on each channel that was used."""
        return {channel: seq for channel, seq in enumerate(self._last) if seq}

    # -- sending

    def next_ready(self) -> Entry | Gap | None:
        """What is to be sent next, or None; the cursor moves on."""
        if not self._unsent:
            return None
        item = self._unsent.popitem(last=False)[1]
        item.sent = True
        if item.parts is None:
            return Gap(item.channel, item.seq, item.last, item.last - item.seq + 1, item.size)
        return Entry(item.channel, item.seq, item.parts)

    def ack(self, channel: int, seq: int) -> None:
        """The receiver has everything of ``channel`` up to ``seq``; :class:`WireError` for what was never sent."""
        if not 0 <= channel < CHANNELS or not 0 <= seq <= self._last[channel]:
            raise WireError(f"acknowledgement of message {seq} on channel {channel}, which was never sent")
        if seq <= self._acked_to[channel]:
            return
        self._acked_to[channel] = seq
        pending = self._pending[channel]
        while pending:
            item = next(iter(pending.values()))
            if item.last > seq:
                if item.seq <= seq:
                    item.seq = seq + 1
                break
            pending.popitem(last=False)
            self._acknowledged(item)
        self._trim_kept()

    def _acknowledged(self, item: _Item) -> None:
        item.acked = True
        self._unsent.pop(item.order, None)
        self._forget_notes(item)
        if self._gaps[item.channel] is item:
            self._gaps[item.channel] = None
        if self._keep:
            self._kept[item.order] = item
            self._kept_bytes += self._charge(item)
        else:
            self._forget(item)

    # -- attaching

    def rewind(self, received: Mapping[int, int]) -> dict[int, int]:
        """Send again what follows ``received``; a channel missing there goes on after what was acknowledged.

        Return for each channel in use the number after which it goes on. Numbers beyond the last one given out count
        as that one (the receiver knew a later state of this side). What is gone by now is announced as a gap.
        """
        start = [min(received.get(channel, self._acked_to[channel]), last) for channel, last in enumerate(self._last)]
        expected = [number + 1 for number in start]
        items = list(self._log.values())
        self._log.clear()
        self._unsent.clear()
        self._may_drop.clear()
        self._long.clear()
        self._may_drop_long.clear()
        self._kept.clear()
        self._pending = [OrderedDict() for _ in range(CHANNELS)]
        self._gaps = [None] * CHANNELS
        self._acked_to = list(start)
        self.bytes = self._kept_bytes = self._long_bytes = 0
        # Orders are given anew, because gaps may have to be put in between.
        self._order = 0
        for item in items:
            channel = item.channel
            if item.last < expected[channel]:
                if self._keep:
                    self._place(item)
                    item.acked = True
                    self._kept[item.order] = item
                    self._kept_bytes += self._charge(item)
                continue
            if item.seq > expected[channel]:
                self._place_gap(channel, expected[channel], item.seq - 1)
            elif item.parts is None:
                item.seq = expected[channel]
            self._place_unsent(item)
            expected[channel] = item.last + 1
        for channel, last in enumerate(self._last):
            if expected[channel] <= last:
                self._place_gap(channel, expected[channel], last)
        self._trim_kept()
        return {channel: number for channel, number in enumerate(start) if self._last[channel]}

    def number_after(self, received: Mapping[int, int]) -> None:
        """Go on after the numbers that the other side has, on channels where this side has sent nothing yet.

        For a new process that continues an older one's link. :class:`WireError` if the other side claims numbers that
        this side has not given out itself.
        """
        for channel, number in received.items():
            if number <= self._last[channel]:
                continue
            if self._last[channel]:
                raise WireError(f"the other side claims message {number} on channel {channel}, which was never sent")
            self._last[channel] = self._acked_to[channel] = number

    def _place(self, item: _Item) -> None:
        self._order += 1
        item.order = self._order
        self._log[item.order] = item
        self.bytes += self._charge(item)

    def _place_unsent(self, item: _Item) -> None:
        self._place(item)
        item.sent = item.acked = False
        self._unsent[item.order] = item
        self._pending[item.channel][item.seq] = item
        if item.parts is None:
            self._gaps[item.channel] = item
        else:
            self._note(item)

    def _place_gap(self, channel: int, first: int, last: int) -> None:
        gap = _Item(0, channel, first, None, 0)
        gap.last = last
        self._place_unsent(gap)

    # -- dropping

    @staticmethod
    def _charge(item: _Item) -> int:
        return MESSAGE_COST if item.parts is None else item.size

    def _forget(self, item: _Item) -> None:
        del self._log[item.order]
        self.bytes -= self._charge(item)

    def _note(self, item: _Item) -> None:
        assert item.parts is not None
        long = item.size > self._limit // 2
        if long:
            self._long[item.order] = item
            self._long_bytes += item.size
        if self._droppable is not None and self._droppable(item.channel, item.parts):
            (self._may_drop_long if long else self._may_drop)[item.order] = item

    def _forget_notes(self, item: _Item) -> None:
        self._may_drop.pop(item.order, None)
        self._may_drop_long.pop(item.order, None)
        if self._long.pop(item.order, None) is not None:
            self._long_bytes -= item.size

    @property
    def _over(self) -> bool:
        return self.bytes - self._long_bytes > self._limit

    def _trim_kept(self) -> None:
        while self._kept and (self._kept_bytes > self._keep or self._over or self.bytes > self._hard):
            item = self._kept.popitem(last=False)[1]
            self._kept_bytes -= self._charge(item)
            self._forget(item)

    def _shrink(self, newest: _Item) -> None:
        self._trim_kept()
        while self._over and self._may_drop:
            item = next(iter(self._may_drop.values()))
            if item is newest:
                break
            self._drop(item)
        if newest.size > self._hard and newest.order in self._may_drop_long:
            self._drop(newest)  # nothing else has to go, if that can go
        while self.bytes > self._hard and (self._may_drop or self._may_drop_long):
            oldest = [next(iter(items.values())) for items in (self._may_drop, self._may_drop_long) if items]
            self._drop(min(oldest, key=lambda item: item.order))

    def _drop(self, item: _Item) -> None:
        """Turn a message into a gap, or let the gap just before it grow over it."""
        self._forget_notes(item)
        size = item.size - MESSAGE_COST
        self.dropped_messages += 1
        self.dropped_bytes += size
        gap = self._gaps[item.channel]
        # A gap that was sent already cannot announce a message that was not.
        if gap is not None and gap.last + 1 == item.seq and gap.sent == item.sent:
            gap.last = item.last
            gap.size += size
            self._unsent.pop(item.order, None)
            del self._pending[item.channel][item.seq]
            self._forget(item)
            return
        self.bytes -= item.size - MESSAGE_COST
        item.parts = None
        item.size = size
        self._gaps[item.channel] = item


class Inbox:
    """The receiver's cursors: what has come, what is to be acknowledged."""

    def __init__(self) -> None:
        self._received = [0] * CHANNELS
        self._messages = 0
        self._bytes = 0
        self._asked = False
        self.duplicates = 0

    def accept(self, channel: int, seq: int, size: int = 0) -> bool:
        """Whether message ``seq`` is new; False for a duplicate, :class:`WireError` where one is missing before it."""
        expected = self._received[channel] + 1
        if seq == expected:
            self._received[channel] = seq
            self._messages += 1
            self._bytes += size
            return True
        if seq < expected:
            self.duplicates += 1
            self._asked = True
            return False
        raise WireError(f"message {seq} on channel {channel} came where {expected} was due")

    def gap(self, channel: int, first: int, last: int) -> int:
        """The messages ``first`` to ``last`` were dropped; return how many of them are news (0: none)."""
        received = self._received[channel]
        if first > received + 1:
            raise WireError(f"a gap at message {first} on channel {channel} came where {received + 1} was due")
        if last <= received:
            self.duplicates += 1
            return 0
        self._received[channel] = last
        self._messages += 1
        return last - received

    def received(self) -> dict[int, int]:
        """The last number of each channel in use, without holes."""
        return {channel: seq for channel, seq in enumerate(self._received) if seq}

    def resume(self, numbers: Mapping[int, int]) -> None:
        """Expect what follows ``numbers`` (of the channels named there)."""
        for channel, number in numbers.items():
            self._received[channel] = number

    @property
    def ack_pending(self) -> bool:
        """Whether anything has come that was not acknowledged."""
        return self._messages > 0 or self._asked

    def request_ack(self) -> None:
        """Make the next :meth:`take_ack` return what is pending, however little."""
        self._asked = self._asked or self._messages > 0

    @property
    def ack_due(self) -> bool:
        """Whether enough has come, or it was asked for."""
        return self._asked or self._messages >= ACK_MESSAGES or self._bytes >= ACK_BYTES

    def take_ack(self) -> dict[int, int] | None:
        """The numbers to acknowledge, when :attr:`ack_due`; else None."""
        if not self.ack_due:
            return None
        self._asked = False
        self._messages = self._bytes = 0
        return self.received() or None


def encode_ack(numbers: Mapping[int, int]) -> bytes:
    """The payload of an ACK frame."""
    return b"".join(_ACK.pack(channel, seq) for channel, seq in numbers.items())


def decode_ack(payload: Buffer) -> dict[int, int]:
    """The numbers in an ACK frame."""
    if len(payload) % _ACK.size or len(payload) > CHANNELS * _ACK.size:
        raise WireError("a malformed acknowledgement")
    numbers: dict[int, int] = {}
    for channel, seq in _ACK.iter_unpack(payload):
        if channel >= CHANNELS or seq > MAX_SEQ:
            raise WireError("an acknowledgement of what does not exist")
        numbers[channel] = seq
    return numbers


def encode_gap(gap: Gap) -> bytes:
    """The payload of a GAP frame; the channel and the first number are in its header."""
    return _GAP.pack(gap.last, gap.count, min(gap.bytes, MAX_SEQ))


def decode_gap(channel: int, first: int, payload: Buffer) -> Gap:
    """The gap in a GAP frame."""
    if len(payload) != _GAP.size:
        raise WireError("a malformed gap")
    last, count, size = _GAP.unpack(payload)
    if channel >= CHANNELS or not 0 < first <= last <= MAX_SEQ or count != last - first + 1 or size > MAX_SEQ:
        raise WireError("a gap that cannot be")
    return Gap(channel, first, last, count, size)
