"""The server's parts without a server: one client, and what waits for its turn in the room."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from typing import Any, cast
from unittest import mock

import mychatserver
from tests.support import LOOPBACK, SECONDS, Background, Connection, Quiet, TestCase, eventually


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
            self.client.flush()  # neither counts: nothing is taken
            self.client.give([memoryview(b"more\n")])
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
    """What waits for a connection."""

    def setUp(self) -> None:
        self.client = Connection()

    def give(self, *pieces: bytes, takes: int) -> int:
        """Give pieces to a connection that takes so much now; return the backlog."""
        self.client.takes = takes
        return self.client.give([memoryview(piece) for piece in pieces])

    def test_nothing_overtakes_a_backlog(self) -> None:
        """However small it is, and though the connection could take it."""
        self.assertEqual(self.give(b"one", b"two", takes=5), 1)
        self.assertEqual(self.give(b"three", takes=100), 6)
        self.assertEqual((self.client.heard, self.client.asked), (b"onetw", 1))
        self.assertEqual(self.client.flush(), 0)
        self.assertEqual(self.give(b"four", takes=100), 0)
        self.assertEqual((self.client.heard, self.client.asked), (b"onetwothreefour", 1))

    def test_a_backlog_goes_out_in_its_order_so_much_and_so_many_pieces_at_a_time(self) -> None:
        pieces = [bytes([65 + number]) * size for number, size in enumerate((3, 7, 25, 1, 1, 1, 1, 10, 9))]
        whole = b"".join(pieces)
        with mock.patch.multiple(mychatserver, FLUSH_BYTES=10, MAX_PIECES=3, SMALL_BYTES=0):
            self.assertEqual(self.give(*pieces, takes=0), len(whole))
            self.client.sent.clear()
            self.client.takes = 100
            left: list[int] = []
            while not left or left[-1]:
                left.append(self.client.flush())
        self.assertEqual(self.client.heard, whole)
        self.assertEqual(left, [48, 38, 28, 21, 11, 1, 0])
        self.assertLessEqual(max(self.client.sent), 3)

    def test_small_pieces_are_joined_and_large_ones_are_not_copied(self) -> None:
        large = memoryview(b"y" * mychatserver.SMALL_BYTES)
        self.client.takes = 0
        self.client.give([large])
        for _ in range(10_000):
            self.give(b"x" * 10, takes=0)
        self.client.give([large])
        self.client.give([large])
        self.assertEqual(self.client.behind, 100_000 + 3 * len(large))
        self.assertLess(len(self.client._backlog), 40)
        self.assertEqual(sum(piece.obj is large.obj for piece in self.client._backlog), 3)
        self.client.takes = 1 << 20
        self.client.flush()
        self.assertEqual(self.client.heard, bytes(large) + b"x" * 100_000 + bytes(large) * 2)

    def test_end_of_file_comes_behind_the_backlog_and_nothing_more_is_taken(self) -> None:
        self.assertEqual((self.client.leaving, self.client.gone, self.client.ended), (False, False, False))
        self.give(b"last", takes=1)
        self.client.finish()
        self.assertEqual(self.give(b"later", takes=0), 0)
        self.client.sock.shutdown.assert_not_called()
        self.client.takes = 100
        self.assertEqual(self.client.flush(), 0)
        self.client.sock.shutdown.assert_called_once_with(socket.SHUT_WR)
        self.assertEqual(self.client.heard, b"last")
        self.assertEqual((self.client.leaving, self.client.ended), (True, False))

    def test_who_is_let_go_is_sent_nothing_more(self) -> None:
        self.give(b"last", takes=1)
        self.client.end()
        self.client.sock.shutdown.assert_called_once_with(socket.SHUT_RDWR)
        self.assertEqual((self.give(b"later", takes=100), self.client.flush(), self.client.heard), (0, 0, b"l"))
        self.client.finish()
        self.assertEqual((self.client.leaving, self.client.gone, self.client.ended), (True, True, True))

    def test_who_is_closed_is_sent_nothing_more(self) -> None:
        self.client.close()
        self.assertEqual((self.give(b"later", takes=100), self.client.heard), (0, b""))
        self.assertEqual(self.client.sock.mock_calls, [mock.call.shutdown(socket.SHUT_RDWR), mock.call.close()])


class Room(TestCase):
    """Who may say how much, and when."""

    def setUp(self) -> None:
        self.room = mychatserver.Room(cast(Any, Quiet()), quiet=True)
        self.background = Background()

    def enter(self, count: int) -> list[Connection]:
        clients = [Connection(port) for port in range(1, count + 1)]
        for client in clients:
            self.room.join(client)
        return clients

    def make_late(self, client: Connection) -> None:
        client.takes = 0
        with self.room._turn:
            self.room._pass_on(client, [memoryview(b"x" * (mychatserver.LATE_BYTES + 1))])

    def test_one_waits_for_the_turn_and_the_rest_put_down_and_go_on(self) -> None:
        listener, *talkers = self.enter(21)
        with self.room._turn:
            threads = [self.background.run(self.room.relay, talker, b"x\n") for talker in talkers]
            eventually(lambda: sum(thread.is_alive() for thread in threads) == 1)
            self.assertEqual(listener.heard, b"")
        self.background.join()
        self.assertEqual(len(listener.sent), 1)
        self.assertEqual(sorted(listener.heard.splitlines()), sorted(f"{n}:x".encode() for n in range(2, 22)))

    def test_a_block_goes_out_at_once_and_who_shares_a_round_has_a_part_of_it(self) -> None:
        """A round of what is to be delivered; a part of it for each who has put down something."""
        listener, talker, *others = self.enter(4)
        line = b"x" * 998 + b"\n"
        self.room.relay(talker, line * 1_000)
        self.assertEqual(len(listener.sent), 1)
        with self.room._turn:
            for number, other in enumerate(others, 1):
                self.background.run(self.room.relay, other, b"other\n")
                eventually(lambda: len(self.room._queued) == number)  # noqa: B023 - called at once
            with self.room._queue_lock:
                portion, rest = self.room._portion(talker, line * 2_000) or (b"", b"")
        self.assertEqual((len(portion), len(rest)), (349 * 1_001, (2_000 - 349) * 999))
        self.background.join()

    def test_while_somebody_is_late_a_portion_is_a_quarter_of_a_share_but_not_tiny(self) -> None:
        slow, talker = self.enter(2)
        self.make_late(slow)
        for share, size in ((262_144, 65_536), (4_096, 1_024), (1_000, 256)):
            self.room._share = self.room._shares[talker] = share
            with self.room._queue_lock:
                portion, _ = self.room._portion(talker, b"x" * 5 + b"\n" * 100_000) or (b"", b"")
            self.assertTrue(size - len(b"2:\n") < len(portion) <= size, (share, len(portion)))

    def test_a_round_is_as_large_as_the_members_are_few(self) -> None:
        member = mock.Mock()
        for count, size in ((0, 1 << 20), (32, 1 << 20), (64, 1 << 19), (512, 1 << 16), (9_999, 1 << 16)):
            self.room._members = [member] * count
            self.assertEqual(self.room._round_bytes(), size)

    def test_a_round_is_taken_first_come_first_served_up_to_its_size(self) -> None:
        listener, *talkers = self.enter(5)
        with mock.patch.object(mychatserver, "ROUND_BYTES", (10, 10)):
            with self.room._queue_lock:
                for talker, block in zip(talkers, (b"123456789012\n", b"1234\n", b"67890", b"1")):
                    self.room._append(talker, block)
            taken = []
            while batch := self.room._next_batch():
                taken.append(b"".join(batch.besides(listener)))
        self.assertEqual(taken, [b"123456789012\n", b"1234\n67890", b"1"])
        self.assertEqual((self.room._queue_bytes, self.room._queued), (0, set()))

    def test_who_has_the_turn_goes_on_unless_somebody_waits_for_it(self) -> None:
        listener, *talkers = self.enter(4)
        for awaited, left in ((False, 0), (True, 2)):

            def give(_: object, awaited: bool = awaited) -> int:
                self.room._turn_is_awaited = awaited
                return 0

            with mock.patch.object(mychatserver, "ROUND_BYTES", (10, 10)), mock.patch.object(listener, "give", give):
                with self.room._queue_lock:
                    for talker in talkers:
                        self.room._append(talker, b"123456789\n")
                with self.room._turn:
                    self.room._relay_queued()
            self.assertEqual(len(self.room._queue), left)

    def test_shares(self) -> None:
        clients = self.enter(2)
        member = mock.Mock()
        for count, share, common in (
            (1, 262_144, 2_097_152),
            (32, 262_144, 2_097_152),
            (64, 131_072, 2_097_152),
            (1_024, 1_024, 262_144),
            (16_384, 256, 16_384),
        ):
            self.room._members = [member] * count
            self.room._share_out()
            self.assertEqual((self.room._share, self.room._common), (share, common))
            self.assertEqual(self.room._shares, dict.fromkeys(clients, share))

    def test_what_is_paid_while_somebody_is_late(self) -> None:
        """Out of a share; a line that is longer than that, and newcomers, out of what is common."""
        slow, talker = self.enter(2)
        self.assertTrue(self.room._pays(talker, 1 << 30))
        self.make_late(slow)
        newcomer = Connection(9)
        self.room._share, self.room._shares[talker], self.room._common = 100, 100, 150
        for client, size, pays in (
            (talker, 50, True),
            (talker, 100, False),
            (talker, 101, True),
            (talker, 51, False),
            (talker, 50, True),
            (talker, 1, False),
            (newcomer, 50, False),
            (newcomer, 49, True),
            (newcomer, 1, False),
        ):
            self.assertEqual(self.room._pays(client, size), pays, (client.address, size))
        self.assertEqual((self.room._shares[talker], self.room._common), (0, 0))

    def test_late_is_who_is_over_one_limit_until_it_is_under_the_other(self) -> None:
        (client,) = self.enter(1)
        client.takes = 0
        with self.room._turn:
            self.room._pass_on(client, [memoryview(b"x" * mychatserver.LATE_BYTES)])
            self.assertFalse(self.room.is_late(client))
            self.room._pass_on(client, [memoryview(b"x")])
        for backlog, late in ((mychatserver.ON_TIME_BYTES, True), (mychatserver.ON_TIME_BYTES - 1, False)):
            client.takes = client.behind - backlog
            while client.takes:
                client.flush()
            self.assertEqual(self.room.is_late(client), late)

    def test_who_becomes_late_among_others_changes_no_share(self) -> None:
        first, second, talker = self.enter(3)
        self.make_late(first)
        with self.room._queue_lock:
            self.assertTrue(self.room._pays(talker, 1_000))
        self.make_late(second)
        self.assertEqual(self.room._shares[talker], self.room._share - 1_000)

    def test_a_backlog_out_of_reach_is_the_end(self) -> None:
        client, other = self.enter(2)
        for member in (client, other):
            member.takes = 0
        with self.room._turn:
            self.room._pass_on(client, [memoryview(bytes(mychatserver.MAX_BACKLOG_BYTES))])
            self.assertFalse(client.ended)
            self.room._pass_on(client, [memoryview(b"x")])
            self.room._pass_on(other, [memoryview(b"x")])
        self.assertEqual((client.ended, other.ended, self.room._late), (True, False, set()))

    def test_who_has_been_let_go_says_nothing_more(self) -> None:
        listener, talker, other = self.enter(3)
        self.room.end(talker)
        self.room.relay(talker, b"x\n")
        self.room.rename(talker, "ann")
        self.room.tell(talker, other, "psst")
        self.assertEqual((listener.heard, other.heard, talker.label), (b"", b"", "2"))

    def test_who_waits_goes_on_when_it_is_let_go(self) -> None:
        """For its share, for being on time, and because the server stops."""
        slow, too, talker, asker = self.enter(4)
        self.make_late(slow)
        self.make_late(too)
        self.room._shares[talker] = self.room._common = 0
        for client, waits in (
            (talker, lambda: self.room.relay(talker, b"x\n")),
            (slow, lambda: self.room.reply(slow, "* answer")),
            (too, lambda: self.room.who(too)),
        ):
            waiting = self.background.run(waits)
            eventually(lambda: client in self.room._waiters)  # noqa: B023 - called at once
            (self.room.finish if client is talker else self.room.end)(client)
            waiting.join(SECONDS)
            self.assertFalse(waiting.is_alive())
        self.room.close()
        waiting = self.background.run(self.room.relay, asker, b"x\n")
        eventually(lambda: asker in self.room._waiters)
        self.room.finish(asker)
        self.background.join()
        self.assertEqual(asker.said, 0)

    def test_who_is_on_time_again_goes_on_though_another_is_late(self) -> None:
        slow, too = self.enter(2)
        self.make_late(slow)
        self.make_late(too)
        self.background.run(self.room.reply, slow, "* answer")
        eventually(lambda: slow in self.room._waiters)
        slow.takes = 1 << 30
        while slow.flush():
            pass
        self.assertFalse(self.room.is_late(slow))
        self.background.join()
        self.assertEqual(self.room._late, {too})

    def test_a_rename_is_told_before_the_answer_to_who(self) -> None:
        asker, talker = self.enter(2)
        with self.room._queue_lock:
            self.room._append(talker, b"* 2 is now ann\n", to_all=True)
        self.room.who(asker)
        self.assertEqual(asker.heard, b"* 2 is now ann\n* 2 here: 1 (you), 2\n")

    def test_a_rename_and_a_private_word_wait_for_what_was_said_before(self) -> None:
        listener, talker, other = self.enter(3)
        for what, notice in (
            (lambda: self.room.rename(talker, "ann"), b"* 2 is now ann\n"),
            (lambda: self.room.tell(talker, listener, "psst"), b"* ann to you: psst\n"),
        ):
            listener.heard = b""
            label = talker.label.encode()
            with self.room._turn:
                self.background.run(self.room.relay, other, b"x\n")
                eventually(lambda: other in self.room._queued)
                self.room.relay(talker, b"before\n")
                self.background.run(what)
                eventually(lambda: talker in self.room._waiters)
            self.background.join()
            self.assertEqual(listener.heard, b"3:x\n" + label + b":before\n" + notice)

    def test_nobody_comes_in_any_more_at_a_stop_and_what_was_put_down_is_relayed(self) -> None:
        listener, talker = self.enter(2)
        with self.room._queue_lock:
            self.room._append(talker, b"2:x\n")
        self.room.close()
        self.assertEqual(listener.heard, b"2:x\n")
        with self.assertRaisesRegex(mychatserver.Refused, "^server stopping$"):
            self.room.join(Connection(3))
        self.assertEqual(self.room._members, [listener, talker])

    def test_who_was_taken_out_at_a_stop_leaves_once(self) -> None:
        clients = self.enter(2)
        with mock.patch.object(self.room._console, "say") as say:
            self.room.dismiss()
            for client in clients:
                self.room.leave(client)
        self.assertEqual(say.mock_calls, [mock.call("Connection closed")] * 2)
