"""The wire, on a real server: what peers of all kinds send, and what the others get."""

from __future__ import annotations

import sys
import unittest

from mychatserver import clean, parse
from tests.support import LOOPBACK, Peer, SharedServerTestCase, as_heard, numbered_lines
from tests.test_lines import STREAM, reference_lines

TOO_LONG = "* line too long: 65536 bytes at most, this line was not sent"
LONGEST = 65_536


class WireTestCase(SharedServerTestCase):
    """Two peers in a server."""

    def setUp(self) -> None:
        super().setUp()
        self.ann, self.bob = self.peer(), self.peer()

    def hears(self, sent: str | bytes | list[bytes], *lines: str) -> None:
        """Fail unless bob gets these lines of ann's, and nothing else, and ann nothing."""
        for piece in sent if isinstance(sent, list) else [sent]:
            self.ann.send(piece)
        self.bob.expect(*(f"{self.ann.label}:{line}" for line in lines))
        self.fence(self.ann, self.bob)

    def fence(self, *listeners: Peer) -> None:
        """Fail unless they have nothing unread: what a third one says must be next."""
        with self.server.peer() as third:
            third.say("fence")
            for listener in listeners:
                listener.expect(f"{third.label}:fence")


class Wire(WireTestCase):
    def test_each_line_of_one_packet_is_labelled(self) -> None:
        self.hears(b"one\ntwo\nthree\n", "one", "two", "three")

    def test_all_line_ends(self) -> None:
        self.hears(b"a\nb\r\nc\r\0d\re\n", "a", "b", "c", "d\ufffde")

    def test_however_the_bytes_are_cut_the_same_lines_come(self) -> None:
        """Every cut in two, and one byte a packet, each from a sender of its own."""
        stream = b"first\n" + STREAM.replace(b"exit \r\n", b"")  # nobody leaves before the end
        [(expected, _)] = parse(clean(b"".join(line + b"\n" for line in reference_lines(stream))))
        for cut in [*range(1, len(stream)), None]:
            with self.server.peer() as sender:
                pieces = [stream[:cut], stream[cut:]] if cut else [bytes([byte]) for byte in stream]
                for piece in pieces:
                    sender.send(piece)
                sender.half_close()
                self.bob.expect(*as_heard(sender.label, expected).split(b"\n")[:-1])
                sender.expect_end()

    def test_a_last_line_without_newline_is_relayed_at_end_of_file(self) -> None:
        self.ann.send("one\ntwo")
        self.ann.half_close()
        self.bob.expect(f"{self.ann.label}:one", f"{self.ann.label}:two")
        self.ann.expect_end()

    def test_a_reset_in_mid_line_relays_only_whole_lines(self) -> None:
        self.ann.send("one\ntwo")
        self.bob.expect(f"{self.ann.label}:one")
        self.ann.reset()
        self.server.expect(f"{self.ann.label}:one", "Connection closed")
        self.fence(self.bob)

    def test_blank_lines_are_not_relayed_and_blanks_are_kept(self) -> None:
        self.hears(b"\n\r\n \t \nHello! \n\tx\n", "Hello! ", "\tx")

    def test_exit_between_other_lines(self) -> None:
        self.ann.send("before\n \texit \nafter\n")
        self.bob.expect(f"{self.ann.label}:before")
        self.ann.expect_end()
        self.fence(self.bob)

    def test_the_longest_line_goes_and_a_longer_one_is_told_of_once(self) -> None:
        self.hears(b"x" * LONGEST + b"\n", "x" * LONGEST)
        self.ann.send(b"y" * (LONGEST + 1))
        self.ann.expect(TOO_LONG)  # at once, before its end
        self.hears(b"y" * LONGEST + b"\nnext\n", "next")

    def test_a_line_of_100_mb_costs_no_memory_and_is_told_of_once(self) -> None:
        self.hears(b"first\n", "first")
        before = self.server.memory()
        block = b"x" * 1_000_000
        for _ in range(100):
            self.ann.send(block)
        self.ann.expect(TOO_LONG)
        self.hears(b"\nnext\n", "next")
        self.assertLess(self.server.memory() - before, 10_000_000)

    def test_ill_formed_text_and_forbidden_characters_arrive_as_replacements(self) -> None:
        self.hears(b"\x1b[2J\xc3(\x07\xe2\x80\xae\xc2\x85\xe2\x82\n", "\ufffd[2J\ufffd(\ufffd\ufffd\ufffd\ufffd")

    def test_telnets_sequences_are_dropped_and_its_ctrl_c_leaves_the_rest(self) -> None:
        self.hears([b"\xff\xfd", b"\x03one\r", b"\n\xff\xf4\xff", b"\xfd\x06two\r\0"], "one", "two")

    def test_a_tls_hello_is_closed_at_once_and_nothing_is_relayed(self) -> None:
        for pieces in ([b"\x16\x03\x01\x02\0\n\n\n"], [b"\x16", b"\x03\x01\n"]):
            with self.server.peer() as peer:
                for piece in pieces:
                    peer.send(piece)
                peer.expect_end()
        self.fence(self.ann, self.bob)

    def test_nobody_can_forge_a_label_or_a_notice(self) -> None:
        """Whatever is sent, in whatever packets, each line that others get starts with its sender's own label."""
        bob = self.bob.label
        texts = [f"{before}{bob}:hi" for before in ("", "\r", "\r\n", "a\x85", "a\u2028", "a\x0b", "\x1b[1G", "\x1e")]
        texts += [f"{before}* a notice" for before in ("", "\0\n", "a\r\0", "\ufeff", "\u200b")]
        for text in texts:
            self.ann.send(f"{text}\n")
            for character in f"{text}\n":
                self.ann.send(character)
        self.ann.say("last")
        prefix = self.ann.label.encode() + b":"
        line = b""
        while line != prefix + b"last":
            line = self.bob.line()
            self.assertTrue(line.startswith(prefix), line)
            for code in (b"\r", b"\x1b", b"\0", b"\x0b", "\x85".encode(), "\u2028".encode()):
                self.assertNotIn(code, line)

    @unittest.skipUnless(sys.platform == "linux", "needs Linux: 127.0.0.2 is an address there")
    def test_the_same_port_from_two_hosts(self) -> None:
        port = self.ann.address[1]
        with Peer(LOOPBACK, self.server.port, source=("127.0.0.2", port)) as twin:
            self.server.expect(f"New connection from : ('127.0.0.2', {port})")
            twin.say("I am the second")
            self.bob.expect(f"{port}-2:I am the second")
            self.ann.expect(f"{port}-2:I am the second")
            self.hears(b"I am the first\n", "I am the first")
            twin.expect(f"{port}:I am the first")

    def test_who_half_closes_gets_what_was_queued(self) -> None:
        """A pipe's end: everything said before is relayed, everything queued is delivered, then it is closed."""
        lines = numbered_lines(5_000)
        self.bob.send(lines)
        self.bob.half_close()
        for number in range(5_000):
            self.assertTrue(self.ann.line().startswith(f"{self.bob.label}:{number}.".encode()))
        self.bob.expect_end()


class Silence(WireTestCase):
    """Of a peer that has never sent a newline."""

    constants = {"SILENCE_SECONDS": 0.2}

    def let_silence_pass(self) -> None:
        """Return when a home-made client's line has come, which takes as long as silence that ends a line."""
        with self.server.peer() as home_made:
            home_made.send("it is silent")
            for listener in (self.ann, self.bob):
                listener.expect(f"{home_made.label}:it is silent")

    def test_a_home_made_client_that_sends_no_newline(self) -> None:
        """Each of its messages is a line after the silence; its exit leaves."""
        self.ann.send("hello there")
        self.bob.expect(f"{self.ann.label}:hello there")
        self.ann.send("how are you")
        self.bob.expect(f"{self.ann.label}:how are you")
        self.ann.send("exit")
        self.ann.expect_end()
        self.fence(self.bob)

    def test_a_line_typed_a_character_a_packet_stays_whole(self) -> None:
        """Even with pauses longer than the silence that ends other lines: another's lines take that long to come."""
        for character in "hé!":
            self.ann.send(character)
            self.let_silence_pass()
        self.hears(b"\r\n", "hé!")

    def test_who_has_sent_a_newline_is_never_cut_by_silence(self) -> None:
        self.hears(b"one\n", "one")
        self.ann.send("two, ")
        self.let_silence_pass()
        self.hears(b"whole\n", "two, whole")
