#!/usr/bin/env python3
"""A chat server for any machine with Python: ``python mychatserver.py``.

Every line that a client sends goes to all other clients, with the sender's label in front. One file, the standard
library alone; ``mychatclient.py``, ``nc`` and ``telnet`` are all clients.

The wire
    UTF-8 text in lines. ``\\n``, ``\\r\\n`` and telnet's ``\\r\\0`` end a line.
    Client to server: text. A line ``exit`` leaves, and so does end-of-file. Lines of blanks are not relayed. A line
    whose first word is ``/`` and a letter, without a second ``/``, is a command: see People.
    Server to client: ``label:text``, or a notice, ``* text``. A label is the port that its client connects from, or the
    name that it has taken; ``@server`` after it tells that its client is on another server. No text of a person stands
    in a notice but after ``* LABEL to you: `` and ``* to LABEL: ``. ``* refused: `` tells why somebody is turned away.
    What could move a cursor or reorder text on a screen arrives as U+FFFD, as does what is not UTF-8.
    A peer that has never sent a newline has its pieces taken for lines after a second of silence.

The threads, and who owns what
    main            waits; the signals that stop the server wake the server thread.
    server thread   accepts, starts the handlers, flushes outboxes, keeps the clock; owns the selector, closes sockets.
    handler         one a client: reads, cuts off whole lines, relays them.
    writers         one each for standard output, standard error and the log, however slow those are.
    With ``--lan`` one answers who looks for a server: see Discovery.
    With ``--operator`` one more reads what is typed where the server runs: see The operator.
    With ``--nats`` three more threads join this room with those of other servers: see Other servers.

The way of a line
    Server._handle reads a block: Client.blocks, Client.recv, Framer.feed. parse finds its lines, Room.relay enqueues
    them, Room._broadcast gives them to every member, Client.give sends.
    Handlers read blocks of lines, not lines. One handler at a time broadcasts: it takes what the others have enqueued,
    joins it, and gives each member one piece, everything but its own lines. One more waits for its turn, to take what
    is enqueued meanwhile; the rest enqueue their block and go back to reading. So all members see one order, a round
    costs one send a member, and nobody broadcasts for ever.
    A send never blocks: what a socket does not take goes into its client's outbox, which the server thread flushes.
    While somebody is a slow consumer (has a large outbox), everyone else may spend a budget and then waits, so a flood
    runs at the pace of the slowest reader, and nothing is lost. A reader below the floor is evicted.

To read it
    Lines, Members, Room, People and Server are the chat. The sections behind them, up to the command line, are off
    until asked for, and can be skipped.
"""

from __future__ import annotations

import sys

if sys.version_info < (needed := (3, 9)):  # Python 3.7 and older end here: this needs 3.9 or newer, try python3
    sys.exit("This needs Python 3.9 or newer: try python3, or py on Windows.")
if __name__ == "__main__":  # a Ctrl-C during the imports needs no traceback
    show_exception = sys.excepthook
    sys.excepthook = lambda kind, *rest: None if kind is KeyboardInterrupt else show_exception(kind, *rest)

import argparse
import collections
import contextlib
import datetime
import errno
import functools
import ipaddress
import itertools
import os
import re
import select
import selectors
import signal
import socket
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Union

if TYPE_CHECKING:
    import asyncio
    import ssl  # at run time only where somebody asks for TLS: some Pythons have none

__version__ = "1.0"

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 12000
READ_BYTES = 65_536  # what a handler reads at once: a quarter of it costs a quarter of the speed, more gains nothing
MAX_LINE_BYTES = 65_536  # between line ends, before cleaning; never more than READ_BYTES, see Framer.feed

# --- Lines: from what a peer sent to lines that are safe on anybody's screen ------------------------------------------

SILENCE_SECONDS = 1.0  # after which a peer that never sends a newline has finished its line
LINE_TOO_LONG = f"* line too long: {MAX_LINE_BYTES} bytes at most, this line was not sent"
PARSED_BYTES = 8_192  # at once, of what is not plain: a list of all its lines takes many times their bytes
BLANKS = b" \t"
PLAIN = bytes([*b"\t\n", *range(0x20, 0x7F)])
# IAC and WILL..DONT with an option, or a command alone: RFC 854. A newline always ends the line.
TELNET = re.compile(rb"\xff(?:[\xfb-\xfe][\x00-\x09\x0b-\x7f]|[\xf0-\xfa])")
# Controls but tab and newline (C0, DEL, C1), line and paragraph separator, and what overrides the order of writing.
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
COMMAND = re.compile(rb"/[A-Za-z][^ \t/]*(?![^ \t])")  # the first word of a line
# A search is ten times faster when its first character is a plain one: hence the newline, not "^".
BLANK_LINES = re.compile(rb"\n[\t \n]*\n")
UNUSUAL = re.compile(rb"\n(?=[\t \n/eE])[\t ]*(?:[\n/]|[eE][xX][iI][tT])")  # blank, or perhaps a command or "exit"


class Framer:
    """Cuts a stream of bytes into blocks of whole lines: the same lines, however the bytes were cut into packets."""

    def __init__(self) -> None:
        self._partial: bytearray | None = bytearray()  # the unfinished line; None when it has passed the limit
        self._return = b""  # a last "\r": the next byte tells whether it ends a line
        self._sends_newlines = False  # or will: a piece was a single character, so somebody types key by key

    @property
    def ends_by_silence(self) -> bool:
        """Whether silence would end the unfinished line: its sender has never sent a newline, nor a single key."""
        return not self._sends_newlines and (self._partial is None or len(self._partial) > 0)

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """Take READ_BYTES at most; return the whole lines, each with ``\n``, and whether a line has got too long.

        A line is reported too long once, when it passes the limit, and is left out. As no more is fed at once than a
        line may hold, only the first line of the block can be too long.
        """
        data = self._return + data
        self._return = b""
        if b"\r" in data:
            if data.endswith(b"\r"):
                data, self._return = data[:-1], b"\r"
            data = data.replace(b"\r\n", b"\n").replace(b"\r\0", b"\n")
        end = data.rfind(b"\n") + 1
        if not end:
            if not self._sends_newlines:
                self._sends_newlines = len(TELNET.sub(b"", data).decode("utf-8", "replace")) == 1
            return b"", self._keep(data)
        self._sends_newlines = True
        first, partial = data.index(b"\n"), self._partial
        too_long = partial is not None and len(partial) + first > MAX_LINE_BYTES
        block = data[first + 1 : end] if partial is None or too_long else bytes(partial) + data[:end]
        self._partial = bytearray()
        return block, self._keep(data[end:]) or too_long

    def rest(self) -> bytes:
        """End the unfinished line, as end-of-file and silence do; return it as a block, empty if there is none."""
        self._keep(self._return)
        line, self._partial, self._return = self._partial, bytearray(), b""
        return bytes(line) + b"\n" if line else b""

    def _keep(self, data: bytes) -> bool:
        """Add to the unfinished line; return whether that has just passed the limit."""
        if self._partial is None:
            return False
        self._partial += data
        if len(self._partial) <= MAX_LINE_BYTES:
            return False
        self._partial = None
        return True


def clean(block: bytes) -> bytes:
    """Return the lines of ``block`` without telnet's sequences, and U+FFFD for all that is forbidden or not UTF-8."""
    if not block.translate(None, PLAIN):
        return block
    text = TELNET.sub(b"", block).decode("utf-8", "replace")
    return FORBIDDEN.sub("\ufffd", text).encode()


def corrected(block: bytes) -> bytes:
    """Return the lines of ``block`` without what Backspace and DEL take away: the character before, if there is one."""
    if b"\b" not in block and b"\x7f" not in block:
        return block
    kept: list[str] = []
    for character in TELNET.sub(b"", block).decode("utf-8", "surrogateescape"):
        if character not in "\b\x7f":
            kept.append(character)
        elif kept and kept[-1] != "\n":
            kept.pop()
    return "".join(kept).encode("utf-8", "surrogateescape")


def parse(block: bytes) -> Iterator[tuple[bytes, str]]:
    """Yield lines of ``block`` to be relayed, clean, and the command after them, or an empty one.

    ``exit`` is the command ``/quit``, and nothing comes after it. Costs for 64 KiB, in lines of 32 bytes: 100 us for
    ASCII, 400 us for Chinese or source code. What is chosen to cost more is paid for: see Work.
    """
    if not block.translate(None, PLAIN) and not UNUSUAL.search(b"\n" + block):
        yield block, ""
        return
    while block:
        some = front(block, PARSED_BYTES)
        block = block[len(some) :]
        some = BLANK_LINES.sub(b"\n", b"\n" + clean(corrected(some)))
        if not UNUSUAL.search(some):
            yield some[1:], ""
            continue
        lines = bytearray()  # whoever waits to say them holds on to all this: a list would take many times their bytes
        for line in some[1:-1].split(b"\n"):
            text = line.lstrip(BLANKS)
            if COMMAND.match(text):
                yield bytes(lines), text.decode()
                lines.clear()
            elif text[:4].lower() == b"exit" and not text[4:].strip(BLANKS):
                yield bytes(lines), "/quit"
                return
            else:
                is_escaped = text.startswith(b"//") and COMMAND.match(text, 1)
                lines += (line.replace(b"/", b"", 1) if is_escaped else line) + b"\n"
        yield bytes(lines), ""


def front(lines: bytes, size: int) -> bytes:
    """Return the first of ``lines``: as many as ``size`` bytes hold, but at least one."""
    if len(lines) <= size:
        return lines
    return lines[: lines.rfind(b"\n", 0, size) + 1 or lines.index(b"\n") + 1]


def labelled(label: str, lines: bytes) -> bytes:
    """Return ``lines`` with ``label:`` before each; without a label as they are: another server has labelled them."""
    if not label:
        return lines
    prefix = f"{label}:".encode()
    return b"".join((prefix, memoryview(lines.replace(b"\n", b"\n" + prefix))[: -len(prefix)]))


# --- Members: who is given every round, and must not hold up anyone ---------------------------------------------------

SMALL_BYTES = 4_096  # pieces below this are joined in an outbox: as objects they would take many times their bytes
MAX_PIECES = 1_024  # in one sendmsg: IOV_MAX on Linux and macOS
FLUSH_BYTES = 262_144  # sent to one client before the next has its turn: a typist must not wait for an outbox
FLOOR_BYTES = 131_072  # what a slow consumer must take in so many seconds, else it is evicted:
FLOOR_SECONDS = 5
STALL_SECONDS = 30  # in which anybody with an outbox must take something, else it is evicted
DRAIN_SECONDS = 5.0  # in which somebody who leaves must take what was queued for it
LINGER_SECONDS = 1.0  # and then see the end: closing with input unread resets the connection
VANISHED_SECONDS = 60  # in which a peer must acknowledge what it was sent, or is found to be gone
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}  # s; 2nd: macOS's 1st
WRITER_BYTES = 1_048_576  # what may wait for a slow standard output, or disk
TLS_HELLO = b"\x16\x03"  # handshake record, version 3.x: RFC 8446, 5.1
# A request's first line: a word, what it is for, and the protocol.
OTHER_PROTOCOL = re.compile(rb"[A-Za-z]+ (?:[/*]|[^\s:]+:)\S* (?i:HTTP|RTSP|SIP)/\d[\d.]*[ \t]*\r?\n")
OTHER_ANSWER = (
    b"HTTP/1.0 400 This is a chat\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
    b"This is a chat server. Join it with: python mychatclient.py HOST PORT\r\n"
)


class Deadline:
    """A moment, so many seconds from now."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds that are left, 0 when there are none."""
        return max(0.0, self._at - time.monotonic())


def ready(sock: socket.socket | Client, events: int, seconds: float) -> int:
    """Wait until ``sock`` is ready for one of the selector's ``events``; return which, 0 when ``seconds`` pass."""
    # Not DefaultSelector, which would take a descriptor for each wait.
    with getattr(selectors, "PollSelector", selectors.SelectSelector)() as selector:
        selector.register(sock, events)
        return sum(found for _, found in selector.select(seconds))


class Client:
    """One peer: its socket, its label and its outbox."""

    label = ""  # set when it joins, and by /nick, with the room's queue lock held
    heard_from: Client | None = None  # who last wrote to it privately
    end = "left"  # how the others are told of it; the operator may change it

    def __init__(
        self,
        sock: socket.socket,
        address: tuple[str, int],
        on_change: Callable[[Client], None],  # it has got an outbox, or is found to be gone
    ) -> None:
        self.address = address
        self._sock = sock
        self._on_change = on_change
        # Only the handler sets what follows, and who evicts it from the door.
        self.deadline: Deadline | None = None  # for what it must send before it may enter
        self.read_bytes = READ_BYTES  # at once
        # Guards what follows, and the socket but for reading: nobody uses it once it is closed. Innermost lock.
        self._lock = threading.RLock()
        self._outbox: collections.deque[memoryview] = collections.deque()
        self.outbox_bytes = 0  # others read this, and the next two, without the lock
        self.gone = False  # nothing more is taken for it: it leaves, is evicted, or a send has found the peer gone
        self.readable = True  # what came from it is read: also what came before a peer was found to be gone
        self._taken = 0  # bytes that the socket took since the floor was last met
        # Only the server thread uses what follows.
        self._was_slow: bool | None = None  # when it was last met
        self._patience = Deadline(0)  # in which it must be met again

    def fileno(self) -> int:
        """Return the socket's descriptor, for a selector."""
        return self._sock.fileno()

    # Called from any thread

    def give(self, pieces: Sequence[memoryview]) -> int:
        """Send pieces; what the socket does not take goes into the outbox; return how many bytes are in it then."""
        with self._lock:
            was_empty, size = not self._outbox, sum(map(len, pieces))
            sent = self._send(pieces) if was_empty and size and not self.gone else 0
            if sent < size and not self.gone:
                if not was_empty and size < SMALL_BYTES > len(self._outbox[-1]):
                    pieces = [memoryview(b"".join((self._outbox.pop(), *pieces)))]
                self._outbox.extend(pieces)
                self.outbox_bytes += size
                self._advance(sent)
                if was_empty:
                    self._on_change(self)  # the server thread is to flush it
            return self.outbox_bytes

    def say(self, notice: str) -> int:
        """Give a line of our own; return the bytes in the outbox."""
        return self.give([memoryview(f"{notice}\n".encode())])

    def flush(self) -> int:
        """Send FLUSH_BYTES of the outbox, or a piece more, as far as the socket takes them; return what is left."""
        with self._lock:
            size, pieces = 0, []
            for piece in self._outbox:
                pieces.append(piece[:FLUSH_BYTES])
                size += len(piece)
                if size >= FLUSH_BYTES:
                    break
            if pieces:
                self._advance(self._send(pieces))
                if self.gone and not self._outbox:
                    self._shut(socket.SHUT_WR)
            return self.outbox_bytes

    def finish(self, and_wake: bool = False) -> None:
        """Take no more; once the outbox is sent, end the stream; perhaps wake the handler. Does not block."""
        with self._lock:
            self.gone, self.readable = True, False
            if not self._outbox:
                self._shut(socket.SHUT_WR)
            if and_wake:
                self._shut(socket.SHUT_RD)

    def evict(self) -> None:
        """Give up the connection and its outbox; wakes a blocked ``recv``. Does not block, may be repeated."""
        with self._lock:
            self.readable = False
            self._give_up()

    # Runs in the server thread

    def is_below_floor(self, is_slow: bool) -> bool:
        """Return whether it took too little to be kept. To be called once a second while there is an outbox."""
        seconds, wanted = (FLOOR_SECONDS, FLOOR_BYTES) if is_slow else (STALL_SECONDS, 1)
        with self._lock:
            if self._taken >= wanted or is_slow != self._was_slow:
                self._taken, self._was_slow, self._patience = 0, is_slow, Deadline(seconds)
        return not self._patience.left()

    def close(self) -> None:
        """Close the socket, which no selector may have any more: the descriptor is used again."""
        self.evict()
        with self._lock:
            self._sock.close()

    # Runs in the handler thread

    def prepare(self) -> None:
        """Set the socket's options; raise OSError when the peer is gone."""
        # A handler reads with a blocking recv while others send: a time-out would make them wait too (and accept()
        # may hand on the listener's non-blocking mode). Windows has no MSG_DONTWAIT: there the socket never blocks.
        self._sock.setblocking(sys.platform != "win32")
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Who has vanished must not keep its name for ever: idle, or with something on its way to it.
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in {**KEEPALIVE, "TCP_USER_TIMEOUT": VANISHED_SECONDS * 1_000}.items():
            with contextlib.suppress(AttributeError, OSError):  # this system does not let one set it
                self._sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def blocks(self) -> Iterator[tuple[bytes, bool]]:
        """Yield blocks of whole lines as ``Framer.feed`` does, until end-of-file, a reset, ``finish`` or ``evict``.

        Blocks in ``recv``, up to the client's deadline if it has one. An unfinished last line is yielded at
        end-of-file, not at a reset. What begins like another protocol is no chat, and none of it is yielded.
        """
        framer = Framer()
        head = b""  # what came first, up to the end of a line
        while True:
            if framer.ends_by_silence and not ready(self._sock, selectors.EVENT_READ, SILENCE_SECONDS):
                yield framer.rest(), False
                continue
            try:
                data = self.recv(self.read_bytes)
            except OSError:  # reset: the peer left in the middle of something; or its time is up
                return
            if not self.readable:
                return
            if not data:
                with self._lock:  # a send that has just been told of a reset has left end-of-file to recv
                    is_open_to_the_end = not self.gone
                if is_open_to_the_end:
                    yield framer.rest(), False
                return
            if b"\n" not in head:
                if not head:
                    data = data.removeprefix(UTF8_MARK)  # as PowerShell begins what it pipes
                head = (head + data).lstrip(b"\r\n")
                if head.startswith(TLS_HELLO):
                    return
                if OTHER_PROTOCOL.match(head):
                    self.give([memoryview(OTHER_ANSWER)])
                    return
                head = head[: head.find(b"\n") + 1 or None]
                head = head[:32] + head[32:][-32:]  # enough, however long the line
            yield framer.feed(data)

    def recv(self, size: int) -> bytes:
        """Wait for ``size`` bytes on the wire at most, and return their text, READ_BYTES at most; empty at end-of-file.

        Raises OSError at a reset, and when the deadline passes.
        """
        if self.deadline and not ready(self._sock, selectors.EVENT_READ, self.deadline.left()):
            raise TimeoutError
        if sys.platform == "win32":  # where shutdown in one thread does not wake another: look once a second
            while not ready(self._sock, selectors.EVENT_READ, 1.0) and self.readable:
                pass
        return self._sock.recv(size)

    def drain(self) -> None:
        """Send the outbox and end-of-file, and let the peer close first: its input, unread, would reset both.

        Blocks DRAIN_SECONDS for the one and LINGER_SECONDS for the other at most. Comes after ``finish``.
        """
        draining = Deadline(DRAIN_SECONDS)
        while self.flush() and ready(self._sock, selectors.EVENT_WRITE, draining.left()):
            pass
        lingering = Deadline(LINGER_SECONDS)
        with contextlib.suppress(OSError):  # the peer is gone: that is what this waits for
            while (left := lingering.left()) and ready(self._sock, selectors.EVENT_READ, left):
                if not self._sock.recv(READ_BYTES):
                    return

    # Call with the lock held

    def _send(self, pieces: Sequence[memoryview]) -> int:
        """Send pieces; return how many bytes the socket took. Give up when the peer is gone."""
        try:
            if sys.platform == "win32":
                sent = self._sock.send(b"".join(pieces))
            else:
                sent = self._sock.sendmsg(pieces[:MAX_PIECES], (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # the system's, not the peer's trouble: it will pass
                self._give_up()
                self._on_change(self)
            return 0
        self._taken += sent
        return sent

    def _advance(self, sent: int) -> None:
        """Take so many bytes from the outbox's front."""
        self.outbox_bytes -= sent
        while sent and sent >= len(self._outbox[0]):
            sent -= len(self._outbox.popleft())
        if sent:
            self._outbox[0] = self._outbox[0][sent:]

    def _give_up(self) -> None:
        self.gone = True
        self._outbox.clear()
        self.outbox_bytes = 0
        self._shut(socket.SHUT_RDWR)

    def _shut(self, how: int) -> None:
        with contextlib.suppress(OSError):  # the peer is gone already, or the socket closed
            self._sock.shutdown(how)


class Writer:
    """A member that only listens: a queue, and a thread that writes what is in it, however slow that is.

    It makes nobody wait: what is over WRITER_BYTES in the queue is counted, and the count written in its place.
    """

    def __init__(self, name: str, write: Callable[[bytes], None], missed: str = "not shown") -> None:
        """Start the thread. ``write`` takes whole lines, may block, and raises OSError when they could not be written.

        Lines that were over the bound, or that it could not write, are told of as ``* 12 lines not shown``.
        """
        self._write = write
        self._missed = missed
        # Guards what follows; notified when there is something to do.
        self._changed = threading.Condition()
        self._queue: list[memoryview] = []
        self._bytes = 0
        self._lines_missed = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    # Called from any thread

    def give(self, pieces: Sequence[memoryview], limit: int = WRITER_BYTES) -> int:
        """Queue whole lines, or count them when the queue is full; return 0, as nobody has to wait for a writer."""
        with self._changed:
            if self._bytes > limit:
                self._lines_missed += sum(bytes(piece).count(b"\n") for piece in pieces)
            else:
                self._queue.extend(pieces)
                self._bytes += sum(map(len, pieces))
                self._changed.notify()
        return 0

    def say(self, text: str) -> None:
        """Queue one line of our own, if need be on top of a full queue. Does not block."""
        self.give([memoryview(f"{text}\n".encode("utf-8", "replace"))], 2 * WRITER_BYTES)

    def close(self) -> None:
        """Have the thread end after the last of the queue. Does not block."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def join(self, seconds: float) -> None:
        """Wait for the end of the thread, so many seconds at most."""
        self._thread.join(seconds)

    # Runs in the writer's thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                text, missed = b"".join(self._queue), self._lines_missed
                self._queue, self._bytes, self._lines_missed = [], 0, 0
            # What was missed came after the queue, which was full.
            notice = f"* {missed} lines {self._missed}\n".encode() if missed else b""
            try:
                self._write(text + notice)
            except OSError:  # closed, or the disk is full: that may change
                with self._changed:
                    self._lines_missed += missed + text.count(b"\n")


Member = Union[Client, Writer]  # who is given every round: ``give`` never blocks, and returns the bytes that wait
Speaker = Union[Client, "Link", "Operator"]  # who says something: has a label, and is gone if nobody waits any more


# --- The room: who is in it, whose turn it is, and who must wait for whom ---------------------------------------------

ROUND_BYTES = 65_536, 1_048_576  # least and most that one round relays
ROUND_DELIVERED_BYTES = 33_554_432  # between the two: what a round delivers to all members together
PORTION_BYTES = 256  # that a handler may always enqueue at once, even if its share of a round is less
QUEUE_BYTES = 2_097_152  # whoever has something to say waits while more is in the queue

HIGH_WATER_BYTES = 1_048_576  # a client with a larger outbox is a slow consumer, until it is below the other mark
LOW_WATER_BYTES = HIGH_WATER_BYTES // 2
BUDGET_BYTES = 4_194_304  # what all together may say while somebody is a slow consumer; with TLS,
TLS_BUDGET_BYTES = BUDGET_BYTES // 4  # as ciphertext is not shared; one client
CLIENT_BUDGET_BYTES = 262_144  # this at most
EPOCH_SECONDS = 60.0  # so long at most: whoever is a slow consumer then is evicted
REPLY_BYTES = 65_536  # a client's command is answered, and private words reach it, if no more waits for it
# So no outbox is larger than HIGH_WATER_BYTES and a round, as it may be when the first becomes a slow consumer, with
# QUEUE_BYTES and a block from the queue, and the budget of an epoch and of the next. With --announce, what is told of
# those who come and go in EPOCH_SECONDS is on top.
WHO_SHOWN = 50  # labels in one answer to /who


class Unusable(Exception):
    """What is wrong with what an option names, and what to do, as one sentence."""


class Refused(Exception):
    """Why somebody is turned away, as the text of a notice."""


class Quit(Exception):
    """Somebody leaves, or is gone."""


class Entry(NamedTuple):
    """Lines in the room's queue: for some members alone, or for all but some."""

    lines: bytes
    speaker: Speaker | None = None  # the room itself, if there is none
    without: Sequence[Member | Speaker | None] = ()
    only: Sequence[Member | Speaker | None] = ()


class Batch:
    """What one round relays: the lines for all, joined, of which each member gets what is for it, and its own lines."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        # What a member gets other than all the lines: start and end of a part, and what it gets in the place of that.
        self._cuts: dict[Member | Speaker | None, list[tuple[int, int, bytes]]] = {}
        start = 0
        for lines, _, without, only in entries:
            if only:
                for member in only:
                    self._cuts.setdefault(member, []).append((start, start, lines))
            else:
                for member in without:
                    self._cuts.setdefault(member, []).append((start, start + len(lines), b""))
                start += len(lines)
        self.lines = b"".join(entry.lines for entry in entries if not entry.only)
        self._whole = memoryview(self.lines)
        self._for_most = [self._whole] if self.lines else []

    def pieces_for(self, member: Member) -> Sequence[memoryview]:
        """Return the pieces for ``member``: views, so that a thousand outboxes hold the bytes once."""
        if member not in self._cuts:
            return self._for_most
        pieces, place = [], 0
        for start, end, instead in self._cuts[member]:
            pieces += [self._whole[place:start], memoryview(instead)]
            place = end
        pieces = [piece for piece in (*pieces, self._whole[place:]) if piece]
        if 2 * sum(map(len, pieces)) < len(self._whole):
            # A copy: an outbox of small views would keep all of its owner's own lines in memory.
            return [memoryview(b"".join(pieces))] if pieces else []
        return pieces


class Room:
    """The members, and the relay from each to all others in one order.

    All that a member is told goes through one queue: what others say, notices, private words, replies.
    """

    def __init__(
        self,
        console: Writer,
        limit: Limit,
        log: Writer | None = None,
        quiet: bool = False,
        announce: bool = False,
        history: History | None = None,
        budget_bytes: int = BUDGET_BYTES,
        welcome: str | None = None,
    ) -> None:
        self._console = console
        self._log = log
        self.announces = announce
        self._history = history
        self._link: Link | None = None
        self._budget_bytes = budget_bytes
        self._welcome = welcome
        # Its holder has the turn: for a whole round, or to enter and leave. Outermost lock. Guards the members.
        self._turn = threading.Lock()
        self._members: list[Member] = [*([] if quiet else [console]), *([log] if log else [])]
        # Held for moments, never while sending. Taken inside the turn, or alone. Guards what follows.
        self._queue_lock = threading.Lock()
        self._queue: collections.deque[Entry] = collections.deque()
        self._queue_bytes = 0
        self._queued: set[Speaker] = set()  # who has something in the queue: at most one entry
        self._turn_is_awaited = False  # somebody waits for the turn, and will take what is enqueued until then
        self._waiting: dict[Speaker, threading.Condition] = {}  # handlers that wait to enqueue something
        self._clients: dict[str, Client] = {}  # by label, folded
        self._newcomers: set[Speaker] = set()  # of whom the others are not yet told, nor see them in lists
        self._limit = limit
        self._closed = False  # nobody says anything more, nobody comes in
        self._slow: set[Client] = set()  # the slow consumers; an epoch lasts from the first to the last of them
        self._epoch = Deadline(0)
        self._client_budget = 0  # what each may say in this epoch,
        self._spent: dict[Speaker | None, int] = {}  # and has said; clients that came later share the budget of None

    # Runs in the main thread

    def add(self, link: Link) -> None:
        """Take in the link to other servers: it is given every line but its own, and speaks. Waits for the turn."""
        with self._turn:
            self._link = link
            self._members.append(link)

    # Runs in the handler thread

    def join(self, client: Client) -> None:
        """Enter: from here on ``client`` is given every line. Raise Refused with the reason. Waits for the turn."""
        with self._turn:
            with self._queue_lock:
                if self._closed:
                    raise Refused("server stopping")
                self._limit.acquire(client)
                client.label = self._free_label(client.address[1])
                self._clients[client.label] = client
                self._say_to_log(client, f"joined from {client.address[0]}")
                if self.announces:
                    self._newcomers.add(client)
            self._members.append(client)
            self._console.say(f"New connection from : {client.address}")
            if self._welcome:
                client.say(self._welcome)
            if self.announces:
                client.say(self._who(client))
            if self._history:
                client.give(self._history.replay())

    def introduce(self, speaker: Speaker) -> None:
        """Tell the others that a newcomer has joined, by the name that it has by now, unless they have been told."""
        if speaker in self._newcomers:
            with self._queue_lock:
                self._newcomers.discard(speaker)  # it is out already if the server has just stopped
                self._tell_of(speaker, "joined")
            self._broadcast()

    def leave(self, client: Client) -> None:
        """Leave; nothing is given to ``client`` from here on. Waits until its last lines are out. May be repeated."""
        with self._queue_lock:
            while client in self._queued:  # or what is told of its end would come before
                self._wait(client)
        with self._turn:
            self._remove(client)
        self._broadcast()

    # What follows waits until the speaker may have its say, then perhaps for the turn: see _may_say. Raises Quit.

    def relay(self, speaker: Speaker, lines: bytes) -> None:
        """Give ``lines`` to all other members, in portions that let others have their say."""
        if lines:
            self.introduce(speaker)
        while lines:
            with self._queue_lock:
                while not (portion := self._portion(speaker, lines)):
                    self._wait(speaker)
                block, lines = portion
                self._enqueue(Entry(block, speaker, without=[speaker]))
            self._broadcast()

    def rename(self, client: Client, name: str) -> None:
        """Give ``client`` another label, and tell all, in the order of what is said; or tell it that it is taken."""
        notice = f"* {client.label} is now {name}\n".encode()
        with self._queue_lock:
            while not self._may_say(client, notice):
                self._wait(client)
            is_free = self._clients.get(folded(name)) in (None, client) and self._is_here(client)
            if is_free:
                del self._clients[folded(client.label)]
                self._clients[folded(name)] = client
                client.label = name
                knowing = (client, self._console, self._log) if client in self._newcomers else ()
                self._enqueue(Entry(notice, client, only=knowing))
        self._broadcast()
        if not is_free:
            self.reply(client, f"* name '{name}' is taken")

    def tell(self, client: Client, target: Client | str, text: str) -> None:
        """Give a private word to one client, or the one of a label; tell ``client`` that it went, or why not."""
        notice = f"* {client.label} to you: {text}\n".encode()
        with self._queue_lock:
            while not self._may_say(client, notice):
                self._wait(client)
            found = self._clients.get(folded(target)) if isinstance(target, str) else target
            if found and not self._is_here(found):
                found = None
            # Nobody shares these bytes: if the outboxes of all who do not read took them, memory would have no bound.
            is_told = found and found.outbox_bytes <= REPLY_BYTES
            if found and is_told:
                found.heard_from = client
                self._enqueue(Entry(notice, client, only=[found]))
        self._broadcast()
        if found and is_told:
            self.reply(client, f"* to {found.label}: {text}")
        elif found:
            self.reply(client, f"* {found.label} has much to read yet: say it again later")
        elif not isinstance(target, str):
            self.reply(client, "* who wrote to you has left")
        elif self._link and "@" in target:
            self.reply(client, f"* private words stay on one server: {quoted(target)} is on another")
        else:
            self.reply(client, f"* nobody here is called {quoted(target)}")

    def reply(self, client: Client, *notices: str) -> None:
        """Give lines to ``client`` alone, after what it has said, once it has taken most of what it was given."""
        lines = "".join(f"{notice}\n" for notice in notices).encode()
        with self._queue_lock:
            while (client.outbox_bytes > REPLY_BYTES and not client.gone) or not self._may_say(client, lines):
                self._wait(client)
            self._enqueue(Entry(lines, client, only=[client]))
        self._broadcast()

    def who(self, client: Client) -> None:
        """Tell ``client`` who is here."""
        self.reply(client, self._who(client))

    # Called from any thread

    def clients(self) -> dict[str, Client]:
        """Return who is here, by label, folded."""
        with self._queue_lock:
            return dict(self._clients)

    def evict(self, client: Client) -> None:
        """Give up ``client``: its handler wakes, wherever it waits, and leaves."""
        client.evict()
        self.reconsider(client)

    def reconsider(self, client: Client) -> bool:
        """See to whom something happened: some of its outbox was sent, or it is gone. Return whether it is slow."""
        with self._queue_lock:
            if client.outbox_bytes < LOW_WATER_BYTES:
                self._recover(client)
            self._wake([client])
            return client in self._slow

    def _who(self, client: Client) -> str:
        """Return a notice that names the first who are here, in order of arrival, and ``client``; no other newcomer."""
        unknown = self._newcomers - {client}
        members = self._members.copy()  # perhaps without the turn
        clients = (member for member in members if isinstance(member, Client) and member not in unknown)
        shown = list(itertools.islice(clients, WHO_SHOWN))
        if client not in shown:
            shown[WHO_SHOWN - 1 :] = [client]
        names = ", ".join(member.label + (" (you)" if member is client else "") for member in shown)
        count = len(self._clients) - len(unknown)
        more = f", and {count - len(shown)} more" if count > len(shown) else ""
        return f"* {count} here: {names}{more}{self._link.elsewhere() if self._link else ''}"

    # Runs in the server thread

    def overdue(self) -> list[Client]:
        """Return the slow consumers if there was one all through the last EPOCH_SECONDS."""
        with self._queue_lock:
            return [] if self._epoch.left() else list(self._slow)

    def close(self) -> None:
        """Let nobody in and nothing be said any more; relay what is enqueued."""
        with self._queue_lock:
            self._closed = True
        self._broadcast(to_the_end=True)

    def dismiss(self) -> None:
        """Take everyone out of the room who is still in it; their connections end with the process."""
        with self._turn:
            for client in list(self._clients.values()):
                self._remove(client)

    # The relay itself: runs in the handler that has the turn

    def _broadcast(self, to_the_end: bool = False) -> None:
        """Give what is queued to all members, a round at a time, until nothing is left or another awaits the turn.

        Waits for the turn. Does nothing if somebody waits for it already, who will do all this. ``to_the_end`` leaves
        nothing to another, and returns when the last round is over, whoever has given it.
        """
        if not to_the_end and (self._turn_is_awaited or not self._queue):  # without the lock: at worst, two wait
            return
        self._turn_is_awaited = True
        with self._turn:
            while batch := self._next_batch():
                if self._history:
                    self._history.add(batch.lines)
                for member in self._members:
                    pieces = batch.pieces_for(member)
                    if pieces and member.give(pieces) > HIGH_WATER_BYTES:
                        self._note_slow(member)
                # Who enqueues something just after this look waits for the turn, or found somebody who does.
                if self._turn_is_awaited and not to_the_end:
                    return

    def _next_batch(self) -> Batch | None:
        """Take a round from the queue, first come, first served."""
        size = self._round_bytes()
        entries: list[Entry] = []
        with self._queue_lock:
            # Before the look at the queue: what is enqueued after it is for somebody else to give.
            self._turn_is_awaited = False
            was_full = self._queue_bytes > QUEUE_BYTES
            while self._queue and (not entries or size >= len(self._queue[0].lines)):
                entry = self._queue.popleft()
                entries.append(entry)
                size -= len(entry.lines)
                self._queue_bytes -= len(entry.lines)
                if entry.speaker:
                    self._queued.remove(entry.speaker)
                    self._wake([entry.speaker])
            if was_full:
                self._wake(self._waiting)
        return Batch(entries) if entries else None

    def _round_bytes(self) -> int:
        least, most = ROUND_BYTES
        return max(least, min(most, ROUND_DELIVERED_BYTES // max(1, len(self._members))))

    def _note_slow(self, member: Member) -> None:
        """Begin to hold the others back for a slow consumer."""
        if not isinstance(member, Client):
            return
        with self._queue_lock:
            if member.outbox_bytes > HIGH_WATER_BYTES:  # or the server thread has sent it since, and found nobody slow
                if not self._slow:  # what may be said in this epoch is fixed, or people who come and go would add to it
                    share = self._budget_bytes // len(self._members)
                    self._client_budget = max(PORTION_BYTES, min(CLIENT_BUDGET_BYTES, share))
                    self._spent = dict.fromkeys(self._clients.values(), 0)
                    self._epoch = Deadline(EPOCH_SECONDS)
                self._slow.add(member)

    # Call with the turn held

    def _remove(self, client: Client) -> None:
        """Take ``client`` out of the room, if it is in it."""
        with self._queue_lock:
            if not self._is_here(client):
                return
            del self._clients[folded(client.label)]
            self._limit.release(client)
            self._recover(client)
            self._say_to_log(client, client.end)
            if client in self._newcomers:
                self._newcomers.remove(client)
            elif self.announces and not self._closed:  # before anybody else can have its label
                self._tell_of(client, client.end)
        client.heard_from = None  # or those who left would be kept in a chain
        self._members.remove(client)
        self._console.say("Connection closed")

    # Call with the queue's lock held

    def _free_label(self, port: int) -> str:
        label, number = str(port), 1
        while label in self._clients:  # the same port on another host
            number += 1
            label = f"{port}-{number}"
        return label

    def _is_here(self, client: Client) -> bool:
        return self._clients.get(folded(client.label)) is client

    def _say_to_log(self, client: Client, what: str) -> None:
        if self._log:
            self._log.say(f"* {client.label} {what}")

    def _tell_of(self, speaker: Speaker, what: str) -> None:
        notice = f"* {speaker.label} {what}\n".encode()
        self._enqueue(Entry(notice, without=[speaker, self._console, self._log]))

    def _enqueue(self, entry: Entry) -> None:
        assert self._queue_lock.locked()  # noqa: S101 - a precondition that runs
        self._queue.append(entry)
        self._queue_bytes += len(entry.lines)
        if entry.speaker:
            self._queued.add(entry.speaker)

    def _portion(self, speaker: Speaker, lines: bytes) -> tuple[bytes, bytes] | None:
        """Return what ``speaker`` may enqueue now of its ``lines``, labelled, and the others; None if it must wait."""
        if not self._may_say(speaker, b""):
            return None
        size = self._round_bytes() // (len(self._queue) + 1)  # the next round has one for everyone who wants to speak
        if self._slow:
            size = min(size, self._client_budget // 4)
        size = max(size, PORTION_BYTES)
        some = front(lines, size)
        block = labelled(speaker.label, some)
        if len(block) > size:  # as many lines as would fit if all were of one length
            some = front(some, size * len(some) // len(block))
            block = labelled(speaker.label, some)
        return (block, lines[len(some) :]) if self._may_say(speaker, block) else None

    def _may_say(self, speaker: Speaker, lines: bytes) -> bool:
        """Return whether ``speaker`` may enqueue ``lines`` now, and if so, take them off its budget.

        It may not while something of its own is in the queue, or the queue is full; nor while somebody is a slow
        consumer and ``speaker`` is that one or has spent its budget. Raises Quit when nobody is there to wait for it.
        """
        may = not (self._closed or speaker in self._queued or speaker in self._slow or self._queue_bytes > QUEUE_BYTES)
        if may and self._slow:
            payer = None if isinstance(speaker, Client) and speaker not in self._spent else speaker
            spent = self._spent.get(payer, 0) + len(lines)
            may = spent <= self._client_budget
            self._spent[payer] = spent if may else spent - len(lines)
        if not may and speaker.gone:
            raise Quit
        return may

    def _recover(self, client: Client) -> None:
        """Take ``client`` for a slow consumer no more."""
        if client in self._slow:
            self._slow.remove(client)
            if not self._slow:
                self._spent.clear()  # or it would keep those who have left
                self._wake(self._waiting)

    def _wait(self, speaker: Speaker) -> None:
        """Wait for a change that concerns ``speaker``. Only its handler may wait."""
        changed = self._waiting[speaker] = threading.Condition(self._queue_lock)
        changed.wait()
        del self._waiting[speaker]

    def _wake(self, speakers: Iterable[Speaker]) -> None:
        for speaker in speakers:
            if speaker in self._waiting:
                self._waiting[speaker].notify()


# --- People: names that nobody else can have or fake, and commands ----------------------------------------------------

NAME_CHARACTERS = 24  # of a name at most
UNCOMPOSED_CHARACTERS = 4 * NAME_CHARACTERS + 1  # more than become a name: at most four compose one
# Letters and marks all the same: fillers, joiners, vowels that are not written, variation selectors.
SHOWS_NOTHING = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
LOOKS_LIKE_A_COLON = re.compile("[\u02d0\u0903\u0a83\ua4fd]")  # in Unicode's confusables.txt
RESERVED_NAMES = "server", "you", "exit"
QUOTED_CHARACTERS = 40  # of what somebody typed, in an answer


def folded(label: str) -> str:
    """Return ``label`` in the form in which two are the same."""
    label = label[:UNCOMPOSED_CHARACTERS]  # what is longer is no label, and would take its time
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKD", label).casefold())


def name_problem(name: str) -> str:
    """Return why ``name``, in Unicode's form NFKC, is not one; nothing if it is."""
    if not 1 <= len(name) <= NAME_CHARACTERS:
        return f"{NAME_CHARACTERS} characters at most"
    if SHOWS_NOTHING.search(name):
        return "it has a letter that shows nothing"
    if LOOKS_LIKE_A_COLON.search(name):
        return "it has a letter that looks like a colon"
    if unicodedata.category(name[0])[0] != "L":
        return "it must begin with a letter"
    for character in name:
        category = unicodedata.category(character)
        if not (category[0] == "L" or category in ("Mn", "Mc", "Nd") or character in "_-."):
            return "letters, digits, _, - and . only"
    return "it is reserved" if folded(name) in RESERVED_NAMES else ""


def word_and_rest(text: str) -> tuple[str, str]:
    """Return the first word of a text that begins with one, and what follows its blanks."""
    word = text.replace("\t", " ", 1).partition(" ")[0]
    return word, text[len(word) :].lstrip(" \t")


def quoted(text: str) -> str:
    """Return the beginning of what somebody typed, to be told of it."""
    return f"'{text[:QUOTED_CHARACTERS]}{'…' if len(text) > QUOTED_CHARACTERS else ''}'"


# What commands do that the room does not, in the handler of their client. All block like Room.relay.


def nick(room: Room, client: Client, wanted: str) -> None:
    wanted = wanted.strip(" \t")
    name = unicodedata.normalize("NFKC", wanted[:UNCOMPOSED_CHARACTERS])
    problem = name_problem(name)
    if problem:
        room.reply(client, f"* not a name: {quoted(wanted)}: {problem}")
    elif name != client.label:
        room.rename(client, name)


def answer(room: Room, client: Client, text: str) -> None:
    if client.heard_from:
        room.tell(client, client.heard_from, text)
    else:
        room.reply(client, "* nobody has written to you privately")


def list_commands(room: Room, client: Client) -> None:
    room.reply(client, *(f"* {usage}: {meaning}" for usage, meaning, _ in COMMANDS.values()))


def leave(room: Room, client: Client) -> None:
    raise Quit


Commands = dict[str, tuple[str, str, Callable[..., None]]]  # usage, meaning, and what does it

COMMANDS: Commands = {
    "/nick": ("/nick NAME", "be called NAME", nick),
    "/who": ("/who", "see who is here", Room.who),
    "/msg": ("/msg NAME TEXT", "say TEXT to NAME alone", Room.tell),
    "/r": ("/r TEXT", "answer who last wrote to you alone", answer),
    "/help": ("/help", "see this", list_commands),
    "/quit": ("/quit", "leave, as exit does", leave),
}


def obey(commands: Commands, line: str, reply: Callable[[str], object], *whose: object) -> None:
    """Do what a line with a command asks, in the thread of who asks. Blocks like ``Room.relay``. Raises Quit."""
    name, argument = word_and_rest(line)
    command = "/quit" if name.lower() == "/exit" else name.lower()
    if command not in commands:
        reply(f"* unknown command {quoted(name)}: /help lists them, // sends a line that starts with /")
        return
    usage, _, function = commands[command]
    wanted, optional = usage.count(" "), usage.count("[")
    arguments = word_and_rest(argument) if wanted == 2 else (argument,) if wanted or argument else ()
    if all(arguments[: wanted - optional]) and len(arguments) == wanted:
        function(*whose, *arguments)
    else:
        reply(f"* usage: {usage}")


# --- The server: the thread that accepts, flushes outboxes, and keeps the clock ---------------------------------------

LISTEN_QUEUE = 65_535  # connections not yet accepted: as many as the system allows
CROSSING_MAX = 14  # on their way in or out at once: who connects and resets without end must not make more threads
MAX_WATCHED = 500 if sys.platform == "win32" else 1_000_000  # clients: select() there takes 512 sockets
NAME_SECONDS = 1.0  # in which a newcomer may ask for a name before the others are told of it
STOP_SECONDS = 0.5  # in which a server that is stopped lets everyone go
TICK_SECONDS = 1.0  # between two looks at what only time can tell
STOP_SIGNALS = {number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP")}
FREE_SECONDS_A_READ = 100e-6  # of a processor: with so much more for each byte that is relayed, what honest text takes,
FREE_SECONDS_A_BYTE = 15e-9  # and more
WORK_SHARE = 0.02  # of a processor, for what more a handler works than that,
WORK_CREDIT_SECONDS = 0.02  # and this at once; Windows' clock of work ticks in almost as much
COMMAND_SECONDS = 50e-6  # of a processor, for each command: what it takes depends on how many are to be told


class Bucket:
    """A token bucket: what is taken out of it comes back at a steady pace, and who takes more waits for it."""

    def __init__(self, a_second: float, most: float) -> None:
        self._a_second, self._most = a_second, most
        self._level, self._since = most, time.monotonic()

    def take(self, amount: float) -> None:
        """Take out so much; block until what the bucket did not hold has come in."""
        now = time.monotonic()
        self._level = min(self._most, self._level + (now - self._since) * self._a_second) - amount
        self._since = now
        if self._level < 0:
            time.sleep(-self._level / self._a_second)  # the pause is the price: nothing shortens it


class Work(Bucket):
    """What a handler's own work costs it, in seconds of a processor: nobody's work is free.

    One thread at a time runs Python, so whatever a peer can have its handler do holds up all others: lines of blanks,
    commands, characters to be replaced, TLS records of a byte. What takes more than plain text is paid for by a pause.
    """

    def __init__(self) -> None:
        super().__init__(WORK_SHARE, WORK_CREDIT_SECONDS)
        self._worked = time.thread_time()  # up to here it is paid for, or was for others

    def pay(self, free_seconds: float = 0.0) -> None:
        """Pay for what the calling thread has worked since the last call, but for so many seconds. Blocks."""
        self.take(time.thread_time() - self._worked - free_seconds)
        self._worked = time.thread_time()

    def not_for(self, call: Callable[..., object], *arguments: object) -> None:
        """Call what is work for others."""
        started = time.thread_time()
        call(*arguments)
        self._worked += time.thread_time() - started


class Server:
    """Serves whoever connects to a listening socket, until a signal stops it."""

    def __init__(
        self,
        listener: socket.socket,
        room: Room,
        console: Writer,
        errors: Writer,
        guests: Guests,
        new_client: Callable[..., Client] = Client,
    ) -> None:
        self._room = room
        self._console = console
        self._errors = errors
        self._guests = guests
        self._new_client = new_client
        # Any thread may change these; one operation at a time is safe.
        self._crossing: set[Client] = set()  # those who are on their way into the room, or out of it
        self._calls: collections.deque[Callable[[], object]] = collections.deque()  # asked of the server thread,
        self._wake_is_sent = False  # which is about to look for them
        self._wake_reader, self._wake_writer = socket.socketpair()
        # Only the server thread uses what follows.
        self._clients: set[Client] = set()  # all with a handler, in the room or not
        self._flushing: set[Client] = set()  # those with an outbox: watched until they can take more
        self._selector = selectors.DefaultSelector()
        self._listener = listener
        self._is_accepting = False  # the listener is watched
        self._until_tick = Deadline(TICK_SECONDS)
        self._stopping = False
        self._problem = ""  # why nobody could be accepted, as said last
        self._refused_hosts: set[str] = set()  # of which a refusal was shown since the last tick

    # Runs in the main thread

    def run(self) -> int:
        """Serve until SIGINT, SIGTERM, or SIGHUP if it is not ignored; return the exit status within a second."""
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        # Python writes the signal's number into this socket as it comes, so the server thread need not look for it.
        signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, lambda *_: None)
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # whatever our parent did
        thread = threading.Thread(target=self._serve, name="server")
        thread.start()
        thread.join()
        return 0 if self._stopping else 1  # an exception that nobody foresaw has ended the thread, and was shown

    # Runs in the server thread

    def _serve(self) -> None:
        self._selector.register(self._wake_reader, selectors.EVENT_READ, self._on_wake)
        self._accept_more()
        while not self._stopping:
            self._pass(self._until_tick)
        self._stop()

    def _stop(self) -> None:
        deadline = Deadline(STOP_SECONDS)
        # 1. Nobody new: the port is free.
        self._pause()
        self._listener.close()
        # 2. What was said is relayed, and nothing more is.
        self._room.close()
        # 3. Everyone gets end-of-file after what was queued; its handler leaves when the peer closes or says more.
        for client in self._clients:
            client.finish()
            self._room.reconsider(client)
        while self._clients and deadline.left():
            self._pass(deadline)
        # 4. Those who do not close stay behind. Waking thousands of handlers would only take time.
        self._room.dismiss()

    def _pass(self, deadline: Deadline) -> None:
        """Wait for something to do, up to the deadline, and do it."""
        for key, _ in self._selector.select(deadline.left()):
            key.data()
        if not self._until_tick.left():
            self._until_tick = Deadline(TICK_SECONDS)
            self._tick()

    def _tick(self) -> None:
        """Hold the floor, end an epoch, try again to accept."""
        for client in list(self._flushing):
            # Tried even if the selector is silent: Linux calls a socket writable only with a third of its buffer free.
            if client.is_below_floor(self._flush(client)):
                self._room.evict(client)
        for client in self._room.overdue():
            self._room.evict(client)
        self._refused_hosts.clear()
        self._accept_more()

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # read empty
            while True:
                self._stopping |= not STOP_SIGNALS.isdisjoint(self._wake_reader.recv(4_096))
        self._wake_is_sent = False  # before the calls are taken: who adds one from here on wakes us again
        while self._calls:
            self._calls.popleft()()

    def _accept_more(self) -> None:
        if not (self._is_accepting or self._stopping):
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
            self._is_accepting = True

    def _pause(self) -> None:
        """Accept nobody until the next tick, or until fewer are crossing."""
        if self._is_accepting:
            self._selector.unregister(self._listener)
            self._is_accepting = False

    def _accept(self) -> None:
        if len(self._crossing) >= CROSSING_MAX:
            self._pause()
            return
        try:
            sock, address = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # the peer left while it waited
            return
        except OSError as error:
            self._cannot_accept(error)
            return
        if not address:  # as macOS tells that it left
            sock.close()
            return
        address = plain_address(address)
        if not self._guests.are_allowed_from(address[0]):
            sock.close()
            self._show_refused(address)
            return
        client = self._new_client(sock, address, self._on_change)
        # Before its handler starts, or a client that leaves at once would be taken out before it is in.
        self._clients.add(client)
        self._crossing.add(client)
        try:
            threading.Thread(target=self._handle, args=(client,), daemon=True).start()
        except RuntimeError as error:  # no more threads
            self._crossing.remove(client)
            self._close(client)
            self._cannot_accept(error)

    def _cannot_accept(self, error: Exception) -> None:
        """Say once why nobody more can be accepted; try again at the next tick."""
        reason = getattr(error, "strerror", None) or str(error)
        if reason != self._problem:
            self._problem = reason
            count = len(self._clients)
            self._errors.say(f"{reason}, with {count} clients: nobody more can enter until some leave (ulimit -n).")
        self._pause()

    def _show_refused(self, address: tuple[str, int]) -> None:
        """Show who was turned away, one of a host between two ticks, so that a rude one does not fill the console."""
        host = host_key(address)
        if host not in self._refused_hosts:
            self._refused_hosts.add(host)
            self._console.say(f"Refused : {address}")

    def _watch(self, client: Client) -> None:
        """Watch a client that has got an outbox; have its handler wake if it is gone."""
        if client.gone:
            self._room.reconsider(client)
        if client.outbox_bytes and client not in self._flushing:
            self._flushing.add(client)
            if len(self._flushing) < MAX_WATCHED:  # the rest wait for the next tick
                self._selector.register(client, selectors.EVENT_WRITE, functools.partial(self._flush, client))

    def _flush(self, client: Client) -> bool:
        """Send some of an outbox; return whether its owner is still a slow consumer."""
        if not client.flush():
            self._forget(client)
        return self._room.reconsider(client)

    def _forget(self, client: Client) -> None:
        """Watch ``client`` no more."""
        if client in self._flushing:
            self._flushing.remove(client)
            if client in self._selector.get_map():
                self._selector.unregister(client)

    def _close(self, client: Client) -> None:
        """Close the socket of a client that nobody else uses any more."""
        self._forget(client)
        client.close()
        self._clients.remove(client)

    # Runs in the handler thread, one a client

    def _handle(self, client: Client) -> None:
        """Serve one client from its arrival to its end.

        Ends because whatever it waits for ends: ``recv`` and the wait to have its say (``Room._wait``), as
        ``Room.evict`` wakes both; the turn, as rounds are bounded and nobody broadcasts for ever; the door and
        ``drain``, as they have a deadline; the pauses for its pace and its work, which grow only with what it sent.
        """
        try:
            if self._guests.have_door:
                self._crossed(client)
                self._guests.enter_door(client)
            client.prepare()
            gate = Gate(client, self._guests.password) if self._guests.password else None
            if not gate:
                self._guests.leave_door(client)
                self._room.join(client)
            self._crossed(client)
            work, rate = Work(), self._guests.rate
            pace = Bucket(rate, rate * BURST_SECONDS) if rate else None
            if self._room.announces and not gate and not ready(client, selectors.EVENT_READ, NAME_SECONDS):
                self._room.introduce(client)
            for block, too_long in client.blocks():
                block += b"\n" * too_long  # which counts as a try, or a line, and is not relayed
                if gate:
                    rest = gate.rest_after_password(block)
                    if rest is None:
                        work.pay()
                        continue
                    self._guests.leave_door(client)
                    self._room.join(client)
                    gate, block, too_long = None, rest, False
                for part in re.findall(rb"[^\n]*\n", block) if pace else (block,):
                    if pace:
                        pace.take(1)
                        if client.gone:
                            return
                    self._hear(client, part, work)
                if too_long:
                    self._room.reply(client, LINE_TOO_LONG)
                work.not_for(self._room.introduce, client)
                work.pay(FREE_SECONDS_A_READ)
            if gate and client.deadline and not client.deadline.left():
                raise Refused(f"no password within {PASSWORD_SECONDS:.0f} s")
        except Quit:
            pass
        except Refused as refusal:
            self._call_soon(functools.partial(self._show_refused, client.address))
            client.say(f"* refused: {refusal}")
        except OSError:  # the peer was gone before it could enter
            pass
        finally:
            self._crossing.add(client)
            self._guests.leave_door(client)
            self._room.leave(client)
            client.finish()
            self._crossed(client)
            client.drain()
            self._call_soon(functools.partial(self._close, client))

    def _hear(self, client: Client, block: bytes, work: Work) -> None:
        """Relay the lines of a block and obey its commands. Blocks like ``Room.relay``; raise Quit."""
        for lines, command in parse(block):
            if not client.readable:
                return
            work.not_for(self._room.relay, client, lines)
            if command:
                reply = functools.partial(self._room.reply, client)
                work.not_for(obey, COMMANDS, command, reply, self._room, client)
                work.take(COMMAND_SECONDS)
            work.pay(FREE_SECONDS_A_BYTE * len(lines))

    def _crossed(self, client: Client) -> None:
        """Note that ``client`` is at the door, in the room or gone; have more accepted if that had to wait."""
        self._crossing.discard(client)
        if not self._is_accepting and len(self._crossing) <= CROSSING_MAX // 2:
            self._call_soon(self._accept_more)

    # Called from any thread

    def _on_change(self, client: Client) -> None:
        self._call_soon(functools.partial(self._watch, client))

    def _call_soon(self, call: Callable[[], object]) -> None:
        """Have the server thread call ``call``."""
        self._calls.append(call)
        if not self._wake_is_sent:
            self._wake_is_sent = True
            with contextlib.suppress(BlockingIOError):  # full: then it will wake anyway
                self._wake_writer.send(b"\0")


# --- History: what newcomers are told; off until asked for, a reader may skip it --------------------------------------

HISTORY_BYTES = 1_048_000  # told to a newcomer at most: it must not be a slow consumer with that alone
HISTORY_BLOCK_BYTES = 65_536  # what is over that is forgotten by so much at once
NOTICES = re.compile(rb"\n\* [^\n]*(?=\n)")


class History:
    """The last lines that were said, for newcomers, who share the bytes. Called with the turn held."""

    def __init__(self, lines: int) -> None:
        self._limit = lines
        self._bytes = self._count = 0
        self._blocks: collections.deque[tuple[str, bytes]] = collections.deque()  # the minute, and what was said in it

    def add(self, lines: bytes) -> None:
        """Keep what was said, without notices; forget what is over the limits."""
        lines = NOTICES.sub(b"", b"\n" + lines)[1:]
        self._bytes += len(lines)
        self._count += lines.count(b"\n")
        minute = time.strftime("%H:%M")
        if self._blocks and self._blocks[-1][0] == minute:
            lines = self._blocks.pop()[1] + lines
        while lines:
            block = front(lines, HISTORY_BLOCK_BYTES)
            self._blocks.append((minute, block))
            lines = lines[len(block) :]
        while self._bytes > HISTORY_BYTES or self._count > self._limit:
            minute, oldest = self._blocks.popleft()
            rest = oldest.split(b"\n", self._count - self._limit)[-1] if self._bytes <= HISTORY_BYTES else b""
            self._bytes -= len(oldest) - len(rest)
            self._count -= oldest.count(b"\n") - rest.count(b"\n")
            if rest:
                self._blocks.appendleft((minute, rest))

    def replay(self) -> list[memoryview]:
        """Return the last lines between a heading and an end, the minute before the first of each; or nothing."""
        if not self._blocks:
            return []
        told = [f"* the last {self._count} lines:\n".encode() if self._count > 1 else b"* the last line:\n"]
        for minute, blocks in itertools.groupby(self._blocks, lambda block: block[0]):
            told += [f"* {minute}\n".encode(), *(lines for _, lines in blocks)]
        return [memoryview(piece) for piece in (*told, b"* live from here\n")]


# --- Discovery: how clients on the same network find this server without an address; a reader may skip it -------------

DISCOVERY_PORT = 12000
QUESTION = re.compile(rb"mychat\?1 ([0-9a-f]{16}) {103}")
QUESTION_BYTES = 128  # more than any answer has: nobody can use us to send a third party more
ANSWERS_A_SECOND = 20  # to one host: what a rude one asks more is ignored, and takes nothing from others
DATAGRAMS_A_SECOND = 5_000  # a flood of more is left to the system, which drops it: a few per cent of a processor


class Discovery(socket.socket):
    """Answers ``mychatclient.py --lan``, which asks the whole network whether a server is there.

    A question is a broadcast UDP datagram of QUESTION_BYTES, ``mychat?1 TOKEN`` and blanks, TOKEN being 16 hexadecimal
    digits. It comes to port 12000 whatever ``--port`` says, or who asks would have to know. The answer goes to the
    asker alone, ``mychat!1 TOKEN ID PORT NAME``: the question's TOKEN, so that nobody answers who has not heard it; a
    random ID of 16 such digits, made at start, by which one server heard twice is one; the port on which the chat
    listens; this host's name, of letters, digits, ``.`` and ``-``. Anything else is ignored.
    """

    def __init__(self, port: int) -> None:
        """Tell of a chat on ``port`` whoever asks. Raises OSError when DISCOVERY_PORT is taken."""
        super().__init__(socket.AF_INET, socket.SOCK_DGRAM)
        # So that a second server on this machine hears the questions too.
        shared = getattr(socket, "SO_REUSEPORT" if sys.platform == "darwin" else "SO_REUSEADDR")
        self.setsockopt(socket.SOL_SOCKET, shared, 1)
        self.bind(("", DISCOVERY_PORT))
        name = re.sub("[^0-9A-Za-z.-]", "-", socket.gethostname())[:63] or "-"
        self._fields = f"{os.urandom(8).hex()} {port} {name}".encode()
        # Of the last second: which it was, how much was read in it, and the answers to each host.
        self._second, self._count, self._answers = 0, 0, collections.Counter[str]()

    def run(self) -> None:
        """Answer for as long as the process lives."""
        while True:
            if not self.answer():
                time.sleep(1)  # in a flood: what comes meanwhile is the system's to drop

    def answer(self) -> bool:
        """Wait for a datagram, and answer it if it is a question; return whether to go on in this second."""
        if self._second != (second := int(time.monotonic())):
            self._second, self._count, self._answers = second, 0, collections.Counter()
        self._count += 1
        with contextlib.suppress(OSError):  # it is none, or too long for Windows, or there is no way back to the asker
            data, (host, port) = self.recvfrom(QUESTION_BYTES + 1)
            question = QUESTION.fullmatch(data)
            if question and self._answers[host] < ANSWERS_A_SECOND:
                self._answers[host] += 1
                self.sendto(b"mychat!1 %s %s" % (question[1], self._fields), (host, port))
        return self._count < DATAGRAMS_A_SECOND


# --- Guests: who may come in, and how much each may say; off until asked for, a reader may skip it --------------------

DOOR_PLACES = 1_000  # for who has yet to finish the handshake or say the password
DOOR_READ_BYTES = 512  # at once, before the password
CROWDED = "too many are waiting to enter"
PASSWORD_SECONDS = 30.0  # in which it must be said,
PASSWORD_TRIES = 3  # in so many tries,
WRONG_SECONDS = 1.0  # each of which costs as much
BURST_SECONDS = 10  # with --rate, what a client may say at once after a silence: as much as in so many seconds
PACED_READ_BYTES = 256  # read at once with --rate: what a client may not say yet stays unread
UTF8_MARK, UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")  # with which Windows' editors begin a file

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


def host_key(address: tuple[str, int]) -> str:
    """Return what stands for the host of an address: with IPv6 its /64, in which one host can take any address."""
    host = address[0].partition("%")[0]
    return str(ipaddress.ip_interface(f"{host}/64").network) if ":" in host else host


class Limit:
    """So many clients at once, in all and of one host; None is no limit. Call with the lock held that guards it."""

    def __init__(self, in_all: int | None, of_a_host: int | None) -> None:
        self._in_all, self._of_a_host = in_all, of_a_host
        self._count = 0
        self._by_host: collections.Counter[str] = collections.Counter()
        self.banned: set[str] = set()  # hosts that have no place; the operator changes it, without the lock

    def acquire(self, client: Client) -> None:
        """Take a place for ``client``; raise Refused when there is none."""
        host = host_key(client.address)
        if host in self.banned:
            raise Refused(BANNED)
        if self._count == self._in_all:
            raise Refused(f"server full: {self._count} of {self._in_all} clients")
        if self._by_host[host] == self._of_a_host:
            raise Refused(f"too many from your address: {self._of_a_host} of {self._of_a_host} clients")
        self._count += 1
        self._by_host[host] += 1

    def release(self, client: Client) -> None:
        """Give back the place that ``client`` has."""
        host = host_key(client.address)
        self._count -= 1
        self._by_host[host] -= 1
        if not self._by_host[host]:  # or hosts that came once would be kept for ever
            del self._by_host[host]


class Guests:
    """Who may connect, and who waits at the door: for TLS's handshake, and to say the password."""

    def __init__(self, networks: Sequence[Network], password: bytes, rate: int | None, certificate: str | None) -> None:
        self.networks = networks  # all there are, if there is none
        self.password = password  # nobody is asked for one, if there is none
        self.certificate = certificate  # the file, with TLS
        self.rate = rate  # lines a second, of each
        self.have_door = bool(password or certificate)
        # Guards what follows. No other lock but a client's own is taken inside.
        self._door_lock = threading.Lock()
        self._at_door: dict[Client, str] = {}  # and their hosts, the oldest first

    # Runs in the server thread

    def are_allowed_from(self, host: str) -> bool:
        """Return whether somebody may connect from the address ``host``."""
        return not self.networks or any(ipaddress.ip_address(host) in network for network in self.networks)

    # Runs in the handler thread

    def enter_door(self, client: Client) -> None:
        """Take a place at the door; if all are taken, that of the oldest of the host which has the most."""
        client.read_bytes, client.deadline = DOOR_READ_BYTES, Deadline(PASSWORD_SECONDS)
        with self._door_lock:
            if len(self._at_door) >= DOOR_PLACES:
                ((crowd, _),) = collections.Counter(self._at_door.values()).most_common(1)
                oldest = next(waiting for waiting, host in self._at_door.items() if host == crowd)
                del self._at_door[oldest]
                oldest.say(f"* refused: {CROWDED}")
                oldest.deadline = Deadline(0)
                oldest.evict()
            self._at_door[client] = host_key(client.address)

    def leave_door(self, client: Client) -> None:
        """Give up the place at the door, if ``client`` has one, and with it the deadline."""
        with self._door_lock:
            self._at_door.pop(client, None)
        client.read_bytes, client.deadline = PACED_READ_BYTES if self.rate else READ_BYTES, None


class Gate:
    """Asks one client for the password, before anything else is heard or said. Runs in its handler."""

    def __init__(self, client: Client, password: bytes) -> None:
        import hmac

        self._client = client
        self._is_password = functools.partial(hmac.compare_digest, password)
        self._name = b""  # the line with which it has asked for a name
        self._tries_left = PASSWORD_TRIES
        client.say("* password?")

    def rest_after_password(self, block: bytes) -> bytes | None:
        """Return what is to be heard of ``block`` if the password is in it: what follows, after the name asked for.

        Each wrong line costs WRONG_SECONDS. Raises Refused after too many, Quit when the client leaves.
        """
        while block:
            line, _, block = block.partition(b"\n")
            line = TELNET.sub(b"", corrected(line))
            if self._is_password(line):
                self._client.say("* password accepted")
                return self._name + block
            if line.strip(b"\t ").lower() in (b"exit", b"/exit", b"/quit"):
                raise Quit
            if not self._name and re.match(rb"[\t ]*/(?i:nick)[\t ]", line):
                self._name = line[:DOOR_READ_BYTES] + b"\n"  # more is no name
                continue
            self._pause()
            self._tries_left -= 1
            if not self._tries_left:
                raise Refused("wrong password")
            self._client.say("* wrong password")
        return None

    def _pause(self) -> None:
        """Have guessing take its time. Raises Quit as soon as the connection is given up or reset."""
        poll = getattr(select, "poll", None)
        if not poll:  # as on Windows: the thread stays so long
            time.sleep(WRONG_SECONDS)
        else:
            waiting = poll()
            waiting.register(self._client, 0)  # for its end alone
            if waiting.poll(WRONG_SECONDS * 1_000):
                raise Quit


def network(text: str) -> Network:
    """Return ``text`` as a network; raise what argparse turns into a usage error."""
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        problem = f"{text!r} is not a network: 192.168.1.0/24, 2001:db8::/32, 10.0.0.7"
        raise argparse.ArgumentTypeError(problem) from None


@contextlib.contextmanager
def usable(path: str | None, advice: str) -> Iterator[None]:
    """Raise Unusable when an OSError tells that a file cannot be used."""
    try:
        yield
    except OSError as error:
        raise Unusable(f"Cannot use {path}: {error.strerror}; {advice}.") from None


def password_from(path: str | None) -> bytes:
    """Return the password, of a file's first line or the environment; nothing if neither is given.

    Raises Unusable.
    """
    if path is None:
        password, path = os.environ.get("MYCHAT_PASSWORD", "").encode("utf-8", "surrogateescape"), "MYCHAT_PASSWORD"
        if not password:
            return b""
    else:
        with usable(path, "give --password-file another file"), open(path, "rb", buffering=0) as file:
            password = file.readline(MAX_LINE_BYTES + len(UTF8_MARK) + 3)  # no more, if it is standard input
        if password.startswith(UTF16_MARKS):
            raise Unusable(f"{path} is in UTF-16, as Windows' Unicode: save it as UTF-8.")
        password = password.removeprefix(UTF8_MARK).removesuffix(b"\n").removesuffix(b"\r")
    if not re.fullmatch(rb"[^\r\n]+", password) or len(password) > MAX_LINE_BYTES:
        raise Unusable(f"{path} holds no password: that is one line of 1 to {MAX_LINE_BYTES} bytes, the first.")
    return password


# --- The operator: who runs the server may speak and act; off until asked for, a reader may skip it -------------------

BANNED = "banned"
NO_OPERATOR = "No terminal to read from, as in the background: the chat goes on without its operator."


class Operator:
    """Whoever types where the server runs: a speaker in the room, who may also kick the others.

    A thread reads standard input, be it a terminal, a pipe or a FIFO. Its end ends that thread, not the server.
    """

    label = "server"  # which nobody else can take
    gone = False

    def __init__(self, room: Room, banned: set[str], console: Writer, errors: Writer, log: Writer | None) -> None:
        """Start the thread. Call in the main thread."""
        self._room, self._banned = room, banned
        self._console, self._errors, self._log = console, errors, log
        if sys.platform != "win32":
            signal.signal(signal.SIGTTIN, signal.SIG_IGN)  # which stops whoever reads in the background
        threading.Thread(target=self._run, name="operator", daemon=True).start()

    def _run(self) -> None:
        framer, data = Framer(), b"\n"
        while data:
            try:
                with open(0, "rb", buffering=0, closefd=False) as file:  # on Windows the console, with its Unicode
                    data = file.read(READ_BYTES)
            except OSError:
                self._errors.say(NO_OPERATOR)
                return
            block, too_long = framer.feed(data) if data else (framer.rest(), False)
            for lines, command in parse(block):
                self._room.relay(self, lines)
                if command:
                    obey(OPERATOR_COMMANDS, command, self._console.say, self)
            if too_long:
                self._console.say(LINE_TOO_LONG)

    def _answer(self, text: str, log: Writer | None = None) -> None:
        for writer in filter(None, (self._console, log)):
            writer.say(f"* {text}")

    def _find(self, name: str) -> Client | None:
        return self._room.clients().get(folded(name.rstrip(" \t")))

    def kick(self, name: str, reason: str = "") -> None:
        client = self._find(name)
        if client:
            self._answer(f"{client.label} was kicked")
            client.end = "was kicked"
            client.say(f"* refused: {': '.join(filter(None, ('kicked', reason)))}")
            client.finish(and_wake=True)
            self._room.reconsider(client)
        else:
            self._answer(f"nobody here is called {quoted(name)}")

    def ban(self, name: str) -> None:
        client = self._find(name)
        if client and ipaddress.ip_address(client.address[0]).is_loopback:
            self._answer("not banned: all who come by ssh have this machine's own address")
        elif client:
            host = host_key(client.address)
            self._banned.add(host)  # before it can come back
            self._answer(f"{host} is banned", self._log)
        self.kick(name)

    def unban(self, host: str = "") -> None:
        """Let in again who comes from there; with and without it, tell who is banned."""
        self._banned.discard(host.rstrip(" \t"))
        self._answer(f"banned: {', '.join(sorted(self._banned)) or 'nobody'}")

    def who(self) -> None:
        clients = self._room.clients().values()
        self._answer(f"{len(clients)} here")
        for client in clients:
            self._answer(f"{client.label} from {client.address[0]}")

    def list_commands(self) -> None:
        for usage, meaning, _ in OPERATOR_COMMANDS.values():
            self._answer(f"{usage}: {meaning}")


OPERATOR_COMMANDS: Commands = {
    "/kick": ("/kick NAME [REASON]", "have NAME leave, and tell it why", Operator.kick),
    "/ban": ("/ban NAME", "have NAME leave, and let in nobody from its address", Operator.ban),
    "/bans": ("/bans", "see which addresses are banned", Operator.unban),
    "/unban": ("/unban ADDRESS", "let in again who comes from there", Operator.unban),
    "/who": ("/who", "see who is here, and from where", Operator.who),
    "/help": ("/help", "see this", Operator.list_commands),
    "/quit": ("/quit", "stop the server, as exit and Ctrl-C do", lambda _: signal.raise_signal(signal.SIGINT)),
}


# --- TLS: the same chat encrypted, for who asks for it with --tls-cert; else nothing of this runs ---------------------

HANDSHAKE_SECONDS = 10.0  # in which a TLS handshake must be finished
TLS_READ_BYTES = READ_BYTES - 18_437  # of ciphertext at once: with a record that began before, no more text than that
TLS_SILENT_BYTES = 32_768  # of ciphertext without any text in it: honest peers send records of half of this
TLS_OUTPUT_BYTES = 16_384  # that a peer's own TLS may have ours answer at once: hundreds of new keys


def tls_context(certificate: str, key: str | None) -> ssl.SSLContext:
    """Return what encrypts with the certificate and key in these PEM files; raise Unusable. Never asks a question."""
    try:
        import ssl
    except ImportError:
        problem = "This Python has no ssl module, so no TLS: use another Python, or leave --tls-cert out."
        raise Unusable(problem) from None

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # as newer libraries have it anyway
    # Who sends and closes without reading would find the tickets unread, and reset what it has sent. Nobody resumes.
    context.num_tickets = 0
    needed = "a certificate and its key without a pass phrase, in PEM, the key in --tls-key's file or in the same"
    with usable(f"{certificate} with {key}" if key else certificate, f"--tls-cert needs {needed}"):
        context.load_cert_chain(certificate, key, lambda: "")
    return context


def asked_of_clients(certificate: str) -> tuple[str, list[str]]:
    """Return the option that a client needs, and the names that it may join by if the certificate is self-signed.

    One that an authority has signed is for the names that people know; the library does not tell them.
    """
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(certificate)
    for found in context.get_ca_certs():
        if found["subject"] == found["issuer"]:
            return f" --tls-ca {certificate}", [str(name[1]) for name in found.get("subjectAltName", ())]
    return " --tls", []


class TlsClient(Client):
    """A client whose socket carries ciphertext: so does its outbox, and ``recv`` returns text.

    An SSLObject with two buffers in memory, in which nothing ever waits, is between. It must not be read by one thread
    while another writes: it is used with the client's lock held.
    """

    def __init__(self, context: ssl.SSLContext, *arguments: Any) -> None:
        import ssl

        super().__init__(*arguments)
        self._received, self._output = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._output, server_side=True)
        self._wants_more = ssl.SSLWantReadError
        self._is_secured = False  # for good: until then what is given goes out as it is

    def prepare(self) -> None:
        """Do the handshake, too, before anything else is sent. Blocks HANDSHAKE_SECONDS at most.

        Raises Refused for a peer that does not speak TLS, OSError for one that does so wrongly, slowly, or is gone.
        """
        super().prepare()
        deadline = Deadline(HANDSHAKE_SECONDS)
        # With TLS the client speaks first: one that says nothing is as plain as one that says something else.
        is_heard = ready(self, selectors.EVENT_READ, deadline.left())
        if not is_heard or self._sock.recv(1, socket.MSG_PEEK) != TLS_HELLO[:1]:
            raise Refused("this server speaks TLS: join with mychatclient.py --tls")
        while not self._tls.version():
            if not ready(self, selectors.EVENT_READ, deadline.left()):
                raise TimeoutError
            data = self._sock.recv(TLS_READ_BYTES)
            if not data:
                raise ConnectionResetError
            with self._lock:
                self._received.write(data)
                with contextlib.suppress(self._wants_more):
                    self._tls.do_handshake()
                super().give([memoryview(self._output.read())])
        self._is_secured = True

    def recv(self, size: int) -> bytes:
        """Wait for ``size`` bytes on the wire at most, and return their text, READ_BYTES at most; empty at TLS's end.

        Raises OSError at what is not TLS, too, at TCP's end without TLS's own, and at a peer that sends records without
        text, or asks for new keys, without end.
        """
        data, silent = b"", 0  # some text may have come with the handshake
        while True:
            with self._lock:
                self._received.write(data)
                text = self._text()
                if self._output.pending > TLS_OUTPUT_BYTES or (silent > TLS_SILENT_BYTES and text is None):
                    raise ConnectionAbortedError
                self.give([])  # what TLS itself has to answer
            if text is not None:
                return text
            data = super().recv(min(size, TLS_READ_BYTES))
            if not data:
                raise ConnectionResetError
            silent += len(data)

    def finish(self, and_wake: bool = False) -> None:
        """End TLS, too, by its close_notify."""
        with self._lock:
            if not self.gone and self._is_secured:
                with contextlib.suppress(OSError):  # the peer's own end has not come
                    self._tls.unwrap()
                self.give([])
        super().finish(and_wake)

    def give(self, pieces: Sequence[memoryview]) -> int:
        """Encrypt pieces; send what TLS has to send: for them, or of its own."""
        with self._lock:
            if self._is_secured and not self.gone:
                with contextlib.suppress(OSError):  # TLS has failed in reading, or waits for the peer
                    for piece in pieces:
                        self._tls.write(piece)
                pieces = [memoryview(self._output.read())]
            return super().give(pieces)

    # Call with the lock held

    def _text(self) -> bytes | None:
        """Return what can be read now, empty at close_notify, None if that is nothing yet."""
        text = b""
        try:
            while part := self._tls.read(READ_BYTES):
                text += part
        except OSError as error:
            if not text and not isinstance(error, self._wants_more):  # with text, the next call raises it again
                raise
            return text or None
        return text


# --- Other servers: one room on many machines, over NATS; who runs a single server may skip this ----------------------

SERVER_NAME_CHARACTERS = 32  # with a person's name no longer than clients take for a label
LINK_MESSAGE_BYTES = 4 * MAX_LINE_BYTES  # for a line of which cleaning has made three bytes each; more is thrown away
LINK_START_SECONDS = 4.5  # at most, to find a NATS at the start
LINK_CONNECT_SECONDS = 2.0  # for each step of a connection: TCP's, NATS's and TLS's greetings, the login
LINK_SIGN_SECONDS = 5.0  # between two signs of life, and for NATS to confirm a message
LINK_PAUSE_SECONDS = 1.0  # before another try to connect, and before what was kept is sent
HEARD_SECONDS = 60.0  # since the last sign of life: then a server is no longer told of
SERVERS_REMEMBERED = 10_000  # a stranger may make up more

SERVER_NAME = re.compile(f"[0-9A-Za-z_-]{{1,{SERVER_NAME_CHARACTERS}}}")
SUBJECT = re.compile(r"mychat\.[0-9A-Za-z_-]+\.([0-9A-Za-z_-]{1,40})\.([0-9A-Za-z_]{1,16})\.([0-9]{1,9})\.said")
NATS_URL = re.compile(r"(nats|tls)://(?:([^@:/]+)(?::(.*))?@)?(\[[^]@/]+\]|[^]@/:[]+)(?::([1-9]\d*)?)?/?")
NOT_SENT = "not sent to the other servers"
MISSED = re.compile(rb"(?m)^\* (\d+) lines %s\n" % NOT_SENT.encode())  # from the link's own writer: no label is so
LINK_PROBLEMS = {  # by what is in the names of an exception's classes and in its words, the first that fits
    "gaierror|UnicodeError": "Unknown host '{host}': check the URL of --nats.",
    "TimeoutError": "No answer from {nats}: is it stopped, or a firewall between? Check the URL of --nats.",
    "Connect call failed": "No {nats}: start nats-server there, or give --nats another URL.",
    "SSLCertVerificationError": "{nats} has no certificate to be trusted, {words}: give --nats-ca the right one.",
    "no TLS": "{nats} does not speak TLS: set it up there, or give a URL with nats://.",
    "(?i:authorization)": "{nats} does not let us in: check user and password, token or --nats-creds.",
    "ImportError": "--nats-creds needs the library nkeys: python -m pip install nkeys",
    "": "No link by {nats}, {words}: its log may say more, or it is not NATS.",
}


class Node(NamedTuple):
    """A NATS to connect to."""

    scheme: str  # nats, or tls: never without TLS
    user: str | None  # without a password it is a token
    password: str | None
    address: str  # host:port


def qualified(lines: bytes, server: str) -> bytes:
    """Return lines, and notices of people, as other servers show them: ``@server`` after each label."""
    lines = re.sub(rb"(?m)^((?:\* )?[^ :\n]+)", rb"\1@" + server.encode(), lines)
    return re.sub(rb"(?m)^(\* \S+ is now \S+)$", rb"\1@" + server.encode(), lines)


def validated(message: bytes, server: str) -> bytes:
    """Return the lines of a message that are whole, clean, not too long, and of people on ``server``."""
    label = rb"[^ \t\n:*@]{1,96}@" + server.encode()
    size = 3 * MAX_LINE_BYTES  # as cleaning may have made three bytes of each
    theirs = rb"(?m)^(?:%s:.{0,%d}|\* %s (?:joined|left|was kicked|is now %s))\n" % (label, size, label, label)
    return b"".join(re.findall(theirs, clean(message[: message.rfind(b"\n") + 1])))


class Link(Writer):
    """A member of the room and a speaker in it: the servers that share it, over NATS, by the library nats-py.

    A thread runs asyncio for the library. Two writers, this one and the arrivals, keep the room and NATS from waiting
    for each other. NATS confirms each message before the next is sent, so it is known what a cut may have lost. There
    is a new client of the library for each connection: not all that the library does after a cut can be relied on.
    Each server publishes under mychat.ROOM.NAME alone, with the random ID of its process and the number of its
    connection:
        mychat.ROOM.NAME.ID.NUMBER.said   whole lines, each with @NAME after its label; without any, a sign of life
    A line is believed only under the NAME that it has; who may publish there is for NATS's permissions to say. What
    comes late, by an earlier connection, is dropped, or it would be out of order.
    """

    label = ""  # what it says has labels
    gone = False

    def __init__(self, room: Room, console: Writer, errors: Writer, options: argparse.Namespace) -> None:
        """Connect to the first NATS that answers. Blocks for LINK_START_SECONDS at most; raises Unusable."""
        import asyncio
        import concurrent.futures
        import importlib
        import logging

        try:
            self._library: Any = importlib.import_module("nats.aio.client")
        except ImportError:
            raise Unusable("--nats needs the library nats-py: python -m pip install nats-py") from None

        async def look_up(*arguments: Any, **options: Any) -> Any:
            return socket.getaddrinfo(*arguments, **options)

        logging.disable()  # what goes wrong is said in a sentence, here
        self._room, self._console = room, console
        self._room_name = options.room or "main"
        host = re.sub("[^0-9A-Za-z_-]", "-", socket.gethostname().partition(".")[0])[:SERVER_NAME_CHARACTERS]
        self._server_name = options.server_name or host or "server"
        self._tls = tls_to_nats(options.nats_ca)
        creds = options.nats_creds
        self._credentials = self._library.RawCredentials(credentials(creds)) if creds is not None else None
        self._id = os.urandom(8).hex()
        self._arrivals = Writer("arrivals", functools.partial(room.relay, self), "from the other servers not shown")
        self._is_linked = threading.Event()  # and the other servers have had time to be
        self._tell = functools.lru_cache(maxsize=1)(errors.say)  # a problem once, until it is another
        # The asyncio thread changes what follows; others look.
        self._urls: list[Node] = options.nats
        self._node = self._urls[0]  # the last that was tried
        self._nats: Any = None  # the library's client: of the connection with this number
        self._number = 0
        self._lost: asyncio.Event  # the connection is closed, or NATS does not answer
        self._heard: dict[tuple[str, str], tuple[float, int]] = {}  # when, and the last NUMBER, by NAME and ID
        loop = asyncio.new_event_loop()
        loop.getaddrinfo = look_up  # type: ignore[method-assign] # a thread of asyncio's would hold up our end
        self._run_soon = functools.partial(asyncio.run_coroutine_threadsafe, loop=loop)
        threading.Thread(target=loop.run_forever, name="asyncio", daemon=True).start()
        try:
            self._run_soon(self._connect(self._urls)).result(LINK_START_SECONDS)
        except concurrent.futures.TimeoutError:  # perhaps a name is still looked up
            raise Unusable(linking_problem(TimeoutError(), self._node)) from None
        super().__init__("link", self._publish, NOT_SENT)

    # Runs in the main thread

    def start(self) -> None:
        """Join the room. Waits for the turn."""
        self._room.add(self)
        self._console.say(f"Linked to room {self._room_name} as {self._server_name}")
        self._is_linked.set()
        self._run_soon(self._stay_linked())

    # Called from any thread

    def elsewhere(self) -> str:
        """Return what a list of who is here ends with: the servers that were heard of in the last minute."""
        since = time.monotonic() - HEARD_SECONDS
        servers = list(dict.fromkeys(name for (name, _), (when, _) in self._heard.copy().items() if when >= since))
        more = f" and {len(servers) - WHO_SHOWN} more" if len(servers) > WHO_SHOWN else ""
        return f", and people on {', '.join(servers[:WHO_SHOWN])}{more}" if servers else ""

    # Runs in the writer's thread

    def _publish(self, lines: bytes) -> None:
        """Publish lines while there is a link, a message at a time; tell our people how many NATS may not have."""
        missed = sum(map(int, MISSED.findall(lines)))
        lines = qualified(MISSED.sub(b"", lines), self._server_name)
        while lines:
            self._is_linked.wait()
            some = front(lines, min(self._nats.max_payload, LINK_MESSAGE_BYTES))
            lines = lines[len(some) :]
            try:
                self._run_soon(self._send(some)).result()
            except Exception:  # of any kind that the library has
                missed += some.count(b"\n")
                time.sleep(LINK_PAUSE_SECONDS)  # in which a link that is lost is found to be
        if missed:
            self._arrivals.say(f"* {missed} lines {NOT_SENT}")

    # Runs in the asyncio thread

    async def _connect(self, nodes: Sequence[Node]) -> None:
        """Connect to the first node that answers; raise Unusable, with the last problem, when none does."""
        problem = ""
        for node in nodes:
            self._node, nats = node, self._library.Client()
            try:
                await self._log_in(nats, node)
                return
            except Exception as error:  # of any kind: who answers may be no NATS
                problem = linking_problem(error, node)
                self._run_soon(nats.close())
        raise Unusable(problem)

    async def _log_in(self, nats: Any, node: Node) -> None:
        """Have a new client of the library connect to ``node``, and hear the room."""
        import asyncio

        lost = asyncio.Event()
        take, login = nats._process_msg, nats._connect_command

        async def on_error(error: Exception) -> None:
            if nats.is_connected:
                self._tell(linking_problem(error, node))
            elif not nats.is_closed:  # the library would try for ever
                raise error

        async def on_closed() -> None:
            lost.set()

        async def on_message(*message: Any) -> None:
            with contextlib.suppress(Exception):  # a subject that is not UTF-8, say, would end the reading
                await take(*message)

        def first_words() -> bytes:
            """Return what the library sends first. It has begun TLS by then, but only if NATS has asked for it."""
            if node.scheme == "tls" and not nats._transport._io_writer.get_extra_info("ssl_object"):
                raise ConnectionError("no TLS")
            return bytes(login())

        nats._process_msg, nats._connect_command = on_message, first_words
        await nats.connect(
            f"{node.scheme}://{node.address}",
            name="mychatserver",
            no_echo=True,
            allow_reconnect=False,
            tls=self._tls,
            user=node.user,
            password=node.password,
            token=node.user,  # which goes out if there is no password
            user_credentials=self._credentials,
            connect_timeout=LINK_CONNECT_SECONDS,
            error_cb=on_error,
            closed_cb=on_closed,
        )
        await nats.subscribe(f"mychat.{self._room_name}.>", cb=self._hear)
        await nats.flush(LINK_CONNECT_SECONDS)
        self._nats, self._lost, self._number = nats, lost, self._number + 1

    async def _stay_linked(self) -> None:
        """Give signs of life; whenever the link is lost, tell people, and connect again. Does not end."""
        import asyncio

        while True:
            while not self._lost.is_set():
                self._run_soon(self._send(b""))  # not waited for: a link that is lost is told of at once
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._lost.wait(), LINK_SIGN_SECONDS)
            self._is_linked.clear()
            self._arrivals.say("* link to the other servers lost")
            self._run_soon(self._nats.close())  # which may never end
            others = [self._node._replace(address=other.netloc) for other in self._nats.discovered_servers]
            while True:
                try:
                    await self._connect([*self._urls, *others])
                    break
                except Unusable as problem:
                    self._tell(str(problem))
                    await asyncio.sleep(LINK_PAUSE_SECONDS)
            self._tell.cache_clear()
            self._arrivals.say("* link restored")
            await asyncio.sleep(LINK_PAUSE_SECONDS)  # the other servers may have been cut off, too
            self._is_linked.set()

    async def _send(self, lines: bytes) -> None:
        """Publish lines; return when NATS has confirmed that. Raises exceptions of any kind."""
        nats, lost = self._nats, self._lost
        await nats.publish(f"mychat.{self._room_name}.{self._server_name}.{self._id}.{self._number}.said", lines)
        try:
            await nats.flush(LINK_SIGN_SECONDS)
        except Exception:
            lost.set()
            raise

    async def _hear(self, message: Any) -> None:
        """Have our people told what a message says, unless it is a stranger's or late."""
        found = SUBJECT.fullmatch(message.subject)
        if not found or found[2] == self._id or len(message.data) > LINK_MESSAGE_BYTES:
            return
        name, process, number = found[1], found[2], int(found[3])
        if name == self._server_name and (name, process) not in self._heard:
            self._console.say(f"Another server is called {name}, too: give one of them another --server-name.")
        if number < self._heard.get((name, process), (0.0, 0))[1]:
            return
        if len(self._heard) >= SERVERS_REMEMBERED:
            self._heard.clear()
        self._heard[name, process] = time.monotonic(), number
        if lines := validated(message.data, name):
            self._arrivals.give([memoryview(lines)])
        time.sleep(0)  # let others run, who would wait for SWITCH_SECONDS in a storm of messages


def tls_to_nats(certificates: str | None) -> ssl.SSLContext:
    """Return a context that trusts certificates in a file, or the system's; raise Unusable when there are none."""
    import ssl

    with usable(certificates, "give --nats-ca certificates in PEM"):
        context = ssl.create_default_context(cafile=certificates)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # or Python 3.13 would not have what openssl makes by itself
    return context


def credentials(path: str) -> str:
    """Return a file of a user's credentials; raise Unusable if it has none: the library would search on for ever."""
    advice = "give --nats-creds a user's credentials"
    with usable(path, advice), open(path, errors="replace") as file:
        text = file.read()
    if "BEGIN NATS USER JWT" not in text or "BEGIN USER NKEY SEED" not in text:
        raise Unusable(f"Cannot use {path}: it has no JWT and key of a user; {advice}.")
    return text


def linking_problem(error: Exception, node: Node) -> str:
    """Return one sentence that says why there is no link by ``node``, and what to do."""
    words = getattr(error, "verify_message", "") or str(error)[:200]
    words = clean(words.encode("utf-8", "replace")).decode().replace("\n", " ").replace("nats: ", "")
    kinds = " ".join(kind.__name__ for kind in type(error).__mro__)
    sentence = next(sentence for what, sentence in LINK_PROBLEMS.items() if re.search(what, f"{kinds}: {words}"))
    host, _, port = node.address.rpartition(":")
    return sentence.format(host=host, nats=f"NATS at {host} port {port}", words=words)


def nats_urls(text: str) -> list[Node]:
    """Return what is in a list of URLs; raise what argparse turns into a usage error, which tells no secret."""
    from urllib.parse import unquote

    nodes: list[Node] = []
    for url in text.split(","):
        found = NATS_URL.fullmatch(url)
        if not found:
            raise argparse.ArgumentTypeError(
                "not a URL like nats://HOST:PORT or tls://HOST:PORT, with USER:PASSWORD@ or TOKEN@ before HOST"
            )
        scheme, user, password, host, port = found.groups()
        nodes.append(Node(scheme, user and unquote(user), password and unquote(password), f"{host}:{port or 4222}"))
    return nodes


def word(text: str) -> str:
    """Return the name of a room or a server; raise what argparse turns into a usage error."""
    if not SERVER_NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a name: letters, digits, _ and -, {SERVER_NAME_CHARACTERS} at most"
        )
    return text


class DiscreetParser(argparse.ArgumentParser):
    """A parser that repeats no secret when arguments are wrong."""

    def error(self, message: str) -> NoReturn:
        super().error(re.sub(r"://\S*@", "://...@", message))


def add_link_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the link to those of the command line."""
    add = parser.add_argument_group("other servers").add_argument
    url = os.environ.get("MYCHAT_NATS") or None
    add("--nats", type=nats_urls, default=url, metavar="URL[,URL...]", help="share a room (default: MYCHAT_NATS)")
    add("--room", type=word, metavar="NAME", help="the room to share (default: main)")
    add("--server-name", type=word, metavar="NAME", help="what other servers call this one (default: the host's)")
    add("--nats-ca", metavar="PEM", help="who may certify NATS (default: whom the system trusts)")
    add("--nats-creds", metavar="FILE", help="a NATS user's JWT and key (default: what the URL has)")


# --- The command line: where to listen, what to tell the user, and what can go wrong ----------------------------------

EVERY_IPV4, EVERY_ADDRESS = "0.0.0.0", "::"  # noqa: S104 - to listen on only if asked for
STACK_BYTES = 131_072  # of a handler thread: under 64 KiB Python 3.9 fails in places
SWITCH_SECONDS = 0.1  # each thread that waits to run Python asks once in this time: thousands do nothing else in 5 ms
WRITER_SECONDS = 0.4  # in which the last lines must be shown and logged when the server stops
LISTENING_PROBLEMS = {
    errno.EADDRINUSE: "Port {port} is taken: a server may be running there already; choose another with --port.",
    errno.EADDRNOTAVAIL: "{host} is not an address of this machine: give --host one that is, or 0.0.0.0 for all.",
    errno.EACCES: "No permission to listen on port {port}: choose one from 1024 up with --port.",
    0: "Cannot listen on {host} port {port}: {reason}; choose another with --host or --port.",  # whatever else
}
NEEDED_OPTIONS = {"tls_key": "tls_cert", "room": "nats", "server_name": "nats", "nats_ca": "nats", "nats_creds": "nats"}


def open_listener(host: str, port: int) -> socket.socket:
    """Return a non-blocking socket that listens on ``host``, the first of its addresses; raise Unusable."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        is_dual = address[0] == EVERY_ADDRESS and socket.has_dualstack_ipv6()
        listener = socket.create_server(address, family=family, backlog=LISTEN_QUEUE, dualstack_ipv6=is_dual)
    except (socket.gaierror, UnicodeError):
        problem = f"Unknown host {host!r}: give --host an address of this machine; a port goes to --port."
        raise Unusable(problem) from None
    except OSError as error:
        sentence = LISTENING_PROBLEMS.get(error.errno or 0, LISTENING_PROBLEMS[0])
        raise Unusable(sentence.format(host=host, port=port, reason=error.strerror)) from None
    listener.setblocking(False)
    return listener


def plain_address(address: tuple[str, int]) -> tuple[str, int]:
    """Return host and port of a socket's address, an IPv4 address that came over IPv6 as itself."""
    host, port = address[:2]
    return host[7:] if host.startswith("::ffff:") and "." in host else host, port


def addresses_for_others(host: str) -> list[str]:
    """Return the addresses by which other machines may reach a server that listens on ``host``, likeliest first."""
    if host not in (EVERY_IPV4, EVERY_ADDRESS):
        return [host]
    # On the way to addresses for documentation only, RFC 5737 and RFC 3849; without such a way, to all that are near.
    found = [own_address(socket.AF_INET, "192.0.2.1")]
    if host == EVERY_ADDRESS:
        found.append(own_address(socket.AF_INET6, "2001:db8::1"))
    if not any(found):
        interfaces = [name for _, name in socket.if_nameindex()] if sys.platform == "linux" else [""]
        found = [own_address(socket.AF_INET, "255.255.255.255", name) for name in interfaces]
    known = [ipaddress.ip_address(address) for address in dict.fromkeys(found) if address]
    known = [one for one in known if not (one.is_loopback or one.is_unspecified)]
    # An address of this link alone helps when there is no other; an IPv6 one would need an interface of the reader's.
    routed = [str(one) for one in known if not one.is_link_local]
    return routed or [str(one) for one in known if one.version == 4]


def own_address(family: int, target: str, interface: str = "") -> str:
    """Return the address of this machine on the way to ``target``, by one interface or any; "" without a way."""
    # Connecting a datagram socket sends nothing; it asks for the route.
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as asking:
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        if interface and sys.platform == "linux":
            asking.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        asking.connect((target, 9))
        return str(asking.getsockname()[0])
    return ""


def say_where(console: Writer, errors: Writer, listener: socket.socket, guests: Guests, lan: bool, found: bool) -> None:
    """Show where the server listens, and how others can join if they can: also by ``--lan`` if it can be found."""
    host, port, *rest = listener.getsockname()
    if any(rest):  # a link-local address is nothing without its interface
        host += f"%{socket.if_indextoname(rest[-1])}"
    console.say(f"Server listening on {f'[{host}]' if ':' in host else host}:{port}")
    if ipaddress.ip_address(host).is_loopback:
        return
    if guests.password and not guests.certificate:
        errors.say("The password, and all that is said, crosses the network unencrypted: --tls-cert encrypts it.")
    elif not guests.password:
        who = "from the networks of --allow" if guests.networks else "who can reach this server"
        way_back = f"without {'--lan' if lan else '--host'} the chat stays on this machine"
        errors.say(f"Anyone {who} can join: {way_back}, --password-file asks for a password.")
    option, names = asked_of_clients(guests.certificate) if guests.certificate is not None else ("", [])
    command = f"Others join with: python mychatclient.py{option}"
    others = addresses_for_others(host)
    if found and (not names or set(names) & set(others)):
        console.say(f"{command} --lan")
    for name in names or others:
        own = " (with the interface on your side behind the %)" if "%" in name else ""
        console.say(f"{command} {name}{'' if port == DEFAULT_PORT else f' {port}'}{own}")
    if not names and not others:
        console.say("No address was found that others could join by: is this machine on a network?")


def write_to_stream(descriptor: int) -> Callable[[bytes], None]:
    """Return a function for a Writer that writes to a standard stream."""
    # Unbuffered, so that nothing is left to fail at exit; on Windows this finds the console and its Unicode.
    file = open(descriptor, "wb", buffering=0, closefd=False)  # noqa: SIM115 - for good

    def write(text: bytes) -> None:
        rest = memoryview(text)
        while rest:
            if sys.platform != "win32":
                os.set_blocking(file.fileno(), True)  # it may be shared with a program that sets it otherwise
            rest = rest[file.write(rest) or 0 :]

    return write


def write_to_log(path: str, errors: Writer) -> Callable[[bytes], None]:
    """Return a function for a Writer that appends to a file, the time before each line; raise Unusable if it cannot.

    The file is opened for each batch: it may be renamed or deleted at any time, and what went wrong may be over.
    """
    with usable(path, "give --log another file"):
        open(path, "ab", opener=open_at_once).close()
    tell = functools.lru_cache(maxsize=1)(errors.say)  # a problem once, until it is another

    def write(text: bytes) -> None:
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds").encode() + b" "
        try:
            with open(path, "ab", opener=open_at_once) as file:
                file.write(now + text[:-1].replace(b"\n", b"\n" + now) + b"\n")
            tell.cache_clear()
        except OSError as error:
            tell(f"Cannot write to {path}: {error.strerror}; the chat goes on without a log.")
            raise  # the writer counts what was not written

    return write


def open_at_once(path: str, flags: int) -> int:
    """Open like ``os.open``, but raise OSError for a FIFO that nobody reads, rather than wait for somebody."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)  # Windows has neither
    if sys.platform != "win32":
        os.set_blocking(descriptor, True)
    return descriptor


def open_missing_descriptors() -> None:
    """Open the null device for a standard stream that was closed, or a socket would get its number and its text."""
    while os.open(os.devnull, os.O_RDWR) <= 2:  # the last one stays open, which does no harm
        pass


def raise_descriptor_limit() -> None:
    """Allow as many descriptors, one a client, as this process may have without asking anyone."""
    if sys.platform == "win32":
        return
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 10_240 if sys.platform == "darwin" and hard == resource.RLIM_INFINITY else hard
    with contextlib.suppress(OSError, ValueError):  # then the limit stays as it is
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def number(least: int, most: int) -> Callable[[str], int]:
    """Return a type for argparse: a whole number in these bounds."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} to {most}")
        return int(text)

    return parse


def welcome(text: str) -> str:
    """Return a text as a notice; raise ValueError for what means something else to a client."""
    text = clean(" ".join(text.split()).encode("utf-8", "surrogateescape")).decode()
    if re.match(r"refused: |password\?|$", text):
        raise ValueError
    return f"* {text}"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; exit with status 2 and a usage line when they are wrong."""
    count = number(1, 1_000_000)
    usage = "%(prog)s [PORT] [OPTION]...; --help lists the options"
    parser = DiscreetParser("mychatserver", usage, "A chat server.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mychatserver {__version__}")

    listening = parser.add_argument_group("where it listens")
    port, a_port = listening.add_mutually_exclusive_group(), number(0, 65_535)
    port.add_argument("port", nargs="?", type=a_port, help=f"0 takes a free one (default: {DEFAULT_PORT})")
    port.add_argument("--port", type=a_port, default=DEFAULT_PORT, dest="port_option", metavar="PORT", help="the same")
    address = listening.add_mutually_exclusive_group()
    address.add_argument("--host", default=DEFAULT_HOST, help="the address to listen on (default: %(default)s)")
    address.add_argument("--lan", action="store_true", help="listen on all addresses and be found (default: off)")

    add = parser.add_argument_group("who may come in").add_argument
    add("--max-clients", type=count, metavar="N", help="so many at once (default: no limit)")
    add("--max-per-host", type=count, metavar="N", help="so many from one host (default: no limit)")
    add("--allow", type=network, action="append", metavar="NETWORK", help="who connects from there (default: all)")
    add("--password-file", metavar="FILE", help="who says what is in FILE (default: MYCHAT_PASSWORD)")
    add("--tls-cert", metavar="PEM", help="who speaks TLS, with this certificate (default: do not)")
    add("--tls-key", metavar="PEM", help="the certificate's key (default: in its file)")

    add = parser.add_argument_group("what people see and may do").add_argument
    add("--welcome", type=welcome, metavar="TEXT", help="say TEXT to newcomers (default: nothing)")
    add("--announce", action="store_true", help="tell people who comes and goes (default: do not)")
    add("--history", type=number(0, 1_000_000), metavar="N", help="tell newcomers the last N lines (default: 0)")
    add("--rate", type=count, metavar="LINES", help="take so many a second from each (default: no limit)")

    add = parser.add_argument_group("what you see, do and keep").add_argument
    add("--quiet", action="store_true", help="do not show chat lines and names (default: show them)")
    add("--operator", action="store_true", help="say and do what is typed here (default: do not)")
    add("--log", metavar="FILE", help="append what is said to FILE (default: nowhere)")

    add_link_options(parser)
    options = parser.parse_args(argv)
    options.port = options.port_option if options.port is None else options.port
    for name, wanted in NEEDED_OPTIONS.items():
        if getattr(options, name) is not None and getattr(options, wanted) is None:
            parser.error(f"--{name} goes with --{wanted} alone: give that, too".replace("_", "-"))
    if options.lan:
        options.host = EVERY_ADDRESS if socket.has_dualstack_ipv6() else EVERY_IPV4
    options.host = re.sub(r"^\[(.*)\]$", r"\1", options.host)  # as the first line shows an IPv6 address
    return options


def serve(options: argparse.Namespace) -> int:
    """Run the server with these options until it is stopped; return the exit status. Raises Unusable."""
    context = tls_context(options.tls_cert, options.tls_key) if options.tls_cert is not None else None
    guests = Guests(options.allow or [], password_from(options.password_file), options.rate, options.tls_cert)
    listener = open_listener(options.host, options.port)
    console, errors = Writer("console", write_to_stream(1)), Writer("errors", write_to_stream(2))
    log = Writer("log", write_to_log(options.log, errors), "not written") if options.log is not None else None
    limit = Limit(options.max_clients, options.max_per_host)
    history = History(options.history) if options.history else None
    budget_bytes = TLS_BUDGET_BYTES if context else BUDGET_BYTES
    room = Room(console, limit, log, options.quiet, options.announce, history, budget_bytes, options.welcome)
    link = Link(room, console, errors, options) if options.nats else None
    is_found = False
    if options.lan:
        try:
            discovery = Discovery(listener.getsockname()[1])
            threading.Thread(target=discovery.run, name="discovery", daemon=True).start()
            is_found = True
        except OSError as error:
            problem = f"UDP port {DISCOVERY_PORT}: {error.strerror}; others join by address."
            errors.say(f"--lan finds no server here: {problem}")
    say_where(console, errors, listener, guests, options.lan, is_found)
    if link:
        link.start()
    if options.operator:
        Operator(room, limit.banned, console, errors, log)
    threading.stack_size(STACK_BYTES)
    sys.setswitchinterval(SWITCH_SECONDS)
    new_client = functools.partial(TlsClient, context) if context else Client
    status = Server(listener, room, console, errors, guests, new_client).run()
    deadline = Deadline(WRITER_SECONDS)
    for writer in (link, log, console, errors):  # in this order: the first ones may have something to say by the last
        if writer:
            writer.close()
            writer.join(deadline.left())
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server; return the exit status: 0 when it was stopped, 1 when something is in its way."""
    try:
        open_missing_descriptors()
        # A program that has put something of its own in a terminal's place, as IDLE does.
        is_replaced = sys.stdin is not sys.__stdin__ or sys.stdout is not sys.__stdout__
        if is_replaced and not (os.isatty(0) and os.isatty(1)):
            print("Run this in a terminal: python mychatserver.py")
            return 1
        options = parse_args(argv)
        raise_descriptor_limit()
        return serve(options)
    except Unusable as problem:
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, f"{problem}\n".encode("utf-8", "replace"))
        return 1
    except RuntimeError as error:  # no thread can be started
        sys.exit(f"Cannot start: {error}; this user may have no more processes or memory (ulimit -u, ulimit -v).")
    except KeyboardInterrupt:  # before the server thread could see to it
        return 0


if __name__ == "__main__":
    sys.exit(main())
