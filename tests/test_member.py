"""One client of the server, without a room: what its peer's end means, and what is sent at its own."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from unittest import mock

import mychatserver
from tests.support import LOOPBACK, SECONDS, Background, TestCase


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
