"""Measures the server beside others under the same load: ``python tests/bench.py [--quick] [--json] [CELL ...]``.

Each cell starts fresh servers and runs ours and every rival in turn, several rounds of it, so that a machine that gets
slower or faster meanwhile slows all of them; what counts are the ratios in one run. The load comes from processes of
its own: one sends, one reads everybody's connection and counts lines, one reads a single connection, the probe, and
looks at each line. What is lost, doubled, torn or out of order at our server fails the benchmark.

Rivals: the textbook server and the bare relay beside this file, ``ncat --chat`` and ``nats-server`` where they are
installed. NATS is sent one message a line, and is asked, as the others do, not to echo. The bare relay only shows what
the load can bear. ``--before PATH`` adds another ``mychatserver.py``, of an earlier commit for example, as ``before``.
The ``load`` column tells how busy the busiest process of the load was: under 100 %, it was not what was measured.
Linux only: it reads /proc.

``hostile`` is a group of cells, run when named: a typist among fifty while others do their worst. There it is our
server against itself: the median and the worst of what the typist's lines take, the seconds from SIGTERM to the end
under the attack, and how many more threads than clients there were.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import functools
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import platform
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
SERVER = HERE.parent / "mychatserver.py"
LOOPBACK = "127.0.0.1"
LINE_BYTES = 32  # sender, number, time sent, newline
LINE = re.compile(rb"(\d{4})(\d{7})(\d{20})\r?\n")
LABELLED = re.compile(rb"(\d+(?:-\d+)?(?:@\w+)?):(\d{4})(\d{7})(\d{20})")
NUMBERS = 2_000  # an endless flood repeats these
GIVE_UP_SECONDS = 60.0  # without a line that is due
TYPIST = 9_999  # the number of the sender who types
FILES = tempfile.TemporaryDirectory()
FORK = multiprocessing.get_context("fork")  # the load's processes share the connections

Figures = dict[str, float]


class Failed(Exception):
    """A server did not do what the cell asks; the text says what."""


# --- The servers: how each is started and parse to -------------------------------------------------------------------


class Rival:
    """A server program and its wire; this one is ours."""

    name = "ours"
    newlines = 1  # in what is received for a line
    most_clients = 20_000
    keeps_lines = True  # each whole, with a label of its own: then the probe checks them all
    program = SERVER

    def command(self, port: int) -> list[str]:
        return [sys.executable, str(self.program), "--quiet", "--port", str(port)]

    def secure(self, sock: socket.socket) -> socket.socket:
        """Return the connection with what encrypts it."""
        return sock

    def greet(self, sock: socket.socket) -> None:
        """Do what the wire asks before the first line."""

    def frame(self, lines: bytes) -> bytes:
        """Return ``lines`` as they are sent."""
        return lines


class Before(Rival):
    """Another file with our server."""

    name = "before"

    def __init__(self, program: pathlib.Path) -> None:
        self.program = program


class Textbook(Rival):
    name, keeps_lines = "textbook", False

    def command(self, port: int) -> list[str]:
        return [sys.executable, str(HERE / "textbook.py"), str(port)]


class Bare(Rival):
    name, keeps_lines = "bare", False

    def command(self, port: int) -> list[str]:
        return [sys.executable, str(HERE / "bare.py"), str(port)]


class Ncat(Rival):
    name, keeps_lines = "ncat", False
    most_clients = 1_000  # it waits with select()

    def command(self, port: int) -> list[str]:
        return ["ncat", "--chat", "-m", "1010", "-l", LOOPBACK, str(port)]

    def greet(self, sock: socket.socket) -> None:
        receive_until(sock, b"\n")  # it tells who else is there; its queue of those who connect is short


class Linked(Rival):
    """One of several servers that share a room over a NATS on a port."""

    def __init__(self, rival: Rival, nats_port: int, name: str) -> None:
        self.program = rival.program
        self._options = ["--nats", f"nats://{LOOPBACK}:{nats_port}", "--server-name", name]

    def command(self, port: int) -> list[str]:
        return super().command(port) + self._options


class Nats(Rival):
    name, keeps_lines = "nats", False
    newlines = 2

    def command(self, port: int) -> list[str]:
        return ["nats-server", "-a", LOOPBACK, "-p", str(port)]

    def greet(self, sock: socket.socket) -> None:
        receive_until(sock, b"\r\n")  # INFO
        sock.sendall(b'CONNECT {"verbose":false,"echo":false,"pedantic":false}\r\nSUB room 1\r\nPING\r\n')
        receive_until(sock, b"PONG\r\n")

    def frame(self, lines: bytes) -> bytes:
        head = b"PUB room %d\r\n" % (LINE_BYTES - 1)
        return head + lines[:-1].replace(b"\n", b"\r\n" + head) + b"\r\n"


class Secured(ssl.SSLSocket):
    """For the load, which asks for its sockets' readiness first: a record that has begun is as good as there."""

    def send(self, data: Any, flags: int = 0) -> int:
        return super().send(data)

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        return super().recv_into(buffer, nbytes)


class WithTls(Rival):
    """Ours or another, with TLS; the load does not look whose the server is."""

    def __init__(self, rival: Rival) -> None:
        pem = certificate()
        ours = ["--tls-cert", pem]
        options = {"ours": ours, "before": ours, "ncat": ["--ssl", "--ssl-cert", pem, "--ssl-key", pem]}
        if rival.name not in options:
            raise Failed("has no TLS here")
        self.name, self.keeps_lines, self.most_clients = rival.name, rival.keeps_lines, rival.most_clients
        self._rival, self._options = rival, options[rival.name]
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.check_hostname, self._context.verify_mode = False, ssl.CERT_NONE
        self._context.sslsocket_class = Secured

    def records(self, sock: socket.socket) -> Callable[[bytes], bytes]:
        """Shake hands; return what encrypts bytes, a record for each."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        secured = self._context.wrap_bio(incoming, outgoing)
        while True:
            try:
                secured.do_handshake()
                break
            except ssl.SSLWantReadError:
                sock.sendall(outgoing.read())
                incoming.write(sock.recv(65_536))
        sock.sendall(outgoing.read())

        def encrypted(text: bytes) -> bytes:
            for number in range(len(text)):
                secured.write(text[number : number + 1])
            return outgoing.read()

        return encrypted

    def command(self, port: int) -> list[str]:
        return [*self._rival.command(port), *self._options]

    def greet(self, sock: socket.socket) -> None:
        self._rival.greet(sock)

    def secure(self, sock: socket.socket) -> socket.socket:
        return self._context.wrap_socket(sock)


class WithOptions(Rival):
    """Ours with more options, and the password that they have it ask for."""

    def __init__(self, rival: Rival, options: Sequence[str], password: str = "") -> None:
        self.name, self._rival = rival.name, rival
        self._options, self._password = options, password.encode()

    def command(self, port: int) -> list[str]:
        return [*self._rival.command(port), *self._options]

    def greet(self, sock: socket.socket) -> None:
        if self._password:
            receive_until(sock, b"* password?\n")
            sock.sendall(self._password + b"\n")
            receive_until(sock, b"* password accepted\n")


@functools.cache
def certificate() -> str:
    """Return the file of a certificate and its key, made by openssl."""
    path = os.path.join(FILES.name, "tls.pem")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=bench"
    subprocess.run([*command.split(), "-keyout", path, "-out", f"{path}.cert"], check=True, capture_output=True)
    with open(path, "ab") as file, open(f"{path}.cert", "rb") as more:
        file.write(more.read())
    return path


def receive_until(sock: socket.socket, end: bytes) -> None:
    data = b""
    while not data.endswith(end):
        more = sock.recv(65_536)
        if not more:
            raise Failed("closed the connection")
        data += more


def rivals() -> list[Rival]:
    """Return all that can be run here, ours first; say what is not installed."""
    found: list[Rival] = [Rival(), Textbook(), Bare()]
    for rival, program in ((Ncat(), "ncat"), (Nats(), "nats-server")):
        if shutil.which(program):
            found.append(rival)
        else:
            print(f"{program} is not installed: not measured", file=sys.stderr)
    return found


class Served:
    """A running server, with connections in its room."""

    def __init__(self, rival: Rival, clients: int, receive_buffers: Sequence[int] = ()) -> None:
        if clients > rival.most_clients:
            raise Failed(f"takes {rival.most_clients} clients at most")
        self.rival = rival
        with socket.socket() as free:
            free.bind((LOOPBACK, 0))
            self.port = free.getsockname()[1]
        command = rival.command(self.port)
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.socks: list[socket.socket] = []
        try:
            if isinstance(rival, (Textbook, Bare)):
                assert self.process.stdout
                self.port = int(self.process.stdout.readline())
            for number in range(clients):
                self._join(receive_buffers[number] if number < len(receive_buffers) else 0)
                if isinstance(rival, Ncat) and number % 20 == 0:  # it tells everyone of everyone, and waits for them
                    self._settle(0.0)
        except BaseException:
            self.close()
            raise

    def _join(self, receive_buffer: int) -> None:
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while True:
            sock = socket.socket()
            try:
                if receive_buffer:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
                sock.connect((LOOPBACK, self.port))
                break
            except OSError as error:
                sock.close()
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise Failed(f"client {len(self.socks)} cannot connect: {error}") from error
                time.sleep(0.02)  # it has just been started, or its queue is full
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock = self.rival.secure(sock)
        self.rival.greet(sock)
        self.socks.append(sock)

    def all_served(self, elsewhere: Sequence[socket.socket] = ()) -> None:
        """Wait until everybody hears everybody: the last to connect says something until all others have heard it."""
        *others, last = self.socks
        others += elsewhere
        line = self.rival.frame(numbered(TYPIST, 1))
        waiting = {sock.fileno(): sock for sock in others}
        poller = select.epoll()
        for descriptor in waiting:
            poller.register(descriptor, select.EPOLLIN)
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while waiting:
            last.sendall(line)
            pause = time.monotonic() + 0.2
            while waiting and time.monotonic() < pause:
                for descriptor, _ in poller.poll(0.05):
                    if not waiting.pop(descriptor).recv(1 << 20):
                        raise Failed("closed a connection")
                    poller.unregister(descriptor)
            if time.monotonic() > deadline:
                raise Failed(f"{len(waiting)} clients hear nothing")
        poller.close()
        self._settle(elsewhere=elsewhere)

    def _settle(self, seconds: float = 0.5, elsewhere: Sequence[socket.socket] = ()) -> None:
        """Read what is said until nothing has come for so long."""
        poller = select.epoll()
        by_descriptor = {sock.fileno(): sock for sock in (*self.socks, *elsewhere)}
        for descriptor in by_descriptor:
            poller.register(descriptor, select.EPOLLIN)
        while ready := poller.poll(seconds):
            for descriptor, _ in ready:
                by_descriptor[descriptor].recv(1 << 20)
        poller.close()

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.process.pid)

    def memory(self, field: str = "VmHWM") -> int:
        """Return bytes that are resident, at the peak unless ``field`` is VmRSS."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"^{field}:\s+(\d+)", status, re.MULTILINE)
        return int(found[1]) * 1024 if found else 0

    def close(self) -> None:
        for sock in self.socks:
            sock.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process so far; /proc/PID/stat is too coarse. See clock_getcpuclockid(3)."""
    clock = ctypes.c_int()
    if ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)):
        raise Failed("the server has ended")
    return time.clock_gettime(clock.value)


# --- The load: processes that send, read and look at lines ------------------------------------------------------------


def numbered(sender: int, count: int) -> bytes:
    """Return so many lines of a sender, to be sent whenever."""
    return b"".join(b"%04d%07d%020d\n" % (sender, number, 0) for number in range(count))


class Worker:
    """A process of the load. It begins when told to, and returns one result."""

    def __init__(self, work: Callable[..., Any], *arguments: Any) -> None:
        self._work, self._arguments = work, arguments
        self._here, self._there = FORK.Pipe()
        self.process = FORK.Process(target=self._run, daemon=True)
        self.process.start()

    def _run(self) -> None:
        self._there.recv()
        try:
            result = self._work(*self._arguments)
            cpu = time.process_time()
            if callable(result):  # what is left to do is no load any more
                result = result()
        except Exception as error:
            result, cpu = error, 0.0
        self._there.send((result, cpu))

    def start(self) -> None:
        self._here.send(None)

    def has_ended(self) -> bool:
        return self._here.poll()

    def result(self, seconds: float = 3 * GIVE_UP_SECONDS) -> tuple[Any, float]:
        """Return what the work returned, and the CPU seconds that it took."""
        if not self._here.poll(seconds):
            raise Failed("does not finish")
        result, cpu = self._here.recv()
        self.process.join()
        if isinstance(result, Exception):
            raise result
        return result, cpu


@contextlib.contextmanager
def workers(*started: Worker) -> Iterator[None]:
    """End these processes at the end, whatever happened."""
    try:
        yield
    finally:
        for worker in started:
            worker.process.kill()
            worker.process.join()


def send_all(socks: Sequence[socket.socket], texts: Sequence[bytes]) -> None:
    """Send each its text, all at the same time."""
    left = {sock.fileno(): (sock, memoryview(text)) for sock, text in zip(socks, texts)}
    poller = select.epoll()
    for descriptor in left:
        poller.register(descriptor, select.EPOLLOUT)
    while left:
        for descriptor, _ in poller.poll():
            sock, text = left[descriptor]
            text = text[sock.send(text[:65_536], socket.MSG_DONTWAIT) :]
            left[descriptor] = sock, text
            if not text:
                del left[descriptor]
                poller.unregister(descriptor)


def flood(socks: Sequence[socket.socket], texts: Sequence[bytes], seconds: float) -> None:
    """Send each its text again and again, for so long; whole texts, so that no line is cut at the end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        send_all(socks, texts)


def flood_each(socks: Sequence[socket.socket], texts: Sequence[bytes], seconds: float) -> None:
    """As ``flood``, but nobody waits for the slowest among the senders; what is not sent at the end stays unsent."""
    left = {sock.fileno(): (sock, text, memoryview(text)) for sock, text in zip(socks, texts)}
    poller = select.epoll()
    for descriptor in left:
        poller.register(descriptor, select.EPOLLOUT)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for descriptor, _ in poller.poll(0.1):
            sock, whole, text = left[descriptor]
            text = text[sock.send(text[:65_536], socket.MSG_DONTWAIT) :]
            left[descriptor] = sock, whole, text or memoryview(whole)


def speak(rival: Rival, socks: Sequence[socket.socket], first: int, rate: float, seconds: float) -> int:
    """Send lines with the time on them at a steady rate, the senders in turn; return how many."""
    start = time.monotonic()
    count = int(rate * seconds)
    for number in range(count):
        pause = start + number / rate - time.monotonic()
        if pause > 0:
            time.sleep(pause)  # the pace is what is asked for
        turn, who = divmod(number, len(socks))
        line = b"%04d%07d%020d\n" % (first + who, turn, time.monotonic_ns())
        socks[who].sendall(rival.frame(line))
    return count


def count_all(socks: Sequence[socket.socket], expected: Sequence[int], exactly: bool) -> float:
    """Read everybody's connection until each has had so many newlines; return when that was."""
    poller = select.epoll()
    left = {sock.fileno(): (sock, count) for sock, count in zip(socks, expected) if count}
    for descriptor in left:
        poller.register(descriptor, select.EPOLLIN)
    buffer = bytearray(1 << 20)
    done = time.monotonic()
    while left:
        ready = poller.poll(GIVE_UP_SECONDS)
        if not ready:
            raise Failed(f"{len(left)} clients miss {sum(count for _, count in left.values())} lines")
        for descriptor, _ in ready:
            sock, count = left[descriptor]
            size = sock.recv_into(buffer, 0, socket.MSG_DONTWAIT)
            if not size:
                raise Failed("closed a connection")
            count -= buffer.count(b"\n", 0, size)
            left[descriptor] = sock, count
            if count <= 0:
                if count and exactly:
                    raise Failed(f"{-count} lines too many")
                done = time.monotonic()
                del left[descriptor]
                poller.unregister(descriptor)
    return done


def discard_all(socks: Sequence[socket.socket], seconds: float) -> None:
    """Read everybody's connection for so long."""
    poller = select.epoll()
    by_descriptor = {sock.fileno(): sock for sock in socks}
    for descriptor in by_descriptor:
        poller.register(descriptor, select.EPOLLIN)
    buffer = bytearray(1 << 20)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for descriptor, _ in poller.poll(0.1):
            if not by_descriptor[descriptor].recv_into(buffer, 0, socket.MSG_DONTWAIT):
                raise Failed("let a client go")


Pieces = list[tuple[int, bytes]]  # when it came, in nanoseconds; what came


def record(sock: socket.socket, seconds: float, newlines: int = 0, pace: int = 0) -> Pieces:
    """Keep all that comes for so long, or until so many newlines have come. Read ``pace`` bytes a second, if not 0."""
    pieces: Pieces = []
    deadline = time.monotonic() + seconds
    count, started, size = 0, time.monotonic(), 0
    sock.settimeout(0.1)  # nobody else uses this connection meanwhile
    while time.monotonic() < deadline and (not newlines or count < newlines):
        if pace and size > pace * (time.monotonic() - started):
            time.sleep(0.01)  # likewise
            continue
        with contextlib.suppress(TimeoutError, socket.timeout, BlockingIOError):
            data = sock.recv(65_536 if pace else 1 << 20)
            if not data:
                raise Failed("let the probe go")
            pieces.append((time.monotonic_ns(), data))
            size += len(data)
            count += data.count(b"\n") if newlines else 0
    return pieces


def probe(
    rival: Rival, sock: socket.socket, seconds: float, newlines: int = 0, pace: int = 0, repeats: bool = False
) -> Callable[[], dict[str, Any]]:
    """Record a connection; return what then looks at it."""
    started = time.monotonic_ns()
    pieces = record(sock, seconds, newlines, pace)
    return lambda: look_at(rival, pieces, started, repeats)


def look_at(rival: Rival, pieces: Pieces, started: int, repeats: bool) -> dict[str, Any]:
    """Return how late lines came, and how many of whom in each second; check that they are whole and in order."""
    if rival.keeps_lines:
        check(b"".join(data for _, data in pieces), repeats)
    delays: dict[int, list[float]] = {}
    windows: dict[int, dict[int, int]] = {}
    rest = b""
    for moment, data in pieces:
        data = rest + data
        rest = data[data.rfind(b"\n") + 1 :]
        window = (moment - started) // 1_000_000_000
        for sender, _, sent in LINE.findall(data):
            who = int(sender)
            of_window = windows.setdefault(window, {})
            of_window[who] = of_window.get(who, 0) + 1
            if sent != b"0" * 20:
                delays.setdefault(who, []).append((moment - int(sent)) / 1e6)
    return {"delays": delays, "windows": windows, "bytes": sum(len(data) for _, data in pieces)}


def check(stream: bytes, repeats: bool) -> None:
    """Raise Failed unless these are whole labelled lines, of each sender all from the first on, in their order."""
    following: dict[bytes, tuple[bytes, int]] = {}
    for line in stream.split(b"\n")[:-1]:
        found = LABELLED.fullmatch(line)
        if not found:
            raise Failed(f"a line is torn: {line[:80]!r}")
        label, sender, number = found[1], found[2], int(found[3])
        due = following.get(label, (sender, 0))
        if due != (sender, number):
            raise Failed(f"{line!r} where number {due[1]} was due")
        following[label] = sender, (number + 1) % NUMBERS if repeats else number + 1


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


# --- The cells: what is asked of every server -------------------------------------------------------------------------


def pour(rival: Rival, clients: int, senders: int, lines: int) -> Figures:
    """Have some of the clients send so many lines each; count what everybody hears. Checks every line at one."""
    with Served(rival, clients) as served:
        served.all_served()
        texts = [rival.frame(numbered(sender, lines)) for sender in range(senders)]
        expected = [
            rival.newlines * lines * (senders - 1 if number < senders else senders) for number in range(clients)
        ]
        *counted, probed = range(clients)
        counting = Worker(
            count_all,
            [served.socks[number] for number in counted],
            [expected[number] for number in counted],
            rival.keeps_lines,  # NATS says PING now and then
        )
        sending = Worker(send_all, served.socks[:senders], texts)
        watching = Worker(probe, rival, served.socks[probed], GIVE_UP_SECONDS, expected[probed])
        with workers(counting, sending, watching):
            cpu = served.cpu_seconds()
            started = time.monotonic()
            for worker in (watching, counting, sending):
                worker.start()
            done, counting_cpu = counting.result()
            cpu = served.cpu_seconds() - cpu
            memory = served.memory()
            (_, sending_cpu), (seen, watching_cpu) = sending.result(), watching.result()
        heard = sum(sum(window.values()) for window in seen["windows"].values())
        if rival.keeps_lines and heard != expected[probed]:
            raise Failed(f"the probe hears {heard} lines of {expected[probed]}")
        elapsed = done - started
        deliveries = sum(expected) // rival.newlines
        return {
            "M/s": deliveries / elapsed / 1e6,
            "ns/delivery": cpu / deliveries * 1e9,
            "cpu s": cpu,
            "MiB": memory / 2**20,
            "load %": 100 * max(counting_cpu, sending_cpu, watching_cpu) / elapsed,
        }


def talk(rival: Rival, clients: int, senders: int, rate: float, seconds: float) -> Figures:
    """Have some of the clients say lines at a steady rate in all; tell how late one hears them."""
    with Served(rival, clients) as served:
        served.all_served()
        *others, probed = served.socks
        discarding = Worker(discard_all, others, seconds + 1)
        speaking = Worker(speak, rival, served.socks[:senders], 0, rate, seconds)
        watching = Worker(probe, rival, probed, seconds + 1)
        with workers(discarding, speaking, watching):
            cpu = served.cpu_seconds()
            for worker in (watching, discarding, speaking):
                worker.start()
            said, speaking_cpu = speaking.result()
            _, discarding_cpu = discarding.result()
            seen, watching_cpu = watching.result()
            cpu = served.cpu_seconds() - cpu
        delays = [delay for of_sender in seen["delays"].values() for delay in of_sender]
        if len(delays) != said:
            raise Failed(f"{said - len(delays)} of {said} lines are missing")
        return {
            "p50 ms": percentile(delays, 0.5),
            "p99 ms": percentile(delays, 0.99),
            "cpu s": cpu,
            "MiB": served.memory() / 2**20,
            "load %": 100 * max(speaking_cpu, discarding_cpu, watching_cpu) / seconds,
        }


def flooders(rival: Rival, count: int, seconds: float) -> Figures:
    """Have so many clients flood while one types and one, the probe, reads; tell how fair that is."""
    with Served(rival, count + 2) as served:
        served.all_served()
        *flooding, typist, quick = served.socks
        texts = [rival.frame(numbered(sender, NUMBERS)) for sender in range(count)]
        discarding = Worker(discard_all, [*flooding, typist], seconds + 2)
        sending = Worker(flood_each, flooding, texts, seconds)
        speaking = Worker(speak, rival, [typist], TYPIST, 25, seconds)
        watching = Worker(probe, rival, quick, seconds + 1, 0, 0, True)
        with workers(discarding, sending, speaking, watching):
            cpu = served.cpu_seconds()
            for worker in (watching, discarding, sending, speaking):
                worker.start()
            said, _ = speaking.result()
            cpu = served.cpu_seconds() - cpu
            memory = served.memory()
            load = [worker.result()[1] for worker in (sending, discarding)]
            seen, watching_cpu = watching.result()
        shares = []
        for window in range(1, int(seconds)):
            lines = [seen["windows"].get(window, {}).get(sender, 0) for sender in range(count)]
            shares.append(min(lines) / max(1, *lines))
        delays = typed(rival, seen, said, seconds)
        return {
            "slowest/fastest": min(shares),
            "typist p50 ms": percentile(delays, 0.5),
            "typist p99 ms": percentile(delays, 0.99),
            "heard MB/s": seen["bytes"] / 1e6 / seconds,
            "cpu s": cpu,
            "MiB": memory / 2**20,
            "load %": 100 * max(*load, watching_cpu) / seconds,
        }


def typed(rival: Rival, seen: dict[str, Any], said: int, seconds: float) -> list[float]:
    """Return how late each of the typist's lines was heard; those that were not count as later than all the time."""
    delays: list[float] = seen["delays"].get(TYPIST, [])
    if len(delays) != said and rival.keeps_lines:
        raise Failed(f"{said - len(delays)} of the typist's {said} lines are missing")
    return delays + [seconds * 1_000] * (said - len(delays))


def slow_reader(rival: Rival, megabytes: int, pace: int) -> Figures:
    """Have someone pour while one reads slowly and another types to a quick reader."""
    lines = megabytes * 1_000_000 // LINE_BYTES
    with Served(rival, 4, receive_buffers=[65_536]) as served:
        served.all_served()
        slow, pourer, typist, quick = served.socks
        seconds = megabytes * 1e6 * 1.5 * rival.newlines / pace
        sending = Worker(send_all, [pourer], [rival.frame(numbered(0, lines))])
        crawling = Worker(probe, rival, slow, GIVE_UP_SECONDS, lines * rival.newlines, pace)
        speaking = Worker(speak, rival, [typist], TYPIST, 25, 6.0)
        watching = Worker(probe, rival, quick, seconds)
        discarding = Worker(discard_all, [pourer, typist], seconds)
        with workers(sending, crawling, speaking, watching, discarding):
            started = time.monotonic()
            for worker in (watching, discarding, crawling, sending, speaking):
                worker.start()
            sending.result()
            poured = time.monotonic() - started
            crawled, _ = crawling.result()
            said, _ = speaking.result()
            discarding.result()
            seen, _ = watching.result()
        heard = sum(window.get(0, 0) for window in crawled["windows"].values())
        if rival.keeps_lines and heard < lines - 6 * 25:  # it stops at the number of newlines, some of the typist's
            raise Failed(f"the slow reader misses {lines - heard} of {lines} lines")
        delays = typed(rival, seen, said, seconds)
        return {
            "typist p50 ms": percentile(delays, 0.5),
            "typist p99 ms": percentile(delays, 0.99),
            "poured in s": poured,
            "MiB": served.memory() / 2**20,
        }


def hold(rival: Rival, clients: int) -> Figures:
    """Have so many clients connect, and leave."""
    with Served(rival, 2) as served:
        served.all_served()
        before, threads = served.memory("VmRSS"), thread_count(served)
        started = time.monotonic()
        while len(served.socks) < clients:
            served._join(0)
        connected = time.monotonic() - started
        served.all_served()
        memory = served.memory("VmRSS") - before
        leaving = served.socks[2:]
        del served.socks[2:]
        started = time.monotonic()
        for sock in leaving:
            sock.close()
        while thread_count(served) > threads:
            if time.monotonic() - started > GIVE_UP_SECONDS:
                raise Failed("threads are left over")
            time.sleep(0.02)  # between looks at another process
        left = time.monotonic() - started
        return {
            "connect s": connected,
            "KiB/client": memory / clients / 1024,
            "leave s": left,
            "KiB/client after": (served.memory("VmRSS") - before) / clients / 1024,
        }


def curve(clients: int, rival: Rival, quick: bool) -> Figures:
    """Have everybody talk: the cost of a delivery should not rise with their number."""
    return pour(rival, clients, clients, 20 if quick else 40)


def linked(rival: Rival, clients: int, talkers: int, seconds: float) -> Figures:
    """Tell what two servers over one NATS deliver, half of all on each, and how much later, beside one with all."""
    if not (shutil.which("nats-server") and importlib.util.find_spec("nats")):
        raise Failed("needs nats-server and the library nats-py")
    added = [
        linked_talk(rival, count, talkers, 100, seconds)["p50 ms"] - talk(rival, count, talkers, 100, seconds)["p50 ms"]
        for count in (clients, 2 * talkers + 2)
    ]
    alone = at_the_fastest(lambda pace: talk_to_all([rival], clients, talkers, pace, seconds))["M/s"]
    best = at_the_fastest(lambda pace: linked_talk(rival, clients, talkers, pace, seconds))
    several = {"added p50 ms": added[0], f"{2 * talkers + 2} clients": added[1]}
    return {**best, "alone M/s": alone, "of alone": best["M/s"] / alone, **several}


def at_the_fastest(measure: Callable[[float], Figures]) -> Figures:
    """Measure at a pace that rises until a line is lost or late; the last one without counts."""
    pace, best = 4_000.0, Figures()
    while True:
        try:
            best = measure(pace)
        except Failed as problem:
            if not best:
                raise
            print(f"  at {pace:,.0f} lines/s: {problem}", file=sys.stderr)
            return best
        pace = round(pace * 1.1, -2)  # so that as many lines come each second, and of each talker


def linked_talk(rival: Rival, clients: int, talkers: int, pace: float, seconds: float) -> Figures:
    """Have people on two servers talk to all."""
    with Served(Nats(), 0) as nats:
        time.sleep(0.5)  # in which it has begun to listen
        servers = [Linked(rival, nats.port, name) for name in ("paris", "oslo")]
        return talk_to_all(servers, clients, talkers, pace, seconds)


def talk_to_all(servers: Sequence[Rival], clients: int, talkers: int, pace: float, seconds: float) -> Figures:
    """Have some say so many lines a second in all, as many on each server; tell how late one hears the other's.

    Raises Failed unless everybody hears all of it, and in time.
    """
    with contextlib.ExitStack() as stack:
        parts = [stack.enter_context(Served(server, clients // len(servers))) for server in servers]
        counted: list[socket.socket] = []
        talking: list[socket.socket] = []
        probed: list[socket.socket] = []
        for part in parts:
            part.all_served([sock for other in parts if other is not part for sock in other.socks])
            *others, probe_of_part = part.socks
            probed.append(probe_of_part)
            talking += others[: talkers // len(parts)]
            counted += others
        lines = int(pace * seconds) // talkers * talkers
        own = lines // talkers
        expected = [lines - own if sock in talking else lines for sock in counted]
        counting = Worker(count_all, counted, expected, True)
        speaking = Worker(speak, servers[0], talking, 0, pace, lines / pace)
        watching = [Worker(probe, servers[0], sock, 2 * seconds + 2, lines) for sock in probed]
        with workers(counting, speaking, *watching):
            started = time.monotonic()
            for worker in (*watching, counting, speaking):
                worker.start()
            seen = [worker.result()[0] for worker in watching]
            done, counting_cpu = counting.result(2.0)
            _, speaking_cpu = speaking.result()
        elapsed = done - started
        delays: list[float] = []
        for number, of_probe in enumerate(seen):
            for sender in range(talkers):
                if len(parts) == 1 or sender * len(parts) // talkers != number:  # on the other server
                    delays += of_probe["delays"].get(sender, [])
        if len(delays) != lines:
            raise Failed(f"{lines - len(delays)} of {lines} lines are missing")
        if elapsed > lines / pace + 0.5:
            raise Failed(f"the last line comes {elapsed - lines / pace:.1f} s late")
        return {
            "M/s": (sum(expected) + len(parts) * lines) / elapsed / 1e6,
            "pace lines/s": pace,
            "p50 ms": percentile(delays, 0.5),
            "p99 ms": percentile(delays, 0.99),
            "load %": 100 * max(counting_cpu, speaking_cpu) / elapsed,
        }


# --- The hostile cells: what one who types gets while others do their worst -------------------------------------------

HOSTILE_MEMBERS = 50
HOSTILE_LINES = {  # what each attacker pours
    "blank": b"\n",
    "help": b"/help\n",
    "who": b"/who\n",
    "unknown": b"/unknown\n",
    "slashes": b"//x\n",
    "backspace": b"x\b\n",
    "illformed": b"\x80" * 99 + b"\n",
    "telnet": b"\xff\xf1" * 50 + b"x\n",
    "records": b"x" * 999 + b"\n",  # with TLS, each byte a record
    "door": b"/nick a\n",  # before the password
}
HOSTILE_GRACE_SECONDS = 10.0  # for the typist's last lines; those that do not come by then count as that late
HOSTILE_STOP_SECONDS = 20.0  # in which a server must end that was told to
TYPED = re.compile(rb":%04d(\d{7})(\d{20})\n" % TYPIST)
PASSWORD = "swordfish"


def keep_pouring(rival: Rival, port: int, count: int, text: bytes) -> None:
    """Send ``text`` over so many connections and read what comes, for ever; connect again where the server closes."""
    poller = select.epoll()
    socks: dict[int, socket.socket] = {}
    left: dict[int, memoryview] = {}
    records: dict[int, Callable[[bytes], bytes]] = {}
    buffer = bytearray(1 << 20)
    text *= 65_536 // len(text)
    if isinstance(rival, WithTls):
        text = text[:2_800]  # as records of one byte they are as many bytes
    while True:
        while len(socks) < count:
            sock = socket.socket()
            try:
                sock.settimeout(GIVE_UP_SECONDS)
                sock.connect((LOOPBACK, port))
                encrypted = rival.records(sock) if isinstance(rival, WithTls) else bytes
                sock.setblocking(False)
            except OSError:
                sock.close()
                time.sleep(0.01)  # nobody is there any more
                break
            descriptor = sock.fileno()
            socks[descriptor], left[descriptor], records[descriptor] = sock, memoryview(b""), encrypted
            poller.register(descriptor, select.EPOLLIN | select.EPOLLOUT)
        for descriptor, events in poller.poll(1.0):
            sock = socks[descriptor]
            try:
                if events & ~select.EPOLLOUT and not sock.recv_into(buffer):
                    raise ConnectionResetError
                if events & select.EPOLLOUT:
                    if not left[descriptor]:
                        left[descriptor] = memoryview(records[descriptor](text))
                    left[descriptor] = left[descriptor][sock.send(left[descriptor]) :]
            except BlockingIOError:
                pass
            except OSError:
                poller.unregister(descriptor)
                socks.pop(descriptor).close()


def keep_resetting(port: int) -> None:
    """Connect, say something, or others would not be told of it, and reset the connection, for ever."""
    while True:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            with contextlib.suppress(OSError):  # the server is gone, or its queue is full
                sock.connect((LOOPBACK, port))
                sock.sendall(b"x\n")


def keep_crawling(socks: Sequence[socket.socket], pace: int) -> None:
    """Read so many bytes a second from each, in turns of a tenth of a second, until they are closed."""
    left = list(socks)
    due = time.monotonic()
    while left:
        for sock in socks:
            due += 0.1
            time.sleep(max(0.0, due - time.monotonic()))  # the pace is what is asked for
            with contextlib.suppress(BlockingIOError):
                if sock in left and not sock.recv(pace * len(socks) // 10, socket.MSG_DONTWAIT):
                    left.remove(sock)


def listen_all(socks: Sequence[socket.socket]) -> float:
    """Read everybody's connection until the server has closed all; return when it closed the first."""
    poller = select.epoll()
    left = {sock.fileno(): sock for sock in socks}
    for descriptor in left:
        poller.register(descriptor, select.EPOLLIN)
    buffer, first = bytearray(1 << 20), 0.0
    while left:
        for descriptor, _ in poller.poll():
            try:
                size = left[descriptor].recv_into(buffer, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:
                size = 0
            if not size:
                first = first or time.monotonic()
                poller.unregister(descriptor)
                with contextlib.suppress(OSError):  # it was reset
                    left.pop(descriptor).shutdown(socket.SHUT_RDWR)
    return first


def watch(sock: socket.socket, seconds: float, count: int) -> tuple[list[float], float]:
    """Read for so long, or until the typist's lines have come; return their delays, and others' longest silence."""
    delays: list[float] = []
    rest, silence = b"", 0.0
    started = heard = time.monotonic()
    sock.settimeout(0.1)  # nobody else uses this connection meanwhile
    while (now := time.monotonic()) < started + seconds or (
        len(delays) < count and now < started + seconds + HOSTILE_GRACE_SECONDS
    ):
        with contextlib.suppress(TimeoutError, socket.timeout, BlockingIOError):
            data = sock.recv(1 << 20)
            if not data:
                raise Failed("let the probe go")
            moment = time.monotonic_ns()
            data = rest + data
            rest = data[data.rfind(b"\n") + 1 :]
            delays += [(moment - int(sent)) / 1e6 for _, sent in TYPED.findall(data)]
            if len(data) > 1_000:  # more than what is typed
                silence, heard = max(silence, moment / 1e9 - heard), moment / 1e9
    return delays, max(silence, time.monotonic() - heard)


def hostile(rival: Rival, attack: Callable[[Served], Worker], seconds: float, connections: int) -> Figures:
    """Have one of fifty type while somebody attacks over so many connections; tell how late it is heard.

    Tell, too, how long the server takes to end then, and how many more threads than clients it had.
    """
    with Served(rival, HOSTILE_MEMBERS) as served:
        served.all_served()
        *listeners, typist, probed = served.socks
        pace = 25
        attacking = attack(served)
        listening = Worker(listen_all, [*listeners, typist])
        speaking = Worker(speak, rival, [typist], TYPIST, pace, seconds)
        watching = Worker(watch, probed, seconds, int(pace * seconds))
        with workers(attacking, listening, speaking, watching):
            for worker in (listening, attacking):
                worker.start()
            time.sleep(0.5)  # in which the attack begins
            for worker in (watching, speaking):
                worker.start()
            threads = 0
            while not watching.has_ended():
                threads = max(threads, thread_count(served))
                time.sleep(0.05)  # between looks at another process
            (delays, silence), _ = watching.result()
            memory = served.memory()
            stopped = time.monotonic()
            served.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                served.process.wait(HOSTILE_STOP_SECONDS)
            stopping = time.monotonic() - stopped
            served.process.kill()
            first_closed, _ = listening.result()
            if first_closed < stopped:
                raise Failed("let a listener go")
        missing = int(pace * seconds) - len(delays)
        delays += [HOSTILE_GRACE_SECONDS * 1_000] * missing
        return {
            "typist p50 ms": percentile(delays, 0.5),
            "worst ms": max(delays),
            "missing": missing,
            "stop s": stopping,
            "threads over clients": threads - HOSTILE_MEMBERS - connections,
            "MiB": memory / 2**20,
            "others silent s": silence,
        }


def pour_at(attack: str, attackers: int, rival: Rival, quick: bool) -> Figures:
    if attack == "records":
        rival = WithTls(rival)
    if attack == "door":
        path = os.path.join(FILES.name, "password")
        pathlib.Path(path).write_text(PASSWORD)
        rival = WithOptions(rival, ["--password-file", path], PASSWORD)
    return hostile(
        rival,
        lambda served: Worker(keep_pouring, rival, served.port, attackers, HOSTILE_LINES[attack]),
        2 if quick else 5,
        attackers,
    )


def resetting(rival: Rival, quick: bool) -> Figures:
    rival = WithOptions(rival, ["--announce"])
    return hostile(rival, lambda served: Worker(keep_resetting, served.port), 2 if quick else 5, 1)


def crawling(rival: Rival, quick: bool) -> Figures:
    return hostile(rival, lambda served: Worker(crawl_and_pour, served.port), 15 if quick else 100, 22)


def crawl_and_pour(port: int) -> None:
    """Read slowly from two connections, but more than the floor asks for, while others pour, for ever."""
    crawlers = [socket.socket() for _ in range(2)]
    for sock in crawlers:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1_400)  # as from afar: loopback's 64 KB come in lumps
        sock.connect((LOOPBACK, port))
    threading.Thread(target=keep_crawling, args=(crawlers, 49_152), daemon=True).start()
    keep_pouring(Rival(), port, 20, numbered(0, NUMBERS))


def thread_count(served: Served) -> int:
    return len(os.listdir(f"/proc/{served.process.pid}/task"))


Cell = Callable[[Rival, bool], Figures]  # the server, whether it must be quick

CELLS: dict[str, tuple[str, Cell]] = {
    "flood": ("11 clients, 1 sends", lambda rival, quick: pour(rival, 11, 1, 500_000 if quick else 3_000_000)),
    "room": ("1,000 clients, 10 send", lambda rival, quick: pour(rival, 1_000, 10, 500 if quick else 2_000)),
    "crowd": ("9,900 clients, 10 send", lambda rival, quick: pour(rival, 9_900, 10, 20)),
    "alltalk": ("1,000 clients, all send", lambda rival, quick: pour(rival, 1_000, 1_000, 5 if quick else 20)),
    "flooders": ("50 clients flood, 1 types, 1 reads", lambda rival, quick: flooders(rival, 50, 3 if quick else 6)),
    "thousand": ("1,000 clients flood, 1 types, 1 reads", lambda rival, quick: flooders(rival, 1_000, 6)),
    "latency": (
        "300 clients, 1,000 lines/s in all",
        lambda rival, quick: talk(rival, 300, 299, 1_000, 1 if quick else 3),
    ),
    "quiet": ("11 clients, 400 lines/s in all", lambda rival, quick: talk(rival, 11, 10, 400, 1 if quick else 3)),
    "slow": ("1 pours 24 MB, 1 reads 2 MB/s, 1 types", lambda rival, quick: slow_reader(rival, 24, 2_000_000)),
    "tls": (
        "11 clients with TLS, 1 sends",
        lambda rival, quick: pour(WithTls(rival), 11, 1, 100_000 if quick else 1_000_000),
    ),
    "holdtls": ("500 clients with TLS come and leave", lambda rival, quick: hold(WithTls(rival), 500)),
    "linked": (
        "2,000 clients, 10 talk, on two servers over NATS",
        lambda rival, quick: linked(rival, 2_000, 10, 1 if quick else 3),
    ),
    "hold": ("10,000 clients come and leave", lambda rival, quick: hold(rival, 10_000)),
}
for talkers in (125, 250, 500, 1_000):
    CELLS[f"curve{talkers}"] = f"{talkers:,} clients, all send", functools.partial(curve, talkers)
HOSTILE = {}  # all cells of ``hostile``; the value tells whether the quick form has it
for attack in HOSTILE_LINES:
    for attackers in (1, 5, 20):
        name = f"hostile-{attack}-{attackers}"
        what = f"50 clients, 1 types, {attackers} pour {attack}"
        CELLS[name] = what, functools.partial(pour_at, attack, attackers)
        HOSTILE[name] = attackers == 5
CELLS["hostile-reset"] = "50 clients with --announce, 1 types, 1 host connects and resets", resetting
CELLS["hostile-crawl"] = "50 clients, 1 types, 20 pour, 2 read 48 KB/s in turns", crawling
HOSTILE.update({"hostile-reset": True, "hostile-crawl": True})
QUICK = ("flood", "alltalk", "latency", "quiet")
OURS_ALONE = ("holdtls", "linked", "hold", "curve125", "curve250", "curve500", "curve1000")


# --- The report -------------------------------------------------------------------------------------------------------


def measure(name: str, servers: Sequence[Rival], rounds: int, quick: bool) -> dict[str, Any]:
    """Run one cell, every server in turn, several times; return each server's figures of every round."""
    runs: dict[str, list[Figures]] = {rival.name: [] for rival in servers}
    problems: dict[str, str] = {}
    for _ in range(rounds):
        for rival in servers:
            if rival.name not in problems:
                try:
                    runs[rival.name].append(CELLS[name][1](rival, quick))
                except (Failed, OSError) as error:
                    problems[rival.name] = str(error)
    return {"cell": name, "what": CELLS[name][0], "runs": runs, "problems": problems}


def median(runs: Sequence[Figures], figure: str) -> float:
    return statistics.median(run[figure] for run in runs)


def show(result: dict[str, Any]) -> None:
    """Print a cell: medians, the spread of the first figure, and ours as a multiple of each rival's, round by round."""
    print(f"\n{result['cell']}: {result['what']}")
    ours = result["runs"]["ours"]
    for name, runs in result["runs"].items():
        if name in result["problems"]:
            print(f"  {name:9} {result['problems'][name]}")
        elif runs:
            first = next(iter(runs[0]))
            figures = "  ".join(f"{figure} {median(runs, figure):.4g}" for figure in runs[0])
            spread = f"{min(run[first] for run in runs):.3g}-{max(run[first] for run in runs):.3g}"
            ratio = ""
            if name != "ours" and ours and "ours" not in result["problems"]:
                ratios = [
                    f"{figure} {statistics.median(a[figure] / b[figure] for a, b in zip(ours, runs)):.2f} x"
                    for figure in ("M/s", "p50 ms", "p99 ms", "typist p99 ms")
                    if figure in runs[0] and all(run[figure] for run in runs)
                ]
                ratio = f"  [ours: {', '.join(ratios)}]"
            print(f"  {name:9} {figures}  ({first} {spread}){ratio}")
    sys.stdout.flush()


# --- The duel: one talks, some read, one never does -------------------------------------------------------------------

DUEL_SECONDS = 20.0
DUEL_READERS = 5
DUEL_PACE = 50_000  # lines a second that are said, while the server takes them
STEP_SECONDS = 0.02  # between two looks at all connections
REDRAW_SECONDS = 0.2


class Side:
    """One server in the duel, and what its readers have heard."""

    def __init__(self, served: Served) -> None:
        served.all_served()
        self.name = served.rival.name
        self._talker, _, *self._readers = served.socks
        self._text = self._rest = memoryview(numbered(0, NUMBERS))
        assert served.process.stdout
        self._console = served.process.stdout.fileno()
        self._shown: collections.deque[tuple[float, int]] = collections.deque([(0.0, 0)], int(1 / REDRAW_SECONDS))
        self.lines, self.last, self.longest = 0, 0.0, 0.0
        self.let_go = 0.0  # when the one who never reads was, if it was: only our console tells

    def step(self, now: float, due: int) -> None:
        """Say so many bytes at most, and read what has come."""
        with contextlib.suppress(BlockingIOError):
            self._rest = self._rest[self._talker.send(self._rest[:due], socket.MSG_DONTWAIT) :] or self._text
        for sock in self._readers:
            with contextlib.suppress(BlockingIOError):
                data = sock.recv(1 << 20, socket.MSG_DONTWAIT)
                if not data:
                    raise Failed(f"{self.name} let a reader go")
                self.longest = max(self.longest, now - self.last)
                self.lines, self.last = self.lines + data.count(b"\n"), now
        if select.select([self._console], [], [], 0)[0] and b"Connection closed" in os.read(self._console, 65_536):
            self.let_go = now

    def row(self, now: float) -> str:
        """Return the counters; the pace is that since about a second ago."""
        then, lines = self._shown[0]
        self._shown.append((now, self.lines))
        pace = (self.lines - lines) / (now - then)
        return f"{self.name:8} {self.lines:10,} lines {pace:8,.0f}/s, nothing for {now - self.last:4.1f} s"

    def verdict(self, now: float) -> str:
        seen = f"{self.name} delivered {self.lines:,} lines"
        if now - self.last > 1:
            return f"{seen}, none in the last {now - self.last:.1f} s"
        let_go = f", let that one go at {self.let_go:.1f} s and went on" if self.let_go else ""
        return f"{seen}, paused for {self.longest:.1f} s at most{let_go}"


def duel() -> int:
    """Show what comes at the readers of each server, and say at the end what was seen; return 1 if ours stopped."""
    servers = [Rival(), Textbook(), *([Ncat()] if shutil.which("ncat") else [])]
    live = sys.stdout.isatty()
    with contextlib.ExitStack() as stack:
        sides = [
            Side(stack.enter_context(Served(rival, 2 + DUEL_READERS, receive_buffers=[0, 4_096]))) for rival in servers
        ]
        room = f"one says {DUEL_PACE:,} lines/s, {DUEL_READERS} read, and one never reads"
        print(f"On each server {room}, for {DUEL_SECONDS:.0f} s:" + "\n" * live * len(sides), flush=True)
        started, now, redraw = time.monotonic(), 0.0, REDRAW_SECONDS
        while now < DUEL_SECONDS:
            time.sleep(STEP_SECONDS)  # the pace is what is asked for
            before, now = now, time.monotonic() - started
            for side in sides:
                side.step(now, int((now - before) * DUEL_PACE) * LINE_BYTES)
            if now >= redraw:
                redraw += REDRAW_SECONDS
                rows = [side.row(now) for side in sides]
                if live:
                    print(f"\x1b[{len(rows)}A" + "".join(f"{row}\x1b[K\n" for row in rows), end="", flush=True)
                elif now // 1 > before // 1:
                    print(f"{now:2.0f} s: " + "; ".join(rows), flush=True)
    print(f"Where {room}: " + "; ".join(side.verdict(now) for side in sides) + ".")
    return 1 if now - sides[0].last > 1 else 0


def main() -> int:
    """Run the cells that are asked for; return 1 if our server failed in one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    cells = [name for name in CELLS if name not in HOSTILE]
    parser.add_argument(
        "cells", nargs="*", metavar="CELL", help=f"all of {', '.join(cells)} unless given; hostile, or one of its own"
    )
    parser.add_argument("--quick", action="store_true", help=f"under a minute: {', '.join(QUICK)}, one round")
    parser.add_argument("--rounds", type=int, default=3, help="of every server in each cell (default: 3)")
    parser.add_argument("--only", default="", metavar="NAMES", help="servers to run, as ours,textbook (default: all)")
    parser.add_argument(
        "--before", type=pathlib.Path, metavar="PATH", help="another mychatserver.py to run beside ours"
    )
    parser.add_argument("--json", action="store_true", help="print every figure of every run as JSON")
    parser.add_argument("--duel", action="store_true", help="20 s, live: ours and others with one who never reads")
    options = parser.parse_args()
    if options.duel:
        if len(sys.argv) > 2:
            parser.error("--duel goes alone")
        try:
            return duel()
        except KeyboardInterrupt:
            return 130
        except (Failed, OSError) as error:
            print(f"The duel ended early: {error}", file=sys.stderr)
            return 1
    chosen = []
    for cell in options.cells or (QUICK if options.quick else cells):
        if cell == "hostile":
            chosen += [name for name, in_quick in HOSTILE.items() if in_quick or not options.quick]
        elif cell in CELLS:
            chosen.append(cell)
        else:
            parser.error(f"no cell {cell!r}; there are {', '.join(cells)}, hostile, {', '.join(HOSTILE)}")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    others: list[Rival] = [Before(options.before)] if options.before else []
    servers = [rival for rival in [*rivals(), *others] if not options.only or rival.name in options.only.split(",")]
    model = re.search(r"^model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    machine = (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {model[1] if model else platform.machine()}, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    )
    if not options.json:
        print(machine)
    results = []
    for name in chosen:
        alone = name in OURS_ALONE or name in HOSTILE
        measured = [rival for rival in servers if not alone or rival.name in ("ours", "before")]
        result = measure(name, measured, 1 if options.quick else options.rounds, options.quick)
        results.append(result)
        if not options.json:
            show(result)
    if options.json:
        print(json.dumps({"machine": machine, "results": results}, indent=1))
    return 1 if any("ours" in result["problems"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
