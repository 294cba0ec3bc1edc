"""The room's threads in bad orders: many short rounds, in which what can happen at once does happen at once.

The server's locks make its threads change places at random. Each round ends at rest, when all that was said has been
heard: so a block that nobody takes along, or a thread that nobody wakes, shows as a wait without an end.
"""

from __future__ import annotations

import contextlib
import re

from tests.support import LONG, LOOPBACK, SMALL_BUFFERS, Background, Listener, Peer, Server, TestCase, numbered_lines

MORE = 10 if LONG else 1  # times the rounds
# Run first in the server: each of its locks lets other threads go on before it is taken, and when it is released.
YIELDING_LOCKS = """
import random, threading, time

class Lock:
    def __init__(self, make=threading.Lock):
        self._lock = make()
        self.locked = self._lock.locked

    def acquire(self, *how):
        self._yield()
        return self._lock.acquire(*how)

    def release(self):
        self._lock.release()
        self._yield()

    def __enter__(self):
        self.acquire()

    def __exit__(self, *_):
        self.release()

    def _yield(self):
        if random.random() < 0.3:
            time.sleep(random.random() / 10_000)

threading.Lock = Lock
"""
HEADING = re.compile(rb"\* (the last .*|live from here|\d\d:\d\d)")  # of the history that a newcomer is told


class Interleavings(TestCase):
    def peers(self, count: int, *options: str) -> tuple[Server, list[Peer]]:
        """Return a server that changes threads at any moment, and so many peers in its room."""
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        server = stack.enter_context(Server("--quiet", *options, setup=YIELDING_LOCKS + SMALL_BUFFERS))
        return server, [stack.enter_context(server.peer()) for _ in range(count)]

    def check(self, whole: list[bytes], said: dict[Peer, list[bytes]], heard: dict[Peer, list[bytes]]) -> None:
        """Fail unless ``whole``, which a listener has heard, is all that was said, and others have all but theirs."""
        self.assertEqual(len(whole), sum(map(len, said.values())))
        for speaker, lines in said.items():
            label = f"{speaker.label}:".encode()
            self.assertEqual([line for line in whole if line.startswith(label)], [label + line for line in lines])
        for peer, lines in heard.items():
            self.assertEqual(lines, [line for line in whole if not line.startswith(f"{peer.label}:".encode())])

    def talk(self, talkers: list[Peer], number: int) -> dict[Peer, list[bytes]]:
        """Have all talk at once, a line, then two for some, then a line for some of them; return what each has said."""
        said: dict[Peer, list[bytes]] = {talker: [] for talker in talkers}
        for block in range(3):
            for place, talker in enumerate(talkers):
                if (number + place) % 3 >= block:
                    lines = [b"%d.%d.%d" % (number, block, line) for line in range(1 + block % 2)]
                    said[talker] += lines
                    talker.send(b"".join(line + b"\n" for line in lines))
        return said

    def test_whatever_is_said_at_once_nobody_is_left_waiting_for_it(self) -> None:
        """Nor for another word that would take it along."""
        for count in (3, 6):
            _, (listener, *talkers) = self.peers(count + 1)
            for number in range(500 * MORE):
                said = self.talk(talkers, number)
                total = sum(map(len, said.values()))
                whole = [listener.line() for _ in range(total)]
                self.check(whole, said, {peer: [peer.line() for _ in range(total - len(said[peer]))] for peer in said})

    def test_who_comes_has_each_line_once_and_the_last_line_of_who_goes_is_heard(self) -> None:
        """The one was told of before or is heard since; the other has heard the first of what was said meanwhile."""
        server, (listener, *peers) = self.peers(8, "--history", "1000")
        talkers, guests = peers[:3], peers[3:]
        whole: list[bytes] = []  # since the start
        for number in range(200 * MORE):
            leaver, comer, before = guests.pop(0), Peer(LOOPBACK, server.port), len(whole)
            self.addCleanup(comer.close)
            said = self.talk(talkers[:1], number)
            leaver.send([b"last", b"last\nexit\nnever\n", b"exit\n"][number % 3])
            leaver.half_close()
            said.update(self.talk(talkers[1:], number))
            comer.say("here")
            said.update({leaver: [[b"last"], [b"last"], []][number % 3], comer: [b"here"]})
            whole += [listener.line() for _ in range(sum(map(len, said.values())))]
            new = whole[before:]
            heard = {
                peer: [peer.line() for _ in range(len(new) - len(said.get(peer, [])))] for peer in talkers + guests
            }
            self.check(new, said, heard)
            left_with, own = leaver.read_to_end().splitlines(), f"{leaver.label}:".encode()
            self.assertEqual(left_with, [line for line in new if not line.startswith(own)][: len(left_with)])
            leaver.close()
            whole.append(f"{talkers[0].label}:end {number}".encode())
            talkers[0].say(f"end {number}")
            for peer in (listener, *talkers[1:], *guests):
                peer.expect(whole[-1])
            told = [comer.line()]
            while told[-1] != whole[-1]:
                told.append(comer.line())
            told = [line for line in told if not HEADING.fullmatch(line)]
            self.assertGreaterEqual(len(told), min(before, 1_000))
            own = f"{comer.label}:".encode()
            # Its port may have been another's before.
            heard_since = [line for line in whole[before:] if not line.startswith(own)]
            self.assertEqual(told, (whole[:before] + heard_since)[-len(told) :])
            guests.append(comer)

    def test_words_renames_and_private_words_of_one_come_in_its_order(self) -> None:
        _, (target, *talkers) = self.peers(6)
        target.say("/nick target")
        for peer in (target, *talkers):
            peer.expect(f"* {target.label} is now target")
        for place, talker in enumerate(talkers):
            talker.say(f"/nick p{place}-0")
            for peer in (target, *talkers):
                peer.expect(f"* {talker.label} is now p{place}-0")
        background = Background()
        for talker in talkers:
            background.run(talker.ignore)
        for number in range(100 * MORE):
            for place, talker in enumerate(talkers):
                talker.send(f"a\n/nick p{place}-{number + 1}\nb\n/msg target psst\nc\n/who\nd\n")
            heard = [target.line().decode() for _ in range(6 * len(talkers))]
            for place in range(len(talkers)):
                old, new = f"p{place}-{number}", f"p{place}-{number + 1}"
                own = [line for line in heard if old in line or new in line]
                renamed, told = f"* {old} is now {new}", f"* {new} to you: psst"
                self.assertEqual(own, [f"{old}:a", renamed, f"{new}:b", told, f"{new}:c", f"{new}:d"])
        for talker in talkers:
            talker.say("exit")
        background.join()

    def test_who_is_slow_has_all_wait_and_go_on_when_it_reads_or_leaves(self) -> None:
        server, (listener, *talkers) = self.peers(4)
        slow = server.peer(receive_buffer=4_096)
        self.addCleanup(slow.close)
        lines = numbered_lines(8_000)
        for number in range(15 * MORE):
            background = Background()
            expected = sum(len(talker.label) + 101 for talker in talkers) * 8_000
            heard = Listener(listener, background, expected)
            for talker in talkers:
                Listener(talker, background, expected - (len(talker.label) + 101) * 8_000)
                background.run(talker.send, lines)
            heard.wait_for(1_500_000)  # of 2.5 MB: then the slow one is so far behind that all who talk must wait
            if number % 3:
                slowly_heard = Listener(slow, background, expected)
                background.join()
                self.assertEqual((heard.count, slowly_heard.digest()), (expected, heard.digest()))
            else:
                (slow.reset() if number % 2 else slow.say("exit"))
                background.join()
                slow.close()
                slow = server.peer(receive_buffer=4_096)
                self.addCleanup(slow.close)
