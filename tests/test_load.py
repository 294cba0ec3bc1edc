"""Many at once: whole, fair, and given back. Figures are the benchmark's; here nothing depends on a quick machine."""

from __future__ import annotations

import collections
import itertools
import json
import pathlib
import select
import socket
import subprocess
import sys
import threading
import unittest

from tests import bench
from tests.support import (
    LONG,
    LOOPBACK,
    SECONDS,
    Background,
    Listener,
    Peer,
    Server,
    TestCase,
    as_heard,
    eventually,
    once,
)
from tests.support import numbered_lines as lines_of

MB = 1_000_000
LINUX = unittest.skipUnless(sys.platform == "linux", "needs Linux: /proc tells of a process")
NUMBERS = 1_000  # each flooder says these again and again


def allow_descriptors(count: int) -> int:
    """Let this process and its children have so many descriptors, if they may; return how many they may have."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


class Flooders:
    """So many clients that say numbered lines as fast as they can and throw away what they hear, in one thread."""

    def __init__(self, port: int, count: int) -> None:
        self._texts = [b"".join(b"%04d %06d\n" % (number, line) for line in range(NUMBERS)) for number in range(count)]
        self.socks = [socket.create_connection((LOOPBACK, port), SECONDS) for _ in range(count)]
        for sock in self.socks:
            sock.setblocking(False)
        self._stopping = threading.Event()
        self.let_go = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        poller = select.poll()
        left = {sock.fileno(): (sock, text, memoryview(text)) for sock, text in zip(self.socks, self._texts)}
        for descriptor in left:
            poller.register(descriptor, select.POLLIN | select.POLLOUT)
        while left and not self._stopping.is_set():
            for descriptor, events in poller.poll(100):
                sock, text, rest = left[descriptor]
                try:
                    if events & select.POLLIN and not sock.recv(1 << 18):
                        raise ConnectionResetError
                    if events & select.POLLOUT:
                        rest = rest[sock.send(rest[:65_536]) :] or memoryview(text)
                        left[descriptor] = sock, text, rest
                except BlockingIOError:
                    pass
                except OSError:
                    self.let_go += 1
                    del left[descriptor]
                    poller.unregister(descriptor)

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(SECONDS)
        for sock in self.socks:
            sock.close()


class Many(TestCase):
    def setUp(self) -> None:
        self.server = Server("--quiet")
        self.addCleanup(self.server.__exit__)

    def peer(self, receive_buffer: int = 0) -> Peer:
        peer = self.server.peer(receive_buffer=receive_buffer)
        self.addCleanup(peer.close)
        return peer

    def flooders(self, count: int) -> Flooders:
        flooders = Flooders(self.server.port, count)
        self.addCleanup(flooders.stop)
        return flooders

    def test_a_hundred_talkers_are_heard_whole_and_in_one_order(self) -> None:
        """Everyone hears what a silent listener hears, but for their own lines."""
        talkers, count = [self.peer() for _ in range(100)], 50 if LONG else 10
        listener = self.peer()
        background = Background()
        heard: list[list[bytes]] = [[] for _ in talkers]

        def listen(peer: Peer, lines: list[bytes], expected: int) -> None:
            lines.extend(peer.line() for _ in range(expected))

        order: list[bytes] = []
        background.run(listen, listener, order, count * len(talkers))
        for peer, lines in zip(talkers, heard):
            background.run(listen, peer, lines, count * (len(talkers) - 1))
        for number in range(count):
            for peer in talkers:
                peer.say(f"number {number}")
        background.join()
        for peer, lines in zip(talkers, heard):
            own = f"{peer.label}:".encode()
            self.assertEqual(
                [line for line in order if line.startswith(own)], [own + b"number %d" % n for n in range(count)]
            )
            self.assertEqual(lines, [line for line in order if not line.startswith(own)])

    @once
    def test_a_reader_at_2_mb_a_second_loses_nothing_and_a_typist_does_not_wait_for_it(self) -> None:
        """Of the 24 MB that someone pours: the pourer waits for the reader, the typist is heard meanwhile."""
        pourer, typist, quick, slow = self.peer(), self.peer(), self.peer(), self.peer(receive_buffer=65_536)
        lines = lines_of(240_000)
        expected = as_heard(pourer.label, lines)
        background, endless = Background(), Background()
        poured = threading.Event()

        def pour() -> None:
            pourer.send(lines)
            poured.set()

        background.run(pour)
        for peer in (pourer, typist):
            endless.run(peer.ignore)
        crawl = Listener(slow, background, len(expected), pace=2 * MB)
        heard_before_the_pourer_was_done = 0
        for number in range(20):
            typist.say(f"number {number}")
            quick.wait_for(typist.label, f"number {number}")
            heard_before_the_pourer_was_done += not poured.is_set()
        self.assertGreater(heard_before_the_pourer_was_done, 10)
        endless.run(quick.ignore)
        background.join(SECONDS * 2)
        self.assertGreaterEqual(crawl.count, len(expected))
        for peer in (pourer, typist, quick):
            peer.half_close()
        endless.join()

    def listen_to_a_flood(
        self, listener: Peer, typist: Peer, lines_typed: int, flooders: int = 0
    ) -> collections.Counter[bytes]:
        """Check that every line of every flooder comes in its order; return how many of whom.

        Ends when the typist is heard, after so many of its lines, and so many flooders have been heard at length.
        """
        following: dict[bytes, int] = {}
        heard: collections.Counter[bytes] = collections.Counter()
        typed = 0
        typist.say("typed 0")
        while True:
            label, _, text = listener.line().partition(b":")
            if label == typist.label.encode():
                self.assertEqual(text, b"typed %d" % typed)
                typed += 1
                if typed >= lines_typed and sum(count > NUMBERS for count in heard.values()) >= flooders:
                    return heard
                typist.say(f"typed {typed}")
                continue
            number = int(text[5:])
            self.assertEqual(number, following.get(label, 0), label)
            following[label] = (number + 1) % NUMBERS
            heard[label] += 1

    @LINUX
    def test_fifty_flooders_are_heard_alike_and_a_typist_among_them(self) -> None:
        typist, quick = self.peer(), self.peer()
        endless = Background()
        endless.run(typist.ignore)
        flooders = self.flooders(50)
        for _ in flooders.socks:
            self.server.line()
        heard = self.listen_to_a_flood(quick, typist, 40 if LONG else 4, 50)
        self.assertEqual((len(heard), flooders.let_go), (50, 0))
        self.assertGreater(min(heard.values()) * 20, max(heard.values()))
        self.assertLess(self.server.memory(), 100 * MB)
        typist.half_close()
        endless.join()

    @LINUX
    def test_hundreds_of_flooders_stay_and_a_typist_is_heard_among_them(self) -> None:
        typist, quick = self.peer(), self.peer()
        endless = Background()
        endless.run(typist.ignore)
        flooders = self.flooders(300)
        self.listen_to_a_flood(quick, typist, 3 if LONG else 1)
        self.assertEqual(flooders.let_go, 0)
        self.assertLess(self.server.memory(), 100 * MB)
        typist.half_close()
        flooders.stop()
        endless.join(SECONDS * 2)

    @LINUX
    def test_thousands_come_are_served_and_leave_nothing_behind(self) -> None:
        crowd_size = min(2_500 if LONG else 500, allow_descriptors(4_096) - 100)
        speaker = self.peer()
        threads, descriptors, memory = self.server.threads(), self.server.descriptors(), self.server.memory()
        crowd = [Peer(LOOPBACK, self.server.port) for _ in range(crowd_size)]
        for _ in crowd:
            self.assertRegex(self.server.line(), "^New connection")
        speaker.say("anyone?")
        for peer in crowd:
            peer.expect(f"{speaker.label}:anyone?")
        self.assertLess((self.server.memory() - memory) / crowd_size, 60 * 1_024)
        for peer in crowd:
            peer.close()
        eventually(lambda: self.server.threads() <= threads and self.server.descriptors() <= descriptors)

    @LINUX
    def test_silent_clients_cause_no_wake_ups(self) -> None:
        crowd = [self.peer() for _ in range(300 if LONG else 100)]
        before, _ = self.server.work()
        threading.Event().wait(1)  # what the server does meanwhile is what is measured
        after, _ = self.server.work()
        self.assertLess(after - before, 10)  # none in truth
        crowd[0].say("awake?")
        crowd[1].expect(f"{crowd[0].label}:awake?")


@LINUX
class Benchmark(TestCase):
    """It fails when it should, and runs."""

    def test_what_is_torn_lost_doubled_or_out_of_order_fails_it(self) -> None:
        lines = [b"54358:0000" + b"%07d" % number + b"0" * 20 for number in range(4)]
        bench.check(b"\n".join(lines) + b"\n", repeats=False)
        for order in itertools.product(range(4), repeat=4):
            if order != (0, 1, 2, 3):
                with self.subTest(order=order), self.assertRaises(bench.Failed):
                    bench.check(b"".join(lines[number] + b"\n" for number in order), repeats=False)
        with self.assertRaises(bench.Failed):
            bench.check(lines[0] + lines[1] + b"\n", repeats=False)

    @once
    def test_a_cell(self) -> None:
        script = str(pathlib.Path(bench.__file__))
        done = subprocess.run(
            [sys.executable, script, "--json", "--rounds", "1", "--only", "ours,textbook,bare", "quiet"],
            capture_output=True,
            timeout=SECONDS * 2,
            check=False,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        (result,) = json.loads(done.stdout)["results"]
        self.assertNotIn("ours", result["problems"])
        self.assertEqual(list(result["runs"]), ["ours", "textbook", "bare"])
