"""The operator: what is typed where the server runs is said and done, and nobody else can do it."""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import re
import signal
import socket
import sys
import tempfile
import threading
import unittest
from typing import Any
from unittest import mock

from mychatserver import COMMANDS, HIGH_WATER_BYTES, OPERATOR_COMMANDS
from tests import test_lan
from tests.support import (
    CLIENT,
    LOOPBACK,
    NEEDS_IPV6,
    NEEDS_ROOT,
    PYTHON,
    SECONDS,
    SERVER,
    SMALL_BUFFERS,
    Background,
    Peer,
    Program,
    Server,
    Terminal,
    TestCase,
    eventually,
    numbered_lines,
    unread,
)

NO_OPERATOR = "No terminal to read from, as in the background: the chat goes on without its operator.\n"
ALL_ADDRESSES = "::"

# A peer on another host: it says who it is, shows what it hears, and ends when the server closes.
VISIT = """
import socket, sys
sock = socket.create_connection(sys.argv[1:3], source_address=(sys.argv[3], 0))
sock.sendall(b"/nick bob\\n")
while data := sock.recv(1000):
    sys.stdout.buffer.write(data)
    sys.stdout.flush()
print("closed")
"""


class Operated(Server):
    """A server with an operator, who types through a pipe. Its peers are closed with it."""

    def __init__(self, *options: str, **more: Any) -> None:
        self._peers = contextlib.ExitStack()
        super().__init__("--operator", *options, keep_input=True, **more)

    def connect(self, host: str, **options: Any) -> Peer:
        return self._peers.enter_context(super().connect(host, **options))

    def __exit__(self, *reason: object) -> None:
        self._peers.close()
        super().__exit__(*reason)

    def type(self, line: str) -> None:
        self.send(f"{line}\n".encode())

    def named(self, name: str, **options: Any) -> Peer:
        """Return a peer that has taken this name."""
        peer = self.peer(**options)
        peer.say(f"/nick {name}")
        peer.expect(f"* {peer.label} is now {name}")
        self.expect(f"* {peer.label} is now {name}")
        peer.label = name
        return peer


def expect_kicked(peer: Peer, reason: str = "kicked") -> None:
    """Fail unless the peer is told so as the last thing, and the stream ends; it stays as it is."""
    heard = peer.read_to_end()
    if not re.search(rf"(?:^|\n)\* refused: {reason}\n$", heard.decode()):
        raise AssertionError(heard[-200:])


class Typed(TestCase):
    def test_in_a_terminal(self) -> None:
        """What is typed goes to all, in the order of what is said; commands act; exit stops the server."""
        with Terminal(*PYTHON, SERVER, "0", "--operator") as operator:
            operator.wait_for("\n")
            port = int(operator.screen().rpartition(":")[2])
            with Peer(LOOPBACK, port) as ann, Peer(LOOPBACK, port) as bob:
                bob.say("/nick bob")
                ann.expect(f"* {bob.label} is now bob")
                operator.type("Good evening\n")
                for peer in (ann, bob):
                    peer.wait_for("server", "Good evening")
                operator.type("/WHO\n")
                operator.wait_for(f"\n* 2 here\n* {ann.label} from {LOOPBACK}\n* bob from {LOOPBACK}\n")
                operator.type("/kick Bob  be nice: \n")
                expect_kicked(bob, "kicked: be nice: ")
                operator.wait_for("Connection closed\n", within=True)
                operator.type("//kick ann\n")
                ann.expect("server:/kick ann")
                operator.type(" Exit \n")
                ann.expect_end()
                self.assertEqual(operator.wait(), 0)
            self.assertIn("\n* bob was kicked\n", operator.screen())

    def test_through_a_fifo(self) -> None:
        """Lines may come in pieces; the end of input ends an unfinished line, and not the server."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "fifo")
            os.mkfifo(path)
            command = ("sh", "-c", f'exec "$@" <{path}', "sh", *PYTHON, SERVER, "0", "--operator")
            with Program(*command) as server:
                with open(path, "wb", buffering=0) as fifo:
                    port = int(server.line().rpartition(":")[2])
                    with Peer(LOOPBACK, port) as ann:
                        server.line()
                        fifo.write(b"Hel")
                        fifo.write("lo! \x1b[2J\xff\r\n\n".encode("latin-1"))
                        ann.expect("server:Hello! \ufffd[2J\ufffd")
                        fifo.write(b"x" * 65_537 + b"\n" + b"unfinished")
                        server.expect("server:Hello! \ufffd[2J\ufffd")
                        self.assertIn("line too long", server.line())
                        fifo.close()
                        ann.expect("server:unfinished")
                        server.expect("server:unfinished")
                        with Peer(LOOPBACK, port) as bob:
                            server.line()
                            ann.say("after the end")
                            bob.expect(f"{ann.label}:after the end")
                server.process.send_signal(signal.SIGTERM)
                self.assertEqual((server.wait(), server.errors()), (0, ""))

    def check_background(self, start: str) -> None:
        """Start a server under a shell, and have it in the background: it says that it has no operator, and goes on."""
        with Terminal("/bin/bash", "--norc", "--noprofile", "-i") as shell:
            shell.type("PS1='$ '\r")
            shell.wait_for("$ ")
            shell.type(f"{sys.executable} {SERVER} 0 --operator {start}\r")
            shell.wait_for("Server listening on", within=True)
            while not (found := re.search(r"listening on \S+:(\d+)\n", shell.screen())):
                self.assertTrue(shell.read(SECONDS))
            with Peer(LOOPBACK, int(found[1])) as ann, Peer(LOOPBACK, int(found[1])) as bob:
                for peer in (ann, bob):
                    shell.wait_for(f"New connection from : {peer.address}\n", within=True)
                if not start:
                    shell.type("Hello\r")
                    for peer in (ann, bob):
                        peer.expect("server:Hello")
                    shell.type("\x1a")
                    shell.wait_for("Stopped", within=True)
                    shell.wait_for("$ ")
                    shell.type("bg\r")
                shell.wait_for(NO_OPERATOR, within=True)
                ann.say("Hi!")
                bob.expect(f"{ann.label}:Hi!")
            shell.type("kill %1; wait %1; echo status $?\r")
            shell.wait_for("status 0\n", within=True)

    def test_started_in_the_background(self) -> None:
        self.check_background("&")

    def test_sent_to_the_background(self) -> None:
        self.check_background("")

    def test_without_standard_input(self) -> None:
        for shell, expected in (('"$@" <&-', ""), ('"$@" 0>/dev/null', NO_OPERATOR)):
            with Program("sh", "-c", f"exec {shell}", "sh", *PYTHON, SERVER, "0", "--operator") as server:
                Peer(LOOPBACK, int(server.line().rpartition(":")[2])).close()
                server.line()
                eventually(lambda: server.errors() == expected)  # noqa: B023 - called here
                server.process.send_signal(signal.SIGTERM)
                self.assertEqual(server.wait(), 0)

    def test_nothing_is_read_unless_asked_for(self) -> None:
        with Server(keep_input=True) as server, server.peer() as ann, server.peer() as bob:
            server.send(b"Hello\nexit\n")
            server.end_input()
            ann.say("fence")
            bob.expect(f"{ann.label}:fence")
            server.expect(f"{ann.label}:fence")

    def test_commands_are_explained_and_mistakes_told(self) -> None:
        with Operated() as server:
            server.type("/help")
            server.expect(*(f"* {usage}: {meaning}" for usage, meaning, _ in OPERATOR_COMMANDS.values()))
            server.type("/kick\n/ban \n/unban\n/bans x\n/kcik bob\n/kick bob")
            server.expect("* usage: /kick NAME [REASON]", "* usage: /ban NAME", "* usage: /unban ADDRESS")
            server.expect("* usage: /bans")
            server.expect("* unknown command '/kcik': /help lists them, // sends a line that starts with /")
            server.expect("* nobody here is called 'bob'")

    def test_it_is_in_the_history_and_the_log_and_never_slows_the_chat(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            log = pathlib.Path(folder, "log")
            with Operated("--history", "9", "--announce", "--log", str(log)) as server, server.peer() as ann:
                ann.expect(f"* 1 here: {ann.label} (you)")
                server.type("Good evening")
                ann.expect("server:Good evening")
                server.expect("server:Good evening")
                with server.peer() as bob:
                    ann.expect(f"* {bob.label} joined")
                    server.type(f"/kick {bob.label}")
                    expect_kicked(bob)
                    self.assertEqual(ann.line().decode(), f"* {bob.label} was kicked")
                self.assertEqual(server.stop(), 0)
            lines = [line.partition(" ")[2] for line in log.read_text().splitlines()]
            self.assertIn("server:Good evening", lines)
            self.assertIn(f"* {bob.label} was kicked", lines)


class Moments(TestCase):
    """Somebody is kicked at every moment."""

    def check_chat(self, server: Operated, ann: Peer) -> None:
        """Fail unless people can come and chat as before."""
        with server.peer() as other:
            other.say("fence")
            ann.wait_for(other.label, "fence")
        while server.line() != "Connection closed":
            pass

    def test_while_idle_and_while_half_a_line_has_come(self) -> None:
        with Operated() as server, server.peer() as ann:
            for beginning in ("", "half a li"):
                bob = server.named("bob")
                ann.line()
                bob.send(beginning)
                server.type("/kick bob go home")
                expect_kicked(bob, "kicked: go home")  # though it does not close
                server.expect("* bob was kicked", "Connection closed")
                self.check_chat(server, ann)

    def test_while_it_floods(self) -> None:
        with Operated("--quiet") as server, server.peer() as ann, server.peer() as bob:
            background = Background()
            reading = threading.Event()

            def flood() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        bob.send(numbered_lines(1_000))
                        reading.set()

            background.run(flood)
            background.run(ann.wait_for, "server", "enough")
            self.assertTrue(reading.wait(SECONDS))
            server.type(f"/kick {bob.label} flood\nenough")
            server.expect(f"* {bob.label} was kicked", "Connection closed")
            self.assertIn(b"* refused: kicked: flood\n", bob.read_to_end())
            bob.close()
            background.join()

    def test_while_it_reads_nothing(self) -> None:
        """A slow consumer, for which others have to wait: they go on at once."""
        with Operated("--quiet", setup=SMALL_BUFFERS) as server, server.peer() as ann:
            bob = server.peer(receive_buffer=4_096)
            background = Background()
            lines = numbered_lines(100_000)
            background.run(ann.send, lines)
            eventually(lambda: unread(server, ann) > HIGH_WATER_BYTES // 4)  # ann has spent her budget
            server.type(f"/kick {bob.label}")
            server.expect(f"* {bob.label} was kicked", "Connection closed")
            background.join()
            bob.close()
            eventually(lambda: not unread(server, ann))  # or whoever comes to chat would be the next slow consumer
            self.check_chat(server, ann)

    def test_while_it_takes_its_answers_slowly(self) -> None:
        """It waits to be answered until it has taken more, which a crawler hardly does."""
        constants = {"STALL_SECONDS": 10 * SECONDS}
        with Operated("--quiet", setup=SMALL_BUFFERS, constants=constants) as server, server.peer() as ann:
            bob = server.peer(receive_buffer=4_096)
            ann.send(numbered_lines(5_000) + b"/who\n")  # too little for a slow consumer
            ann.expect(f"* 2 here: {ann.label} (you), {bob.label}")
            bob.say("/who")
            eventually(lambda: not unread(server, bob))
            bob.say("more")
            eventually(lambda: unread(server, bob))
            server.type(f"/kick {bob.label}")
            server.expect(f"* {bob.label} was kicked", "Connection closed")
            bob.close()
            self.check_chat(server, ann)

    def test_whoever_floods_meanwhile_the_operator_can_speak_and_act(self) -> None:
        """Who was there and who came later have spent their budgets, and wait for a slow consumer that may stay."""
        patient = {"FLOOR_SECONDS": 600, "STALL_SECONDS": 600, "EPOCH_SECONDS": 600.0, "CLIENT_BUDGET_BYTES": 4_096}
        with Operated("--quiet", setup=SMALL_BUFFERS, constants=patient) as server, server.peer() as ann:
            bob = server.peer(receive_buffer=4_096)
            background = Background()

            def flood(peer: Peer) -> None:
                with contextlib.suppress(OSError):  # closed
                    peer.send(numbered_lines(100_000))

            background.run(flood, ann)
            eventually(lambda: unread(server, ann) > HIGH_WATER_BYTES // 4)
            late, last = server.peer(), server.peer()
            background.run(flood, late)
            eventually(lambda: unread(server, late) > HIGH_WATER_BYTES // 4)
            last.socket.settimeout(0.5)
            with contextlib.suppress(socket.timeout):  # not even a word more
                while True:
                    last.say("/nick")
                    while last.line() != b"* usage: /nick NAME":
                        pass
            server.type(f"One moment, please\n/kick {bob.label}")
            server.expect(f"* {bob.label} was kicked", "Connection closed")
            ann.wait_for("server", "One moment, please")
            for peer in (ann, late):
                peer.socket.shutdown(socket.SHUT_RDWR)
            background.join()

    def test_while_it_waits_for_its_rate(self) -> None:
        with Operated("--rate", "1", constants={"BURST_SECONDS": 1}) as server, server.peer() as ann:
            bob = server.named("bob")
            ann.line()
            bob.send("1\n2\n3\n4\n5\n6\n7\n8\n9\n")
            server.type("/kick bob")
            expect_kicked(bob)
            server.expect("* bob was kicked", "Connection closed")
            self.check_chat(server, ann)

    def test_twice_at_once_after_it_left_and_oneself(self) -> None:
        with Operated() as server, server.peer() as ann:
            bob = server.named("bob")
            ann.line()
            server.type("/kick bob\n/kick bob\n/ban bob\n/kick server\n/kick")
            expect_kicked(bob)
            eventually(lambda: b"* usage: /kick NAME [REASON]\n" in server.output)
            self.assertIn(b"* nobody here is called 'server'\n", server.output)
            eventually(lambda: b"Connection closed\n" in server.output)
            server.pass_over()
            self.check_chat(server, ann)
            self.assertEqual(server.output.count(b"Connection closed\n"), 2)  # with who came to chat

    def test_before_the_password_there_is_nobody_to_kick(self) -> None:
        with mock.patch.dict(os.environ, {"MYCHAT_PASSWORD": "sesame"}), Operated() as server:
            ann = server.connect(LOOPBACK)
            ann.expect("* password?")
            server.type(f"/kick {ann.label}")
            server.expect(f"* nobody here is called '{ann.label}'")
            ann.say("sesame")
            ann.expect("* password accepted")
            server.newcomer()
            server.type(f"/kick {ann.label}")
            expect_kicked(ann)

    def test_a_client_that_was_kicked_does_not_come_back(self) -> None:
        command = *PYTHON, CLIENT, "--reconnect", "--name", "bob"
        with Operated() as server, Terminal(*command, str(server.port)) as client:
            server.newcomer()
            server.line()
            client.type("half a li")
            client.wait_for("half a li")
            server.type("/kick bob go home")
            server.expect("* bob was kicked", "Connection closed")
            self.assertEqual(client.wait(), 1)
            self.assertIn("\n* refused: kicked: go home\n", client.screen())
            self.assertIn("the server has turned this client away", client.screen())

    def test_this_machine_is_not_banned(self) -> None:
        """As all who come by ssh have its address."""
        with Operated() as server, server.named("bob") as bob:
            server.type("/ban bob")
            expect_kicked(bob)
            server.expect("* not banned: all who come by ssh have this machine's own address", "* bob was kicked")
            server.expect("Connection closed")
            server.peer().close()


class Others(TestCase):
    def test_nobody_else_can_do_any_of_it(self) -> None:
        """Not by typing it, by a private word, or by a name; and /help does not tell of it."""
        with Operated() as server, server.named("ann") as ann, server.named("bob") as bob:
            ann.line()
            for command in sorted({*OPERATOR_COMMANDS} - {*COMMANDS}):
                bob.say(f"{command} ann")
                bob.expect(f"* unknown command '{command}': /help lists them, // sends a line that starts with /")
                bob.send(f"//{command[1:]} ann\n {command}: ann\nserver:{command} ann\n")
                bob.expect(f"* unknown command '{command}:': /help lists them, // sends a line that starts with /")
                ann.expect(f"bob:{command} ann", f"bob:server:{command} ann")
                bob.say(f"/msg ann {command} bob")
                ann.expect(f"* bob to you: {command} bob")
                bob.expect(f"* to ann: {command} bob")
            for name in ("server", "SERVER", "\uff53erver"):
                bob.say(f"/nick {name}")
                bob.expect(f"* not a name: '{name}': it is reserved")
            bob.say("/help")
            bob.expect(*(f"* {usage}: {meaning}" for usage, meaning, _ in COMMANDS.values()))
            bob.say("exit")
            bob.expect_end()
            ann.say("still here")
            server.type("/who")
            eventually(lambda: b"* 1 here\n" in server.output)


@unittest.skipUnless(sys.platform == "linux", "needs network namespaces: only Linux has them")
@unittest.skipUnless(test_lan.IP, "needs ip: apt-get install iproute2")
@NEEDS_ROOT
class Banned(TestCase):
    """The operator's server on one host, with people on another."""

    def setUp(self) -> None:
        self.here, self.there = test_lan.Host(), test_lan.Host()
        for host in (self.here, self.there):
            self.addCleanup(host.remove)
        self.here.link(self.there, "10.77.0.1/24", "10.77.0.2/24")

    def visit(self, address: str, source: str, port: int) -> Program:
        return self.there.python("-c", VISIT, address, str(port), source)

    def check(self, host: str, pairs: list[tuple[str, str]], banned: str) -> None:
        """Have the first be banned, by the address that is shown; then the others may not come in either."""
        with Operated("--host", host, "--quiet", prefix=self.here.prefix) as server:
            address, source = pairs[0]
            with self.visit(address, source, server.port) as bob:
                self.assertTrue(bob.line().endswith(" is now bob"))
                server.newcomer()
                server.type("/ban bob")
                bob.expect("* refused: kicked", "closed")
                eventually(lambda: f"* {banned} is banned\n".encode() in server.output)
            for address, source in pairs:
                with self.visit(address, source, server.port) as bob:
                    bob.expect("* refused: banned", "closed")
            server.pass_over()
            server.type(f"/bans\n/unban 10.9.9.9\n/unban {banned}\n/bans")
            listed = f"* banned: {banned}"
            answers = (line for line in iter(server.line, None) if line.startswith("* "))  # not who was refused
            self.assertEqual(list(itertools.islice(answers, 4)), [listed, listed, *["* banned: nobody"] * 2])
            with self.visit(address, source, server.port) as bob:
                self.assertTrue(bob.line().endswith(" is now bob"))

    def test_over_ipv4(self) -> None:
        self.check("0.0.0.0", [("10.77.0.1", "10.77.0.2")], "10.77.0.2")

    @NEEDS_IPV6
    def test_over_ipv4_that_is_mapped_and_over_ipv6(self) -> None:
        """A host may have any address of its IPv6 network."""
        self.check(ALL_ADDRESSES, [("10.77.0.1", "10.77.0.2")], "10.77.0.2")
        self.here.link(self.there, "fd77::1/64", "fd77::2/64")
        self.there.ip("address", "add", "fd77::3/64", "dev", "eth1", "nodad")
        self.check(ALL_ADDRESSES, [("fd77::1", "fd77::2"), ("fd77::1", "fd77::3")], "fd77::/64")
