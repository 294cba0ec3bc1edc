"""The tests' own way of running in several processes: what is found there is found, whatever becomes of them."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile

import tests

from .support import Program, TestCase, eventually

OUTCOMES = """
import os, signal, sys, time, unittest

class Outcomes(unittest.TestCase):
    @classmethod
    def tearDownClass(cls):
        print("torn down", file=sys.stderr)
    def test_error(self):
        "Says more."
        raise ValueError("this is wrong")
    def test_failure(self):
        self.assertEqual(1, 2)
    @unittest.expectedFailure
    def test_expected(self):
        self.fail()
    @unittest.expectedFailure
    def test_unexpected(self):
        pass
    def test_success(self):
        pass
    @unittest.skip("needs more time")
    def test_skip(self):
        pass
    def test_parts(self):
        for part in 1, 2:
            with self.subTest(part=part):
                self.assertEqual(part, 2)

class Set(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        raise ValueError("not set up")
    def test(self):
        pass

class Dead(unittest.TestCase):
    def test(self):
        print("last words", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGKILL)

class Waiting(unittest.TestCase):
    def test(self):
        print("waiting", os.getpid(), flush=True)
        time.sleep(60)
"""


class Running(TestCase):
    def run_tests(self, *arguments: str) -> Program:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        package = pathlib.Path(folder.name, "tests")
        package.mkdir()
        (package / "__init__.py").write_bytes(pathlib.Path(tests.__file__).read_bytes())
        (package / "test_outcomes.py").write_text(OUTCOMES)
        places = "--start-directory", folder.name, "--top-level-directory", folder.name
        return Program(sys.executable, "-m", "unittest", "discover", *places, *arguments, errors=subprocess.STDOUT)

    def test_whatever_becomes_of_a_test_is_told_and_counted(self) -> None:
        with self.run_tests("-v", "-k", "Outcomes", "-k", "Set", "-k", "Dead") as program:
            self.assertEqual(program.wait(), 1)
        for text in (
            r"torn down\n",
            r"test_success \(\S+\) \.\.\. ok\n",
            r"test_failure \(\S+\) \.\.\. FAIL\n",
            r"test_skip \(\S+\) \.\.\. skipped 'needs more time'\n",
            r"\nERROR: test_error \(\S+\)\nSays more\.\n-+\nTraceback[^=]*\nValueError: this is wrong\n",
            r"\nFAIL: test_failure \(\S+\)\n-+\nTraceback[^=]*\nAssertionError: 1 != 2\n",
            r"\nFAIL: test_parts \(\S+\) \(part=1\)\n",
            r"\nERROR: setUpClass \(tests\.test_outcomes\.Set\)\n-+\nTraceback[^=]*\nValueError: not set up\n",
            r"last words\ntests\.test_outcomes\.Dead \.\.\. ERROR\n",
            r"\nERROR: tests\.test_outcomes\.Dead\n-+\nThe process that ran its tests ended with status 9\.\n",
            r"\nRan [67] tests in ",  # Python 3.12.1 does not count what is skipped
            r"\nFAILED \(failures=2, errors=3, skipped=1, expected failures=1, unexpected successes=1\)\n",
        ):
            self.assertRegex(program.output.decode(), text)

    def test_ctrl_c_ends_all_processes(self) -> None:
        with self.run_tests("-k", "Waiting", "-k", "success") as program:
            process = int(eventually(lambda: re.search(rb"waiting (\d+)\n", program.output))[1])
            status = pathlib.Path(f"/proc/{program.process.pid}/status")
            eventually(lambda: "sleeping" in status.read_text())  # has started all, and waits for them
            program.process.send_signal(signal.SIGINT)
            self.assertNotEqual(program.wait(), 0)
            self.assertIn(b"KeyboardInterrupt", program.output)
            self.assertRaises(ProcessLookupError, os.kill, process, 0)
