"""What holds for whatever is put in, looked for by hypothesis, of the dev extra."""

from __future__ import annotations

import re
import socket
import unicodedata
import unittest
from collections.abc import Iterable
from unittest import mock

try:
    from hypothesis import HealthCheck, Phase, example, given, settings
    from hypothesis import strategies as st
    from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
except ImportError:
    raise unittest.SkipTest("needs hypothesis: pip install -e '.[dev]'") from None

import mychatclient
import mychatserver
from mychatserver import clean, folded, front, labelled, name_problem, parse, qualified, validated
from tests.support import LONG, LOOPBACK, Peer, Server, new_framer

# No deadline: machines may be busy. Nothing is kept from one run to the next: a failure prints what brings it back.
settings.register_profile(
    "mychat",
    max_examples=500 if LONG else 60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
    print_blob=True,
)
settings.load_profile("mychat")

# Bytes in which what is looked for is not rare.
STREAMS = st.lists(
    st.sampled_from(
        [b"\n", b"\r", b"\0", b"\xff", b"\xfb", b"\xf4", b"a", b" ", b"\t", b"exit", b"/", b"/who", b"\xc3", b"\xa9"]
    )
    | st.binary(max_size=3)
).map(b"".join)
TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]) | st.sampled_from("\u2028\u202e\x1b\x85\r\0\t :*/"))
FORBIDDEN = {*range(0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A)} - {9, 10}


def reference_lines(stream: bytes) -> list[bytes]:
    """Return the lines of a stream, as plainly as the rule can be said."""
    for end in (b"\r\n", b"\r\0"):
        stream = stream.replace(end, b"\n")
    *lines, unfinished = stream.split(b"\n")
    return [*lines, unfinished] if unfinished else lines


def cut(stream: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(place % (len(stream) + 1) for place in cuts), len(stream)]
    return [stream[start:end] for start, end in zip(places, places[1:])]


def is_command(word: bytes) -> bool:
    return word[:1] == b"/" and word[1:2].isalpha() and b"/" not in word[1:]


def typed_out(stream: bytes) -> bytes:
    """Return what is left of a stream when Backspace and DEL have taken away characters, each of its own line."""
    lines = []
    for line in mychatserver.TELNET.sub(b"", stream).split(b"\n"):
        kept = ""
        for character in line.decode("utf-8", "surrogateescape"):
            kept = kept[:-1] if character in "\b\x7f" else kept + character
        lines.append(kept.encode("utf-8", "surrogateescape"))
    return b"\n".join(lines)


class Lines(unittest.TestCase):
    @given(STREAMS, st.lists(st.integers(0, 1_000)))
    def test_however_bytes_are_cut_the_same_lines_come(self, stream: bytes, cuts: list[int]) -> None:
        framer = new_framer()
        blocks = [framer.feed(piece)[0] for piece in cut(stream, cuts)]
        self.assertEqual(b"".join(blocks) + framer.rest(), b"".join(line + b"\n" for line in reference_lines(stream)))

    @given(STREAMS, st.lists(st.integers(0, 1_000)), st.integers(1, 12))
    def test_lines_over_a_limit_are_left_out_and_told_of_once_each(
        self, stream: bytes, cuts: list[int], limit: int
    ) -> None:
        stream += b"\n"  # of an unfinished line, a last return is over the limit without being told of
        with mock.patch.object(mychatserver, "MAX_LINE_BYTES", limit):
            framer = new_framer()
            fed = [
                framer.feed(part) for piece in cut(stream, cuts) for part in cut(piece, [*range(0, len(piece), limit)])
            ]
        block = b"".join(block for block, _ in fed) + framer.rest()
        lines = reference_lines(stream)
        self.assertEqual(block, b"".join(line + b"\n" for line in lines if len(line) <= limit))
        self.assertEqual(sum(told for _, told in fed), sum(len(line) > limit for line in lines))

    @given(STREAMS)
    def test_cleaning_twice_changes_nothing_grows_threefold_at_most_and_keeps_the_lines(self, stream: bytes) -> None:
        once = clean(stream)
        self.assertEqual(clean(once), once)
        self.assertLessEqual(len(once), 3 * len(stream))
        self.assertEqual(once.count(b"\n"), stream.count(b"\n"))
        self.assertFalse(FORBIDDEN & {ord(character) for character in once.decode()})

    @given(TEXTS)
    def test_good_characters_pass_and_each_forbidden_one_is_replaced(self, text: str) -> None:
        expected = "".join("\ufffd" if ord(character) in FORBIDDEN else character for character in text)
        self.assertEqual(clean(text.encode()).decode(), expected)

    @given(STREAMS)
    def test_what_is_spoken_is_the_lines_but_blank_ones_and_commands_up_to_exit(self, stream: bytes) -> None:
        expected: list[tuple[str, bytes]] = []
        for line in clean(typed_out(stream + b"\n")).split(b"\n")[:-1]:
            text = line.lstrip(b" \t")
            word = text.replace(b"\t", b" ").split(b" ")[0]
            if text.rstrip(b" \t").lower() == b"exit":
                expected.append(("leaves", b""))
                break
            if is_command(word):
                expected.append(("commands", text))
            elif word[:1] == b"/" and is_command(word[1:]):
                expected.append(("says", line.replace(b"/", b"", 1)))
            elif text:
                expected.append(("says", line))
        found: list[tuple[str, bytes]] = []
        for lines, command in parse(stream + b"\n"):
            found += [("says", line) for line in lines.split(b"\n")[:-1]]
            if command == "/quit" and len(found) + 1 == len(expected) and expected[-1][0] == "leaves":
                found.append(("leaves", b""))
            elif command:
                found.append(("commands", command.encode()))
        self.assertEqual(found, expected)

    @given(st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b".")), min_size=1), st.integers(1, 60))
    def test_portions_are_whole_lines_with_a_label_each_and_nothing_is_left_out(
        self, lines: list[bytes], size: int
    ) -> None:
        rest, portions = b"".join(line + b"\n" for line in lines), []
        while rest:
            portion = front(rest, size)
            self.assertTrue(len(portion) <= size or portion.count(b"\n") == 1)
            portions.append(labelled("54358", portion))
            rest = rest[len(portion) :]
        self.assertEqual(b"".join(portions), b"".join(b"54358:" + line + b"\n" for line in lines))


class Names(unittest.TestCase):
    @given(TEXTS)
    def test_a_name_can_be_taken_for_nothing_else(self, text: str) -> None:
        name = unicodedata.normalize("NFKC", text)
        if not name_problem(name):
            self.assertTrue(name[0].isalpha() and 1 <= len(name) <= 24)
            self.assertFalse(set(name) & set(" \t\n:*@/'\","))
            self.assertEqual(clean(f"{name}\n".encode()).decode(), f"{name}\n")
            self.assertEqual(name_problem(folded(name)[:24]), "")

    @given(TEXTS)
    def test_two_are_the_same_in_any_case_and_form(self, text: str) -> None:
        text = text[:24]
        for form in ("NFC", "NFD", "NFKC", "NFKD"):
            self.assertEqual(folded(unicodedata.normalize(form, text)), folded(text))
        self.assertEqual(folded(folded(text)), folded(text))


class Discovery(unittest.TestCase):
    def setUp(self) -> None:
        self.sock = mock.Mock(spec=socket.socket)

    @given(
        st.binary(max_size=200) | st.binary(max_size=3).map(lambda end: b"mychat?1 0123456789abcdef" + end.ljust(103))
    )
    @example(b"mychat?1 0123456789abcdef".ljust(128))
    def test_only_a_question_gets_an_answer_and_that_is_shorter(self, data: bytes) -> None:
        self.sock.reset_mock()
        with mock.patch.object(mychatserver, "DISCOVERY_PORT", 0), mychatserver.Discovery(54_321) as discovery:
            self.sock.recvfrom.side_effect = [(data, ("10.0.0.1", 9)), BlockingIOError]
            with mock.patch.multiple(discovery, recvfrom=self.sock.recvfrom, sendto=self.sock.sendto):
                discovery.answer()
        answers = [call.args for call in self.sock.sendto.call_args_list]
        if (
            len(data) == 128
            and data.rstrip(b" ") == data[:25]
            and data.startswith(b"mychat?1 ")
            and data[9:25].isalnum()
        ):
            self.assertEqual([asker for _, asker in answers], [("10.0.0.1", 9)])
            self.assertRegex(answers[0][0], rb"^mychat!1 %s [0-9a-f]{16} 54321 [0-9A-Za-z.-]+$" % data[9:25])
            self.assertLess(len(answers[0][0]), len(data))
        else:
            self.assertEqual(answers, [])

    @given(st.binary(max_size=200) | st.from_regex(rb"\Amychat!1 [0-9a]{16} [0-9b]{16} [0-9]{1,6} [a-z.\x1b ]{1,70}\Z"))
    @example(b"mychat!1 aaaaaaaaaaaaaaaa bbbbbbbbbbbbbbbb 12000 host")
    def test_whatever_answers_what_is_shown_of_it_is_safe(self, data: bytes) -> None:
        self.sock.recvfrom.side_effect = [(data, ("10.0.0.1", 9))] + [TimeoutError] * 9
        moments = iter(range(1_000))
        with (
            mock.patch("socket.socket", return_value=mock.MagicMock(__enter__=lambda _: self.sock)),
            mock.patch.object(mychatclient, "ASK_SECONDS", 2),
            mock.patch.object(mychatclient, "ask"),
            mock.patch("time.monotonic", lambda: next(moments)),
            mock.patch("secrets.token_hex", return_value="a" * 16),
        ):
            for name, host, port in mychatclient.find_servers():
                self.assertRegex(name, r"^[0-9A-Za-z.-]{1,63}$")
                self.assertEqual(host, "10.0.0.1")
                self.assertIn(port, range(1, 65_536))
                self.assertTrue(data.startswith(b"mychat!1 aaaaaaaaaaaaaaaa "))


class OtherServers(unittest.TestCase):
    @given(
        st.lists(
            st.tuples(
                st.sampled_from([b"a@p:", b"b@q:", b"a@a@p:", b"a b@p:", b"* a@p ", b"* a@q ", b"*", b""]),
                st.sampled_from([b"joined", b"left", b"is now b@p", b"is now b@q", b""]),
                st.just(b"") | STREAMS,
            ).map(b"".join)
        )
    )
    def test_whatever_comes_what_is_shown_is_whole_clean_and_of_its_server(self, words: list[bytes]) -> None:
        message = b"\n".join(words)
        shown = validated(message, "p")
        self.assertEqual(clean(shown), shown)
        lines = clean(message).split(b"\n")[:-1]
        for line in shown.split(b"\n")[:-1]:
            self.assertIn(line, lines)
            self.assertRegex(line, rb"^([^ :*@\n]+@p:.*|\* [^ :*@\n]+@p (joined|left|is now [^ :*@\n]+@p))$")
        self.assertTrue(shown == b"" or shown.endswith(b"\n"))

    @given(st.lists(st.sampled_from([b"54358", b"ann", "é-2".encode()])), STREAMS)
    def test_what_is_sent_to_another_server_is_valid_there_unchanged(self, labels: list[bytes], text: bytes) -> None:
        words = clean(text.replace(b"\n", b" "))
        forms = b"%s:%s\n* %s is now %s\n* %s left\n", b"%s@p:%s\n* %s@p is now %s@p\n* %s@p left\n"
        here, there = (b"".join(form % (label, words, label, label, label) for label in labels) for form in forms)
        self.assertEqual(qualified(here, "p"), there)
        self.assertEqual(validated(there, "p"), there)


PEOPLE = st.integers(0, 9)
WHO_SHOWN = 4
TIME = re.compile(rb"\* \d\d:\d\d")  # told with history
WORDS = st.sampled_from(["ann", "Ann", "bob", "Zoë", "zoë", "1a", "you", "x" * 25, "a b", "nobody", "54358"])


class Room(RuleBasedStateMachine):
    """A server beside plain Python: one list of those who are here, and what each of them is to have heard.

    The first who is here only listens: what this one has heard is out. The others read when they do. All examples have
    the same server, one after the other: what was said in one is history in the next.
    """

    server: Server
    said: list[str] = []  # by anybody, to all, since the server started

    def __init__(self) -> None:
        super().__init__()
        self.here: list[Peer] = []
        self.expected: dict[Peer, str] = {}
        self.wrote: dict[Peer, Peer] = {}  # to each, privately, last
        self.connected: list[Peer] = []  # all who have come
        self.last: Peer | None = None  # who has typed something
        self.join()
        for _ in range(2):  # the second is answered when all others have been told of the first: nobody yet
            self.type(self.here[0], "")
            self.all_that_was_done_is_out()

    def teardown(self) -> None:
        for peer in self.here:
            self.read(peer)
        for peer in self.connected:
            peer.close()
        closed = 0
        while closed < len(self.connected):  # the next example begins in an empty room
            closed += self.server.line() == "Connection closed"

    def type(self, client: Peer, text: str) -> None:
        client.send(f"{text}/x\n")
        self.last = client

    def read(self, peer: Peer) -> None:
        """Have a peer read all that it is to have heard, whatever the time it was said at."""
        is_alone = len(self.connected) == 1  # so far: who is told to have left was in the example before
        for expected in self.expected[peer].split("\n")[:-1]:
            while TIME.fullmatch(line := peer.line()) or (is_alone and line.endswith(b" left")):
                pass
            assert line.decode() == expected, (line, expected)
        self.expected[peer] = ""

    @invariant()
    def all_that_was_done_is_out(self) -> None:
        if self.last:
            self.tell([self.last], "* unknown command '/x': /help lists them, // sends a line that starts with /")
            self.read(self.last)
            self.last = None
        self.read(self.here[0])
        self.read(self.here[-1])  # it may have just come

    def speaker(self, number: int) -> Peer | None:
        able = self.here[1:]
        return able[number % len(able)] if able else None

    def tell(self, clients: Iterable[Peer], *lines: str) -> None:
        for client in clients:
            self.expected[client] += "".join(f"{line}\n" for line in lines)

    def others(self, client: Peer) -> list[Peer]:
        return [other for other in self.here if other is not client]

    def who(self, client: Peer) -> str:
        shown = self.here[:WHO_SHOWN]
        if client not in shown:
            shown[-1] = client
        names = (other.label + (" (you)" if other is client else "") for other in shown)
        more = f", and {len(self.here) - len(shown)} more" if len(self.here) > len(shown) else ""
        return f"* {len(self.here)} here: {', '.join(names)}{more}"

    @rule()
    def join(self) -> None:
        client = Peer(LOOPBACK, self.server.port)
        self.connected.append(client)
        self.here.append(client)
        last = self.said[-5:]
        heading = [f"* the last {len(last)} lines:" if len(last) > 1 else "* the last line:"] if last else []
        self.expected[client] = ""
        self.tell([client], self.who(client), *heading, *last, *(["* live from here"] if last else []))
        self.tell(self.others(client), f"* {client.label} joined")

    @rule(number=PEOPLE, way=st.sampled_from(["exit", "close", "reset"]))
    def leave(self, number: int, way: str) -> None:
        client = self.speaker(number)
        if client:
            if way == "exit":
                client.send("exit\nnot said\n")
            elif way == "reset":
                client.reset()
            else:
                client.close()
            self.here.remove(client)
            del self.expected[client]
            self.tell(self.here, f"* {client.label} left")

    @rule(number=PEOPLE)
    def take(self, number: int) -> None:
        self.read(self.here[number % len(self.here)])

    @rule(number=PEOPLE, lines=st.lists(st.sampled_from(["Hi!", "a" * 40, "* x", "ann:no"]), min_size=1, max_size=4))
    def say(self, number: int, lines: list[str]) -> None:
        client = self.speaker(number)
        if client:
            self.type(client, "".join(f"{line}\n" for line in lines))
            said = [f"{client.label}:{line}" for line in lines]
            self.said += said
            self.tell(self.others(client), *said)

    @rule(number=PEOPLE, name=WORDS)
    def rename(self, number: int, name: str) -> None:
        client = self.speaker(number)
        if not client:
            return
        old, folded_name = client.label, name.casefold()
        self.type(client, f"/nick {name}\n")
        if name in ("1a", "you", "x" * 25, "a b", "54358"):
            reason = {
                "you": "it is reserved",
                "x" * 25: "24 characters at most",
                "a b": "letters, digits, _, - and . only",
            }
            self.tell([client], f"* not a name: '{name}': {reason.get(name, 'it must begin with a letter')}")
        elif any(other.label.casefold() == folded_name for other in self.others(client)):
            self.tell([client], f"* name '{name}' is taken")
        elif name != old:
            client.label = name
            self.tell(self.here, f"* {old} is now {name}")

    @rule(number=PEOPLE, name=WORDS)
    def write(self, number: int, name: str) -> None:
        client = self.speaker(number)
        if client and " " not in name:
            self.type(client, f"/msg {name} psst\n")
            found = [other for other in self.here if other.label.casefold() == name.casefold()]
            self.tell(found, f"* {client.label} to you: psst")
            self.tell([client], *(f"* to {other.label}: psst" for other in found))
            self.wrote.update((other, client) for other in found)
            if not found:
                self.tell([client], f"* nobody here is called '{name}'")

    @rule(number=PEOPLE)
    def answer(self, number: int) -> None:
        client = self.speaker(number)
        if client:
            self.type(client, "/r yes\n")
            to = self.wrote.get(client)
            if to in self.here:
                self.tell([to], f"* {client.label} to you: yes")
                self.tell([client], f"* to {to.label}: yes")
                self.wrote[to] = client
            else:
                self.tell([client], "* who wrote to you has left" if to else "* nobody has written to you privately")

    @rule(number=PEOPLE)
    def ask_who(self, number: int) -> None:
        client = self.speaker(number)
        if client:
            self.type(client, "/who\n")
            self.tell([client], self.who(client))


# What fails is not made smaller: that takes minutes, as each try talks to a server.
Room.TestCase.settings = settings(max_examples=100 if LONG else 15, stateful_step_count=50, phases=[Phase.generate])


RoomOverSockets = Room.TestCase
RoomOverSockets.__module__ = __name__  # or unittest takes it for another module's, and ends this one's server before


def setUpModule() -> None:
    Room.server = Server(
        "--announce", "--history", "5", "--quiet", constants={"WHO_SHOWN": WHO_SHOWN, "NAME_SECONDS": 0.0}
    )
    unittest.addModuleCleanup(Room.server.__exit__)
