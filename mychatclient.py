#!/usr/bin/env python3
"""A chat client for any machine with Python: ``python mychatclient.py``.

Shows what the others say, sends what you type; ``exit`` leaves. One file, the standard library alone. With a pipe for
standard input it is a filter: it sends what it reads, half-closes at the end, and shows what still comes until the
server closes.

The threads, and who owns what
    main      the input loop: blocks in ``input()`` or in reading the pipe, and sends. With readline it also draws.
    receive   reads the connection and has the screen show it. When the connection ends it interrupts the input loop.
    watch     reads the numbers of signals as they come, and sees to it that the main thread handles them.

``--lan`` finds a server on the same network; ``--ssh`` reaches one through the user's own ssh, a program of its own
beside this one, on whose standard input and output the chat then runs as on any socket. ``--tls`` encrypts, on a socket
of another kind.

The wire is lines of UTF-8, as the server's docstring tells. A server that never sends a newline is shown too: what it
sent counts as a line after a second of silence.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import getpass
import importlib
import io
import ipaddress
import os
import re
import secrets
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ssl  # at run time only where somebody asks for TLS: some Pythons have none

with contextlib.suppress(ImportError):  # Windows has none
    import termios

__version__ = "1.0"

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 12000
GREETING = "Connected to chat server. Type 'exit' to leave."
FAREWELL = "Disconnected from server"
REFUSALS = b"* server full", b"* server stopping", b"* too many"
TURNED_AWAY = "the server has turned this client away; try again later."
NEEDS_TLS = "that server speaks TLS; join it with --tls, or with --tls-ca and its certificate."
SERVER_CLOSED = "the server closed the connection; try again later."

QUESTION = b"* password?\n"
NOT_ASKED = "* the server asked for no password"
TOO_EARLY = "* what you entered before the password was not sent"
ASKED_LATE = "the server asked for the password later than a client waits for that; try again later."
UNANSWERED = "the server asks for a password: give --password-file FILE, --password in a terminal, or MYCHAT_PASSWORD."

CONNECT_SECONDS = 10.0  # for all addresses of a name together
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}  # s; 2nd: macOS's 1st
READ_BYTES = 65_536  # read at once, from the connection and from a pipe
MAX_LINE_BYTES = 65_536  # that a person may send: what the server takes
MAX_SHOWN_BYTES = 262_144  # shown as one line: more than a chat server sends, and a bound for any other
SILENCE_SECONDS = 1.0  # after which a server that never sends a newline has finished its line
LEAVE_SECONDS = 1.0  # for the server to close, after a person has typed exit
COLOURS = 31, 32, 34, 35, 36  # of labels: what can be read on dark and on light
BOLD, DIM, PLAIN_TEXT = b"\x1b[1m", b"\x1b[2m", b"\x1b[m"
LABELS_REMEMBERED = 1_000  # for completion
RL_STATE_CALLBACK = 0x80000  # a line is being edited: readline.h
RL_STATE_COMPLETING = 0x4000  # what is raised in our completer would be swallowed
RL_STATES_PENDING = 0x80 | 0x100 | 0x400  # incremental and other search, repeat count
EXIT_BYTES = 256  # a longer line in a pipe is never taken for exit, however many blanks are round it
INTERRUPT_SECONDS = 0.05  # between signals to the main thread: one may come just before it blocks
RECONNECT_SECONDS = 0.5, 1.0, 2.0, 5.0  # before each try to connect again; the last for ever
STEADY_SECONDS = 10.0  # a connection that lasted so long: the pauses begin anew
ADMITTED_SECONDS = 0.5  # in which a server that turns somebody away has said so
STUCK_SECONDS = 2.0  # after which a main thread that has to end is stuck, behind Ctrl-S for example

# By name, as Windows has not all of them.
OWN_SIGNALS = {number for number in signal.Signals if number.name == "SIGURG"}  # to interrupt the main thread
LAST_SIGNALS = {number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")}

NOT_SENT = "* not connected: this line was not sent"
LINE_TOO_LONG = f"* line too long: {MAX_LINE_BYTES} bytes at most, this line was not sent"

QUESTION_SECONDS = 2.0  # in which a server that wants a password has asked for it
ANSWER_SECONDS = 10.0  # in which it has taken or refused what it was given

DISCOVERY_GROUP = "239.255.109.99"  # and the port: see the server's Discovery
DISCOVERY_PORT = 12000
EVERYONE = "255.255.255.255"
IP_PKTINFO = 8  # Linux: ip(7); the socket module names it from 3.14 on
QUESTION_BYTES = 128  # of each question, and no answer has more
ASK_SECONDS = 0.25  # until the question is asked again: a datagram may be lost, a sleeping radio late
ASKS = 3, 8  # least, so that a second server is noticed too, and most, when nobody answers
MOST_FOUND = 20  # servers: a rude neighbour could answer for thousands

X509_V_FLAG_PARTIAL_CHAIN = 0x80000  # x509_vfy.h: the ssl module names it from 3.10 on
HANDSHAKE_SECONDS = 10.0  # in which a server must have shown that it speaks TLS, and whose it is
TLS_PIECE_BYTES = 65_536  # encrypted at once, when what was encrypted before is sent
TLS_OUTPUT_BYTES = 65_536  # unsent, that a server's TLS may have ours answer

SSH_READY = b"mychat-is-through"  # what ssh has our side say when it has authenticated
SSH_REFUSAL_SECONDS = 0.5  # in which the other machine most probably tells that no server is there
SSH_ALIVE_SECONDS = 30  # between two signs of life: a router at home forgets a silent connection in minutes
SSH_AGAIN_SECONDS = 20.0  # for ssh to get through again: it may hang where ConnectTimeout does not count
SSH_END_SECONDS = 1.0  # for ssh to take the last lines along and end


# --- Lines: what may be shown, on anybody's screen --------------------------------------------------------------------

PLAIN = bytes([*b"\t\n", *range(0x20, 0x7F)])
# IAC and WILL..DONT with an option, or a command alone: RFC 854. A newline always ends the line.
TELNET = re.compile(rb"\xff(?:[\xfb-\xfe][\x00-\x09\x0b-\x7f]|[\xf0-\xfa])")
# Controls but tab and newline (C0, DEL, C1), line and paragraph separator, and what overrides the order of writing.
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
# What others said, and what the server says of people: to know their labels.
SPOKEN = re.compile("([^ :*]{1,64}):(.*)")  # no label is longer
HERE = re.compile(r"\* \d+ here: (.*?)(?:, and .*)?")
NOTICE = re.compile(r"\* ([^ :]{1,64}) (?:is now ([^ :]{1,64})$|(joined$|left$|to you:))")
EXIT = re.compile(rb"(?:^|\n|\r\0)(?:[\t ]*exit|/quit)[\t ]*(?:\r?\n|\r\0)")


def clean(block: bytes) -> bytes:
    """Return the lines of ``block`` without telnet's sequences, and U+FFFD for all that is forbidden or not UTF-8."""
    if not block.translate(None, PLAIN):
        return block
    text = TELNET.sub(b"", block).decode("utf-8", "replace")
    return FORBIDDEN.sub("\ufffd", text).encode()


# --- The screen: everything that is shown goes through here -----------------------------------------------------------


class People:
    """Who was heard of, as the lines that came tell, and what we are called ourselves."""

    def __init__(self, own_label: str) -> None:
        self.own_label = own_label
        self.asked_for = ""  # the name that we asked for last
        self.labels: dict[str, None] = {}  # the latest last

    def heard(self, line: bytes) -> bool:
        """Take note of the labels in a line; return whether it is for us: a private word, or one that names us."""
        text = line.decode("utf-8", "replace")
        spoken = SPOKEN.fullmatch(text)
        if spoken:
            self._saw(spoken[1])
            return bool(self.own_label and re.search(rf"(?<!\w){re.escape(self.own_label)}(?!\w)", spoken[2]))
        if text.startswith(("* name '", "* not a name: ")):
            self.asked_for = ""
        here = HERE.fullmatch(text)
        for label in here[1].split(", ") if here else ():
            self._saw(label.removesuffix(" (you)"))
        notice = NOTICE.match(text)
        if notice:
            label, new_label, verb = notice.groups()
            # The server may see us come from another port than we do.
            if new_label and (label == self.own_label or new_label == unicodedata.normalize("NFKC", self.asked_for)):
                self.own_label, self.asked_for = new_label, ""
            if new_label or verb == "left":
                self.labels.pop(label, None)
            if verb != "left":
                self._saw(new_label or label)
        return bool(notice and notice[3] == "to you:")

    def _saw(self, label: str) -> None:
        self.labels.pop(label, None)
        self.labels[label] = None
        if len(self.labels) > LABELS_REMEMBERED:
            del self.labels[next(iter(self.labels))]


class Style:
    """How a line that came is shown: as it is, or with colour, with the time, with a bell."""

    def __init__(self, people: People, colour: bool, clock: bool, bell: bool, learn: bool) -> None:
        self.people = people
        self._colour = colour
        self._clock = clock
        self._bell = bell
        self._learn = learn or colour or bell  # who is heard of

    def rows(self, block: bytes) -> bytes:
        """Return the lines of ``block`` with an empty row before each."""
        if not (self._learn or self._clock):
            return b"\n" + block[:-1].replace(b"\n", b"\n\n") + b"\n"
        now = time.strftime("%H:%M ").encode() if self._clock else b""
        return b"".join(b"\n" + now + self._row(line) + b"\n" for line in block[:-1].split(b"\n"))

    def _row(self, line: bytes) -> bytes:
        is_for_us = self._learn and self.people.heard(line)
        bell = b"\a" if is_for_us and self._bell else b""
        if self._colour:
            label, colon, text = line.partition(b":")
            if line.startswith(b"* "):
                line = (BOLD if is_for_us else DIM) + line + PLAIN_TEXT
            elif colon and b" " not in label:
                colour = b"\x1b[%dm" % COLOURS[zlib.crc32(label) % len(COLOURS)]
                line = colour + label + PLAIN_TEXT + b":" + (BOLD + text + PLAIN_TEXT if is_for_us else text)
        return line + bell


class Screen:
    """Owns standard output, and what is typed. Any thread may show something, and blocks while standard output does."""

    def __init__(self, style: Style) -> None:
        self.gone = False  # nobody reads it any more, as after ``| head -1``, or nothing more can be written
        self.problem = ""  # why nothing can be, as on a full disk
        self.people = style.people
        self._style = style
        # Unbuffered, so that nothing is left to fail at exit; on Windows this finds the console and its Unicode.
        self._file = open(1, "wb", buffering=0, closefd=False)  # noqa: SIM115 - for good
        # One message at a time; but a handler of signals may have to say something in the middle of one.
        self._lock = threading.RLock()

    def show(self, block: bytes) -> None:
        """Show whole lines that came from the server, below an empty row each."""
        self._write(self._style.rows(block))

    def say(self, text: str) -> None:
        """Show a line of our own."""
        self._write(f"{text}\n".encode())

    def notice(self, text: str) -> None:
        """Show a notice of our own, from the main thread, as if it came from the server."""
        self._write(self._style.rows(f"{text}\n".encode()))

    def draw(self) -> None:
        """Show what another thread wants shown, if only the main thread can."""

    def is_busy(self) -> bool:
        """Return whether a handler of signals may neither draw nor raise now."""
        return False

    def line(self, unsent: str) -> str:
        """Return the next line entered; it may begin with ``unsent``. Blocks; raises EOFError at Ctrl-D."""
        return input()

    def secret(self) -> bytes:
        """Return the password that a person enters, unseen. Blocks; raises EOFError at Ctrl-D."""
        return password_typed()

    def leave_line(self, ctrl_c: bool) -> None:
        """Begin a new row below what is half-typed, as far as that is known: after ``ctrl_c`` the row has a ^C."""
        if ctrl_c and os.isatty(1):
            self.say("")

    def release(self) -> None:
        """Let whoever is writing go on, if the terminal takes nothing more; what waited to be shown may be lost."""

    def close(self) -> None:
        """Leave the terminal as it was."""

    def die(self, number: int, frame: object) -> None:
        """End by a signal, at once, with the terminal as it was; a handler of signals."""
        self.leave_line(ctrl_c=False)
        self.close()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        with self._lock:
            try:
                while rest:
                    if sys.platform != "win32":
                        os.set_blocking(1, True)  # it may be shared with a program that sets it otherwise
                    rest = rest[self._file.write(rest) or 0 :]
            except OSError as error:
                self.gone = True
                if error.errno not in (errno.EPIPE, errno.EINVAL):  # the reader has left; on Windows it is EINVAL
                    self.problem = error.strerror or str(error)


if sys.platform != "win32":

    class LineEditor(Screen):
        """A terminal with GNU readline, on which what comes is shown above the half-typed line, and never in it.

        Only the main thread draws. The receive thread leaves a block and sends the main thread a signal, for which
        ``draw`` is called. While a person types, the main thread waits in select() inside of readline; a signal
        interrupts that, and CPython calls its handler there, between two keystrokes, when readline's state is whole.
        So ``draw`` may have readline take its line off the screen, write, and have it draw the line again. While a
        send blocks, the signal interrupts the send; at any other time ``draw`` is called between two steps of the
        main thread's own.
        """

        COMPLETE_BY_TAB = "tab: complete"

        def __init__(self, style: Style) -> None:
            super().__init__(style)
            import ctypes
            import readline

            # The library that the module uses, found as the linker found it: in the program, else through the module.
            self._readline = ctypes.CDLL(None)
            if not hasattr(self._readline, "rl_redisplay"):
                self._readline = ctypes.CDLL(readline.__file__)
            integer = ctypes.c_int.in_dll
            self._at_start, self._insert = readline.set_startup_hook, readline.insert_text
            self._end, self._point = integer(self._readline, "rl_end"), integer(self._readline, "rl_point")
            self._state = ctypes.c_ulong.in_dll(self._readline, "rl_readline_state")
            self._stream = ctypes.c_void_p.in_dll(self._readline, "rl_outstream")
            self._block = b""  # to be shown; one at a time, so that a stopped terminal stops the reading
            self._shown = threading.Event()
            self._drawing = False  # the main thread is in the middle of writing
            readline.parse_and_bind("set enable-bracketed-paste off")
            # What completes is listed at once: for a question, readline would wait where no signal ends its wait.
            readline.parse_and_bind("set completion-query-items 0")
            readline.parse_and_bind("set page-completions off")
            readline.parse_and_bind(self.COMPLETE_BY_TAB)
            readline.set_completer(self._completion)
            readline.set_completer_delims(" \t")
            with contextlib.suppress(OSError):  # it is not the terminal that this process belongs to
                if os.tcgetpgrp(0) != os.getpgrp():  # in the background: the terminal is as the shell's editor has it
                    os.killpg(0, signal.SIGTTIN)  # which stops us, until the shell brings us back
            self._as_it_was = termios.tcgetattr(0)
            handle((signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT), self.die)
            # Once, now, and no more: between two lines, where readline would reset the terminal, the kernel would echo
            # what is typed or pasted, and readline show it again.
            self._readline.rl_prep_terminal(1)
            self._prepared = termios.tcgetattr(0)
            for name in ("rl_prep_term_function", "rl_deprep_term_function"):
                ctypes.c_void_p.in_dll(self._readline, name).value = None
            handle((signal.SIGTSTP,), self._suspend)
            handle((signal.SIGCONT,), self._resume)

        # Runs in the receive thread

        def show(self, block: bytes) -> None:
            """Have whole lines shown that came from the server; block until the main thread has done it."""
            self._shown.clear()
            self._block = block
            interrupt_main_thread(self._shown)

        # Runs in the main thread

        def draw(self) -> None:
            """Show the block that the receive thread has left, if any. Called from the signal's handler."""
            if self._drawing or not self._block:
                return
            self._drawing = True
            try:
                half_typed = self._half_typed()
                if half_typed:
                    self._clear_line()
                self._write(self._style.rows(self._block))
                if half_typed:
                    self._draw_line()
            finally:
                self._block = b""
                self._drawing = False
                self._shown.set()

        def _write(self, data: bytes) -> None:
            was_drawing, self._drawing = self._drawing, True
            try:
                super()._write(data)
            finally:
                self._drawing = was_drawing

        def line(self, unsent: str) -> str:
            self._at_start(functools.partial(self._insert, unsent) if unsent else None)
            signal.siginterrupt(signal.SIGURG, False)  # or it would cut off readline's writing to a slow terminal
            try:
                text = input()
            finally:
                signal.siginterrupt(signal.SIGURG, True)
            if not text:
                self.say("")  # readline leaves the cursor on the row of an empty line without a prompt
            return text

        def secret(self) -> bytes:
            self.close()
            try:
                return super().secret()
            finally:
                self._set_terminal(self._prepared)

        def leave_line(self, ctrl_c: bool) -> None:
            if self._half_typed():
                self._go_to_end_of_line()
                self.say("")

        def close(self) -> None:
            self._set_terminal(self._as_it_was)

        def _suspend(self, number: int, _: object) -> None:
            """Give the terminal to the shell and stop, as Ctrl-Z asks; go on where it was when continued."""
            was_drawing, self._drawing = self._drawing, True  # what comes waits, or it is drawn before the line is back
            try:
                if self._half_typed():
                    self._clear_line()
                self.close()
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)  # in a group without a shell this does nothing
                signal.signal(number, self._suspend)
                self._resume()
            finally:
                self._drawing = was_drawing

        def _resume(self, *_: object) -> None:
            """Make the terminal ours again, and draw the line, if somebody else has had it."""
            with contextlib.suppress(termios.error):  # it is gone
                if termios.tcgetattr(0) != self._prepared and self._set_terminal(self._prepared) and self._half_typed():
                    self._draw_line()

        # Called from any thread

        def release(self) -> None:
            with contextlib.suppress(termios.error):  # it is gone
                settings = termios.tcgetattr(0)
                settings[0] &= ~termios.IXON  # which ends what Ctrl-S has begun
                if self._set_terminal(settings):
                    termios.tcflush(1, termios.TCOFLUSH)

        def _set_terminal(self, settings: list[Any]) -> bool:
            """Change the terminal's settings, if this process may; return whether that is so."""
            with contextlib.suppress(OSError):  # it is not the terminal that this process belongs to
                if os.tcgetpgrp(0) != os.getpgrp():  # only who is in the foreground may
                    return False
            with contextlib.suppress(termios.error):  # it is gone
                termios.tcsetattr(0, termios.TCSANOW, settings)
            return True

        def _completion(self, begun: str, number: int) -> str | None:
            """Return the label of that number, of those seen that begin so; if there is none, Tab is a character."""
            if number == 0:
                self._matches = [label for label in list(self.people.labels) if begun and label.startswith(begun)]
                if not self._matches:
                    self._insert("\t")
                    self._readline.rl_redisplay()
            return self._matches[number] if number < len(self._matches) else None

        # What is asked of readline

        def is_busy(self) -> bool:
            return bool(self._state.value & RL_STATE_COMPLETING)

        def _half_typed(self) -> bool:
            state = self._state.value
            return bool(state & RL_STATE_CALLBACK and (self._end.value or state & RL_STATES_PENDING))

        def _clear_line(self) -> None:
            self._readline.rl_clear_visible_line()
            self._flush()

        def _draw_line(self) -> None:
            self._readline.rl_on_new_line()
            self._readline.rl_redisplay()

        def _go_to_end_of_line(self) -> None:
            self._point.value = self._end.value
            self._readline.rl_redisplay()
            self._flush()

        def _flush(self) -> None:
            """Empty C's buffer, which readline writes to: what we write passes it by, and would come first."""
            self._readline.fflush(self._stream)

    class LibeditEditor(LineEditor):
        """A terminal with libedit in the place of readline, as on macOS: right for lines that fit a row.

        libedit does not tell what is typed, nor in which row the cursor is. So a line counts as half-typed all the time
        that it is edited: the cursor's row is cleared, and the line drawn again, if there is one. (What libedit draws
        again lacks combining marks; what is sent has them.)
        """

        COMPLETE_BY_TAB = "bind ^I rl_complete"
        _editing = _completing = False

        def line(self, unsent: str) -> str:
            self._editing = True
            try:
                return input()
            except EOFError:
                self.say("")  # below the ^D that libedit shows
                raise
            finally:
                self._editing = False

        def _completion(self, begun: str, number: int) -> str | None:
            self._completing = True
            try:
                return super()._completion(begun, number)
            finally:
                self._completing = False

        def is_busy(self) -> bool:
            return self._completing

        def _half_typed(self) -> bool:
            return self._editing

        def _clear_line(self) -> None:
            self._write(b"\r\x1b[K")

        def _draw_line(self) -> None:
            self._readline.rl_forced_update_display()

        def _go_to_end_of_line(self) -> None:
            """Leave the cursor where it is: there is no telling."""


def screen_for(options: argparse.Namespace, own_label: str) -> Screen:
    """Return the screen that suits the terminal, or the pipe, and the options."""
    plain = options.plain or not (os.isatty(0) and os.isatty(1)) or (os.environ.get("TERM") or "dumb") == "dumb"
    colour = not (plain or options.no_color or os.environ.get("NO_COLOR"))
    bell = options.bell and os.isatty(1)
    style = Style(People(own_label), colour, options.time, bell, learn=not plain or options.reconnect)
    if not plain and sys.platform != "win32":
        with contextlib.suppress(ImportError, AttributeError, OSError, ValueError, termios.error):  # no GNU readline
            is_libedit = "libedit" in (importlib.import_module("readline").__doc__ or "")
            return LibeditEditor(style) if is_libedit else LineEditor(style)
    return Screen(style)


# --- The connection: how to get one, and what comes from it -----------------------------------------------------------


class NotConnected(Exception):
    """Why there is no connection, and what to do, as one sentence."""


class Hopeless(Exception):
    """The same, where there is no use in trying again by itself: the wrong server, password or certificate."""


class Interrupted(Exception):
    """Ctrl-C was pressed, or the connection has ended while the main thread waited."""


@contextlib.contextmanager
def closed_on_error(sock: socket.socket) -> Iterator[None]:
    """Close a socket if what is done with it fails."""
    try:
        yield
    except BaseException:
        sock.close()
        raise


def addresses(host: str, port: int) -> list[Any]:
    """Return what the system finds for a host, as ``getaddrinfo`` does; blocks, but not for Ctrl-C.

    In a thread, because nothing ends the system's own wait for a name server. Raises OSError or UnicodeError.
    """
    found: list[Any] = []

    def look_up() -> None:
        try:
            found.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.append(error)

    thread = threading.Thread(target=look_up, name="look-up", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(INTERRUPT_SECONDS)  # in steps: on Windows nothing interrupts a join
    if isinstance(found[0], Exception):
        raise found[0]
    return list(found[0])


def connect(host: str, port: int) -> socket.socket:
    """Return a connection to the first of the host's addresses that takes it.

    Blocks CONNECT_SECONDS at most, and as long as the system takes to look up the name. Raises OSError, and
    UnicodeError for what cannot be a name.
    """
    deadline = time.monotonic() + CONNECT_SECONDS
    entries = addresses(host, port)
    problem = OSError(errno.EADDRNOTAVAIL, "no address")
    for tries_left, (family, kind, protocol, _, address) in zip(range(len(entries), 0, -1), entries):
        try:
            sock = socket.socket(family, kind, protocol)
            with closed_on_error(sock):
                sock.settimeout(max(0.1, (deadline - time.monotonic()) / tries_left))
                sock.connect(address)
                sock.settimeout(None)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for name, value in KEEPALIVE.items():
                    with contextlib.suppress(AttributeError, OSError):  # this system does not let one set it
                        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            return sock
        except OSError as error:
            problem = error
    raise problem


def connecting_problem(error: NotConnected | Hopeless | OSError | UnicodeError, host: str, port: int) -> str:
    """Return one sentence that says why there is no connection, and what to do."""
    if isinstance(error, (NotConnected, Hopeless)):
        return str(error)
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return f"Unknown host {host!r}: check the spelling; a port comes behind it, after a blank."
    if isinstance(error, ConnectionRefusedError):
        return f"No server at {host} port {port}: start mychatserver.py there, or give another port."
    if isinstance(error, (socket.timeout, TimeoutError)):
        return f"No answer from {host} port {port}: check the address; a firewall or another network may be between."
    return f"Cannot reach {host} port {port}: {error.strerror}; check the address and this machine's network."


def local_label(sock: socket.socket) -> str:
    """Return what a server calls us first if it is no further than the other end: nothing for the way through ssh."""
    name = sock.getsockname()
    return str(name[1]) if isinstance(name, tuple) else ""


def is_ready(sock: socket.socket, event: int, seconds: float | None) -> bool:
    """Wait until a socket can be read or takes more, so many seconds at most; return whether it does."""
    with selectors.DefaultSelector() as selector:
        selector.register(sock, event)
        return bool(selector.select(seconds))


def has_come(sock: socket.socket, seconds: float) -> bool:
    """Wait until there is something to receive, or the end, so many seconds at most; return whether there is.

    Not by the socket's own time-out, which would hold for who sends, too.
    """
    return sock.has_come(seconds) if isinstance(sock, TlsSocket) else is_ready(sock, selectors.EVENT_READ, seconds)


def is_admitted(sock: socket.socket) -> bool:
    """Return whether a server keeps us for ADMITTED_SECONDS. Blocks as long; raises OSError when it is lost already."""
    if not has_come(sock, ADMITTED_SECONDS):
        return True
    beginning = sock.recv(100, socket.MSG_PEEK)
    return bool(beginning) and not beginning.startswith(REFUSALS)


def lost(error: OSError) -> str:
    """Return why a connection was lost, and what to do."""
    return f"{error.strerror or error}; check the network, and whether the server still runs."


def handle(numbers: Iterable[int], handler: Callable[[int, Any], object]) -> None:
    """Set the handler of signals, but of those that are ignored, as in a script's background job."""
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def interrupt_main_thread(until: threading.Event, seconds: float = float("inf")) -> None:
    """Interrupt what the main thread waits in, so that Python calls the handlers of signals there, ``until`` is set.

    Again and again, for so many seconds at most: a signal that comes just before a blocking call does not interrupt it.
    Time in which the process is stopped does not count.
    """
    while not until.is_set() and seconds > 0:
        if sys.platform != "win32":
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGURG)
        until.wait(INTERRUPT_SECONDS)
        seconds -= INTERRUPT_SECONDS


def received(sock: socket.socket) -> Iterator[bytes]:
    """Yield what the server sends in blocks of whole lines, an unfinished last one at end-of-file.

    As long as the server has sent no newline, a piece of two or more characters and a second of silence are a line.
    Blocks until something comes. Raises OSError when the connection is lost.
    """
    partial = b""
    sends_newlines = False
    silence_ends_it = False
    while True:
        is_silent = silence_ends_it and not has_come(sock, SILENCE_SECONDS)
        data = b"" if is_silent else sock.recv(READ_BYTES)
        end = data.rfind(b"\n") + 1
        sends_newlines = sends_newlines or end > 0
        block, partial = (partial + data[:end], data[end:]) if end else (b"", partial + data)
        if partial and (not data or len(partial) > MAX_SHOWN_BYTES):
            block, partial = block + partial + b"\n", b""
        if block:
            yield block
        if not data and not is_silent:
            return
        silence_ends_it = bool(partial) and not sends_newlines and len(data.decode("utf-8", "replace")) > 1


def read_line(sock: socket.socket, deadline: float | None = None) -> bytes:
    """Read a line and no further; return what there is of it if it is far too long, or at end-of-file.

    Blocks; with a deadline, only until then, and raises a time-out, an OSError.
    """
    line = b""
    while not line.endswith(b"\n") and len(line) <= MAX_LINE_BYTES:
        if deadline is not None:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
        byte = sock.recv(1)
        if not byte:
            break
        line += byte
    return line


def check_beginning(block: bytes) -> None:
    """Raise Hopeless when a server begins with what no chat server says, and tell what it is."""
    if block[:9].upper().startswith((b"HTTP/", b"<!DOCTYPE", b"<HTML")):
        raise Hopeless("that is a web server; check host and port.")
    # Alert, handshake: RFC 8446, 5.1; or what mychatserver.py says.
    if block.startswith((b"\x15\x03", b"\x16\x03", b"* this server speaks TLS")):
        raise Hopeless(NEEDS_TLS)


# --- Input: what is typed or piped, up to exit or its end -------------------------------------------------------------


def typed(screen: Screen) -> Iterator[tuple[bytes, bool]]:
    """Yield each line that a person enters, but blank ones, and whether it is ``exit``. Blocks."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte is no reason to end
    unsent = ""
    with contextlib.suppress(EOFError, OSError):  # Ctrl-D, or the terminal is gone
        while True:
            line = screen.line(unsent)
            words = line.strip("\t ")
            data = f"{line}\n".encode("utf-8", "replace")
            unsent = line if len(data) > MAX_LINE_BYTES + 1 else ""
            if unsent:
                screen.notice(LINE_TOO_LONG)
            elif words:
                yield data, words == "exit" or line.rstrip("\t ") == "/quit"


def piped() -> Iterator[tuple[bytes, bool]]:
    """Yield standard input in the blocks that it comes in, and whether ``exit`` ends them. Blocks in reading."""
    unfinished = b""
    while True:
        try:
            if sys.platform != "win32":
                os.set_blocking(0, True)  # it may be shared, as standard output
            data = os.read(0, READ_BYTES)
        except BlockingIOError:  # whoever shares it has just set it otherwise
            continue
        except OSError:  # there is none, as under nohup
            return
        if not data:
            return
        window = unfinished + data
        exit_line = EXIT.search(window) if b"exit" in window or b"/quit" in window else None
        if exit_line:
            yield data[: exit_line.end() - len(unfinished)], True
            return
        yield data, False
        unfinished = window[window.rfind(b"\n") + 1 :]
        if len(unfinished) > EXIT_BYTES:
            unfinished = b"-"


# --- The conversation: one thread shows what comes, the main thread sends what is entered -----------------------------


class Conversation:
    """A connection, or with ``connect_again`` one after another, from the greeting to the farewell."""

    def __init__(
        self,
        sock: socket.socket,
        screen: Screen,
        name: str,
        password: Password,
        connect_again: Callable[[], socket.socket] | None,
    ) -> None:
        self._sock = sock
        self._screen = screen
        self._name = name  # to ask the server for
        self._password = password
        self._connect_again = connect_again
        self._is_typed = os.isatty(0)  # asked once: a terminal that has hung up is none any more
        # A signal's number can be read here as it comes. Python calls its handler later, when the main thread gets to
        # it: never, for one that comes just before a blocking read.
        self._numbers, self._signals = socket.socketpair()
        self._signals.setblocking(False)
        # Set by the main thread, where signal handlers run too. No Event is set while it may be interrupted: its lock
        # could stay held, for whoever sets it next.
        self._waiting = False  # for input, or for the server to close: may be interrupted
        self._done_waiting = threading.Event()
        self._awake = threading.Event()
        self._interrupting = False  # in the handler: an Event must not be set in the middle of its being set
        self._entered = 0  # lines, before the server has asked for the password: it takes them for tries
        self._leaving = False  # so that the server's end-of-file is no surprise
        # Set by either.
        self._ctrl_c = False
        # Set by the receive thread.
        self._tries = 0  # to connect again, since a connection was steady
        self._password_is_due = False  # the server has asked for it, and waits
        self._received_all = False
        self._problem: str | None = None  # why the connection was lost
        self._connected = True

    # Runs in the main thread

    def run(self) -> int:
        """Send what is entered and show what comes, until one side leaves; return the exit status."""
        signal.set_wakeup_fd(self._signals.fileno(), warn_on_full_buffer=False)
        handle((signal.SIGINT,), self._on_ctrl_c)
        if sys.platform != "win32":
            signal.signal(signal.SIGURG, self._on_interrupt)  # nobody sends it but this program itself
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        self._screen.say(GREETING)
        if self._password.is_needless:
            self._screen.notice(NOT_ASKED)
        self._ask_for_name()
        self._talk()
        while self._password_is_due and self._give_password():
            self._talk()
        return self._farewell()

    def _talk(self) -> None:
        """Send what is entered and show what comes, until one side leaves, or the server wants the password."""
        self._done_waiting.clear()
        self._receiver = threading.Thread(target=self._receive, name="receive", daemon=True)
        self._receiver.start()
        try:
            try:
                self._waiting = True
                self._send_input()
                if not self._connected:
                    raise Interrupted  # nothing more comes, and there is no use in connecting again
                self._receiver.join(LEAVE_SECONDS if self._is_typed else None)
            finally:
                self._waiting = False
                self._done_waiting.set()
        except Interrupted:
            if not self._password_is_due:
                with contextlib.suppress(OSError):  # it is lost
                    self._sock.shutdown(socket.SHUT_RDWR)
            self._receiver.join(LEAVE_SECONDS)

    def _give_password(self) -> bool:
        """Answer the server's question, and have the person asked if need be; return whether we may go on. Blocks."""
        if self._ctrl_c or not can_ask():
            return False
        self._password_is_due = self._received_all = False
        self._problem = None
        if self._leaving:
            return False
        self._done_waiting.clear()
        self._waiting = True
        try:
            self._password.known = self._password.known or self._screen.secret()
            if self._password.known == b"exit":
                return False
            self._password.answer(self._sock, self._entered)
            if self._entered:
                self._screen.notice(TOO_EARLY)
            return True
        except (EOFError, Interrupted):  # the person leaves
            return False
        except (NotConnected, Hopeless, OSError) as error:
            if self._connect_again and not isinstance(error, Hopeless):
                return True  # the receive thread finds it lost too, and connects with what is known now
            self._problem = lost(error) if isinstance(error, OSError) else str(error)
            return False
        finally:
            self._entered = 0
            self._waiting = False
            self._done_waiting.set()

    def _send_input(self) -> None:
        try:
            for data, is_exit in typed(self._screen) if self._is_typed else piped():
                self._entered += not is_exit
                self._leaving = is_exit
                if self._send(data) and data.startswith(b"/nick "):
                    self._name = data[6:106].decode("utf-8", "replace").strip()  # more is no name
                    self._screen.people.asked_for = self._name
                if is_exit:
                    break
            self._leaving = True
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:  # the connection is lost: the receive thread shows what had come, and may know why
            if not self._connect_again:
                self._receiver.join()
                self._problem = self._problem or SERVER_CLOSED

    def _send(self, data: bytes) -> bool:
        """Send what was entered; return whether that worked. If it never will, raise OSError, else say so."""
        try:
            if self._connected:
                self._sock.sendall(data)
                return True
        except OSError:
            if not self._connect_again:
                raise
        if not self._leaving:
            self._screen.notice(NOT_SENT)
        return False

    def _on_ctrl_c(self, *_: object) -> None:
        self._ctrl_c = True
        signal.signal(signal.SIGINT, self._screen.die)  # a second one ends at once: the screen may be stuck
        if sys.platform == "win32":
            self._on_interrupt()
        else:  # as from the receive thread; CPython stumbles when two signals raise while input() waits
            signal.raise_signal(signal.SIGURG)

    def _on_interrupt(self, *_: object) -> None:
        if self._interrupting or self._screen.is_busy():  # the next signal comes soon
            return
        self._interrupting = True
        try:
            self._awake.set()
            self._screen.draw()
            if self._waiting and (self._ctrl_c or self._received_all):
                self._waiting = False  # once is enough
                self._done_waiting.set()
                self._screen.leave_line(self._ctrl_c)
                raise Interrupted
        finally:
            self._interrupting = False

    # Runs in the receive thread

    def _receive(self) -> None:
        """Show what comes until the last connection ends; then get the main thread out of its wait for input."""
        try:
            problem = self._show_what_comes()
            while problem and self._connect_again:
                if self._password_is_due or self._leaving or self._ctrl_c:
                    break
                problem = self._show_what_comes() if self._reconnect(self._connect_again) else None
        except Hopeless as error:
            problem = str(error)
        self._problem = problem
        self._received_all = True
        self._interrupt_input()

    def _show_what_comes(self) -> str | None:
        """Show what comes until the connection ends; return why it was lost, if it was."""
        refused, begun = False, time.monotonic()
        try:
            for number, block in enumerate(received(self._sock)):
                if number == 0:
                    check_beginning(block)
                block = clean(block.replace(b"\r\n", b"\n"))
                if number == 0 and block.startswith(QUESTION) and not self._password.was_asked:
                    self._password_is_due = True
                    if not can_ask():
                        self._sock.shutdown(socket.SHUT_WR)  # or what is in the pipe would be taken for tries
                    return ASKED_LATE if self._password.known else UNANSWERED
                refused = number == 0 and block.startswith(REFUSALS)
                self._screen.show(block)
                if self._screen.gone:
                    return None
            return TURNED_AWAY if refused else None if self._leaving else SERVER_CLOSED
        except OSError as error:
            return lost(error)
        finally:
            if time.monotonic() - begun > STEADY_SECONDS:
                self._tries = 0

    def _reconnect(self, connect_again: Callable[[], socket.socket]) -> bool:
        """Try to connect until that works, and say so; return whether it does before the main thread leaves."""
        self._connected = False
        with contextlib.suppress(OSError):  # whoever is sending is to notice
            self._sock.shutdown(socket.SHUT_RDWR)
        self._screen.show(b"* connection lost, trying again\n")
        while True:
            if self._done_waiting.wait(RECONNECT_SECONDS[min(self._tries, len(RECONNECT_SECONDS) - 1)]):
                return False
            self._tries += 1
            with contextlib.suppress(OSError, UnicodeError, NotConnected):  # not yet
                sock = connect_again()
                if is_admitted(sock) and not self._done_waiting.is_set():
                    break
                sock.close()
        before, self._sock = self._sock, sock
        before.close()
        people = self._screen.people
        if people.own_label and not people.own_label[0].isdigit():  # not a port: the last name that we got
            self._name = people.own_label
        people.own_label = local_label(sock)
        self._ask_for_name()
        self._connected = True
        self._screen.show(b"* connected again\n")
        return True

    def _ask_for_name(self) -> None:
        if self._name:
            self._screen.people.asked_for = self._name
            with contextlib.suppress(OSError):  # lost: the reading will tell
                self._sock.sendall(f"/nick {self._name}\n".encode("utf-8", "replace"))

    # Runs in the watch thread

    def _watch(self) -> None:
        """Have the main thread handle each signal, and end the program if it has to end and cannot."""
        while True:
            numbers = set(self._numbers.recv(READ_BYTES))
            if signal.SIGINT in numbers:
                self._ctrl_c = True
                self._done_waiting.wait(INTERRUPT_SECONDS)  # the main thread has most probably seen it
                self._interrupt_input(STUCK_SECONDS)
            elif numbers - OWN_SIGNALS:
                self._awake.clear()
                interrupt_main_thread(self._awake, STUCK_SECONDS)
            ending = numbers & LAST_SIGNALS
            if ending:
                for _ in range(int(STUCK_SECONDS / INTERRUPT_SECONDS)):
                    time.sleep(INTERRUPT_SECONDS)  # in steps: time in which the process is stopped does not count
                # The program has ended, and this thread too, unless it is stuck.
                self._screen.release()
                interrupt_main_thread(threading.Event(), STUCK_SECONDS)
                self._screen.close()
                os._exit(128 + min(ending))

    # Runs in either of these two

    def _interrupt_input(self, seconds: float = float("inf")) -> None:
        """Get the main thread out of its wait for input, in so many seconds at most."""
        if sys.platform == "win32" and not self._done_waiting.is_set():  # where nothing ends a blocking input()
            os._exit(self._farewell())
        interrupt_main_thread(self._done_waiting, seconds)

    # Runs in any of the three

    def _farewell(self) -> int:
        """Say how the conversation ended; return the exit status."""
        if self._ctrl_c:
            if not (self._receiver.is_alive() and self._connected):  # stuck in showing something, as this would be
                self._screen.say(FAREWELL)
            return 130
        if self._screen.gone:
            if self._screen.problem:
                warn(f"Cannot show what comes: {self._screen.problem}; give standard output another place.")
            return 1 if self._screen.problem else 0
        forget_typed()
        if self._problem:
            warn(f"Connection lost: {self._problem}")
        self._screen.say(FAREWELL)
        return 1 if self._problem else 0


# --- A password: what some servers ask for before anything else -------------------------------------------------------


class Password:
    """What a server may ask for, as far as it is known."""

    def __init__(self, known: bytes) -> None:
        self.known = known
        self.was_asked = False  # on this connection: a question that comes later is none
        self.is_needless = False  # it is known, and this server did not ask

    def enter(self, sock: socket.socket) -> None:
        """If there is a password, wait for the server to ask for it, and give it. Nothing else is said meanwhile.

        Blocks QUESTION_SECONDS when the server does not ask. Raises like ``answer``.
        """
        self.was_asked = False
        if self.known:
            beginning = first_bytes(sock)
            self.is_needless = not beginning.startswith((QUESTION, *REFUSALS))
            if beginning.startswith(QUESTION):
                read_line(sock)
                self.answer(sock)

    def answer(self, sock: socket.socket, tries: int = 0) -> None:
        """Give the password, where ``tries`` other lines may count as tries; block until the server takes it.

        Raises Hopeless, NotConnected, or OSError, a time-out after ANSWER_SECONDS among them.
        """
        self.was_asked = True
        deadline = time.monotonic() + ANSWER_SECONDS
        sock.settimeout(ANSWER_SECONDS)
        try:
            sock.sendall(self.known + b"\n")
            for _ in range(tries + 1):
                reply = read_line(sock, deadline)
                if reply != b"* wrong password\n":
                    break
        finally:
            sock.settimeout(None)
        if reply == b"* wrong password\n":
            raise Hopeless("Wrong password: ask whoever runs the server for it, and try again.")
        if reply != b"* password accepted\n":
            said = clean(reply).decode().strip("* \n") or "it closed the connection"
            raise NotConnected(f"The server has not let us in: {said}; try again later.")


def first_bytes(sock: socket.socket) -> bytes:
    """Return how a connection begins, unread; nothing if nothing comes in QUESTION_SECONDS. Raises OSError."""
    deadline = time.monotonic() + QUESTION_SECONDS
    beginning = b""
    while (seconds := deadline - time.monotonic()) > 0 and has_come(sock, seconds):
        beginning = sock.recv(READ_BYTES, socket.MSG_PEEK)
        if not beginning or not QUESTION.startswith(beginning) or beginning == QUESTION:
            break
        time.sleep(INTERRUPT_SECONDS)  # the rest of the line is on its way
    return beginning


def can_ask() -> bool:
    """Return whether a person can be asked for the password in the middle of the chat: not where input() is stuck."""
    if sys.platform == "win32" or not os.isatty(0):
        return False
    with contextlib.suppress(OSError), open("/dev/tty", "rb", buffering=0):
        return True
    return False  # the terminal is not this process's own, as under ``su -c``


def password_typed() -> bytes:
    """Ask for the password on this process's terminal, unseen, wherever standard input comes from.

    Blocks; raises EOFError at Ctrl-D, OSError where there is no terminal.
    """
    if sys.platform == "win32":
        return getpass.getpass("Password: ").encode("utf-8", "replace")
    # Elsewhere a signal that ends the program in the middle of getpass leaves the terminal without echo, and after
    # Ctrl-Z it would show what is typed.
    with open("/dev/tty", "r+b", buffering=0) as terminal, contextlib.ExitStack() as undo:
        as_it_was = termios.tcgetattr(terminal)
        unseen = [*as_it_was]
        unseen[3] &= ~termios.ECHO

        def ask(*_: object) -> None:
            termios.tcsetattr(terminal, termios.TCSAFLUSH, unseen)
            terminal.write(b"Password: ")

        def give_back(number: int, _: object) -> None:
            termios.tcsetattr(terminal, termios.TCSANOW, as_it_was)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)  # which ends the program, or stops it for as long as the shell likes
            signal.signal(number, give_back)
            termios.tcsetattr(terminal, termios.TCSANOW, unseen)

        leaving = signal.SIGTSTP, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT
        for number in (signal.SIGCONT, *leaving):
            undo.callback(signal.signal, number, signal.getsignal(number))
        undo.callback(terminal.write, b"\n")
        undo.callback(termios.tcsetattr, terminal, termios.TCSANOW, as_it_was)
        handle((signal.SIGCONT,), ask)
        handle(leaving, give_back)
        ask()
        line = terminal.readline()
    if not line:
        raise EOFError
    return line.rstrip(b"\n")


def password_from(path: str | None) -> bytes:
    """Return the password: a file's first line, else the environment's, or nothing. Raises NotConnected."""
    password, source = os.environ.get("MYCHAT_PASSWORD", "").encode("utf-8", "surrogateescape"), "MYCHAT_PASSWORD"
    if path is not None:
        source = path
        try:
            with open(path, "rb", buffering=0) as file:  # no more than the line, if it is standard input
                password = file.readline(MAX_LINE_BYTES + 3).removesuffix(b"\n").removesuffix(b"\r")
        except OSError as error:
            raise NotConnected(f"Cannot read {path}: {error.strerror}; give --password-file another file.") from None
    if b"\n" in password or b"\r" in password or len(password) > MAX_LINE_BYTES or (path is not None and not password):
        raise NotConnected(f"{source} holds no password: that is one line of 1 to {MAX_LINE_BYTES} bytes, the first.")
    return password


# --- Finding a server on the same network; without --lan nothing of this runs -----------------------------------------


def find_servers() -> list[tuple[str, str, int]]:
    """Ask the network for servers that were started with ``--lan``; return the name, address and port of each.

    The server's class Discovery tells what is sent and why. Blocks for as long as the least number of questions takes,
    never less, because nothing tells that the last server has answered; when nobody answers, until the most were asked.
    """
    least, most = ASKS
    found: dict[bytes, tuple[str, str, int]] = {}  # by the server's random id: one may be heard twice
    tokens: set[bytes] = set()  # of our questions: an answer repeats one
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        for asked in range(1, most + 1):
            token = secrets.token_hex(8).encode()
            tokens.add(token)
            ask(sock, b"mychat?1 " + token)
            deadline = time.monotonic() + ASK_SECONDS
            while (seconds := deadline - time.monotonic()) > 0:
                sock.settimeout(seconds)
                with contextlib.suppress(OSError):  # time is up; or, as Windows tells it, somebody cannot be asked
                    data, (host, _) = sock.recvfrom(QUESTION_BYTES)
                    # What is shown of it is safe on anybody's screen: it comes from strangers.
                    answer = re.fullmatch(rb"mychat!1 (\w{16}) (\w{16}) (\d{1,5}) ([0-9A-Za-z.-]{1,63})", data)
                    if answer and answer[1] in tokens and 0 < int(answer[3]) <= 65_535 and len(found) < MOST_FOUND:
                        found.setdefault(answer[2], (answer[4].decode(), host, int(answer[3])))
            if found and asked >= least:
                break
    return sorted(found.values())


def ask(sock: socket.socket, question: bytes) -> None:
    """Send a question to group and broadcast address: by every interface on Linux, else by the default route's."""
    question = question.ljust(QUESTION_BYTES)
    for address in (DISCOVERY_GROUP, EVERYONE):
        if sys.platform == "linux":
            for index, _ in socket.if_nameindex():
                by_interface = (socket.IPPROTO_IP, IP_PKTINFO, struct.pack("=i8x", index))
                with contextlib.suppress(OSError):  # it is down, or has no IPv4
                    sock.sendmsg([question], [by_interface], 0, (address, DISCOVERY_PORT))
        else:
            with contextlib.suppress(OSError):  # no network
                sock.sendto(question, (address, DISCOVERY_PORT))


def the_server_found() -> tuple[str, int]:
    """Return host and port of the one server on this network, and say so; raise NotConnected if it is not one."""
    servers = find_servers()
    if not servers:
        raise NotConnected(
            "No server answers on this network: check that one was started with --lan, that both machines are on the "
            "same network, and that no firewall is between."
        )
    if len(servers) > 1:
        commands = (f"\n{name}: python mychatclient.py {host} {port}" for name, host, port in servers)
        raise NotConnected("Several servers answer; join one of them:" + "".join(commands))
    name, host, port = servers[0]
    warn(f"Joining the server on {name}: {host} port {port}.")
    return host, port


# --- TLS: an encrypted connection to a server that shows whose it is; without --tls nothing of this runs --------------


def tls_context(authority: str | None) -> ssl.SSLContext:
    """Return what checks servers: by the system's authorities, or the one in this PEM file. Raise NotConnected."""
    try:
        import ssl
    except ImportError:
        raise NotConnected("This Python has no ssl module, so no TLS: use another Python, or try --ssh.") from None
    try:
        context = ssl.create_default_context(cafile=authority)
    except ssl.SSLError:
        raise NotConnected(
            f"There is no certificate in {authority}: give --tls-ca the PEM file of the server's."
        ) from None
    except OSError as error:
        raise NotConnected(f"Cannot read {authority}: {error.strerror}; give --tls-ca a PEM file.") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # in the middle of which nothing could be sent
    if authority is not None:  # any certificate that one is given, on every Python, as on 3.13 ...
        context.verify_flags |= X509_V_FLAG_PARTIAL_CHAIN
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # ... and one that openssl has made, as on those before
    return context


def secured(sock: socket.socket, context: ssl.SSLContext, host: str, port: int) -> TlsSocket:
    """Return a connection with TLS on it, of a server that has shown that it is ``host``; close ``sock`` if it is not.

    Blocks HANDSHAKE_SECONDS at most. Raises NotConnected, or Hopeless for a server that is another or has no TLS.
    """
    import ssl

    where = f"{host} port {port}"
    try:
        with closed_on_error(sock):
            secure = TlsSocket(sock, context, host)
        with closed_on_error(secure):
            secure.shake_hands()
        return secure
    except ssl.SSLCertVerificationError as error:
        raise Hopeless(certificate_problem(error, where)) from None
    except TimeoutError:
        problem = f"No TLS from {where} in {HANDSHAKE_SECONDS:.0f} s: leave --tls out if that server has none."
    except ssl.SSLError as error:
        if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL"):
            raise Hopeless(f"No TLS at {where}: leave --tls out, or give another port.") from None
        problem = f"No TLS with {where}: {error.reason}; check that its TLS is 1.2 or newer."
    except OSError:  # as mychatserver.py ends it when it has no certificate
        problem = f"{where} ends the connection when asked for TLS: leave --tls out if that server has none."
    except ValueError:
        problem = f"No certificate can be for {host!r}: join by the name or address that the server's has."
    raise NotConnected(problem)


def certificate_problem(error: ssl.SSLCertVerificationError, where: str) -> str:
    """Return one sentence that says why a server's certificate does not do, and what to do."""
    code = error.verify_code  # X509_V_ERR_...: openssl-verification-options(1)
    if code in (62, 64):  # host name, address
        return f"The certificate of {where} is for another name: join by a name or address that it has."
    if code == 10:
        return f"The certificate of {where} has expired: whoever runs that server has to make a new one."
    if code == 9:
        return f"The certificate of {where} is not valid yet: check the date on both machines."
    if code in (2, 18, 19, 20, 21):  # nobody known has signed it
        return f"The certificate of {where} is not trusted: give --tls-ca the PEM file of whoever runs that server."
    return f"The certificate of {where} does not do: {error.verify_message}; ask whoever runs that server."


class TlsSocket(socket.socket):
    """A socket with TLS, to the rest of this program like any other: one thread may read while another sends.

    An SSLSocket must not be used so. Here an SSLObject stands between two buffers in memory and is used with a lock
    held, under which nothing waits: who sends waits outside of it until the socket takes more, so that what comes is
    read all the same, and two sides that pour at each other never wait for each other.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str) -> None:
        """Take over a connection. Raise ValueError when ``host`` is nothing that a certificate could name."""
        import ssl

        # Guards what follows, and sending on the socket.
        self._lock = threading.Lock()
        self._received, self._output = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._output, server_hostname=host)
        self._ciphertext = memoryview(b"")  # out of the output, to be sent first
        self._seconds: float | None = None  # that who reads or sends may wait
        # Only who reads uses what follows.
        self._text = b""  # decrypted, not yet read
        self._at_end = False  # the server has said its end (close_notify)
        super().__init__(sock.family, sock.type, sock.proto, sock.detach())
        self.setblocking(False)

    # Runs in the thread that connects

    def shake_hands(self) -> None:
        """Have the server show who it is. Blocks HANDSHAKE_SECONDS at most. Raises OSError."""
        import ssl

        deadline = time.monotonic() + HANDSHAKE_SECONDS
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                pass
            finally:  # what is wrong is told the server too
                self._send_all(deadline)
            self._wait_for(selectors.EVENT_READ, deadline)
            data = super().recv(READ_BYTES)
            if not data:
                raise ConnectionResetError
            if data.startswith(REFUSALS):  # in plain text: no handshake was begun for us
                raise NotConnected("The server has turned this client away; try again later.")
            self._received.write(data)
        self._decrypt(b"")  # what came with the handshake's end: TLS 1.2 lets a server speak at once

    # Runs in the thread that reads

    def has_come(self, seconds: float) -> bool:
        """Wait until there is text or the end, so many seconds at most; return whether there is. Raise OSError."""
        deadline = time.monotonic() + seconds
        while not self._text and not self._at_end:
            if not is_ready(self, selectors.EVENT_READ, max(0.0, deadline - time.monotonic())):
                return False
            self._read()
        return True

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Wait for text and return it, none at the server's end; MSG_PEEK leaves it. Raise OSError at any other end."""
        while not self._text and not self._at_end:
            self._wait_for(selectors.EVENT_READ)
            self._read()
        if flags & socket.MSG_PEEK and not self._at_end:
            self._read()  # who looks again wants more, if there is more by now
        text = self._text[:size]
        if not flags & socket.MSG_PEEK:
            self._text = self._text[size:]
        return text

    def _read(self) -> None:
        """Decrypt what has come."""
        with contextlib.suppress(BlockingIOError):  # nothing, after all
            data = super().recv(READ_BYTES)
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "it was cut off, without TLS's own end")
            self._decrypt(data)

    def _decrypt(self, data: bytes) -> None:
        import ssl

        with self._lock:
            self._received.write(data)
            try:
                while part := self._tls.read(READ_BYTES):
                    self._text += part
                self._at_end = True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLZeroReturnError:
                self._at_end = True
            except ssl.SSLError as error:
                if not self._text:  # else it is read first, and what follows will tell
                    raise OSError(errno.EPROTO, f"TLS failed: {error.reason}") from None
            finally:
                with contextlib.suppress(OSError):  # who sends is told too; what had come before is read
                    self._send()
            if self._output.pending > TLS_OUTPUT_BYTES:
                raise OSError(errno.EPROTO, "the server asks for nothing but new keys")

    # Called from any thread

    def settimeout(self, value: float | None) -> None:
        """Have ``recv`` and ``sendall`` wait so many seconds at most; the socket itself never blocks."""
        self._seconds = value

    def sendall(self, data: bytes, flags: int = 0) -> None:  # type: ignore[override]  # of all buffers, bytes alone
        """Encrypt and send all of it; wait until the socket takes it."""
        rest = memoryview(data)
        while rest:
            with self._lock:
                if self._send():
                    rest = rest[self._tls.write(rest[:TLS_PIECE_BYTES]) :]
            self._send_all()

    def shutdown(self, how: int) -> None:
        """End the stream in this direction by TLS's own end, behind all that was sent; or both, at once."""
        if how == socket.SHUT_WR:
            with self._lock, contextlib.suppress(OSError):  # that the server's own end has not come
                self._tls.unwrap()  # all that was received is decrypted: it would be lost here
            self._send_all()
        else:
            super().shutdown(how)

    def _send_all(self, deadline: float | None = None) -> None:
        """Send what is encrypted; wait until the socket takes it, outside of the lock."""
        while True:
            with self._lock:
                if self._send():
                    return
            self._wait_for(selectors.EVENT_WRITE, deadline)

    def _wait_for(self, event: int, deadline: float | None = None) -> None:
        """Wait until the socket can be read or takes more; raise TimeoutError when that is too late."""
        if deadline is None and self._seconds is not None:
            deadline = time.monotonic() + self._seconds
        if not is_ready(self, event, None if deadline is None else max(0.0, deadline - time.monotonic())):
            raise TimeoutError(errno.ETIMEDOUT, "timed out")

    # Call with the lock held

    def _send(self) -> bool:
        """Send what is encrypted, as much as the socket takes; return whether that is all."""
        with contextlib.suppress(BlockingIOError):
            while self._ciphertext or self._output.pending:
                if not self._ciphertext:
                    self._ciphertext = memoryview(self._output.read())
                self._ciphertext = self._ciphertext[self.send(self._ciphertext) :]
        return not self._ciphertext and not self._output.pending


# --- Through ssh: to a server that only its own machine can reach; without --ssh nothing of this runs -----------------


def through_ssh(way: contextlib.ExitStack, target: str, host: str, port: int, again: bool) -> socket.socket:
    """Return a connection to ``host`` and ``port`` as ``target`` sees them, through the user's own ssh: ssh(1), -W.

    Blocks while ssh connects, asks what it has to ask on the terminal, and authenticates: then it runs LocalCommand,
    ssh_config(5), whose output comes to us as the first line. The chat begins behind that, so that only one of the two
    reads the terminal at any time. Raises NotConnected or OSError; what ssh has to say is on standard error then.
    ``again`` is for when the terminal is in use: ssh has none then, and fails if it would have to ask.
    Else Ctrl-C reaches ssh too; once it ends, so does the chat. Whoever closes ``way`` ends ssh.
    """
    command = ["ssh", "-W", f"[{host}]:{port}" if ":" in host else f"{host}:{port}"]
    for option in (
        "PermitLocalCommand=yes",
        f"LocalCommand=echo {SSH_READY.decode()}",
        "ControlPath=none",  # a connection that is shared runs no LocalCommand
        f"ConnectTimeout={CONNECT_SECONDS:.0f}",
        f"ServerAliveInterval={SSH_ALIVE_SECONDS}",
        *(["BatchMode=yes"] if again else []),
    ):
        command += ["-o", option]
    try:
        sock, child = start_on_socket([*command, "--", target], without_terminal=again)
    except OSError as error:
        raise NotConnected(f"Cannot run ssh here: {error.strerror}; install the OpenSSH client.") from None
    way.callback(end_child, child)
    way.callback(sock.close)
    if again:
        sock.settimeout(SSH_AGAIN_SECONDS)
    while line := read_line(sock):
        if line.endswith(b"\n") and line.rstrip() == SSH_READY:
            break
    else:
        raise NotConnected(f"No connection to {target}: ssh says why above; try ssh {target} alone first.")
    sock.settimeout(None)
    if has_come(sock, SSH_REFUSAL_SECONDS) and not sock.recv(1, socket.MSG_PEEK):
        raise NotConnected(
            f"No server at {host} port {port} of {target}: start mychatserver.py there, or give another port "
            "behind the host; ssh says above what it found."
        )
    return sock


def end_child(child: subprocess.Popen[bytes]) -> None:
    """Wait a little for a program to end by itself, then end it."""
    for end in (child.terminate, child.kill, lambda: None):
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(SSH_END_SECONDS)
            break
        end()


def start_on_socket(command: list[str], without_terminal: bool) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start a program, and return it and a socket that is its standard input and output. Raises OSError."""
    ours, theirs = socket.socketpair()
    with closed_on_error(ours), closed_on_error(theirs):
        errors = subprocess.DEVNULL if without_terminal else None
        if sys.platform != "win32":
            child = subprocess.Popen(  # noqa: S603 - no shell
                command,
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=errors,
                start_new_session=without_terminal,  # or what ssh runs on its way may ask all the same
            )
            theirs.close()
        else:  # where a socket cannot be that: a pipe each way, and a thread that pumps
            child = subprocess.Popen(  # noqa: S603 - no shell
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
            assert child.stdin and child.stdout  # noqa: S101 - for mypy
            receive = functools.partial(theirs.recv, READ_BYTES)
            read = functools.partial(child.stdout.read, READ_BYTES)
            no_more = functools.partial(theirs.shutdown, socket.SHUT_RDWR)
            there = receive, child.stdin.write, child.stdin.close
            back = read, theirs.sendall, no_more, theirs.close
            threading.Thread(target=pump, args=there, daemon=True).start()
            threading.Thread(target=pump, args=back, daemon=True).start()
    return ours, child


def pump(read: Callable[[], bytes], write: Callable[[bytes], object], *ends: Callable[[], object]) -> None:
    """Write what can be read, until there is no more or nobody takes it. Blocks."""
    with contextlib.suppress(OSError):  # ssh has ended, or the chat
        while data := read():
            write(data)
    for end in ends:
        with contextlib.suppress(OSError):  # likewise
            end()


# --- The command line: whom to join, and what can go wrong ------------------------------------------------------------


def warn(text: str) -> None:
    """Write one line to standard error, if there is one."""
    with contextlib.suppress(OSError):  # nobody reads it
        os.write(2, f"{text}\n".encode("utf-8", "replace"))


def forget_typed() -> None:
    """Throw away what was typed and not read, or the shell would run what was meant for the chat."""
    if sys.platform != "win32" and os.isatty(0):
        with contextlib.suppress(termios.error):
            termios.tcflush(0, termios.TCIFLUSH)


def open_missing_descriptors() -> None:
    """Open the null device for a standard stream that was closed, or the connection would get its number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # which input() would miss
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for good


def is_every_address(host: str) -> bool:
    """Return whether a server can listen on ``host`` but nobody can join it, as 0.0.0.0."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:  # a name
        return False


def port_number(text: str) -> int:
    """Return ``text`` as a port to connect to; raise what argparse turns into a usage error."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 65_535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: a number from 1 to 65535")
    return int(text)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; exit with status 2 and a usage line when they are wrong."""
    parser = argparse.ArgumentParser(prog="mychatclient", description="A chat client.", allow_abbrev=False)
    add = parser.add_argument
    add("host", nargs="?", help=f"whom to join (default: {DEFAULT_HOST})")
    add("port", nargs="?", type=port_number, help=f"its port (default: {DEFAULT_PORT})")
    add("--tls", action="store_true", help="encrypt, and check whose the server is (default: do not)")
    add("--tls-ca", metavar="PEM", help="the same, trusting this certificate (default: the system's authorities)")
    add("--lan", action="store_true", help="find the server on this network (default: do not)")
    add("--ssh", metavar="[USER@]MACHINE", help="join through ssh, as seen from there (default: do not)")
    add("--name", default=os.environ.get("MYCHAT_NAME", ""), help="be called this (default: MYCHAT_NAME, or the port)")
    password = parser.add_mutually_exclusive_group()
    password.add_argument("--password", action="store_true", help="ask for the server's password (default: if it asks)")
    password.add_argument("--password-file", metavar="FILE", help="whose first line it is (default: MYCHAT_PASSWORD)")
    add("--bell", action="store_true", help="ring when a line names you (default: do not)")
    add("--reconnect", action="store_true", help="after a lost connection, try again (default: do not)")
    add("--time", action="store_true", help="show when each line came (default: do not)")
    add("--no-color", action="store_true", help="show no colours (default: show them in a terminal)")
    add("--plain", action="store_true", help="only add to the screen, for screen readers (default: off)")
    add("--version", action="version", version=f"mychatclient {__version__}")
    options = parser.parse_args(argv)
    if options.reconnect and not (os.isatty(0) and os.isatty(1)):
        parser.error("--reconnect is for a terminal: what comes through a pipe meanwhile would be lost")
    if options.lan and (options.host is not None or options.ssh is not None):
        parser.error("--lan finds host and port by itself: leave out what else tells whom to join")
    options.tls = options.tls or options.tls_ca is not None
    if options.tls and options.ssh is not None:
        parser.error("--ssh encrypts already: leave --tls out")
    if options.ssh is not None and (not options.ssh or options.ssh.startswith("-")):  # which ssh takes for an option
        parser.error(f"{options.ssh!r} is no machine for ssh: [USER@]MACHINE")
    options.host = DEFAULT_HOST if options.host is None else options.host
    options.port = DEFAULT_PORT if options.port is None else options.port
    if options.host.isdigit():
        parser.error(f"{options.host} is no host; the port comes behind it: {DEFAULT_HOST} {options.host}")
    if options.host.startswith("[") and options.host.endswith("]"):
        options.host = options.host[1:-1]
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the client; return the exit status: 0 left, 1 no or lost connection, 130 Ctrl-C."""
    try:
        open_missing_descriptors()
        options = parse_args(argv)
        if is_every_address(options.host):
            warn(f"{options.host} is where a server listens, not an address to join: use one that the server printed.")
            return 1
        try:
            password = Password(password_typed() if options.password else password_from(options.password_file))
        except EOFError:  # Ctrl-D
            return 0
        except OSError:
            warn("--password asks in a terminal: use --password-file FILE or MYCHAT_PASSWORD where there is none.")
            return 1
        except NotConnected as problem:
            warn(str(problem))
            return 1
        with contextlib.ExitStack() as way:

            def join(again: bool = False) -> socket.socket:
                if options.ssh:
                    way.close()  # ends the ssh that was before
                    sock = through_ssh(way, options.ssh, options.host, options.port, again)
                else:
                    sock = connect(options.host, options.port)
                    if context:
                        sock = secured(sock, context, options.host, options.port)
                with closed_on_error(sock):
                    password.enter(sock)
                return sock

            try:
                context = tls_context(options.tls_ca) if options.tls else None
                if options.lan:
                    options.host, options.port = the_server_found()
                sock = join()
            except (NotConnected, Hopeless, OSError, UnicodeError) as error:
                warn(connecting_problem(error, options.host, options.port))
                forget_typed()
                return 1
            screen = screen_for(options, local_label(sock))  # from here on a signal may find it
            connect_again = (lambda: join(again=True)) if options.reconnect else None
            try:
                return Conversation(sock, screen, " ".join(options.name.split()), password, connect_again).run()
            finally:
                screen.close()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
