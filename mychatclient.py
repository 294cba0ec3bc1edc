#!/usr/bin/env python3
"""A chat client for any machine with Python: ``python mychatclient.py``.

Shows what the others say, sends what you type; ``exit`` leaves. One file, the standard library alone. With a pipe for
standard input it is a filter: it sends what it reads, half-closes at the end, and shows what still comes until the
server closes.

The threads, and who owns what
    main      the input loop: waits for what is typed or piped, and sends it. All signals are handled here, and while a
              person types, in a line editor, everything is drawn here.
    receive   reads the connection, has the screen show what came, and connects again. When nothing more comes it
              interrupts the input loop.

With ``--ssh`` the chat's socket is one end of a pair, whose other end the user's own ssh has. ``--lan`` finds a server
on the same network.

The wire is lines of UTF-8, as the server's docstring tells. A server that never sends a newline is shown too: what it
sent counts as a line after a second of silence.
"""

from __future__ import annotations

import sys

if (python := sys.version_info) < (3, 9):  # a SyntaxError here? This Python is too old: use Python 3.9 or newer.
    sys.exit("This Python is too old, {}.{}: use Python 3.9 or newer.".format(*python[:2]))
if __name__ == "__main__":  # a Ctrl-C during the imports needs no traceback
    show_exception = sys.excepthook
    sys.excepthook = lambda kind, *rest: None if kind is KeyboardInterrupt else show_exception(kind, *rest)

import argparse
import collections
import contextlib
import errno
import functools
import getpass
import io
import ipaddress
import itertools
import os
import re
import secrets
import select
import selectors
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ssl  # at run time only where somebody asks for TLS: some Pythons have none

with contextlib.suppress(ImportError):  # Windows has none
    import fcntl
    import termios

__version__ = "1.0"

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 12000
GREETING = "Connected to chat server. Type 'exit' to leave."
FAREWELL = "Disconnected from server"

READ_BYTES = 65_536  # read at once, from the connection and from a pipe
MAX_LINE_BYTES = 65_536  # that a person may send: what the server takes
INTERRUPT_SECONDS = 0.05  # between signals to the main thread: one may come just before it blocks
STUCK_SECONDS = 1.0  # in which a line can be shown, unless nobody reads


# --- Lines: what may be shown, on anybody's screen --------------------------------------------------------------------

PLAIN = bytes([*b"\t\n", *range(0x20, 0x7F)])
# IAC and WILL..DONT with an option, or a command alone: RFC 854. A newline always ends the line.
TELNET = re.compile(rb"\xff(?:[\xfb-\xfe][\x00-\x09\x0b-\x7f]|[\xf0-\xfa])")
# Controls but tab and newline (C0, DEL, C1), line and paragraph separator, and what overrides the order of writing.
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def clean(block: bytes) -> bytes:
    """Return the lines of ``block`` without telnet's sequences, and U+FFFD for all that is forbidden or not UTF-8."""
    if not block.translate(None, PLAIN):
        return block
    text = TELNET.sub(b"", block).decode("utf-8", "replace")
    return FORBIDDEN.sub("\ufffd", text).encode()


# --- The screen: everything that is shown goes through here -----------------------------------------------------------

# What the lines tell that a server says, or we ourselves. A label is 24 characters and another server's name.
LABEL = "[^ :*]{1,64}"
HERE = rf"{LABEL}(?: \(you\))?"
LINE = re.compile(
    rf"(?P<private>\* )?(?P<speaker>{LABEL})(?(private) to you):(?P<text>.*)"
    rf"|\* (?P<newcomer>{LABEL}) joined"
    rf"|\* (?P<old>{LABEL}) is now (?P<new>{LABEL})"
    rf"|\* \d+ here: (?P<here>{HERE}(?:, {HERE})*)(?:, and .*)?"
    r"|\* (?P<refusal>name '|not a name: ).*"
    r"|\* (?P<history>the last (?:line|\d+ lines):)"
    r"|\* (?P<live>live from here|connected again)"
)
LABELS_REMEMBERED = 1_000  # with their colours, and for completion
COMMANDS = "/help", "/ignore", "/msg", "/nick", "/quit", "/r", "/who"  # the server's, and our own
# Of labels, with a contrast of 4 or more on black and on white both: of a terminal's 256, or of its first 8.
COLOURS_OF_256 = tuple(f"\x1b[38;5;{number}m" for number in (28, 161, 27, 130, 164, 30, 99, 64, 31, 131))
COLOURS_OF_8 = "\x1b[31m", "\x1b[32m", "\x1b[35m", "\x1b[36m"
BOLD, GREY, PLAIN_TEXT = "\x1b[1m", "\x1b[38;5;243m", "\x1b[m"


class Interrupted(Exception):
    """The conversation is over while the main thread waited for input."""


class Style:
    """How lines that came are shown: as they are, or with colours, the time, a bell; and what they tell of people."""

    def __init__(
        self,
        own_label: str,
        colours: Sequence[str] = (),
        clock: bool = False,
        bell: bool = False,
        compact: bool = False,
        is_filter: bool = False,
    ) -> None:
        self.own_label = own_label
        self.asked_for = ""  # the name that we asked for last
        self.labels: dict[str, str] = {}  # of who was heard of, the latest last, each with its colour
        self._ignored: set[str] = set()
        self._colours = itertools.cycle(colours or [""])
        self._bold = BOLD if colours else ""
        self._grey = GREY if colours is COLOURS_OF_256 else ""
        self._gap = "" if compact else "\n"
        self._clock = clock
        self._bell = "\a" if bell else ""
        self._is_as_it_comes = is_filter and not clock
        self._in_history = False  # what comes was said earlier

    def rows(self, block: bytes) -> bytes:
        """Return the lines of ``block``, if any, with an empty row before each, unless that is not wanted."""
        if self._is_as_it_comes and block:
            gap = self._gap.encode()
            return gap + block[:-1].replace(b"\n", b"\n" + gap) + b"\n"
        lines = block.decode("utf-8", "replace").split("\n")[:-1]
        return "".join(map(self._row, lines)).encode()

    def beginning(self, begun: str) -> list[str]:
        """Return commands and labels that begin so, whatever the case, the latest last; with nothing begun, none."""
        words = (*COMMANDS, *self.labels)
        return [word for word in words if begun and word.casefold().startswith(begun.casefold())]

    def ignore(self, label: str) -> str:
        """Show what ``label`` says no more, or again; return a notice that tells who is ignored."""
        self._is_as_it_comes = False
        if label:
            self._ignored ^= {label.casefold()}
        return f"* ignored: {', '.join(sorted(self._ignored)) or 'nobody'}"

    def _row(self, line: str) -> str:
        """Return a line as it is shown, with its newline; nothing when its speaker is ignored."""
        found, was_in_history = LINE.fullmatch(line), self._in_history
        speaker, text, is_private = found.group("speaker", "text", "private") if found else ("", "", "")
        if speaker and speaker.casefold() in self._ignored:
            return ""
        if found:
            self._take_note(found)
        is_for_us = bool(speaker and (is_private or naming(self.own_label).search(text)))
        colour = self._bold if is_for_us else self._grey if line.startswith("* ") else ""
        row = coloured(colour, line)
        if speaker and not is_private:
            row = f"{coloured(self.labels[speaker], speaker)}:{coloured(colour, text)}"
        is_old = was_in_history and self._in_history  # where one of them is not, this line begins or ends the history
        time_said = time.strftime("%H:%M ") if self._clock and not is_old else ""
        return f"{self._gap}{time_said}{row}{self._bell if is_for_us else ''}\n"

    def _take_note(self, told: re.Match[str]) -> None:
        """Take note of what a line tells of people, and of the history."""
        if told["refusal"]:
            self.asked_for = ""
        elif told["history"] or told["live"]:
            self._in_history = bool(told["history"])
        elif told["here"]:
            for label in told["here"].split(", "):
                self._remember(label.removesuffix(" (you)"))
        else:
            if told["new"]:
                self._rename(told["old"], told["new"])
            self._remember(told["speaker"] or told["newcomer"] or told["new"])

    def _rename(self, old: str, new: str) -> None:
        """Have what was known of one label hold for another."""
        if old in self.labels:
            self.labels[new] = self.labels.pop(old)  # with its colour
        if old.casefold() in self._ignored:
            self._ignored = self._ignored - {old.casefold()} | {new.casefold()}
        if old == self.own_label or new == self.asked_for:  # the server may see us come from another port than we do
            self.own_label, self.asked_for = new, ""

    def _remember(self, label: str) -> None:
        self.labels[label] = self.labels.pop(label, "") or next(self._colours)
        if len(self.labels) > LABELS_REMEMBERED:
            del self.labels[next(iter(self.labels))]


@functools.lru_cache(maxsize=1)
def naming(label: str) -> re.Pattern[str]:
    """Return the pattern that finds a label in a text, whatever the case, or where there is none nothing."""
    return re.compile(rf"(?<!\w){re.escape(label)}(?!\w)" if label else "(?!)", re.IGNORECASE)


def coloured(colour: str, text: str) -> str:
    """Return a text in a colour, or as it is where there is none."""
    return f"{colour}{text}{PLAIN_TEXT}" if colour else text


class Screen:
    """A plain screen, which is only added to; it owns standard output, and the terminal that one types in."""

    def __init__(self, style: Style) -> None:
        self.style = style
        self.error: OSError | None = None  # why nothing more can be shown
        self.is_busy = False  # the main thread may neither draw nor be interrupted: set by it alone
        # Unbuffered, so that nothing is left to fail at exit; on Windows this finds the console and its Unicode.
        self._file = open(1, "wb", buffering=0, closefd=False)  # noqa: SIM115 - for good
        # One message at a time; but a handler of signals may have to say something in the middle of one.
        self._lock = threading.RLock()
        self._as_it_was = None
        if sys.platform != "win32" and os.isatty(0):
            wait_for_foreground()
            self._as_it_was = termios.tcgetattr(0)

    # Runs in the receive thread

    def show(self, block: bytes) -> None:
        """Show whole lines that came from the server, below an empty row each. Blocks while standard output does.

        To be called with nothing, too, when none come for a while: an editor may have to look for a signal.
        """
        self._write(self.style.rows(block))

    def wake(self) -> bool:
        """Have the main thread call the handler of signals; return whether its wait for a line can be ended at all.

        To be called again until the main thread has noticed: a signal that comes just before it blocks does nothing.
        """
        if sys.platform == "win32":
            return False
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGURG)
        return True

    # Runs in the main thread

    def say(self, text: str) -> None:
        """Show a line of our own."""
        self._write(f"{text}\n".encode())

    def say_last(self, text: str) -> None:
        """The same; nobody shows anything after it. Show nothing if somebody is stuck in showing something."""
        if self._lock.acquire(timeout=STUCK_SECONDS):  # for good
            self.say(text)

    def notice(self, text: str) -> None:
        """Show a notice of our own as if it came from the server: what it quotes of a typed line is cleaned, too."""
        self._write(self.style.rows(clean(f"{text}\n".encode("utf-8", "replace"))))

    def line(self, unsent: str) -> str:
        """Return the next line entered; it may begin with ``unsent``. Blocks; raises EOFError at Ctrl-D."""
        return input()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if sys.platform != "win32" and self._as_it_was and not is_in_background():
            with contextlib.suppress(termios.error):  # it is gone
                termios.tcsetattr(0, termios.TCSANOW, self._as_it_was)

    # Runs in the main thread, in the handler of signals

    def draw(self) -> None:
        """Show what another thread wants shown, if only the main thread can."""

    def end_line(self, ctrl_c: bool) -> None:
        """Get the main thread out of whatever it waits in, ``line`` above all: raise Interrupted, with signals blocked.

        Begins a new row below what is half-typed, as far as that is known: after ``ctrl_c`` the row has a ^C.
        """
        if ctrl_c and os.isatty(1):
            self.say("")
        block_signals()
        raise Interrupted

    # Runs in any thread

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        with self._lock:
            try:
                while rest:
                    if sys.platform != "win32":
                        os.set_blocking(1, True)  # it may be shared with a program that sets it otherwise
                    rest = rest[self._file.write(rest) or 0 :]
            except OSError as error:
                self.error = error


if sys.platform != "win32":

    def is_in_background() -> bool:
        """Return whether somebody else has the terminal, as long as it is this process's own."""
        with contextlib.suppress(OSError):  # it is not
            return os.tcgetpgrp(0) != os.getpgrp()
        return False

    def wait_for_foreground() -> None:
        """Stop in the background, as who reads from the terminal there is stopped, until the shell calls back."""
        if is_in_background():
            os.killpg(0, signal.SIGTTIN)

    class GnuReadline(Screen):
        """A terminal with GNU readline, on which what comes is shown above the half-typed line, and never in it.

        Only the main thread draws. The receive thread leaves a block and sends the main thread a signal, for which
        ``draw`` is called. While a person types, the main thread waits in select() inside of ``input``; a signal
        interrupts that, and CPython calls its handler there, between two keystrokes, when the editor's state is whole.
        So ``draw`` may have readline take its line off the screen, write, and have it draw the line again. While a
        send blocks, the signal interrupts the send; at any other time ``draw`` is called between two steps of the
        main thread's own.
        """

        is_libedit = False
        needs = "rl_clear_visible_line"  # which a library that is too old lacks
        STATE_CALLBACK = 0x80000  # readline.h: a line is being edited
        STATES_PENDING = 0x80 | 0x100 | 0x400  # incremental and other search, repeat count

        def __init__(self, style: Style) -> None:
            import ctypes
            import readline

            super().__init__(style)
            # The library that this module uses, found as the linker found it: in the program, else through the module.
            library = ctypes.CDLL(None)
            if not hasattr(library, "rl_redisplay"):
                library = ctypes.CDLL(readline.__file__)
            if ("libedit" in (readline.__doc__ or "")) != self.is_libedit or not hasattr(library, self.needs):
                raise ImportError
            self._readline, self._library = readline, library
            self._block = b""  # to be shown: the receive thread leaves the next one when the main thread has shown it
            self._shown = threading.Event()
            for setting in (
                "set enable-bracketed-paste off",
                # What completes is listed at once: for a question, readline would wait where no signal ends its wait.
                "set completion-query-items 0",
                "set page-completions off",
                "set completion-ignore-case on",
                "bind ^I rl_complete" if self.is_libedit else "tab: complete",
            ):
                readline.parse_and_bind(setting)
            readline.set_completer(self._complete)
            readline.set_completer_delims(" \t")
            # Once, now, and no more: between two lines, where the editor would reset the terminal, the kernel would
            # echo what is typed or pasted, and the editor show it again.
            library.rl_prep_terminal(1)
            self._prepared = termios.tcgetattr(0)
            # Ctrl-C must not take away what the editor has seen to be there: it would wait for it, deaf to signals.
            self._prepared[3] |= termios.NOFLSH
            termios.tcsetattr(0, termios.TCSANOW, self._prepared)
            for name in ("rl_prep_term_function", "rl_deprep_term_function"):
                ctypes.c_void_p.in_dll(library, name).value = None
            handle((signal.SIGTSTP, signal.SIGCONT), self._on_job_control)

        # Runs in the receive thread

        def show(self, block: bytes) -> None:
            """Have whole lines shown that came from the server; block until the main thread has done it."""
            self._shown.clear()
            self._block = block
            self.wake()  # for nothing, too: a signal that comes together with a key does not end the editor's wait
            while block and not self._shown.wait(INTERRUPT_SECONDS):
                self.wake()

        # Runs in the main thread

        def line(self, unsent: str) -> str:
            self._readline.set_startup_hook(functools.partial(self._readline.insert_text, unsent))
            signal.siginterrupt(signal.SIGURG, False)  # or it would cut off the editor's writing to a slow terminal
            try:
                text = input()
            finally:
                signal.siginterrupt(signal.SIGURG, True)
            if not (text or self.is_libedit):
                self.say("")  # without a prompt readline swallows the newline of an empty line
            return text

        def _complete(self, begun: str, number: int) -> str | None:
            """Return the label of that number, of those that begin so. If there is none, Tab is a character.

            So it is, too, when more input is there already: then it was pasted.
            """
            self.is_busy = True  # the editor would swallow what is raised here
            try:
                if number == 0:
                    is_pasted = bool(select.select([0], [], [], 0)[0])
                    self._matches = [] if is_pasted else self.style.beginning(begun)
                    if not self._matches:
                        self._readline.insert_text("\t")
                        self._library.rl_redisplay()
                return self._matches[number] if number < len(self._matches) else None
            finally:
                self.is_busy = False

        # Runs in the main thread, in a handler of signals

        def draw(self) -> None:
            """Show the block that the receive thread has left, if any."""
            if self._block:
                is_half_typed = self._is_half_typed()
                if is_half_typed:
                    self._clear_line()
                self._write(self.style.rows(self._block))
                if is_half_typed:
                    self._library.rl_forced_update_display()
                self._block = b""
                self._shown.set()

        def end_line(self, ctrl_c: bool) -> None:
            if self._is_half_typed():
                if not self.is_libedit:  # which has no way to the end of the line
                    self._library.rl_end_of_line(1, 0)
                    self._library.rl_redisplay()
                    self._library.fflush(None)
                self.say("")
            super().end_line(False)

        def _on_job_control(self, number: int, _: object) -> None:
            """Give the terminal to the shell, and stop, as Ctrl-Z asks; make it ours again when we are continued."""
            was_busy, self.is_busy = self.is_busy, True  # what comes waits until the line is back
            if number == signal.SIGTSTP:
                if self._is_half_typed():
                    self._clear_line()
                self.close()
                signal.raise_signal(signal.SIGTTIN)  # which has no handler; in a group without a shell it does nothing
            wait_for_foreground()  # else the editor would read what the shell types, and stop where it reads
            with contextlib.suppress(termios.error):  # it is gone
                if termios.tcgetattr(0) != self._prepared:
                    termios.tcsetattr(0, termios.TCSANOW, self._prepared)
                    if self._is_half_typed():
                        self._library.rl_forced_update_display()
            self.is_busy = was_busy
            self.wake()  # for what has come meanwhile

        def _is_half_typed(self) -> bool:
            """Return whether there is something of a line on the screen."""
            import ctypes

            state = ctypes.c_ulong.in_dll(self._library, "rl_readline_state").value
            return bool(
                state & self.STATE_CALLBACK and (self._readline.get_line_buffer() or state & self.STATES_PENDING)
            )

        def _clear_line(self) -> None:
            """Take the line off the screen."""
            self._library.rl_clear_visible_line()
            self._library.fflush(None)  # what we write passes by C's buffer, and would come first

    class Libedit(GnuReadline):
        """The same with libedit, as on macOS, which tells little: right for lines that fit a row.

        So a line counts as half-typed all the time that it is edited: the cursor's row is cleared, and the line drawn
        again, if there is one. (What libedit draws again lacks combining marks; what is sent has them.)
        """

        is_libedit = True
        needs = "rl_forced_update_display"
        _is_editing = False

        def line(self, unsent: str) -> str:
            self._is_editing = True
            try:
                return super().line(unsent)
            except EOFError:
                self.say("")  # below the ^D that libedit shows
                raise
            finally:
                self._is_editing = False

        def _is_half_typed(self) -> bool:
            return self._is_editing

        def _clear_line(self) -> None:
            self._write(b"\r\x1b[K")


class PromptToolkitEditor(Screen):
    """A terminal with prompt_toolkit, which runs on Windows too: what comes is shown above the half-typed line.

    While ``line`` blocks, it holds the screen's lock, and only the event loop in it draws, and ends it. At any other
    time the receive thread gets the lock, and draws itself.
    """

    def __init__(self, style: Style) -> None:
        import prompt_toolkit
        from prompt_toolkit.layout.processors import TabsProcessor

        os.environ["PROMPT_TOOLKIT_NO_CPR"] = "1"  # or each line waits for the terminal to tell where its cursor is
        super().__init__(style)
        keys = prompt_toolkit.key_binding.KeyBindings()
        keys.add("c-c", eager=True)(lambda _: signal.raise_signal(signal.SIGINT))
        keys.add("tab")(self._complete)
        self._session: prompt_toolkit.PromptSession[str] = prompt_toolkit.PromptSession(
            key_bindings=keys, input_processors=[TabsProcessor(8, " ", " ")], enable_suspend=True
        )
        self._app = self._session.app
        output: Any = self._app.output
        output.enable_bracketed_paste = lambda: None  # so that a newline in what is pasted is Enter
        self._block = b""  # to be shown: the receive thread leaves the next one when this one was shown
        self._shown = threading.Event()
        # Set by the main thread, on Windows the second one by the receive thread.
        self._is_editing = False  # it is in the loop, which would swallow what is raised there
        self._is_over = False  # so the loop is to raise
        if sys.platform != "win32":
            import tty

            tty.setcbreak(0, termios.TCSANOW)  # what is typed or pasted between two lines is left for the editor
            settings = termios.tcgetattr(0)
            # Or a Ctrl-C between two lines would wake nobody who waits to write, on Linux.
            settings[3] |= termios.NOFLSH
            termios.tcsetattr(0, termios.TCSANOW, settings)

    # Runs in the receive thread

    def show(self, block: bytes) -> None:
        if not block:
            super().wake()  # for a signal that came when the loop was done, and the main thread went on to send
            return
        self._shown.clear()
        self._block = block
        self._have_loop_catch_up()
        while not self._shown.is_set():
            if self._lock.acquire(blocking=False):
                self._catch_up()
                self._lock.release()
            self._shown.wait(INTERRUPT_SECONDS)

    def wake(self) -> bool:
        if sys.platform != "win32":
            return super().wake()
        self._is_over = True
        self._have_loop_catch_up()
        return True

    # Runs in the main thread

    def line(self, unsent: str) -> str:
        with self._lock:
            self._is_editing = True
            try:
                return self._session.prompt(default=unsent, pre_run=self._catch_up, handle_sigint=False)
            finally:
                self._is_editing = False

    def end_line(self, ctrl_c: bool) -> None:
        if not self._is_editing:
            super().end_line(ctrl_c)
        self._is_over = True
        self._have_loop_catch_up()

    # Runs in the loop, or where there is none

    def _catch_up(self) -> None:
        """Show the block, and end the line, if that is due. Call with the lock held."""
        if self._block:
            if self._app.is_running:
                self._app.renderer.erase()
                self._app.invalidate()
            self._write(self.style.rows(self._block))
            self._block = b""
            self._shown.set()
        if self._is_over and self._app.is_running and not self._app.is_done:
            block_signals()  # until what it raises is caught
            self._app.erase_when_done = not self._session.default_buffer.text  # or an empty row would stay
            self._app.exit(exception=Interrupted)

    def _complete(self, event: Any) -> None:
        """Complete what was begun as far as the labels agree that begin so. If there is none, Tab is a character."""
        buffer = event.current_buffer
        begun = re.split("[\t ]", buffer.document.text_before_cursor)[-1]
        is_pasted = bool(event.key_processor.input_queue)
        labels = [] if is_pasted else self.style.beginning(begun)
        if labels:
            buffer.delete_before_cursor(len(begun))
        common = os.path.commonprefix([label.lower() for label in labels])  # noqa: RUF071 - not of paths
        buffer.insert_text(labels[0][: len(common)] if labels else "\t")

    # Runs in any thread

    def _have_loop_catch_up(self) -> None:
        loop = self._app.loop
        if loop:
            with contextlib.suppress(RuntimeError):  # it has just been closed
                loop.call_soon_threadsafe(self._catch_up)


EDITORS: list[Callable[[Style], Screen]] = [PromptToolkitEditor]  # the best first; raises UNUSABLE where there is none
if sys.platform != "win32":
    EDITORS = [GnuReadline, PromptToolkitEditor, Libedit]
UNUSABLE = ImportError, AttributeError, OSError, ValueError


def screen_for(options: argparse.Namespace, own_label: str) -> Screen:
    """Return the screen that suits the terminal, or the pipe, and the options."""
    term = os.environ.get("TERM") or ("" if sys.platform == "win32" else "dumb")  # Windows sets none
    plain = options.plain or not (os.isatty(0) and os.isatty(1)) or term == "dumb"
    colours: Sequence[str] = COLOURS_OF_256 if "256" in term or os.environ.get("COLORTERM") else COLOURS_OF_8
    if plain or options.no_color or os.environ.get("NO_COLOR") or sys.platform == "win32":  # whose console needs asking
        colours = ()
    is_filter = not os.isatty(1)
    style = Style(own_label, colours, options.time, options.bell and not is_filter, options.compact, is_filter)
    for editor in EDITORS if not plain else ():
        with contextlib.suppress(*UNUSABLE):
            return editor(style)
    return Screen(style)


# --- The connection: how to get one, and what comes from it -----------------------------------------------------------

CONNECT_SECONDS = 10.0  # for each address of a name
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}  # s; 2nd: macOS's 1st
VANISHED_SECONDS = 90  # that a server may leave what was sent unacknowledged, where a person waits
MAX_SHOWN_BYTES = 262_144  # shown as one line: more than a chat server sends, and a bound for any other
SILENCE_SECONDS = 1.0  # after which a server that never sends a newline has finished its line
DOUBTED_LINES = 1_000  # at most, of which it is told that they were perhaps not delivered
DOUBT_SECONDS = 60.0  # after which a line has most probably arrived, where nothing tells what is on its way
REFUSED = b"* refused: "  # how a server begins that turns somebody away
TRY_LATER = "try again later, or ask whoever runs it."
TURNED_AWAY = f"the server has turned this client away; {TRY_LATER}"
SERVER_CLOSED = f"the server closed the connection; {TRY_LATER}"
NEEDS_TLS = "that server speaks TLS; join it with --tls, or with --tls-ca and its certificate."


class NotConnected(Exception):
    """Why there is no connection, or none any more, and what to do, as one sentence."""


class Lost(NotConnected):
    """The same, where another try may help."""


class Closed(Lost):
    """The same, where the server has ended it: no surprise once we have half-closed it."""


class Connection:
    """A way to the server. One thread may receive while another sends; either may close it."""

    def __init__(self, sock: socket.socket, is_direct: bool = True) -> None:
        self.sock = sock
        self._is_direct = is_direct  # else its other end is that of ssh, which tells nothing of the network
        # What a server calls us first if it is no further than the other end.
        self.label = str(sock.getsockname()[1]) if is_direct else ""
        self._unread = b""  # received, but only looked at
        # Set by who sends.
        self._sent_bytes = 0
        self._lines: collections.deque[tuple[int, float]] = collections.deque(maxlen=DOUBTED_LINES)  # end, and when

    def receive(self, seconds: float) -> bytes | None:
        """Return what comes next, nothing at the end, None if nothing comes in so many seconds. Raises OSError."""
        # Not by the socket's own time-out, which would hold for who sends, too.
        data, self._unread = self._unread, b""
        return data or self._receive(seconds)

    def _receive(self, seconds: float) -> bytes | None:
        return self.sock.recv(READ_BYTES) if is_ready(self.sock, selectors.EVENT_READ, seconds) else None

    def peek_line(self, seconds: float) -> bytes | None:
        """Return the next line, or what there is of it in so many seconds, at the end, or if it is far too long.

        Return None if nothing comes. What is returned is received again. Raises OSError.
        """
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread and len(self._unread) <= MAX_LINE_BYTES:
            data = self._receive(max(0.0, deadline - time.monotonic()))
            if not data:
                return self._unread or data
            self._unread += data
        return self._unread[: self._unread.find(b"\n") + 1] or self._unread

    def read_line(self, seconds: float) -> bytes:
        """Return the same, nothing if nothing comes; it is not received again."""
        line = self.peek_line(seconds) or b""
        self._unread = self._unread[len(line) :]
        return line

    def send(self, data: bytes) -> bool:
        """Send all; return whether that worked. If not, what is received tells why. Blocks."""
        rest = memoryview(data)
        try:
            while rest:
                count = self._send(rest)
                self._sent_bytes += count  # only now: what could not be sent is not among what is unsent, either
                rest = rest[count:]
        except OSError:
            return False
        return True

    def _send(self, data: memoryview) -> int:
        return self.sock.send(data)

    def send_line(self, line: bytes) -> bool:
        """Send a line that a person has entered, as ``send``, and remember it for ``doubtful_lines``."""
        self._lines.append((self._sent_bytes + len(line), time.monotonic()))
        return self.send(line)

    def half_close(self) -> None:
        """Tell the server that no more will be sent."""
        with contextlib.suppress(OSError):  # it is lost: what is received tells why
            self.sock.shutdown(socket.SHUT_WR)

    def unsent(self) -> int | None:
        """Return how many bytes the other end has not acknowledged; None where nothing tells."""
        if sys.platform == "linux" and self._is_direct:
            with contextlib.suppress(OSError, ValueError):  # it is closed
                return int.from_bytes(fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        return None

    def acknowledged(self) -> int | None:
        """Return how many bytes the other end has acknowledged, too few with TLS; None where nothing tells."""
        sent_bytes = self._sent_bytes  # first: what is sent from now on would make it more
        unsent = self.unsent()
        return None if unsent is None else sent_bytes - unsent

    def doubtful_lines(self, acknowledged: int | None) -> int:
        """Return how many of the lines that a person has entered were perhaps not delivered, now that it is lost."""
        lines = list(self._lines)
        if acknowledged is None:
            return sum(time.monotonic() - when < DOUBT_SECONDS for _, when in lines)
        return sum(end > acknowledged for end, _ in lines)

    def close(self) -> None:
        """Close the socket; whoever waits for it notices."""
        with contextlib.suppress(OSError):  # it is lost already
            # Not an SSLSocket's own, after which another thread would send plain text.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)
        self.sock.close()


def is_ready(sock: socket.socket, event: int, seconds: float | None) -> bool:
    """Wait until a socket is ready to be read or written, so many seconds at most; return whether it is."""
    # Not select(), which ends at descriptor 1023, nor DefaultSelector, which takes a descriptor for each wait.
    with getattr(selectors, "PollSelector", selectors.SelectSelector)() as selector:
        try:
            selector.register(sock, event)
        except ValueError:  # another thread has just closed it: who uses it is told so at once
            return True
        return bool(selector.select(seconds))


def connect(host: str, port: int) -> socket.socket:
    """Return a connection to the first of the host's addresses that takes it.

    Blocks CONNECT_SECONDS for each, and as long as the system takes to look up the name, but not for Ctrl-C: it runs in
    a thread, because nothing ends the system's own wait for a name server. Raises OSError, and ValueError for what
    cannot be a name.
    """
    result: list[socket.socket | Exception] = []

    def run() -> None:
        try:
            result.append(socket.create_connection((host, port), CONNECT_SECONDS))
        except (OSError, ValueError) as error:
            result.append(error)

    thread = start_thread(run)
    while thread.is_alive():
        thread.join(INTERRUPT_SECONDS)  # in steps: on Windows nothing interrupts a join
    if isinstance(result[0], Exception):
        raise result[0]
    sock = result[0]
    sock.settimeout(None)
    if sock.getsockname() == sock.getpeername():  # our own end: the system gave us the port that nobody listens on
        raise ConnectionRefusedError
    options = dict(KEEPALIVE)
    if os.isatty(0) and not ipaddress.ip_address(sock.getpeername()[0]).is_loopback:
        options["TCP_USER_TIMEOUT"] = VANISHED_SECONDS * 1_000  # keepalive does not ask while something is unsent
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        with contextlib.suppress(AttributeError, OSError):  # this system does not let one set it
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return sock


CONNECTING_PROBLEMS: tuple[tuple[Any, str], ...] = (  # the first of these kinds counts
    (
        (socket.gaierror, ValueError),
        "Unknown host {host!r}: check the spelling; a port comes after it: HOST PORT.",
    ),
    (
        ConnectionRefusedError,
        "No server at {host} port {port}: start mychatserver.py there, for other machines with --lan, "
        "or give another port.",
    ),
    (
        (socket.timeout, TimeoutError),  # the same from 3.10 on
        "No answer from {host} port {port}: check the address; a firewall or another network may be between.",
    ),
    (OSError, "Cannot reach {host} port {port}: {error.strerror}; check the address and this machine's network."),
)


def connecting_problem(error: OSError | ValueError, host: str, port: int) -> Lost:
    """Return why there is no connection, and what to do."""
    sentence = next(sentence for kinds, sentence in CONNECTING_PROBLEMS if isinstance(error, kinds))
    return Lost(sentence.format(error=error, host=host, port=port))


def blocks_from(connection: Connection) -> Iterator[bytes]:
    """Yield what the server sends in blocks of whole lines to be shown, and nothing after a second of silence.

    An unfinished last line is shown, too. As long as the server has sent no newline, a piece of two or more characters
    and a second of silence are a line; but not when a piece of that line was a single character: then somebody types it
    there, key by key. At the end raises Closed, Lost, or NotConnected when there is no use in another try.
    """
    data: bytes | None = None
    block = partial = b""
    sends_newlines = is_typed = False
    problem: Lost = Closed(SERVER_CLOSED)
    while data != b"":
        try:
            data = connection.receive(SILENCE_SECONDS)
        except OSError as error:
            data = b""
            problem = Lost(f"{error.strerror}; check the network, and whether the server still runs.")
        partial += data or b""
        end = partial.rfind(b"\n") + 1
        sends_newlines = sends_newlines or end > 0
        whole, partial = partial[:end], partial[end:]
        is_line = data is None and not sends_newlines and not is_typed
        if partial and (is_line or data == b"" or len(partial) > MAX_SHOWN_BYTES):
            whole, partial = whole + partial + b"\n", b""
        if not sends_newlines:
            is_typed = bool(partial) and (is_typed or len((data or b"").decode("utf-8", "replace")) == 1)
        if whole and not block:
            check_beginning(whole)
        if whole or data is None:
            yield clean(whole.replace(b"\r\n", b"\n"))
        block = whole or block
    if block[block.rfind(b"\n", 0, -1) + 1 :].startswith(REFUSED):
        raise NotConnected(TURNED_AWAY)
    raise problem


def check_beginning(block: bytes) -> None:
    """Raise NotConnected when a server begins with what ends the chat, and tell what that is."""
    if block.startswith(QUESTION):
        raise NotConnected(ASKED_LATE)
    if block[:9].upper().startswith((b"HTTP/", b"<!DOCTYPE", b"<HTML")):
        raise NotConnected("that is a web server; check host and port.")
    # Alert, handshake: RFC 8446, 5.1; or what mychatserver.py says.
    if block.startswith((b"\x15\x03", b"\x16\x03", REFUSED + b"this server speaks TLS")):
        raise NotConnected(NEEDS_TLS)


# --- Input: what is typed or piped, up to exit or its end -------------------------------------------------------------

EXITS = "exit", "/quit", "/exit"
EXIT = re.compile(rb"\n[\t ]*(?:exit|/quit|/exit)[\t ]*\r?\n", re.IGNORECASE)
EXIT_BYTES = 256  # a longer line in a pipe is never taken for exit, however many blanks are round it
IGNORE = re.compile(r"[\t ]*/ignore(?:[\t ]+(.*?))?[\t ]*", re.IGNORECASE)
LINE_TOO_LONG = f"* line too long: {MAX_LINE_BYTES} bytes at most, this line was not sent"


def typed(screen: Screen) -> Iterator[tuple[bytes, bool]]:
    """Yield each line that a person enters, but blank ones, and whether it is ``exit``. Blocks."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte is no reason to end
    unsent = ""
    with contextlib.suppress(EOFError, OSError):  # Ctrl-D, or the terminal is gone
        while True:
            # A paste may put a newline into the middle of a line: some terminals mark what is pasted.
            entered, unsent = re.split("\r\n|[\r\n]", screen.line(unsent)), ""
            for line in entered:
                data = f"{line}\n".encode("utf-8", "replace")
                if len(data) > MAX_LINE_BYTES + 1:
                    screen.notice(LINE_TOO_LONG)
                    unsent = line
                elif ignore := IGNORE.fullmatch(line):
                    screen.notice(screen.style.ignore(ignore[1] or ""))
                elif line.strip("\t "):
                    yield data, line.strip("\t ").lower() in EXITS


def piped() -> Iterator[tuple[bytes, bool]]:
    """Yield standard input in the blocks that it comes in, and whether ``exit`` ends them. Blocks in reading."""
    before = b"\n"  # the end of what was read: ``exit`` may come in pieces
    while True:
        try:
            if sys.platform != "win32":
                os.set_blocking(0, True)  # it may be shared, as standard output
            data = os.read(0, READ_BYTES)
        except BlockingIOError:  # whoever shares it has just set it otherwise
            continue
        except OSError:  # there is none, as under nohup
            return
        exit_line = EXIT.search(before + data)
        if exit_line:
            yield data[: exit_line.end() - len(before)], True
        if exit_line or not data:
            return
        yield data, False
        before = (before + data)[-EXIT_BYTES:]


# --- Connections: one, or with --reconnect one after another ----------------------------------------------------------

RECONNECT_SECONDS = 2.0  # before each try to connect again
ADMITTED_SECONDS = 0.5  # in which a server that turns us away has said so


class Connections:
    """What comes from the server, and the way to it, whichever connection that is at the moment."""

    def __init__(
        self, first: Connection, style: Style, name: str, connect_again: Callable[[], Connection] | None
    ) -> None:
        self._style = style
        self.connect_again = connect_again
        # Set by the main thread: the ends that are no surprise. Closed, when the input has ended; any, after exit.
        self.expected: tuple[type[Lost], ...] = ()
        # Set by the receive thread.
        self._name = name  # to ask the server for
        self._begin(first)

    # Runs in the receive thread

    def blocks(self) -> Iterator[bytes]:
        """Yield blocks of whole lines to be shown, and nothing now and then. Raises NotConnected at a bad end."""
        while True:
            try:
                yield from blocks_from(self.current)
            except self.expected:
                return
            except Lost:
                told = b""
                acknowledged = self.current.acknowledged()
                if self.connect_again:
                    self.current.close()  # before a word of it, or a line entered just after would be lost
                    told = b"* connection lost, trying again\n"
                # After closing: a line that was entered just before counts, too.
                doubtful = self.current.doubtful_lines(acknowledged)
                if doubtful:
                    lines = "1 line was" if doubtful == 1 else f"{doubtful} lines were"
                    told = f"* {lines} perhaps not delivered\n".encode() + told
                yield told
                if not self.connect_again:
                    raise
                while not self._has_reconnected(self.connect_again):
                    yield b""
                yield b"* connected again\n"

    def _has_reconnected(self, connect_again: Callable[[], Connection]) -> bool:
        """Try to connect after a pause; return whether that has worked. Raises NotConnected if it never will."""
        time.sleep(RECONNECT_SECONDS)  # nothing tells when a server is there again
        try:
            connection = connect_again()
            beginning = connection.peek_line(ADMITTED_SECONDS)
        except (OSError, Lost):  # not yet
            return False
        if beginning is not None and (not beginning or beginning.startswith(REFUSED)):
            connection.close()
            return False
        if not self._style.own_label[0].isdigit():  # not a port: the last name that we got
            self._name = self._style.own_label
        self._begin(connection)
        return True

    def _begin(self, connection: Connection) -> None:
        """Have what is entered go to this connection, and be sent under our name."""
        self._style.own_label = connection.label
        if self._name:
            self._style.asked_for = self._name
            connection.send(f"/nick {self._name}\n".encode("utf-8", "replace"))
        self.current = connection


# --- The conversation: one thread shows what comes, the main thread sends what is entered -----------------------------

# By name, as Windows has not all of them.
ENDING = {number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")}
HANDLED = ENDING | {number for number in signal.Signals if number.name in ("SIGURG", "SIGTSTP", "SIGCONT")}
LEAVE_SECONDS = 1.0  # for the server to close after exit, since all that was sent has arrived there
LEAVE_UNSENT_SECONDS = 10.0  # since some has last arrived, or for all where nothing tells
NOT_SENT = "* not connected: this line was not sent"


class Ended(BaseException):
    """A signal ends the program; ``main`` has it do so when all has been left as it was."""


def raise_ended(number: int, _: object) -> None:
    """Be the handler of a signal that ends the program."""
    raise Ended(number)


def handle(numbers: Iterable[int], handler: Callable[[int, Any], object] | signal.Handlers) -> None:
    """Set the handler of signals, but of those that are ignored, as in a script's background job."""
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def block_signals(numbers: Iterable[int] = HANDLED) -> Iterable[int]:
    """Have these signals wait in this thread, and no others; return which did before.

    Those that had come, and need not wait, are handled before this returns.
    """
    if sys.platform == "win32":
        return ()
    return signal.pthread_sigmask(signal.SIG_SETMASK, numbers)


def start_thread(function: Callable[..., object], *arguments: object) -> threading.Thread:
    """Start a thread that ends with the program; signals pass it by, so that all reach the main thread. Raises Lost."""
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    before = block_signals()
    try:
        thread.start()
    except RuntimeError as error:
        raise Lost(
            f"Cannot start: {error}; this user may have no more processes or memory (ulimit -u, ulimit -v)."
        ) from None
    finally:
        block_signals(before)
    return thread


class Conversation:
    """From the greeting to the farewell.

    It ends when the main thread has no more input and the server has closed, or was waited for; when a signal ends it;
    or when nothing more comes. The last two get the main thread out of any wait: the handler of signals, which runs in
    it, raises Interrupted. For the last, the receive thread sends a signal until that has happened.
    """

    def __init__(self, connections: Connections, screen: Screen) -> None:
        self._connections = connections
        self._screen = screen
        self._is_typed = os.isatty(0)  # asked once: a terminal that has hung up is none any more
        # Set by the receive thread when nothing more comes: why not, or nothing where that is no surprise.
        self._problem: str | None = None
        # Set by the main thread, where the handler of signals runs, too.
        self._is_interruptible = False  # the handler may draw, and raise
        self._ended_by = 0  # this signal

    # Runs in the main thread

    def run(self) -> int:
        """Send what is entered and show what comes, until one side leaves; return the exit status. Raises Ended.

        To be called with the signals blocked.
        """
        handle(ENDING, self._on_signal)
        if sys.platform != "win32":
            signal.signal(signal.SIGURG, self._on_signal)
        try:
            self._is_interruptible = True
            block_signals(())
            self._screen.say(GREETING)
            start_thread(self._receive)
            is_lost = not self._send_input()
            self._wait_for_server(is_patient=is_lost or not self._is_typed)
            self._is_interruptible = False
        except Interrupted:
            self._is_interruptible = False
        block_signals(())
        return self._farewell()

    def _send_input(self) -> bool:
        """Send what is entered, up to its end; return whether it came to that. Blocks."""
        connections = self._connections
        for data, is_exit in typed(self._screen) if self._is_typed else piped():
            if is_exit:
                connections.expected = (Lost,)
            if not self._send(data) and not is_exit:
                if not connections.connect_again:
                    return False
                self._screen.notice(NOT_SENT)
            if is_exit:
                break
        else:
            connections.expected = (Lost,) if self._is_typed else (Closed,)
        connections.current.half_close()
        return True

    def _send(self, data: bytes) -> bool:
        """Send what was entered; return whether that worked. Blocks."""
        command, _, name = data.strip().partition(b" ")
        if command.lower() == b"/nick":
            self._screen.style.asked_for = name[:100].decode("utf-8", "replace").strip()  # more is no name
        connection = self._connections.current
        return connection.send_line(data) if self._is_typed else connection.send(data)

    def _wait_for_server(self, is_patient: bool) -> None:
        """Wait for the server to close; unless patient, only while what was sent still moves on its way there."""
        moved, before = time.monotonic(), None
        while self._problem is None and self._connections.current.sock.fileno() >= 0:  # closed, it was lost
            unsent = self._connections.current.unsent()
            if unsent != before:
                moved, before = time.monotonic(), unsent
            seconds = LEAVE_SECONDS if unsent == 0 else LEAVE_UNSENT_SECONDS  # lost packets may hold all up for some
            if not is_patient and time.monotonic() - moved > seconds:
                return
            time.sleep(INTERRUPT_SECONDS)  # nothing tells when what was sent has moved on

    def _on_signal(self, number: int, _: object) -> None:
        """Note a signal that ends the program; draw what waits to be drawn; when all is over, raise Interrupted.

        No handler may run while what another has raised is on its way out of ``input``: CPython would take its results
        for those of functions that have failed. So only that of SIGURG raises, which CPython calls after those of the
        other signals that have come; and with the signals blocked, until it is caught.
        """
        if number in ENDING:
            if self._ended_by:  # the first was of no use: the screen may be stuck
                raise Ended(number)
            self._ended_by = number
            if sys.platform != "win32":
                signal.raise_signal(signal.SIGURG)
                return
        if not self._is_interruptible or self._screen.is_busy:  # the receive thread tries again
            return
        self._screen.is_busy = True
        try:
            self._screen.draw()
            if self._ended_by or self._problem is not None:
                self._screen.end_line(self._ended_by == signal.SIGINT)
        finally:
            self._screen.is_busy = False

    def _farewell(self) -> int:
        """Say how the conversation ended; return the exit status. Also runs in the receive thread, on Windows."""
        forget_typed()
        if self._ended_by not in (0, signal.SIGINT):
            raise Ended(self._ended_by)
        error = self._screen.error
        if error and not self._ended_by:
            if error.errno in (errno.EPIPE, errno.EINVAL):  # its reader has left, as ``head`` does; EINVAL on Windows
                return 0
            warn(f"Cannot show what comes: {error.strerror or error}; give standard output another place.")
            return 1
        if self._problem and not self._ended_by:
            warn(f"Connection lost: {self._problem}")
        self._screen.say_last(FAREWELL)
        return 130 if self._ended_by else 1 if self._problem else 0

    # Runs in the receive thread

    def _receive(self) -> None:
        """Show what comes until the last connection ends; then get the main thread out of its wait."""
        problem = ""
        try:
            for block in self._connections.blocks():
                self._screen.show(block)
                if self._screen.error:
                    break
        except NotConnected as error:
            problem = str(error)
        self._problem = problem
        while self._is_interruptible:
            if not self._screen.wake():
                os._exit(self._farewell())
            time.sleep(INTERRUPT_SECONDS)  # a wake-up just before the main thread blocks is not seen: once more


# --- A password: what some servers ask for before anything else -------------------------------------------------------

QUESTION = b"* password?\n"
QUESTION_SECONDS = 2.0  # in which a server has asked that wants the password that is known
ASKED_SECONDS = 0.1  # in which it has asked otherwise, and twice the time that connecting took
ANSWER_SECONDS = 10.0  # in which it has taken or refused what it was given
UTF8_MARK, UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")  # with which Windows' editors begin a file
WRONG = "Wrong password: ask whoever runs the server for it, and try again."
UNANSWERED = "A password is asked for: give --password-file FILE, --password in a terminal, or MYCHAT_PASSWORD."
ASKED_LATE = "the server asked for its password late; join again with --password, or --password-file FILE."


class Password:
    """What a server may ask for before anything else, as far as it is known."""

    def __init__(self, known: bytes, is_typed: bool) -> None:
        self._known = known
        # The server that we join again gets what the first one took: in mid-chat nobody is asked.
        self._may_ask = is_typed or (not known and os.isatty(0))

    def enter(self, connection: Connection, connecting_seconds: float) -> None:
        """Wait for the server to ask for the password, and give it; without a question, return.

        Blocks for a person who has to type it. Raises EOFError at Ctrl-D, OSError or NotConnected.
        """
        seconds = QUESTION_SECONDS if self._known else ASKED_SECONDS + 2 * connecting_seconds
        # At most: with ssh somebody may have taken a minute to type a pass phrase.
        if connection.peek_line(min(seconds, QUESTION_SECONDS)) == QUESTION:
            connection.read_line(0.0)
            while not self._is_right(connection):
                warn("Wrong password, try again.")
                self._known = b""
        self._may_ask = False

    def _is_right(self, connection: Connection) -> bool:
        """Give the password, which a person may have to type; return whether that was the right one."""
        if not self._known and not self._may_ask:
            raise NotConnected(UNANSWERED)
        self._known = self._known or password_typed()
        connection.send(self._known + b"\n")
        reply = connection.read_line(ANSWER_SECONDS)
        is_wrong = reply == b"* wrong password\n"
        if reply == REFUSED + b"wrong password\n" or (is_wrong and not self._may_ask):
            raise NotConnected(WRONG)
        if not is_wrong and reply != b"* password accepted\n":
            said = clean(reply).decode().strip("* \n") or "it has not answered"
            raise Lost(f"The server has not let us in: {said}; {TRY_LATER}")
        return not is_wrong


def password_typed() -> bytes:
    """Ask for the password, unseen. Blocks; raises EOFError at Ctrl-D and ``exit``, NotConnected without a terminal."""
    try:
        with contextlib.ExitStack() as cleanup:
            if sys.platform != "win32":
                terminal = os.open("/dev/tty", os.O_RDWR)  # or getpass would read standard input
                cleanup.callback(os.close, terminal)
                handle((signal.SIGTSTP,), functools.partial(stop_asking, terminal, termios.tcgetattr(terminal)))
                cleanup.callback(handle, (signal.SIGTSTP,), signal.SIG_DFL)
            password = getpass.getpass()
    except (EOFError, KeyboardInterrupt):
        warn("")  # or the shell would go on in the row of the question
        raise
    except OSError:  # the terminal is not this process's own, as under ``su -c``
        raise NotConnected(UNANSWERED) from None
    except UnicodeDecodeError:
        return b"\xff"  # as wrong as what was typed
    if password.strip().lower() == "exit":
        raise EOFError
    return password.encode("utf-8", "replace")


if sys.platform != "win32":

    def stop_asking(terminal: int, as_it_was: list[Any], *_: object) -> None:
        """Give the shell its terminal with echo, and stop, as Ctrl-Z asks; ask again, unseen, when we are continued.

        getpass sees to neither: some shells would echo nothing, others echo the password that is typed after ``fg``.
        """
        unseen = termios.tcgetattr(terminal)
        termios.tcsetattr(terminal, termios.TCSANOW, as_it_was)
        signal.raise_signal(signal.SIGTTIN)  # which has no handler; in a group without a shell it does nothing
        wait_for_foreground()
        termios.tcsetattr(terminal, termios.TCSANOW, unseen)
        os.write(terminal, b"\rPassword: ")


def password_from(path: str | None) -> bytes:
    """Return the password: a file's first line, else the environment's, or nothing. Raises NotConnected."""
    password, source = os.environ.get("MYCHAT_PASSWORD", "").encode("utf-8", "surrogateescape"), "MYCHAT_PASSWORD"
    if path is not None:
        source = path
        try:
            with open(path, "rb", buffering=0) as file:  # no more than the line, if it is standard input
                password = file.readline(MAX_LINE_BYTES + len(UTF8_MARK) + 3)
        except OSError as error:
            raise NotConnected(f"Cannot read {path}: {error.strerror}; give --password-file another file.") from None
        if password.startswith(UTF16_MARKS):
            raise NotConnected(f"{path} is in UTF-16, as Windows' Unicode: save it as UTF-8.")
        password = password.removeprefix(UTF8_MARK).removesuffix(b"\n").removesuffix(b"\r")
    if b"\n" in password or b"\r" in password or len(password) > MAX_LINE_BYTES or (path is not None and not password):
        raise NotConnected(f"{source} holds no password: that is one line of 1 to {MAX_LINE_BYTES} bytes, the first.")
    return password


# --- Finding a server on the same network; without --lan nothing of this runs -----------------------------------------

EVERYONE = "255.255.255.255"
DISCOVERY_PORT = 12000  # see the server's Discovery
IP_PKTINFO = 8  # Linux: ip(7); the socket module names it from 3.14 on
QUESTION_BYTES = 128  # of each question, and no answer has more
ASK_SECONDS = 0.25  # until the question is asked again: a datagram may be lost, a sleeping radio late
ASKS = 3, 8  # least, so that a second server is noticed too, and most, when nobody answers
MOST_FOUND = 20  # servers: a rude neighbour could answer for thousands


def find_servers() -> list[tuple[str, str, int]]:
    """Ask the network for servers that were started with ``--lan``; return the name, address and port of each.

    The server's class Discovery tells what is sent and why. Blocks for as long as the least number of questions takes,
    never less, because nothing tells that the last server has answered; when nobody answers, until the most were asked.
    """
    least, most = ASKS
    token = secrets.token_hex(8).encode()  # an answer repeats it
    # What is shown of an answer is safe on anybody's screen: it comes from strangers.
    form = re.compile(rb"mychat!1 %s (\w{16}) (\d{1,5}) ([0-9A-Za-z.-]{1,63})" % token)
    found: dict[bytes, tuple[str, str, int]] = {}  # by the server's random id: one may be heard twice
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        for asked in range(most):
            if found and asked >= least:
                break
            ask(sock, (b"mychat?1 " + token).ljust(QUESTION_BYTES))
            deadline = time.monotonic() + ASK_SECONDS
            while (seconds := deadline - time.monotonic()) > 0:
                sock.settimeout(seconds)
                with contextlib.suppress(OSError):  # time is up; or, as Windows tells it, somebody cannot be asked
                    data, (host, _) = sock.recvfrom(QUESTION_BYTES)
                    answer = form.fullmatch(data)
                    if answer and 0 < int(answer[2]) <= 65_535 and len(found) < MOST_FOUND:
                        found.setdefault(answer[1], (answer[3].decode(), host, int(answer[2])))
    return sorted(found.values())


def ask(sock: socket.socket, question: bytes) -> None:
    """Broadcast a question: by every interface on Linux, else by the default route's."""
    with contextlib.suppress(OSError):  # no network
        if sys.platform != "linux":
            sock.sendto(question, (EVERYONE, DISCOVERY_PORT))
            return
        for index, _ in socket.if_nameindex():
            by_interface = (socket.IPPROTO_IP, IP_PKTINFO, struct.pack("=i8x", index))
            with contextlib.suppress(OSError):  # it is down, or has no IPv4
                sock.sendmsg([question], [by_interface], 0, (EVERYONE, DISCOVERY_PORT))


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

OP_IGNORE_UNEXPECTED_EOF = 0x80  # ssl.h of OpenSSL 3: the ssl module names it from 3.10 on
X509_V_FLAG_PARTIAL_CHAIN = 0x80000  # x509_vfy.h: the ssl module names it from 3.10 on
HANDSHAKE_SECONDS = 10.0  # in which a server must have shown that it speaks TLS, and whose it is
NOT_TRUSTED = "is not trusted: give --tls-ca the PEM file of whoever runs that server."
OTHER_NAME = "is for another name: join by a name or address that it has."
CERTIFICATE_PROBLEMS = {  # by X509_V_ERR_...: openssl-verification-options(1)
    10: "has expired: whoever runs that server has to make a new one.",
    **dict.fromkeys((2, 18, 19, 20, 21), NOT_TRUSTED),  # nobody known has signed it
    **dict.fromkeys((62, 64), OTHER_NAME),  # host name, address
}


class SecureConnection(Connection):
    """The same, encrypted."""

    sock: ssl.SSLSocket

    def __init__(self, sock: ssl.SSLSocket) -> None:
        super().__init__(sock)
        self._lock = threading.Lock()  # OpenSSL's, which two threads must not use at once; nothing waits with it held

    def _receive(self, seconds: float) -> bytes | None:
        data: bytes | None = self._do(self.sock.recv, READ_BYTES, seconds)
        return data

    def _send(self, data: memoryview) -> int:
        count: int = self._do(self.sock.send, data)
        return count

    def half_close(self) -> None:
        """Send ``exit``: TLS's own end would leave no way to say why the connection ends."""
        self.send(b"\nexit\n")  # on a line of its own: the last one may be unfinished

    def _do(self, call: Callable[[Any], Any], argument: object, seconds: float | None = None) -> Any:
        """Return what a call of OpenSSL does; None if it has to wait for the network longer than that."""
        import ssl

        while True:
            try:
                with self._lock:
                    return call(argument)
            except ssl.SSLWantReadError:
                event = selectors.EVENT_READ
            except ssl.SSLWantWriteError:
                event = selectors.EVENT_WRITE
            except ssl.SSLError as error:
                reason = "it was cut off, without TLS's own end" if is_cut(error) else f"TLS failed: {error.reason}"
                raise OSError(errno.EPROTO, reason) from None  # so that it has a strerror, as the system's own
            if not is_ready(self.sock, event, seconds):
                return None


def tls_context(authority: str | None) -> ssl.SSLContext:
    """Return what checks servers: by the system's authorities, or the one in this PEM file. Raise NotConnected."""
    try:
        import ssl
    except ImportError:
        raise NotConnected("This Python has no ssl module, so no TLS: use another Python, or try --ssh.") from None
    try:
        context = ssl.create_default_context(cafile=authority)
    except OSError as error:
        reason = "there is no certificate in it" if isinstance(error, ssl.SSLError) else error.strerror
        raise NotConnected(f"Cannot read {authority}: {reason}; give --tls-ca the server's PEM file.") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # in the middle of which nothing could be sent
    context.options &= ~OP_IGNORE_UNEXPECTED_EOF  # which Python 3.9 sets: TCP's end alone could be anybody's
    if authority is not None:  # any certificate that one is given, on every Python, as on 3.13 ...
        context.verify_flags |= X509_V_FLAG_PARTIAL_CHAIN
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # ... and one that openssl has made, as on those before
    return context


def secured(sock: socket.socket, context: ssl.SSLContext, host: str, port: int) -> Connection:
    """Return a connection with TLS on it, of a server that has shown that it is ``host``; close ``sock`` if it is not.

    Blocks HANDSHAKE_SECONDS at most. Raises NotConnected. Nothing is sent but TLS.
    """
    try:
        sock = secure = context.wrap_socket(
            sock, server_hostname=host, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        secure.settimeout(HANDSHAKE_SECONDS)  # for all of it: the ssl module sees to that
        secure.do_handshake()
        secure.setblocking(False)
        return SecureConnection(secure)
    except OSError as error:
        problem = tls_problem(error, f"{host} port {port}")
        sock.close()
        raise problem from None


def tls_problem(error: OSError, where: str) -> NotConnected:
    """Return why there is no TLS, and what to do."""
    import ssl

    if isinstance(error, ssl.SSLCertVerificationError):
        other = f"does not do: {error.verify_message}; ask whoever runs that server."
        return NotConnected(f"The certificate of {where} {CERTIFICATE_PROBLEMS.get(error.verify_code, other)}")
    answers_otherwise = isinstance(error, ssl.SSLError) and not is_cut(error)  # so another try would not help
    kind = NotConnected if answers_otherwise else Lost
    reason = getattr(error, "reason", None) or error.strerror or error
    return kind(f"No TLS at {where}: leave --tls out if that server has none, or give another port. ({reason})")


def is_cut(error: ssl.SSLError) -> bool:
    """Return whether TCP ended without TLS's own end: Python 3.9 has no exception of its own for that."""
    return type(error).__name__ == "SSLEOFError" or error.reason == "UNEXPECTED_EOF_WHILE_READING"


# --- Through ssh: to a server that only its own machine can reach; without --ssh nothing of this runs -----------------

SSH_READY = b"mychat-is-through"  # what ssh has our side say when it has authenticated
SSH_SECONDS = 180.0  # in which it has: somebody may have to look for a pass phrase
SSH_REFUSAL_SECONDS = 0.5  # in which the other machine most probably tells that no server is there
SSH_ALIVE_SECONDS = 30  # between two signs of life: a router at home forgets a silent connection in minutes
SSH_END_SECONDS = 1.0  # for ssh to take the last lines along and end


def through_ssh(cleanup: contextlib.ExitStack, target: str, host: str, port: int) -> Connection:
    """Return a connection to ``host`` and ``port`` as ``target`` sees them, through the user's own ssh: ssh(1), -W.

    Blocks while ssh connects, asks what it has to ask on the terminal, and authenticates: then it runs LocalCommand,
    ssh_config(5), whose output comes to us as the first line. The chat begins after that, so that only one of the two
    reads the terminal at any time. Raises NotConnected or OSError; what ssh has to say is on standard error then.
    Ctrl-C reaches ssh too; once it ends, so does the chat. Whoever closes ``cleanup`` ends ssh.
    """
    command = [
        "ssh",
        "-oPermitLocalCommand=yes",
        f"-oLocalCommand=echo {SSH_READY.decode()}",
        "-oControlPath=none",  # a connection that is shared runs no LocalCommand
        f"-oConnectTimeout={CONNECT_SECONDS:.0f}",
        f"-oServerAliveInterval={SSH_ALIVE_SECONDS}",
    ]
    there = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        sock, child = start_on_socket([*command, "-W", there, "--", target])
    except OSError as error:
        raise NotConnected(f"Cannot run ssh here: {error.strerror}; install the OpenSSH client.") from None
    connection = Connection(sock, is_direct=False)
    cleanup.callback(end_child, child)
    cleanup.callback(connection.close)
    deadline = time.monotonic() + SSH_SECONDS
    line = b"\n"
    while line.endswith(b"\n") and line.strip() != SSH_READY:
        line = connection.read_line(deadline - time.monotonic())
    if line.strip() != SSH_READY:
        raise NotConnected(f"No connection to {target}: ssh says why above; try ssh {target} alone first.")
    if connection.peek_line(SSH_REFUSAL_SECONDS) == b"":
        raise NotConnected(
            f"No server at {host} port {port} of {target}: start mychatserver.py there, or give another port "
            "after the host; ssh says above what it found."
        )
    return connection


def end_child(child: subprocess.Popen[bytes]) -> None:
    """Wait a little for a program to end by itself, then end it."""
    for end in (child.terminate, child.kill, lambda: None):
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(SSH_END_SECONDS)
            break
        end()


def start_on_socket(command: list[str]) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start a program, and return it and a socket that is its standard input and output. Raises OSError."""
    pipe, environment = subprocess.PIPE, {**os.environ, "SHELL": "/bin/sh"}  # a login shell may run nothing, or talk
    child = subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe, env=environment)  # noqa: S603 - no shell
    assert child.stdin and child.stdout  # noqa: S101 - for mypy
    ours, theirs = socket.socketpair()
    no_more = functools.partial(theirs.shutdown, socket.SHUT_RDWR)
    start_thread(pump, functools.partial(theirs.recv, READ_BYTES), child.stdin.write, child.stdin.close)
    start_thread(pump, functools.partial(child.stdout.read, READ_BYTES), theirs.sendall, no_more, theirs.close)
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
    if sys.platform != "win32" and os.isatty(0) and not is_in_background():
        with contextlib.suppress(termios.error):
            termios.tcflush(0, termios.TCIFLUSH)


def is_no_terminal_of_python() -> bool:
    """Return whether this runs in a program such as IDLE or Jupyter, which shows a terminal that is none."""
    with contextlib.suppress(OSError):
        if os.isatty(0) and os.isatty(1):
            return False
    return any(not isinstance(stream, (io.TextIOWrapper, type(None))) for stream in (sys.stdin, sys.stdout))


def open_missing_descriptors() -> None:
    """Open the null device for a standard stream that was closed, or the connection would get its number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # which input() would miss
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for good


def port_number(text: str) -> int:
    """Return ``text`` as a port to connect to; raise what argparse turns into a usage error."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 65_535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: a number from 1 to 65535")
    return int(text)


def host_and_port(text: str) -> tuple[str | None, int | None]:
    """Return what HOST, PORT, HOST:PORT or [IPV6]:PORT names; raise what argparse turns into a usage error."""
    found = re.fullmatch(r"(?:(\[.+\]|[^:]+):)?([0-9]+)", text)
    host, port = (found[1], port_number(found[2])) if found else (text, None)
    return host and host.removeprefix("[").removesuffix("]"), port


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; exit with status 2 and a usage line when they are wrong."""
    usage = "%(prog)s [HOST] [PORT] [OPTION]...; --help lists the options"
    parser = argparse.ArgumentParser("mychatclient", usage, "A chat client.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mychatclient {__version__}")

    whom = parser.add_argument_group("whom to join")
    whom.add_argument(
        "host", nargs="?", type=host_and_port, default=(None, None), help=f"HOST or HOST:PORT (default: {DEFAULT_HOST})"
    )
    port = whom.add_mutually_exclusive_group()
    port.add_argument("port", nargs="?", type=port_number, help=f"alone, or after the host (default: {DEFAULT_PORT})")
    port.add_argument("--port", type=port_number, dest="port_option", metavar="PORT", help="the same")
    whom.add_argument("--lan", action="store_true", help="find the server on this network (default: do not)")
    whom.add_argument("--ssh", metavar="[USER@]MACHINE", help="join through ssh, as seen from there (default: do not)")
    whom.add_argument("--reconnect", action="store_true", help="after a lost connection, try again (default: do not)")

    add = parser.add_argument_group("encryption").add_argument
    add("--tls", action="store_true", help="use TLS, with whom this system trusts (default: do not)")
    add("--tls-ca", metavar="PEM", help="use TLS, with this certificate (default: do not)")

    who = parser.add_argument_group("who you are")
    who.add_argument("--name", default=os.environ.get("MYCHAT_NAME", ""), help="be called so (default: MYCHAT_NAME)")
    password = who.add_mutually_exclusive_group()
    password.add_argument("--password", action="store_true", help="ask for it first (default: when the server does)")
    password.add_argument(
        "--password-file", metavar="FILE", help="its first line is the password (default: MYCHAT_PASSWORD)"
    )

    add = parser.add_argument_group("what you see and hear").add_argument
    add("--bell", action="store_true", help="ring when a line names you (default: do not)")
    add("--time", action="store_true", help="show when each line came (default: do not)")
    add("--compact", action="store_true", help="show no empty row before a line (default: show one)")
    add("--no-color", action="store_true", help="show no colours (default: show them in a terminal)")
    add("--plain", action="store_true", help="only add to the screen, for screen readers (default: do not)")

    options = parser.parse_args(argv)
    options.host, port_of_host = options.host
    options.port = options.port or options.port_option or port_of_host
    if options.reconnect and not (os.isatty(0) and os.isatty(1)):
        parser.error("--reconnect is for a terminal: what comes through a pipe meanwhile would be lost")
    if options.lan and (options.host or options.port or options.ssh is not None):
        parser.error("--lan finds host and port by itself: leave out what else tells whom to join")
    options.tls = options.tls or options.tls_ca is not None
    if options.ssh is not None and (options.tls or options.reconnect):
        parser.error(
            "--ssh goes with neither --tls, as it encrypts already, nor --reconnect, as it may have to ask again"
        )
    options.host = options.host or DEFAULT_HOST
    options.port = options.port or DEFAULT_PORT
    return options


def chat(options: argparse.Namespace, cleanup: contextlib.ExitStack) -> int:
    """Join, chat, and return the exit status. Raises NotConnected when that cannot be."""
    if options.host in ("0.0.0.0", "::"):  # noqa: S104 - nothing is bound
        raise NotConnected(
            f"{options.host} is where a server listens, not an address to join: use one that the server printed."
        )
    known = password_typed() if options.password else password_from(options.password_file)
    password = Password(known, is_typed=options.password)
    context = tls_context(options.tls_ca) if options.tls else None
    if options.lan:
        options.host, options.port = the_server_found()

    def join() -> Connection:
        begun = time.monotonic()
        try:
            if options.ssh is not None:
                connection = through_ssh(cleanup, options.ssh, options.host, options.port)
            else:
                sock = connect(options.host, options.port)
                connection = secured(sock, context, options.host, options.port) if context else Connection(sock)
            password.enter(connection, time.monotonic() - begun)
        except (OSError, ValueError) as error:
            raise connecting_problem(error, options.host, options.port) from None
        return connection

    first = join()
    block_signals()  # or a Ctrl-C could come when the terminal is changed and nobody can change it back
    screen = screen_for(options, first.label)
    try:
        name = " ".join(options.name.split())
        connections = Connections(first, screen.style, name, join if options.reconnect else None)
        return Conversation(connections, screen).run()
    finally:
        screen.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the client; return the exit status: 0 left, 1 no or lost connection, 130 Ctrl-C."""
    try:
        if is_no_terminal_of_python():
            print("Run this in a terminal: python mychatclient.py")
            return 1
        open_missing_descriptors()
        handle(ENDING - {signal.SIGINT}, raise_ended)
        block_signals(())  # whatever our parent did
        options = parse_args(argv)
        with contextlib.ExitStack() as cleanup:
            try:
                return chat(options, cleanup)
            except EOFError:  # Ctrl-D in the place of a password
                return 0
            except (NotConnected, OSError) as error:
                warn(str(error))
                forget_typed()
                return 1
    except KeyboardInterrupt:
        return 130
    except Ended as end:
        signal.signal(end.args[0], signal.SIG_DFL)
        block_signals(())
        signal.raise_signal(end.args[0])
        return 1  # if that does not end it


if __name__ == "__main__":
    sys.exit(main())
