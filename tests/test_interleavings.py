"""The room's threads in every order: one thread at a time runs, up to the next lock, in all orders that there are.

"All" are those with PREEMPTIONS at most; switches where a thread has to wait are free. Known bugs, put back by hand,
show that such a search finds what goes wrong in one order of many.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any

import mychatserver
from tests.support import SECONDS, TestCase

PREEMPTIONS = 1  # of threads that could go on; with 2 it takes 25 s instead of 4, and found nothing more


class Deadlock(AssertionError):
    """Every thread that is left waits for another."""


class Threads:
    """Runs functions as threads of which one goes on at a time; at each step a list of choices tells which."""

    def __init__(self, choices: list[int]) -> None:
        self._choices = choices
        self.taken: list[tuple[int, int]] = []  # at each step: the choice, and of how many
        self._preemptions = 0
        self._waiting: dict[threading.Thread, Callable[[], bool]] = {}  # until when; all that are not at an end
        self._turns: dict[threading.Thread, threading.Semaphore] = {}
        self._over = threading.Event()
        self.problem: BaseException | None = None

    def run(self, *functions: Callable[[], None]) -> None:
        """Run all functions to their end; raise what went wrong in one of them, or Deadlock."""
        for function in functions:
            thread = threading.Thread(target=self._run, args=(function,), daemon=True)
            self._waiting[thread] = lambda: True
            self._turns[thread] = threading.Semaphore(0)
        for thread in self._turns:
            thread.start()
        self._pass_on(None)
        if not self._over.wait(SECONDS):
            raise Deadlock("a thread waits outside of what is looked at")
        if self.problem:
            raise self.problem

    def step(self, until: Callable[[], bool] = lambda: True) -> None:
        """Let others go on, or not; return when ``until`` is true and it is our turn again."""
        this = threading.current_thread()
        if this in self._turns:  # not the test itself, which prepares
            self._waiting[this] = until
            self._pass_on(this)
            self._turns[this].acquire()
            if self.problem:
                raise self.problem

    def _run(self, function: Callable[[], None]) -> None:
        this = threading.current_thread()
        self._turns[this].acquire()
        try:
            if not self.problem:
                function()
        except BaseException as problem:
            self.problem = self.problem or problem
        del self._waiting[this]
        self._pass_on(None)

    def _pass_on(self, this: threading.Thread | None) -> None:
        """Choose who goes on: this one, if it can, is the first choice, and any other is a preemption."""
        if self.problem or not self._waiting:
            self._end()
            return
        able = [thread for thread, until in self._waiting.items() if until()]
        if this in able:
            able.remove(this)
            able = [this, *able] if self._preemptions < PREEMPTIONS else [this]
        if not able:
            self.problem = Deadlock(f"{len(self._waiting)} threads wait for each other")
            self._end()
            return
        step = len(self.taken)
        choice = self._choices[step] if step < len(self._choices) else 0
        self.taken.append((choice, len(able)))
        self._preemptions += choice > 0 and able[0] is this
        self._turns[able[choice]].release()

    def _end(self) -> None:
        for turn in self._turns.values():
            turn.release()
        self._over.set()


class Lock:
    """A lock at which others may go on before it is taken, and after."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._taken = False

    def __enter__(self) -> None:
        self._threads.step(lambda: not self._taken)
        self._taken = True

    def __exit__(self, *_: object) -> None:
        self._taken = False
        self._threads.step()


class Condition:
    """What one thread waits for with a lock held."""

    def __init__(self, lock: Lock) -> None:
        self._lock = lock
        self._notified = False

    def wait(self) -> None:
        self._notified = False
        self._lock._taken = False
        self._lock._threads.step(lambda: self._notified and not self._lock._taken)
        self._lock._taken = True

    def notify(self) -> None:
        self._notified = True


class Console:
    """A console that shows nothing; others may go on meanwhile."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads

    def say(self, text: str) -> None:
        self._threads.step()


class Stage:
    """A room of a server's module, with clients whose connections take as much as the test lets them."""

    def __init__(self, module: Any, threads: Threads, history: int = 0) -> None:
        self.threads = threads
        self._module = module
        module.threading = types.SimpleNamespace(Lock=lambda: Lock(threads), Condition=Condition)
        self.room = module.Room(Console(threads), quiet=True, history=history)
        self._ports = itertools.count(1)
        self.clients: list[Any] = []
        self.behind: list[Any] = []  # clients whose backlog the server thread is to send
        self.busy = 0  # handlers that are not at their end

        class Client(module.Client):  # type: ignore[misc]
            takes = 1 << 30  # bytes that the socket still takes
            heard = b""

            def _send(self, pieces: list[memoryview]) -> int:
                data = b"".join(pieces)[: self.takes]
                self.takes -= len(data)
                self.heard += data
                return len(data)

            def _shut(self, how: int) -> None:
                pass

        self._client = Client

    def client(self, takes: int = 1 << 30) -> Any:
        """Return a client that is in the room."""
        client = self.newcomer(takes)
        self.room.join(client)
        return client

    def newcomer(self, takes: int = 1 << 30) -> Any:
        client = self._client(None, ("", next(self._ports)), self.behind.append)
        client.takes = takes
        self.clients.append(client)
        client._lock = contextlib.nullcontext()  # only one thread at a time runs, and there is no step inside
        return client

    def run(self, *handlers: Callable[[], None]) -> None:
        """Run handlers, and a server thread that sends on what had to wait."""
        self.busy = len(handlers)

        def handle(function: Callable[[], None]) -> None:
            function()
            self.busy -= 1

        def serve() -> None:
            while True:
                self.threads.step(lambda: bool(self.behind) or not self.busy)
                if not self.behind:
                    return
                client = self.behind.pop(0)
                client.takes = 1 << 30
                while client.flush():
                    pass
                self.room.is_late(client)

        server = (serve,) if any(client.takes < 1 << 20 for client in self.clients) else ()
        self.threads.run(*(lambda function=function: handle(function) for function in handlers), *server)


def says(stage: Stage, client: Any, *blocks: bytes) -> Callable[[], None]:
    def handler() -> None:
        for block in blocks:
            stage.room.relay(client, block)

    return handler


def leaves_after(stage: Stage, client: Any, block: bytes) -> Callable[[], None]:
    def handler() -> None:
        stage.room.relay(client, block)
        stage.room.leave(client)

    return handler


def lines_of(*clients: Any) -> set[bytes]:
    return {b"%d:" % client.address[1] for client in clients}


def check(listener: Any, talkers: Mapping[Any, tuple[bytes, ...]]) -> None:
    """Fail unless ``listener`` has all lines once, and each talker the same in the same order, but its own."""
    order = listener.heard.splitlines(keepends=True)
    for talker, blocks in talkers.items():
        label = b"%d:" % talker.address[1]
        own = [line for line in order if line.startswith(label)]
        if own != [label + line for block in blocks for line in block.splitlines(keepends=True)]:
            raise AssertionError(f"of {label!r} came {own}")
        others = b"".join(line for line in order if not line.startswith(label))
        if talker.heard != others:
            raise AssertionError(f"{label!r} heard {talker.heard!r}, not {others!r}")
    if sum(len(block.splitlines()) for blocks in talkers.values() for block in blocks) != len(order):
        raise AssertionError(f"too much came: {order}")


# What is tried in all orders: each gets a stage with its threads, and fails if something is wrong at the end.


def four_talk(stage: Stage) -> None:
    listener = stage.client()
    blocks = {stage.client(): (b"a\n",), stage.client(): (b"b\nc\n",), stage.client(): (b"d\n", b"e\n")}
    stage.run(*(says(stage, talker, *said) for talker, said in blocks.items()))
    check(listener, blocks)


def one_is_slow(stage: Stage) -> None:
    """One takes little at once, and gets late; another gets late and leaves; the others wait, and go on."""
    listener, slow = stage.client(), stage.client(takes=5)
    blocks = {stage.client(): (b"a" * 20 + b"\n", b"b" * 20 + b"\n"), stage.client(): (b"c" * 20 + b"\n",)}
    stage.run(*(says(stage, talker, *said) for talker, said in blocks.items()))
    check(listener, blocks)
    if slow.heard != listener.heard:
        raise AssertionError(f"the slow one heard {slow.heard!r}, not {listener.heard!r}")


def the_late_one_leaves(stage: Stage) -> None:
    """Nobody sends its backlog any more; the others must go on."""
    listener, stuck = stage.client(), stage.client(takes=5)
    talkers = {stage.client(): (b"a" * 20 + b"\n", b"b" * 20 + b"\n", b"c" * 20 + b"\n")}
    stuck._on_backlog = lambda _: None

    def leaves() -> None:
        stage.threads.step(lambda: stuck in stage.room._late)
        stage.room.leave(stuck)

    stage.run(*(says(stage, talker, *said) for talker, said in talkers.items()), leaves)
    check(listener, talkers)


def one_leaves(stage: Stage) -> None:
    listener = stage.client()
    leaver, talker = stage.client(), stage.client()
    stage.run(leaves_after(stage, leaver, b"last\n"), says(stage, talker, b"a\n", b"b\n"))
    order = listener.heard
    if sorted(order.splitlines()) != [b"2:last", b"3:a", b"3:b"] or not b"3:a\n3:b\n".startswith(leaver.heard):
        raise AssertionError(f"{order!r}, and who left heard {leaver.heard!r}")
    if stage.room._late or leaver in stage.room._members or leaver in stage.room._queued:
        raise AssertionError("something is left of who left")


def one_leaves_in_a_round(stage: Stage) -> None:
    """Others may go on between the members that a round is given to, too."""
    leaver, listener, talker = stage.client(), stage.client(), stage.client()
    give = leaver.give

    def give_and_let_go_on(pieces: list[memoryview]) -> int:
        behind: int = give(pieces)
        stage.threads.step()
        return behind

    leaver.give = give_and_let_go_on
    stage.run(says(stage, talker, b"a\n", b"b\n"), lambda: stage.room.leave(leaver))
    check(listener, {talker: (b"a\n", b"b\n")})


def one_comes(stage: Stage) -> None:
    """A newcomer has each line once: told of before, or heard since."""
    listener, newcomer = stage.client(), stage.newcomer()
    talkers = {stage.client(): (b"a\n",), stage.client(): (b"b\n",)}
    stage.run(*(says(stage, talker, *said) for talker, said in talkers.items()), lambda: stage.room.join(newcomer))
    check(listener, talkers)
    heard = b"".join(line for line in newcomer.heard.splitlines(keepends=True) if not line.startswith(b"* "))
    if heard != listener.heard:
        raise AssertionError(f"the newcomer has {newcomer.heard!r}, not {listener.heard!r}")


SCENES = four_talk, one_is_slow, the_late_one_leaves, one_leaves, one_leaves_in_a_round, one_comes
SMALL = {"LATE_BYTES": 16, "ON_TIME_BYTES": 8, "SHARE_MAX_BYTES": 24, "PORTION_MIN_BYTES": 1, "FLUSH_BYTES": 16}


def module_of(source: str) -> Any:
    """Return the server as a module of its own, with limits that few bytes pass."""
    module = types.ModuleType("mychatserver")
    exec(compile(source, "mychatserver.py", "exec"), module.__dict__)
    vars(module).update(SMALL)
    return module


def orders(module: Any, scene: Callable[[Stage], None]) -> int:
    """Play a scene in all orders; return how many there are; raise what goes wrong in one."""
    choices: list[int] = []
    for count in itertools.count(1):
        threads = Threads(choices)
        scene(Stage(module, threads, history=9 if scene is one_comes else 0))
        taken = threads.taken
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return count
        choices = [choice for choice, _ in taken[:-1]] + [taken[-1][0] + 1]
    raise AssertionError


# Bugs, some of which were there once: what is right, and what stands in its place then.
BUGS: dict[str, tuple[tuple[str, str], ...]] = {
    "the mark is cleared at the end of the turn, without the lock": (
        ("            self._turn_is_awaited = False\n            was_full", "            was_full"),
        ("            if self._turn_is_awaited or not self._queue:", "            if not self._queue:"),
        (
            "                    self._relay_queued()\n\n    def _put_down",
            "                    self._relay_queued()\n                self._turn_is_awaited = False\n\n"
            "    def _put_down",
        ),
    ),
    "lateness is not lifted on leaving": (
        ("        with self._queue_lock:\n            self._on_time(client)\n\n    def relay(", "\n    def relay("),
    ),
    "the queue is swapped without its lock": (
        (
            "            while self._queue and (not blocks or size >= len(self._queue[0][1])):\n",
            "            queue = collections.deque(self._queue)\n"
            "        with self._queue_lock:\n"
            "            self._queue.clear()\n"
            "            while queue:\n",
        ),
        ("client, block, to_all = self._queue.popleft()", "client, block, to_all = queue.popleft()"),
    ),
    "the rest of a short send is dropped": (
        ("if sent == size or self._state > OPEN:", "if sent or self._state > OPEN:"),
    ),
    "those who wait to put down are not woken": (
        (
            "                self._queued.remove(client)\n                self._wake(client)\n",
            "                self._queued.remove(client)\n",
        ),
    ),
    "somebody leaves in the middle of a round": (
        (
            "        with self._turn:\n            with self._queue_lock:\n                if not self._is_here",
            "        if True:\n            with self._queue_lock:\n                if not self._is_here",
        ),
    ),
    "somebody joins between taking the queue and giving it": (
        (
            "        with self._turn:\n            self._relay_queued()  # who has just",
            "        if True:\n            pass  # who has just",
        ),
    ),
}


class Interleavings(TestCase):
    def test_in_every_order_all_is_right(self) -> None:
        module = module_of(inspect.getsource(mychatserver))
        for scene in SCENES:
            with self.subTest(scene.__name__):
                self.assertGreater(orders(module, scene), 10)

    def test_each_known_bug_is_found(self) -> None:
        for name, changes in BUGS.items():
            with self.subTest(name):
                source = inspect.getsource(mychatserver)
                for right, wrong in changes:
                    self.assertEqual(source.count(right), 1, "what is to be changed is not there once")
                    source = source.replace(right, wrong)
                module = module_of(source)
                with self.assertRaises((AssertionError, KeyError)):
                    for scene in SCENES:
                        orders(module, scene)
