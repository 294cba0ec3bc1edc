"""The project as files: what stands where, that each program works alone, and that one install gives both."""

from __future__ import annotations

import ast
import pathlib
import re
import shutil
import sys
import tempfile

import mychatclient
import mychatserver
from tests.support import LOOPBACK, ROOT, Program, TestCase

OPTIONAL = {"nats", "nkeys", "prompt_toolkit"}  # used where it is installed
MODULES = ("mychatserver", "mychatclient")


class Files(TestCase):
    def test_nothing_else_stands_at_the_top(self) -> None:
        allowed = {"mychatserver.py", "mychatclient.py", "tests", "README.md", "pyproject.toml", "build", "__pycache__"}
        ignored = (ROOT / ".gitignore").read_text().split()  # what people make here as the README tells
        for path in ROOT.iterdir():
            if not (path.name.startswith(".") or any(path.match(pattern) for pattern in ignored)):
                self.assertIn(path.name, allowed)

    def test_one_version(self) -> None:
        self.assertEqual(mychatserver.__version__, mychatclient.__version__)
        self.assertIn('attr = "mychatserver.__version__"', (ROOT / "pyproject.toml").read_text())

    def test_the_licence_is_the_readmes_last_line(self) -> None:
        self.assertRegex((ROOT / "README.md").read_text().splitlines()[-1], r"\bMIT\b")

    def test_the_readme_names_every_option(self) -> None:
        readme = (ROOT / "README.md").read_text()
        for module in MODULES:
            options = re.findall(r'"(--[a-z-]+)"', (ROOT / f"{module}.py").read_text())
            self.assertEqual([option for option in options if option not in readme], [])

    def test_only_the_standard_library_is_imported_and_neither_imports_the_other(self) -> None:
        for module in MODULES:
            for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                for name in names:
                    self.assertNotIn(name, MODULES)
                    if sys.version_info >= (3, 10):
                        self.assertIn(name.partition(".")[0], {*sys.stdlib_module_names, *OPTIONAL})

    def test_each_program_works_copied_alone_to_another_folder(self) -> None:
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            server = shutil.copy(ROOT / "mychatserver.py", one)
            client = shutil.copy(ROOT / "mychatclient.py", other)
            with Program(sys.executable, "-I", server, "--port", "0") as serving:
                port = serving.line().rpartition(":")[2]
                with Program(sys.executable, "-I", client, LOOPBACK, port, keep_input=True) as talking:
                    talking.expect("Connected to chat server. Type 'exit' to leave.")
                    serving.line()
                    talking.send(b"Hi!\n")
                    talking.end_input()
                    self.assertEqual(talking.wait(), 0)
                    self.assertTrue(serving.line().endswith(":Hi!"))
                    serving.expect("Connection closed")
            self.assertEqual([path.name for path in pathlib.Path(one).iterdir()], ["mychatserver.py"])
