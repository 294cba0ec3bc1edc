"""What the client promises in a terminal at whatever moment: endings in mid-flood, jobs, pastes, looks."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sys
import threading
import time
import unittest
from collections.abc import Callable

from tests.support import CLIENT, LOOPBACK, SECONDS, Background, Terminal, TestCase

GREETING = "Connected to chat server. Type 'exit' to leave."
FAREWELL = "Disconnected from server"
TIMES = 100 if "MYCHAT_LONG" in os.environ else 4  # for what goes wrong seldom


class Talker:
    """A server that says a line after the other as fast as the client shows them; it stops when the client has gone."""

    def __init__(self) -> None:
        self.listener = socket.create_server((LOOPBACK, 0))
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

    options: tuple[str, ...] = ()

    def ends(self, end: Callable[[Terminal, Talker], object], status: int, shown: str) -> None:
        """Do ``end`` at a random moment, many times; fail unless each has this status, end and no traceback."""
        dice = random.Random(1)
        for number in range(TIMES):
            with (
                self.subTest(number=number),
                Talker() as talker,
                Terminal(sys.executable, CLIENT, *self.options, LOOPBACK, str(talker.port)) as terminal,
            ):
                while b"a line of a flood" not in terminal.output:
                    self.assertTrue(terminal._read(SECONDS))
                if number % 2:
                    terminal.type("half a li")
                moment = time.monotonic() + dice.random() / 10
                while time.monotonic() < moment:
                    terminal._read(0.005)
                end(terminal, talker)
                deadline = time.monotonic() + SECONDS
                while terminal.process.poll() is None and time.monotonic() < deadline:
                    terminal._read(0.05)
                self.assertEqual(terminal.wait(), status)
                self.assertNotIn("Traceback", terminal.screen())
                self.assertTrue(terminal.screen().endswith(shown), terminal.screen()[-500:])
                self.assertEqual(terminal.attributes(), terminal.before)

    def test_ctrl_c(self) -> None:
        self.ends(lambda terminal, _: terminal.type("\x03"), 130, f"\n{FAREWELL}\n")

    def test_the_servers_death(self) -> None:
        self.ends(lambda _, talker: talker.stopping.set(), 1, f"try again later.\n{FAREWELL}\n")

    def test_sigterm(self) -> None:
        self.ends(lambda terminal, _: terminal.process.send_signal(signal.SIGTERM), -signal.SIGTERM, "")
