"""Everything that guests and machines do wrong, at random and all at once; well-behaved clients must not notice.

One round; for a minute of them, in which memory has to stay flat, MYCHAT_LONG=1. MYCHAT_FAULT_SEED brings back what a
failure has printed, as far as threads allow.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import unittest
from collections.abc import Callable

from tests.support import CLIENT, LONG, LOOPBACK, PYTHON, SECONDS, Background, Peer, Server, TestCase, eventually

FAULT_SECONDS = 60.0 if LONG else 0.0  # but one round at least
ROUND_SECONDS = 3.0 if LONG else 1.0
RUDE = 190  # guests at a time, and the well-behaved:
TALKERS = 9
DESCRIPTORS = 150  # that the server may have, fewer than there are guests
FLAT = 1_000  # bytes of memory a guest may leave, at most


class Friend:
    """A well-behaved client: reads all the time what its friends say, and says numbered lines."""

    def __init__(self, peer: Peer, dice: random.Random) -> None:
        self.peer = peer
        self._dice = dice
        self.said: list[bytes] = []
        self.heard: list[bytes] = []

    def talk(self, until: float, number: int) -> None:
        while time.monotonic() < until:
            self.say(f"line {len(self.said)} " + "." * self._dice.randrange(100))
            time.sleep(self._dice.uniform(0, 0.03))  # the pace of someone who types fast
        self.say(f"end of round {number}")

    def say(self, line: str) -> None:
        self.said.append(f"{self.peer.label}:{line}".encode())
        self.peer.say(line)

    def listen(self, labels: set[bytes]) -> None:
        """Keep what friends say, until the server closes."""
        with contextlib.suppress(AssertionError):  # which is how a peer tells of the end
            while True:
                line = self.peer.line()
                if line.partition(b":")[0] in labels:
                    self.heard.append(line)


def rude(port: int, dice: random.Random, until: float, count: Callable[[], None]) -> None:
    """Come, do something wrong, and go, again and again."""
    while time.monotonic() < until:
        with contextlib.suppress(OSError, AssertionError):  # whatever the server thinks of it
            if dice.random() < 0.01:
                vanish(port, dice)
                continue
            small = dice.choice((0, 2_304))
            with Peer(LOOPBACK, port, receive_buffer=small) as peer:
                count()
                peer.socket.settimeout(2)
                dice.choice(WAYS)(peer, dice)
                if dice.random() < 0.3:
                    peer.reset()


def talk(peer: Peer, dice: random.Random) -> None:
    for _ in range(dice.randrange(10)):
        peer.say("words " * dice.randrange(20))
        peer.line()


def flood(peer: Peer, dice: random.Random) -> None:
    peer.send(b"flood\n" * 60_000)


def stall(peer: Peer, dice: random.Random) -> None:
    peer.say("and now I look away")
    time.sleep(dice.uniform(0, ROUND_SECONDS))  # that is the fault


def crawl(peer: Peer, dice: random.Random) -> None:
    for _ in range(200 if LONG else 100):
        peer.socket.recv(1)
        time.sleep(0.01)  # that is the fault


def half_close(peer: Peer, dice: random.Random) -> None:
    peer.send("one\ntwo")
    peer.half_close()
    peer.ignore()


def cut(peer: Peer, dice: random.Random) -> None:
    peer.send("half a li")
    peer.reset()


def garbage(peer: Peer, dice: random.Random) -> None:
    peer.send(dice.choice((b"", b"\x16\x03\x01", b"\xff\xfd\x03", b"GET / HTTP/1.1\r\n\r\n")) + dice.randbytes(5_000))


def long_line(peer: Peer, dice: random.Random) -> None:
    peer.send(b"x" * 200_000)


def rename(peer: Peer, dice: random.Random) -> None:
    for _ in range(dice.randrange(100)):
        peer.say(dice.choice((f"/nick n{dice.randrange(50)}", "/who", "/msg n1 psst", "/r yes", "/help", "/x")))


def leave(peer: Peer, dice: random.Random) -> None:
    peer.send("bye\nexit\nnot said\n")
    peer.ignore()


def vanish(port: int, dice: random.Random) -> None:
    """Be a program that is killed."""
    command = [*PYTHON, CLIENT, LOOPBACK, str(port)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as program:
        assert program.stdin
        program.stdin.write(b"I was here\nand n")
        program.stdin.flush()
        time.sleep(dice.uniform(0, 0.3))  # at any moment
        program.kill()


WAYS = talk, flood, stall, crawl, half_close, cut, garbage, long_line, rename, leave


def growth(memory: list[tuple[int, int]]) -> float:
    """Return the slope over the last half of the rounds, in bytes a guest; 0 where they are too few to tell."""
    if len(memory) < 6:
        return 0.0
    half = memory[len(memory) // 2 :]
    mean_guests = statistics.fmean(guests for guests, _ in half)
    mean_size = statistics.fmean(size for _, size in half)
    rise = sum((guests - mean_guests) * (size - mean_size) for guests, size in half)
    return rise / sum((guests - mean_guests) ** 2 for guests, _ in half)  # least squares


@unittest.skipUnless(sys.platform == "linux", "needs Linux: what it tells of a process")
class Faults(TestCase):
    def test_the_well_behaved_notice_nothing(self) -> None:
        """Each has every line of every other, in one order; nothing is left over, and memory stays flat."""
        seed = int(os.environ.get("MYCHAT_FAULT_SEED", random.randrange(1 << 32)))
        with self.subTest(MYCHAT_FAULT_SEED=seed):
            self.go_wrong(seed)

    def go_wrong(self, seed: int) -> None:
        dice = random.Random(seed)
        # A disk that is full, for the log; fewer descriptors than there are guests. One arena for all threads: with one
        # for each few, memory rises for dozens of rounds until each has had its share of the largest need.
        limited = ("sh", "-c", f'ulimit -n {DESCRIPTORS}; MALLOC_ARENA_MAX=1 exec "$@"', "sh")
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(Server("--log", "/dev/full", "--history", "100", prefix=limited))
            eventually(lambda: server.threads() == 5)  # main, the server's, three writers
            empty = server.threads(), server.descriptors()
            friends = [Friend(stack.enter_context(server.peer()), random.Random(seed + n)) for n in range(TALKERS + 1)]
            talkers = friends[:-1]  # one only listens
            labels = {friend.peer.label.encode() for friend in talkers}
            full = empty[0] + len(friends), empty[1] + len(friends)
            came = 0
            memory: list[tuple[int, int]] = []  # a round: guests so far, bytes

            def count() -> None:
                nonlocal came
                came += 1

            listening = Background()
            for friend in friends:
                listening.run(friend.listen, labels)
            number, end = 0, time.monotonic() + FAULT_SECONDS
            latest = end + 2 * FAULT_SECONDS  # while memory grows: what grows by chance comes to rest
            while not number or time.monotonic() < (latest if growth(memory) >= FLAT else end):
                number += 1
                background = Background()
                until = time.monotonic() + ROUND_SECONDS
                for friend in talkers:
                    background.run(friend.talk, until, number)
                for _ in range(RUDE):
                    background.run(rude, server.port, random.Random(dice.random()), until, count)
                self.disturb(server, dice, until)
                background.join(2 * SECONDS)
                eventually(lambda: self.all_is_heard(friends), "not all is heard")
                eventually(lambda: (server.threads(), server.descriptors()) == full, "something is left over")
                memory.append((came, server.memory()))
            self.check(friends)
            self.assertLess(growth(memory), FLAT, f"{came} guests, MB: {[size // 1_000_000 for _, size in memory]}")
            for friend in friends:
                friend.peer.say("exit")
            listening.join()
            eventually(lambda: (server.threads(), server.descriptors()) == empty, "something is left over at the end")
            self.assertEqual(server.stop(), 0)

    def disturb(self, server: Server, dice: random.Random, until: float) -> None:
        """Stop the server's process or its output for a while, now and then."""
        while time.monotonic() < until:
            time.sleep(dice.uniform(0, 1))  # at any moment
            if dice.random() < 0.5:
                server.process.send_signal(signal.SIGSTOP)
                time.sleep(dice.uniform(0, 0.5))
                server.process.send_signal(signal.SIGCONT)
            else:
                server.reading.clear()
                time.sleep(dice.uniform(0, 1))
                server.reading.set()

    def all_is_heard(self, friends: list[Friend]) -> bool:
        said = sum(len(friend.said) for friend in friends)
        return all(len(friend.heard) >= said - len(friend.said) for friend in friends)

    def check(self, friends: list[Friend]) -> None:
        *talkers, listener = friends
        self.assertEqual(len(listener.heard), sum(len(friend.said) for friend in talkers))
        for friend in talkers:
            own = friend.peer.label.encode() + b":"
            self.assertEqual([line for line in listener.heard if line.startswith(own)], friend.said)
            self.assertEqual(friend.heard, [line for line in listener.heard if not line.startswith(own)])
