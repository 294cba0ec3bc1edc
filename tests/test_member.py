"""One client of the server, without a room: what its peer's end means, and what is sent at its own."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

import mychatserver
from tests.support import LOOPBACK, SECONDS, Background, TestCase


class Ending(TestCase):
    def setUp(self) -> None:
        with socket.create_server((LOOPBACK, 0)) as listener:
            self.peer = socket.create_connection(listener.getsockname(), SECONDS)
            sock, address = listener.accept()
        self.watched = threading.Event()
        self.client = mychatserver.Client(sock, address, lambda _: self.watched.set())
        self.client.prepare()
        self.addCleanup(self.client.close)
        self.addCleanup(self.peer.close)

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
        background.run(self.client.drain)
        self.peer.sendall(b"y" * 15_000_000)
        received = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while data := self.peer.recv(1 << 20):
                received += data
        self.assertEqual(bytes(received), expected)
        self.peer.close()
        background.join()
