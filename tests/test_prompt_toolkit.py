"""The client where Python has no readline, but prompt_toolkit: the tests of tests.test_terminal, and more.

prompt_toolkit moves the cursor about, so what is looked at is never its output, but what a terminal makes of it.
"""

from __future__ import annotations

import fcntl
import importlib.util
import pathlib
import signal
import socket
import sys
import termios
import time
import unittest
from typing import Any
from unittest import mock

from tests import support, test_reference, test_terminal, test_terminal_rules
from tests.support import (
    CLIENT,
    LONG,
    LOOPBACK,
    SECONDS,
    Background,
    Overdue,
    Terminal,
    TestCase,
    eventually,
    once,
    without,
)
from tests.test_terminal import GREETING

# For Judged's ``setup``: the client does what it does on Windows, as far as Linux has that.
AS_ON_WINDOWS = """
import os.path, sys, tty, types
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import mychatclient
mychatclient.sys = types.SimpleNamespace(**{**vars(sys), "platform": "win32"})
mychatclient.EDITORS = [mychatclient.PromptToolkitEditor]
tty.setcbreak(0)  # a console shows nothing by itself
"""
# For the same: a signal comes when the editor is done with a line, which then is not taken from the client.
SIGNAL_BEHIND_A_LINE = f"""
import os.path, signal, sys, threading
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import mychatclient, prompt_toolkit
prompt = prompt_toolkit.PromptSession.prompt
def prompt_and_signal(*arguments, **keywords):
    line = prompt(*arguments, **keywords)
    signal.raise_signal(signal.SIGTERM)
    return line
prompt_toolkit.PromptSession.prompt = prompt_and_signal
mychatclient.Connection.send_line = lambda *_: threading.Event().wait({SECONDS})
"""
NEEDS_PROMPT_TOOLKIT = unittest.skipUnless(
    importlib.util.find_spec("prompt_toolkit"), "needs prompt_toolkit: python -m pip install prompt_toolkit"
)


class Emulated(Terminal):
    """A program in a terminal whose emulator keeps the screen, and what has left it."""

    def __init__(self, *command: str, rows: int = 24, columns: int = 80, own: bool = True) -> None:
        import pyte

        self.emulator: Any = pyte.HistoryScreen(columns, rows, history=10_000)
        self._stream = pyte.ByteStream(self.emulator)
        self._fed = 0  # so much of the output
        super().__init__(*command, rows=rows, columns=columns, own=own)

    def screen(self) -> str:
        """Return what is shown down to the cursor, without blanks before a new row; a full row goes on in the next."""
        return self._last_rows(len(self.emulator.history.top) + self.emulator.lines)

    def _last_rows(self, count: int) -> str:
        self._stream.feed(self.output[self._fed :])
        self._fed = len(self.output)
        cursor, columns = self.emulator.cursor, range(self.emulator.columns)
        rows = [self.emulator.buffer[row] for row in range(cursor.y + 1)]
        gone = self.emulator.history.top
        rows[:0] = [gone[row] for row in range(max(0, len(gone) + len(rows) - count), len(gone))]
        texts = ["".join(row[column].data for column in columns) for row in rows]
        above = "".join(text.rstrip() + "\n" if text.endswith(" ") else text for text in texts[:-1])
        last = texts[-1].rstrip().ljust(cursor.x)
        return above + last if last else above.removesuffix("\n") + "\n"  # a new row, below a full one too

    def wait_for(self, text: str, seconds: float = SECONDS, within: bool = False) -> None:
        text = text.replace(" \n", "\n").replace("\b", "")
        rows = text.count("\n") + len(text) // self.emulator.columns + 2
        deadline = time.monotonic() + seconds
        while not (text in self.screen() if within else self._last_rows(rows).endswith(text)):
            if not self.read(deadline - time.monotonic()):
                raise Overdue(f"{text!r} does not end {self.screen()!r}")


class Judged(test_terminal.Judged, Emulated):
    """A client in such a terminal."""

    def settle(self) -> tuple[list[str], tuple[int, int]]:
        """Return what is shown when the client waits, has read what was typed, and nothing has come for a while."""
        waiting = pathlib.Path(f"/proc/{self.process.pid}/wchan")

        def is_settled() -> bool:
            unread = fcntl.ioctl(self._slave, termios.FIONREAD, bytes(4))
            return not self.read(0.15) and not any(unread) and "poll" in waiting.read_text()

        eventually(is_settled)
        return self.shows()


class EmulatedLast(Emulated):
    """The same, but the screen is made of what was shown last alone: of a whole flood that would take long."""

    def screen(self) -> str:
        self._fed = max(self._fed, len(self.output) - 10_000)
        return super().screen()


class WithoutReadline(unittest.TestCase):
    """Has the programs of other tests find no readline, and run in such terminals."""

    def setUp(self) -> None:
        super().setUp()
        for patch in (
            without("readline"),
            mock.patch.object(support, "PYTHON", (sys.executable,)),  # with what is installed beside it
            mock.patch.object(test_reference, "Terminal", Emulated),
            mock.patch.object(test_terminal, "Terminal", Emulated),
            mock.patch.object(test_terminal, "Judged", Judged),
            mock.patch.object(test_terminal_rules, "Terminal", EmulatedLast),
        ):
            patch.__enter__()
            self.addCleanup(patch.__exit__, None, None, None)


class Choice(TestCase):
    def converse(self) -> None:
        """Start a client in a terminal, have something said to it, and leave."""
        with (
            socket.create_server((LOOPBACK, 0)) as listener,
            Terminal(sys.executable, CLIENT, "--no-color", LOOPBACK, str(listener.getsockname()[1])) as client,
        ):
            listener.settimeout(SECONDS)
            server, _ = listener.accept()
            with server:
                server.sendall(b"54358:Hi!\n")
                client.wait_for("Hi!\n")
                client.type("exit\r")
                self.assertEqual(server.recv(100), b"exit\n")
            self.assertEqual(client.wait(), 0)
            self.assertEqual(client.screen(), f"{GREETING}\n\n54358:Hi!\nexit\nDisconnected from server\n")

    def test_where_there_is_gnu_readline_nothing_is_imported(self) -> None:
        with without("prompt_toolkit", error="SystemExit"):
            self.converse()

    def test_where_there_is_neither_the_screen_is_plain(self) -> None:
        with without("readline", "prompt_toolkit"):
            self.converse()


@test_terminal.NEEDS_PYTE
@NEEDS_PROMPT_TOOLKIT
class Reference(WithoutReadline, test_reference.ReferenceConversation):
    def test_the_reference_conversation(self) -> None:
        """Server and all three screens match to the letter, but for blanks that a screen does not show."""
        screens = tuple(screen.replace("{blank}", "") for screen in test_reference.SCREENS)
        with mock.patch.object(test_reference, "SCREENS", screens):
            self.converse()


@test_terminal.NEEDS_PYTE
@NEEDS_PROMPT_TOOLKIT
class HalfTyped(WithoutReadline, test_terminal.HalfTyped):
    @once
    def test_every_message(self) -> None:
        super().test_every_message()


@test_terminal.NEEDS_PYTE
@NEEDS_PROMPT_TOOLKIT
class Typing(WithoutReadline, test_terminal.Typing):
    test_vi_mode_of_the_users_inputrc = None  # type: ignore[assignment] # prompt_toolkit reads none
    # How often the line was drawn again only its bytes would tell; that it is whole the floods do.
    test_drawing_on_a_terminal_that_takes_less_than_is_drawn = None  # type: ignore[assignment]

    def test_a_paste_of_five_hundred_lines_is_sent_in_order_and_shown_once(self) -> None:
        self.paste(500 if LONG else 100)

    def test_floods_while_someone_types_and_edits(self) -> None:
        """What is typed is sent as it was typed, every message is whole, and the screen is right."""
        for seed in range(20 if LONG else 2):
            with self.subTest(seed=seed):
                self.flood(seed)

    def test_nothing_half_typed_is_the_reference(self) -> None:
        """A blank at a line's end is there, too, though a screen does not show it."""
        with Judged(12, "--no-color", columns=60) as client:
            for typed, message in (("Hi!\r", "54383:Hello! "), ("\r", "54396:How are you guys doing?")):
                shown = client.screen()
                client.type(typed)
                client.wait_for(shown + typed.replace("\r", "\n"))
                client.say([message])
                client.wait_for(f"{typed[:-1]}\n\n{message}\n")
            self.assertEqual(client.screen(), f"{GREETING}\nHi!\n\n54383:Hello!\n\n\n54396:How are you guys doing?\n")
            self.assertIn(b"54383:Hello! \r\n", client.output)
            self.assertNotIn(b"\x1b[6n", client.output)  # an answer to that would have to be waited for

    def test_a_line_too_long_is_not_sent_and_comes_back(self) -> None:
        with Judged(10, "--no-color") as client:
            background = Background()
            background.run(client.type, "\x1b[200~" + "x" * 65_540 + "\x1b[201~\r")
            client.wait_for("* line too long: 65536 bytes at most, this line was not sent", within=True)
            background.join()
            client.type("\x7f" * 4 + "\r")
            hearing = background.run(lambda: self.assertEqual(client.heard(), "x" * 65_536))
            while hearing.is_alive():
                client.read(0.1)
            background.join()

    def test_pastes_are_not_marked_so_that_a_newline_in_one_is_enter(self) -> None:
        """A tab in it is a tab, and what is behind the last newline can be edited."""
        with Judged(10, "--no-color") as client:
            client.say(["annika:Hi!"])
            client.wait_for("annika:Hi!\n")
            client.type("so: one\ran\tx\r\rhalf a li")
            self.assertEqual([client.heard(), client.heard()], ["so: one", "an\tx"])
            client.type("ne\r")
            self.assertEqual(client.heard(), "half a line")
            client.wait_for("\n\nannika:Hi!\nso: one\nan      x\n\nhalf a line\n")
            self.assertNotIn(b"\x1b[?2004h", client.output)

    def test_tab_completes_labels_that_were_seen(self) -> None:
        """What begins so in any case, as far as the labels agree."""
        with Judged(10, "--no-color") as client:
            client.say(["annika:Hi!", "bob:Hi!", "* 54358 is now Zoë", "Anton:Hi!"])
            client.wait_for("Anton:Hi!\n")
            for typed, shown, expected in (
                ("/msg B\t", "/msg bob", "/msg bob Hi!"),
                ("zo\t", "Zoë", "Zoë Hi!"),
                ("ann\t", "annika", "annika Hi!"),
                ("c\t", "c       ", "c\t Hi!"),
                ("a\t", "an", "an Hi!"),
                ("/M\t", "/msg", "/msg Hi!"),
            ):
                with self.subTest(typed=typed):
                    client.type(typed)
                    client.wait_for(f"\n{shown}")
                    client.type(" Hi!\r")
                    self.assertEqual(client.heard(), expected)
                    client.wait_for(" Hi!\n")

    def test_a_stray_byte_in_who_is_to_be_ignored(self) -> None:
        """It is quoted as what takes its place, and the chat goes on."""
        with Judged(10, "--no-color") as client:
            client.type(b"/ignore b\xe4\rHi!\r")
            self.assertEqual(client.heard(), "Hi!")
            client.wait_for("* ignored: b?\nHi!\n")

    def test_what_comes_is_shown_at_once_however_much_has_come_before(self) -> None:
        """What the receive thread does now and then it need not do: with TLS each line may come by itself."""
        with Judged(10, "--no-color", constants={"INTERRUPT_SECONDS": 2 * SECONDS}) as client:
            client.type("half a li")
            client.settle()
            for number in range(3):
                client.say([f"54358:{number}"])
                client.wait_for(f"54358:{number}\nhalf a li")

    # Where they agree no further, nothing is listed.
    test_however_many_labels_fit_they_are_listed_without_a_question = None  # type: ignore[assignment]


@test_terminal.NEEDS_PYTE
@NEEDS_PROMPT_TOOLKIT
class Endings(WithoutReadline, test_terminal.Endings):
    # Who stops it so, without Ctrl-Z, has changed the terminal behind its back: it does not look for that.
    test_sigstop_and_sigcont_without_a_shell = None  # type: ignore[assignment]

    def half_typed(self) -> test_terminal.Judged:
        client = super().half_typed()
        client.wait_for("half a li")
        return client

    def test_ctrl_c_in_a_search(self) -> None:
        client = self.half_typed()
        client.type("\x12")
        client.wait_for("half a li", within=True)
        client.type("\x03")
        self.assertEqual(client.wait(), 130)
        self.assertEqual(client.attributes(), client.before)
        self.assertTrue(client.screen().endswith("\nDisconnected from server\n"))

    def test_a_signal_between_a_line_and_its_sending(self) -> None:
        with Judged(10, "--no-color", constants={"SILENCE_SECONDS": 0.1}, setup=SIGNAL_BEHIND_A_LINE) as client:
            client.type("Hi!\r")
            self.assertEqual(client.wait(), -signal.SIGTERM)
            self.assertEqual(client.attributes(), client.before)

    def enter_much(self, client: test_terminal.Judged, number: int) -> None:
        client.type(f"\x1b[200~{number:3900}\x1b[201~\r")
        client.wait_for(f"{number}\n", seconds=2)

    @once
    def test_ctrl_c_while_the_server_does_not_take_what_is_sent(self) -> None:
        """What comes is still shown."""
        super().test_ctrl_c_while_the_server_does_not_take_what_is_sent()

    def test_ctrl_z_bg_and_fg_under_a_shell(self) -> None:
        """In the background it stops before it touches the terminal; then the line is back, and messages show."""
        with (
            socket.create_server((LOOPBACK, 0)) as listener,
            # Wide: what the shell shows of a job, paths and all, might fill a row.
            Emulated("/bin/bash", "--norc", "--noprofile", "-i", columns=500) as shell,
        ):
            listener.settimeout(SECONDS)
            shell.type("PS1='$ '\r")
            shell.wait_for("$ ")
            shell.type(f"{sys.executable} {CLIENT} --no-color {LOOPBACK} {listener.getsockname()[1]}\r")
            server, _ = listener.accept()
            with server:
                shell.wait_for(GREETING + "\n")
                shell.type("half a li")
                shell.wait_for("half a li")
                for commands in ("fg\r", "bg; while ! jobs | grep Stopped; do sleep 0.1; done; fg\r"):
                    shell.type("\x1a")
                    shell.wait_for("$ ")
                    shell.type(commands)
                    shell.wait_for("\nhalf a li")
                    server.sendall(b"54358:Hi!\n")
                    shell.wait_for("\n\n54358:Hi!\nhalf a li")
                shell.type("ne\r")
                self.assertEqual(server.recv(100), b"half a line\n")

    def test_with_nothing_half_typed_no_row_is_left_empty(self) -> None:
        for number in (signal.SIGTERM, 0):
            with self.subTest(number=number), Judged(10, "--no-color") as client:
                client.type("Hi!\r")
                self.assertEqual(client.heard(), "Hi!")
                client.settle()
                if number:
                    client.process.send_signal(number)
                    self.assertEqual(client.wait(), -number)
                    self.assertEqual(client.screen(), f"{GREETING}\nHi!\n")
                else:
                    client.server.close()
                    self.assertEqual(client.wait(), 1)
                    self.assertIn(f"{GREETING}\nHi!\nConnection lost: ", client.screen())


@test_terminal.NEEDS_PYTE
@NEEDS_PROMPT_TOOLKIT
class InMidFlood(WithoutReadline, test_terminal_rules.InMidFlood):
    """The same endings, whatever the editor is drawing at that moment."""

    # That one has all editors.
    test_ctrl_c_while_the_terminal_takes_no_more = None  # type: ignore[assignment]


@test_terminal.NEEDS_PYTE
@NEEDS_PROMPT_TOOLKIT
class AsOnWindows(WithoutReadline, TestCase):
    """Where no signal reaches the main thread."""

    def test_the_line_stays_whole_through_messages_and_silence(self) -> None:
        for typed, status in (("\x03", 130), ("", 1)):
            with (
                self.subTest(status=status),
                Judged(10, "--no-color", constants={"SILENCE_SECONDS": 0.01}, setup=AS_ON_WINDOWS) as client,
            ):
                client.type("half a li")
                for number in range(3):
                    client.settle()  # in which nothing comes
                    client.say([f"54358:{number}"])
                    client.wait_for(f"\n\n54358:{number}\nhalf a li")
                client.type("ne\r")
                self.assertEqual(client.heard(), "half a line")
                client.type(f"half{typed}")
                client.wait_for("half", within=True)
                if not typed:
                    client.server.shutdown(socket.SHUT_RDWR)
                self.assertEqual(client.wait(), status)
                self.assertTrue(client.screen().endswith("Disconnected from server\n"))
