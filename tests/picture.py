"""Draws the picture at the top of README.md from a real run: ``python -m tests.picture``, from the project's root.

The server and three clients run in pseudo-terminals of their own. What is typed is SCRIPT, key by key. pyte reads the
four screens (``pip install -e '.[dev]'`` brings it) each time that they change, and .github/conversation.svg is written
anew: each row that was seen is there, with the time in which it was. Port 12000 must be free: it is the one that the
README starts with. Not a test: nothing is checked, the reference conversation has its own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import time
from xml.sax.saxutils import escape

import pyte

from tests.support import CLIENT, ROOT, SERVER, Terminal

FILE = ROOT / ".github" / "conversation.svg"
PEOPLE = "ann", "bob", "cyd"
# When who begins to type what, in seconds; a line without its end is half-typed until the next one.
SCRIPT = (
    (0.6, "ann", "Lunch at noon?\n"),
    (2.3, "bob", "Sure. Where?\n"),
    (3.4, "cyd", "ann, I can only come after"),
    (4.6, "ann", "The usual place.\n"),
    (5.8, "bob", "See you there!\n"),
    (7.7, "cyd", " my class, at one.\n"),
    (9.4, "ann", "Then one it is.\n"),
)
KEY_SECONDS = 0.07  # between two keys
SECONDS = 12.0  # of the whole, which then begins again

ROWS, COLUMNS = 17, 50  # of each terminal: what the longest screen needs
ROW, COLUMN = 16, 7.4  # pixels: the widest of the usual fonts has 7.3 a character at this size
MARGIN, LABEL = 10, 24  # pixels round the text of a window, and above the window for its label
CURSOR = "\u2588"
# The windows bring their own background, the labels have a grey that is readable on white and on black.
HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}" {2}>
<title>Three people chat; what comes in is shown above the line that one of them is typing</title>
<style>
text{{white-space:pre;animation:{3:g}s step-end infinite}}
@media (prefers-reduced-motion:reduce){{text{{animation:none!important}}}}
{4}</style>
"""
FONT = 'font-family="monospace" font-size="12"'
BACKGROUND, BORDER, TEXT, GREY = "#0d1117", "#57606a", "#d8dee4", "#768390"

Interval = tuple[float, float]


class Window:
    """A terminal, and every row that it has shown with the time in which it did."""

    def __init__(self, terminal: Terminal, has_cursor: bool) -> None:
        self.terminal = terminal
        self._has_cursor = has_cursor
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self._screen)
        self._fed = 0  # bytes of the terminal's output
        self._shown = [("", 0.0)] * ROWS  # each row, and since when
        self.rows: list[tuple[int, str, Interval]] = []

    def look(self, now: float) -> None:
        """Note what has changed."""
        while self.terminal.read(0.001):
            pass
        self._stream.feed(self.terminal.output[self._fed :])
        self._fed = len(self.terminal.output)
        for number, (text, since) in enumerate(self._shown):
            row = self._row(number)
            if row != text:
                self._keep(number, text, (since, now))
                self._shown[number] = row, now

    def finish(self) -> None:
        """Have what is shown now stay to the end."""
        for number, (text, since) in enumerate(self._shown):
            self._keep(number, text, (since, SECONDS))

    def _keep(self, number: int, text: str, interval: Interval) -> None:
        if text and interval[1] > interval[0]:
            self.rows.append((number, text, interval))

    def _row(self, number: int) -> str:
        """Return what a row shows, with its colours and the cursor."""
        cells = [self._screen.buffer[number][column] for column in range(COLUMNS)]
        text = ""
        for (colour, bold), cell in itertools.groupby(cells, lambda cell: (cell.fg, cell.bold)):
            part = escape("".join(character.data for character in cell))
            style = f' fill="#{colour}"' if len(colour) == 6 else ""  # of the 256
            style += ' font-weight="bold"' if bold else ""
            text += f"<tspan{style}>{part}</tspan>" if style else part
        text = text.rstrip()
        cursor = self._screen.cursor
        if self._has_cursor and cursor.y == number:
            typed = "".join(cell.data for cell in cells).rstrip()
            text += " " * (cursor.x - len(typed)) + f'<tspan fill="{GREY}">{CURSOR}</tspan>'
        return text


def main() -> None:
    """Have the conversation, and write what the four terminals showed."""
    os.environ["COLORTERM"] = "truecolor"  # which the clients take for 256 colours
    with contextlib.ExitStack() as stack:

        def start(*command: str) -> Terminal:
            terminal = Terminal(sys.executable, *command, rows=ROWS, columns=COLUMNS)
            stack.push(terminal.__exit__)
            return terminal

        windows = {"server": Window(start(SERVER), has_cursor=False)}
        server = windows["server"].terminal
        server.wait_for(":12000\n", seconds=10)
        for name in PEOPLE:
            windows[name] = Window(start(CLIENT, "--name", name), has_cursor=True)
            windows[name].terminal.wait_for(f"is now {name}\n")
            server.wait_for(f"is now {name}\n")
        for window in windows.values():
            window.look(0.0)
        keys = sorted(
            (start + number * KEY_SECONDS, name, key) for start, name, text in SCRIPT for number, key in enumerate(text)
        )
        started = time.monotonic()
        for due, name, key in keys:
            while time.monotonic() - started < due:  # the pace is what is asked for
                time.sleep(0.005)
                for window in windows.values():
                    window.look(time.monotonic() - started)
            windows[name].terminal.type(key)
        time.sleep(0.5)
        for window in windows.values():
            window.look(time.monotonic() - started)
            window.finish()
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(drawing(windows), encoding="utf-8")


def drawing(windows: dict[str, Window]) -> str:
    """Return an SVG of the windows, two in a row. Without animation it shows the end."""
    width, height = COLUMNS * COLUMN + 2 * MARGIN, ROWS * ROW + 2 * MARGIN
    moments = sorted(
        {round(moment / SECONDS * 100, 1) for one in windows.values() for row in one.rows for moment in row[2]}
    )
    rules: dict[str, str] = {}
    body = ""
    for number, (label, window) in enumerate(windows.items()):
        x, y = number % 2 * (width + MARGIN) + 1, number // 2 * (LABEL + height) + LABEL
        body += f'<text x="{x:g}" y="{y - 7:g}" fill="{GREY}" font-weight="bold">{label}</text>\n'
        body += f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" '
        body += f'fill="{BACKGROUND}" stroke="{BORDER}"/>\n<g fill="{TEXT}">\n'
        for row, text, interval in window.rows:
            begin, end = (round(moment / SECONDS * 100, 1) for moment in interval)
            if begin == end:
                continue
            name, rule = moments_shown(begin, end, moments)
            rules[name] = rule
            hidden = ' visibility="hidden"' if end < 100 else ""
            place = f'x="{x + MARGIN:g}" y="{y + MARGIN + (row + 1) * ROW - 4:g}"'
            body += f'<text {place} class="{name}"{hidden} xml:space="preserve">{text}</text>\n'
        body += "</g>\n"
    size = f"{2 * width + MARGIN + 2:g}", f"{2 * (LABEL + height) + 1:g}"
    return HEAD.format(*size, FONT, SECONDS, "".join(rules.values())) + body + "</svg>\n"


def moments_shown(begin: float, end: float, moments: list[float]) -> tuple[str, str]:
    """Return the name and the rules of what is to be seen in an interval, in per cent of the whole."""
    name = f"s{moments.index(begin)}-{moments.index(end)}"
    frames = "0%{visibility:hidden}" if begin else ""
    frames += f"{begin:g}%{{visibility:visible}}"
    frames += f"{end:g}%{{visibility:hidden}}" if end < 100 else ""
    return name, f".{name}{{animation-name:{name}}}@keyframes {name}{{{frames}}}\n"


if __name__ == "__main__":
    main()
