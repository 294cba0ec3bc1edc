"""Real servers, peers, programs and terminals. Whatever waits has a deadline; nothing outlives its test."""

from __future__ import annotations

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
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import mychatserver

ROOT = pathlib.Path(__file__).resolve().parent.parent
SERVER = str(ROOT / "mychatserver.py")
CLIENT = str(ROOT / "mychatclient.py")
SECONDS = 60.0  # for anything that should happen soon: generous, as machines may be busy
LOOPBACK = "127.0.0.1"

# Gives the program that its arguments name the terminal on descriptor 0 as its own, so that Ctrl-C reaches it.
TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)
COLOURS = re.compile("\x1b\\[[0-9;]*m")


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
        self.output = b""
        self._unread = 0
        self._ended = False
        self._changed = threading.Condition()
        self.reading = threading.Event()
        self.reading.set()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        stream = self.process.stdout
        while stream and self.reading.wait() and (data := stream.read(65536)):
            with self._changed:
                self.output += data
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def line(self) -> str:
        """Return the next line of output."""
        with self._changed:
            if not self._changed.wait_for(lambda: b"\n" in self.output[self._unread :] or self._ended, SECONDS):
                raise Overdue(f"no line; output so far: {self.output!r}; errors: {self.errors()}")
            end = self.output.find(b"\n", self._unread) + 1
            if not end:
                raise AssertionError(f"output ended: {self.output!r}; errors: {self.errors()}")
            line = self.output[self._unread : end - 1].decode()
            self._unread = end
            return line

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
    """A server process on a free port; ready when this returns. Its connections are not lines to expect."""

    def __init__(self, *options: str, prefix: tuple[str, ...] = ()) -> None:
        super().__init__(sys.executable, SERVER, "--port", "0", *options, prefix=prefix)
        try:
            self.first_line = self.line()
            self.port = int(self.first_line.rpartition(":")[2])
        except BaseException:
            self.__exit__()
            raise

    def connect(self, host: str, **options: Any) -> Peer:
        """Return a peer that may not yet be in the room."""
        return Peer(host, self.port, **options)

    def peer(self, host: str = LOOPBACK, **options: Any) -> Peer:
        """Return a peer that is in the room: the console has said so, after chat lines, comings and goings."""
        peer = self.connect(host, **options)
        expected = f"New connection from : {peer.address}"
        passing = re.compile(
            r"[^ :*]+:|\* \S+ is now |New connection|Connection closed|Others join with|No address was found"
        )
        while (line := self.line()) != expected:
            if not passing.match(line):
                raise AssertionError(line)
        return peer

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

    def __init__(self, host: str, port: int, *, source: tuple[str, int] | None = None, receive_buffer: int = 0) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.socket(family)
        if receive_buffer:  # before connecting, or the window is already larger
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
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
        self._read(0.02)
        return as_text(self.output[-2_000:])

    def wait_for(self, text: str, seconds: float = SECONDS, within: bool = False) -> None:
        """Wait until the screen ends with ``text``, or has it somewhere."""
        deadline = time.monotonic() + seconds
        while not (text in self.screen() if within else as_text(self.output[-8 * len(text) - 100 :]).endswith(text)):
            if not self._read(deadline - time.monotonic()):
                raise Overdue(f"{text!r} does not end {self.screen()!r}")

    def _read(self, seconds: float, size: int = 65_536) -> bool:
        if seconds <= 0 or not select.select([self._master], [], [], seconds)[0]:
            return False
        self.output += os.read(self._master, size)
        return True

    def wait(self) -> int:
        """Return the exit status, with all that was shown in ``screen()``."""
        status = self.process.wait(SECONDS)
        while self._read(0.001):
            pass
        return status

    def attributes(self) -> list[Any]:
        """Return the terminal's settings, to be equal to ``before``."""
        return termios.tcgetattr(self._slave)

    def set_attributes(self, attributes: list[Any]) -> None:
        termios.tcsetattr(self._slave, termios.TCSANOW, attributes)

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

    def check(self, expected: bytes) -> None:
        """Fail unless exactly these bytes came."""
        if self.count != len(expected) or self._digest.digest() != hashlib.sha256(expected).digest():
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
    return unittest.skipUnless(found, f"needs {name}: install {package}")


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


# For what takes long and is the same on every Python: .ci/run has it run on one of them.
once = unittest.skipIf("MYCHAT_SHORT" in os.environ, "needs time: MYCHAT_SHORT leaves it out")


# Below those that systems give to who connects, or one could be taken before a server comes, or comes back.
PORTS = iter(random.sample(range(20_000, 30_000), 10_000))


def free_port() -> int:
    """Return a port that nobody listens on; in one process never the same twice."""
    for port in PORTS:
        with socket.socket() as sock, contextlib.suppress(OSError):  # taken
            sock.bind((LOOPBACK, port))
            return port
    raise AssertionError("no port is free")


@contextlib.contextmanager
def without(*modules: str, error: str = "ImportError") -> Iterator[None]:
    """Have programs that try to import one of these modules get this exception."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"PYTHONPATH": folder}):
        for module in modules:
            pathlib.Path(folder, f"{module}.py").write_text(f"raise {error}('there is none here')\n")
        yield


class Quiet:
    """A console that shows nothing."""

    def say(self, text: str) -> None:
        pass


class Connection(mychatserver.Client):
    """A client whose connection takes as many bytes as the test says."""

    def __init__(self, port: int = 1, takes: int = 1 << 30) -> None:
        self.sock = mock.Mock()
        super().__init__(self.sock, (LOOPBACK, port), self._ask)
        self.takes = takes
        self.heard = b""
        self.sent: list[int] = []  # pieces in each send
        self.asked = 0  # times that the server thread was asked to send

    def _ask(self, _: mychatserver.Client) -> None:
        self.asked += 1

    def _send(self, pieces: Sequence[memoryview]) -> int:
        self.sent.append(len(pieces))
        data = b"".join(pieces)[: self.takes]
        self.takes -= len(data)
        self.heard += data
        return len(data)
