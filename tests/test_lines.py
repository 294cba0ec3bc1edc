"""Lines, without sockets: however the bytes are cut, the same lines come out, and none can harm a screen."""

from __future__ import annotations

import inspect
import random
import re
import sys
import tracemalloc
import unittest
from unittest import mock

import mychatclient
import mychatserver
from mychatserver import MAX_LINE_BYTES, clean, labelled, parse
from tests.support import LONG, new_framer

STREAM = (
    b"plain\n\r\nwindows\r\ntelnet\r\0lone\rreturn\r\r\ntwo\r\r\0 \t \n\xff\xfd\x03option\n\xff\xf4\xff\xfd\x06ctrl-c\n"
    b"cut \xff\xfb\nhere\nill\xc3(formed\n\xe2\x82\xac \xf0\x9f\x98\x80\n\x1b[31mred\x1b[0m\n"
    b"  exit\x0b\nexit \r\n\tlast\r"
)


def lines_of(pieces: list[bytes]) -> list[bytes]:
    """Return the lines that the server's framer finds, the unfinished last one too."""
    framer = new_framer()
    blocks = [framer.feed(piece)[0] for piece in pieces] + [framer.rest()]
    return b"".join(blocks).split(b"\n")[:-1]


def reference_lines(stream: bytes) -> list[bytes]:
    """Return the lines of a whole stream: the rule, as plainly as it can be said."""
    lines = re.split(b"\r?\n|\r\0", stream)
    return lines if lines[-1] else lines[:-1]


class Framing(unittest.TestCase):
    def test_every_cut_in_two_gives_the_same_lines(self) -> None:
        for cut in range(len(STREAM) + 1):
            with self.subTest(cut=cut):
                self.assertEqual(lines_of([STREAM[:cut], STREAM[cut:]]), reference_lines(STREAM))

    def test_one_byte_a_piece_gives_the_same_lines(self) -> None:
        self.assertEqual(lines_of([bytes([byte]) for byte in STREAM]), reference_lines(STREAM))

    def test_random_bytes_cut_at_random_give_the_same_lines(self) -> None:
        for seed in range(3_000 if LONG else 300):
            dice = random.Random(seed)
            stream = bytes(dice.choice(b"\r\n\0\xff\xfbab") for _ in range(60))
            cuts = sorted(dice.randrange(61) for _ in range(dice.randrange(12)))
            pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, 60])]
            with self.subTest(seed=seed):
                self.assertEqual(lines_of(pieces), reference_lines(stream))

    def test_a_line_of_the_limit_goes_and_a_longer_one_does_not(self) -> None:
        for length, end in ((MAX_LINE_BYTES, b"\n"), (MAX_LINE_BYTES, b"\r\n"), (MAX_LINE_BYTES + 1, b"\n")):
            for cut in (1, 1000, MAX_LINE_BYTES - 1, MAX_LINE_BYTES):
                with self.subTest(length=length, end=end, cut=cut):
                    framer = new_framer()
                    stream = b"x" * length + end + b"next\n"
                    results = [framer.feed(stream[:cut])]
                    results += [
                        framer.feed(stream[start : start + MAX_LINE_BYTES])
                        for start in range(cut, len(stream), MAX_LINE_BYTES)
                    ]
                    block = b"".join(block for block, _ in results)
                    told = sum(too_long for _, too_long in results)
                    if length > MAX_LINE_BYTES:
                        self.assertEqual((block, told), (b"next\n", 1))
                    else:
                        self.assertEqual((block, told), (b"x" * length + b"\nnext\n", 0))

    def test_an_endless_line_is_told_of_once_and_nothing_of_it_comes(self) -> None:
        framer = new_framer()
        told = 0
        for _ in range(100):
            block, too_long = framer.feed(b"x" * MAX_LINE_BYTES)
            self.assertEqual(block, b"")
            told += too_long
        self.assertEqual(told, 1)
        framer.feed(b"x\r")
        self.assertEqual(framer.rest(), b"")

    def test_silence_ends_a_line_only_of_who_never_sends_newlines_and_not_of_who_types(self) -> None:
        for pieces, ends in (
            ([b"hello"], True),
            (["é".encode()], False),
            (["éé".encode()], True),
            ([b"h", b"i"], False),
            ([b"\xff\xfd\x03", b"h"], False),
            ([b"one\n", b"hello"], False),
            ([b"x" * MAX_LINE_BYTES, b"xx"], True),
        ):
            with self.subTest(pieces=[piece[:8] for piece in pieces]):
                framer = new_framer()
                for piece in pieces:
                    framer.feed(piece)
                self.assertEqual(framer.ends_by_silence, ends)
                framer.rest()
                self.assertFalse(framer.ends_by_silence)

    def test_what_silence_has_ended_does_not_come_again(self) -> None:
        framer = new_framer()
        for piece in (b"one\r", b"two\r"):
            framer.feed(piece)
            self.assertEqual(framer.rest(), piece + b"\n")


class Cleaning(unittest.TestCase):
    def test_each_forbidden_character_becomes_one_replacement_and_every_other_passes(self) -> None:
        forbidden = {*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
        forbidden -= {ord("\t"), ord("\n")}
        # Surrogates are no characters; newlines end lines.
        codes = [code for code in range(sys.maxunicode + 1) if not (0xD800 <= code < 0xE000 or code == ord("\n"))]
        at_once = 1 if LONG else 256
        wrong = []
        for start in range(0, len(codes), at_once):
            some = codes[start : start + at_once]
            lines = clean("".join(f"a{chr(code)}b\n" for code in some).encode()).decode().split("\n")
            expected = [f"a{chr(0xFFFD if code in forbidden else code)}b" for code in some]
            wrong += [code for code, line, right in zip(some, lines, expected) if line != right]
        self.assertEqual(wrong, [])

    def test_ill_formed_sequences_are_counted_as_decoding_counts_them(self) -> None:
        for text in (
            b"\xc3(",
            b"\xe2\x82",
            b"\xf0\x9f\x98",
            b"\xed\xa0\x80",
            b"\xc0\xaf",
            b"\xf8\x88\x80\x80\x80",
            b"\x80\x81",
        ):
            with self.subTest(text=text):
                self.assertEqual(
                    clean(b"a" + text + b"b\n"), (b"a" + text + b"b\n").decode("utf-8", "replace").encode()
                )

    def test_telnets_sequences_are_dropped_and_any_other_ff_is_ill_formed(self) -> None:
        for text, expected in (
            (b"\xff\xf4\xff\xfd\x06text", "text"),
            (b"\xff\xfb\x01te\xff\xfc\x7fxt\xff\xf0", "text"),
            (b"\xff\xfftext", "\ufffd\ufffdtext"),
            (b"\xfftext", "\ufffdtext"),
            (b"\xff\xfb\x80", "\ufffd\ufffd\ufffd"),
            (b"\xff\xef", "\ufffd\ufffd"),
            (b"text\xff\xfb", "text\ufffd\ufffd"),
        ):
            with self.subTest(text=text):
                self.assertEqual(clean(text + b"\n"), f"{expected}\n".encode())

    def test_clean_text_passes_unchanged(self) -> None:
        text = "tab\there é ü 漢字 😀 עברית e\u0301 a\u200db\n".encode()
        self.assertEqual(clean(text), text)

    def test_cleaning_twice_changes_nothing_more_and_grows_threefold_at_most(self) -> None:
        dice = random.Random(1)
        for _ in range(300):
            block = bytes(dice.choice(b"\xff\xfb\xf4\xe2\x80\xa8\xae\x1b[a\r\0\x7f") for _ in range(40)) + b"\n"
            once = clean(block)
            self.assertEqual(clean(once), once)
            self.assertLessEqual(len(once), 3 * len(block))

    def test_server_and_client_clean_alike(self) -> None:
        for name in ("PLAIN", "TELNET", "FORBIDDEN"):
            self.assertEqual(getattr(mychatserver, name), getattr(mychatclient, name))
        self.assertEqual(inspect.getsource(mychatserver.clean), inspect.getsource(mychatclient.clean))


class Speaking(unittest.TestCase):
    def test_blank_lines_are_not_spoken_and_exit_ends(self) -> None:
        for block, lines, command in (
            (b"a\nb\n", b"a\nb\n", ""),
            (b"\n \t\na\n\n  b \n", b"a\n  b \n", ""),
            (b"a\nexit\nb\n", b"a\n", "/quit"),
            (b" \texit\t \n", b"", "/quit"),
            (b"exit\n", b"", "/quit"),
            (b"a\nExit\nb\n", b"a\n", "/quit"),
            (b"exiting\nexit now\nan exit\nexit.\n", b"exiting\nexit now\nan exit\nexit.\n", ""),
            (b"a\n  exit\n", b"a\n", "/quit"),
        ):
            with self.subTest(block=block):
                self.assertEqual([part for part in parse(block) if any(part)], [(lines, command)])

    def test_commands_and_what_only_looks_like_one(self) -> None:
        text = b"/etc/hosts\n/\n / nick\n//\n//x/y\n///nick\n/1 a\n"
        self.assertEqual(list(parse(text)), [(text, "")])
        self.assertEqual(list(parse(b"//nick ann\n//a\n//a\tb\n")), [(b"/nick ann\n/a\n/a\tb\n", "")])
        self.assertEqual(
            list(parse(b"a\n/nick ann\nb\n \t/Who\n/msg x\ty \n/msg: x\nexit\n/who\n")),
            [(b"a\n", "/nick ann"), (b"b\n", "/Who"), (b"", "/msg x\ty "), (b"", "/msg: x"), (b"", "/quit")],
        )

    def test_only_space_and_tab_are_blanks(self) -> None:
        for blank in "\x0b\x0c\x1c\x85\xa0\u2003\u3000":
            block = clean(f"{blank}\n{blank}exit\n{blank}/who\n".encode())
            self.assertEqual(list(parse(block)), [(block, "")])

    def test_who_waits_to_say_the_first_of_a_block_keeps_little_besides(self) -> None:
        """A thousand may have to, for a minute; a block as a list of its lines takes five times its bytes."""
        for line in (b"//a \x80\n", b"/who\n", b"exitx\n", b" x\n", b"\n", b"x\b\n", b"\xe4\xb8\xad\n", b"x\n"):
            with self.subTest(line=line):
                block = line * (65_536 // len(line))
                waiting = parse(block)
                tracemalloc.start()
                next(waiting)
                kept, _ = tracemalloc.get_traced_memory()
                tracemalloc.stop()
                self.assertLess(kept, 2.5 * len(block))

    def test_each_line_is_labelled(self) -> None:
        self.assertEqual(labelled("54358", b"a\n\tb\n"), b"54358:a\n54358:\tb\n")

    def test_lines_from_another_server_have_their_labels(self) -> None:
        self.assertEqual(labelled("", b"ann@a:x\nbob@a:y\n"), b"ann@a:x\nbob@a:y\n")


class Piping(unittest.TestCase):
    """The client's scan of its standard input for ``exit``."""

    def pass_through(self, pieces: list[bytes]) -> tuple[bytes, bool]:
        """Return what ``piped`` yields of these pieces, and whether it saw ``exit``."""
        with mock.patch("os.read", side_effect=[*pieces, b""]):
            passed = list(mychatclient.piped())
        return b"".join(data for data, _ in passed), bool(passed) and passed[-1][1]

    def test_exit_is_found_however_the_input_is_cut(self) -> None:
        for stream, passed, leaves in (
            (b"one\n \texit \ntwo\n", b"one\n \texit \n", True),
            (b"one\r\nexit\r\ntwo\r\n", b"one\r\nexit\r\n", True),
            (b"exiting\nan exit\nexit now\n", b"exiting\nan exit\nexit now\n", False),
            (b"one\nexit", b"one\nexit", False),
        ):
            for cut in range(len(stream) + 1):
                with self.subTest(stream=stream, cut=cut):
                    pieces = [piece for piece in (stream[:cut], stream[cut:]) if piece]
                    self.assertEqual(self.pass_through(pieces), (passed, leaves))

    def test_a_long_line_is_no_exit(self) -> None:
        stream = [b"x" * 300, b"exit\n"]
        self.assertEqual(self.pass_through(stream), (b"".join(stream), False))
