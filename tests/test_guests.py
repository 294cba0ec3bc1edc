"""Who may come in: networks, places of a host, a password; and what a client may say a second."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shlex
import signal
import socket
import sys
import tempfile
import time
import unittest
from collections.abc import Mapping
from typing import Any
from unittest import mock

import mychatclient
import mychatserver
from tests.support import (
    ASKED,
    CLIENT,
    LOOPBACK,
    NEEDS_IPV6,
    PYTHON,
    SECONDS,
    SERVER,
    Background,
    Peer,
    Program,
    Server,
    Terminal,
    TestCase,
    command_of,
    eventually,
    home_made_server,
)
from tests.test_terminal import inputrc

GREETING = "Connected to chat server. Type 'exit' to leave."
FAREWELL = "Disconnected from server"
QUESTION = "* password?"
ACCEPTED = "* password accepted"
WRONG = "* wrong password"
REFUSED = "* refused: wrong password"  # at the third
SECRET = "open Sésame! "  # with a blank at its end


class Guests(TestCase):
    def setUp(self) -> None:
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        self.folder = pathlib.Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.file = self.folder / "password"
        self.file.write_bytes(f"{SECRET}\r\nand more\n".encode())

    def serve(self, *options: str, constants: Mapping[str, object] | None = None) -> Server:
        server: Server = self.stack.enter_context(Server(*options, constants=constants))
        return server

    def ask(self, *options: str, **constants: object) -> Server:
        """Return a server that asks for the password; a wrong one costs little time, if nothing else is said."""
        constants = {"WRONG_SECONDS": 0.1, **constants}
        return self.serve("--password-file", str(self.file), *options, constants=constants)

    def connect(self, server: Server, host: str = LOOPBACK, source: str = "") -> Peer:
        """Return a peer that is connected, and no more."""
        peer: Peer = self.stack.enter_context(Peer(host, server.port, source=(source, 0) if source else None))
        return peer

    def peer(self, server: Server, **options: Any) -> Peer:
        """Return a peer that is in the room."""
        peer: Peer = self.stack.enter_context(server.peer(**options))
        return peer

    def console_has(self, server: Server, line: str) -> None:
        eventually(lambda: f"{line}\n".encode() in server.output)


class Addresses(Guests):
    @NEEDS_IPV6
    def test_who_is_not_allowed_is_closed_at_once_without_a_byte(self) -> None:
        server = self.serve("--host", "::", "--allow", "127.0.0.2/32", "--allow", "2001:db8::/32")
        for host in (LOOPBACK, "::1"):
            stranger = self.connect(server, host)
            self.assertEqual(stranger.read_to_end(), b"")
            self.console_has(server, f"Refused : {stranger.address}")
        guests = [self.connect(server, source="127.0.0.2") for _ in range(2)]  # the server gets these over IPv6
        for guest in guests:
            self.console_has(server, f"New connection from : {guest.address}")
        guests[0].say("Hi!")
        guests[1].expect(f"{guests[0].label}:Hi!")

    def test_so_many_of_a_host_and_another_when_one_has_left(self) -> None:
        server = self.serve("--max-per-host", "2", "--max-clients", "4")
        first, second = self.peer(server), self.peer(server)
        third = self.connect(server)
        third.expect("* refused: too many from your address: 2 of 2 clients")
        third.expect_end()
        server.expect(f"Refused : {third.address}")
        for _ in range(2):
            self.peer(server, source=("127.0.0.2", 0))
        full = self.connect(server, source="127.0.0.3")
        full.expect("* refused: server full: 4 of 4 clients")
        server.expect(f"Refused : {full.address}")
        for peer in (first, second):
            peer.close()
            server.expect("Connection closed")
            self.peer(server)  # takes the place, and no more than that one is given back
            third = self.connect(server)
            third.expect("* refused: server full: 4 of 4 clients")
            third.expect_end()

    def test_with_ipv6_a_host_is_its_64(self) -> None:
        def host(address: str) -> str:
            return mychatserver.host_key((address, 1))

        self.assertEqual(host("2001:db8::1"), host("2001:db8::ffff:0:0:9"))
        self.assertNotEqual(host("2001:db8::1"), host("2001:db8:0:1::1"))
        self.assertEqual(host("fe80::1%lo"), host("fe80::2"))
        self.assertNotEqual(host("127.0.0.1"), host("127.0.0.2"))

    def test_networks(self) -> None:
        for text, inside, outside in (
            ("192.168.1.7/24", "192.168.1.200", "192.168.2.1"),
            ("10.0.0.7", "10.0.0.7", "10.0.0.8"),
            ("2001:db8::/32", "2001:db8:1::1", "10.0.0.1"),
            ("fe80::/10", "fe80::1%lo", "fec0::1"),
        ):
            with self.subTest(text):
                guests = mychatserver.Guests([mychatserver.network(text)], b"", None, None)
                self.assertTrue(guests.are_allowed_from(inside))
                self.assertFalse(guests.are_allowed_from(outside))
        with Program(*PYTHON, SERVER, "--allow", "10.0.0.0/33") as program:
            self.assertEqual(program.wait(), 2)
            self.assertIn("'10.0.0.0/33' is not a network: 192.168.1.0/24", program.errors())


class Passwords(Guests):
    def test_nothing_is_heard_or_said_before_the_password(self) -> None:
        server = self.ask("--history", "9", "--announce")
        ann = self.enter(server)
        ann.expect(f"* 1 here: {ann.label} (you)")
        bob = self.connect(server)
        bob.expect(QUESTION)
        ann.send("secret plans\n/who\n/msg " + bob.label + " psst\n")
        ann.expect(f"* 1 here: {ann.label} (you)", f"* nobody here is called '{bob.label}'")
        server.expect(f"{ann.label}:secret plans")
        bob.send("/nick bob\n/nick bo\n/who\n")  # one is a name, two are tries
        bob.expect(WRONG, WRONG)
        bob.send(f"{SECRET}\nHi!\n")
        bob.expect(ACCEPTED, f"* 2 here: {ann.label}, {bob.label} (you)", "* the last line:")
        self.assertRegex(bob.line(), rb"^\* \d\d:\d\d$")
        bob.expect(f"{ann.label}:secret plans", "* live from here", f"* {bob.label} is now bob")
        ann.expect("* bob joined", "bob:Hi!")
        server.expect(f"New connection from : {bob.address}", f"* {bob.label} is now bob", "bob:Hi!")
        self.assertEqual(server.errors(), "")

    def enter(self, server: Server, source: str = "") -> Peer:
        """Return a peer that has said the password and is in the room."""
        peer = self.connect(server, source=source)
        peer.expect(QUESTION)
        peer.say(SECRET)
        peer.expect(ACCEPTED)
        server.expect(f"New connection from : {peer.address}")
        return peer

    def test_three_tries_that_take_time_and_side_by_side_guesses_gain_nothing(self) -> None:
        server = self.ask(WRONG_SECONDS=0.3)
        ann, bob = self.enter(server), self.enter(server)
        guessers = [self.connect(server) for _ in range(20)]
        begun = time.monotonic()
        for guesser in guessers:
            guesser.expect(QUESTION)
            guesser.send("".join(f"{guess}\n" for guess in ("", SECRET.strip(), SECRET.upper(), SECRET)))
        for guesser in guessers:
            guesser.expect(WRONG, WRONG, REFUSED)  # the right one comes too late
        self.assertGreaterEqual(time.monotonic() - begun, 3 * 0.3)
        for guesser in guessers:
            guesser.expect_end()
        ann.say("still here")
        bob.expect(f"{ann.label}:still here")
        self.assertTrue(eventually(lambda: b"Refused : ('127.0.0.1', " in server.output))

    def test_whoever_says_exit_or_leaves_at_the_door_is_gone(self) -> None:
        server = self.ask()
        for last in ("exit\n", " /quit\n", None):
            guest = self.connect(server)
            guest.expect(QUESTION)
            if last:
                guest.send(last)
            else:
                guest.half_close()
            guest.expect_end()
        # An unfinished line at end-of-file is a line here too.
        guest = self.connect(server)
        guest.send(f"/nick ann\n{SECRET}")
        guest.half_close()
        self.assertEqual(guest.read_to_end().decode().splitlines()[:2], [QUESTION, ACCEPTED])
        server.expect(f"New connection from : {guest.address}", f"* {guest.label} is now ann", "Connection closed")

    def test_a_line_too_long_is_a_wrong_try(self) -> None:
        server = self.ask()
        guest = self.connect(server)
        guest.expect(QUESTION)
        for answer in (WRONG, WRONG, REFUSED):
            guest.send("x" * 70_000 + "\n")
            guest.expect(answer)
        guest.expect_end()

    def test_a_home_made_client_that_sends_no_newline_gets_in(self) -> None:
        server = self.ask(SILENCE_SECONDS=0.2)
        guest = self.connect(server)
        guest.expect(QUESTION)
        guest.send(SECRET)
        guest.expect(ACCEPTED)

    def test_who_waits_at_the_door_has_places(self) -> None:
        server = self.ask(DOOR_PLACES=3)
        self.enter(server, source="127.0.0.4")
        first, second = self.connect(server), self.connect(server)
        first.expect(QUESTION)
        second.expect(QUESTION)
        for source in ("127.0.0.2", "127.0.0.3"):
            self.connect(server, source=source).expect(QUESTION)
        first.expect("* refused: too many are waiting to enter")  # the oldest of the host that has the most
        first.expect_end()
        server.expect(f"Refused : {first.address}")
        second.say(SECRET)
        second.expect(ACCEPTED)

    @unittest.skipUnless(sys.platform == "linux", "needs Linux: /proc tells of threads")
    def test_who_has_lost_its_place_does_not_go_on_paying_for_a_wrong_try(self) -> None:
        """Or one who connects and guesses without end would have as many threads as it likes."""
        server = self.ask(DOOR_PLACES=3, WRONG_SECONDS=10 * SECONDS)
        self.connect(server).expect(QUESTION)
        threads = server.threads() - 1  # all its own have been started by now
        for _ in range(30):
            guesser = self.connect(server)
            guesser.expect(QUESTION)
            guesser.say("a guess")
        eventually(lambda: server.threads() <= threads + 3)

    def test_time_to_wait_at_the_door_is_limited_and_its_places_are_given_back(self) -> None:
        server = self.ask(DOOR_PLACES=2, PASSWORD_SECONDS=1.0)
        early = self.connect(server)
        early.say(SECRET)
        early.expect(QUESTION, ACCEPTED)
        server.expect(f"New connection from : {early.address}")
        slow, flooding = self.connect(server), self.connect(server)
        slow.send(SECRET[:1])  # a byte now and then gains no time, nor does a flood of what is no try
        background = Background()
        background.run(self.pour, flooding)
        slow.expect(QUESTION, "* refused: no password within 1 s")
        slow.expect_end()
        background.join()
        early.say("still here")  # whom the time does not count for
        while (line := server.line()) != f"{early.label}:still here":
            self.assertRegex(line, "^Refused : ")
        late = self.connect(server)
        late.say(SECRET)
        late.expect(QUESTION, ACCEPTED)

    def pour(self, peer: Peer) -> None:
        """Ask for names until the server has enough of it."""
        deadline = time.monotonic() + SECONDS
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline:
                peer.send("/nick ann\n" * 1_000)
            raise AssertionError("it is not let go")

    def test_the_server_stops_while_somebody_is_asked_and_another_pays_for_a_wrong_try(self) -> None:
        server = self.ask()
        peers = [self.connect(server) for _ in range(2)]
        for peer in peers:
            peer.expect(QUESTION)
        peers[0].say("wrong")
        begun = time.monotonic()
        self.assertEqual(server.stop(), 0)
        self.assertLess(time.monotonic() - begun, 25)

    def test_the_password_of_file_or_environment_and_what_is_wrong_with_it(self) -> None:
        empty, directory = self.folder / "empty", self.folder / "directory"
        empty.write_bytes(b"\nsecret\n")
        directory.mkdir()
        for module, problem in ((mychatserver, mychatserver.Unusable), (mychatclient, mychatclient.NotConnected)):
            with self.subTest(module=module.__name__):
                with mock.patch.dict(os.environ, {"MYCHAT_PASSWORD": "other"}):
                    self.assertEqual(module.password_from(str(self.file)), SECRET.encode())
                    self.assertEqual(module.password_from(None), b"other")
                with mock.patch.dict(os.environ, {"MYCHAT_PASSWORD": ""}):
                    self.assertEqual(module.password_from(None), b"")
                for path in (empty, directory, self.folder / "missing"):
                    with self.assertRaisesRegex(problem, re.escape(str(path))):
                        module.password_from(str(path))
                with mock.patch.dict(os.environ, {"MYCHAT_PASSWORD": "a\nb"}):
                    self.assertRaisesRegex(problem, "MYCHAT_PASSWORD holds no password", module.password_from, None)
        for program in (SERVER, CLIENT):
            with Program(sys.executable, program, "--password-file", str(empty)) as running:
                self.assertEqual(running.wait(), 1)
                self.assertRegex(running.errors(), r"^\S+ holds no password: .*\n$")
            with Program(sys.executable, program, "--passwor", "x") as running:  # no abbreviations
                self.assertEqual(running.wait(), 2)

    def test_a_password_file_of_a_windows_editor(self) -> None:
        """In UTF-8 its mark is no part of the password; in UTF-16 a sentence says what to do."""
        self.file.write_bytes(f"{SECRET}\r\n".encode("utf-8-sig"))
        guest = self.connect(self.ask())
        guest.say(SECRET)
        guest.expect(QUESTION, ACCEPTED)
        self.assertEqual(mychatclient.password_from(str(self.file)), SECRET.encode())
        for form in ("utf-16-le", "utf-16-be"):
            self.file.write_bytes(f"\ufeff{SECRET}\r\n".encode(form))
            for path in (SERVER, CLIENT):
                with Program(*PYTHON, path, "--password-file", str(self.file)) as program:
                    self.assertEqual(program.wait(), 1)
                    self.assertRegex(program.errors(), r"^\S+ is in UTF-16, [^\n]*: save it as UTF-8\.\n$")

    def test_a_password_beyond_this_machine_without_encryption_is_warned_of(self) -> None:
        server = self.serve("--host", "0.0.0.0", "--password-file", str(self.file))
        warning = "The password, and all that is said, crosses the network unencrypted: --tls-cert encrypts it.\n"
        eventually(lambda: server.errors() == warning)


class Clients(Guests):
    """The client at a server that wants a password, or does not."""

    def client(self, server: Server, *options: str) -> Program:
        command = (*command_of(CLIENT, ASKED), *options, LOOPBACK, str(server.port))
        program: Program = self.stack.enter_context(Program(*command, keep_input=True))
        return program

    def terminal(self, server: Server, *options: str, constants: Mapping[str, object] = ASKED) -> Terminal:
        command = (*command_of(CLIENT, constants), "--no-color", *options, LOOPBACK, str(server.port))
        terminal: Terminal = self.stack.enter_context(Terminal(*command))
        return terminal

    def test_asked_where_the_terminal_is_not_its_own(self) -> None:
        """As under ``su -c``: nobody can be asked there, and nothing that is typed is taken for the password."""
        server = self.ask()
        for options in ((), ("--reconnect",)):
            with self.subTest(options=options):
                command = (*command_of(CLIENT, ASKED), *options, LOOPBACK, str(server.port))
                with Terminal(*command, own=False) as terminal:
                    terminal.type("hello all\r")
                    self.assertEqual(terminal.wait(), 1)
                    self.assertIn("A password is asked for: give --password-file FILE", terminal.screen())
        command = (*command_of(CLIENT, ASKED), "--password", LOOPBACK, str(server.port))
        with Program("setsid", "--wait", *command, keep_input=True) as program:
            self.assertEqual(program.wait(), 1)
            self.assertEqual(program.errors(), f"{mychatclient.UNANSWERED}\n")

    def test_in_a_pipe_with_the_password(self) -> None:
        server = self.ask()
        with mock.patch.dict(os.environ, {"MYCHAT_PASSWORD": SECRET}):
            ann = self.client(server, "--name", "ann")
        ann.expect(GREETING)
        bob = self.client(server, "--password-file", str(self.file))
        bob.send(b"Hi!\n")
        bob.end_input()
        self.assertEqual(bob.wait(), 0)
        self.assertEqual(bob.output.decode(), f"{GREETING}\n{FAREWELL}\n")
        self.assertRegex(ann.line() + ann.line() + ann.line() + ann.line(), r"^\* \d+ is now ann\d+:Hi!$")
        ann.end_input()
        self.assertEqual(ann.wait(), 0)
        server.stop()
        for program in (ann, bob, server):
            self.assertNotIn(SECRET.strip(), program.output.decode() + program.errors())

    def test_in_a_pipe_without_it_or_with_a_wrong_one(self) -> None:
        server = self.ask()
        program = self.client(server)  # its input stays open, with nothing in it
        self.assertEqual(program.wait(), 1)
        self.assertEqual(program.output, b"")
        self.assertRegex(program.errors(), r"^A password is asked for: give --password.*\n$")
        (self.folder / "wrong").write_text("wrong\n")
        program = self.client(server, "--password-file", str(self.folder / "wrong"))
        self.assertEqual(program.wait(), 1)
        self.assertEqual(program.output, b"")
        self.assertRegex(program.errors(), r"^Wrong password: .*\n$")

    def test_nothing_is_sent_after_the_question_was_seen(self) -> None:
        sent: list[bytes] = []

        def serve(sock: socket.socket) -> None:
            sock.sendall(b"* password?\n")
            sent.append(sock.recv(100))

        with home_made_server(serve) as port:
            command = (*command_of(CLIENT, ASKED), LOOPBACK, str(port))
            with Program(*command, keep_input=True) as program:
                eventually(lambda: program.errors())
                with contextlib.suppress(BrokenPipeError):  # it may have ended by now
                    program.send(b"private\n")
                self.assertEqual(program.wait(), 1)
        self.assertEqual(sent, [b""])

    def test_with_a_password_at_a_server_that_asks_for_none(self) -> None:
        server = self.serve("--history", "1")
        ann = self.peer(server)
        ann.say(QUESTION)  # in somebody's mouth it is no question
        server.line()
        program = self.client(server, "--password-file", str(self.file))
        program.send(b"Hi!\n")
        program.expect(GREETING)
        self.assertEqual(program.errors(), "")
        self.assertTrue(ann.line().endswith(b":Hi!"))
        program.end_input()
        self.assertEqual(program.wait(), 0)

    def test_it_does_not_matter_how_long_connecting_took(self) -> None:
        """As when ssh asks for a pass phrase: here an hour, as far as the client can tell."""
        hour_later = f"""
import sys, time
sys.path.insert(0, {str(pathlib.Path(CLIENT).parent)!r})
import mychatclient
connect, now = mychatclient.connect, time.monotonic
def connect_slowly(*arguments):
    sock = connect(*arguments)
    time.monotonic = lambda: now() + 3_600
    return sock
mychatclient.connect = connect_slowly
"""
        server = self.serve()
        with Program(*command_of(CLIENT, {}, hour_later), LOOPBACK, str(server.port)) as program:
            program.expect(GREETING)

    def test_in_a_terminal_it_is_asked_for_unseen(self) -> None:
        server = self.ask()
        for options in ((), ("--password",)):
            client = self.terminal(server, "--name", "ann", *options)
            client.wait_for("Password: ")
            client.type(f"{SECRET}\n")
            client.wait_for("is now ann\n")
            self.assertRegex(client.screen(), f"^Password: \n{GREETING}\n")
            server.line(), server.line()
            client.type("Hi!\r")
            server.expect("ann:Hi!")
            client.type("exit\r")
            self.assertEqual(client.wait(), 0)
            server.expect("Connection closed")
            self.assertEqual(client.screen().count(GREETING), 1)
            self.assertNotIn(SECRET.strip(), client.screen())
            self.assertEqual(client.attributes(), client.before)

    def test_how_the_question_can_end_in_a_terminal(self) -> None:
        server = self.ask()
        for typed, status in (("\x03", 130), ("\x04", 0), ("Exit\n", 0)):
            with self.subTest(typed=typed):
                client = self.terminal(server)
                client.wait_for("Password: ")
                client.type(typed)
                self.assertEqual(client.wait(), status)
                self.assertEqual(client.screen(), "Password: \n")
                self.assertEqual(client.attributes(), client.before)
        for tries, options in ((3, ()), (3, ("--password",)), (2, ())):
            with self.subTest(tries=tries, options=options):
                client = self.terminal(server, *options)
                asked = "Password: "
                for _ in range(tries):
                    client.wait_for(asked)
                    client.type("wrong\n")
                    asked += "\nWrong password, try again.\nPassword: "
                if tries < 3:
                    client.wait_for(asked)
                    client.type(f"{SECRET}\n")
                    client.wait_for(f"{GREETING}\n")
                    client.type("exit\n")
                    self.assertEqual(client.wait(), 0)
                else:
                    self.assertEqual(client.wait(), 1)
                    self.assertTrue(client.screen().endswith(f"\n{mychatclient.WRONG}\n"))
                self.assertEqual(client.attributes(), client.before)
        client = self.terminal(server)
        client.wait_for("Password: ")
        server.stop()
        client.type("anything\n")
        self.assertEqual(client.wait(), 1)
        self.assertRegex(client.screen(), r"^Password: \nThe server has not let us in: [^\n]+\n$")
        self.assertEqual(client.attributes(), client.before)

    def test_signals_at_the_question_leave_the_terminal_sane_and_the_password_unseen(self) -> None:
        server = self.ask()
        for options in ((), ("--plain",), ("--password",)):
            clients = [self.terminal(server, *options) for _ in range(4)]
            for client in clients:
                client.wait_for("Password: ")
            for client, number in zip(clients, (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)):
                with self.subTest(options=options, number=number):
                    client.process.send_signal(number)
                    self.assertEqual(client.wait(), -number)
                    self.assertEqual(client.attributes(), client.before)
            with self.subTest(options=options):
                client = clients[3]
                client.type("\x1a")  # which does nothing here
                client.type(SECRET.encode() + b"\xe9\n")
                client.wait_for("Wrong password, try again.\nPassword: ", within=True)
                client.type("\x04")
                self.assertEqual(client.wait(), 0)
                self.assertNotIn(SECRET.strip(), client.screen())
                self.assertEqual(client.attributes(), client.before)

    def test_ctrl_z_at_the_question(self) -> None:
        """The shell echoes what is typed; after fg the question is asked again, unseen, and works."""
        server = self.ask()
        command = " ".join(shlex.quote(word) for word in (*command_of(CLIENT, ASKED), LOOPBACK, str(server.port)))
        echo = "stty -a | grep -o '[ -]echo ' | tr a-z A-Z\r"
        for shell in (("/bin/bash", "--norc", "--noprofile", "-i"), ("/bin/sh", "-i")):
            with (
                self.subTest(shell=shell),
                inputrc("set enable-bracketed-paste off\n"),
                Terminal(*shell) as terminal,
            ):
                terminal.type("PS1='$ '\r")
                terminal.wait_for("$ ")
                terminal.type(f"{command}\r")
                terminal.wait_for("Password: ")
                terminal.type("\x1a")
                terminal.wait_for("\n$ ")
                terminal.type(echo)
                terminal.wait_for(" ECHO \n$ ")
                terminal.type("fg\r")
                terminal.wait_for("Password: ")
                terminal.type(f"{SECRET}\r")
                terminal.wait_for(f"{GREETING}\n")
                terminal.type("exit\r")
                terminal.wait_for(f"{FAREWELL}\n$ ")
                terminal.type(echo)
                terminal.wait_for(" ECHO \n$ ")
                self.assertNotIn(SECRET.strip(), terminal.screen())

    def test_a_question_that_comes_late_is_told(self) -> None:
        def late(sock: socket.socket) -> None:
            self.assertEqual(sock.recv(100), b"too early\n")
            sock.sendall(b"* password?\n")
            self.assertEqual(sock.recv(100), b"")

        with home_made_server(late) as port:
            client = self.stack.enter_context(Terminal(*PYTHON, CLIENT, LOOPBACK, str(port)))
            client.wait_for(f"{GREETING}\n")
            client.type("too early\r")
            self.assertEqual(client.wait(), 1)
            self.assertIn(f"Connection lost: {mychatclient.ASKED_LATE}\n", client.screen())

    def test_who_is_turned_away_is_told_so(self) -> None:
        for options in ((), ("--password-file", str(self.file))):
            server = self.serve("--max-per-host", "1")
            self.peer(server)
            program = self.client(server, *options)
            program.expect(GREETING, "", "* refused: too many from your address: 1 of 1 clients", FAREWELL)
            self.assertEqual(program.wait(), 1)
            self.assertIn("turned this client away", program.errors())

    def test_reconnecting_gives_the_password_again_and_ends_when_it_is_wrong_now(self) -> None:
        server = self.ask()
        soon = {**ASKED, "RECONNECT_SECONDS": 0.2}
        client = self.terminal(server, "--reconnect", "--name", "ann", constants=soon)
        client.wait_for("Password: ")
        client.type(f"{SECRET}\n")
        client.wait_for("is now ann\n")
        options = ("--port", str(server.port), "--password-file")
        server.process.kill()
        server.process.wait()
        client.wait_for("* connection lost, trying again\n")
        server = self.serve(*options, str(self.file))
        client.wait_for("* connected again\n", within=True)
        client.wait_for("is now ann\n")
        server.process.kill()
        server.process.wait()
        (self.folder / "other").write_text("other\n")
        self.serve(*options, str(self.folder / "other"))
        self.assertEqual(client.wait(), 1)
        self.assertIn("Connection lost: Wrong password", client.screen())
        self.assertEqual(client.attributes(), client.before)


class Rates(Guests):
    def test_a_burst_then_so_many_a_second_and_nothing_is_lost(self) -> None:
        server = self.serve("--rate", "20")
        ann, bob, carol = self.peer(server), self.peer(server), self.peer(server)
        lines = [f"line {number}" for number in range(220)]
        begun = time.monotonic()
        ann.send("".join(f"{line}\n" for line in lines))
        bob.expect(*(f"{ann.label}:{line}" for line in lines[:200]))
        carol.say("between")  # who is not held up by that
        for line in lines[200:]:
            heard = bob.line().decode()
            if heard == f"{carol.label}:between":
                heard = bob.line().decode()
            self.assertEqual(heard, f"{ann.label}:{line}")
        self.assertGreaterEqual(time.monotonic() - begun, 0.9)  # 20 lines were beyond the burst
        # A command counts too, exit does not wait.
        ann.send("/who\n" * 3 + "exit\n")
        for _ in range(3):
            while not (answer := ann.line()).startswith(b"* "):
                self.assertEqual(answer, f"{carol.label}:between".encode())
        ann.expect_end()

    def test_the_burst_is_whole_for_short_and_for_long_lines(self) -> None:
        server = self.serve("--rate", "10", "--quiet", constants={"BURST_SECONDS": 2})
        bob = self.peer(server)
        for line in ("x", "y" * 60_000):
            ann = self.peer(server)
            background = Background()
            begun = time.monotonic()
            background.run(ann.send, f"{line}\n" * 25)
            for _ in range(25):
                bob.expect(f"{ann.label}:{line}")
            self.assertGreaterEqual(time.monotonic() - begun, 0.4)  # five lines were beyond the burst
            background.join()

    def test_who_is_held_leaves_when_the_server_stops(self) -> None:
        server = self.serve("--rate", "1")
        ann, bob = self.peer(server), self.peer(server)
        ann.send("x\n" * 100)
        for _ in range(10):
            bob.expect(f"{ann.label}:x")
        begun = time.monotonic()
        self.assertEqual(server.stop(), 0)
        self.assertLess(time.monotonic() - begun, 25)

    def test_a_pace_over_time(self) -> None:
        """However lines are cut into blocks, in each stretch of time no more are said than burst and rate allow."""
        now = 0.0

        def sleep(seconds: float) -> None:
            nonlocal now
            now += seconds

        with mock.patch.object(time, "monotonic", lambda: now), mock.patch.object(time, "sleep", sleep):
            pace = mychatserver.Bucket(2, 20)

            def said(block: bytes) -> list[float]:
                moments = []
                for _ in range(block.count(b"\n")):
                    pace.take(1)
                    moments.append(now)
                return moments

            times = [moment for size in (1, 50, 3, 91) for moment in said(b"x\n" * size)]
            self.assertEqual(times[:20], [0.0] * 20)
            for number, moment in enumerate(times[20:], 1):
                self.assertAlmostEqual(moment, number / 2)
            self.assertEqual(len(times), 1 + 50 + 3 + 91)
            now += 1_000  # a long silence allows no more than a burst
            start = now
            times = said(b"x\n" * 30)
            self.assertEqual(times[:20], [start] * 20)
            self.assertAlmostEqual(times[-1], start + 5)
            now += 0.25  # in which half a line has become due
            start = now
            self.assertEqual(said(b"x\n"), [start + 0.25])

    def test_who_is_gone_says_nothing_more(self) -> None:
        """A name and a place are free as soon as something said finds that their owner has closed."""
        server = self.serve("--rate", "5")
        ann, bob = self.peer(server), self.peer(server)
        ann.send("x\n" * 3_000)
        for _ in range(50):
            bob.expect(f"{ann.label}:x")
        server.expect(*[f"{ann.label}:x"] * 50)
        ann.close()

        def is_gone() -> bool:
            bob.send("are you there?\n/who\n")
            while not (line := bob.line()).startswith(b"* "):
                pass
            return line.startswith(b"* 1 here")

        # What a closed connection is sent first is answered with a reset, which the next send finds.
        eventually(is_gone)


class Threads(Guests):
    def test_no_thread_is_left_of_those_who_were_turned_away(self) -> None:
        server = self.ask("--max-per-host", "1")
        eventually(lambda: server.threads() == 4)  # main, the server's, two writers
        before = server.threads(), server.descriptors()
        for _ in range(5):
            for last in (f"{SECRET}\nexit\n", "exit\n"):
                peer = self.connect(server)
                peer.send(last)
                peer.read_to_end()
                peer.close()
        eventually(lambda: (server.threads(), server.descriptors()) == before)
