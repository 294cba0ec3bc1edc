"""The client as a program: in pipes and terminals, with servers of all kinds, and how it ends."""

from __future__ import annotations

import contextlib
import glob
import os
import pathlib
import pty
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from unittest import mock

import mychatclient
from tests.support import (
    CLIENT,
    LONG,
    LOOPBACK,
    NEEDS_ROOT,
    PYTHON,
    SECONDS,
    TAKE_TERMINAL,
    Background,
    Program,
    Server,
    SharedServerTestCase,
    Terminal,
    TestCase,
    as_heard,
    as_text,
    command_of,
    eventually,
    free_port,
    home_made_server,
    needs_command,
    numbered_lines,
    without,
)

GREETING = "Connected to chat server. Type 'exit' to leave."
FAREWELL = "Disconnected from server"
FULL = "* refused: server full: 1 of 1 clients"

# A client whose main thread stays long between taking the lock of a Condition, or an Event, and what it does with it.
SLOW_TO_LOCK = f"""
import sys, threading, time
main, enter = threading.get_ident(), threading.Condition.__enter__
threading.Condition.__enter__ = lambda lock: (enter(lock), time.sleep(0.15 if threading.get_ident() == main else 0))[0]
sys.path.insert(0, {str(pathlib.Path(CLIENT).parent)!r})
import mychatclient
sys.exit(mychatclient.main())
"""

# A client whose completer takes its time for the first thing that it calls, and tells when that begins.
SLOW_TO_COMPLETE = f"""
import os, readline, sys, time
set_completer = readline.set_completer

def set_slow_completer(complete=None):
    def complete_slowly(*given):
        sys.setprofile(pause)
        try:
            return complete(*given)
        finally:
            sys.setprofile(None)

    set_completer(complete and complete_slowly)

def pause(frame, event, argument):
    if event == "c_call":
        sys.setprofile(None)
        os.write(1, b"...")
        time.sleep(0.3)

readline.set_completer = set_slow_completer
sys.path.insert(0, {str(pathlib.Path(CLIENT).parent)!r})
import mychatclient
sys.exit(mychatclient.main())
"""


def client(port: int, *options: str, constants: Mapping[str, object] | None = None) -> Program:
    """Return a client in pipes."""
    return Program(*command_of(CLIENT, constants), *options, LOOPBACK, str(port), keep_input=True)


def in_terminal(port: int, *options: str) -> Terminal:
    """Return a client that has greeted in a terminal."""
    terminal = Terminal(*PYTHON, CLIENT, *options, LOOPBACK, str(port))
    terminal.wait_for(f"{GREETING}\n")
    return terminal


def refuse(connection: socket.socket) -> None:
    """Turn a client away, as a server does that has no place."""
    connection.sendall(f"{FULL}\n".encode())
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(100):
        pass


def reset(connection: socket.socket, last: bytes) -> None:
    """Hear a line, say this, and reset the connection when it has most probably been read."""
    connection.recv(100)
    connection.sendall(last)
    time.sleep(0.2)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """Give a port that answers nobody, as behind a firewall that drops: its listener's queue is full."""
    with socket.socket() as listener, contextlib.ExitStack() as waiting:
        listener.bind((LOOPBACK, 0))
        listener.listen(0)
        for _ in range(3):
            filler = waiting.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


class Pipes(SharedServerTestCase):
    def test_the_whole_output_to_the_letter(self) -> None:
        with self.server.peer() as ann, client(self.server.port) as program:
            program.expect(GREETING)
            self.server.line()
            ann.send("Hi!\nHello! \n漢字 \x1b[31m\n".encode())
            program.expect("", f"{ann.label}:Hi!", "", f"{ann.label}:Hello! ", "", f"{ann.label}:漢字 \ufffd[31m")
            program.send(b"one\ntwo")
            program.end_input()
            self.assertEqual(program.wait(), 0)
            self.assertTrue(program.output.endswith(f"[31m\n{FAREWELL}\n".encode()), program.output)
            label = ann.line().partition(b":")[0]
            ann.expect(label + b":two")

    def test_many_mb_go_through_whole_in_both_directions(self) -> None:
        count = 200_000 if LONG else 80_000  # more than all buffers hold
        lines = numbered_lines(count)
        with Server("--quiet") as server, client(server.port) as sender, client(server.port) as receiver:
            labels = {server.line().rpartition(" ")[2].rstrip(")") for _ in range(2)}
            background = Background()
            background.run(sender.send, lines)
            receiver.wait_for_bytes(len(lines) + count * len("12345:\n") + len(GREETING) + 1)
            background.join()
            heard = receiver.output[len(GREETING) + 1 :]
            wanted = [as_heard(label, lines).replace(b"\n", b"\n\n")[:-1] for label in labels]
            self.assertIn(heard[1:], wanted)

    def test_at_the_end_of_input_what_still_comes_is_shown_until_the_server_closes(self) -> None:
        def serve(connection: socket.socket) -> None:
            self.assertEqual(connection.recv(100), b"last words\n")
            self.assertEqual(connection.recv(100), b"")
            connection.sendall(b"1234:too late?\n1234:no")

        with home_made_server(serve) as port, client(port) as program:
            program.send(b"last words\n")
            program.end_input()
            program.expect(GREETING, "", "1234:too late?", "", "1234:no", FAREWELL)
            self.assertEqual(program.wait(), 0)

    def test_a_shared_input_that_somebody_makes_non_blocking_is_read_to_its_end(self) -> None:
        reading, writing = os.pipe()
        with self.server.peer() as ann:
            command = (*PYTHON, CLIENT, LOOPBACK, str(self.server.port))
            program = subprocess.Popen(command, stdin=reading, stdout=subprocess.DEVNULL)
            self.addCleanup(program.kill)
            for number in range(3):
                os.write(writing, f"{number}\n".encode())
                self.assertTrue(ann.line().endswith(f":{number}".encode()))
                os.set_blocking(reading, False)
            os.close(writing)
            self.assertEqual(program.wait(SECONDS), 0)
        os.close(reading)

    def test_exit_in_the_input_leaves_and_what_follows_is_not_sent(self) -> None:
        with self.server.peer() as ann, client(self.server.port) as program:
            program.expect(GREETING)
            self.server.line()
            program.send(b"before\n \texit\nafter\n")
            program.expect(FAREWELL)
            self.assertEqual(program.wait(), 0)
            self.assertTrue(ann.line().endswith(b":before"))
            with self.server.peer() as bob:
                bob.say("fence")
                ann.expect(f"{bob.label}:fence")

    def test_the_servers_end_is_a_lost_connection(self) -> None:
        with Server() as server, client(server.port) as program:
            program.expect(GREETING)
            server.line()
            server.stop()
            program.expect(FAREWELL)
            self.assertEqual(program.wait(), 1)
            self.assertRegex(program.errors(), r"^Connection lost: the server closed the connection[^\n]*\n$")

    def test_a_reset_is_a_lost_connection(self) -> None:
        def serve(connection: socket.socket) -> None:
            connection.recv(100)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

        with home_made_server(serve) as port, client(port) as program:
            program.expect(GREETING)
            program.send(b"reset me\n")
            program.expect(FAREWELL)
            self.assertEqual(program.wait(), 1)
            self.assertRegex(program.errors(), r"^Connection lost: [^\n]+\n$")

    def test_last_words_without_a_newline_are_shown_before_a_reset_is_told(self) -> None:
        with home_made_server(lambda connection: reset(connection, b"1234:last wor")) as port, client(port) as program:
            program.send(b"reset me\n")
            program.expect(GREETING, "", "1234:last wor", FAREWELL)
            self.assertEqual(program.wait(), 1)
            self.assertRegex(program.errors(), r"^Connection lost: Connection reset by peer; [^\n]+\n$")

    def test_a_refusal_is_told_whatever_follows_it(self) -> None:
        for refusal in (f"{FULL}\n", FULL):
            with (
                self.subTest(refusal=refusal),
                home_made_server(lambda connection: reset(connection, refusal.encode())) as port,  # noqa: B023
                client(port) as program,
            ):
                program.send(b"reset me\n")
                program.expect(GREETING, "", FULL, FAREWELL)
                self.assertEqual(program.wait(), 1)
                self.assertEqual(program.errors(), f"Connection lost: {mychatclient.TURNED_AWAY}\n")

    def test_a_reset_after_exit_is_none_of_our_business(self) -> None:
        """It is after the end of the input: what still was to come is lost."""
        with home_made_server(lambda connection: reset(connection, b"1234:bye\n")) as port, client(port) as program:
            program.send(b"exit\n")
            program.expect(GREETING, "", "1234:bye", FAREWELL)
            self.assertEqual((program.wait(), program.errors()), (0, ""))
        with home_made_server(lambda connection: reset(connection, b"1234:bye\n")) as port, client(port) as program:
            program.send(b"words\n")
            program.end_input()
            program.expect(GREETING, "", "1234:bye", FAREWELL)
            self.assertEqual(program.wait(), 1)

    def test_turned_away(self) -> None:
        with Server("--max-clients", "1") as server, server.peer(), client(server.port) as program:
            program.expect(GREETING, "", "* refused: server full: 1 of 1 clients", FAREWELL)
            self.assertEqual(program.wait(), 1)
            self.assertRegex(program.errors(), "^Connection lost: the server has turned this client away")

    def test_when_a_send_fails_what_had_come_is_still_shown(self) -> None:
        def serve(connection: socket.socket) -> None:
            connection.sendall(b"1234:last\n" * 10_000)
            connection.shutdown(socket.SHUT_RDWR)

        with home_made_server(serve) as port, client(port) as program:
            with contextlib.suppress(OSError):  # the client ends first, perhaps
                while True:
                    program.send(b"more\n" * 1_000)
            self.assertEqual(program.wait(), 1)
            self.assertEqual(program.output.count(b"1234:last\n"), 10_000)

    @needs_command("head", "coreutils")
    def test_head_1_as_a_reader_of_the_output(self) -> None:
        with self.server.peer() as ann:
            head = subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert head.stdin
            with Program(
                *PYTHON, CLIENT, LOOPBACK, str(self.server.port), keep_input=True, output=head.stdin.fileno()
            ) as program:
                first, _ = head.communicate(timeout=SECONDS)
                self.assertEqual(first.decode(), f"{GREETING}\n")

                def ended() -> bool:
                    ann.say("anyone?")
                    return program.process.poll() is not None

                eventually(ended)
                self.assertEqual(program.wait(), 0)
                self.assertEqual(program.errors(), "")

    def test_standard_output_that_is_closed_at_the_start(self) -> None:
        """The connection does not get its number, so nothing that is shown goes to the server."""
        with self.server.peer() as ann:
            command = ("sh", "-c", 'exec "$@" >&-', "sh", *PYTHON, CLIENT, LOOPBACK, str(self.server.port))
            with Program(*command, keep_input=True) as program:
                self.server.line()
                program.send(b"hello\n")
                self.assertTrue(ann.line().endswith(b":hello"))
                program.end_input()
                self.assertEqual(program.wait(), 0)

    def test_text_is_utf_8_whatever_the_locale(self) -> None:
        locale = {"LC_ALL": "C", "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
        with (
            mock.patch.dict(os.environ, locale),
            Server() as server,
            server.peer() as ann,
            client(server.port) as program,
        ):
            server.line()
            ann.say("é漢😀")
            program.expect(GREETING, "", f"{ann.label}:é漢😀")
            server.expect(f"{ann.label}:é漢😀")

    def test_ctrl_c_while_nobody_reads_the_output(self) -> None:
        with Server("--quiet") as server, server.peer() as ann, client(server.port) as program:
            program.expect(GREETING)
            server.line()
            program.reading.clear()
            ann.send(b"x" * 60_000 + b"\n")
            ann.send((b"x" * 60_000 + b"\n") * 4)
            eventually(lambda: b"xxx" in program.output)  # one block was read, the rest fills the pipe
            eventually(lambda: self.blocked_in_writing(program))
            program.process.send_signal(signal.SIGINT)
            self.assertEqual(program.process.wait(SECONDS), 130)

    @staticmethod
    def blocked_in_writing(program: Program) -> bool:
        threads = pathlib.Path(f"/proc/{program.process.pid}/task").glob("*/wchan")
        return sys.platform != "linux" or any("pipe" in thread.read_text() for thread in threads)

    def test_ctrl_c_is_not_for_a_background_job(self) -> None:
        """Where SIGINT is ignored from the start it stays so."""
        command = ("sh", "-c", 'trap "" INT; exec "$@"', "sh", *PYTHON, CLIENT, LOOPBACK, str(self.server.port))
        with Program(*command, keep_input=True) as program:
            program.expect(GREETING)
            program.process.send_signal(signal.SIGINT)
            program.end_input()
            program.expect(FAREWELL)
            self.assertEqual(program.wait(), 0)

    def test_the_servers_end_is_no_interruption_with_a_lock_held(self) -> None:
        """Who leaves is interrupted by the server's end-of-file nowhere where it could wait for itself for ever."""

        def serve(connection: socket.socket) -> None:
            self.assertEqual(connection.recv(100), b"exit\n")
            time.sleep(0.05)  # for the main thread to be in the middle of what it does next

        with home_made_server(serve) as port:
            command = (sys.executable, "-c", SLOW_TO_LOCK, LOOPBACK, str(port))
            with Program(*command, keep_input=True) as program:
                program.send(b"exit\n")
                program.expect(GREETING, FAREWELL)
                self.assertEqual(program.wait(), 0)

    def test_input_that_cannot_be_read_is_none(self) -> None:
        with open(os.devnull, "wb") as unreadable:
            command = [*PYTHON, CLIENT, LOOPBACK, str(self.server.port)]
            done = subprocess.run(command, stdin=unreadable, capture_output=True, timeout=SECONDS, check=False)
            self.assertEqual((done.returncode, done.stderr), (0, b""))
            self.assertEqual(done.stdout.decode(), f"{GREETING}\n{FAREWELL}\n")

    def test_a_standard_output_that_would_not_block_is_made_to(self) -> None:
        """Or the client would try again and again while nobody reads it."""
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        self.addCleanup(os.close, writer)
        os.set_blocking(writer, False)
        with Program(*PYTHON, CLIENT, LOOPBACK, str(self.server.port), output=writer) as program:
            self.assertEqual(program.wait(), 0)
            self.assertTrue(os.get_blocking(writer))

    def test_a_full_disk_is_told(self) -> None:
        with open("/dev/full", "wb") as full:
            command = (*PYTHON, CLIENT, LOOPBACK, str(self.server.port))
            with Program(*command, output=full.fileno()) as program:
                self.assertEqual(program.wait(), 1)
                self.assertRegex(program.errors(), r"^Cannot show what comes: No space left on device; [^\n]+\n$")

    def test_ctrl_c(self) -> None:
        with client(self.server.port) as program:
            program.expect(GREETING)
            program.process.send_signal(signal.SIGINT)
            self.assertEqual(program.wait(), 130)
            self.assertEqual(program.output.decode(), f"{GREETING}\n{FAREWELL}\n")
            self.assertEqual(program.errors(), "")


class OtherServers(TestCase):
    def test_a_server_that_sends_no_newline_is_shown_after_some_silence(self) -> None:
        def serve(connection: socket.socket) -> None:
            connection.sendall(b"Welcome!")
            self.assertEqual(connection.recv(100), b"go on\n")
            connection.sendall("é".encode())
            time.sleep(0.4)  # longer than the silence that ends a line, but not one that is typed key by key
            connection.sendall(b"t")
            time.sleep(0.4)  # likewise
            connection.sendall(b"\x7f\x7f and more")
            time.sleep(0.4)  # likewise
            connection.sendall(b"!\n")
            self.assertEqual(connection.recv(100), b"")

        with home_made_server(serve) as port, client(port, constants={"SILENCE_SECONDS": 0.2}) as program:
            program.expect(GREETING, "", "Welcome!")
            program.send(b"go on\n")
            program.expect("", "ét\ufffd\ufffd and more!")
            program.end_input()
            program.expect(FAREWELL)
            self.assertEqual(program.wait(), 0)

    def test_what_is_no_chat_server_is_told(self) -> None:
        for answer, sentence in (
            (b"HTTP/1.1 400 Bad Request\r\nServer: x\r\n\r\n", "that is a web server; check host and port"),
            (b"<!doctype html>\n<html>\n", "that is a web server; check host and port"),
            (
                b"\x15\x03\x03\0\x02\x02\x0a",
                "that server speaks TLS; join it with --tls, or with --tls-ca and its certificate",
            ),
        ):
            with self.subTest(answer=answer):

                def serve(connection: socket.socket, answer: bytes = answer) -> None:
                    connection.recv(100)
                    connection.sendall(answer)
                    connection.recv(100)

                with home_made_server(serve) as port, client(port) as program:
                    program.send(b"hello\n")
                    program.expect(GREETING, FAREWELL)
                    self.assertEqual(program.wait(), 1)
                    self.assertEqual(program.errors(), f"Connection lost: {sentence}.\n")

    def test_escape_codes_and_endless_lines_of_a_server(self) -> None:
        def serve(connection: socket.socket) -> None:
            connection.sendall(b"1:\x1b[2J\r2:forged\r\n")
            for _ in range(10):
                connection.sendall(b"z" * 1_000_000)

        with home_made_server(serve) as port, client(port) as program:
            program.expect(GREETING, "", "1:\ufffd[2J\ufffd2:forged")
            self.assertEqual(program.wait(), 1)
            self.assertEqual(program.output.count(b"z"), 10_000_000)


class Terminals(SharedServerTestCase):
    """With GNU readline."""

    client_options: tuple[str, ...] = ()
    row_after_ctrl_c = ""

    def ends(self, terminal: Terminal, status: int, screen: str) -> None:
        self.assertEqual(terminal.wait(), status)
        self.assertEqual(terminal.screen(), screen)
        self.assertEqual(terminal.attributes(), terminal.before)

    def test_ctrl_d_leaves(self) -> None:
        with in_terminal(self.server.port, *self.client_options) as terminal:
            terminal.type("\x04")
            self.ends(terminal, 0, f"{GREETING}\n{FAREWELL}\n")

    def test_ctrl_c(self) -> None:
        with in_terminal(self.server.port, *self.client_options) as terminal:
            terminal.type("\x03")
            self.ends(terminal, 130, f"{GREETING}\n{self.row_after_ctrl_c}{FAREWELL}\n")

    def test_the_servers_end_ends_a_blocked_input(self) -> None:
        with Server() as server, in_terminal(server.port, *self.client_options) as terminal:
            server.stop()
            self.assertEqual(terminal.wait(), 1)
            self.assertRegex(terminal.screen(), rf"^{GREETING}\nConnection lost: [^\n]+\n{FAREWELL}\n$")
            self.assertEqual(terminal.attributes(), terminal.before)

    def test_half_typed_text_is_not_left_for_the_shell(self) -> None:
        with Server() as server, in_terminal(server.port, *self.client_options) as terminal:
            terminal.type("rm -rf x")
            terminal.wait_for("rm -rf x")
            server.stop()
            self.assertEqual(terminal.wait(), 1)
            self.assertEqual(terminal.left_to_read(), b"")

    def test_a_terminal_to_type_in_and_nothing_to_show_on(self) -> None:
        for closed in (">&-", "2>&-", ">&- 2>&-"):
            with self.subTest(closed=closed), self.server.peer() as ann:
                arguments = ("sh", *PYTHON, CLIENT, *self.client_options, LOOPBACK, str(self.server.port))
                with Terminal("/bin/sh", "-c", f'exec "$@" {closed}', *arguments) as terminal:
                    self.server.newcomer()
                    terminal.type("hello\nexit\n")
                    self.assertTrue(ann.line().endswith(b":hello"))
                    self.assertEqual(terminal.wait(), 0)

    def test_bytes_that_are_no_text_arrive_as_replacements(self) -> None:
        with self.server.peer() as ann, in_terminal(self.server.port, *self.client_options) as terminal:
            terminal.type(b"a\xffb\n")
            self.assertTrue(ann.line().endswith("a\ufffdb".encode()))
            terminal.type("exit\n")
            self.assertEqual(terminal.wait(), 0)

    def test_blank_lines_are_not_sent(self) -> None:
        with self.server.peer() as ann, in_terminal(self.server.port, *self.client_options) as terminal:
            terminal.type("\n \t \nwords\n  exit \n")
            self.assertEqual(terminal.wait(), 0)
            self.assertTrue(ann.line().endswith(b":words"))
            self.assertIn(f"{GREETING}\n\n", terminal.screen())


class PlainTerminals(Terminals):
    """Without: where the kernel echoes what is typed."""

    client_options = ("--plain",)
    row_after_ctrl_c = "^C\n"

    def test_what_stands_before_a_ctrl_d_in_the_middle_of_a_line_is_not_lost(self) -> None:
        """Whatever the client does while nothing comes."""
        command = command_of(CLIENT, {"SILENCE_SECONDS": 0.05})
        with self.server.peer() as ann, Terminal(*command, "--plain", LOOPBACK, str(self.server.port)) as terminal:
            terminal.wait_for(f"{GREETING}\n")
            terminal.type("one\x04")
            time.sleep(0.5)  # ten times as long
            terminal.type(" line\n")
            self.assertTrue(ann.line().endswith(b":one line"))


class WithoutReadline(TestCase):
    def test_a_python_that_has_none_chats_all_the_same(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        pathlib.Path(folder.name, "readline.py").write_text("raise ImportError")
        with Server() as server, server.peer() as ann:
            with mock.patch.dict(os.environ, PYTHONPATH=folder.name):
                terminal = in_terminal(server.port)
            with terminal:
                terminal.type("Hi!\n")
                self.assertTrue(ann.line().endswith(b":Hi!"))
                ann.say("Hello!")
                terminal.wait_for(f"{ann.label}:Hello!\n")
                terminal.type("exit\n")
                self.assertEqual(terminal.wait(), 0)


def style(own_label: str = "", colour: bool = False, clock: bool = False, bell: bool = False) -> mychatclient.Style:
    colours = mychatclient.COLOURS_OF_8 if colour else ()
    return mychatclient.Style(own_label, colours, clock, bell)


class Looks(SharedServerTestCase):
    def test_as_it_is(self) -> None:
        self.assertEqual(style().rows(b"a:b\nc\n"), b"\na:b\n\nc\n")

    def test_a_label_has_a_colour_of_its_own_and_keeps_it_under_another_name(self) -> None:
        lines = b"54358:Hi!\n54383:* not a notice\n* 54358 is now ann\nann:again\nno label\n"
        rows = style(colour=True).rows(lines).split(b"\n")[1::2]
        self.assertEqual(rows[0], b"\x1b[31m54358\x1b[m:Hi!")
        self.assertEqual(rows[1], b"\x1b[32m54383\x1b[m:* not a notice")
        self.assertEqual(rows[2], b"* 54358 is now ann")
        self.assertEqual(rows[3], b"\x1b[31mann\x1b[m:again")
        self.assertEqual(rows[4], b"no label")
        for line in (b"word", b"no label: text"):
            self.assertEqual(style(colour=True).rows(line + b"\n"), b"\n" + line + b"\n")

    def test_a_line_that_names_us_is_bold_and_rings(self) -> None:
        looks = style("54358", colour=True, bell=True)
        for line, text in (
            (b"ann:54358, you?", b"54358, you?"),
            (b"ann:54358", b"54358"),
            (b"ann:@54358!", b"@54358!"),
            (b"* ann to you: Hi!", b"* ann to you: Hi!"),
        ):
            self.assertTrue(looks.rows(line + b"\n").endswith(b"\x1b[1m" + text + b"\x1b[m\a\n"), line)
        for line in (b"54358:me", b"ann:154358", b"ann:54358x", b"ann:x\xc3\xa954358", b"* 54358 joined"):
            rows = looks.rows(line + b"\n")
            self.assertFalse(b"\x1b[1m" in rows or b"\a" in rows, line)
        looks.rows(b"* 54358 is now ann\n")
        self.assertIn(b"\x1b[1m", looks.rows(b"bob:Hi ann!\n"))
        self.assertNotIn(b"\x1b[1m", looks.rows(b"bob:54358\n"))
        self.assertEqual(style("ann", bell=True).rows(b"bob:ann\n"), b"\nbob:ann\a\n")

    def test_our_label_where_the_server_sees_another_port(self) -> None:
        people = mychatclient.Style("54358")
        people.asked_for = "änn"
        people.rows("* 60000 is now änn\n".encode())
        self.assertEqual(people.own_label, "änn")
        people.rows("* änn is now bob\n".encode())
        people.rows("* eve is now änn\n".encode())  # not we: what was asked for is done
        self.assertEqual(people.own_label, "bob")
        people.asked_for = "carol"
        people.rows(b"* name 'carol' is taken\n")
        people.rows(b"* eve is now carol\n")
        self.assertEqual(people.own_label, "bob")

    def test_labels_seen(self) -> None:
        people = mychatclient.Style("54358")
        for line in (
            "54383:Hi!",
            "* 54396 joined",
            "* 54396 is now carol",
            "* bob to you: x",
            "* 7 here: 1, 2 (you), and 5 more, and people on paris, oslo",
            "no label: x",
            "* line too long: x",
        ):
            people.rows(f"{line}\n".encode())
        self.assertEqual(list(people.labels), ["54383", "carol", "bob", "1", "2"])
        for number in range(2_000):
            people.rows(f"a{number}:x\n".encode())
        people.rows(b"a" * 65 + b":x\n")
        self.assertNotIn("a" * 65, people.labels)
        self.assertEqual(len(people.labels), mychatclient.LABELS_REMEMBERED)

    def test_who_is_ignored(self) -> None:
        """What they say to all or to us is not shown, also under another name, until they are not ignored any more."""
        for looks in (style(), style(colour=True)):
            self.assertEqual(looks.ignore(""), "* ignored: nobody")
            self.assertEqual(looks.ignore("Bob"), "* ignored: bob")
            unseen = b"bob:1\n* bob to you: 2\nBOB:3\n"
            seen = b"bobby:4\n* to bob: 5\n* eve to you: bob:6\n* bob is here\n"
            self.assertEqual(as_text(looks.rows(unseen + seen)), as_text(style().rows(seen)))
            looks.rows(b"* bob is now Bob\n* 7 is now rob\n* Bob is now carol\n* eve is now bob\n")
            self.assertEqual(looks.ignore("dave"), "* ignored: carol, dave")
            self.assertEqual(as_text(looks.rows(b"carol:8\nbob:9\n")), "\nbob:9\n")
            self.assertEqual(looks.ignore("carol"), "* ignored: dave")
            self.assertEqual(as_text(looks.rows(b"carol:10\n")), "\ncarol:10\n")
            self.assertNotIn("dave", looks.labels)

    def test_ignoring_is_between_the_person_and_the_client(self) -> None:
        """With a line editor and without; the server and the others hear nothing of it."""
        for options in ((), ("--plain",)):
            with Terminal(*PYTHON, CLIENT, *options, LOOPBACK, str(self.server.port)) as terminal:
                terminal.wait_for(f"{GREETING}\n")
                self.server.newcomer()
                ann, bob = self.peer(), self.peer()
                terminal.type(f"/ignore\n /Ignore  {bob.label} \n")
                terminal.wait_for(f"* ignored: {bob.label}\n")
                self.assertIn("\n\n* ignored: nobody\n", terminal.screen())
                bob.say("unseen")
                ann.expect(f"{bob.label}:unseen")
                ann.say("seen")
                terminal.wait_for(f"\n{ann.label}:seen\n")
                self.assertNotIn("unseen", terminal.screen())
                bob.expect(f"{ann.label}:seen")
                terminal.type("fence\n")
                for peer in (ann, bob):
                    self.assertTrue(peer.line().endswith(b":fence"))

    def test_the_time(self) -> None:
        rows = style(clock=True).rows(b"54358:Hi!\n")
        self.assertRegex(rows, rb"^\n\d\d:\d\d 54358:Hi!\n$")

    def test_compact(self) -> None:
        """Without an empty row before each line, in a pipe and in a terminal; an empty Enter still begins a row."""
        with client(self.server.port, "--compact") as program:
            program.expect(GREETING)
            self.server.newcomer()
            with Terminal(*PYTHON, CLIENT, "--compact", LOOPBACK, str(self.server.port)) as terminal:
                terminal.wait_for(f"{GREETING}\n")
                self.server.newcomer()
                ann = self.peer()
                ann.send("1\n2\n")
                program.expect(f"{ann.label}:1", f"{ann.label}:2")
                terminal.wait_for(f"{GREETING}\n{ann.label}:1\n{ann.label}:2\n")
                terminal.type("half")
                terminal.wait_for("half")
                ann.say("3")
                terminal.wait_for(f"{ann.label}:3\nhalf")
                terminal.type("\n\n")
                terminal.wait_for("half\n\n")
                ann.say("4")
                terminal.wait_for(f"half\n\n{ann.label}:4\n")

    def test_when_there_is_colour(self) -> None:
        for options, environment, expected in (
            ((), {}, True),
            (("--no-color",), {}, False),
            (("--plain",), {}, False),
            ((), {"NO_COLOR": "1"}, False),
            ((), {"TERM": "dumb"}, False),
        ):
            with self.subTest(options=options, environment=environment):
                settings = [f"{name}={value}" for name, value in environment.items()]
                command = ["/usr/bin/env", *settings, *PYTHON, CLIENT, *options, LOOPBACK, str(self.server.port)]
                with Terminal(*command) as terminal:
                    terminal.wait_for(f"{GREETING}\n")
                    self.server.newcomer()
                    ann = self.peer()
                    ann.say("Hi!")
                    terminal.wait_for(f"{ann.label}:Hi!\n")
                    self.assertEqual(b"\x1b[" in terminal.output, expected)

    def test_a_pipe_has_no_colour(self) -> None:
        with client(self.server.port) as program:
            program.expect(GREETING)
            self.server.newcomer()
            with self.server.peer() as ann:
                ann.say("Hi!")
                program.expect("", f"{ann.label}:Hi!")


class Names(SharedServerTestCase):
    def test_a_name_is_asked_for_and_what_is_typed_goes_out_under_it(self) -> None:
        with self.server.peer() as ann, client(self.server.port, "--name", "bob") as program:
            program.expect(GREETING, "")
            notice = program.line()
            self.assertRegex(notice, r"^\* \d+ is now bob$")
            ann.expect(notice)
            program.send(b"Hi!\n")
            ann.expect("bob:Hi!")
            # Refused: the notice shows, and it goes on as the port.
            with client(self.server.port, "--name", " BOB ") as other:
                other.expect(GREETING, "", "* name 'BOB' is taken")
                other.send(b"Hi!\n")
                self.assertRegex(ann.line(), rb"^\d+:Hi!$")

    def test_a_name_from_the_environment(self) -> None:
        with (
            mock.patch.dict(os.environ, {"MYCHAT_NAME": "bob\nHi!"}),
            client(self.server.port) as program,
        ):
            program.expect(GREETING, "", "* not a name: 'bob Hi!': letters, digits, _, - and . only")


class TurnedAway(TestCase):
    def test_a_full_server_is_a_lost_connection_also_when_the_input_has_ended(self) -> None:
        with Server("--max-clients", "1") as server, server.peer():
            for _ in range(5 if LONG else 2):
                with client(server.port) as program:
                    with contextlib.suppress(BrokenPipeError):  # it has ended already
                        program.send(b"1\n2\n")
                        program.end_input()
                    self.assertEqual(program.wait(), 1)
                    self.assertIn("Connection lost: the server has turned this client away", program.errors())
                    self.assertIn(b"* refused: server full: 1 of 1 clients\n", program.output)


class Quitting(SharedServerTestCase):
    def test_the_servers_end_while_tab_completes(self) -> None:
        """It is not lost in the completer, out of which readline, and libedit, let no exception."""
        ending = threading.Event()

        def serve(connection: socket.socket) -> None:
            connection.sendall(b"annika:Hi!\n")
            self.assertTrue(ending.wait(SECONDS))

        for library in ("", *glob.glob("/usr/lib/*/libedit.so.2")):
            ending.clear()
            with (
                self.subTest(library=library),
                without("prompt_toolkit"),
                mock.patch.dict(os.environ, {"LD_PRELOAD": library}),
                home_made_server(serve) as port,
                Terminal(sys.executable, "-c", SLOW_TO_COMPLETE, "--no-color", LOOPBACK, str(port)) as terminal,
            ):
                terminal.wait_for("annika:Hi!\n", within=True)
                terminal.type("ann\t")
                terminal.wait_for("...", within=True)
                ending.set()
                self.assertEqual(terminal.wait(), 1)
                self.assertIn("Connection lost: the server closed", terminal.screen())

    def test_a_terminal_that_hangs_up_and_no_signal_that_tells(self) -> None:
        """As under ``trap '' HUP``: ended like Ctrl-D, though the server stays, and no traceback."""
        ended = threading.Event()

        def serve(connection: socket.socket) -> None:
            self.assertTrue(ended.wait(SECONDS))

        for options in ((), ("--plain",)):
            ended.clear()
            with self.subTest(options=options), home_made_server(serve) as port, tempfile.TemporaryFile() as errors:
                master, slave = pty.openpty()
                command = ("sh", "-c", 'trap "" HUP; exec "$@"', "sh", sys.executable, "-c", TAKE_TERMINAL)
                program = subprocess.Popen(
                    [*command, *command_of(CLIENT, {"LEAVE_SECONDS": 0.1}), *options, LOOPBACK, str(port)],
                    stdin=slave,
                    stdout=slave,
                    stderr=errors,
                    start_new_session=True,
                    env={**os.environ, "TERM": "xterm"},
                )
                self.addCleanup(program.kill)
                os.close(slave)
                shown = b""
                while GREETING.encode() not in shown:
                    shown += os.read(master, 65_536)
                os.write(master, b"half")
                while not shown.endswith(b"half"):
                    shown += os.read(master, 65_536)
                os.close(master)
                self.assertEqual(program.wait(SECONDS / 2), 0)
                ended.set()
                errors.seek(0)
                self.assertNotIn(b"Traceback", errors.read())

    def test_what_is_pasted_behind_exit_is_not_left_for_the_shell(self) -> None:
        with in_terminal(self.server.port) as terminal:
            terminal.type("exit\rrm -rf x\r")
            self.assertEqual(terminal.wait(), 0)
            self.assertEqual(terminal.left_to_read(), b"")

    def test_quit_leaves_like_exit(self) -> None:
        with client(self.server.port) as program:
            program.expect(GREETING)
            program.send(b"/quit\n")
            program.expect(FAREWELL)
            self.assertEqual(program.wait(), 0)
        with in_terminal(self.server.port) as terminal:
            terminal.type("/quit\r")
            self.assertEqual(terminal.wait(), 0)


class Connecting(TestCase):
    def fails(self, *arguments: str, status: int = 1, sentence: str) -> None:
        """Fail unless the client ends with this status and says so in one line on standard error."""
        with Program(*PYTHON, CLIENT, *arguments) as program:
            self.assertEqual(program.wait(), status)
            self.assertEqual(program.output, b"")
            self.assertIn(sentence, program.errors())
            self.assertEqual(program.errors().count("\n"), status)  # usage comes before what is wrong with arguments

    def test_no_server_there(self) -> None:
        port = free_port()
        self.fails(LOOPBACK, str(port), sentence=f"No server at {LOOPBACK} port {port}: start mychatserver.py there")

    def test_unknown_hosts(self) -> None:
        for host in ("no.such.host.invalid", "a..b", "a" * 70):
            with self.subTest(host=host):
                self.fails(host, sentence=f"Unknown host {host!r}: check the spelling")

    @NEEDS_ROOT
    @needs_command("unshare", "util-linux")
    def test_ctrl_c_while_the_name_server_does_not_answer(self) -> None:
        if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
            self.skipTest("needs root: with the right to unshare, sudo python -m unittest tests.test_client")
        host = f"127.53.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"  # other suites may run beside this one
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as name_server, tempfile.NamedTemporaryFile() as settings:
            try:
                name_server.bind((host, 53))
            except OSError as error:
                self.skipTest(f"needs root: with a port 53, {error}")
            name_server.settimeout(SECONDS)
            settings.write(f"nameserver {host}\noptions timeout:30 attempts:5\n".encode())
            settings.flush()
            script = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
            command = ("unshare", "-m", "sh", "-c", script, settings.name, *PYTHON, CLIENT, "chat.example.org")
            with Program(*command) as program:
                name_server.recvfrom(1_000)
                program.process.send_signal(signal.SIGINT)
                self.assertEqual(program.process.wait(20), 130)

    def test_where_a_server_listens_is_no_address_to_join(self) -> None:
        for host in ("0.0.0.0", "::", "[::]"):
            with self.subTest(host=host):
                self.fails(host, sentence="is where a server listens, not an address to join")

    def test_bad_arguments_are_told_as_usage(self) -> None:
        for arguments, sentence in (
            ((LOOPBACK, "abc"), "'abc' is not a port: a number from 1 to 65535"),
            ((LOOPBACK, "0"), "'0' is not a port"),
            ((LOOPBACK, "65536"), "'65536' is not a port"),
            (("0",), "'0' is not a port"),
            (("localhost:65536",), "'65536' is not a port"),
            ((LOOPBACK, "12001", "--port", "12002"), "argument --port: not allowed with argument port"),
            (("--versio",), "unrecognized arguments: --versio"),
        ):
            with self.subTest(arguments=arguments):
                self.fails(*arguments, status=2, sentence=sentence)

    def test_a_port_may_stand_alone_after_the_host_or_behind_an_option(self) -> None:
        for arguments, host, port in (
            ((), LOOPBACK, 12000),
            (("12001",), LOOPBACK, 12001),
            (("--port", "12001"), LOOPBACK, 12001),
            (("localhost",), "localhost", 12000),
            (("localhost", "12001"), "localhost", 12001),
            (("localhost:12001",), "localhost", 12001),
            (("localhost", "--port", "12001"), "localhost", 12001),
            (("::1",), "::1", 12000),
            (("::1", "12001"), "::1", 12001),
            (("[::1]",), "::1", 12000),
            (("[::1]:12001",), "::1", 12001),
            (("fe80::1%eth0",), "fe80::1%eth0", 12000),
        ):
            options = mychatclient.parse_args(arguments)
            self.assertEqual((options.host, options.port), (host, port), arguments)

    def test_version(self) -> None:
        with Program(*PYTHON, CLIENT, "--version") as program:
            self.assertEqual(program.wait(), 0)
            self.assertEqual(program.output.decode(), f"mychatclient {mychatclient.__version__}\n")

    def test_no_answer_in_time(self) -> None:
        with silent_port() as port, client(port, constants={"CONNECT_SECONDS": 0.5}) as program:
            self.assertEqual(program.wait(), 1)
            self.assertIn(f"No answer from {LOOPBACK} port {port}: check the address", program.errors())

    def test_ctrl_c_while_connecting(self) -> None:
        with silent_port() as port:
            script = (
                "import os, socket, sys, mychatclient\n"
                "connect = socket.socket.connect\n"
                "socket.socket.connect = lambda *given: (os.write(1, b'connecting\\n'), connect(*given))[1]\n"
                "sys.exit(mychatclient.main(sys.argv[1:]))\n"
            )
            with Program(sys.executable, "-c", script, LOOPBACK, str(port)) as program:
                program.expect("connecting")
                program.process.send_signal(signal.SIGINT)
                self.assertEqual((program.wait(), program.errors()), (130, ""))

    def test_all_addresses_of_a_name_are_tried(self) -> None:
        with Server() as server:
            addresses = [
                (socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, server.port)) for host in ("127.0.0.9", LOOPBACK)
            ]
            original = socket.getaddrinfo

            def resolve(host: str, *arguments: object, **options: object) -> object:
                return addresses if host == "chat.example" else original(host, *arguments, **options)  # type: ignore[arg-type]

            with mock.patch("socket.getaddrinfo", resolve), mychatclient.connect("chat.example", server.port) as sock:
                self.assertEqual(sock.getpeername()[0], LOOPBACK)

    def test_what_has_been_closed_meanwhile_is_lost_like_any_other(self) -> None:
        """As when a client with --ssh leaves in mid-flood: its receive thread is between two waits."""
        ours, theirs = socket.socketpair()
        with theirs:
            connection = mychatclient.Connection(ours, is_direct=False)
            connection.close()
            with self.assertRaises(OSError):
                connection.receive(SECONDS)

    def test_every_kind_of_trouble_is_one_sentence(self) -> None:
        for error, sentence in (
            (ConnectionRefusedError(111, "Connection refused"), "No server at host port 1: start mychatserver.py"),
            (socket.gaierror(-2, "Name or service not known"), "Unknown host 'host': check the spelling"),
            (socket.timeout("timed out"), "No answer from host port 1: check the address"),
            (TimeoutError(110, "Connection timed out"), "No answer from host port 1: check the address"),
            (OSError(101, "Network is unreachable"), "Cannot reach host port 1: Network is unreachable; check"),
        ):
            with self.subTest(error=error):
                self.assertTrue(str(mychatclient.connecting_problem(error, "host", 1)).startswith(sentence))
