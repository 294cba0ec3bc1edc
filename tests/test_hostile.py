"""Those who would hold up a room on purpose: each attack that once did so, and what the others get meanwhile.

What is counted is lines, threads, bytes and order. The deadlines are generous, so that no busy machine misses them.
``MYCHAT_LONG=1`` has more attackers, each attack's stop, and a thousand members.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import socket
import sys
import threading
import time
import unittest

from tests import bench
from tests.support import (
    LONG,
    LOOPBACK,
    ROOT,
    SECONDS,
    SMALL_BUFFERS,
    Background,
    Listener,
    Overdue,
    Peer,
    Program,
    Server,
    TestCase,
    as_heard,
    eventually,
    numbered_lines,
    unread,
)

CROWD = 40  # members besides the one who types and the one who listens
TYPED = 10  # lines
MORE_THREADS = 20  # than clients
PASSING = 200  # who are reset faster than their handlers end
SECRET = "swordfish"

# Joins so many, by the rival's greeting, and reads all that they get.
JOIN_AND_LISTEN = """
socks = []
for _ in range({count}):
    sock = rival.secure(socket.create_connection((bench.LOOPBACK, {port})))
    rival.greet(sock)
    socks.append(sock)
print("in", flush=True)
bench.listen_all(socks)
"""


def load(rival: str, code: str) -> Program:
    """Run code in a process of its own, so that the server and not the test is busy."""
    head = f"import socket, sys; sys.path.insert(0, {str(ROOT)!r}); from tests import bench\nrival = {rival}\n"
    return Program(sys.executable, "-c", head + code)


@unittest.skipUnless(sys.platform == "linux", "needs Linux: /proc tells of threads and of what is unread")
class Hostile(TestCase):
    def setUp(self) -> None:
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        self.rival = bench.Rival()

    def serve(
        self, *options: str, crowd: int = CROWD, rival: str = "bench.Rival()", setup: str = "", **constants: float
    ) -> None:
        """Start a server with so many members, if any, and then one who listens and one who types."""
        self.server = self.stack.enter_context(Server("--quiet", *options, constants=constants, setup=setup))
        if crowd:
            listening = load(rival, JOIN_AND_LISTEN.format(count=crowd, port=self.server.port))
            self.stack.enter_context(listening).expect("in")
        self.members = crowd
        if not crowd:
            return
        self.listener, self.typist = self.enter(), self.enter()
        self.rest = b""

    def enter(self, receive_buffer: int = 0, afar: bool = False) -> Peer:
        """Return a peer in the room; from afar its packets are as small as a network's, not 64 KB."""
        peer = Peer(LOOPBACK, self.server.port, receive_buffer=receive_buffer, segment=1_400 if afar else 0)
        self.stack.enter_context(peer)
        peer.socket.settimeout(SECONDS)
        for sock_greeting in self.greeting:
            peer.send(sock_greeting)
        eventually(lambda: f"New connection from : {peer.address}\n".encode() in self.server.output)
        self.members += 1
        return peer

    greeting: tuple[str, ...] = ()

    def attack(self, code: str) -> Program:
        attack: Program = self.stack.enter_context(load(self.attackers, code))
        return attack

    attackers = "bench.Rival()"

    def pour(self, kind: str, count: int) -> None:
        """Have so many pour, and wait until more comes than the server reads at once."""
        self.attack(f"bench.keep_pouring(rival, {self.server.port}, {count}, bench.HOSTILE_LINES[{kind!r}])")
        eventually(lambda: waiting(self.server) > 0, "no attacker has to wait for the server")

    def type_and_hear(self, count: int = TYPED) -> None:
        """Fail unless each line that is typed is heard before the next is, all within the time for anything."""
        deadline = time.monotonic() + SECONDS
        for number in range(count):
            line = f"typed {number}"
            self.typist.say(line)
            self.hear(f"{self.typist.label}:{line}\n".encode(), deadline)

    def hear(self, line: bytes, deadline: float) -> None:
        """Read until a line has come. Whatever a flood brings, the typist too, is passed over in bulk."""
        sockets = self.listener.socket, self.typist.socket
        while line not in self.rest:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Overdue(f"{line!r} is not heard")
            for sock in select.select(sockets, [], [], left)[0]:
                data = sock.recv(1 << 20)
                if not data:
                    raise AssertionError("one of those who read is let go")
                if sock is self.listener.socket:
                    self.rest = self.rest[-len(line) :] + data
        self.rest = self.rest.partition(line)[2]

    def stops(self) -> None:
        """Fail unless the server ends when told to, as ever, in the middle of it."""
        self.assertEqual(self.server.stop(), 0)

    def holds(self, kind: str, *options: str) -> None:
        """Fail unless a typist is heard while attackers pour, and there are no more threads than clients."""
        for count in (1, 5, 20) if LONG else (5,):
            with self.subTest(count=count):
                self.setUp()
                self.serve(*options, crowd=1_000 if LONG and count == 1 else CROWD, rival=self.attackers_as_members())
                self.pour(kind, count)
                self.type_and_hear()
                self.assertLessEqual(self.server.threads(), self.members + count + MORE_THREADS)
                if LONG:
                    self.stops()
                self.stack.close()

    def attackers_as_members(self) -> str:
        return self.attackers


def waiting(server: Server) -> int:
    """Return the connections of which the server has something unread, as Linux tells of IPv4."""
    end = f":{server.port:04X}"
    with open("/proc/net/tcp") as table:
        rows = [row.split() for row in table]
    return sum(row[1].endswith(end) and not row[4].endswith(":00000000") for row in rows[1:])


class Pouring(Hostile):
    def test_blank_lines(self) -> None:
        self.holds("blank")

    def test_blank_lines_with_a_rate(self) -> None:
        """They are paid for, too."""
        self.holds("blank", "--rate", "50")

    def test_a_command_that_is_answered_with_much(self) -> None:
        self.holds("help")

    def test_a_command_that_is_answered_with_all_who_are_here(self) -> None:
        self.holds("who")

    def test_commands_that_there_are_not(self) -> None:
        self.holds("unknown")

    def test_lines_that_begin_with_two_slashes(self) -> None:
        self.holds("slashes")

    def test_what_becomes_three_times_as_many_bytes(self) -> None:
        self.holds("illformed")

    def test_telnets_codes(self) -> None:
        self.holds("telnet")


@unittest.skipUnless(shutil.which("openssl"), "needs openssl: install it")
class Records(Hostile):
    attackers = "bench.WithTls(bench.Rival())"

    def enter(self, receive_buffer: int = 0, afar: bool = False) -> Peer:
        peer = Peer(LOOPBACK, self.server.port)
        peer.socket = bench.WithTls(bench.Rival()).secure(peer.socket)
        self.stack.enter_context(peer)
        eventually(lambda: f"New connection from : {peer.address}\n".encode() in self.server.output)
        self.members += 1
        return peer

    def test_tls_records_of_one_byte(self) -> None:
        self.holds("records", "--tls-cert", bench.certificate())


class AtTheDoor(Hostile):
    def test_lines_before_the_password(self) -> None:
        file = os.path.join(bench.FILES.name, "secret")
        with open(file, "w") as secret:
            secret.write(SECRET)
        self.greeting = (f"{SECRET}\n",)
        self.holds("door", "--password-file", file)

    def attackers_as_members(self) -> str:
        return f"bench.WithOptions(bench.Rival(), [], {SECRET!r})"


class Resetting(Hostile):
    def test_who_connects_and_resets_is_told_of_and_holds_up_nobody(self) -> None:
        """Who comes is told of before who goes, once each; nobody gets a thread to wait in."""
        self.serve("--announce")
        attack = self.attack(f"bench.keep_resetting({self.server.port})")
        closings = self.server.output.count(b"Connection closed\n")
        threads = 0
        for _ in range(TYPED):
            self.type_and_hear(1)
            threads = max(threads, self.server.threads())
        eventually(lambda: self.server.output.count(b"Connection closed\n") > closings + 100)
        attack.process.kill()
        self.assertLessEqual(threads, self.members + PASSING)
        eventually(lambda: self.server.threads() <= self.members + MORE_THREADS)
        witness = self.enter()
        witness.say("last")
        told = self.told_until(f"{witness.label}:last\n".encode())
        self.assertGreater(len(told), 200)
        for label, verbs in told.items():
            in_turn = all(verb != next_verb for verb, next_verb in zip(verbs, verbs[1:]))  # a port may come again
            self.assertTrue(in_turn, (label, verbs))
        opened = self.server.output.count(b"New connection")
        eventually(lambda: self.server.output.count(b"Connection closed\n") == opened - self.members)
        self.stops()

    def told_until(self, line: bytes) -> dict[bytes, list[bytes]]:
        """Return what has been told of each who came or went, until a line comes."""
        told: dict[bytes, list[bytes]] = {}
        heard = self.rest
        while line not in heard:
            heard += self.listener.socket.recv(1 << 20)
        for label, verb in re.findall(rb"(?m)^\* (\S+) (joined|left)$", heard):
            told.setdefault(label, []).append(verb)
        return told


class Slow(Hostile):
    """Those who read slowly, or not at all, to hold up others."""

    def crawl(self, peer: Peer, pace: int) -> Listener:
        """Read from a peer in the background, so many bytes a second."""
        return Listener(peer, self.background, 1 << 40, pace)

    def stands_still(self, listener: Listener) -> None:
        """Return when nothing has come for a while: the pourer has said its share, and somebody is a slow consumer."""
        with contextlib.suppress(Overdue):
            while True:
                count = listener.count
                eventually(lambda: listener.count > count, seconds=0.7)  # noqa: B023 - called at once

    def setUp(self) -> None:
        super().setUp()
        self.background = Background()

    def pour_lines(self) -> Peer:
        """Have one pour until it is closed."""
        pourer = self.enter()
        lines = numbered_lines(10_000)

        def run() -> None:
            with contextlib.suppress(OSError):  # closed at the end of the test
                while True:
                    pourer.send(lines)

        def listen() -> None:
            with contextlib.suppress(OSError):
                pourer.ignore()

        for target in (run, listen):
            threading.Thread(target=target, daemon=True).start()
        return pourer

    def test_two_who_crawl_are_let_go_after_a_time_and_the_others_talk_on(self) -> None:
        """Though both read more than the floor asks for."""
        self.serve(crowd=0, EPOCH_SECONDS=1)
        for _ in range(2):
            self.crawl(self.enter(65_536, afar=True), 100_000)
        quick = Listener(self.enter(), self.background, 1 << 40)
        self.pour_lines()
        eventually(lambda: self.server.output.count(b"Connection closed\n") == 2, "those who crawl are kept")
        count = quick.count
        eventually(lambda: quick.count > count + 20_000_000, "the pourer is still held up")
        self.server.process.kill()  # or the background would go on for ever

    def test_those_whose_peers_are_gone_do_not_wait_to_speak(self) -> None:
        """They leave while somebody who reads slowly still holds up all who have said their share."""
        self.serve(crowd=0, setup=SMALL_BUFFERS, LOW_WATER_BYTES=1, FLOOR_SECONDS=60)  # who is slow stays so
        quick = Listener(self.enter(), self.background, 1 << 40)
        crawler = self.crawl(self.enter(65_536, afar=True), 20_000)
        self.pour_lines()
        self.stands_still(quick)
        gone = [self.enter() for _ in range(8)]
        for peer in gone:
            peer.send(numbered_lines(4_000))  # more than one may say meanwhile
        self.stands_still(quick)
        threads = self.server.threads()
        for peer in gone:
            peer.reset()
        self.enter().say("is anybody there")  # sends find out that nobody is
        eventually(lambda: self.server.output.count(b"Connection closed\n") >= len(gone), seconds=SECONDS / 2)
        eventually(lambda: self.server.threads() <= threads + 1 - len(gone), seconds=SECONDS / 2)
        self.assertFalse(crawler.ended, "the crawler was let go before")
        self.server.process.kill()  # or the background would go on for ever

    def test_answers_do_not_make_who_asks_a_slow_consumer(self) -> None:
        """One who asks on and on and reads nothing costs the others nothing, and gets every answer in the end."""
        self.serve(crowd=0)
        for number in range(50):
            name = f"{chr(0x20000) * 22}{number}"  # long names make long answers
            member = self.enter()
            member.say(f"/nick {name}")
            member.expect(f"* {member.label} is now {name}")
        asker, talker, listener = self.enter(8_192), self.enter(), self.enter()
        questions = 1_500
        self.background.run(asker.send, (b"/who".ljust(200) + b"\n") * questions)
        eventually(lambda: unread(self.server, asker) > 0)
        last = 0
        with contextlib.suppress(Overdue):  # the server has stopped to read
            while True:
                last = unread(self.server, asker)
                eventually(lambda: unread(self.server, asker) != last, seconds=0.7)  # noqa: B023 - called at once
        self.assertGreater(last, 0)
        lines = numbered_lines(6_000)
        expected = as_heard(talker.label, lines)
        talker.send(lines)  # more than one may say while somebody is a slow consumer
        listening = Listener(listener, self.background, len(expected))
        self.assertTrue(listening.done.wait(SECONDS))
        listening.check(expected)
        heard = [asker.line() for _ in range(questions + 6_000)]
        said = f"{talker.label}:".encode()
        self.assertEqual(sum(line.startswith(said) for line in heard), 6_000)
        self.assertEqual(sum(line.startswith(b"* 53 here: ") for line in heard), questions)
        self.background.join()


class Stops(Hostile):
    def test_a_stop_in_the_middle_of_an_attack(self) -> None:
        """Whoever pours, the server ends with its status, and the port is free."""
        self.serve()
        self.pour("blank", 5)
        self.stops()
        with socket.create_server((LOOPBACK, self.server.port)):
            pass
