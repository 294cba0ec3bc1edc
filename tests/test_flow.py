"""Who is slow, who pours, who stops: nothing is lost, nobody waits for ever, memory stays bounded."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
import unittest

from tests.support import (
    LONG,
    LOOPBACK,
    SECONDS,
    SMALL_BUFFERS,
    Background,
    Listener,
    Overdue,
    Peer,
    Server,
    TestCase,
    as_heard,
    eventually,
    heard_line_by_line,
    needs_command,
    numbered_lines,
    once,
)

MB = 1_000_000


class Room(TestCase):
    """A server of its own for each test."""

    constants: dict[str, float] = {}
    setup = ""

    def setUp(self) -> None:
        self.server = Server("--quiet", constants=self.constants, setup=self.setup)
        self.addCleanup(self.server.__exit__)
        self.background = Background()

    def peer(self, receive_buffer: int = 0) -> Peer:
        peer = self.server.peer(receive_buffer=receive_buffer)
        self.addCleanup(peer.close)
        return peer

    def pour(self, pourer: Peer, lines: bytes) -> None:
        """Send it all in the background."""
        self.background.run(pourer.send, lines)

    def listen(self, peer: Peer, expected: bytes, pace: int = 0) -> Listener:
        return Listener(peer, self.background, len(expected), pace)

    @staticmethod
    def write_until_closed(peer: Peer, block: bytes = numbered_lines(200)) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer.send(block)


class Flow(Room):
    constants = {"LINGER_SECONDS": 600}  # for whom it keeps open; whoever has closed is not waited for

    def test_one_order_for_all_under_twenty_talkers(self) -> None:
        """Each hears every line of every other once, whole, and in the order in which all others hear them."""
        peers = [self.peer() for _ in range(20)]
        heard = heard_line_by_line(self, peers, self.background, 500 if LONG else 100)
        for one, lines in zip(peers, heard):
            for other, others_lines in zip(peers, heard):
                skipped = (f"{one.label}:".encode(), f"{other.label}:".encode())
                self.assertEqual(
                    [line for line in lines if not line.startswith(skipped)],
                    [line for line in others_lines if not line.startswith(skipped)],
                )

    def test_three_mb_queued_to_someone_who_says_exit_all_arrive(self) -> None:
        """What a later member has heard was given to the one who leaves before, so it must come before the end."""
        pourer, leaver, later = self.peer(), self.peer(receive_buffer=8_192), self.peer()
        lines = numbered_lines(100_000)
        expected = as_heard(pourer.label, lines)
        self.pour(pourer, lines)
        listener = self.listen(later, expected)
        listener.wait_for(3 * MB)
        said = 0
        with contextlib.suppress(Overdue):  # the pourer has had its share: the leaver is more than 1 MiB behind
            while True:
                said = listener.count
                eventually(lambda: listener.count > said, seconds=0.5)  # noqa: B023 - called at once
        leaver.send(b"exit\n" + numbered_lines(5_000))  # what follows is not read, which must not reset the connection
        heard = leaver.read_to_end()
        self.assertGreaterEqual(len(heard), max(said, 3 * MB))
        self.assertTrue(expected.startswith(heard) and heard.endswith(b"\n"))
        self.background.join()
        listener.check(expected)

    @once
    def test_a_reader_at_200_kb_a_second_with_4_mb_waiting_loses_nothing(self) -> None:
        """Nor of the 40 MB that someone pours meanwhile: the pourer waits for the reader."""
        pourer, slow = self.peer(), self.peer(receive_buffer=65_536)
        lines = numbered_lines(400_000)
        expected = as_heard(pourer.label, lines)
        self.pour(pourer, lines)
        listener = self.listen(slow, expected[: 4 * MB], pace=200_000)
        self.assertTrue(listener.done.wait(SECONDS * 2))
        listener.check(expected[: 4 * MB])
        rest = self.listen(slow, expected[4 * MB :])
        self.background.join()
        rest.check(expected[4 * MB :])

    @once
    def test_who_comes_again_and_again_does_not_make_a_slow_reader_lose_its_place(self) -> None:
        """While it is late: a newcomer's share is what others have left, not another share."""
        pourer, slow = self.peer(), self.peer(receive_buffer=65_536)
        background = Background()
        background.run(self.write_until_closed, pourer)
        threading.Event().wait(0.5)  # the reader reads nothing so long, and is late then
        lines, labels = numbered_lines(2_500), []

        def come_and_go() -> None:
            for _ in range(80):
                with Peer(LOOPBACK, self.server.port) as comer:
                    labels.append(comer.label.encode())
                    comer.send(lines)
                    comer.half_close()
                    comer.read_to_end()

        self.background.run(come_and_go)
        pourer.reset()
        threading.Event().wait(3)  # in which a share for each would be 20 MB
        for number in range(80):
            while not (line := slow.line()).endswith(lines[-100:-1]):
                pass
            self.assertEqual(line.partition(b":")[0], labels[number])
        self.background.join()
        background.join()

    def test_lines_of_one_letter_that_have_to_wait_take_no_more_memory_than_they_came_in(self) -> None:
        """And not five times as much, each with its label, while somebody is late."""
        pourer = self.peer()
        self.peer(receive_buffer=8_192)
        shouters = [self.peer() for _ in range(200)]
        background = Background()
        for peer in (pourer, *shouters):
            background.run(peer.ignore)
        background.run(self.write_until_closed, pourer)
        threading.Event().wait(0.5)  # in which the one who does not read has become late
        before = self.server.memory()
        for peer in shouters:
            background.run(self.write_until_closed, peer, b"x\n" * 100_000)
        threading.Event().wait(0.5)  # in which they have said their share
        self.assertLess(self.server.memory() - before, 50 * MB)
        for peer in (pourer, *shouters):
            with contextlib.suppress(OSError):  # let go: on a busy machine a test's threads may not have read for long
                peer.socket.shutdown(socket.SHUT_RDWR)
        background.join()

    @once
    def test_twenty_readers_that_stop_in_a_pour_are_let_go(self) -> None:
        """At different moments; the rest get all of it, and memory stays under 40 MB over the start."""
        pourer, reader = self.peer(), self.peer()
        stopping = [self.peer(receive_buffer=8_192) for _ in range(20)]
        lines = numbered_lines(300_000)
        expected = as_heard(pourer.label, lines)
        before = self.server.memory()
        for number, peer in enumerate(stopping):
            Listener(peer, self.background, 50_000 * (number + 1))
        listener = self.listen(reader, expected)
        self.pour(pourer, lines)
        peak = 0
        for _ in stopping:
            self.server.expect("Connection closed")
            peak = max(peak, self.server.memory())
        self.background.join()
        listener.check(expected)
        self.assertLess(peak - before, 40 * MB)

    def test_a_typist_is_heard_while_someone_pours(self) -> None:
        pourer, typist, listener = self.peer(), self.peer(), self.peer()
        endless = Background()
        endless.run(self.write_until_closed, pourer)
        endless.run(pourer.ignore)
        endless.run(typist.ignore)
        for number in range(20 if LONG else 5):
            typist.say(f"number {number}")
            listener.wait_for(typist.label, f"number {number}")
        for peer in (pourer, typist):
            peer.socket.shutdown(socket.SHUT_RDWR)
        endless.join()

    @needs_command("nc", "netcat-openbsd")
    def test_two_nc_that_pour_at_each_other_both_get_everything(self) -> None:
        lines = numbered_lines(200_000 if LONG else 60_000)
        programs = [
            subprocess.Popen(
                ["nc", "-N", LOOPBACK, str(self.server.port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
            )
            for _ in range(2)
        ]
        try:
            labels = [self.server.line().rpartition(" ")[2].rstrip(")") for _ in programs]
            outputs = [bytearray(), bytearray()]

            def write(program: subprocess.Popen[bytes]) -> None:
                assert program.stdin
                view = memoryview(lines)
                while view:
                    view = view[program.stdin.write(view) :]

            def read(program: subprocess.Popen[bytes], output: bytearray) -> None:
                assert program.stdout
                while len(output) < len(lines) + len(lines) // 100 * 6 and (data := program.stdout.read(65536)):
                    output += data

            for program, output in zip(programs, outputs):
                self.background.run(read, program, output)
                self.background.run(write, program)
            self.background.join(SECONDS * 2)
            expected = {as_heard(label, lines) for label in labels}
            self.assertEqual({bytes(output) for output in outputs}, expected)
        finally:
            for program in programs:
                program.kill()
                program.wait()
                for stream in (program.stdin, program.stdout):
                    assert stream
                    stream.close()

    def test_a_reset_is_no_end_of_file_whoever_is_told_of_it_first(self) -> None:
        """What was unfinished is not relayed, though a send finds the reset before it is read."""
        talker, listener = self.peer(), self.peer()
        for number in range(200):
            with self.peer() as peer:
                peer.send("half a line")
                talker.say(f"number {number}")
                peer.expect(f"{talker.label}:number {number}")
                peer.reset()
                talker.send("more\n" * 3)
            listener.expect(f"{talker.label}:number {number}", *[f"{talker.label}:more"] * 3)

    @unittest.skipUnless(sys.platform == "linux", "needs Linux: /proc counts threads and descriptors")
    def test_rude_comings_and_goings_leave_nothing_behind(self) -> None:
        stayer = self.peer()
        threads, descriptors = self.server.threads(), self.server.descriptors()
        for number in range(1_000 if LONG else 300):
            with Peer(LOOPBACK, self.server.port) as peer:
                if number % 4 == 1:
                    peer.send("half a line")
                elif number % 4 == 2:
                    peer.send(b"\xff" * 1_000 + b"\nexit\nexit\nquit\n")
                elif number % 4 == 3:
                    peer.say("hello")
                if number % 2:
                    peer.reset()
        for count in (self.server.threads, self.server.descriptors):
            wanted = threads if count == self.server.threads else descriptors
            eventually(lambda: count() == wanted, f"{count()} instead of {wanted}")  # noqa: B023 - called at once
        with self.peer() as late:
            late.say("still here")
            stayer.wait_for(late.label, "still here")


class SlowConsumers(Room):
    """What is waited for, and for how long: with a floor of two seconds, and buffers that soon are full."""

    constants = {"FLOOR_SECONDS": 2, "STALL_SECONDS": 600}
    setup = SMALL_BUFFERS

    def test_a_client_that_never_reads_is_let_go_and_others_lose_nothing(self) -> None:
        """While 50 MB go by: memory stays bounded."""
        pourer, reader = self.peer(), self.peer()
        never = self.peer(receive_buffer=8_192)
        before, threads = self.server.memory(), self.server.threads()
        lines = numbered_lines(500_000)
        expected = as_heard(pourer.label, lines)
        listener = self.listen(reader, expected)
        self.pour(pourer, lines)
        listener.wait_for(1_500_000)
        never.say("/help")  # the answer waits, too
        self.server.expect("Connection closed")
        eventually(lambda: self.server.threads() == threads - 1)  # whatever it waits for
        self.assertLess(self.server.memory() - before, 40 * MB)
        self.background.join()
        listener.check(expected)

    def test_a_reader_at_1_kb_a_second_is_let_go_and_holds_the_others_for_seconds_only(self) -> None:
        pourer, quick, crawler = self.peer(), self.peer(), self.peer(receive_buffer=8_192)
        lines = numbered_lines(100_000)
        expected = as_heard(pourer.label, lines)
        listener = self.listen(quick, expected)
        crawl = Listener(crawler, Background(), len(expected), pace=1_000)
        self.pour(pourer, lines)
        self.server.expect("Connection closed")
        self.background.join()
        listener.check(expected)
        crawler.close()
        self.assertTrue(crawl.done.wait(SECONDS))


class WritersAlone(Room):
    """With a floor of more seconds than a busy machine has those wait who read."""

    constants = {"FLOOR_SECONDS": 2, "STALL_SECONDS": 4}
    setup = SMALL_BUFFERS

    def test_two_programs_that_write_without_reading_are_let_go_and_others_chat_on(self) -> None:
        """A third and a fourth lose nothing of each other's."""
        writers = [self.peer(receive_buffer=8_192) for _ in range(2)]
        third, fourth, fifth = self.peer(), self.peer(), self.peer()
        for listener, other in ((third, fourth), (fourth, third)):
            self.background.run(self.hear_all, listener, other.label, 40)
        endless = Background()
        said, heard, block = 0, Listener(fifth, endless, 1 << 40), numbered_lines(200)
        # In step at first: who is sent little, because the other is not heard, has nothing to be let go for.
        with contextlib.suppress(Overdue, OSError):  # or one is let go already
            while said < 100 * MB:
                for writer in writers:
                    writer.send(block)
                    said += len(block)
                eventually(lambda: heard.count >= said, seconds=0.5)  # noqa: B023 - called at once
        writings = [endless.run(self.write_until_closed, writer) for writer in writers]
        for number in range(40):
            third.say(f"number {number}")
            fourth.say(f"number {number}")
        for writing in writings:
            writing.join(SECONDS)
            self.assertFalse(writing.is_alive())
        for peer in (third, fourth, fifth):
            peer.half_close()
        endless.join()
        self.background.join()

    @staticmethod
    def hear_all(peer: Peer, label: str, count: int) -> None:
        """Hear so many numbered lines from ``label``, whatever others say; read on to the end."""
        for number in range(count):
            peer.wait_for(label, f"number {number}")
        peer.read_to_end()


class StoppedReaders(Room):
    """With a small backlog, and nobody who waits for them."""

    constants = {"FLOOR_SECONDS": 0.5, "STALL_SECONDS": 2}
    setup = SMALL_BUFFERS

    def test_who_takes_nothing_of_a_small_backlog_has_longer_before_it_is_let_go(self) -> None:
        talker, reader, _ = self.peer(), self.peer(), self.peer(receive_buffer=8_192)
        lines = numbered_lines(6_000)
        started = time.monotonic()
        self.pour(talker, lines)
        self.listen(reader, as_heard(talker.label, lines))
        self.server.expect("Connection closed")
        self.assertGreater(time.monotonic() - started, 1.4)  # under the floor it would be one at most
        self.background.join()


class PatientServer(Room):
    """Which lets nobody go for long."""

    constants = {"FLOOR_SECONDS": 60, "STALL_SECONDS": 60}
    setup = SMALL_BUFFERS

    def test_a_slow_consumer_is_not_read_until_it_has_read_and_others_are(self) -> None:
        """Each by itself, as it reads."""
        typist, listener = self.peer(), self.peer()
        slow = [self.peer(receive_buffer=8_192) for _ in range(2)]
        lines = numbered_lines(12_500)
        self.pour(typist, lines)
        listener.expect(*as_heard(typist.label, lines).splitlines())
        for peer in slow:
            peer.say("here I am")
        for reading in (None, *slow):
            if reading:
                self.background.run(reading.ignore)
                listener.expect(f"{reading.label}:here I am")
            for number in range(5):
                typist.say(f"number {number}")
                listener.expect(f"{typist.label}:number {number}")
        for peer in slow:
            peer.half_close()
        self.background.join()

    def test_private_words_do_not_pile_up_for_who_does_not_read(self) -> None:
        """Each of a thousand such clients would have a megabyte of its own; what all hear they share."""
        ann, bob = self.peer(), self.peer(receive_buffer=8_192)
        lines = numbered_lines(5_000)  # too little for a slow consumer
        self.pour(ann, lines + f"/msg {bob.label} Hi!\n".encode())
        ann.expect(f"* {bob.label} has much to read yet: say it again later")
        bob.expect(*as_heard(ann.label, lines).splitlines())
        ann.say(f"/msg {bob.label} Hi!")
        ann.expect(f"* to {bob.label}: Hi!")
        bob.expect(f"* {ann.label} to you: Hi!")
        self.background.join()

    @once
    def test_long_lines_of_what_is_forbidden_from_a_hundred_at_once_wait(self) -> None:
        """Each becomes three times as long, 20 MB in all; the slow consumer loses none."""
        slow = self.peer(receive_buffer=8_192)
        talkers = [self.peer() for _ in range(100)]
        for talker in talkers:
            self.background.run(talker.ignore)
            self.background.run(talker.send, b"\xff" * 65_536 + b"\n")
        threading.Event().wait(2)  # in which it does not read
        line = "\ufffd".encode() * 65_536
        heard = {slow.line() for _ in talkers}
        self.assertEqual(heard, {f"{talker.label}:".encode() + line for talker in talkers})
        for talker in talkers:
            talker.half_close()
        self.background.join()


class HonestReader(Room):
    constants = {"FLOOR_SECONDS": 2, "FLOOR_BYTES": 16_384}
    setup = SMALL_BUFFERS

    def test_a_slow_consumer_above_the_floor_loses_nothing(self) -> None:
        """Nor of what is said meanwhile: the pourer waits for it."""
        pourer, slow = self.peer(), self.peer(receive_buffer=65_536)
        lines = numbered_lines(240_000)
        expected = as_heard(pourer.label, lines)
        piece = MB * 3 // 4
        self.pour(pourer, lines)
        first = self.listen(slow, expected[:piece], pace=250_000)
        self.assertTrue(first.done.wait(SECONDS * 2))
        first.check(expected[:piece])
        rest = self.listen(slow, expected[piece:])
        self.background.join()
        rest.check(expected[piece:])


class MaxClients(TestCase):
    def test_one_too_many_is_told_and_there_is_room_again(self) -> None:
        with Server("--max-clients", "2") as server, server.peer() as ann, server.peer() as bob:
            with Peer(LOOPBACK, server.port) as third:
                third.expect("* refused: server full: 2 of 2 clients")
                third.expect_end()
                server.expect(f"Refused : {third.address}")
            ann.say("nobody noticed")
            bob.expect(f"{ann.label}:nobody noticed")
            bob.say("exit")
            bob.expect_end()
            server.expect(f"{ann.label}:nobody noticed", "Connection closed")
            with server.peer() as fourth:
                fourth.say("room again")
                ann.expect(f"{fourth.label}:room again")
            server.stop()
            self.assertEqual(server.output.count(b"New connection"), server.output.count(b"Connection closed"))

    def test_refusals_are_shown_once_a_second_for_each_host(self) -> None:
        with Server("--max-clients", "1") as server, server.peer() as ann:
            for _ in range(20):
                with Peer(LOOPBACK, server.port) as peer:
                    peer.expect("* refused: server full: 1 of 1 clients")
            server.stop()
            ann.expect_end()
            self.assertLess(server.output.count(b"Refused"), 10)
            self.assertGreater(server.output.count(b"Refused"), 0)
