"""Tests on real processes, sockets and pseudo-terminals; run with ``python -m unittest`` from the project's root.

They wait for programs most of the time. So what ``python -m unittest`` finds is run by several processes at once: each
is forked from this one for a class of tests, and its findings are added to this one's result when it ends.
Tests that are named on the command line run in this process, as usual, and so do all where the system cannot fork.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import traceback
import unittest
from collections.abc import Iterator
from typing import IO, Any

AT_ONCE = 3 * (os.cpu_count() or 1)
FINDINGS = "failures", "errors", "skipped", "expectedFailures", "unexpectedSuccesses", "collectedDurations"

# The tests start programs as users do, who have no such variables: PYTHONUNBUFFERED would hide what nobody flushes.
for name in [name for name in os.environ if name.startswith("PYTHON") and name not in ("PYTHONHOME", "PYTHONPATH")]:
    del os.environ[name]

# A shell's background job ignores Ctrl-C, and under nohup a hang-up: so would the programs that the tests start.
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGQUIT", signal.SIG_DFL), ("SIGHUP", signal.SIG_DFL)):
    number = getattr(signal, name, None)  # Windows has only the first
    if number and signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)


def load_tests(loader: unittest.TestLoader, _: unittest.TestSuite, pattern: str | None) -> unittest.TestSuite:
    """Return the tests of this folder; unittest calls this in the place of a search of its own."""
    folder = os.path.dirname(__file__)
    return Parallel([loader.discover(folder, pattern or "test*.py", os.path.dirname(folder))])


class Parallel(unittest.TestSuite):
    """Tests of which each class runs in a process of its own, those with the most tests first."""

    def run(self, result: Any, debug: bool = False) -> Any:
        classes: dict[type, unittest.TestSuite] = {}
        for test in tests_of(self):
            classes.setdefault(type(test), unittest.TestSuite()).addTest(test)
        if len(classes) < 2 or not hasattr(os, "fork") or not isinstance(result, unittest.TextTestResult):
            return super().run(result, debug)
        waiting = sorted(classes.items(), key=lambda item: item[1].countTestCases())
        running: dict[int, tuple[type, IO[bytes], IO[bytes]]] = {}
        try:
            while running or (waiting and not result.shouldStop):
                while waiting and len(running) < AT_ONCE and not result.shouldStop:
                    tested, suite = waiting.pop()
                    shown, found = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - add_findings does
                    sys.stdout.flush()  # or the fork would write this text, too
                    process = os.fork()
                    if not process:
                        run_and_exit(suite, result, shown, found)
                    running[process] = tested, shown, found
                process, status = os.wait()
                add_findings(result, status, *running.pop(process))
        finally:
            for process in running:  # Ctrl-C
                os.kill(process, signal.SIGINT)
                os.waitpid(process, 0)
        return result


def tests_of(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from tests_of(test)
        else:
            yield test


class Elsewhere(str):
    """The description of a test that ran in another process: what this one's result has in the test's place."""

    def shortDescription(self) -> None:
        """Add nothing to the description."""


def run_and_exit(suite: unittest.TestSuite, result: Any, shown: IO[bytes], found: IO[bytes]) -> None:
    """Run tests in a process that ends with them; leave in two files what it shows and what it finds."""

    def portable(finding: Any) -> Any:
        if isinstance(finding, tuple):
            return portable(finding[0]), finding[1]
        return finding if isinstance(finding, str) else Elsewhere(result.getDescription(finding))

    status = 1
    try:
        os.dup2(shown.fileno(), sys.stderr.fileno())
        vars(result).update(testsRun=0, _testRunEntered=False, **{name: [] for name in FINDINGS})
        suite.run(result)  # with what sets up and ends its class and module, as no other run has been entered
        findings = {name: [portable(finding) for finding in getattr(result, name)] for name in FINDINGS}
        pickle.dump((result.testsRun, result.shouldStop, findings), found)
        found.flush()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def add_findings(result: Any, status: int, tested: type, shown: IO[bytes], found: IO[bytes]) -> None:
    """Add what a process has shown and found to the result of this one, or that it died."""
    with shown, found:
        shown.seek(0)
        found.seek(0)
        result.stream.write(shown.read().decode(errors="replace"))
        if status:
            name = f"{tested.__module__}.{tested.__qualname__}"
            result.stream.write(f"{name} ... ERROR\n")
            result.errors.append((Elsewhere(name), f"The process that ran its tests ended with status {status}.\n"))
            return
        count, stop, findings = pickle.load(found)
        result.testsRun += count
        for name, values in findings.items():
            vars(result).setdefault(name, []).extend(values)
        result.shouldStop |= stop
