"""A client that comes back by itself after its connection was lost."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import socket
import sys
import time
import unittest
from collections.abc import Mapping

import mychatclient
from tests.support import (
    CLIENT,
    LONG,
    LOOPBACK,
    PYTHON,
    SECONDS,
    Peer,
    Program,
    Server,
    Terminal,
    TestCase,
    command_of,
    eventually,
    free_port,
)

GREETING = "Connected to chat server. Type 'exit' to leave."
LOST = "\n* connection lost, trying again\n"
BACK = "\n* connected again\n"
FAREWELL = "Disconnected from server"
SOON = {"RECONNECT_SECONDS": 0.2}  # before each try


class Reconnecting(TestCase):
    def setUp(self) -> None:
        self.port = free_port()
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)

    def serve(self, *options: str) -> Server:
        server: Server = self.stack.enter_context(Server("--port", str(self.port), *options))
        return server

    def client(self, *options: str, constants: Mapping[str, object] | None = SOON) -> Terminal:
        command = (*command_of(CLIENT, constants), "--no-color", "--reconnect", *options, LOOPBACK, str(self.port))
        terminal: Terminal = self.stack.enter_context(Terminal(*command))
        terminal.wait_for(f"{GREETING}\n", within=True)
        return terminal

    def shows(self, client: Terminal, text: str, at_the_end: bool = False) -> None:
        """Wait until the end of what is shown has ``text``."""
        eventually(lambda: client.drawn().endswith(text) if at_the_end else text in client.drawn())

    def kill(self, server: Server) -> None:
        server.process.kill()
        server.process.wait()

    def test_five_with_half_typed_lines_come_back_with_their_names_and_hear_what_they_missed(self) -> None:
        server = self.serve()
        clients = [self.client("--name", f"n{number}") for number in range(5)]
        for number, client in enumerate(clients):
            client.wait_for(f"is now n{number}\n", within=True)
            client.type(f"half {number}")
        for number, client in enumerate(clients):
            self.shows(client, f"half {number}", at_the_end=True)
        self.kill(server)
        for number, client in enumerate(clients):
            client.wait_for(f"{LOST}half {number}")
        server = self.serve("--history", "9")
        with Peer(LOOPBACK, self.port) as early:
            early.say("missed")
            # Those who come after that are told; those who came before have heard it.
            for number, client in enumerate(clients):
                client.wait_for(":missed\n", within=True)
                client.wait_for(f"is now n{number}\n", within=True)
                self.shows(client, BACK)
            for number, client in enumerate(clients):
                self.shows(client, f"\nhalf {number}", at_the_end=True)
            clients[3].type(" done\r")
            early.wait_for("n3", "half 3 done")
        for client in clients:
            client.type("\x15exit\r")
            self.assertEqual(client.wait(), 0)
            self.assertEqual(client.screen().count(FAREWELL), 1)
            self.assertEqual(client.attributes(), client.before)

    def test_a_line_entered_meanwhile_is_said_not_to_be_sent_and_is_one_up_away(self) -> None:
        server = self.serve()
        client = self.client()
        self.kill(server)
        client.wait_for(LOST)
        client.type("lost words\r")
        client.wait_for("\n* not connected: this line was not sent\n")
        server = self.serve()
        client.wait_for(BACK)
        with server.peer() as ann:
            client.type("\x1b[A\r")
            self.assertRegex(ann.line(), rb"^\d+:lost words$")

    @unittest.skipUnless(sys.platform == "linux", "needs Linux: only there /proc tells what a thread waits for")
    def test_a_line_entered_before_the_loss_is_shown_is_not_sent_either(self) -> None:
        """As while Ctrl-S holds the screen: a server that stops takes it, and throws it away."""
        with socket.create_server((LOOPBACK, self.port)) as listener:
            listener.settimeout(SECONDS)
            client = self.client("--plain")
            connection, _ = listener.accept()
        with connection:
            connection.settimeout(SECONDS)
            client.hold(True)
            connection.shutdown(socket.SHUT_WR)
            threads = pathlib.Path(f"/proc/{client.process.pid}/task")
            # One waits to read from the terminal, the other to write there.
            eventually(lambda: [path.read_text() for path in threads.glob("*/wchan")] == ["wait_woken"] * 2)
            client.type("lost words\r")
            self.assertEqual(connection.recv(100), b"")
            client.hold(False)
            client.wait_for("\n* not connected: this line was not sent\n", within=True)

    def test_ctrl_c_and_exit_while_there_is_no_connection(self) -> None:
        for typed, status in (("\x03", 130), ("exit\r", 0), ("\x04", 0), ("half\x03", 130)):
            with self.subTest(typed=typed):
                server = self.serve()
                client = self.client()
                self.kill(server)
                client.wait_for(LOST)
                client.type(typed)
                self.assertEqual(client.wait(), status)
                self.assertTrue(client.screen().endswith(f"{FAREWELL}\n"))
                self.assertNotIn("Connection lost", client.screen())
                self.assertEqual(client.attributes(), client.before)

    def test_who_leaves_meanwhile_does_not_come_back(self) -> None:
        server = self.serve()
        client = self.client("--name", "ann")
        client.wait_for("is now ann\n")
        self.kill(server)
        client.wait_for(LOST)
        client.type("exit\r")
        server = self.serve()
        self.assertEqual(client.wait(), 0)
        self.assertNotIn(BACK, client.screen())
        self.assertNotIn(b"ann", server.output)

    def test_a_server_that_closes_again_and_again_is_tried_after_a_pause_each_time(self) -> None:
        """It may be something else that has the port now."""
        server = self.serve()
        client = self.client(constants={"RECONNECT_SECONDS": 0.5})
        self.kill(server)
        client.wait_for(LOST)
        with socket.create_server((LOOPBACK, self.port)) as listener:
            listener.settimeout(60)
            closed = 0.0
            for _ in range(3):
                connection, _ = listener.accept()
                self.assertGreater(time.monotonic() - closed, 0.5)
                closed = time.monotonic()
                connection.sendall(b"220 mail\n")
                connection.close()
        client.type("\x03")
        self.assertEqual(client.wait(), 130)

    def test_a_server_that_is_full_is_tried_again(self) -> None:
        server = self.serve()
        client = self.client()
        self.kill(server)
        client.wait_for(LOST)
        with socket.create_server((LOOPBACK, self.port)) as listener:
            listener.settimeout(60)
            for _ in range(2):
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(b"* refused: server full: 1 of 1 clients\n")
        self.assertNotIn(BACK, client.drawn())
        self.serve()
        client.wait_for(BACK)

    def test_who_is_turned_out_does_not_come_back(self) -> None:
        """Nor when the connection is reset after that."""
        for linger in (b"\0" * 8, b"\1\0\0\0\0\0\0\0"):
            with self.subTest(linger=linger), socket.create_server((LOOPBACK, self.port)) as listener:
                listener.settimeout(60)
                client = self.client()
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(b"ann:Hi!\n")
                    client.wait_for("ann:Hi!\n")
                    connection.sendall(b"* refused: kicked: enough\n")
                    client.wait_for("kicked: enough\n")
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.assertEqual(client.wait(), 1)
                self.assertIn("\n* refused: kicked: enough\n", client.screen())
                self.assertIn("Connection lost: the server has turned this client away", client.screen())

    def test_a_name_that_was_refused_is_not_asked_for_again(self) -> None:
        server = self.serve()
        with server.peer() as ann:
            ann.say("/nick ann")
            client = self.client("--name", "bob")
            client.wait_for("is now bob\n")
            client.type("/nick ann\r")
            client.wait_for("is taken\n")
        self.kill(server)
        client.wait_for(LOST)
        self.serve()
        client.wait_for("is now bob\n")

    @unittest.skipUnless(sys.platform == "linux", "needs Linux: only there the system tells what has arrived")
    def test_lines_that_were_perhaps_not_delivered_are_told_and_are_an_up_away(self) -> None:
        with socket.create_server((LOOPBACK, self.port)) as listener:
            listener.settimeout(60)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)  # soon full: nobody reads
            client = self.client()
            connection, _ = listener.accept()
        for number in range(100):
            client.type(f"{'x' * 1_000} {number}\r")
            client.wait_for(f" {number}\n")
        connection.close()  # which is a reset, as there is something to read
        told = re.compile(r"\n\* (\d+) lines were perhaps not delivered\n\n\* connection lost, trying again\n")
        found = eventually(lambda: told.search(client.drawn()))
        self.assertIn(int(found[1]), range(50, 101))
        server = self.serve()
        client.wait_for(BACK)
        with server.peer() as ann:
            client.type("\x1b[A\x1b[A\r")
            self.assertRegex(ann.line(), rb"^\d+:x+ 98$")

    def test_the_last_name_that_was_got_is_taken_again(self) -> None:
        server = self.serve()
        client = self.client("--name", "first")
        client.wait_for("is now first\n")
        client.type("/nick second\r")
        client.wait_for("is now second\n")
        client.type("/nick not:one\r")
        client.wait_for("only\n")
        self.kill(server)
        client.wait_for(LOST)
        self.serve()
        client.wait_for("is now second\n")

    def test_a_web_server_that_took_the_port_is_no_reason_to_go_on(self) -> None:
        server = self.serve()
        client = self.client()
        self.kill(server)
        client.wait_for(LOST)
        with socket.create_server((LOOPBACK, self.port)) as listener:
            listener.settimeout(60)
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                self.assertEqual(client.wait(), 1)
        self.assertIn("Connection lost: that is a web server", client.screen())

    def test_without_a_terminal_or_a_first_connection_there_is_no_such_thing(self) -> None:
        with Program(*PYTHON, CLIENT, "--reconnect", LOOPBACK, str(self.port)) as program:
            self.assertEqual(program.wait(), 2)
            self.assertIn("--reconnect is for a terminal", program.errors())
        command = (*PYTHON, CLIENT, "--reconnect", LOOPBACK, str(self.port))
        with Terminal(*command) as terminal:
            self.assertEqual(terminal.wait(), 1)
            self.assertRegex(terminal.screen(), r"^No server at [^\n]+\n$")

    def test_many_are_back_named(self) -> None:
        """Each has a name again, and nobody has it twice."""
        count = 50 if LONG else 8
        server = self.serve()
        clients = [self.client("--name", f"n{number}", constants=None) for number in range(count)]
        for number, client in enumerate(clients):
            client.wait_for(f"is now n{number}\n", within=True)
        self.kill(server)
        server = self.serve()
        with Peer(LOOPBACK, self.port) as witness:

            def all_here() -> bool:
                witness.say("/who")
                while not (line := witness.line()).startswith(b"* "):
                    pass
                return len(re.findall(rb"\bn\d+\b", line)) >= min(count, 49)  # fifty are shown, the witness among them

            eventually(all_here)
        for number in (0, count - 1):
            clients[number].wait_for(f"is now n{number}\n", within=True)

    def test_stopped_and_continued(self) -> None:
        """A machine that sleeps: the connection is lost meanwhile, and found again on waking."""
        server = self.serve()
        client = self.client()
        client.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, client.process.pid, os.WSTOPPED | os.WNOWAIT)
        self.kill(server)
        server = self.serve()
        client.process.send_signal(signal.SIGCONT)
        client.wait_for(f"{LOST}{BACK}")


@unittest.skipUnless(sys.platform == "linux", "needs Linux: only there the system tells what has arrived")
class Doubts(TestCase):
    """Of lines that were entered when a connection was about to be lost, none is left out of the count."""

    def connection(self) -> tuple[mychatclient.Connection, socket.socket]:
        """Return a connection with a hundred lines of 1,000 bytes in it, most of them on their way, and its peer."""
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)  # soon full: nobody reads
            listener.bind((LOOPBACK, 0))
            listener.listen()
            connection = mychatclient.Connection(socket.create_connection(listener.getsockname()))
            self.addCleanup(connection.close)
            peer, _ = listener.accept()
        self.addCleanup(peer.close)
        for _ in range(100):
            self.assertTrue(connection.send_line(b"x" * 999 + b"\n"))
        return connection, peer

    def test_a_long_line_that_could_not_be_sent_hides_none_of_those_before_it(self) -> None:
        connection, peer = self.connection()
        peer.close()  # which is a reset, as there is something to read
        with self.assertRaises(ConnectionResetError):
            connection.receive(SECONDS)
        before = connection.doubtful_lines(connection.acknowledged())
        self.assertIn(before, range(50, 101))
        self.assertFalse(connection.send_line(b"y" * 60_000 + b"\n"))
        self.assertEqual(connection.doubtful_lines(connection.acknowledged()), before + 1)

    def test_a_line_that_is_sent_while_they_are_counted_hides_none_either(self) -> None:
        connection, _ = self.connection()
        acknowledged = connection.acknowledged()
        before = connection.doubtful_lines(acknowledged)
        self.assertTrue(connection.send_line(b"y" * 60_000 + b"\n"))
        self.assertEqual(connection.doubtful_lines(acknowledged), before + 1)
