"""The server's parts without a server: one client, and what waits for its turn in the room."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
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
        self.assertEqual(next(second for second in range(1, 100) if self.client.under_floor(False)), 5)

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
