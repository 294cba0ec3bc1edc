"""The server's parts without a server: one client, and what waits for its turn in the room."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any, cast
from unittest import mock

import mychatserver
from tests.support import LOOPBACK, SECONDS, Background, TestCase, eventually


class Quiet:
    """A console that shows nothing."""

    def say(self, text: str) -> None:
        pass


class Queue(TestCase):
    """What waits for its turn."""

    def test_lines_of_the_limit_do_not_pile_up_and_small_portions_pass(self) -> None:
        """A hundred at once, of bytes that each become three: else they could be more than a backlog may be."""
        room = mychatserver.Room(cast(Any, Quiet()))
        room._members.clear()  # nobody hears anything: what is queued is what counts
        background, clients, peers = Background(), [], []
        for number in range(100):
            sock, peer = socket.socketpair()
            client = mychatserver.Client(sock, (LOOPBACK, 20_000 + number), lambda _: None)
            room.join(client)
            room._members.remove(client)
            clients.append(client)
            peers.append(peer)
        line = "\ufffd".encode() * 65_536 + b"\n"
        bound = mychatserver.QUEUE_BYTES
        with room._turn:  # as in the middle of a round
            for client in clients[1:]:
                background.run(room.relay, client, line)
            eventually(lambda: len(room._waiters) + len(room._queued) == 99)
            self.assertGreater(room._queue_bytes, bound - 2 * len(line))
            self.assertLessEqual(room._queue_bytes, bound)
            background.run(room.relay, clients[0], b"a typed line\n")
            eventually(lambda: clients[0] in room._queued)
        background.join()
        self.assertEqual((room._queue_bytes, len(room._queue), len(room._waiters)), (0, 0, 0))
        self.assertEqual(sum(client.said for client in clients[1:]), 99 * (len("20000:") + len(line)))
        for client, peer in zip(clients, peers):
            client.close()
            peer.close()


class Member(TestCase):
    def setUp(self) -> None:
        with socket.create_server((LOOPBACK, 0)) as listener:
            self.peer = socket.create_connection(listener.getsockname(), SECONDS)
            sock, address = listener.accept()
        self.watched = threading.Event()
        self.client = mychatserver.Client(sock, address, lambda _: self.watched.set())
        self.client.prepare()
        self.addCleanup(self.client.close)
        self.addCleanup(self.peer.close)

    def seconds_to_the_floor(self, late: bool = False) -> int:
        """Have the peer stop reading, with a backlog; return when it is let go."""
        self.client.give([memoryview(b"x" * 50_000_000)])
        return next(second for second in range(1, 100) if self.client.under_floor(late))

    def test_who_is_late_and_takes_too_little_is_let_go_after_five_seconds(self) -> None:
        self.assertEqual(self.seconds_to_the_floor(late=True), 5)

    def test_who_has_a_backlog_and_takes_nothing_is_let_go_after_thirty_seconds(self) -> None:
        """However much it said while it read."""
        self.client.said = 10_000_000
        self.client.give([memoryview(b"taken\n")])
        self.assertEqual(self.seconds_to_the_floor(), 30)

    def test_who_pours_meanwhile_is_let_go_after_five_seconds(self) -> None:
        self.client.give([memoryview(b"taken\n")])
        self.client.give([memoryview(b"x" * 50_000_000)])
        self.client.said = 10_000_000
        with mock.patch.object(self.client, "_send", return_value=0):
            self.client.flush()  # which does not count: nothing is taken
            self.assertEqual(next(second for second in range(1, 100) if self.client.under_floor(False)), 5)

    def test_who_becomes_late_has_five_seconds_from_then_on(self) -> None:
        """What it took in the seconds before is no longer looked at."""
        self.assertEqual([self.client.under_floor(False) for _ in range(10)], [False] * 10)
        self.assertEqual([self.client.under_floor(True) for _ in range(5)], [False] * 4 + [True])

    def test_a_reset_that_a_send_is_told_of_is_no_end_of_file(self) -> None:
        """What was unfinished is not relayed, though recv then says end-of-file."""
        blocks = self.client.blocks()
        self.peer.sendall(b"half a line")
        self.assertEqual(next(blocks), (b"", False))
        self.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.peer.close()
        self.client.give([memoryview(b"meanwhile\n")])
        self.assertEqual(list(blocks), [])

    def test_end_of_file_ends_the_last_line(self) -> None:
        self.peer.sendall(b"half a line")
        self.peer.shutdown(socket.SHUT_WR)
        self.assertEqual(b"".join(block for block, _ in self.client.blocks()), b"half a line\n")

    def test_who_leaves_gets_what_was_queued_even_if_it_writes_before_it_reads(self) -> None:
        expected = b"x" * 20_000_000
        self.client.give([memoryview(expected)])
        self.assertTrue(self.watched.is_set())
        background = Background()
        received = bytearray()
        with mock.patch.object(mychatserver, "DRAIN_SECONDS", SECONDS):
            background.run(self.client.drain)
            self.peer.sendall(b"y" * 15_000_000)
            with contextlib.suppress(ConnectionResetError):
                while data := self.peer.recv(1 << 20):
                    received += data
        self.assertEqual(bytes(received), expected)
        self.peer.close()
        background.join()

    def test_drain_ends_when_the_peer_has_closed(self) -> None:
        self.peer.close()
        background = Background()
        with mock.patch.object(mychatserver, "LINGER_SECONDS", 10 * SECONDS):
            background.run(self.client.drain)
            background.join()

    def test_drain_waits_at_rest_for_a_peer_that_does_not_close(self) -> None:
        with (
            mock.patch.object(mychatserver, "LINGER_SECONDS", 0.1),
            mock.patch.object(mychatserver, "ready", wraps=mychatserver.ready) as ready,
        ):
            self.client.drain()
        self.assertLess(ready.call_count, 10)

    def test_input_is_waited_for_up_to_the_deadline(self) -> None:
        self.client.deadline = time.monotonic() + 0.1
        background = Background()
        with self.assertRaises(TimeoutError):
            background.run(self.client.recv, 1)
            background.join()


class Backlog(TestCase):
    """What waits for a connection, which takes as many bytes as a test says."""

    def setUp(self) -> None:
        self.sock = mock.Mock()
        self.asked = 0  # times that the server thread was asked to send
        self.client = mychatserver.Client(self.sock, (LOOPBACK, 1), self.ask)
        self.takes = 0
        self.heard = b""
        self.sent: list[int] = []  # pieces in each send
        self.client._send = self.send  # type: ignore[method-assign]

    def ask(self, client: mychatserver.Client) -> None:
        self.asked += 1

    def send(self, pieces: Sequence[memoryview]) -> int:
        self.sent.append(len(pieces))
        data = b"".join(pieces)[: self.takes]
        self.takes -= len(data)
        self.heard += data
        return len(data)

    def give(self, *pieces: bytes, takes: int) -> int:
        """Give pieces to a connection that takes so much now; return the backlog."""
        self.takes = takes
        return self.client.give([memoryview(piece) for piece in pieces])

    def test_nothing_overtakes_a_backlog(self) -> None:
        """However small it is, and though the connection could take it."""
        self.assertEqual(self.give(b"one", b"two", takes=5), 1)
        self.assertEqual(self.give(b"three", takes=100), 6)
        self.assertEqual((self.heard, self.asked), (b"onetw", 1))
        self.assertEqual(self.client.flush(), 0)
        self.assertEqual(self.give(b"four", takes=100), 0)
        self.assertEqual((self.heard, self.asked), (b"onetwothreefour", 1))

    def test_a_backlog_goes_out_in_its_order_so_much_and_so_many_pieces_at_a_time(self) -> None:
        pieces = [bytes([65 + number]) * size for number, size in enumerate((3, 7, 25, 1, 1, 1, 1, 10, 9))]
        whole = b"".join(pieces)
        with mock.patch.multiple(mychatserver, FLUSH_BYTES=10, MAX_PIECES=3, SMALL_BYTES=0):
            self.assertEqual(self.give(*pieces, takes=0), len(whole))
            self.sent.clear()
            self.takes = 100
            left: list[int] = []
            while not left or left[-1]:
                left.append(self.client.flush())
        self.assertEqual(self.heard, whole)
        self.assertEqual(left, [48, 38, 28, 21, 11, 1, 0])
        self.assertLessEqual(max(self.sent), 3)

    def test_small_pieces_are_joined_and_large_ones_are_not_copied(self) -> None:
        large = memoryview(b"y" * mychatserver.SMALL_BYTES)
        self.client.give([large])
        for _ in range(10_000):
            self.give(b"x" * 10, takes=0)
        self.client.give([large])
        self.client.give([large])
        self.assertEqual(self.client.behind, 100_000 + 3 * len(large))
        self.assertLess(len(self.client._backlog), 40)
        self.assertEqual(sum(piece.obj is large.obj for piece in self.client._backlog), 3)
        self.takes = 1 << 20
        self.client.flush()
        self.assertEqual(self.heard, bytes(large) + b"x" * 100_000 + bytes(large) * 2)

    def test_end_of_file_comes_behind_the_backlog_and_nothing_more_is_taken(self) -> None:
        self.give(b"last", takes=1)
        self.client.finish()
        self.assertEqual(self.give(b"later", takes=0), 0)
        self.sock.shutdown.assert_not_called()
        self.takes = 100
        self.assertEqual(self.client.flush(), 0)
        self.sock.shutdown.assert_called_once_with(socket.SHUT_WR)
        self.assertEqual(self.heard, b"last")
        self.assertEqual((self.client.leaving, self.client.ended), (True, False))

    def test_who_is_let_go_is_sent_nothing_more(self) -> None:
        self.give(b"last", takes=1)
        self.client.end()
        self.sock.shutdown.assert_called_once_with(socket.SHUT_RDWR)
        self.assertEqual((self.give(b"later", takes=100), self.client.flush(), self.heard), (0, 0, b"l"))
        self.client.finish()
        self.assertEqual((self.client.leaving, self.client.gone, self.client.ended), (True, True, True))
