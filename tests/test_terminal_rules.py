"""What the client promises in a terminal at whatever moment: endings in mid-flood, jobs, pastes, looks."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ipaddress
import os
import pathlib
import random
import signal
import socket
import sys
import threading
import time
import unittest
import unittest.mock
from collections.abc import Callable, Iterator

import mychatclient
import mychatserver
from tests.support import (
    CLIENT,
    LONG,
    LOOPBACK,
    PYTHON,
    SECONDS,
    Background,
    Program,
    Server,
    Terminal,
    TestCase,
    command_of,
    eventually,
    home_made_server,
    without,
)
from tests.test_terminal import inputrc

GREETING = "Connected to chat server. Type 'exit' to leave."
FAREWELL = "Disconnected from server"
TIMES = 100 if LONG else 4  # for what goes wrong seldom: .ci/run has it done so often on each Python
CLIENTS = 3  # at once: they take the processor from each other, at any moment


class Talker:
    """A server that says a line after the other as fast as the client shows them; it stops when the client has gone."""

    def __init__(self, send_buffer: int = 65_536) -> None:
        self.listener = socket.create_server((LOOPBACK, 0))
        # With few lines on their way the client draws often, with many it draws many at once; more only take longer.
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # no pause after the first lines
        self.listener.settimeout(SECONDS)
        self.port = self.listener.getsockname()[1]
        self.stopping = threading.Event()
        self.background = Background()
        self.background.run(self._talk)

    def _talk(self) -> None:
        connection, _ = self.listener.accept()
        self.listener.close()
        with connection, contextlib.suppress(OSError):  # the client has gone
            connection.settimeout(SECONDS)
            while not self.stopping.is_set():
                connection.sendall(b"54358:a line of a flood\n")

    def __enter__(self) -> Talker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.listener.close()
        self.background.join()


@unittest.skipIf(sys.platform == "win32", "needs pseudo-terminals")
class InMidFlood(TestCase):
    """While lines come all the time the program ends as ever, at whatever moment that is."""

    def ends(self, end: Callable[[Terminal, Talker], object], status: int, shown: str) -> None:
        """Do ``end`` at random moments, a few at once; fail unless each has this status, end and no traceback."""
        dice = random.Random(1)
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            results = [
                pool.submit(self.end_one, end, number, dice.random() / 5, status, shown) for number in range(TIMES)
            ]
            for number, result in enumerate(results):
                with self.subTest(number=number):
                    result.result()

    def end_one(
        self, end: Callable[[Terminal, Talker], object], number: int, seconds: float, status: int, shown: str
    ) -> None:
        """Do ``end`` so many seconds after the first line has come; by its number with more lines, or half-typed."""
        with (
            Talker(4_096 if number % 4 < 2 else 65_536) as talker,
            Terminal(*command_of(CLIENT), LOOPBACK, str(talker.port)) as terminal,
        ):
            while b"a line of a flood" not in terminal.output:
                self.assertTrue(terminal.read(SECONDS))
            if number % 2:
                terminal.type("half a li")
            moment = time.monotonic() + seconds
            while time.monotonic() < moment:
                terminal.read(0.005)
            end(terminal, talker)
            deadline = time.monotonic() + SECONDS
            while terminal.process.poll() is None and time.monotonic() < deadline:
                terminal.read(0.05)
            self.assertEqual(terminal.wait(), status)
            self.assertNotIn("Traceback", terminal.screen())
            self.assertTrue(terminal.screen().endswith(shown), terminal.screen()[-500:])
            self.assertEqual(terminal.attributes(), terminal.before)

    def test_ctrl_c(self) -> None:
        self.ends(lambda terminal, _: terminal.type("\x03"), 130, f"\n{FAREWELL}\n")

    @unittest.skipUnless(sys.platform == "linux", "needs Linux: what it tells of a process")
    def test_ctrl_c_while_the_terminal_takes_no_more(self) -> None:
        """Whichever line editor there is: on Linux a Ctrl-C that empties the terminal's queues wakes no writer."""
        for missing, options in (((), ()), ((), ("--plain",)), (("readline",), ())):
            with (
                self.subTest(missing=missing, options=options),
                without(*missing),
                Talker() as talker,
                Terminal(sys.executable, CLIENT, *options, LOOPBACK, str(talker.port)) as terminal,
            ):
                terminal.wait_for(f"{GREETING}\n", within=True)
                threads = pathlib.Path(f"/proc/{terminal.process.pid}/task")
                eventually(lambda: any(file.read_text() == "wait_woken" for file in threads.glob("*/wchan")))  # noqa: B023
                terminal.type("\x03")
                deadline = time.monotonic() + SECONDS / 4
                while terminal.process.poll() is None and time.monotonic() < deadline:
                    terminal.read(0.05)
                self.assertEqual(terminal.process.poll(), 130)
                self.assertEqual(terminal.attributes(), terminal.before)

    def test_the_servers_death(self) -> None:
        self.ends(lambda _, talker: talker.stopping.set(), 1, f"ask whoever runs it.\n{FAREWELL}\n")

    def test_sigterm(self) -> None:
        self.ends(lambda terminal, _: terminal.process.send_signal(signal.SIGTERM), -signal.SIGTERM, "")


@contextlib.contextmanager
def under_bash() -> Iterator[tuple[Terminal, socket.socket]]:
    """Give a shell in a terminal, with a client in its foreground that has greeted, and that one's connection."""
    with (
        socket.create_server((LOOPBACK, 0)) as listener,
        inputrc("set enable-bracketed-paste off\n"),
        Terminal("/bin/bash", "--norc", "--noprofile", "-i") as shell,
    ):
        listener.settimeout(SECONDS)
        shell.type("PS1='$ '\r")
        shell.wait_for("$ ")
        shell.type(f"{sys.executable} {CLIENT} --no-color {LOOPBACK} {listener.getsockname()[1]}\r")
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(SECONDS)
            shell.wait_for(f"{GREETING}\n")
            yield shell, connection


@unittest.skipIf(sys.platform == "win32", "needs pseudo-terminals")
class Jobs(TestCase):
    def test_ctrl_z_bg_and_fg_in_any_order(self) -> None:
        """In the background the client stops again; in front its line is back, and messages show."""
        for commands in (("bg", "fg"), ("bg", "bg", "fg"), ("fg",), ("kill -STOP %1", "bg", "fg"), ("bg", "fg %1")):
            with self.subTest(commands=commands), under_bash() as (shell, connection):
                shell.type("half a li")
                shell.wait_for("half a li")
                for number in range(2):
                    shell.type("\x1a")
                    shell.wait_for("$ ")
                    for command in commands:
                        if command.startswith("bg"):
                            shell.type(
                                f"{command}; while ! jobs | grep -q Stopped; do sleep 0.05; done; echo st''opped\r"
                            )
                            shell.wait_for("stopped\n$ ")
                        elif command.startswith("kill"):
                            shell.type(f"{command}\r")
                            shell.wait_for("$ ")
                    connection.sendall(b"54358:meanwhile %d\n" % number)
                    shell.type(f"{commands[-1]}\r")
                    shell.wait_for(f"54358:meanwhile {number}\nhalf a li")
                    connection.sendall(b"54358:and now %d\n" % number)
                    shell.wait_for(f"54358:and now {number}\nhalf a li")
                shell.type("ne\r")
                self.assertEqual(connection.recv(100), b"half a line\n")
                shell.type("\x03")
                shell.wait_for(f"{FAREWELL}\n$ ")
                shell.type("echo $?\r")
                shell.wait_for("130\n$ ")

    def test_what_is_to_end_while_it_is_stopped_ends_when_it_is_continued(self) -> None:
        with under_bash() as (shell, _):
            shell.type("half a li")
            shell.wait_for("half a li")
            shell.type("\x1a")
            shell.wait_for("$ ")
            shell.type("kill $(jobs -p); fg; echo $?\r")  # kill %1 continues it, too, before fg may have the terminal
            shell.wait_for(f"{128 + signal.SIGTERM}\n$ ")

    def test_signals_that_the_parent_has_blocked_are_unblocked(self) -> None:
        script = "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())"
        with (
            Server() as server,
            server.peer() as ann,
            Terminal(
                sys.executable,
                *("-c", f"{script}; os.execv(sys.argv[1], sys.argv[1:])"),
                *(*PYTHON, CLIENT, "--no-color", LOOPBACK, str(server.port)),
            ) as terminal,
        ):
            terminal.wait_for(f"{GREETING}\n")
            ann.say("Hi!")
            terminal.wait_for(f"{ann.label}:Hi!\n")
            terminal.type("\x03")
            self.assertEqual(terminal.wait(), 130)


class Typed(TestCase):
    def test_exit_leaves_in_any_case_and_by_its_other_names(self) -> None:
        for typed in (" Exit ", "EXIT", "/quit", "\t/Quit", "/exit "):
            with self.subTest(typed=typed):
                with (
                    home_made_server(self.hears(f"last\n{typed}\n")) as port,
                    Program(*PYTHON, CLIENT, LOOPBACK, str(port), keep_input=True) as program,
                ):
                    program.send(f"last\n{typed}\nmore\n".encode())
                    self.assertEqual(program.wait(), 0)
                with (
                    home_made_server(self.hears(f"last\n{typed}\n")) as port,
                    Terminal(*PYTHON, CLIENT, LOOPBACK, str(port)) as terminal,
                ):
                    terminal.wait_for(f"{GREETING}\n")
                    terminal.type(f"last\r{typed}\rmore\r")
                    self.assertEqual(terminal.wait(), 0)

    def hears(self, expected: str) -> Callable[[socket.socket], None]:
        """Return a server that hears this, and then the end."""

        def serve(connection: socket.socket) -> None:
            heard = b""
            while data := connection.recv(100):
                heard += data
            self.assertEqual(heard.decode(), expected)

        return serve

    def test_a_newline_in_a_pasted_line_ends_a_line(self) -> None:
        """As where somebody has left the terminal marking what is pasted, whichever newline it has."""
        for newline in ("\r", "\n"):
            with (
                self.subTest(newline=newline),
                Server() as server,
                server.peer() as ann,
                Terminal(*PYTHON, CLIENT, "--no-color", LOOPBACK, str(server.port)) as terminal,
            ):
                terminal.wait_for(f"{GREETING}\n")
                pasted = newline.join(("one", "two", " exit", "three"))
                terminal.type(f"\x1b[200~{pasted}\x1b[201~\r")
                self.assertEqual(terminal.wait(), 0)
                label = ann.line().partition(b":")[0].decode()
                ann.expect(f"{label}:two")
                with server.peer() as bob:
                    bob.say("fence")
                    ann.expect(f"{bob.label}:fence")


def contrasts(number: int) -> tuple[float, float]:
    """Return the contrast of one of 256 colours on black and on white: WCAG 2, relative luminance."""
    levels = (0, 95, 135, 175, 215, 255)
    if number < 232:
        rgb = [levels[(number - 16) // power % 6] for power in (36, 6, 1)]
    else:
        rgb = [8 + 10 * (number - 232)] * 3
    linear = [((part / 255 + 0.055) / 1.055) ** 2.4 if part > 10 else part / 255 / 12.92 for part in rgb]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (luminance + 0.05) / 0.05, 1.05 / (luminance + 0.05)


class Looks(TestCase):
    def test_ten_colours_come_in_order_of_arrival_all_before_one_comes_twice(self) -> None:
        colours = mychatclient.COLOURS_OF_256
        self.assertEqual(len(set(colours)), 10)
        looks = mychatclient.Style("", colours=colours)
        for number in range(25):
            for _ in range(2):
                row = looks.rows(b"a%d:Hi!\n" % number)
                self.assertEqual(row.decode(), f"\n{colours[number % 10]}a{number}\x1b[m:Hi!\n")

    def test_what_is_coloured_can_be_read_on_black_and_on_white(self) -> None:
        for colour in mychatclient.COLOURS_OF_256:
            self.assertGreaterEqual(min(contrasts(int(colour[7:-1]))), 4.0, colour)
        self.assertGreaterEqual(min(contrasts(int(mychatclient.GREY[7:-1]))), 3.0)
        self.assertFalse({"\x1b[33m", "\x1b[34m"} & set(mychatclient.COLOURS_OF_8))
        looks = mychatclient.Style("", colours=mychatclient.COLOURS_OF_256)
        self.assertEqual(looks.rows(b"* to bob: Hi!\n").decode(), f"\n{mychatclient.GREY}* to bob: Hi!\x1b[m\n")
        self.assertEqual(mychatclient.Style("", mychatclient.COLOURS_OF_8).rows(b"* ann left\n"), b"\n* ann left\n")

    def test_a_terminal_with_256_colours_gets_them(self) -> None:
        for settings, colour in (
            ("TERM=xterm-256color", mychatclient.COLOURS_OF_256[0]),
            ("COLORTERM=truecolor", mychatclient.COLOURS_OF_256[0]),
            ("COLORTERM=", mychatclient.COLOURS_OF_8[0]),
        ):
            with self.subTest(settings=settings), Server() as server:
                command = ("/usr/bin/env", "-u", "NO_COLOR", settings, *PYTHON, CLIENT)
                with Terminal(*command, LOOPBACK, str(server.port)) as terminal:
                    terminal.wait_for(f"{GREETING}\n")
                    with server.peer() as ann:
                        ann.say("Hi!")
                        terminal.wait_for(f"{ann.label}:Hi!\n")
                        self.assertIn(f"{colour}{ann.label}\x1b[m:Hi!", terminal.output.decode())

    def test_the_time_is_on_live_lines_and_not_on_history(self) -> None:
        rows = mychatclient.Style("", clock=True).rows
        self.assertRegex(rows(b"a:1\n* the last 2 lines:\n"), rb"^\n\d\d:\d\d a:1\n\n\d\d:\d\d \* the last 2 lines:\n$")
        looks = mychatclient.Style("", clock=True)
        self.assertRegex(looks.rows(b"* the last line:\n"), rb"^\n\d\d:\d\d \* the")
        self.assertEqual(looks.rows(b"a:old\n"), b"\na:old\n")
        self.assertRegex(
            looks.rows(b"* live from here\na:new\n"), rb"^\n\d\d:\d\d \* live from here\n\n\d\d:\d\d a:new\n$"
        )
        looks.rows(b"* the last line:\n* connected again\n")  # lost in the middle of it
        self.assertRegex(looks.rows(b"a:new\n"), rb"^\n\d\d:\d\d a:new\n$")

    def test_names_are_ours_in_any_case(self) -> None:
        looks = mychatclient.Style("Ann", colours=mychatclient.COLOURS_OF_8, bell=True)
        for text in (b"hi ann!", b"ANN?", b"@aNN"):
            self.assertTrue(looks.rows(b"bob:" + text + b"\n").endswith(b"\x1b[1m" + text + b"\x1b[m\a\n"), text)
        self.assertNotIn(b"\a", looks.rows(b"bob:annika\n"))
        self.assertEqual(looks.beginning("BO"), ["bob"])

    def test_the_commands_that_tab_completes_are_those_that_there_are(self) -> None:
        self.assertEqual(mychatclient.Style("").beginning("/"), sorted([*mychatserver.COMMANDS, "/ignore"]))

    def test_what_a_server_says_is_remembered_within_bounds(self) -> None:
        people = mychatclient.Style("")
        for number in range(3_000 if LONG else 50):
            people.rows(b"* 1 here: " + b"x" * 200_000 + b"\n")
            people.rows(b"* %d is now %s\n" % (number, b"x" * 65))
            people.rows(b"a%d:Hi!\n" % number)
        self.assertLessEqual(max(map(len, people.labels)), 64)
        people.rows(b"* 9 here: " + b", ".join(b"b%d" % number for number in range(5_000)) + b"\n")
        self.assertEqual(len(people.labels), mychatclient.LABELS_REMEMBERED)


class Starting(TestCase):
    def test_in_a_program_that_shows_a_terminal_which_is_none(self) -> None:
        """Such as IDLE or Jupyter: said where that program shows it, and no connection is made."""
        for stream in ("stdin", "stdout"):
            script = (
                "import io, sys, mychatclient\n"
                "class Shown(io.StringIO):\n"
                "    def write(self, text):\n"
                "        return sys.__stderr__.write(text)\n"
                f"sys.{stream} = Shown()\n"
                "status = mychatclient.main([])\n"
                "sys.stdout.flush()\n"
                "sys.exit(status)\n"
            )
            with self.subTest(stream=stream), Program(sys.executable, "-c", script) as program:
                self.assertEqual(program.wait(), 1)
                said = program.output.decode() + program.errors()
                self.assertEqual(said, "Run this in a terminal: python mychatclient.py\n")

    def test_an_old_python_says_that_it_is_too_old(self) -> None:
        """In one line, if it gets that far; one that does not shows the line with the comment that says it."""
        versions = os.path.expanduser("~/.pyenv/versions")
        found = sorted(os.listdir(versions)) if os.path.isdir(versions) else []
        old = [
            name for name in found if name.startswith(("2.", "3.")) and (int(name[0]), int(name.split(".")[1])) < (3, 9)
        ]
        if not old:
            self.skipTest("needs an old Python: pyenv install 3.8")
        for name in old:
            with self.subTest(name=name), Program(f"{versions}/{name}/bin/python", CLIENT) as program:
                self.assertEqual(program.wait(), 1)
                self.assertIn("too old", program.errors())
                self.assertIn("use Python 3.9 or newer", program.errors())
                if name.startswith("3.8"):
                    self.assertEqual(program.errors().count("\n"), 1)

    def test_a_connection_to_itself_is_no_server(self) -> None:
        """The system may give a client the very port that it wants to reach, when nobody listens there."""
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((LOOPBACK, 0))
            port = sock.getsockname()[1]
        script = (
            "import socket, sys, mychatclient\n"
            "connect = socket.socket.connect\n"
            f"own = '{LOOPBACK}', {port}\n"
            "socket.socket.connect = lambda sock, address: (sock.bind(own), connect(sock, address))\n"
            f"sys.exit(mychatclient.main(['{LOOPBACK}', '{port}']))\n"
        )
        with Program(sys.executable, "-c", script) as program:
            self.assertEqual(program.wait(), 1)
            self.assertRegex(program.errors(), rf"^No server at {LOOPBACK} port {port}: [^\n]+--lan[^\n]+\n$")

    @unittest.skipUnless(sys.platform == "linux", "needs Linux: for TCP_USER_TIMEOUT")
    def test_a_peer_that_vanishes_is_noticed_where_a_person_waits_and_not_on_loopback(self) -> None:
        for is_terminal, peer, expected in (
            (True, "192.0.2.1", 90_000),
            (True, "::1", 0),
            (True, LOOPBACK, 0),
            (False, "192.0.2.1", 0),
        ):
            with self.subTest(is_terminal=is_terminal, peer=peer), socket.create_server((LOOPBACK, 0)) as listener:
                made = socket.create_connection(listener.getsockname())
                with (
                    unittest.mock.patch("socket.create_connection", return_value=made),
                    unittest.mock.patch("os.isatty", return_value=is_terminal),
                    unittest.mock.patch("ipaddress.ip_address", return_value=ipaddress.ip_address(peer)),
                    mychatclient.connect("chat.example", 1) as sock,
                ):
                    self.assertEqual(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT), expected)


@unittest.skipUnless(sys.platform == "linux", "needs Linux: only there the system tells what is on its way")
class Leaving(TestCase):
    def test_after_exit_the_client_waits_as_long_as_what_it_sent_moves(self) -> None:
        """A server that reads slowly, and never closes, gets all of a paste; then the client waits half a second.

        Longer than that in the middle: lost packets, which a system sends again later each time, hold all up for some.
        """
        client = command_of(CLIENT, {"LEAVE_SECONDS": 0.5})
        lines = "".join(f"{number:500}\r" for number in range(300))
        with socket.create_server((LOOPBACK, 0)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8_192)
            listener.settimeout(SECONDS)
            background, pace = Background(), threading.Event()
            with Terminal(*client, "--plain", LOOPBACK, str(listener.getsockname()[1])) as terminal:
                connection, _ = listener.accept()
                terminal.wait_for(f"{GREETING}\n")
                background.run(terminal.type, f"{lines}exit\r".replace("\r", "\n"))
                heard = b""
                with connection:
                    connection.settimeout(SECONDS)
                    while not heard.endswith(b"exit\n"):
                        connection.sendall(b"54358:somebody talks\n")  # so that there is something unread at any time
                        terminal.read(0.001)
                        # One second and more in all, and one at once, late: the pace is what is tested.
                        pace.wait(1.0 if 120_000 < len(heard) <= 121_200 else 0.01)
                        data = connection.recv(1_200)
                        self.assertTrue(data, heard[-100:])
                        heard += data
                    while terminal.process.poll() is None:
                        terminal.read(0.05)
                self.assertEqual(terminal.wait(), 0)
                background.join()
            self.assertEqual(heard.count(b"\n"), 301)
