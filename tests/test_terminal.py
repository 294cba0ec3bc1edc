"""The client in a terminal: what comes never harms what is being typed. A terminal emulator, pyte, is the judge."""

from __future__ import annotations

import concurrent.futures
import contextlib
import glob
import importlib.util
import os
import pathlib
import random
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Iterable, Iterator, Mapping
from unittest import mock

from tests.support import (
    CLIENT,
    LONG,
    LOOPBACK,
    SECONDS,
    Background,
    Overdue,
    Terminal,
    TestCase,
    as_text,
    command_of,
    eventually,
    without,
)

# A short form runs without it, in tests.test_client and tests.test_reference.
NEEDS_PYTE = unittest.skipUnless(importlib.util.find_spec("pyte"), "needs pyte: python -m pip install pyte")
GREETING = "Connected to chat server. Type 'exit' to leave."
LEFT, HOME, SEARCH = "\x1b[D", "\x01", "\x12"

HALF_TYPED = {
    "short": "half a li",
    "cursor in the middle": "half a li" + LEFT * 4,
    "cursor at the start": "half a li" + HOME,
    "two rows": "abcdefghi " * 5,
    "three rows, cursor in the second": "abcdefghi " * 9 + LEFT * 30,
    "cursor in the second of two rows": "abcdefghi " * 5 + LEFT * 15,
    "two rows, cursor at the start": "abcdefghi " * 5 + HOME,
    "just one row": "x" * 40,
    "just two rows": "x" * 80,
    "wide characters": "你好世界" * 3,
    "wide characters in two rows": "你好世界" * 6 + LEFT * 3,
    "a wide character at the edge": "x" * 39 + "好y",
    "combining marks": "e\u0301a\u0308o" * 5,
    "a search": "first words\r" + SEARCH + "wor",
    "a search without a find": "first words\r" + SEARCH + "zzz",
    "a repeat count": "abc\x1b4",
    "blanks": "   ",
    "a blank at the edge": "x" * 39 + " ",
}
MESSAGES = {
    "one line": ["54358:Hi!"],
    "more than a row": ["54358:" + "word " * 20],
    "three lines": ["54358:one", "54383:two", "* three"],
    "more than the screen": [f"54358:{number}" for number in range(12)],
    "wide characters": ["54358:你好" * 12],
}


class Judged(Terminal):
    """A client in a terminal whose screen an emulator keeps; the test is its server."""

    def __init__(
        self,
        rows: int,
        *options: str,
        columns: int = 40,
        constants: Mapping[str, object] | None = None,
        setup: str = "",
    ) -> None:
        import pyte

        self.emulator = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.emulator)
        self._fed = 0  # so much of the output
        with socket.create_server((LOOPBACK, 0)) as listener:
            listener.settimeout(SECONDS)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8_192)  # soon full, if a test does not read
            port = listener.getsockname()[1]
            command = command_of(CLIENT, constants, setup)
            super().__init__(*command, *options, LOOPBACK, str(port), rows=rows, columns=columns)
            self.server, _ = listener.accept()
        self.server.settimeout(SECONDS)
        self.wait_for(GREETING + "\n")

    def shows(self) -> tuple[list[str], tuple[int, int]]:
        """Return the rows and the cursor's place."""
        self._stream.feed(self.output[self._fed :])
        self._fed = len(self.output)
        return [row.rstrip() for row in self.emulator.display], (self.emulator.cursor.y, self.emulator.cursor.x)

    def settle(self) -> tuple[list[str], tuple[int, int]]:
        """Return what is shown when nothing has come for a while."""
        while self.read(0.15):
            pass
        return self.shows()

    def wait_to_write(self) -> None:
        """Wait until the client waits for the terminal to take something, or has ended."""
        waiting = pathlib.Path(f"/proc/{self.process.pid}/wchan")
        eventually(lambda: waiting.read_text() == "wait_woken" or self.process.poll() is not None)

    def press(self, keys: str) -> None:
        """Type like a person: what comes behind a Tab comes later."""
        for part in re.findall("[^\t]*\t|[^\t]+", keys):
            self.type(part)
            self.settle()

    def say(self, lines: list[str]) -> None:
        self.server.sendall("".join(f"{line}\n" for line in lines).encode())

    def heard(self) -> str:
        """Return the next line that the client has sent."""
        data = b""
        while not data.endswith(b"\n"):
            byte = self.server.recv(1)
            if not byte:
                raise AssertionError(f"the client has left; it said {data!r}")
            data += byte
        return data[:-1].decode()

    def __exit__(self, *_: object) -> None:
        self.server.close()
        super().__exit__()


class Comparison(TestCase):
    """The screen is the one that "message first, then the typing" gives, cursor and all."""

    def compare_all(self, cases: Iterable[tuple[str, str, int]]) -> None:
        """Compare so many shapes, messages and rows, a few at a time: most of it is waiting for screens to settle."""
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            results = [
                (case, pool.submit(self.compare, HALF_TYPED[case[0]], MESSAGES[case[1]], case[2])) for case in cases
            ]
            for (shape, messages, rows), result in results:
                with self.subTest(shape=shape, messages=messages, rows=rows):
                    result.result()

    def compare(self, typed: str, messages: list[str], rows: int) -> None:
        """Fail unless the order of message and typing makes no difference, also after one more key."""
        before, _, half = typed.rpartition("\r")
        with Judged(rows, "--no-color") as first, Judged(rows, "--no-color") as other:
            for terminal in (first, other):
                if before:
                    terminal.type(before + "\r")
                    self.assertEqual(terminal.heard(), before)
                    terminal.settle()
            first.say(messages)
            first.wait_for(messages[-1] + "\n")
            first.type(half)
            other.type(half)
            other.settle()
            other.say(messages)
            self.become_the_same(first, other)
            for terminal in (first, other):
                terminal.type("z")
            self.become_the_same(first, other)

    def become_the_same(self, first: Judged, other: Judged) -> None:
        """Fail unless both screens come to rest in the same state."""
        try:
            eventually(lambda: first.settle() == other.settle(), seconds=SECONDS / 2)
        except Overdue:
            self.fail(f"\n{first.shows()}\n{other.shows()}")


@NEEDS_PYTE
class HalfTyped(Comparison):
    def test_every_shape(self) -> None:
        self.compare_all((shape, "one line", 10) for shape in HALF_TYPED)

    def test_every_message(self) -> None:
        self.compare_all(("cursor in the second of two rows", name, rows) for name in MESSAGES for rows in (4, 10))


@NEEDS_PYTE
class Typing(TestCase):
    def test_nothing_half_typed_is_the_reference(self) -> None:
        with Judged(10, "--no-color") as client:
            client.type("Hi!\r")
            self.assertEqual(client.heard(), "Hi!")
            client.say(["54383:Hello! "])
            client.wait_for("54383:Hello! \n")
            client.type("\r")
            client.settle()
            client.say(["54396:How are you guys doing?"])
            client.wait_for("doing?\n")
            self.assertEqual(client.screen(), f"{GREETING}\nHi!\n\n54383:Hello! \n\n\n54396:How are you guys doing?\n")

    def test_what_is_shown_is_not_shown_again(self) -> None:
        """By one more of the signals that have the main thread draw."""
        with Judged(10, "--no-color") as client:
            client.say(["54383:Hello!"])
            client.wait_for("54383:Hello!\n")
            client.settle()  # or it is being drawn still
            client.process.send_signal(signal.SIGURG)
            client.settle()
            client.type("Hi!\r")
            client.wait_for("Hi!\n")
            self.assertEqual(client.screen(), f"{GREETING}\n\n54383:Hello!\nHi!\n")

    def test_a_paste_of_five_hundred_lines_is_sent_in_order_and_shown_once(self) -> None:
        self.paste(500)

    def paste(self, count: int) -> None:
        lines = [f"pasted line {number}" for number in range(count)]
        with Judged(10, "--no-color") as client:
            background = Background()
            background.run(client.type, "".join(f"{line}\r" for line in lines))
            received: list[str] = []

            def receive() -> None:
                received.extend(client.heard() for _ in lines)

            background.run(receive)
            client.wait_for(f"{lines[-1]}\n")
            background.join()
            self.assertEqual(received, lines)
            self.assertEqual(client.screen(), GREETING + "\n" + "".join(f"{line}\n" for line in lines))

    def flood(self, seed: int) -> None:
        """Type and edit for two seconds, below 1,000 messages a second, on a terminal that reads slowly."""
        numbers = random.Random(seed)
        with Judged(12, "--no-color") as client:
            background = Background()
            messages = [f"54358:message {number} of a flood" for number in range(2_000)]

            def say() -> None:
                start = time.monotonic()
                for first in range(0, len(messages), 10):
                    client.say(messages[first : first + 10])
                    time.sleep(max(0.0, start + (first + 10) / 1_000 - time.monotonic()))  # the pace is what is tested

            saying = background.run(say)
            sent: list[str] = []
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline:
                words = "word " * numbers.randrange(20) + f"line {len(sent)}"
                for keys in (*words, "x", "\x7f", LEFT, LEFT, "\x04", "\x05"):
                    client.type(keys)
                    client.read(0.005, numbers.choice((10, 200, 4_000)))
                client.type("\r")
                sent.append(words[:-2] + words[-1:])
            client.type("half a li" + LEFT)
            while saying.is_alive():
                client.read(0.1)
            client.wait_for("half a li\b")  # or the last message would come before what was typed is read
            messages.append("54358:the last")
            client.say(messages[-1:])
            received: list[str] = []
            background.run(lambda: received.extend(client.heard() for _ in sent))
            client.wait_for(f"{messages[-1]}\nhalf a li\b")
            background.join()
            self.assertEqual(received, sent)
            rows, cursor = client.settle()
            self.assertEqual((rows[-3:], cursor), (["", messages[-1], "half a li"], (11, 8)))
            shown = [row for row in client.screen().split("\n") if row.startswith("54358:")]
            self.assertEqual(shown, messages)

    def test_floods_while_someone_types_and_edits(self) -> None:
        """Each time, what is typed is sent as it was typed, every message is whole, and the screen is right."""
        for first in range(0, 20 if LONG else 4, 4):
            background = Background()
            for seed in range(first, first + 4):
                background.run(self.flood, seed)
            background.join()

    def test_drawing_on_a_terminal_that_takes_less_than_is_drawn(self) -> None:
        """Each time the line is drawn again it is whole, and each message is shown once, though writing blocks."""
        half_typed = " ".join(str(number) for number in range(350))
        with Judged(24, "--no-color", columns=80) as client:
            client.type(half_typed)
            client.settle()
            background = Background()

            enough = threading.Event()  # drawn again, whatever else the machine is busy with

            def say() -> None:
                number = 0
                while number < 60 or (number < 10_000 and not enough.is_set()):
                    client.say([f"54358:{number}"])
                    number += 1
                    time.sleep(0.002)  # each is to be drawn for itself, as far as that can be
                client.say(["54358:last"])

            saying = background.run(say)
            waiting = pathlib.Path(f"/proc/{client.process.pid}/wchan")
            while saying.is_alive() or "54358:last" not in as_text(client.output[-5_000:]):
                with contextlib.suppress(Overdue):
                    eventually(lambda: waiting.read_text() == "wait_woken", seconds=0.2)
                    time.sleep(0.06)  # time for a signal, of those that come until the message is drawn
                client.read(0.2, 4_000)
                if client.output.count(b" 1 2 3 ") > 20:
                    enough.set()
            background.join()
            client.settle()
            drawn = client.screen().replace(" \r", "").split("54358:")[1:]
            texts = [piece.split("\n")[0] for piece in drawn]
            self.assertEqual(texts, [str(number) for number in range(len(texts) - 1)] + ["last"])
            with_line = [piece for piece in drawn if " 1 2 3 " in piece]
            self.assertGreater(len(with_line), 10)
            self.assertEqual([piece for piece in with_line if half_typed not in piece], [])

    def test_a_line_too_long_is_not_sent_and_comes_back(self) -> None:
        with Judged(10, "--no-color") as client:
            background = Background()
            background.run(client.type, "x" * 65_540 + "\r")
            client.wait_for("\n* line too long: 65536 bytes at most, this line was not sent\n" + "x" * 65_540)
            background.join()
            client.type("\x7f" * 4 + "\r")
            background.run(lambda: self.assertEqual(client.heard(), "x" * 65_536))
            client.wait_for("\n")
            background.join()

    def test_history_and_editing_keys(self) -> None:
        with Judged(10, "--no-color") as client:
            for typed, expected in (
                ("one two\r", "one two"),
                ("\x1b[A\r", "one two"),
                ("three\x01four \x05!\r", "four three!"),
                ("one two\x17three\r", "one three"),
                ("gone\x15kept\r", "kept"),
                ("kept gone\x1bb\x0b\r", "kept "),
                ("\x12four\r\r", "four three!"),
                ("a\tb\r", "a\tb"),
                ("\tif x:\r", "\tif x:"),
            ):
                with self.subTest(typed=typed):
                    client.type(typed)
                    self.assertEqual(client.heard(), expected)

    def test_tab_completes_labels_that_were_seen(self) -> None:
        with Judged(10, "--no-color") as client:
            client.say(["* 7 here: Uwe, 54358 (you), and 5 more, and people on paris, oslo"])
            client.say(["annika:Hi!", "bob:Hi!", "* 54358 is now Zoë", "anton:Hi!"])
            client.wait_for("anton:Hi!\n")
            for typed, expected in (
                ("/msg b\t Hi!\r", "/msg bob Hi!"),
                ("zO\t: Hi!\r", "Zoë: Hi!"),
                ("ann\tx\r", "annikax"),
                ("c\t!\r", "c\t!"),
                ("/msg U\t Hi!\r", "/msg Uwe Hi!"),
                ("os\t!\r", "os\t!"),
                ("/M\t x\r", "/msg x"),
            ):
                client.press(typed)
                self.assertEqual(client.heard(), expected)
            client.press("an\t\t")
            client.settle()
            client.say(["bob:meanwhile"])
            client.settle()
            self.assertEqual([row for row in client.shows()[0] if row][-3:], ["annika  anton", "bob:meanwhile", "an"])
            client.press("t\t\r")
            self.assertEqual(client.heard(), "anton")

    def test_a_tab_with_more_input_behind_it_was_pasted(self) -> None:
        with Judged(10, "--no-color") as client:
            client.say(["bob:Hi!"])
            client.wait_for("bob:Hi!\n")
            for typed in ("bo\t7\r", "bo\tb\tob\r", "\tbo\tb\r"):
                client.type(typed)
                self.assertEqual(client.heard(), typed[:-1])

    def test_however_many_labels_fit_they_are_listed_without_a_question(self) -> None:
        with Judged(10, "--no-color") as client:
            client.say([f"a{number}:Hi!" for number in range(300)])
            client.wait_for("a299:Hi!\n")
            client.press("a\t\t")
            client.say(["bob:meanwhile"])
            client.wait_for("bob:meanwhile\na")
            for question in ("Display all", "--More--"):
                self.assertNotIn(question, client.screen())

    def test_vi_mode_of_the_users_inputrc(self) -> None:
        with inputrc("set editing-mode vi\n"), Judged(10, "--no-color") as client:
            client.type("one two\x1b")
            client.settle()
            client.type("0cwthree\x1b")
            client.settle()
            client.type("\r")
            self.assertEqual(client.heard(), "three two")

    def test_a_resize_keeps_the_line(self) -> None:
        with Judged(10, "--no-color") as client:
            client.type("half a line")
            client.settle()
            client.resize(10, 30)
            client.emulator.resize(10, 30)
            client.settle()
            client.say(["54358:Hi!"])
            client.settle()
            self.assertEqual([row for row in client.shows()[0] if row][-2:], ["54358:Hi!", "half a line"])
            client.type("\r")
            self.assertEqual(client.heard(), "half a line")


@contextlib.contextmanager
def inputrc(text: str) -> Iterator[None]:
    """Have readline read this as the user's settings."""
    with tempfile.NamedTemporaryFile("w", suffix=".inputrc") as file:
        file.write(text)
        file.flush()
        with mock.patch.dict(os.environ, {"INPUTRC": file.name}):
            yield


@NEEDS_PYTE
class Endings(TestCase):
    def ends(self, client: Judged, status: int, last: str) -> None:
        self.assertEqual(client.wait(), status)
        rows = [row for row in client.screen().split("\n") if row]
        self.assertIn("half a li", rows)
        self.assertEqual(rows[-1], last)
        self.assertEqual(client.attributes(), client.before)

    def half_typed(self) -> Judged:
        client = Judged(10, "--no-color")
        self.addCleanup(client.__exit__)
        client.type("half a li")
        client.settle()
        return client

    def test_ctrl_c(self) -> None:
        client = self.half_typed()
        client.type("\x03")
        self.ends(client, 130, "Disconnected from server")

    def test_two_ctrl_c(self) -> None:
        client = self.half_typed()
        client.type("\x03\x03")
        self.assertIn(client.wait(), (130, -signal.SIGINT))
        self.assertEqual(client.attributes(), client.before)

    def test_two_sigterm_while_ctrl_s_holds_the_screen(self) -> None:
        """The first one waits to begin a new row."""
        client = self.half_typed()
        client.type("\x13")
        client.process.send_signal(signal.SIGTERM)
        client.wait_to_write()
        client.process.send_signal(signal.SIGTERM)
        self.assertEqual(client.wait(), -signal.SIGTERM)
        self.assertEqual(client.attributes(), client.before)

    def test_sigstop_and_sigcont_without_a_shell(self) -> None:
        """The terminal is ours again, whoever has had it meanwhile, and the line is shown once."""
        client = self.half_typed()
        client.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, client.process.pid, os.WSTOPPED | os.WNOWAIT)
        raw = client.attributes()
        client.set_attributes(client.before)
        client.process.send_signal(signal.SIGCONT)
        eventually(lambda: client.attributes() == raw)
        client.type("ne\r")
        self.assertEqual(client.heard(), "half a line")

    def test_sigstop_and_sigcont_with_the_terminal_untouched(self) -> None:
        """The line stands there already."""
        client = self.half_typed()
        client.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, client.process.pid, os.WSTOPPED | os.WNOWAIT)
        client.process.send_signal(signal.SIGCONT)
        client.settle()
        client.type("ne")
        self.assertEqual([row for row in client.settle()[0] if row][2:], ["half a line"])

    def test_ctrl_z_without_a_shell_changes_nothing(self) -> None:
        client = self.half_typed()
        client.type("\x1a")
        client.settle()
        client.type("ne")
        self.assertEqual([row for row in client.settle()[0] if row][2:], ["half a line"])

    def test_the_servers_death(self) -> None:
        client = self.half_typed()
        client.server.close()
        self.ends(client, 1, "Disconnected from server")
        self.assertEqual(client.screen().count("Connection lost"), 1)

    def test_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP):  # a background job ignores SIGQUIT, and so would the client
            with self.subTest(number=number):
                client = self.half_typed()
                client.process.send_signal(number)
                self.ends(client, -number, "half a li")

    def test_ctrl_d_and_exit(self) -> None:
        for typed in ("\x04", "exit\r"):
            with self.subTest(typed=typed), Judged(10, "--no-color") as client:
                client.type(typed)
                while client.server.recv(100):
                    pass
                client.server.close()
                self.assertEqual(client.wait(), 0)
                self.assertTrue(client.screen().endswith("Disconnected from server\n"))
                self.assertEqual(client.attributes(), client.before)

    def enter_much(self, client: Judged, number: int) -> None:
        """Enter a line that takes up much of what may be on its way; raise Overdue when it is not shown."""
        client.type(f"{number:1000}\r")
        client.wait_for(f"{number}\n", seconds=0.7)

    def test_ctrl_c_while_the_server_does_not_take_what_is_sent(self) -> None:
        """What comes is still shown."""
        with Judged(10, "--no-color") as client:
            with contextlib.suppress(Overdue):  # not shown any more: the line before is being sent
                for number in range(10_000):
                    self.enter_much(client, number)
            client.say(["54358:Hi!"])
            client.wait_for("54358:Hi!\n")
            client.type("\x03")
            self.assertEqual(client.wait(), 130)
            self.assertEqual(client.attributes(), client.before)

    def test_ctrl_z_and_fg_under_a_shell(self) -> None:
        with socket.create_server((LOOPBACK, 0)) as listener:
            listener.settimeout(SECONDS)
            port = listener.getsockname()[1]
            with (
                inputrc("set enable-bracketed-paste off\n"),
                Terminal("/bin/bash", "--norc", "--noprofile", "-i") as shell,
            ):
                shell.type("PS1='$ '\r")
                shell.wait_for("$ ")
                shell.type(f"{sys.executable} {CLIENT} --no-color {LOOPBACK} {port}\r")
                server, _ = listener.accept()
                with server:
                    shell.wait_for(GREETING + "\n")
                    shell.type("half a li")
                    shell.wait_for("half a li")
                    shell.type("\x1a")
                    shell.wait_for("$ ")
                    server.sendall(b"54358:meanwhile\n")
                    shell.type("stty -a | tr ' ;' '\\n\\n' | grep -x -e echo -e icanon | sort | tr '\\n' '+'\r")
                    shell.wait_for("echo+icanon+$ ")
                    shell.type("fg\r")
                    shell.wait_for("54358:meanwhile\nhalf a li")
                    shell.type("ne\r")
                    self.assertEqual(server.recv(100), b"half a line\n")

    def test_started_in_the_background_and_brought_back(self) -> None:
        """It stops before it may touch the terminal, and has it as ever afterwards: what is typed is shown once."""
        with (
            socket.create_server((LOOPBACK, 0)) as listener,
            inputrc("set enable-bracketed-paste off\n"),
            Terminal("/bin/bash", "--norc", "--noprofile", "-i") as shell,
        ):
            listener.settimeout(SECONDS)
            shell.type("PS1='$ '\r")
            shell.wait_for("$ ")
            shell.type(f"{sys.executable} {CLIENT} --no-color {LOOPBACK} {listener.getsockname()[1]} &\r")
            server, _ = listener.accept()
            with server:
                shell.wait_for("$ ")
                shell.type("while ! jobs | grep Stopped; do sleep 0.1; done; fg\r")
                shell.wait_for(GREETING + "\n")
                shell.type("hello\r")
                self.assertEqual(server.recv(100), b"hello\n")
                server.sendall(b"54358:Hi!\n")
                shell.wait_for(f"{GREETING}\nhello\n\n54358:Hi!\n")


LIBEDIT = glob.glob("/usr/lib/*/libedit.so.2")


@NEEDS_PYTE
@unittest.skipUnless(LIBEDIT, "needs libedit: apt-get install libedit2")
class Libedit(Comparison):
    """As on macOS, imitated by preloading it: lines that fit a row are safe."""

    def setUp(self) -> None:
        for patch in (without("prompt_toolkit"), mock.patch.dict(os.environ, {"LD_PRELOAD": LIBEDIT[0]})):
            patch.__enter__()
            self.addCleanup(patch.__exit__, None, None, None)

    def test_half_typed_lines_of_one_row(self) -> None:
        shapes = ("short", "cursor in the middle", "cursor at the start", "wide characters")
        messages = ("one line", "three lines", "more than the screen")
        self.compare_all((shape, message, 10) for shape in shapes for message in messages)

    def test_nothing_half_typed_is_the_reference(self) -> None:
        with Judged(12, "--no-color", columns=60) as client:
            for typed, message in (("Hi!\r", "54383:Hello!"), ("\r", "54396:How are you guys doing?")):
                client.type(typed)
                client.settle()
                client.say([message])
                client.wait_for(message, within=True)
            rows, cursor = client.settle()
            expected = [GREETING, "Hi!", "", "54383:Hello!", "", "", "54396:How are you guys doing?"]
            self.assertEqual((rows[:8], cursor), ([*expected, ""], (7, 0)))

    def test_endings(self) -> None:
        for typed, status in (("half\x03", 130), ("\x04", 0), ("exit\r", 0)):
            with self.subTest(typed=typed), Judged(10, "--no-color", constants={"LEAVE_SECONDS": 0.1}) as client:
                client.type(typed)
                self.assertEqual(client.wait(), status)
                self.assertIn("Disconnected from server", client.shows()[0])
                self.assertEqual(client.attributes(), client.before)
