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
from unittest import mock

import mychatserver
from mychatserver import HISTORY_BYTES, Batch, History
from tests.support import SERVER, Background, Connection, Peer, Program, Server, TestCase, eventually, numbered_lines

LIVE = "* live from here"
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d ")


class HistoryTests(TestCase):
    def test_a_newcomer_is_told_the_last_lines(self) -> None:
        with Server("--history", "3") as server, server.peer() as ann:
            ann.send("".join(f"{number}\n" for number in range(1)))
            server.expect(f"{ann.label}:0")
            with server.peer() as bob:
                bob.expect("* the last line:", f"{ann.label}:0", LIVE)
                bob.say("Hi!")
                ann.expect(f"{bob.label}:Hi!")
                server.expect(f"{bob.label}:Hi!")
                with server.peer() as carol:
                    carol.expect("* the last 2 lines:", f"{ann.label}:0", f"{bob.label}:Hi!", LIVE)
                    ann.send("/nick ann\n1\n2\n")  # no notice is told again
                    carol.expect(f"* {ann.label} is now ann", "ann:1", "ann:2")
                    server.expect(f"* {ann.label} is now ann", "ann:1", "ann:2")
                    with server.peer() as dave:
                        dave.expect("* the last 3 lines:", f"{bob.label}:Hi!", "ann:1", "ann:2", LIVE)
                        ann.say("3")
                        dave.expect("ann:3")

    def test_notices_of_people_on_other_servers_are_no_lines(self) -> None:
        history, link = mychatserver.History(3), Connection()
        for lines in (
            b"ann@oslo:1\n* bob@oslo joined\n",
            b"* bob@oslo left\n",
            b"* ann@oslo is now al@oslo\nal@oslo:2\n",
        ):
            history.add(mychatserver.Batch([(link, lines)]))
            told = b"".join(history.told())
        self.assertEqual(told, b"* the last 2 lines:\nann@oslo:1\nal@oslo:2\n* live from here\n")
        self.assertEqual(history._bytes, len(b"ann@oslo:1\nal@oslo:2\n"))

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
                heading = (f"* 2 here: {ann.label}, {bob.label} (you)", "* the last line:")
                bob.expect(*heading, f"{ann.label}:0", LIVE)

    def test_no_gap_and_no_double_between_history_and_live(self) -> None:
        """Twenty talk while fifty join: each hears, from the first line it is told on, what one who was there heard."""
        with Server("--history", "500", "--quiet") as server, server.peer() as witness:
            background = Background()
            talkers = [server.peer() for _ in range(20)]
            heard: list[bytes] = []

            def talk(number: int, peer: Peer) -> None:
                for line in range(200):
                    peer.say(f"{number}.{line}")
                    time.sleep(0.002)  # while others join

            def listen(peer: Peer) -> None:
                peer.half_close()
                listening.append(peer)

            listening: list[Peer] = []
            with contextlib.ExitStack() as stack:
                for number, peer in enumerate(talkers):
                    stack.enter_context(peer)
                    background.run(talk, number, peer)
                joined = []
                for _ in range(50):
                    joined.append(stack.enter_context(server.peer()))
                    witness.line()
                background.join()
                witness.say("end")
                for peer in joined:
                    lines: list[bytes] = []
                    while not lines or not lines[-1].endswith(b":end"):
                        lines.append(peer.line())
                    joined_lines = [line for line in lines if not line.startswith(b"* ")]
                    if lines[0].startswith(b"* the last"):
                        self.assertLessEqual(lines.index(LIVE.encode()), 501)
                    heard = joined_lines if len(joined_lines) > len(heard) else heard
                    stack.callback(self.assertEqual, joined_lines, heard[-len(joined_lines) :])
                for peer in joined[1:]:
                    self.assertTrue(peer)
                # The first to join has the longest: all others have a tail of it.
                self.assertGreater(len(heard), 1_000)

    def test_a_pour_goes_on_with_a_long_history(self) -> None:
        lines = numbered_lines(400_000)
        with Server("--history", "100000", "--quiet") as server, server.peer() as ann, server.peer() as bob:
            background = Background()
            background.run(ann.send, lines)
            label = f"{ann.label}:".encode()
            got = b""
            count = 0
            while count < 400_000:
                got = bob.socket.recv(1 << 20)
                count += got.count(b"\n")
            background.join()
            with server.peer() as late:
                heading = late.line()
                found = re.fullmatch(rb"\* the last (\d+) lines:", heading)
                assert found
                number = int(found[1])
                self.assertLess(number * (len(label) + 100), HISTORY_BYTES + 1)
                self.assertGreater((number + 1) * (len(label) + 100), HISTORY_BYTES)
                told = [late.line() for _ in range(number)]
                self.assertEqual(told, [label + line for line in lines.split(b"\n")[-number - 1 : -1]])
                late.expect(LIVE)

    def test_newcomers_share_what_they_are_told(self) -> None:
        """In one block and in many, while somebody says more between them."""
        history = History(100_000)
        client = mock.Mock(label="ann")
        said = b""
        for number in range(300):
            lines = f"{number}\n".encode() * 2_000
            said += lines
            history.add(Batch([(client, lines)]))
            first, second = history.told(), history.told()
            self.assertLess(len(first), 40)
            self.assertEqual(history._bytes, sum(len(block) for block, _ in history._blocks))
            self.assertTrue(all(a.obj is b.obj for a, b in zip(first[1:-1], second[1:-1])))
            text = b"".join(first[1:-1])
            self.assertTrue(said.endswith(text))
            expected = min(said.count(b"\n"), 100_000)
            self.assertTrue(text.count(b"\n") == expected or len(text) > HISTORY_BYTES - 10)
            self.assertIn(str(text.count(b"\n")).encode(), bytes(first[0]))

    def test_renames_alone_are_not_kept(self) -> None:
        history = History(3)
        for _ in range(1_000):
            history.add(Batch([(None, b"* 1 is now a\n")]))
        self.assertEqual((len(history._blocks), history.told()), (0, []))

    def test_what_is_kept_is_bounded(self) -> None:
        """By lines and by bytes, whatever the batches are, however often it is told."""
        for size, lines, told in ((100, 3, 3), (1, 100_000, 100_000), (300_000, 3, 3), (300_000, 9, 3)):
            for asks in (1, 2):
                history = History(lines)
                client = mock.Mock(label="ann")
                for number in range(200_000 if size == 1 else 20):
                    history.add(Batch([(client, (f"{number}".encode().ljust(size - 1, b".") + b"\n")[-size - 9 :])]))
                self.assertLess(history._bytes, 2 * HISTORY_BYTES)
                for _ in range(asks):
                    text = b"".join(history.told())
                    self.assertLess(len(history.told()), 40)
                self.assertEqual(text.count(b"\n") - 2, told)
                self.assertTrue(text.endswith(b"\n* live from here\n"))
                self.assertLessEqual(history._bytes, HISTORY_BYTES)
                self.assertEqual(history._bytes, sum(len(block) for block, _ in history._blocks))

    def test_as_many_whole_lines_are_told_as_the_bytes_hold(self) -> None:
        """Of one block, and of two, the first of which is left out as a whole: the count is right then, too."""
        client = mock.Mock(label="ann")
        for blocks, told in (
            ([b"aaaa\n" * 4], b"* the last 2 lines:\naaaa\naaaa\n"),
            ([b"aaaaa\nbbbb\n"], b"* the last line:\nbbbb\n"),
            ([b"aaaa\n", b"bbbb\ncc\n"], b"* the last 2 lines:\nbbbb\ncc\n"),
        ):
            with mock.patch.multiple(mychatserver, HISTORY_BYTES=10, HISTORY_BLOCK_BYTES=1):
                history = History(9)
                for block in blocks:
                    history.add(Batch([(client, block)]))
                    history.told()
                for _ in range(2):
                    self.assertEqual(b"".join(history.told()), told + b"* live from here\n")


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
            with server.peer() as ann, server.peer() as bob:
                ann.send("/nick añn\nHi! \n")
                bob.expect(f"* {ann.label} is now añn", "añn:Hi! ")
                bob.say("/msg añn secret")
                ann.expect(f"* {ann.label} is now añn", f"* {bob.label} to you: secret")
                bob.say("exit")
                bob.expect_end()
                expected = [
                    *(f"* {peer.label} joined" for peer in (ann, bob)),
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

    def test_a_log_is_continued(self) -> None:
        for _ in range(2):
            with Server("--log", str(self.path)) as server, server.peer():
                self.assertEqual(server.stop(), 0)
        self.assertEqual([line.split(" ")[2] for line in self.lines()], ["joined", "left"] * 2)

    def test_a_path_that_cannot_be_written(self) -> None:
        for path in (str(self.path / "x"), str(self.path.parent)):
            with Program(sys.executable, SERVER, "--port", "0", "--log", path) as program:
                self.assertEqual(program.wait(), 1)
                self.assertRegex(program.errors(), r"^Cannot write to \S+: [^\n]+; give --log another file\.\n$")

    def test_rename_and_deletion_lose_no_line(self) -> None:
        """At two thousand lines a second, each is in one file or the other."""
        with Server("--log", str(self.path), "--quiet") as server, server.peer() as ann:
            files = []
            for number in range(20):
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
            self.assertEqual(said, [*(str(number) for number in range(4_000)), "end"])

    def test_a_folder_that_vanishes_and_comes_back(self) -> None:
        folder = self.path.parent / "logs"
        folder.mkdir()
        self.path = folder / "chat.log"
        with Server("--log", str(self.path)) as server, server.peer() as ann:
            eventually(lambda: self.lines() == [f"* {ann.label} joined"])
            shutil.rmtree(folder)
            for number in range(3):
                ann.say(str(number))
                server.expect(f"{ann.label}:{number}")
            eventually(lambda: "the chat goes on without a log" in server.errors())
            folder.mkdir()
            ann.say("again")
            eventually(lambda: re.search(r"again: \d lines were not written", server.errors()))
            self.assertEqual(self.lines()[-1], f"{ann.label}:again")
            self.assertEqual(server.errors().count("\n"), 2)

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
            eventually(lambda: self.path.read_text().endswith(f"{ann.label}:again\n"))
            found = eventually(lambda: re.search(r"again: (\d+) lines were not written", server.errors()))
            self.assertEqual(self.path.read_text().count("\n") - 1 + int(found[1]), 1 + 40)

    def test_a_device_that_is_always_full_stops_nothing(self) -> None:
        with Server("--log", "/dev/full") as server, server.peer() as ann, server.peer() as bob:
            for number in range(5):
                ann.say(str(number))
                bob.expect(f"{ann.label}:{number}")
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

            def writes_again() -> bool:  # what is still queued may fill it once more
                self.path.unlink(missing_ok=True)
                ann.say("again")
                return bool(re.search(r"again: \d+ lines were not written", server.errors()))

            eventually(writes_again)
            ann.say("the end")
            eventually(lambda: self.lines()[-1:] == [f"{ann.label}:the end"])


# Limits the size of the files that the program in its arguments can write.
LIMITED = """
import os, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 1 << 30))
os.execv(sys.argv[1], sys.argv[1:])
"""
