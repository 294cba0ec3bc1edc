"""What newcomers are told of what was said, and what is kept in a file."""

from __future__ import annotations

import contextlib
import datetime
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import unittest

from mychatserver import HISTORY_BLOCK_BYTES, HISTORY_BYTES
from tests.support import (
    LONG,
    PYTHON,
    SERVER,
    SMALL_BUFFERS,
    Background,
    Peer,
    Program,
    Server,
    TestCase,
    eventually,
    numbered_lines,
)

LIVE = "* live from here"
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d ")


def told(peer: Peer) -> list[str]:
    """Return the lines that a newcomer is told, without the times between them; fail unless the heading counts them."""
    heading = re.fullmatch(rb"\* the last (?:line|(\d+) lines):", peer.line())
    assert heading
    lines: list[str] = []
    while (line := peer.line().decode()) != LIVE:
        if not re.fullmatch(r"\* \d\d:\d\d", line):
            lines.append(line)
    assert len(lines) == int(heading[1] or 1)
    return lines


class HistoryTests(TestCase):
    def test_a_newcomer_is_told_the_last_lines(self) -> None:
        with Server("--history", "3") as server, server.peer() as ann:
            ann.send("".join(f"{number}\n" for number in range(1)))
            server.expect(f"{ann.label}:0")
            with server.peer() as bob:
                self.assertEqual(told(bob), [f"{ann.label}:0"])
                bob.say("Hi!")
                ann.expect(f"{bob.label}:Hi!")
                server.expect(f"{bob.label}:Hi!")
                with server.peer() as carol:
                    self.assertEqual(told(carol), [f"{ann.label}:0", f"{bob.label}:Hi!"])
                    ann.send("/nick ann\n1\n2\n")  # no notice is told again
                    carol.expect(f"* {ann.label} is now ann", "ann:1", "ann:2")
                    server.expect(f"* {ann.label} is now ann", "ann:1", "ann:2")
                    with server.peer() as dave:
                        self.assertEqual(told(dave), [f"{bob.label}:Hi!", "ann:1", "ann:2"])
                        ann.say("3")
                        dave.expect("ann:3")

    def test_there_is_none_unless_asked_for_nor_before_anything_was_said(self) -> None:
        for options in ((), ("--history", "9")):
            with Server(*options) as server, server.peer() as ann:
                if not options:
                    ann.say("0")
                    server.expect(f"{ann.label}:0")
                with server.peer() as bob:
                    ann.say("1")
                    bob.expect(f"{ann.label}:1")

    def test_who_is_here_comes_first(self) -> None:
        with Server("--history", "9", "--announce") as server, server.peer() as ann:
            ann.say("0")
            server.expect(f"{ann.label}:0")
            with server.peer() as bob:
                bob.expect(f"* 2 here: {ann.label}, {bob.label} (you)")
                self.assertEqual(told(bob), [f"{ann.label}:0"])

    def test_a_pour_goes_on_with_a_long_history(self) -> None:
        """And what is kept of it is bounded by bytes, too."""
        lines = numbered_lines(800_000)
        with Server("--history", "1000000", "--quiet") as server, server.peer() as ann, server.peer() as bob:
            background, before = Background(), server.memory()
            background.run(ann.send, lines)
            label = f"{ann.label}:".encode()
            got = b""
            count = 0
            while count < 800_000:
                got = bob.socket.recv(1 << 20)
                count += got.count(b"\n")
            background.join()
            self.assertLess(server.memory() - before, 40_000_000)
            with server.peer() as late:
                lines_told = told(late)
                number = len(lines_told)
                self.assertLess(number * (len(label) + 100), HISTORY_BYTES + 1)
                self.assertGreater(number * (len(label) + 100), HISTORY_BYTES - HISTORY_BLOCK_BYTES)
                self.assertEqual(lines_told, [(label + line).decode() for line in lines.split(b"\n")[-number - 1 : -1]])

    def test_newcomers_share_what_they_are_told(self) -> None:
        """A hundred that do not read it cost little more than one."""
        with Server("--history", "100000", "--quiet", setup=SMALL_BUFFERS) as server, server.peer() as ann:
            with server.peer() as bob:
                for _ in range(100):  # as in a conversation, not in one pour
                    ann.send(b"x" * 99 + b"\n" + b"y" * 9_999 + b"\n")
                    bob.line()
                    bob.line()
            with server.peer() as bob, contextlib.ExitStack() as stack:
                self.assertEqual(len(told(bob)), 200)
                before = server.memory()
                for _ in range(100):
                    stack.enter_context(server.peer(receive_buffer=4_096))
                self.assertLess(server.memory() - before, 30_000_000)

    def test_as_many_whole_lines_are_told_as_the_bytes_hold(self) -> None:
        """However they were said: one by one, and many at once."""
        for lines_at_once in (1, 7):
            with Server("--history", "100", "--quiet") as server, server.peer() as ann, server.peer() as bob:
                lines = [f"{ann.label}:{number}".ljust(52_399, ".") for number in range(28)]
                for first in range(0, 28, lines_at_once):
                    some = lines[first : first + lines_at_once]
                    ann.send("".join(line.partition(":")[2] + "\n" for line in some))
                    bob.expect(*some)
                    if first % 3 == 0:  # whether it is told meanwhile, too
                        with server.peer() as carol:
                            told(carol)
                with server.peer() as carol:
                    self.assertEqual(told(carol), lines[-(HISTORY_BYTES // 52_400) :])


class LogTests(TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = pathlib.Path(folder.name, "chat.log")

    def lines(self) -> list[str]:
        """Return the file's lines, without their time; for an instant, on a full disk, one may be half written."""

        def whole() -> re.Match[str] | None:
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            return re.fullmatch(r"(.*\n)?", text, re.DOTALL)

        lines = eventually(whole, "the last line stays half written")[0].splitlines()
        for line in lines:
            self.assertRegex(line, STAMP)
        return [STAMP.sub("", line) for line in lines]

    def test_what_is_said_and_who_comes_goes_and_is_renamed(self) -> None:
        with Server("--log", str(self.path)) as server:
            with server.peer() as ann, server.peer(source=("127.0.0.2", 0)) as bob:
                ann.send("/nick añn\nHi! \n")
                bob.expect(f"* {ann.label} is now añn", "añn:Hi! ")
                bob.say("/msg añn secret")
                ann.expect(f"* {ann.label} is now añn", f"* {bob.label} to you: secret")
                bob.expect("* to añn: secret")
                bob.say("exit")
                bob.expect_end()
                expected = [
                    f"* {ann.label} joined from 127.0.0.1",
                    f"* {bob.label} joined from 127.0.0.2",
                    f"* {ann.label} is now añn",
                    "añn:Hi! ",
                    f"* {bob.label} left",
                ]
                eventually(lambda: self.lines() == expected, seconds=5)
                ann.say("last")
                server.expect(f"* {ann.label} is now añn", "añn:Hi! ", "Connection closed", "añn:last")
            self.assertEqual(server.stop(), 0)
            self.assertEqual(self.lines(), [*expected, "añn:last", "* añn left"])
            stamp = datetime.datetime.fromisoformat(self.path.read_text().split(" ")[0])
            self.assertLess(abs((datetime.datetime.now().astimezone() - stamp).total_seconds()), 120)

    def test_a_fifo_is_a_log_as_long_as_somebody_reads_it(self) -> None:
        """Without a reader the server says so, at its start and later, and waits for nobody."""
        os.mkfifo(self.path)
        with Program(*PYTHON, SERVER, "--port", "0", "--log", str(self.path)) as program:
            self.assertEqual(program.wait(), 1)
            self.assertRegex(program.errors(), r"^Cannot use \S+: [^\n]+; give --log another file\.\n$")
        reader = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        with Server("--log", str(self.path)) as server, open(reader, "rb", buffering=0) as log:
            with server.peer() as ann:
                self.assertIn(f"* {ann.label} joined", eventually(lambda: log.read(1_000)).decode())
                log.close()
                ann.say("unread")
                eventually(lambda: "the chat goes on without a log" in server.errors())
            self.assertEqual(server.stop(), 0)

    def test_a_log_is_continued(self) -> None:
        for _ in range(2):
            with Server("--log", str(self.path)) as server:
                with server.peer():
                    pass
                server.expect("Connection closed")
                self.assertEqual(server.stop(), 0)
        self.assertEqual([line.split(" ")[2] for line in self.lines()], ["joined", "left"] * 2)

    def test_a_path_that_cannot_be_written(self) -> None:
        for path in (str(self.path / "x"), str(self.path.parent)):
            with Program(*PYTHON, SERVER, "--port", "0", "--log", path) as program:
                self.assertEqual(program.wait(), 1)
                self.assertRegex(program.errors(), r"^Cannot use \S+: [^\n]+; give --log another file\.\n$")

    def test_rename_and_deletion_lose_no_line(self) -> None:
        """At two thousand lines a second, each is in one file or the other."""
        with Server("--log", str(self.path), "--quiet") as server, server.peer() as ann:
            files = []
            for number in range(20 if LONG else 6):
                for part in range(20):
                    ann.send("".join(f"{number * 200 + part * 10 + i}\n" for i in range(10)))
                    time.sleep(0.005)  # the pace is what is tested
                target = self.path.with_suffix(f".{number}")
                eventually(self.path.exists)
                self.path.rename(target)
                files.append(target)
            ann.say("end")
            ann.half_close()
            ann.read_to_end()
            self.assertEqual(server.stop(), 0)
            text = "".join(file.read_text() for file in [*files, self.path] if file.exists())
            said = [line.partition(f"{ann.label}:")[2] for line in text.splitlines() if f" {ann.label}:" in line]
            self.assertEqual(said, [*(str(number) for number in range(200 * len(files))), "end"])

    def test_a_folder_that_vanishes_and_comes_back(self) -> None:
        folder = self.path.parent / "logs"
        folder.mkdir()
        self.path = folder / "chat.log"
        with Server("--log", str(self.path)) as server, server.peer() as ann:
            eventually(lambda: self.lines() == [f"* {ann.label} joined from 127.0.0.1"])
            shutil.rmtree(folder)
            for number in range(3):
                ann.say(str(number))
                server.expect(f"{ann.label}:{number}")
            eventually(lambda: "the chat goes on without a log" in server.errors())
            folder.mkdir()
            ann.say("again")
            eventually(self.path.exists)
            eventually(lambda: re.search(r"\* [1-3] lines not written\n", self.path.read_text()))
            eventually(lambda: f"{ann.label}:again" in self.lines())  # before that or after it
            self.assertEqual(server.errors().count("\n"), 1)

    def test_a_full_disk_is_told_of_and_heals(self) -> None:
        """The limit of a file's size stands for the disk; the last line before it may be torn."""
        prefix = (sys.executable, "-c", LIMITED)
        with Server("--log", str(self.path), "--quiet", prefix=prefix) as server, server.peer() as ann:
            for number in range(40):
                ann.say(f"{number}".ljust(100, "."))
                time.sleep(0.002)  # so that it is several batches
            eventually(lambda: "the chat goes on without a log" in server.errors())
            self.assertLess(self.path.stat().st_size, 2_001)
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
            ann.say("again")
            found = eventually(lambda: re.search(r" \* (\d+) lines not written\n", self.path.read_text()))
            eventually(lambda: f" {ann.label}:again\n" in self.path.read_text())  # before that or after it
            # Some of the last batch before may have been written all the same.
            self.assertGreaterEqual(self.path.read_text().count("\n") - 2 + int(found[1]), 1 + 40)

    def test_a_device_that_is_always_full_stops_nothing(self) -> None:
        with Server("--log", "/dev/full") as server, server.peer() as ann, server.peer() as bob:
            for number in range(5):
                ann.say(str(number))
                bob.expect(f"{ann.label}:{number}")
            for peer in (ann, bob):
                peer.close()
            self.assertEqual(server.stop(), 0)
            self.assertEqual(server.errors().count("\n"), 1)

    @unittest.skipUnless(os.geteuid() == 0 and shutil.which("mount"), "needs root: to mount a small disk")
    def test_a_disk_that_fills_and_empties(self) -> None:
        folder = self.path.parent / "disk"
        folder.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True
        ).returncode:
            self.skipTest("needs root: with the right to mount")
        self.addCleanup(subprocess.run, ["umount", "-l", str(folder)], check=True)
        self.path = folder / "chat.log"
        with Server("--log", str(self.path), "--quiet") as server, server.peer() as ann:
            for number in range(1_500):
                ann.say(f"{number}".ljust(100, "."))
            eventually(lambda: "the chat goes on without a log" in server.errors())

            told: list[str] = []

            def writes_again() -> bool:  # what is still queued may fill it once more, in the middle of a line
                text = self.path.read_text() if self.path.exists() else ""
                told.extend(re.findall(r" \* \d+ lines not written\n", text))
                if told and text.endswith(f" {ann.label}:the end\n"):
                    return True
                self.path.unlink(missing_ok=True)
                ann.say("the end")
                return False

            eventually(writes_again)
            self.lines()


# Limits the size of the files that the program in its arguments can write.
LIMITED = """
import os, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 1 << 30))
os.execv(sys.argv[1], sys.argv[1:])
"""
