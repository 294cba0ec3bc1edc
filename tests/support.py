"""Real servers, peers, programs and terminals. Whatever waits has a deadline; nothing outlives its test."""

from __future__ import annotations

import ast
import collections
import contextlib
import fcntl
import hashlib
import os
import pathlib
import pty
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import unittest
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast
from unittest import mock

import mychatserver

ROOT = pathlib.Path(__file__).resolve().parent.parent
SERVER = str(ROOT / "mychatserver.py")
CLIENT = str(ROOT / "mychatclient.py")
# What runs the programs: without what is installed beside the standard library, on which they must not depend.
PYTHON = sys.executable, "-S"
SECONDS = 60.0  # for anything that should happen soon: generous, as machines may be busy
LOOPBACK = "127.0.0.1"

# Gives the program that its arguments name the terminal on descriptor 0 as its own, so that Ctrl-C reaches it.
TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)
# For Server's ``setup``: what it accepts takes a few KB at once, not megabytes, so that little makes a backlog.
SMALL_BUFFERS = """
import socket
listen = socket.socket.listen
def listen_small(sock, *queue):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)  # those that are accepted have it from here
    listen(sock, *queue)
socket.socket.listen = listen_small
"""
COLOURS = re.compile("\x1b\\[[0-9;]*m")

# Runs the program that its first argument names, with the constants of the second one changed; as a module, since
# Python keeps those compiled: that is a third of the work of starting.
LAUNCHER = """
import importlib, os.path, sys
_, path, constants, *arguments = sys.argv
sys.path.insert(0, os.path.dirname(path))
module = importlib.import_module(os.path.basename(path)[: -len(".py")])
for name, value in eval(constants).items():
    vars(module)[name]  # a KeyError tells of a constant that is no more
    setattr(module, name, value)
sys.argv = [path, *arguments]
sys.exit(module.main())
"""

# For a client at a server that asks for a password, on a machine so busy that it asks late.
ASKED = {"ASKED_SECONDS": SECONDS, "QUESTION_SECONDS": SECONDS}


class Overdue(AssertionError):
    """Something did not happen in time."""


def eventually(what: Callable[[], Any], message: str = "", seconds: float = SECONDS) -> Any:
    """Return the first true result of ``what``; fail when there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        result = what()
        if result:
            return result
        if time.monotonic() > deadline:
            raise Overdue(message or f"not true within {seconds} s")
        time.sleep(0.01)  # between looks at another process, which cannot notify this one


def command_of(program: str, constants: Mapping[str, object] | None = None, setup: str = "") -> tuple[str, ...]:
    """Return the command that runs ``SERVER`` or ``CLIENT``.

    ``constants`` stand in for its module's own, where a test cannot wait as long as they say; ``setup`` is run first.
    """
    return *PYTHON, "-c", f"{setup}\n{LAUNCHER}", program, repr(dict(constants or {}))


class TestCase(unittest.TestCase):
    """A test that fails, too, when a thread of its own ends with an exception that nobody caught."""

    def run(self, result: unittest.TestResult | None = None) -> unittest.TestResult | None:
        uncaught: list[threading.ExceptHookArgs] = []
        self.addCleanup(lambda: self.assertEqual([str(problem) for problem in uncaught], []))
        with mock.patch.object(threading, "excepthook", uncaught.append):
            return super().run(result)


class Program:
    """A program whose standard output is read line by line as it comes."""

    def __init__(
        self,
        *command: str,
        keep_input: bool = False,
        output: int = subprocess.PIPE,
        prefix: tuple[str, ...] = (),
        errors: int | None = None,
    ) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self.process = subprocess.Popen(
            [*prefix, *command],
            stdin=subprocess.PIPE if keep_input else subprocess.DEVNULL,
            stdout=output,
            stderr=self._errors if errors is None else errors,
            bufsize=0,
        )
        # Guards what follows; notified of more output, and of its end.
        self._changed = threading.Condition()
        self._output = bytearray()
        self._unread = 0
        self._ended = False
        self.reading = threading.Event()
        self.reading.set()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        stream = self.process.stdout
        while stream and self.reading.wait() and (data := stream.read(65536)):
            with self._changed:
                self._output += data
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def output(self) -> bytes:
        """All output so far, whether asked for by line or not."""
        with self._changed:
            return bytes(self._output)

    def line(self) -> str:
        """Return the next line of output."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._output.find(b"\n", self._unread) >= 0 or self._ended, SECONDS):
                raise Overdue(f"no line; output so far: {self.output!r}; errors: {self.errors()}")
            end = self._output.find(b"\n", self._unread) + 1
            if not end:
                raise AssertionError(f"output ended: {self.output!r}; errors: {self.errors()}")
            line = self._output[self._unread : end - 1].decode()
            self._unread = end
            return line

    def wait_for_bytes(self, count: int) -> None:
        """Wait until there are so many bytes of output."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._output) >= count, SECONDS):
                raise Overdue(f"{len(self._output)} bytes of output, of {count}; errors: {self.errors()}")

    def expect(self, *lines: str) -> None:
        """Fail unless these are the next lines of output."""
        for expected in lines:
            line = self.line()
            if line != expected:
                raise AssertionError(f"expected {expected!r}, not {line!r}; errors: {self.errors()}")

    def send(self, data: bytes) -> None:
        assert self.process.stdin
        rest = memoryview(data)
        while rest:
            rest = rest[self.process.stdin.write(rest) :]

    def end_input(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()

    def errors(self) -> str:
        """Return what the program wrote to standard error so far."""
        file = self._errors.fileno()  # not read by seek(): the program writes where the shared offset is
        return os.pread(file, os.fstat(file).st_size, 0).decode()

    def wait(self) -> int:
        """Return the exit status, with all output in ``output``."""
        status = self.process.wait(SECONDS)
        self.reading.set()
        self._reader.join(SECONDS)
        return status

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.reading.set()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(SECONDS)
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()
        errors = self.errors()
        self._errors.close()
        if "Traceback" in errors or "Exception ignored" in errors:
            raise AssertionError(errors)


class Server(Program):
    """A server process on a free port; ready when this returns. Its connections are not lines to expect.

    ``constants`` stand in for its module's own, where a test cannot wait as long as they say; ``setup`` is run first.
    """

    def __init__(
        self,
        *options: str,
        prefix: tuple[str, ...] = (),
        constants: Mapping[str, object] | None = None,
        setup: str = "",
        keep_input: bool = False,
    ) -> None:
        command = command_of(SERVER, constants, setup)
        super().__init__(*command, "--port", "0", *options, keep_input=keep_input, prefix=prefix)
        try:
            self.first_line = self.line()
            self.port = int(self.first_line.rpartition(":")[2])
        except BaseException:
            self.__exit__()
            raise

    def connect(self, host: str, **options: Any) -> Peer:
        """Return a peer that may not yet be in the room."""
        return Peer(host, self.port, **options)

    def newcomer(self) -> tuple[str, int]:
        """Return the address of the next one to enter the room; pass over chat lines, renames and goings."""
        passing = re.compile(r"[^ :*]+:|\* \S+ is now |Connection closed|Others join with|No address was found")
        while not (line := self.line()).startswith("New connection from : "):
            if not passing.match(line):
                raise AssertionError(line)
        host, port = ast.literal_eval(line.partition(" : ")[2])
        return host, port

    def peer(self, host: str = LOOPBACK, **options: Any) -> Peer:
        """Return a peer that is in the room: the console has said so, perhaps after others have come."""
        peer = self.connect(host, **options)
        while self.newcomer() != peer.address:
            pass
        return peer

    def pass_over(self) -> None:
        """Have nothing that was shown so far be a line to expect."""
        with self._changed:
            self._unread = len(self._output)

    def wait_until_empty(self) -> None:
        """Wait until everyone who has come has left."""
        eventually(lambda: self.output.count(b"Connection closed\n") == self.output.count(b"New connection from : "))

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; return the exit status."""
        self.process.send_signal(number)
        return self.wait()

    # What Linux tells of the process.

    def _status(self, field: str) -> int:
        text = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"^{field}:\s+(\d+)", text, re.MULTILINE)
        assert found
        return int(found[1])

    def memory(self) -> int:
        """Return resident bytes."""
        return self._status("VmRSS") * 1024

    def threads(self) -> int:
        return self._status("Threads")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def work(self) -> tuple[int, float]:
        """Return how often its threads, all together, have woken from a wait so far, and their seconds of CPU time."""
        wake_ups = 0
        for task in pathlib.Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has just ended
                found = re.search(r"^voluntary_ctxt_switches:\s+(\d+)", (task / "status").read_text(), re.MULTILINE)
                wake_ups += int(found[1]) if found else 0
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return wake_ups, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Peer:
    """A socket that speaks the wire, like ``nc``; every wait has a deadline."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        source: tuple[str, int] | None = None,
        receive_buffer: int = 0,
        segment: int = 0,
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.socket(family)
        if receive_buffer:  # before connecting, or the window is already larger
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if segment:  # loopback's of 64 KB come in lumps, and a slow reader takes nothing in between
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, segment)
        self.socket.settimeout(SECONDS)
        try:
            if source:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self.socket.bind(source)
            self.socket.connect((host, port))
        except OSError:
            self.socket.close()
            raise
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.address: tuple[str, int] = self.socket.getsockname()[:2]
        self.label = str(self.address[1])
        self._lines: collections.deque[bytes] = collections.deque()
        self._unfinished = b""

    def send(self, data: str | bytes) -> None:
        self.socket.sendall(data.encode() if isinstance(data, str) else data)

    def say(self, line: str) -> None:
        self.send(f"{line}\n")

    def line(self) -> bytes:
        """Return the next line, without its end."""
        while not self._lines:
            data = self.socket.recv(1 << 20)
            if not data:
                raise AssertionError(f"closed by the server, with {self._unfinished[-200:]!r} unfinished")
            *lines, self._unfinished = (self._unfinished + data).split(b"\n")
            self._lines.extend(lines)
        return self._lines.popleft()

    def expect(self, *lines: str | bytes) -> None:
        """Fail unless these are the next lines."""
        for expected in lines:
            line = self.line()
            if line != (expected.encode() if isinstance(expected, str) else expected):
                raise AssertionError(f"expected {expected!r}, not {line[:200]!r}")

    def wait_for(self, label: str, line: str) -> None:
        """Pass over what others say until the next line of ``label``; fail unless it is ``line``."""
        deadline = time.monotonic() + SECONDS
        start = f"{label}:".encode()
        while not (heard := self.line()).startswith(start):
            if time.monotonic() > deadline:
                raise Overdue(f"{label} is not heard")
        if heard != start + line.encode():
            raise AssertionError(f"expected {line!r}, not {heard[:200]!r}")

    def expect_end(self) -> None:
        """Fail unless the stream ends here."""
        with contextlib.suppress(ConnectionResetError):
            data = self._taken() or self.socket.recv(1 << 20)
            if data:
                raise AssertionError(f"expected the end, not {data[:200]!r}")

    def read_to_end(self) -> bytes:
        """Return all that comes until the server closes, or the connection is reset."""
        parts = [self._taken()]
        with contextlib.suppress(ConnectionResetError):
            while data := self.socket.recv(1 << 20):
                parts.append(data)
        return b"".join(parts)

    def ignore(self) -> None:
        """Read until the server closes, or the connection is reset; keep nothing: it may be gigabytes of a flood."""
        with contextlib.suppress(ConnectionResetError):
            while self.socket.recv(1 << 20):
                pass

    def _taken(self) -> bytes:
        """Return what was received but not asked for."""
        data = b"".join(line + b"\n" for line in self._lines) + self._unfinished
        self._lines.clear()
        self._unfinished = b""
        return data

    def half_close(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close so that the other side sees a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.socket.close()

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


class SharedServerTestCase(TestCase):
    """A class whose tests share one server; each finds nobody in it."""

    options: tuple[str, ...] = ()
    constants: Mapping[str, object] | None = None
    server: Server

    @classmethod
    def setUpClass(cls) -> None:
        cls.server = Server(*cls.options, constants=cls.constants)
        cls.addClassCleanup(cls.server.__exit__)

    def setUp(self) -> None:
        self.server.pass_over()
        self.addCleanup(self.server.wait_until_empty)  # the last of the cleanups

    def peer(self, host: str = LOOPBACK, **options: Any) -> Peer:
        """Return a peer that is in the room until the test ends."""
        peer = self.server.peer(host, **options)
        self.addCleanup(peer.close)
        return peer

    def two_announced(self) -> tuple[Peer, Peer]:
        """Return two peers of a server with ``--announce``, of whom all that is told has been heard."""
        ann = self.peer()
        for _ in range(2):  # the second is answered when all others have been told of ann: nobody yet
            ann.expect(f"* 1 here: {ann.label} (you)")
            ann.say("/who")
        ann.expect(f"* 1 here: {ann.label} (you)")
        bob = self.peer()
        ann.expect(f"* {bob.label} joined")
        bob.expect(f"* 2 here: {ann.label}, {bob.label} (you)")
        return ann, bob


def unread(server: Server, peer: Peer) -> int:
    """Return the bytes that ``peer`` has sent and the server has not read, as Linux tells of an IPv4 connection."""
    ends = f":{server.port:04X}", f":{peer.address[1]:04X}"
    count = 0
    for row in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, _, queues, *_ = row.split()
        unacknowledged, unread_here = (int(size, 16) for size in queues.split(":"))
        if local.endswith(ends[0]) and remote.endswith(ends[1]):
            count += unread_here
        elif local.endswith(ends[1]) and remote.endswith(ends[0]):
            count += unacknowledged
    return count


def as_text(output: bytes) -> str:
    """Return what a terminal was sent, with plain newlines, without colours."""
    return COLOURS.sub("", output.decode(errors="replace").replace("\r\n", "\n"))


class Terminal:
    """A program in a pseudo-terminal of its own, or not its own, as under ``su -c``."""

    def __init__(self, *command: str, rows: int = 24, columns: int = 80, own: bool = True) -> None:
        self._master, slave = pty.openpty()
        self.before = termios.tcgetattr(slave)
        self._slave = slave
        self.resize(rows, columns)
        self.process = subprocess.Popen(
            [*((sys.executable, "-c", TAKE_TERMINAL) if own else ()), *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm"},
        )
        self.output = b""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str | bytes) -> None:
        rest = text.encode() if isinstance(text, str) else text
        while rest:
            rest = rest[os.write(self._master, rest) :]

    def screen(self) -> str:
        """Return all that was shown, with plain newlines, without colours."""
        return as_text(self.output)

    def drawn(self) -> str:
        """Return the end of what is shown by now."""
        self.read(0.02)
        return as_text(self.output[-2_000:])

    def wait_for(self, text: str, seconds: float = SECONDS, within: bool = False) -> None:
        """Wait until the screen ends with ``text``, or has it somewhere."""
        deadline = time.monotonic() + seconds
        while not (text in self.screen() if within else as_text(self.output[-8 * len(text) - 100 :]).endswith(text)):
            ended = self.process.poll() is not None
            if not self.read(min(1.0, deadline - time.monotonic())) and (ended or time.monotonic() > deadline):
                raise Overdue(f"{text!r} does not end {self.screen()!r}")

    def read(self, seconds: float, size: int = 65_536) -> bool:
        """Keep what is shown next, so many bytes at most; return whether anything came in time."""
        if seconds <= 0 or not select.select([self._master], [], [], seconds)[0]:
            return False
        self.output += os.read(self._master, size)
        return True

    def wait(self) -> int:
        """Return the exit status, with all that was shown in ``screen()``."""
        status = self.process.wait(SECONDS)
        while self.read(0.001):
            pass
        return status

    def attributes(self) -> list[Any]:
        """Return the terminal's settings, to be equal to ``before``."""
        return termios.tcgetattr(self._slave)

    def set_attributes(self, attributes: list[Any]) -> None:
        termios.tcsetattr(self._slave, termios.TCSANOW, attributes)

    def hold(self, held: bool) -> None:
        """Stop what is shown, as Ctrl-S does, but before this returns; or let it go on."""
        termios.tcflow(self._slave, termios.TCOOFF if held else termios.TCOON)

    def left_to_read(self) -> bytes:
        """Return what a shell would find typed ahead."""
        mode = termios.tcgetattr(self._slave)
        mode[3] &= ~termios.ICANON
        termios.tcsetattr(self._slave, termios.TCSANOW, mode)
        os.set_blocking(self._slave, False)
        try:
            return os.read(self._slave, 1_000)
        except BlockingIOError:
            return b""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)


class Background:
    """Runs functions in threads of the test; the first exception among them is raised at the end."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._problems: list[BaseException] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> threading.Thread:
        def guarded() -> None:
            try:
                function(*arguments)
            except BaseException as problem:
                self._problems.append(problem)

        thread = threading.Thread(target=guarded, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def join(self, seconds: float = SECONDS) -> None:
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if self._problems:
                raise self._problems[0]
            if thread.is_alive():
                raise Overdue("a background thread does not end")
        self._threads.clear()


def numbered_lines(count: int, width: int = 100, tag: str = "") -> bytes:
    """Return so many lines, each with its number and so many bytes long."""
    return b"".join(f"{tag}{number}".ljust(width - 1, ".").encode() + b"\n" for number in range(count))


def as_heard(label: str, lines: bytes) -> bytes:
    """Return ``lines`` as the others get them."""
    return b"".join(f"{label}:".encode() + line + b"\n" for line in lines.split(b"\n")[:-1])


class Listener:
    """Reads a peer's stream in a thread until it ends or has all that is expected; keeps a digest, not the bytes."""

    def __init__(self, peer: Peer, background: Background, expected: int, pace: int = 0) -> None:
        self._peer = peer
        self._expected = expected
        self._pace = pace  # bytes a second, 0 for as fast as it comes
        self._digest = hashlib.sha256()
        self.count = 0
        self.ended = False
        self.done = threading.Event()
        background.run(self._read)

    def _read(self) -> None:
        pause = threading.Event()
        try:
            while self.count < self._expected:
                piece = min(self._expected - self.count, max(1, self._pace // 20) if self._pace else 1 << 20)
                data = self._peer.socket.recv(piece)
                if not data:
                    self.ended = True
                    return
                self._digest.update(data)
                self.count += len(data)
                if self._pace:
                    pause.wait(len(data) / self._pace)  # the pace is what is tested
        except OSError:
            self.ended = True
        finally:
            self.done.set()

    def wait_for(self, count: int) -> None:
        """Wait until so many bytes have come."""
        eventually(lambda: self.count >= count, f"{count} bytes do not come", SECONDS * 2)

    def digest(self) -> bytes:
        """Return the digest of what has come so far."""
        return self._digest.digest()

    def check(self, expected: bytes) -> None:
        """Fail unless exactly these bytes came."""
        if self.count != len(expected) or self.digest() != hashlib.sha256(expected).digest():
            raise AssertionError(f"{self.count} bytes of {len(expected)}, or not the same")


@contextlib.contextmanager
def home_made_server(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """Accept one connection on a free port, which is returned, and give it to ``serve``."""
    background = Background()
    with socket.create_server((LOOPBACK, 0)) as listener:
        listener.settimeout(SECONDS)

        def accept() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(SECONDS)
                serve(connection)

        background.run(accept)
        yield listener.getsockname()[1]
        background.join()


def peer_when_listening(port: int) -> Peer:
    """Return a peer of a server that has just been started and does not say so."""

    def connected() -> Peer | None:
        try:
            return Peer(LOOPBACK, port)
        except OSError:
            return None

    peer: Peer = eventually(connected)
    return peer


def needs_command(name: str, package: str) -> Callable[[Any], Any]:
    """Skip a test where a program is not installed."""
    found = any(
        os.access(os.path.join(folder, name), os.X_OK) for folder in os.environ.get("PATH", "").split(os.pathsep)
    )
    return unittest.skipUnless(found, f"needs {name}: apt-get install {package}")


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


NEEDS_ROOT = unittest.skipUnless(os.geteuid() == 0, "needs root: sudo python -m unittest")
NEEDS_IPV6 = unittest.skipUnless(has_ipv6(), "needs IPv6: sysctl -w net.ipv6.conf.all.disable_ipv6=0")


def heard_line_by_line(test: TestCase, peers: list[Peer], background: Background, count: int) -> list[list[bytes]]:
    """Have all talk at once, so many lines each; fail unless each hears all of the others', once and in order."""
    heard: list[list[bytes]] = [[] for _ in peers]

    def talk(peer: Peer) -> None:
        for number in range(count):
            peer.say(f"{number}")

    def listen(peer: Peer, lines: list[bytes]) -> None:
        while len(lines) < count * (len(peers) - 1):
            lines.append(peer.line())

    for peer, lines in zip(peers, heard):
        background.run(listen, peer, lines)
        background.run(talk, peer)
    background.join()
    for peer, lines in zip(peers, heard):
        for other in peers:
            own = f"{other.label}:".encode()
            numbers = [int(line[len(own) :]) for line in lines if line.startswith(own)]
            test.assertEqual(numbers, [] if other is peer else list(range(count)))
    return heard


# For what takes long. Some of it .ci/run has run on one Python, and what differs between them on each.
LONG = "MYCHAT_LONG" in os.environ
once = unittest.skipUnless(LONG, "needs time: MYCHAT_LONG=1 python -m unittest")


_kept: list[socket.socket] = []


def free_port() -> int:
    """Return a port that nobody listens on, below those that systems give to who connects.

    Nobody else gets it from here as long as this process runs: it stays bound, which does not stop a server.
    """
    while True:
        port = random.randrange(20_000, 30_000)
        sock = socket.socket()
        with contextlib.suppress(OSError):  # taken
            sock.bind((LOOPBACK, port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # only now: somebody else's of the kind is taken
            _kept.append(sock)
            return port
        sock.close()


@contextlib.contextmanager
def without(*modules: str, error: str = "ImportError") -> Iterator[None]:
    """Have programs that try to import one of these modules get this exception."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"PYTHONPATH": folder}):
        for module in modules:
            pathlib.Path(folder, f"{module}.py").write_text(f"raise {error}('there is none here')\n")
        yield


# --- Parts of the server without a server: the one place that says how they are made ----------------------------------


class Console:
    """A console that shows nothing. While it is held, whoever relays stays in the middle of a round."""

    def __init__(self) -> None:
        self.given: list[bytes] = []  # in each round
        self.free = threading.Event()
        self.free.set()

    def give(self, pieces: Sequence[memoryview]) -> int:
        self.given.append(b"".join(pieces))
        assert self.free.wait(SECONDS)
        return 0

    def say(self, text: str) -> None:
        pass


def new_framer() -> mychatserver.Framer:
    return mychatserver.Framer()


def new_room(console: Console) -> mychatserver.Room:
    return mychatserver.Room(cast(Any, console), mychatserver.Limit(None, None))


def new_client(port: int = 1) -> tuple[mychatserver.Client, socket.socket]:
    """Return a client, not in any room, and its peer's end of the connection."""
    sock, peer = socket.socketpair()
    return mychatserver.Client(sock, (LOOPBACK, port), lambda _: None), peer
