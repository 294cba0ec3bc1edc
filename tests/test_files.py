"""The project as files: what stands where, that each program works alone, and that one install gives both."""

from __future__ import annotations

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import mychatclient
import mychatserver
from tests.support import LOOPBACK, ROOT, SECONDS, Program, TestCase

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


PAGES = {page: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *(ROOT / ".github").glob("*.md"))}


def section(title: str) -> str:
    """Return what stands under a heading of README.md."""
    (text,) = re.findall(rf"(?ms)^## {title}\n(.*?)(?=^## |\Z)", PAGES[ROOT / "README.md"])
    return str(text)


class Pages(TestCase):
    """What README.md and the pages that it leads to say, as far as the code and the files tell it, too."""

    def test_the_licence_is_the_readmes_last_line(self) -> None:
        self.assertRegex(PAGES[ROOT / "README.md"].splitlines()[-1], r"\bMIT\b")

    def test_the_tables_have_every_option_and_no_other(self) -> None:
        _, *texts = re.split("(?m)^## ", PAGES[ROOT / ".github" / "options.md"])
        for module, text in zip(MODULES, texts):
            told = set(re.findall(r"(?m)^\| `(--[^`]*)` ", text))
            command = [sys.executable, str(ROOT / f"{module}.py"), "--help"]
            environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
            shown = subprocess.run(command, env=environment, capture_output=True, timeout=SECONDS, check=True).stdout
            options = set(re.findall(r"(?m)^  (--\S+(?: \S+)?)", shown.decode()))
            self.assertEqual(options - told, set(), f"{module}: not in the table")
            self.assertEqual(told - options, set(), f"{module}: not in --help")

    def test_every_notice_and_every_refusal_has_an_example(self) -> None:
        examples = re.findall("`([^`\n]+)`", section("The wire"))
        source = (ROOT / "mychatserver.py").read_text(encoding="utf-8")
        notices = re.findall(r'"(\* [^"\n]*?)(?:\\n)?"', source)
        self.assertGreater(len(notices), 20)
        for text in (*notices, *re.findall(r'Refused\(f?"([^"\n]*)"', source), mychatserver.CROWDED):
            pattern = re.sub(r"\\\{.*?\\\}", ".*", re.escape(text))
            self.assertTrue([one for one in examples if re.fullmatch(pattern, one)], text)

    def test_what_is_named_for_readers_of_the_code_exists(self) -> None:
        names = re.findall(
            r"`([A-Z]\w*\._?\w+|[a-z_]+|[A-Z_]+)`", section("Read it in class") + section("Carry on the work")
        )
        for name in names:
            objects: list[object] = [mychatserver, mychatclient]
            for part in name.split("."):
                objects = [getattr(one, part) for one in objects if hasattr(one, part)]
            self.assertTrue(objects, name)
        (pattern,) = re.findall("unittest -k ([a-z_]+)", section("Read it in class"))
        tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
        self.assertRegex(tests, rf"def test_\w*{pattern}")

    def test_every_link_leads_somewhere(self) -> None:
        for page, text in PAGES.items():
            for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
                path, _, anchor = target.partition("#")
                found = (page.parent / path).resolve() if path else page
                self.assertTrue(found.exists(), f"{page.name}: {target}")
                if anchor:
                    headings = re.findall("(?m)^#+ (.*)", PAGES[found])
                    anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
                    self.assertIn(anchor, anchors, f"{page.name}: {target}")
