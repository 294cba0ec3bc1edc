"""Draws the picture at the top of README.md from a real run: ``python -m tests.picture``, from the project's root.

The server and three clients have the reference conversation in pseudo-terminals, pyte reads the four screens
(``pip install -e '.[dev]'`` brings it), and .github/conversation.svg is written anew. Port 12000 must be free: it is
the one that the README starts with. Not a test: nothing is checked, the reference conversation has its own.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
from xml.sax.saxutils import escape

import pyte

from tests.support import CLIENT, ROOT, SERVER, Terminal, eventually
from tests.test_reference import say_all

FILE = ROOT / ".github" / "conversation.svg"
ROWS, COLUMNS = 14, 50  # of each terminal: what the longest screen needs
ROW, COLUMN = 16, 7.4  # pixels: the widest of the usual fonts has 7.3 a character at this size
MARGIN, LABEL = 10, 24  # pixels round the text of a window, and above the window for its label
# The windows bring their own background, the labels have a grey that is readable on white and on black.
HEAD = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}" {2}>\n'
FONT = 'font-family="monospace" font-size="12"'
BACKGROUND, TEXT, GREY = "#1f2328", "#d8dee4", "#768390"
COLOURS = {"red": "#ff8a80", "green": "#7fd88f", "blue": "#79b8ff", "magenta": "#d8a6ff", "cyan": "#56d4dd"}


def main() -> None:
    """Have the conversation, and write what the four terminals show when all have left."""
    with contextlib.ExitStack() as stack:

        def start(program: str) -> Terminal:
            terminal = Terminal(sys.executable, program, rows=ROWS, columns=COLUMNS)
            stack.push(terminal.__exit__)
            return terminal

        server = start(SERVER)
        server.wait_for(":12000\n", seconds=10)
        clients: list[Terminal] = []
        for _ in range(3):
            clients.append(start(CLIENT))
            clients[-1].wait_for("Type 'exit' to leave.\n")
            eventually(lambda: server.drawn().count("New connection") == len(clients))
        say_all(clients, re.findall(r", (\d+)\)", server.screen()))
        for client in clients:
            client.type("exit\n")
            client.wait()
        server.wait_for("Connection closed\n" * 3)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(drawing({"Server": server} | {f"Client {i}": client for i, client in enumerate(clients, 1)}))


def drawing(terminals: dict[str, Terminal]) -> str:
    """Return an SVG of the terminals, two in a row."""
    width, height = COLUMNS * COLUMN + 2 * MARGIN, ROWS * ROW + 2 * MARGIN
    whole = HEAD.format(f"{2 * width + MARGIN:g}", f"{2 * (LABEL + height):g}", FONT)
    for number, (label, terminal) in enumerate(terminals.items()):
        x, y = number % 2 * (width + MARGIN), number // 2 * (LABEL + height) + LABEL
        whole += f'<text x="{x:g}" y="{y - 7:g}" fill="{GREY}" font-weight="bold">{label}</text>\n'
        whole += f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{BACKGROUND}"/>\n'
        whole += f'<g fill="{TEXT}" xml:space="preserve">\n'
        for row, text in enumerate(rows(terminal), 1):
            if text:
                whole += f'<text x="{x + MARGIN:g}" y="{y + MARGIN + row * ROW - 4:g}">{text}</text>\n'
        whole += "</g>\n"
    return whole + "</svg>\n"


def rows(terminal: Terminal) -> list[str]:
    """Return what a terminal shows, with its colours."""
    screen = pyte.Screen(COLUMNS, ROWS)
    pyte.ByteStream(screen).feed(terminal.output)
    shown = []
    for number in range(ROWS):
        row = [screen.buffer[number][column] for column in range(COLUMNS)]
        text = ""
        for colour, characters in itertools.groupby(row, lambda character: COLOURS.get(character.fg)):
            part = escape("".join(character.data for character in characters))
            text += f'<tspan fill="{colour}">{part}</tspan>' if colour else part
        shown.append(text.rstrip())
    return shown


if __name__ == "__main__":
    main()
