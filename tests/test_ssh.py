"""From the next town: through a real ssh to a real sshd on loopback, both with keys and settings of the test's own."""

from __future__ import annotations

import contextlib
import getpass
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Mapping
from unittest import mock

import mychatclient
from tests import test_reference
from tests.support import (
    CLIENT,
    LONG,
    LOOPBACK,
    NEEDS_IPV6,
    PYTHON,
    ROOT,
    SECONDS,
    Background,
    Program,
    Server,
    Terminal,
    TestCase,
    as_heard,
    command_of,
    eventually,
    free_port,
    home_made_server,
    needs_command,
    numbered_lines,
)
from tests.test_client import silent_port

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin") or ""
GREETING = "Connected to chat server. Type 'exit' to leave."
FAREWELL = "Disconnected from server"
QUESTION = "(yes/no/[fingerprint])? "
SHORT = {
    "SSH_REFUSAL_SECONDS": 0.1,
    "SSH_END_SECONDS": 0.2,
}  # what a client waits for ssh, and whether a server is there


class Machine(Program):
    """An sshd on loopback; ``ssh box`` reaches it, once ``environment`` is in force, and nothing of the user's own."""

    def __init__(self, folder: str, *settings: str, pass_phrase: str = "", prefix: tuple[str, ...] = ()) -> None:
        self.folder = pathlib.Path(folder)
        self.port = free_port()
        self.environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "SHELL": "/bin/sh"}
        for name, phrase in (("host", ""), ("other", ""), ("user", pass_phrase)):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", phrase, "-f", f"{folder}/{name}"]
            subprocess.run(command, check=True, timeout=SECONDS)
        self.authorize("user")
        self.trust("host")
        self.write(
            "sshd_config",
            f"Port {self.port}",
            f"ListenAddress {LOOPBACK}",
            f"HostKey {folder}/host",
            f"AuthorizedKeysFile {folder}/authorized",
            "StrictModes no",
            "UsePAM no",
            "PidFile none",
            *settings,
        )
        # What a user may have in there must not matter: a command, a shared connection.
        self.write(
            "ssh_config",
            f"HostName {LOOPBACK}",
            f"Port {self.port}",
            f"User {getpass.getuser()}",
            f"IdentityFile {folder}/user",
            "IdentitiesOnly yes",
            "IdentityAgent none",
            "PreferredAuthentications publickey",
            f"UserKnownHostsFile {folder}/known",
            "GlobalKnownHostsFile none",
            "StrictHostKeyChecking ask",
            "LocalCommand echo mine",
            f"ControlPath {folder}/shared",
            "ControlMaster auto",
        )
        self.write("bin/ssh", "#!/bin/sh", f'exec {shutil.which("ssh")} -F {folder}/ssh_config "$@"')
        (self.folder / "bin/ssh").chmod(0o755)
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)  # what an sshd of root's insists on; Debian makes it at boot
        super().__init__(SSHD, "-D", "-e", "-f", f"{folder}/sshd_config", prefix=prefix)
        try:
            eventually(lambda: "Server listening" in self.errors() or self.process.poll() is not None)
            if self.process.poll() is not None:
                raise AssertionError(self.errors())
        except BaseException:
            self.__exit__()
            raise

    def write(self, name: str, *lines: str) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))

    def authorize(self, key: str) -> None:
        """Have the machine let in who has this key."""
        self.write("authorized", (self.folder / f"{key}.pub").read_text())

    def trust(self, key: str) -> None:
        """Have ssh know the machine by this key, or not at all."""
        self.write("known", *([f"[{LOOPBACK}]:{self.port} {(self.folder / f'{key}.pub').read_text()}"] if key else []))


def ssh_of(client: Program | Terminal) -> int:
    """Return the process number of a client's ssh."""
    pid = client.process.pid
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    (child,) = children
    return int(child)


def is_there(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


@needs_command("ssh", "openssh-client")
@unittest.skipUnless(SSHD, "needs sshd: apt-get install openssh-server")
class ThroughSsh(TestCase):
    """A class whose tests share one machine; what they change of it they change back."""

    settings: tuple[str, ...] = ()
    pass_phrase = ""
    machine: Machine

    @classmethod
    def setUpClass(cls) -> None:
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        cls.machine = stack.enter_context(Machine(folder, *cls.settings, pass_phrase=cls.pass_phrase))
        stack.enter_context(mock.patch.dict(os.environ, cls.machine.environment))

    def client(self, *arguments: str, constants: Mapping[str, object] = SHORT) -> Program:
        return Program(*command_of(CLIENT, constants), "--ssh", "box", *arguments, keep_input=True)

    def in_terminal(self, *arguments: str) -> Terminal:
        return Terminal(*command_of(CLIENT, SHORT), "--ssh", "box", *arguments)

    def fails(self, *arguments: str, says: str = "", sentence: str) -> None:
        """Fail unless the client ends with status 1, ssh's words and then this sentence, before any greeting."""
        with self.client(*arguments, constants={}) as program:
            self.assertEqual(program.wait(), 1)
            self.assertEqual(program.output, b"")
            *before, last = program.errors().splitlines()
            self.assertIn(says, "\n".join(before))
            self.assertIn(sentence, last)
            self.assertNotIn("Connection lost", program.errors())


class Reference(test_reference.ReferenceConversation, ThroughSsh):
    constants = SHORT

    def test_the_reference_conversation(self) -> None:
        """All is the same to the letter: ssh adds nothing to any screen."""
        self.converse("--ssh", "box")


class Chat(ThroughSsh):
    def test_a_filter_sends_all_and_shows_what_still_comes(self) -> None:
        """End-of-file goes through, in both directions, and in between nothing is lost, however slow the server is."""
        lines = numbered_lines(100_000)

        def serve(connection: socket.socket) -> None:
            time.sleep(0.6)  # all buffers are full by then, and the client has waited longer than for anything else
            heard = bytearray()
            while data := connection.recv(1 << 16):
                heard += data
            self.assertTrue(heard == lines)
            connection.sendall(as_heard("1234", lines))

        impatient = {**SHORT, "LEAVE_SECONDS": 0.2}
        with home_made_server(serve) as port, self.client(LOOPBACK, str(port), constants=impatient) as program:
            program.expect(GREETING)
            ssh = ssh_of(program)
            program.send(lines)
            program.end_input()
            self.assertEqual(program.wait(), 0)
            shown = as_heard("1234", lines).replace(b"1234:", b"\n1234:")
            self.assertTrue(program.output == f"{GREETING}\n".encode() + shown + f"{FAREWELL}\n".encode())
            self.assertEqual(program.errors(), "")
            self.assertFalse(is_there(ssh))

    def test_the_host_is_seen_from_there_and_is_the_machine_itself_unless_given(self) -> None:
        with Server() as server, mock.patch.object(mychatclient, "DEFAULT_PORT", server.port):
            options = mychatclient.parse_args(["--ssh", "box"])
            self.assertEqual((options.host, options.port), (LOOPBACK, server.port))
            for host in (LOOPBACK, "localhost"):
                with self.client(host, str(server.port)) as program:
                    program.expect(GREETING)
                    self.assertRegex(server.line(), "^New connection from")
                    program.end_input()
                    self.assertEqual(program.wait(), 0)
                    server.expect("Connection closed")

    @NEEDS_IPV6
    def test_ipv6_there(self) -> None:
        with (
            socket.create_server(("::1", 0), family=socket.AF_INET6) as listener,
            self.client("[::1]", str(listener.getsockname()[1])) as program,
        ):
            listener.settimeout(SECONDS)
            connection, _ = listener.accept()
            with connection:
                program.expect(GREETING)

    def test_a_server_that_speaks_first_is_heard_whole(self) -> None:
        def serve(connection: socket.socket) -> None:
            connection.sendall(b"* welcome\n1:two\n")
            self.assertEqual(connection.recv(100), b"")

        with home_made_server(serve) as port, self.client(LOOPBACK, str(port)) as program:
            program.expect(GREETING, "", "* welcome", "", "1:two")
            program.end_input()
            self.assertEqual(program.wait(), 0)

    def test_the_servers_end(self) -> None:
        with Server() as server, self.in_terminal(LOOPBACK, str(server.port)) as terminal:
            terminal.wait_for(f"{GREETING}\n")
            server.stop()
            self.assertEqual(terminal.wait(), 1)
            self.assertRegex(terminal.screen(), rf"^{GREETING}\nConnection lost: [^\n]+\n{FAREWELL}\n$")
            self.assertEqual(terminal.attributes(), terminal.before)

    def test_ssh_killed_in_mid_chat(self) -> None:
        """One sentence, status 1, and the terminal as it was, half-typed line or not."""
        for number in (signal.SIGKILL, signal.SIGTERM):
            with (
                self.subTest(number=number),
                Server() as server,
                self.in_terminal(LOOPBACK, str(server.port)) as terminal,
            ):
                terminal.wait_for(f"{GREETING}\n")
                terminal.type("half a li")
                terminal.wait_for("half a li")
                os.kill(ssh_of(terminal), number)
                self.assertEqual(terminal.wait(), 1)
                self.assertRegex(terminal.screen(), rf"half a li\nConnection lost: [^\n]+\n{FAREWELL}\n$")
                self.assertEqual(terminal.attributes(), terminal.before)

    def test_ctrl_c_in_mid_chat(self) -> None:
        """As without ssh, which gets the signal too: status 130, the farewell, and no word of a lost connection."""
        for _ in range(5 if LONG else 1):
            with Server() as server, self.in_terminal(LOOPBACK, str(server.port)) as terminal:
                terminal.wait_for(f"{GREETING}\n")
                ssh = ssh_of(terminal)
                terminal.type("\x03")
                self.assertEqual(terminal.wait(), 130)
                self.assertEqual(terminal.screen(), f"{GREETING}\n{FAREWELL}\n")
                self.assertEqual(terminal.attributes(), terminal.before)
                self.assertFalse(is_there(ssh))

    def test_a_client_that_is_ended_takes_ssh_along(self) -> None:
        """By Ctrl-C for itself alone, by SIGTERM, and by what nobody can handle."""
        with Server() as server, contextlib.ExitStack() as stack:
            programs = [stack.enter_context(self.client(LOOPBACK, str(server.port))) for _ in range(3)]
            for program in programs:
                program.expect(GREETING)
            children = [ssh_of(program) for program in programs]
            for program, number in zip(programs, (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)):
                program.process.send_signal(number)
            for program in programs:
                program.wait()
            eventually(lambda: not any(map(is_there, children)))

    def test_a_login_shell_that_talks_or_runs_nothing_does_not_matter(self) -> None:
        for script in ("echo Welcome to my shell; exec /bin/sh", "exit 1;"):
            self.machine.write("shell", "#!/bin/sh", f'{script} "$@"')
            (self.machine.folder / "shell").chmod(0o755)
            shell = {"SHELL": str(self.machine.folder / "shell")}
            with (
                self.subTest(script=script),
                mock.patch.dict(os.environ, shell),
                Server() as server,
                self.client(LOOPBACK, str(server.port)) as program,
            ):
                program.expect(GREETING)
                program.end_input()
                self.assertEqual(program.wait(), 0)
                self.assertEqual(program.output.decode(), f"{GREETING}\n{FAREWELL}\n")

    def test_ssh_that_never_gets_through_is_not_waited_for_without_end(self) -> None:
        self.machine.write("stuck/ssh", "#!/bin/sh", "exec sleep 1000")
        (self.machine.folder / "stuck/ssh").chmod(0o755)
        script = "import sys, mychatclient as c; c.SSH_SECONDS = 0.5; sys.exit(c.main(sys.argv[1:]))"
        with (
            mock.patch.dict(
                os.environ, {"PYTHONPATH": str(ROOT), "PATH": f"{self.machine.folder}/stuck:/bin:/usr/bin"}
            ),
            Program(sys.executable, "-c", script, "--ssh", "box", keep_input=True) as program,
        ):
            self.assertEqual(program.wait(), 1)
            self.assertRegex(program.errors(), "^No connection to box: ")


class Asking(ThroughSsh):
    pass_phrase = "open sesame"

    def test_ssh_asks_its_questions_before_the_chat_starts(self) -> None:
        """A host key that is new, then the pass phrase, wrong and right; what is typed after that is chat."""
        self.machine.trust("")
        with Server() as server, self.in_terminal(LOOPBACK, str(server.port)) as terminal:
            terminal.wait_for(QUESTION)
            terminal.type("yes\n")
            prompt = f"\rEnter passphrase for key '{self.machine.folder}/user': "
            for phrase, asked in (("wrong", prompt), (self.pass_phrase, f"{prompt}\n{prompt}")):
                terminal.wait_for(asked)
                self.assertNotIn(GREETING, terminal.screen())
                terminal.type(f"{phrase}\n")
            terminal.wait_for(f"{GREETING}\n")
            self.assertRegex(server.line(), "^New connection from")
            terminal.type("Hi!\nexit\n")
            self.assertEqual(terminal.wait(), 0)
            self.assertTrue(terminal.screen().endswith(f"{GREETING}\nHi!\nexit\n{FAREWELL}\n"))
            self.assertTrue(server.line().endswith(":Hi!"))
            self.assertEqual(terminal.attributes(), terminal.before)

    def test_ctrl_c_while_ssh_asks(self) -> None:
        for known, prompt in (("", QUESTION), ("host", "': ")):
            self.machine.trust(known)
            with self.subTest(prompt=prompt), self.in_terminal() as terminal:
                terminal.wait_for(prompt)
                ssh = ssh_of(terminal)
                terminal.type("\x03")
                self.assertEqual(terminal.wait(), 130)
                self.assertNotIn("Traceback", terminal.screen())
                self.assertEqual(terminal.attributes(), terminal.before)
                self.assertFalse(is_there(ssh))

    def test_a_signal_to_the_client_alone_while_ssh_asks(self) -> None:
        """Then the client ends ssh, which leaves the terminal with its echo."""
        with self.in_terminal() as terminal:
            terminal.wait_for("': ")
            ssh = ssh_of(terminal)
            terminal.process.send_signal(signal.SIGINT)
            self.assertEqual(terminal.wait(), 130)
            self.assertEqual(terminal.attributes(), terminal.before)
            self.assertFalse(is_there(ssh))


class Trouble(ThroughSsh):
    def test_a_wrong_host_key(self) -> None:
        self.addCleanup(self.machine.trust, "host")
        self.machine.trust("other")
        self.fails(says="HOST IDENTIFICATION HAS CHANGED", sentence="No connection to box: ssh says why above; try ssh")

    def test_a_key_that_is_not_let_in(self) -> None:
        self.addCleanup(self.machine.authorize, "user")
        self.machine.authorize("other")
        self.fails(says="Permission denied (publickey", sentence="No connection to box: ssh says why above")

    def test_a_machine_that_does_not_answer(self) -> None:
        command = command_of(CLIENT, {"CONNECT_SECONDS": 1})
        with silent_port() as port, Program(*command, "--ssh", f"ssh://{LOOPBACK}:{port}") as program:
            self.assertEqual(program.wait(), 1)
            self.assertRegex(program.errors(), r"timed out\s+No connection to ssh://[^\n]*\n$")

    def test_no_server_there(self) -> None:
        port = free_port()
        self.fails(
            *(LOOPBACK, str(port)),
            says="Connection refused",
            sentence=f"No server at {LOOPBACK} port {port} of box: start mychatserver.py there, or give another port",
        )

    def test_no_ssh_here(self) -> None:
        with mock.patch.dict(os.environ, {"PATH": str(self.machine.folder)}):
            self.fails(sentence="Cannot run ssh here: No such file or directory; install the OpenSSH client.")

    def test_what_is_no_machine_is_none_of_the_options_of_ssh(self) -> None:
        """It would run the command that such an option names."""
        with tempfile.TemporaryDirectory() as folder:
            for target in (f"-oProxyCommand=touch {folder}/x", "-"):
                with self.subTest(target=target), Program(*PYTHON, CLIENT, f"--ssh={target}") as program:
                    self.assertEqual(program.wait(), 1)
                    self.assertIn(f"No connection to {target}: ssh says why above", program.errors())
            self.assertEqual(os.listdir(folder), [])


class Gone(ThroughSsh):
    def test_a_machine_that_cannot_be_reached(self) -> None:
        self.machine.process.terminate()
        self.machine.wait()
        self.fails(says="Connection refused", sentence="No connection to box: ssh says why above")


class Forbidden(ThroughSsh):
    settings = ("AllowTcpForwarding no",)

    def test_a_machine_that_forwards_nothing(self) -> None:
        with Server() as server:
            self.fails(LOOPBACK, str(server.port), says="administratively prohibited", sentence="No server at")


class Pumps(TestCase):
    """Between the socket of the chat and ssh."""

    @staticmethod
    def send(sock: socket.socket, lines: bytes) -> None:
        sock.sendall(lines)
        sock.shutdown(socket.SHUT_WR)

    def test_pipes_carry_all_and_both_ends_of_file(self) -> None:
        lines = numbered_lines(20_000)
        sock, child = mychatclient.start_on_socket(["sh", "-c", "cat; echo last"])
        background = Background()
        with sock, child:
            sock.settimeout(SECONDS)
            background.run(self.send, sock, lines)
            heard = b""
            while data := sock.recv(1 << 16):
                heard += data
            self.assertEqual(heard, lines + b"last\n")
            self.assertEqual(child.wait(SECONDS), 0)
        background.join()
        eventually(lambda: threading.active_count() == 1)
