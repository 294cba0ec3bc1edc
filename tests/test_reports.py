"""Odd starts, as people have reported them of comparable programs: both programs cope, or say why not in a sentence."""

from __future__ import annotations

import os
import signal
import sys
import unittest

from tests.support import (
    CLIENT,
    LOOPBACK,
    NEEDS_ROOT,
    PYTHON,
    SERVER,
    Program,
    Server,
    Terminal,
    TestCase,
    command_of,
    eventually,
    needs_command,
    unread,
    without,
)

GREETING = "Connected to chat server. Type 'exit' to leave."
NO_THREADS = """
import threading
def start(thread):
    raise RuntimeError("can't start new thread")
threading.Thread.start = start
"""
ONE_THREAD = f"""
import threading
start_thread = threading.Thread.start
def start_one(thread):
    threading.Thread.start = start
    start_thread(thread)
{NO_THREADS}
threading.Thread.start = start_one
"""

BLOCK_SIGNALS = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.execv(sys.argv[1], sys.argv[1:])
"""


class Starting(TestCase):
    @unittest.skipIf(sys.platform == "win32", "needs signals")
    def test_ctrl_c_while_a_program_is_imported_leaves_no_traceback(self) -> None:
        for program in (SERVER, CLIENT):
            for module in ("argparse", "ipaddress", "typing"):  # among the first and the last
                with (
                    self.subTest(program=program, module=module),
                    without(module, error="KeyboardInterrupt"),
                    Program(*PYTHON, program) as started,
                ):
                    self.assertEqual(started.wait(), -signal.SIGINT)
                    self.assertEqual(started.output.decode() + started.errors(), "")

    def test_no_thread_can_be_started(self) -> None:
        """As when the user has as many processes as may be, or memory is short."""
        for program in (SERVER, CLIENT):
            with self.subTest(program=program), Program(*command_of(program, setup=NO_THREADS)) as started:
                self.assertEqual(started.wait(), 1)
                self.assertRegex(started.errors(), r"^Cannot start: can't start new thread; [^\n]+\n$")

    def test_no_thread_can_be_started_for_what_comes(self) -> None:
        """The one that connects has ended by then; with --ssh two more go on."""
        with Server() as server:
            command = *command_of(CLIENT, setup=ONE_THREAD), LOOPBACK, str(server.port)
            with Terminal(*command) as terminal:
                self.assertEqual(terminal.wait(), 1)
                self.assertRegex(terminal.screen(), rf"^{GREETING}\nCannot start: can't start new thread; [^\n]+\n$")
                self.assertEqual(terminal.attributes(), terminal.before)

    @unittest.skipUnless(hasattr(signal, "pthread_sigmask"), "needs signal masks: Windows has none")
    def test_signals_that_the_parent_has_blocked_stop_a_server_all_the_same(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            with self.subTest(number=number), Server(prefix=(sys.executable, "-c", BLOCK_SIGNALS)) as server:
                self.assertEqual(server.stop(number), 0)

    @NEEDS_ROOT
    @needs_command("unshare", "util-linux")
    def test_as_the_first_process_of_a_container(self) -> None:
        """Which no signal ends that it does not handle."""
        contained = "unshare", "--pid", "--fork", "--kill-child"

        def inner(program: Program) -> int:
            pid = program.process.pid
            with open(f"/proc/{pid}/task/{pid}/children") as file:
                return int(file.read())

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            with self.subTest(number=number), Server(prefix=contained) as server:
                command = *contained, *PYTHON, CLIENT, LOOPBACK, str(server.port)
                with Program(*command, keep_input=True) as client:
                    client.expect(GREETING)
                    os.kill(inner(client), number)
                    client.wait()
                os.kill(inner(server), number)
                self.assertEqual(server.wait(), 0)


@unittest.skipUnless(sys.platform == "linux", "needs Linux: /proc tells what a server has read")
class Marks(TestCase):
    def test_a_byte_order_mark_before_the_first_line_is_no_part_of_it(self) -> None:
        """PowerShell may begin so what it pipes; later it is a character like any other."""
        with Server() as server, server.peer() as bob:
            for packets in (("\ufeff/nick ann\n\ufeffHi!\n",), ("\ufeff", "/nick ann\n\ufeffHi!\n")):
                with self.subTest(packets=packets), server.peer() as ann:
                    for packet in packets:
                        ann.send(packet)
                        eventually(lambda: not unread(server, ann))
                    bob.expect(f"* {ann.label} is now ann", "ann:\ufeffHi!")
                eventually(lambda: server.output.endswith(b"Connection closed\n"))  # so that the name is free again
