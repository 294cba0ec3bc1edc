"""Names, who is here, private words: as peers that speak the wire see it."""

from __future__ import annotations

import contextlib
import io
import pathlib
import re
import sys
import time
import unicodedata
from unittest import mock

from mychatserver import COMMANDS, LINE_TOO_LONG, folded, name_problem, parse_args
from tests.support import LONG, SECONDS, SERVER, Background, Peer, Server, SharedServerTestCase, TestCase, eventually

OTHER_HOST = "127.0.0.2"


class People(SharedServerTestCase):
    """Two people in a server."""

    def setUp(self) -> None:
        super().setUp()
        self.ann = self.peer()
        self.bob = self.peer()

    def name(self, peer: Peer, name: str) -> None:
        """Have ``peer`` take a name; both people are told."""
        notice = f"* {peer.label} is now {name}"
        peer.say(f"/nick {name}")
        for other in (self.ann, self.bob):
            other.expect(notice)
        self.server.expect(notice)
        peer.label = name

    def silent(self, peer: Peer, speaker: Peer) -> None:
        """Fail unless ``peer`` has heard nothing: what ``speaker`` says now is the next."""
        speaker.say("fence")
        peer.expect(f"{speaker.label}:fence")
        self.server.expect(f"{speaker.label}:fence")


class Names(People):
    def test_a_name_is_told_to_all_and_labels_what_follows(self) -> None:
        old = self.ann.label
        self.ann.send("before\n/nick ann\nafter\n")
        self.bob.expect(f"{old}:before", f"* {old} is now ann", "ann:after")
        self.ann.expect(f"* {old} is now ann")
        self.server.expect(f"{old}:before", f"* {old} is now ann", "ann:after")

    def test_a_name_is_taken_in_any_case_and_form_until_its_owner_leaves(self) -> None:
        self.name(self.ann, "Zoë")
        for same in ("Zoë", "zoë", "ZOË", "Zoe\u0308", "\uff3aoë"):
            self.bob.say(f"/nick {same}")
            self.bob.expect(f"* name '{unicodedata.normalize('NFKC', same)}' is taken")
        self.silent(self.ann, self.bob)
        self.ann.say("exit")
        self.ann.expect_end()
        self.server.expect("Connection closed")
        self.bob.say("/nick zoë")
        self.bob.expect(f"* {self.bob.label} is now zoë")

    def test_another_case_of_the_own_name_works_and_the_very_same_says_nothing(self) -> None:
        self.name(self.ann, "ann")
        self.name(self.ann, "Ann")
        self.ann.say("/nick Ann")
        self.silent(self.bob, self.ann)
        self.bob.say("here")
        self.ann.expect(f"{self.bob.label}:here")

    def test_what_is_not_a_name_is_refused_privately(self) -> None:
        for wanted, reason in (
            ("x y", "letters, digits, _, - and . only"),
            ("1a", "it must begin with a letter"),
            (self.bob.label, "it must begin with a letter"),
            ("a:b", "letters, digits, _, - and . only"),
            ("a@b", "letters, digits, _, - and . only"),
            ("*", "it must begin with a letter"),
            ("\u3164", "it has a letter that shows nothing"),
            ("a\uffa0", "it has a letter that shows nothing"),
            ("ann\ufe0f", "it has a letter that shows nothing"),
            ("ann\u02d0", "it has a letter that looks like a colon"),
            ("a\u0903nn", "it has a letter that looks like a colon"),
            ("Server", "it is reserved"),
            ("YOU", "it is reserved"),
            ("e\uff58it", "it is reserved"),
            ("x" * 25, "24 characters at most"),
        ):
            with self.subTest(wanted=wanted):
                self.ann.say(f"/nick {wanted}")
                self.ann.expect(f"* not a name: '{wanted}': {reason}")
        self.ann.say("/nick\t ")
        self.ann.expect("* usage: /nick NAME")
        self.silent(self.bob, self.ann)

    def test_names_over_all_of_unicode(self) -> None:
        """A character may begin a name, be in it, or neither, by its category, unless it is unseen or like a colon."""
        unseen = {*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}
        unseen |= {0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0}
        refused = unseen | {0x2D0, 0x903, 0xA83, 0xA4FD}
        for code in [*range(0x3200), *range(0x3200, sys.maxunicode + 1, 1 if LONG else 17)]:
            character = chr(code)
            if unicodedata.normalize("NFKC", character) != character:
                continue
            category = unicodedata.category(character)
            letter = category[0] == "L" and code not in refused
            within = letter or (category in ("Mn", "Mc", "Nd") and code not in refused) or character in "_-."
            if (not name_problem(character), not name_problem("a" + character)) != (letter, within):
                self.fail(f"U+{code:04X} {category}")
            if within and {*character} & {*" :*@\n/,'"}:
                self.fail(f"U+{code:04X} could be taken for the end of a label")

    def test_folding_is_stable(self) -> None:
        for name in ("ann", "Straße", "ǅ", "İx", "ﬁn", "ᾳ", "\u0345a"):
            self.assertEqual(folded(folded(name)), folded(name))

    def test_the_same_in_another_case_is_the_same_name(self) -> None:
        for letter in "ßǆﬁᾳᾷῇῷΐ":
            for other in (letter.upper(), letter.lower(), letter.title()):
                self.assertEqual(folded(other), folded(letter), other)

    def test_the_longest_name_works(self) -> None:
        self.name(self.ann, "x" * 24)

    def test_two_race_for_one_name(self) -> None:
        for number in range(30):
            name = f"name{number}"
            for peer in (self.ann, self.bob):
                peer.say(f"/nick {name}")
            peers = (self.ann, self.bob)
            both = []
            for peer in peers:
                both.append(peer.line().decode())
                if both[-1] != f"* {peer.label} is now {name}":
                    both.append(peer.line().decode())
            winner = 0 if f"* {self.ann.label} is now {name}" in both else 1
            notice, refusal = f"* {peers[winner].label} is now {name}", f"* name '{name}' is taken"
            # Both get the notice; the other one the refusal too, which is not in one order with what is for all.
            self.assertEqual(sorted(both), sorted([notice, notice, refusal]))
            peers[winner].label = name

    def test_two_ports_that_are_the_same(self) -> None:
        """The label of a port stays another's while its owner has a name."""
        port = self.ann.address[1]
        self.name(self.ann, "ann")
        with self.server.peer(source=(OTHER_HOST, port)) as other:
            other.say("Hi!")
            self.bob.expect(f"{port}:Hi!")

    def test_renames_among_talkers_show_who_said_what(self) -> None:
        """Each of twenty says numbered lines and takes a new name every ten: all hear them in the right order."""
        background = Background()
        talkers = [self.peer() for _ in range(20)]
        rounds = 20

        def talk(number: int, peer: Peer) -> None:
            for turn in range(rounds):
                peer.send(f"/nick t{number}.{turn}\n" + "".join(f"{number} {turn * 10 + i}\n" for i in range(10)))

        def drain(peer: Peer) -> None:
            peer.wait_for("the", "end")

        for number, peer in enumerate(talkers):
            background.run(talk, number, peer)
            background.run(drain, peer)
        labels = {peer.label: number for number, peer in enumerate(talkers)}
        told = [0] * len(talkers)
        for _ in range(20 * rounds * 11):
            line = self.bob.line().decode()
            rename = re.fullmatch(r"\* (\S+) is now (\S+)", line)
            if rename:
                labels[rename[2]] = labels.pop(rename[1])
                continue
            label, _, text = line.partition(":")
            number = labels[label]
            self.assertEqual(text, f"{number} {told[number]}")
            self.assertEqual(label, f"t{number}.{told[number] // 10}")
            told[number] += 1
        self.assertEqual(told, [rounds * 10] * 20)
        self.ann.send("/nick the\nend\n")
        background.join()

    def test_a_dead_connection_does_not_keep_its_name_for_ever(self) -> None:
        """The kernel asks a silent peer whether it is there: its timer runs for our end of the connection."""
        own, peers = f":{self.server.port:04X}", f":{self.ann.address[1]:04X}"

        def has_timer() -> bool:
            for row in pathlib.Path("/proc/net/tcp").read_text().splitlines():
                fields = row.split()
                if fields[1].endswith(own) and fields[2].endswith(peers):
                    kind, _, left = fields[5].partition(":")
                    return kind == "02" and 0 < int(left, 16) <= 3_000  # keepalive, in hundredths of a second
            return False

        eventually(has_timer)


class Who(People):
    constants = {"FLOOR_SECONDS": 2, "STALL_SECONDS": 4, "WORK_SHARE": 1e9}  # or asking so much would take minutes

    def test_who_is_here_in_order_of_arrival(self) -> None:
        self.name(self.bob, "bob")
        third = self.peer()
        for peer, names in (
            (self.ann, f"{self.ann.label} (you), bob, {third.label}"),
            (self.bob, f"{self.ann.label}, bob (you), {third.label}"),
            (third, f"{self.ann.label}, bob, {third.label} (you)"),
        ):
            peer.say("/who")
            peer.expect(f"* 3 here: {names}")

    def test_fifty_at_most_are_named_and_oneself_among_them(self) -> None:
        peers = [self.ann, self.bob, *(self.peer() for _ in range(48))]
        labels = [peer.label for peer in peers]
        self.ann.say("/who")
        self.ann.expect(f"* 50 here: {labels[0]} (you), {', '.join(labels[1:])}")
        last = self.peer()
        self.ann.say("/who")
        self.ann.expect(f"* 51 here: {labels[0]} (you), {', '.join(labels[1:])}, and 1 more")
        last.say("/who")
        last.expect(f"* 51 here: {', '.join(labels[:49])}, {last.label} (you), and 1 more")

    def test_who_asks_on_and_does_not_read_costs_little(self) -> None:
        """13,000 questions in one block: the next is answered only when the answers before have gone."""
        peers = [self.peer() for _ in range(48)]
        with self.server.peer(receive_buffer=4_096) as greedy:
            before = self.server.memory()
            for _ in range(4):
                greedy.send(b"/who\n" * 13_000)
            self.ann.say("Hi!")
            peers[-1].expect(f"{self.ann.label}:Hi!")
            eventually(lambda: self.server.output.endswith(b"Connection closed\n"))  # let go: it takes nothing
            self.assertLess(self.server.memory() - before, 8_000_000)


class Rude(People):
    """Commands that cost much more than they say."""

    def test_long_arguments_hold_up_nobody(self) -> None:
        """Each is worked on in no time, though quadratic ways of taking it apart would take many seconds."""
        _, before = self.server.work()
        marks = "\u0301" * 16_000 + "\u0323" * 16_000
        for command in (f"/msg a{' ' * 65_000}", f"/msg a{marks[:20_000]} x", f"/nick a{marks[:20_000]}"):
            for _ in range(20):
                self.ann.say(command)
            for _ in range(20):
                self.assertTrue(self.ann.line().startswith(b"* "))
        self.assertLess(self.server.work()[1] - before, 8.0)  # seconds; it was 15 for one of the first

    def test_commands_that_say_nothing_hold_up_nobody(self) -> None:
        background = Background()
        rounds = 40 if LONG else 10

        def flood(number: int, peer: Peer) -> None:
            with contextlib.suppress(OSError):
                while True:
                    peer.send(f"/nick n{number}\n" * 20)

        with contextlib.ExitStack() as stack:
            server = stack.enter_context(Server())  # whose end leaves unread what the others' server would work through
            ann, bob = stack.enter_context(server.peer()), stack.enter_context(server.peer())
            for number in range(10):
                background.run(flood, number, stack.enter_context(server.peer()))
            begun = time.monotonic()
            for number in range(rounds):
                ann.say(str(number))
                bob.wait_for(ann.label, str(number))
            took = time.monotonic() - begun
        background.join()
        self.assertLess(took, 2 * rounds)  # seconds: more if each command kept the others from running

    def test_many_renames_are_relayed_together(self) -> None:
        """A typist among fifty that change their names all the time is heard, and a stop takes no time."""
        background = Background()

        def flood(number: int, peer: Peer) -> None:
            with contextlib.suppress(OSError):
                while True:
                    peer.send(f"/nick a{number}\n/nick b{number}\n" * 100)

        def read(peer: Peer) -> None:
            with contextlib.suppress(OSError):
                while peer.socket.recv(1 << 20):
                    pass

        with contextlib.ExitStack() as stack:
            server = stack.enter_context(Server())
            ann, bob = stack.enter_context(server.peer()), stack.enter_context(server.peer())
            for number in range(50):
                peer = stack.enter_context(server.peer())
                background.run(flood, number, peer)
                background.run(read, peer)
            for number in range(10):
                ann.say(str(number))
                bob.wait_for(ann.label, str(number))
            self.assertEqual(server.stop(), 0)
        background.join()


class Crowded(TestCase):
    def test_who_takes_names_among_many_does_not_pay_for_telling_them_all(self) -> None:
        """A send takes 2 ms of a processor here, so that twenty listeners are a crowd."""
        busy_sends = (
            "import socket, time\n"
            "send = socket.socket.sendmsg\n"
            "def sendmsg(*arguments):\n"
            "    end = time.thread_time() + 0.002\n"
            "    while time.thread_time() < end: pass\n"
            "    return send(*arguments)\n"
            "socket.socket.sendmsg = sendmsg"
        )
        with Server("--quiet", setup=busy_sends) as server, contextlib.ExitStack() as stack:
            ann, *others = (stack.enter_context(server.peer()) for _ in range(21))
            begun = time.monotonic()
            for number in range(40):
                ann.say(str(number))
                others[-1].wait_for(ann.label, str(number))
            renaming = time.monotonic()
            for number in range(40):
                ann.say(f"/nick ann{number}")
            ann.say("here I am")
            others[-1].wait_for("ann39", "here I am")
            self.assertLess(time.monotonic() - renaming, 10 * (renaming - begun))  # it would be 50 times as long


class Private(People):
    def test_a_private_word_is_for_one_alone(self) -> None:
        self.name(self.ann, "ann")
        self.name(self.bob, "bob")
        third = self.peer()
        self.ann.say("/msg bob  a word ")
        self.bob.expect("* ann to you: a word ")
        self.ann.expect("* to bob: a word ")
        self.bob.say("/r and  back")
        self.ann.expect("* bob to you: and  back")
        self.bob.expect("* to ann: and  back")
        self.ann.say(f"/msg {third.label} you too")
        third.expect("* ann to you: you too")
        self.ann.expect(f"* to {third.label}: you too")
        self.silent(third, self.bob)

    def test_an_answer_goes_to_the_person_whatever_the_name(self) -> None:
        self.name(self.ann, "ann")
        self.ann.say(f"/msg {self.bob.label} Hi!")
        self.bob.expect("* ann to you: Hi!")
        self.ann.expect(f"* to {self.bob.label}: Hi!")
        self.name(self.ann, "anna")
        third = self.peer()
        third.say("/nick ann")
        for peer in (self.ann, self.bob):
            peer.expect(f"* {third.label} is now ann")
        third.expect(f"* {third.label} is now ann")
        self.bob.say("/r you?")
        self.ann.expect(f"* {self.bob.label} to you: you?")
        self.bob.expect("* to anna: you?")
        self.ann.say("exit")
        self.ann.expect_end()
        self.server.expect(f"* {third.label} is now ann", "Connection closed")
        self.bob.say("/r you?")
        self.bob.expect("* who wrote to you has left")

    def test_refusals(self) -> None:
        for said, answer in (
            ("/msg bob Hi!", "* nobody here is called 'bob'"),
            ("/msg bob@paris Hi!", "* nobody here is called 'bob@paris'"),
            ("/msg bob", "* usage: /msg NAME TEXT"),
            ("/msg", "* usage: /msg NAME TEXT"),
            ("/r", "* usage: /r TEXT"),
            ("/r Hi!", "* nobody has written to you privately"),
            ("/mgs bob Hi!", "* unknown command '/mgs': /help lists them, // sends a line that starts with /"),
            (
                f"/{'x' * 100}",
                f"* unknown command '/{'x' * 39}…': /help lists them, // sends a line that starts with /",
            ),
        ):
            with self.subTest(said=said):
                self.ann.say(said)
                self.ann.expect(answer)
        self.silent(self.bob, self.ann)

    def test_a_word_to_one_who_leaves_at_that_moment_harms_nobody(self) -> None:
        for _ in range(50):
            with Peer("127.0.0.1", self.server.port) as guest:
                guest.say("/who")
                guest.line()
                guest.say("exit")
                self.ann.say(f"/msg {guest.label} bye")
                guest.read_to_end()
        self.ann.say("/who")
        while not (line := self.ann.line().decode()).startswith("* 2 here"):
            self.assertRegex(line, r"^\* (nobody here is called '\d+'|to \d+: bye|\d here: .*)$")
            self.ann.say("/who")

    def test_help_and_quit(self) -> None:
        self.ann.say("/help")
        self.ann.expect(*(f"* {usage}: {meaning}" for usage, meaning, _ in COMMANDS.values()))
        self.ann.send("/quit now\nbye\n/quit\nnot said\n")
        self.ann.expect("* usage: /quit")
        self.bob.expect(f"{self.ann.label}:bye")
        self.ann.expect_end()
        self.server.expect(f"{self.ann.label}:bye", "Connection closed")

    def test_a_slash_can_be_said(self) -> None:
        self.ann.send("//nick ann\n/etc/hosts\n//x/y\n/\n")
        self.bob.expect(*(f"{self.ann.label}:{text}" for text in ("/nick ann", "/etc/hosts", "//x/y", "/")))


class Announce(People):
    options = ("--announce",)

    def setUp(self) -> None:
        SharedServerTestCase.setUp(self)
        self.ann, self.bob = self.two_announced()

    def test_comings_and_goings_are_told_to_the_others(self) -> None:
        third = self.peer()
        third.expect(f"* 3 here: {self.ann.label}, {self.bob.label}, {third.label} (you)")
        third.send("/nick carol\nbye\nexit\n")
        for peer in (self.ann, self.bob):
            peer.expect("* carol joined", "carol:bye", "* carol left")
        self.server.expect(f"* {third.label} is now carol", "carol:bye", "Connection closed")

    def test_who_says_nothing_is_told_of_after_a_second_and_renamed_from_then_on(self) -> None:
        third = self.peer()
        self.ann.expect(f"* {third.label} joined")
        third.say("/nick carol")
        self.ann.expect(f"* {third.label} is now carol")

    def test_who_leaves_before_the_others_are_told_of_it_is_not_told_of(self) -> None:
        third = self.peer()
        third.send("/nick carol\nexit\n")
        third.read_to_end()
        self.ann.say("/who")
        self.ann.expect(f"* 2 here: {self.ann.label} (you), {self.bob.label}")


class Newcomers(TestCase):
    def test_who_comes_meanwhile_hears_of_a_newcomer_when_all_do_and_by_its_name_then(self) -> None:
        for said, told in ("/nick carol", "* carol joined"), ("exit", None):
            with Server("--announce", constants={"NAME_SECONDS": SECONDS}) as server, server.peer() as ann:
                ann.expect(f"* 1 here: {ann.label} (you)")
                with server.peer() as bob:
                    ann.say(said)
                    server.expect(f"* {ann.label} is now carol" if told else "Connection closed")
                    bob.expect(f"* 1 here: {bob.label} (you)", *([told] if told else []))
                    bob.say("/x")
                    bob.expect("* unknown command '/x': /help lists them, // sends a line that starts with /")


class Welcome(TestCase):
    def test_a_newcomer_is_welcomed_before_anything_else(self) -> None:
        """The text is cleaned, and one line."""
        options = ("--welcome", " Be kind:\n\x1b[2J no\tspoilers ", "--announce", "--history", "9")
        welcome = "* Be kind: \ufffd[2J no spoilers"
        with Server(*options) as server, server.peer() as ann:
            ann.expect(welcome, f"* 1 here: {ann.label} (you)")
            ann.say("Hi!")
            server.expect(f"{ann.label}:Hi!")
            with server.peer() as bob:
                bob.expect(welcome, f"* 2 here: {ann.label}, {bob.label} (you)", "* the last line:")
                ann.expect(f"* {bob.label} joined")

    def test_who_is_turned_away_is_not_welcomed(self) -> None:
        with Server("--welcome", "Hi", "--max-clients", "1") as server, server.peer() as ann:
            ann.expect("* Hi")
            with server.connect("127.0.0.1") as bob:
                self.assertEqual(bob.read_to_end(), b"* refused: server full: 1 of 1 clients\n")

    def test_what_means_something_else_to_a_client_is_no_welcome(self) -> None:
        for text in ("", " ", "refused: go away", " refused:\tgo", "password?"):
            with mock.patch.object(sys, "stderr", io.StringIO()) as errors, self.assertRaises(SystemExit):
                parse_args(["--welcome", text])
            self.assertIn("argument --welcome: invalid welcome value", errors.getvalue())


# Every notice that a person can get of the server, with what stands for the changing parts.
NOTICES = (
    LINE_TOO_LONG,
    "* refused: server stopping",
    "* refused: server full: 1 of 1 clients",
    "* refused: too many from your address: 3 of 3 clients",
    "* refused: too many are waiting to enter",
    "* refused: wrong password",
    "* refused: no password within 30 s",
    "* refused: this server speaks TLS: join with mychatclient.py --tls",
    "* password?",
    "* password accepted",
    "* wrong password",
    "* 12345 lines not shown",
    "* the last 3 lines:",
    "* the last line:",
    "* live from here",
    "* 54358 is now ann",
    "* 54358 joined",
    "* ann left",
    "* ann was kicked",
    "* refused: kicked",
    "* refused: kicked: enough",
    "* refused: banned",
    "* Be kind.",
    "* name 'ann' is taken",
    "* not a name: '1': it must begin with a letter",
    "* 3 here: 54358, ann (you), bob",
    "* ann to you: text",
    "* to bob: text",
    "* 06:23",
    "* nobody here is called 'bob'",
    "* bob has much to read yet: say it again later",
    "* who wrote to you has left",
    "* private words stay on one server: 'ann@paris' is on another",
    "* link to the other servers lost",
    "* link restored",
    "* 12345 lines not sent to the other servers",
    "* 12345 lines from the other servers not shown",
    "* nobody has written to you privately",
    "* unknown command '/mgs': /help lists them, // sends a line that starts with /",
    *(f"* usage: {usage}" for usage, _, _ in COMMANDS.values()),
    *(f"* {usage}: {meaning}" for usage, meaning, _ in COMMANDS.values()),
)


class Forging(People):
    def test_the_list_is_complete(self) -> None:
        source = pathlib.Path(SERVER).read_text()
        for text in re.findall(r'f?"(\* [^"]*)"', source.replace('"* {gone}"', "")):
            pattern = ".*".join(re.escape(part) for part in re.split(r"\{[^{}]*\}", text.replace("\\n", "")))
            self.assertTrue(any(re.fullmatch(pattern, notice) for notice in NOTICES), text)

    def test_nobody_can_write_a_line_that_looks_like_a_notice(self) -> None:
        """Whatever is said, by whatever cuts, it comes behind a label; a name cannot make one either."""
        self.name(self.ann, "ann")
        ways = [way for notice in NOTICES for way in (notice, f"\r{notice}", f"\0{notice}", f"\u2028{notice}")]
        self.ann.send("".join(f"{way}\n" for way in ways))
        for _ in ways:
            self.assertTrue(self.bob.line().startswith(b"ann:"))
        for notice in NOTICES:
            half = len(notice) // 2
            self.ann.send(notice[:half])
            self.ann.send(f"{notice[half:]}\n")
            self.bob.expect(f"ann:{notice}")
            self.ann.say(f"/nick {notice}")
            self.assertTrue(self.ann.line().startswith(b"* not a name: "))
            self.ann.say(f"/msg {self.bob.label} {notice}")
            self.bob.expect(f"* ann to you: {notice}")
            self.ann.expect(f"* to {self.bob.label}: {notice}")
