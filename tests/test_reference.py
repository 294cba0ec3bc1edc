"""The reference conversation: one server, three clients in terminals of their own, to the letter."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tests.support import CLIENT, LOOPBACK, Server, Terminal, TestCase, command_of

SERVER_OUTPUT = """\
Server listening on 127.0.0.1:12000
New connection from : ('127.0.0.1', 54358)
New connection from : ('127.0.0.1', 54383)
New connection from : ('127.0.0.1', 54396)
54358:Hi!
54383:Hello!{blank}
54396:How are you guys doing?
54383:Good.
54358:Good.
Connection closed
Connection closed
Connection closed
"""

SCREENS = (
    """\
Connected to chat server. Type 'exit' to leave.
Hi!

54383:Hello!{blank}

54396:How are you guys doing?

54383:Good.
Good.
exit
Disconnected from server
""",
    """\
Connected to chat server. Type 'exit' to leave.

54358:Hi!
Hello!{blank}

54396:How are you guys doing?
Good.

54358:Good.
exit
Disconnected from server
""",
    """\
Connected to chat server. Type 'exit' to leave.

54358:Hi!

54383:Hello!{blank}
How are you guys doing?


54383:Good.

54358:Good.
exit
Disconnected from server
""",
)

# Who types what.
SAID = ((0, "Hi!"), (1, "Hello! "), (2, "How are you guys doing?"), (2, ""), (1, "Good."), (0, "Good."))


def say_all(terminals: list[Terminal], labels: list[str]) -> None:
    """Have the three say all of it; what is said the others have seen before anyone goes on."""
    for speaker, text in SAID:
        shown = terminals[speaker].screen()
        terminals[speaker].type(f"{text}\n")
        terminals[speaker].wait_for(f"{shown}{text}\n")
        for listener in {0, 1, 2} - {speaker} if text else ():
            terminals[listener].wait_for(f"\n{labels[speaker]}:{text}\n")


class ReferenceConversation(TestCase):
    maxDiff = None
    constants: Mapping[str, object] | None = None  # the client's, for who cannot wait

    def test_the_reference_conversation(self) -> None:
        """Server and all three screens match to the letter, but for the ports, which the system gives."""
        for options in ((), ("--plain",)):
            with self.subTest(options=options):
                self.converse(*options)

    def converse(self, *options: str, serving: tuple[str, ...] = ()) -> None:
        with Server(*serving) as server:
            terminals: list[Terminal] = []
            ports = {"12000": str(server.port)}
            try:
                for port in ("54358", "54383", "54396"):
                    terminals.append(
                        Terminal(*command_of(CLIENT, self.constants), *options, LOOPBACK, str(server.port))
                    )
                    terminals[-1].wait_for("Type 'exit' to leave.\n")
                    ports[port] = server.line().rpartition(" ")[2].rstrip(")")
                say_all(terminals, list(ports.values())[1:])
                for terminal in terminals:
                    terminal.type("exit\n")
                    self.assertEqual(terminal.wait(), 0)
                    self.assertEqual(terminal.attributes(), terminal.before)
                self.assertEqual(server.stop(), 0)
            finally:
                for terminal in terminals:
                    terminal.__exit__()

            def as_today(text: str) -> str:
                return re.sub("|".join(ports), lambda found: ports[found[0]], text).format(blank=" ")

            self.assertEqual(server.output.decode(), as_today(SERVER_OUTPUT))
            for terminal, screen in zip(terminals, SCREENS):
                self.assertEqual(terminal.screen(), as_today(screen))
