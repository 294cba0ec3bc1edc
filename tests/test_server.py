"""The server as a program: its options, its output, its limits, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import unittest

import mychatserver
from tests.support import (
    LOOPBACK,
    NEEDS_IPV6,
    PYTHON,
    SECONDS,
    SERVER,
    Background,
    Peer,
    Program,
    Server,
    TestCase,
    as_heard,
    command_of,
    eventually,
    free_port,
    numbered_lines,
    peer_when_listening,
)

LINUX = unittest.skipUnless(sys.platform == "linux", "needs Linux: /proc tells of a process")


class Options(TestCase):
    def fails(self, *options: str, status: int, sentence: str) -> None:
        """Fail unless the server ends with this status and says so on standard error, in one line if status is 1."""
        with Program(*PYTHON, SERVER, *options) as program:
            self.assertEqual(program.wait(), status)
            self.assertEqual(program.output, b"")
            errors = program.errors()
            self.assertIn(sentence, errors)
            self.assertEqual(errors.count("\n"), status, errors)  # usage comes before what is wrong with arguments

    def test_version(self) -> None:
        with Program(*PYTHON, SERVER, "--version") as program:
            self.assertEqual(program.wait(), 0)
            self.assertEqual(program.output.decode(), f"mychatserver {mychatserver.__version__}\n")

    def test_bad_arguments_are_told_as_usage(self) -> None:
        for options, sentence in (
            (("--port", "abc"), "'abc' is not a number from 0 to 65535"),
            (("--port", "99999"), "'99999' is not a number from 0 to 65535"),
            (("--port", "-1"), "--port"),
            (("65536",), "'65536' is not a number from 0 to 65535"),
            (("12001", "--port", "12002"), "argument --port: not allowed with argument port"),
            (("--max-clients", "0"), "'0' is not a number from 1 to 1000000"),
            (("--max", "3"), "unrecognized arguments: --max"),
        ):
            with self.subTest(options=options):
                self.fails(*options, status=2, sentence=sentence)

    def test_the_port_needs_no_option(self) -> None:
        for arguments, port in (((), 12000), (("12001",), 12001), (("--port", "12001"), 12001), (("0",), 0)):
            self.assertEqual(mychatserver.parse_args(arguments).port, port)

    def test_a_port_that_is_taken(self) -> None:
        with Server() as server:
            self.fails("--port", str(server.port), status=1, sentence=f"Port {server.port} is taken: a server may be")

    def test_hosts_that_cannot_be(self) -> None:
        for host, sentence in (
            ("192.0.2.1", "192.0.2.1 is not an address of this machine"),
            ("no.such.host.invalid", "Unknown host 'no.such.host.invalid'"),
            ("", "Unknown host ''"),
            ("a" * 70, "Unknown host 'aaa"),
            ("a..b", "Unknown host 'a..b'"),
        ):
            with self.subTest(host=host):
                self.fails("--host", host, "--port", "0", status=1, sentence=sentence)

    def test_no_permission(self) -> None:
        """As for who may not listen on ports under 1024, also where the tests are root's."""
        setup = "import socket\ndef refuse(*_, **__): raise PermissionError(13, 'x')\nsocket.create_server = refuse"
        with Program(*command_of(SERVER, setup=setup), "--port", "80") as program:
            self.assertEqual(program.wait(), 1)
            sentence = "No permission to listen on port 80: choose one from 1024 up with --port.\n"
            self.assertEqual(program.errors(), sentence)

    @NEEDS_IPV6
    def test_ipv6(self) -> None:
        with Server("--host", "[::1]") as server:
            self.assertEqual(server.first_line, f"Server listening on [::1]:{server.port}")
            with server.peer("::1") as ann, server.peer("::1") as bob:
                ann.say("Hi!")
                bob.expect(f"{ann.label}:Hi!")

    @NEEDS_IPV6
    def test_all_addresses_of_both_families(self) -> None:
        """An IPv4 address that comes over IPv6 is shown as itself."""
        with Server("--host", "::") as server:
            eventually(lambda: "can join" in server.errors())
            with server.peer("::1") as ann, server.peer() as bob:
                ann.say("Hi!")
                bob.expect(f"{ann.label}:Hi!")

    def test_quiet_shows_connections_and_closings_but_no_lines(self) -> None:
        with Server("--quiet") as server:
            with server.peer() as ann, server.peer() as bob:
                ann.say("Hi!")
                bob.expect(f"{ann.label}:Hi!")
            server.expect("Connection closed", "Connection closed")
            self.assertEqual(server.stop(), 0)
            self.assertNotIn(b"Hi!", server.output)

    def test_not_on_loopback_others_are_told_how_to_join_and_the_user_is_warned(self) -> None:
        with Server("--host", "0.0.0.0") as server:
            line = server.line()
            self.assertRegex(line, r"^Others join with: python mychatclient.py \d+\.\d+\.\d+\.\d+ \d+$|^No address was")
            self.assertNotIn("127.", line)
            eventually(lambda: "can join" in server.errors())
            self.assertEqual(server.errors().count("\n"), 1)


class Ending(TestCase):
    def test_signals_let_everyone_go_and_free_the_port_at_once(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(number=number), Server() as server, server.peer() as ann, server.peer() as bob:
                ann.say("one")
                bob.expect(f"{ann.label}:one")
                server.process.send_signal(number)
                ann.expect_end()
                bob.expect_end()
                ann.close()  # bob stays: he is let go
                self.assertEqual(server.wait(), 0)
                self.assertEqual(server.output.count(b"Connection closed"), 2)
                self.assertEqual(server.errors(), "")
                with Program(*PYTHON, SERVER, "--port", str(server.port)) as next_one:
                    next_one.expect(f"Server listening on {LOOPBACK}:{server.port}")

    def test_what_was_said_before_the_end_still_arrives(self) -> None:
        lines = numbered_lines(30_000)
        with Server("--quiet") as server, server.peer() as ann, server.peer() as bob, server.peer() as cid:
            ann.send(lines)
            expected = as_heard(ann.label, lines)
            heard = b""
            while len(heard) < len(expected):
                heard += cid.socket.recv(1 << 20)
            server.process.send_signal(signal.SIGTERM)
            self.assertEqual(bob.read_to_end(), expected)
            self.assertEqual(server.wait(), 0)

    def test_what_some_have_heard_at_the_end_all_hear(self) -> None:
        """The last round is over before anybody is let go, though nothing is queued any more."""
        slow_sends = (
            "import socket, time\n"
            "send = socket.socket.sendmsg\n"
            "socket.socket.sendmsg = lambda *arguments: time.sleep(0.005) or send(*arguments)"
        )
        with Server("--quiet", setup=slow_sends) as server, contextlib.ExitStack() as stack:
            first, speaker, *others = (stack.enter_context(server.peer()) for _ in range(60))
            speaker.say("the last words")
            heard = f"{speaker.label}:the last words"
            first.expect(heard)
            server.process.send_signal(signal.SIGTERM)
            self.assertEqual({other.read_to_end() for other in others}, {f"{heard}\n".encode()})
            self.assertEqual(server.wait(), 0)

    def test_everyone_who_does_not_close_is_let_go_and_told_of_at_a_stop(self) -> None:
        with Server() as server:
            crowd = [Peer(LOOPBACK, server.port) for _ in range(300)]
            for _ in crowd:
                self.assertRegex(server.line(), "^New connection from : ")
            self.assertEqual(server.stop(), 0)
            self.assertEqual(server.output.count(b"Connection closed"), len(crowd))
            for peer in crowd:
                peer.close()

    def test_ctrl_c_before_the_server_listens(self) -> None:
        interrupt = (
            "import signal, socket\nsocket.socket.listen = lambda *arguments: signal.raise_signal(signal.SIGINT)"
        )
        with Program(*command_of(SERVER, setup=interrupt), "--port", "0") as program:
            self.assertEqual(program.wait(), 0)
            self.assertEqual((program.output, program.errors()), (b"", ""))

    def test_an_error_that_nobody_foresaw_ends_the_server_with_status_1(self) -> None:
        script = (
            "import threading, traceback\n"
            "threading.excepthook = lambda problem: print(problem.exc_value, flush=True)\n"
            "import socket\n"
            "socket.socket.accept = lambda sock: 1 / 0"
        )
        with Program(*command_of(SERVER, setup=script), "--port", "0") as program:
            port = int(program.line().rpartition(":")[2])
            with contextlib.suppress(ConnectionError):  # the server may be gone before the connection stands
                Peer(LOOPBACK, port).close()
            self.assertEqual(program.wait(), 1)
            self.assertIn(b"division by zero", program.output)

    def test_a_stop_in_the_middle_of_a_flood_with_someone_who_never_reads(self) -> None:
        with Server("--quiet") as server, server.peer() as pourer, server.peer(receive_buffer=8_192):
            background = Background()

            def pour() -> None:
                try:
                    while True:
                        pourer.send(numbered_lines(1_000))
                except OSError:
                    pass

            background.run(pour)
            background.run(pourer.ignore)
            with server.peer() as reader:
                reader.line()
                self.assertEqual(server.stop(), 0)
            background.join()
            self.assertEqual(server.errors(), "")


class Output(TestCase):
    def test_a_stopped_standard_output_stops_nothing_and_what_is_not_shown_is_counted(self) -> None:
        lines = numbered_lines(100_000)
        with Server() as server, server.peer() as ann, server.peer() as bob:
            server.reading.clear()  # one block more is read, then the pipe fills
            background = Background()
            background.run(ann.send, lines)
            expected = as_heard(ann.label, lines)
            heard = 0
            while heard < len(expected):
                heard += len(bob.socket.recv(1 << 20))
            background.join()
            server.reading.set()
            shown = missed = 0
            while shown + missed < 100_000:
                line = server.line()
                if line.startswith("* "):
                    missed += int(line.split()[1])
                    self.assertEqual(line, f"* {line.split()[1]} lines not shown")
                else:
                    shown += 1
            self.assertEqual(shown + missed, 100_000)
            self.assertGreater(missed, 0)
            ann.say("shown again")
            server.expect(f"{ann.label}:shown again")

    def test_a_standard_output_that_is_closed_later_ends_nothing(self) -> None:
        port = free_port()
        reading, writing = os.pipe()
        with open(reading, "rb") as output:
            server = Program(*PYTHON, SERVER, "--port", str(port), output=writing)
            os.close(writing)
            self.assertEqual(output.readline().decode(), f"Server listening on {LOOPBACK}:{port}\n")
        with server, Peer(LOOPBACK, port) as ann, Peer(LOOPBACK, port) as bob:
            eventually(lambda: self.hears(ann, bob))
            server.process.send_signal(signal.SIGTERM)
            self.assertEqual(server.wait(), 0)
            self.assertEqual(server.errors(), "")

    def test_standard_streams_that_are_closed_at_the_start(self) -> None:
        """No socket gets their numbers, so nothing that is shown goes to a client."""
        port = free_port()
        with Program("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *PYTHON, SERVER, "--port", str(port)) as program:
            with peer_when_listening(port) as ann, Peer(LOOPBACK, port) as bob:
                eventually(lambda: self.hears(ann, bob))
                bob.say("bye")
                ann.expect(f"{bob.label}:bye")
                program.process.send_signal(signal.SIGTERM)
                ann.expect_end()
            self.assertEqual(program.wait(), 0)

    def test_head_1_as_a_reader_of_the_output(self) -> None:
        head = subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert head.stdin
        with Program(*PYTHON, SERVER, "--port", "0", output=head.stdin.fileno()) as server:
            first, _ = head.communicate(timeout=SECONDS)
            port = int(first.rpartition(b":")[2])
            with Peer(LOOPBACK, port) as ann, Peer(LOOPBACK, port) as bob:
                eventually(lambda: self.hears(ann, bob))
            server.process.send_signal(signal.SIGTERM)
            self.assertEqual(server.wait(), 0)
            self.assertEqual(server.errors(), "")

    @staticmethod
    def hears(ann: Peer, bob: Peer) -> bool:
        """Say something, again and again: there is no console to tell when bob is in."""
        ann.say("anyone?")
        bob.socket.settimeout(0.1)  # until it is said again
        try:
            bob.expect(f"{ann.label}:anyone?")
        except OSError:
            return False
        bob.socket.settimeout(SECONDS)
        return True

    @LINUX
    def test_a_full_disk_ends_nothing(self) -> None:
        port = free_port()
        with (
            open("/dev/full", "wb") as full,
            Program(*PYTHON, SERVER, "--port", str(port), output=full.fileno()) as server,
        ):
            with peer_when_listening(port) as ann, Peer(LOOPBACK, port) as bob:
                eventually(lambda: self.hears(ann, bob))
            server.process.send_signal(signal.SIGTERM)
            self.assertEqual(server.wait(), 0)
            self.assertEqual(server.errors(), "")


class Limits(TestCase):
    @LINUX
    def test_two_hundred_connects_with_64_descriptors(self) -> None:
        """Those inside talk on, the server says so once and does not spin, and there is room when some leave."""
        with (
            Server(prefix=("sh", "-c", 'ulimit -n 64; exec "$@"', "sh")) as server,
            server.peer() as ann,
            server.peer() as bob,
        ):
            crowd = [Peer(LOOPBACK, server.port) for _ in range(200)]
            eventually(lambda: "Too many open files" in server.errors())
            wake_ups, seconds = server.work()
            started = time.monotonic()
            while time.monotonic() - started < 1:
                ann.say("still here")
                bob.expect(f"{ann.label}:still here")
                # Each exchange wakes a few threads; a loop that spins uses the CPU all the time.
                time.sleep(0.1)  # what the server does in between is what is measured
            more_wake_ups, more_seconds = (after - before for after, before in zip(server.work(), (wake_ups, seconds)))
            self.assertLess(more_wake_ups, 1_000)
            self.assertLess(more_seconds, 0.5)
            self.assertEqual(server.errors().count("\n"), 1)
            self.assertIn("ulimit -n", server.errors())
            for peer in crowd[:-1]:
                peer.close()
            crowd[-1].say("let in at last")
            bob.wait_for(crowd[-1].label, "let in at last")
            crowd[-1].close()

    @LINUX
    def test_a_full_standard_error_holds_up_nobody(self) -> None:
        """When there is something to say on it: those inside talk on, and the server stops when asked to."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, b"x" * 4_096)
        command = ("sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *PYTHON, SERVER, "--port", "0")
        with Program(*command, errors=writing) as program:
            port = int(program.line().rpartition(":")[2])
            with Peer(LOOPBACK, port) as ann, Peer(LOOPBACK, port) as bob:
                program.line(), program.line()
                crowd = [Peer(LOOPBACK, port) for _ in range(100)]
                seen = {program.line() for _ in range(40)}  # enough to be sure that the rest cannot get in
                self.assertTrue(all(line.startswith("New connection") for line in seen))
                for number in range(20):
                    ann.say(f"{number}")
                    bob.wait_for(ann.label, f"{number}")
                program.process.send_signal(signal.SIGTERM)
                self.assertEqual(program.wait(), 0)
            for peer in crowd:
                peer.close()
        os.close(reading)
        os.close(writing)

    def test_who_leaves_while_waiting_to_be_accepted_does_no_harm(self) -> None:
        with Server() as server:
            for _ in range(50):
                Peer(LOOPBACK, server.port).reset()
            with server.peer() as ann, server.peer() as bob:
                ann.say("Hi!")
                bob.expect(f"{ann.label}:Hi!")

    def test_no_more_threads(self) -> None:
        """A thread that cannot start is said once; its client is closed, and the others talk on."""
        script = (
            "import threading\n"
            "start, count = threading.Thread.start, 0\n"
            "def few(thread):\n"
            "    global count\n"
            "    count += thread.name.startswith('Thread')\n"
            "    if count == 3:\n"
            '        raise RuntimeError("can\'t start new thread")\n'
            "    start(thread)\n"
            "threading.Thread.start = few"
        )
        with Program(*command_of(SERVER, setup=script), "--port", "0") as program:
            port = int(program.line().rpartition(":")[2])
            with Peer(LOOPBACK, port) as ann, Peer(LOOPBACK, port) as bob:
                program.line(), program.line()
                with Peer(LOOPBACK, port) as third:
                    third.expect_end()
                with Peer(LOOPBACK, port) as fourth:
                    program.expect(f"New connection from : {fourth.address}")
                    ann.say("Hi!")
                    bob.expect(f"{ann.label}:Hi!")
                    fourth.expect(f"{ann.label}:Hi!")
                program.process.send_signal(signal.SIGTERM)
            self.assertEqual(program.wait(), 0)
            self.assertIn("can't start new thread", program.errors())
