"""The rules of the wire and of the program that a peer, a newcomer or a user meets, each on a running server."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from typing import Any

from mychatserver import LINE_TOO_LONG
from tests import bench
from tests.support import (
    LOOPBACK,
    ROOT,
    SECONDS,
    SERVER,
    Background,
    Peer,
    Program,
    Server,
    SharedServerTestCase,
    TestCase,
    eventually,
    unread,
)
from tests.test_lan import IP, Host
from tests.test_wire import WireTestCase

SECRET = "sesame"
OLD_PYTHONS = {
    path.parent.parent.name.rpartition(".")[0]: str(path)
    for path in pathlib.Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser().glob("versions/*/bin/python")
    if re.match(r"2\.7\.|3\.[0-8]\.", path.parent.parent.name)
}
# A clock that the test moves: it stands at 06:23, and a minute later for each byte in a file.
CLOCK = """
import datetime, os, sys, time
os.environ["TZ"] = "UTC"
time.tzset()
real_local, real_format = time.localtime, time.strftime
def now(): return 1_699_942_980 + 60 * os.path.getsize(clock)
class Moved(datetime.datetime):
    @classmethod
    def now(cls, tz=None): return cls.fromtimestamp(now(), tz)
datetime.datetime = Moved
time.time, time.time_ns = now, lambda: now() * 10**9
time.localtime = lambda seconds=None: real_local(now() if seconds is None else seconds)
time.strftime = lambda form, moment=None: real_format(form, moment or time.localtime())
"""


class OnAServer(WireTestCase):
    """Two peers in a server that all tests of a class share."""

    def connect(self, **options: Any) -> Peer:
        peer = self.server.connect(LOOPBACK, **options)
        self.addCleanup(peer.close)
        return peer

    def name(self, peer: Peer, name: str) -> None:
        """Have one of the two take a name, of which both are told."""
        peer.say(f"/nick {name}")
        for listener in (self.ann, self.bob):
            listener.expect(f"* {peer.label} is now {name}")
        peer.label = name

    def packets(self, peer: Peer, *pieces: str | bytes) -> bool:
        """Send pieces, each once the server has read those before; return whether it took less than a second."""
        began = time.monotonic()
        for piece in pieces:
            peer.send(piece)
            eventually(lambda: not unread(self.server, peer))
        return time.monotonic() < began + 1.0

    def let_a_second_pass(self) -> None:
        """Return when a home-made client's line has come, which takes as long as silence that ends a line."""
        home_made = self.peer()
        home_made.send("a second has passed")
        for listener in (self.ann, self.bob):
            listener.wait_for(home_made.label, "a second has passed")
        home_made.close()


class Lines(OnAServer):
    def test_exit_leaves_in_any_case(self) -> None:
        """What stands before it goes out, what stands behind it does not."""
        for word in ("exit", "Exit", "EXIT", " \teXiT \t", "/exit", "/Exit", "/quit", " /QUIT"):
            with self.subTest(word=word):
                listener, leaver = self.peer(), self.peer()
                leaver.send(f"before\n{word}\nafter\n")
                leaver.expect_end()
                listener.expect(f"{leaver.label}:before")
                self.fence(listener)

    def test_exit_of_a_home_made_client_leaves_in_any_case(self) -> None:
        self.ann.send("Exit")
        self.ann.expect_end()
        self.fence(self.bob)

    def test_a_word_that_only_begins_with_exit_is_text(self) -> None:
        self.hears("Exiting\nexit now\n", "Exiting", "exit now")

    @unittest.skipUnless(sys.platform == "linux", "needs Linux: /proc tells what a server has read")
    def test_a_line_typed_key_by_key_stays_whole_when_a_key_gives_two_characters(self) -> None:
        """And when there is silence then, for longer than it takes to end a line."""
        self.packets(self.ann, "h", "e", "l", "lo")
        self.let_a_second_pass()
        self.hears(" world\r\n", "hello world")

    @unittest.skipUnless(sys.platform == "linux", "needs Linux: /proc tells what a server has read")
    def test_a_single_character_anywhere_in_a_line_keeps_silence_from_ending_it(self) -> None:
        for pieces in (("lo", "x", "yz"), ("lo", "yz", "x")):
            with self.subTest(pieces=pieces):
                typist = self.peer()
                while not self.packets(typist, *pieces):  # a busy machine: silence may have ended a line
                    typist = self.peer()
                self.let_a_second_pass()
                typist.send("!")
                typist.half_close()
                for listener in (self.ann, self.bob):
                    listener.wait_for(typist.label, f"{''.join(pieces)}!")

    def test_a_home_made_clients_pieces_are_lines_as_before(self) -> None:
        """Each is of two characters or more: silence ends it."""
        for piece in ("ok", "hello there"):
            self.ann.send(piece)
            self.bob.expect(f"{self.ann.label}:{piece}")

    def test_backspace_and_delete_take_away_the_character_before_them(self) -> None:
        for key in ("\b", "\x7f"):
            with self.subTest(key=key):
                self.hears(f"helo{key * 2}llo\n", "hello")
                self.hears(f"caf\xe9{key}e\n", "cafe")
                self.hears(f"a\U0001f600{key}b\n", "ab")

    def test_backspace_does_nothing_at_the_start_of_its_line(self) -> None:
        self.hears("\b\x7fone\nab\b\b\b\bc\n", "one", "c")

    def test_backspace_comes_before_the_forbidden_are_looked_for(self) -> None:
        """A forbidden character that was taken away again leaves nothing."""
        self.hears("a\x1b\bb\nc\u202e\x7fd\n", "ab", "cd")

    def test_a_line_of_which_nothing_is_left_is_not_relayed(self) -> None:
        self.hears("ab\b\b\nnext\n", "next")

    def test_backspace_edits_commands_and_exit_too(self) -> None:
        self.name(self.bob, "bob")
        self.ann.send("/mgs\b\bsg bob hi\n")
        self.bob.expect(f"* {self.ann.label} to you: hi")
        self.ann.expect("* to bob: hi")
        self.ann.send("exitt\x7f\n")
        self.ann.expect_end()

    def test_backspace_edits_whatever_the_packets(self) -> None:
        for character in "helo\b\bllo\r\n":
            self.ann.send(character)
        self.hears("", "hello")


class Strangers(OnAServer):
    """Those who do not speak chat."""

    REQUESTS = (
        b"GET /?say=hi HTTP/1.1\r\nHost: localhost\r\nCookie: secret\r\n\r\n",
        b"POST / HTTP/1.0\r\nContent-Length: 9\r\n\r\nhi there\n",
        b"OPTIONS * RTSP/1.0\r\nCSeq: 1\r\n\r\n",
        b"INVITE sip:bob@example.org SIP/2.0\r\nVia: x\r\n\r\n",
        b"POST /" + b"a" * 70_000 + b" HTTP/1.1\r\nCookie: secret\r\n\r\nhi there\n",
        b"\r\nGET / HTTP/1.1\r\nCookie: secret\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
        b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n",
        b"get / http/1.10 \r\nCookie: secret\r\n\r\n",
    )

    def answered(self, *pieces: bytes) -> None:
        before = self.server.output.count(b"Connection closed\n")
        stranger = self.peer()
        for piece in pieces:
            with contextlib.suppress(ConnectionError):  # it may be answered and closed before the last
                stranger.send(piece)
        answer = stranger.read_to_end()
        self.assertTrue(answer.startswith(b"HTTP/1.0 400"), answer)
        _, _, body = answer.replace(b"\r\n", b"\n").partition(b"\n\n")
        self.assertIn(b"mychatclient.py", body)
        self.assertNotIn(b"secret", answer)
        eventually(lambda: self.server.output.count(b"Connection closed\n") > before)
        self.fence(self.ann, self.bob)

    def test_a_request_is_answered_and_nothing_of_it_relayed(self) -> None:
        for request in self.REQUESTS:
            with self.subTest(request=request):
                self.answered(request)

    def test_however_the_bytes_are_cut(self) -> None:
        self.answered(*(bytes([byte]) for byte in self.REQUESTS[0]))

    def test_what_only_speaks_of_it_is_text(self) -> None:
        """As is a later line that looks like a request."""
        self.hears("I like HTTP/2\nGET / HTTP/1.1\n", "I like HTTP/2", "GET / HTTP/1.1")

    def test_a_first_line_of_colons_takes_no_time(self) -> None:
        """A search that tried each of them for an address's end would hold up everyone for seconds."""
        for _ in range(10):
            self.peer().send(b"A " + b":" * 70_000)
        self.fence(self.ann, self.bob)

    def test_a_first_line_too_long_changes_nothing_for_the_next(self) -> None:
        self.ann.say("x" * 70_000)
        self.ann.expect(LINE_TOO_LONG)
        self.hears("I like HTTP/1.1\n", "I like HTTP/1.1")


class Commands(OnAServer):
    def test_who_says_something_privately_is_told_that_it_went(self) -> None:
        self.name(self.bob, "bob")
        self.ann.say("/msg bob text with  blanks ")
        self.ann.expect("* to bob: text with  blanks ")
        self.bob.expect(f"* {self.ann.label} to you: text with  blanks ")
        self.bob.say(f"/msg {self.ann.label} http://example.org/")
        self.bob.expect(f"* to {self.ann.label}: http://example.org/")
        self.fence(self.bob)
        self.assertNotIn(b"with  blanks", self.server.output)
        self.assertNotIn(b"example.org", self.server.output)

    def test_what_reached_nobody_has_no_receipt(self) -> None:
        self.ann.say("/msg nobody hi")
        self.assertNotIn(b"* to ", self.ann.line())
        self.fence(self.ann, self.bob)

    def test_commands_have_their_names_in_any_case_and_blanks_before(self) -> None:
        self.name(self.bob, "bob")
        for command in ("/msg", "/Msg", " /MSG", "\t /mSg"):
            with self.subTest(command=command):
                self.ann.say(f"{command} bob hi")
                self.ann.expect("* to bob: hi")
                self.bob.expect(f"* {self.ann.label} to you: hi")
        self.ann.say(" \t/Who")
        self.assertRegex(self.ann.line(), rb"\* \d+ here: ")
        self.fence(self.ann, self.bob)

    def test_an_unknown_command_is_told_of_and_goes_to_nobody(self) -> None:
        self.name(self.bob, "bob")
        for line in ("/msg:bob hi", "/mgs bob hi", " /mgs bob hi", "/Unknown", "/x"):
            with self.subTest(line=line):
                self.ann.say(line)
                told = self.ann.line()
                self.assertTrue(told.startswith(b"* ") and not told.startswith(b"* refused: "), told)
        self.fence(self.ann, self.bob)

    def test_what_begins_with_a_slash_and_is_no_command_is_text(self) -> None:
        for line in ("/etc/hosts", "/", "/1", "/ who", "/msg/bob hi", "/-", "/a/"):
            with self.subTest(line=line):
                self.hears(f"{line}\n", line)

    def test_two_slashes_send_one(self) -> None:
        self.hears("//word and more\n//msg bob hi\n", "/word and more", "/msg bob hi")


class AtTheDoor(TestCase):
    """Tests that start a server each, and have a file with a password."""

    def setUp(self) -> None:
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        self.folder = pathlib.Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.file = self.folder / "password"
        self.file.write_text(SECRET)

    def serve(self, *options: str, **constants: float) -> Server:
        server: Server = self.stack.enter_context(Server(*options, constants=constants))
        return server

    def connect(self, server: Server, source: str = "") -> Peer:
        return self.stack.enter_context(server.connect(LOOPBACK, source=(source, 0) if source else None))

    def all_heard(self, server: Server, sent: str = "") -> bytes:
        peer = self.connect(server)
        with contextlib.suppress(ConnectionError):  # it may be turned away before
            peer.send(sent)
        return peer.read_to_end()


class Refusals(AtTheDoor):
    """Who is turned away gets one notice, which begins like no other."""

    def test_a_full_server(self) -> None:
        server = self.serve("--max-clients", "3")
        for _ in range(3):
            self.stack.enter_context(server.peer())
        self.assertEqual(self.all_heard(server), b"* refused: server full: 3 of 3 clients\n")

    def test_too_many_of_a_host(self) -> None:
        server = self.serve("--max-per-host", "2")
        for _ in range(2):
            self.stack.enter_context(server.peer())
        self.assertEqual(self.all_heard(server), b"* refused: too many from your address: 2 of 2 clients\n")

    def test_a_wrong_password(self) -> None:
        server = self.serve("--password-file", str(self.file), WRONG_SECONDS=0.05)
        heard = self.all_heard(server, "a\nb\nc\n")
        self.assertEqual(heard, b"* password?\n* wrong password\n* wrong password\n* refused: wrong password\n")

    def test_no_password_in_time(self) -> None:
        server = self.serve("--password-file", str(self.file), PASSWORD_SECONDS=2)
        self.assertEqual(self.all_heard(server), b"* password?\n* refused: no password within 2 s\n")

    @unittest.skipUnless(shutil.which("openssl"), "needs openssl: install it")
    def test_plain_text_at_a_server_with_tls(self) -> None:
        server = self.serve("--tls-cert", bench.certificate())
        heard = self.all_heard(server, "hello\n")
        self.assertTrue(heard.startswith(b"* refused: ") and heard.count(b"\n") == 1, heard)

    def test_nothing_else_begins_so(self) -> None:
        """Neither what a member may not do, nor what people say."""
        server = self.serve("--announce", "--history", "5")
        ann, bob = (self.stack.enter_context(server.peer()) for _ in range(2))
        for line in (
            "/nick 1",
            "/nick",
            "/nick server",
            "/msg nobody hi",
            "/msg",
            "/r",
            "/r hi",
            "/unknown",
            "/help",
            "/quit now",
            "x" * 70_000,
            "* refused: no",
            "//refused",
        ):
            ann.say(line)
        ann.say("exit")
        bob.wait_for(ann.label, "* refused: no")
        bob.wait_for(ann.label, "/refused")
        bob.expect(f"* {ann.label} left")
        self.assertNotRegex(ann.read_to_end(), rb"(?m)^\* refused: ")


class Door(AtTheDoor):
    """Before the password."""

    def test_a_wrong_line_leaves_those_behind_it(self) -> None:
        server = self.serve("--password-file", str(self.file), WRONG_SECONDS=0.05)
        peer = self.connect(server)
        peer.send(f"wrong\n{SECRET}\nhello\n")
        peer.expect("* password?", "* wrong password", "* password accepted")
        eventually(lambda: f"\n{peer.label}:hello\n".encode() in server.output)

    def test_the_first_name_is_the_one_to_have(self) -> None:
        server = self.serve("--password-file", str(self.file))
        peer = self.connect(server)
        peer.send(f"/nick ann\n{SECRET}\nhello\n")
        peer.expect("* password?", "* password accepted")
        eventually(lambda: b"\nann:hello\n" in server.output)

    def test_a_second_name_is_a_try(self) -> None:
        server = self.serve("--password-file", str(self.file), WRONG_SECONDS=0.05)
        heard = self.all_heard(server, "/nick a\n/nick b\n/nick c\n/nick d\n")
        self.assertEqual(heard, b"* password?\n* wrong password\n* wrong password\n* refused: wrong password\n")

    @unittest.skipUnless(sys.platform == "linux", "needs Linux: /proc tells what a server has read")
    def test_little_is_read_of_who_has_not_said_the_password(self) -> None:
        """The rest stays with the system until the server is done with the first lines."""
        server = self.serve("--password-file", str(self.file))
        peer = self.connect(server)
        peer.expect("* password?")
        sent = b"/nick a\n" * 5_000
        peer.send(sent)
        eventually(lambda: unread(server, peer) < len(sent))
        peer.expect("* wrong password")  # at the second line
        self.assertGreater(unread(server, peer), len(sent) - 2_048)

    @unittest.skipUnless(sys.platform == "linux", "needs Linux: 127.0.0.2 is an address there")
    def test_the_oldest_of_the_host_with_the_most_makes_room(self) -> None:
        server = self.serve("--password-file", str(self.file), DOOR_PLACES=4)
        crowd = []
        for source in ("", "", "", "127.0.0.2"):
            crowd.append(self.connect(server, source))
            crowd[-1].expect("* password?")  # before the next comes: the oldest is who was the first at the door
        for source, oldest in (("127.0.0.3", crowd[0]), ("127.0.0.4", crowd[1])):
            newcomer = self.connect(server, source)
            newcomer.expect("* password?")
            self.assertRegex(oldest.read_to_end(), rb"\A(\* refused: [^\n]*\n)?\Z")
        for peer in (*crowd[2:], newcomer):
            peer.say(SECRET)
            peer.expect("* password accepted")


class History(TestCase):
    @unittest.skipUnless(hasattr(time, "tzset"), "needs tzset: Windows has none")
    def test_a_newcomer_is_told_when_lines_were_said(self) -> None:
        """Before the first of each minute; that is no line of those that were asked for, and nobody hears it live."""
        with contextlib.ExitStack() as stack:
            clock = stack.enter_context(tempfile.NamedTemporaryFile())

            def later(minutes: int) -> None:
                clock.write(bytes(minutes))
                clock.flush()

            server = stack.enter_context(Server("--history", "3", setup=f"clock = {clock.name!r}\n{CLOCK}"))
            ann, bob = (stack.enter_context(server.peer()) for _ in range(2))

            def say(*lines: str) -> None:
                for line in lines:
                    ann.say(line)
                    bob.expect(f"{ann.label}:{line}")

            say("one", "two")
            later(1)
            say("three")
            label = ann.label
            with server.peer() as newcomer:
                newcomer.expect("* the last 3 lines:", "* 06:23", f"{label}:one", f"{label}:two")
                newcomer.expect("* 06:24", f"{label}:three", "* live from here")
                later(600)
                say("four")
                newcomer.expect(f"{label}:four")
            with server.peer() as newcomer:
                newcomer.expect("* the last 3 lines:", "* 06:23", f"{label}:two", "* 06:24", f"{label}:three")
                newcomer.expect("* 16:24", f"{label}:four", "* live from here")


class Announced(OnAServer):
    options = ("--announce",)

    def setUp(self) -> None:
        SharedServerTestCase.setUp(self)
        self.ann, self.bob = self.two_announced()
        self.addCleanup(self.leave)

    def leave(self) -> None:
        """Have all be gone before the next test counts who is here."""
        for peer in (self.ann, self.bob):
            peer.half_close()
            peer.read_to_end()

    def test_comings_and_goings_stand_in_the_order_of_the_lines(self) -> None:
        for number in range(20):
            third = self.connect()
            third.send(f"{number}\nexit\n")
            third.read_to_end()
            for listener in (self.ann, self.bob):
                listener.expect(f"* {third.label} joined", f"{third.label}:{number}", f"* {third.label} left")

    def test_who_has_left_is_not_named(self) -> None:
        """Once the others are told."""
        third = self.connect()
        self.ann.expect(f"* {third.label} joined")
        third.reset()
        self.ann.expect(f"* {third.label} left")
        self.ann.say("/who")
        self.ann.expect(f"* 2 here: {self.ann.label} (you), {self.bob.label}")


class Rate(TestCase):
    def test_what_is_read_is_paid_for_whatever_becomes_of_it(self) -> None:
        """Fifty lines at once and five a second: the last of sixty comes after two seconds at the earliest."""
        kinds = {
            "blank": b"\n",
            "blanks": b" \t\n",
            "command": b"/who\n",
            "unknown": b"/unknown\n",
            "telnet": b"\xff\xf1\n",
            "erased": b"x\b\n",
            "text": b"x\n",
        }
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(Server("--quiet", "--rate", "5"))
            bob = stack.enter_context(server.peer())
            started = time.monotonic()
            senders = {}
            for kind, line in kinds.items():
                sender = stack.enter_context(server.connect(LOOPBACK))
                sender.send(line * 59 + b"last\n")
                senders[f"{sender.label}:last".encode()] = kind
            early = []
            while senders:
                line = bob.line()
                if line in senders:
                    kind = senders.pop(line)
                    if time.monotonic() < started + 1.5:
                        early.append(kind)
            self.assertEqual(early, [])

    def test_a_line_too_long_is_paid_for(self) -> None:
        with Server("--quiet", "--rate", "5") as server, server.peer() as bob, server.connect(LOOPBACK) as ann:
            started = time.monotonic()
            background = Background()
            background.run(ann.send, (b"x" * 65_537 + b"\n") * 59 + b"last\n")
            bob.expect(f"{ann.label}:last")
            self.assertGreater(time.monotonic(), started + 1.5)
            background.join()


class Stopping(TestCase):
    @unittest.skipUnless(hasattr(signal, "SIGHUP"), "needs SIGHUP: Windows has none")
    def test_a_terminal_that_is_closed_stops_the_server(self) -> None:
        with Server() as server, server.peer() as ann:
            ann.say("before")
            server.expect(f"{ann.label}:before")
            server.process.send_signal(signal.SIGHUP)
            ann.expect_end()
            ann.close()
            self.assertEqual(server.wait(), 0)
            self.assertEqual(server.output.count(b"Connection closed\n"), 1)

    @unittest.skipUnless(hasattr(signal, "SIGHUP"), "needs SIGHUP: Windows has none")
    def test_a_server_that_was_started_to_outlive_its_terminal_goes_on(self) -> None:
        ignoring = ("sh", "-c", 'trap "" HUP; exec "$@"', "sh")
        with Server(prefix=ignoring) as server, server.peer() as ann:
            server.process.send_signal(signal.SIGHUP)
            with server.peer() as bob:
                ann.say("still here")
                bob.expect(f"{ann.label}:still here")
            self.assertEqual(server.stop(), 0)


@unittest.skipUnless(sys.platform == "linux", "needs network namespaces: only Linux has them")
@unittest.skipUnless(IP, "needs ip: install iproute2")
@unittest.skipUnless(hasattr(os, "geteuid") and os.geteuid() == 0, "needs root: for namespaces")
class Networks(TestCase):
    def host(self) -> Host:
        host = Host()
        self.addCleanup(host.remove)
        return host

    def joinable(self, here: Host, there: Host, server: Server, start: str) -> None:
        """Fail unless one of the lines begins so, and a client on another host that is typed it joins."""
        prefix = "Others join with: python mychatclient.py "
        while not (line := server.line()).startswith(prefix + start):
            self.assertTrue(line.startswith(prefix), line)
            self.assertNotIn("0.0.0.0", line)
            self.assertNotRegex(line, " fe80[^% ]*( |$)")
        words = line[len(prefix) :].partition(" (")[0].split()
        words[0] = re.sub("%.*", "%eth0", words[0])  # the interface is the reader's to name
        with there.client(*words[:2]) as client:
            client.expect("Connected to chat server. Type 'exit' to leave.")

    def test_a_link_local_address_to_listen_on_has_its_interface(self) -> None:
        here, there = self.host(), self.host()
        here.link(there, "fe80::1/64", "fe80::2/64")
        with Server("--host", "fe80::1%eth0", prefix=here.prefix) as server:
            self.joinable(here, there, server, "fe80::1%")

    def test_an_address_that_a_host_gave_itself_is_shown_when_there_is_no_other(self) -> None:
        here, there = self.host(), self.host()
        here.link(there, "169.254.7.1/16", "169.254.7.2/16")
        with Server("--host", "0.0.0.0", prefix=here.prefix) as server:
            self.joinable(here, there, server, "169.254.7.1")
        here.link(there, "10.77.0.1/24", "10.77.0.2/24")
        with Server("--host", "0.0.0.0", prefix=here.prefix) as server:
            self.joinable(here, there, server, "10.77.0.1")

    def test_without_any_address_none_is_shown(self) -> None:
        with Server("--host", "0.0.0.0", prefix=self.host().prefix) as server:
            self.assertNotIn("0.0.0.0", server.line())

    @unittest.skipUnless(shutil.which("unshare"), "needs unshare: install util-linux")
    def test_host_names_that_are_none(self) -> None:
        """Of 64 letters, as Linux takes them, or of bytes that are not UTF-8: no traceback, and people come in."""
        script = 'printf %s "$0" >/proc/sys/kernel/hostname && exec "$@"'
        for name in ("a" * 64, os.fsdecode(b"caf\xe9"), "a..b", "-"):
            for option in (("--host", "0.0.0.0"), ("--lan",)):
                with self.subTest(name=name, option=option):
                    prefix = ("unshare", "--uts", "sh", "-c", script, name)
                    with Server(*option, prefix=(*self.host().prefix, *prefix)) as server:
                        self.assertRegex(server.line(), "^(Others join with: |No address was found)")

    def test_a_peer_that_has_vanished_is_noticed_while_something_is_on_its_way(self) -> None:
        here, there = self.host(), self.host()
        here.link(there, "10.77.0.1/24", "10.77.0.2/24")
        constants = {"VANISHED_SECONDS": 1}
        code = "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2]))); print(1, flush=True)"
        with Server("--lan", prefix=here.prefix, constants=constants) as server:
            port = str(server.port)
            reading = f"{code}\nwhile s.recv(99): pass"
            talking = f"{code}\nsys.stdin.read(1); s.sendall(b'hi\\n'); sys.stdin.read()"
            with (
                there.python("-c", reading, "10.77.0.1", port) as vanished,
                here.python("-c", talking, LOOPBACK, port) as talker,
            ):
                vanished.expect("1")
                talker.expect("1")
                eventually(lambda: server.output.count(b"New connection") == 2)
                here.drop("from", "10.77.0.2")
                talker.send(b"\n")
                eventually(lambda: b":hi\nConnection closed\n" in server.output)


class Consoles(TestCase):
    def started(self, code: str) -> str:
        """Run the server in a program that has replaced a stream; return its status and what was said through it."""
        program = f"""
import contextlib, io, signal, sys
sys.path.insert(0, {str(ROOT)!r})
signal.alarm(20)  # a server would run for ever
import mychatserver
{code}
try:
    status = mychatserver.main(["--port", "0"])
except SystemExit as end:
    status = end.code
said = sys.stdout.getvalue() if isinstance(sys.stdout, io.StringIO) else ""
sys.__stdout__.write(f"{{said}}{{status}}\\n")
"""
        with Program(sys.executable, "-c", program) as running:
            running.wait()
            output: bytes = running.output
            return output.decode()

    @unittest.skipUnless(hasattr(signal, "alarm"), "needs SIGALRM: Windows has none")
    def test_where_there_is_no_terminal_a_user_is_told_to_find_one(self) -> None:
        """In IDLE, Thonny or Jupyter, which replace the streams."""
        for code in (
            "sys.stdout = io.StringIO()",
            "sys.stdin = io.StringIO()",
            "sys.stdin = sys.stdout = io.StringIO()",
        ):
            with self.subTest(code=code):
                self.assertEqual(self.started(code), "Run this in a terminal: python mychatserver.py\n1\n")

    def told(self, python: str) -> str:
        """Return what a Python that is too old says on standard error."""
        done = subprocess.run(
            [python, SERVER], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS
        )
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("3.9", done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        return done.stderr

    @unittest.skipUnless(OLD_PYTHONS.get("3.8"), "needs an old Python: 3.8 under pyenv")
    def test_a_python_that_is_too_old_says_so_in_one_line(self) -> None:
        self.assertEqual(self.told(OLD_PYTHONS["3.8"]).count("\n"), 1)

    @unittest.skipUnless(OLD_PYTHONS, "needs an old Python: one before 3.9 under pyenv")
    def test_what_an_old_python_cannot_even_read_it_shows_with_the_version_that_is_needed(self) -> None:
        for version, python in OLD_PYTHONS.items():
            with self.subTest(version=version):
                self.assertLess(self.told(python).count("\n"), 5)
