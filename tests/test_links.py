"""Links that die and links that are slow, between hosts in network namespaces: what is told, and what arrives."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Mapping
from unittest import mock

from tests import test_tls
from tests.support import (
    CLIENT,
    LONG,
    LOOPBACK,
    NEEDS_ROOT,
    SECONDS,
    Background,
    Program,
    Server,
    Terminal,
    TestCase,
    command_of,
    eventually,
    needs_command,
    numbered_lines,
    once,
)
from tests.test_lan import IP, Host
from tests.test_ssh import SSHD, Machine

setUpModule, tearDownModule = test_tls.setUpModule, test_tls.tearDownModule  # for the certificate

GREETING = "Connected to chat server. Type 'exit' to leave."
TC = shutil.which("tc", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin") or ""
HERE, THERE = "10.77.0.1", "10.77.0.2"
LINES = 240 if LONG else 60
TALK = """
import contextlib, socket, ssl, sys, time
talking = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
if len(sys.argv) > 2:
    talking = ssl._create_unverified_context().wrap_socket(talking)
print("talking", flush=True)
with contextlib.suppress(ConnectionError):  # the server has gone
    while True:
        talking.settimeout(60)
        talking.sendall(b"words " * 16 + b"\\n")
        talking.settimeout(0.001)
        with contextlib.suppress(socket.timeout):
            while talking.recv(65536):
                pass
        time.sleep(0.05)
"""


@unittest.skipUnless(sys.platform == "linux", "needs network namespaces: only Linux has them")
@unittest.skipUnless(IP, "needs ip: apt-get install iproute2")
@NEEDS_ROOT
class Links(TestCase):
    def host(self) -> Host:
        host = Host()
        self.addCleanup(host.remove)
        return host


class Vanishing(Links):
    """The other end is there no more, and nothing tells so."""

    def cut(self, way: str, here: Host, there: Host) -> None:
        if way == "dropped":
            here.drop("from", THERE)
            there.drop("from", HERE)
        else:
            (here if way == "down here" else there).ip("link", "set", "eth0", "down")

    def mend(self, way: str, here: Host, there: Host) -> None:
        if way == "dropped":
            for host in (here, there):
                host.ip("rule", "del", "pref", "1")
        else:
            (here if way == "down here" else there).ip("link", "set", "eth0", "up")

    def test_a_client_with_something_on_its_way_notices_tells_and_comes_back(self) -> None:
        """The lines are told of, and are in the editor's history."""
        for way in ("dropped", "down here", "down there"):
            with self.subTest(way=way):
                self.comes_back(way, {"VANISHED_SECONDS": 1, "RECONNECT_SECONDS": 0.1})

    @once
    def test_that_takes_a_minute_and_a_half(self) -> None:
        started = time.monotonic()
        self.comes_back("dropped", {})
        self.assertLess(time.monotonic() - started, 120)

    def comes_back(self, way: str, constants: Mapping[str, object]) -> None:
        here, there = self.host(), self.host()
        here.link(there, f"{HERE}/24", f"{THERE}/24")
        with Server("--lan", prefix=here.prefix) as server:
            command = command_of(CLIENT, constants)
            with Terminal(*there.prefix, *command, "--reconnect", "--no-color", HERE, str(server.port)) as client:
                client.wait_for(f"{GREETING}\n")
                client.type("before\r")
                eventually(lambda: b":before\n" in server.output)
                self.cut(way, here, there)
                client.type("one\rtwo\r")
                told = "\n* 2 lines were perhaps not delivered\n\n* connection lost, trying again\n"
                client.wait_for(told, seconds=120)
                self.mend(way, here, there)
                # What was on its way is in doubt, not lost: it may come by the old connection all the same.
                client.wait_for("\n* connected again\n", seconds=120, within=True)
                client.type("\x1b[A\x1b[A\r\x1b[A\x1b[A\r")
                heard = re.compile(rb"^\d+:(.*)$", re.MULTILINE)
                eventually(lambda: heard.findall(server.output)[-2:] == [b"one", b"two"])

    def test_an_idle_client_notices(self) -> None:
        here, there = self.host(), self.host()
        here.link(there, f"{HERE}/24", f"{THERE}/24")
        constants = {"VANISHED_SECONDS": 1, "KEEPALIVE": {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3}}
        with Server("--lan", prefix=here.prefix) as server:
            command = command_of(CLIENT, constants)
            with Terminal(*there.prefix, *command, "--no-color", HERE, str(server.port)) as client:
                client.wait_for(f"{GREETING}\n")
                here.drop("from", THERE)
                there.drop("from", HERE)
                client.wait_for("Disconnected from server\n", seconds=120)
                self.assertIn("\nConnection lost: ", client.screen())
                self.assertEqual(client.wait(), 1)


@unittest.skipUnless(TC, "needs tc: apt-get install iproute2")
class Slow(Links):
    """At 400 kbit/s, while somebody talks twenty lines a second, all that was entered before the end arrives."""

    def setUp(self) -> None:
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        self.here = self.host()
        self.here.ip("link", "set", "lo", "mtu", "1500")  # as a network's, or a packet would be more than may burst
        shape = f"{TC} -n {self.here.name} qdisc add dev lo root tbf rate 400kbit burst 3000 latency 400ms"
        made = subprocess.run(shape.split(), stderr=subprocess.PIPE, text=True, timeout=SECONDS)
        if made.returncode:
            self.skipTest(f"needs tc's tbf: modprobe sch_tbf; {made.stderr.strip()}")
        self.lines = numbered_lines(LINES, 500)

    def serve(self, *options: str) -> Server:
        server: Server = self.stack.enter_context(Server(*options, prefix=self.here.prefix))
        talker = self.stack.enter_context(self.here.python("-c", TALK, str(server.port), *options[:1]))
        talker.expect("talking")
        return server

    def all_arrives(self, server: Server, *options: str) -> None:
        """Fail unless the server gets all from a terminal and from a pipe, whichever end they have."""
        command = *self.here.prefix, *command_of(CLIENT), *options, LOOPBACK, str(server.port)
        for end in ("exit\r", "\x04") if LONG else ("exit\r",):
            with self.subTest(terminal=end), Terminal(*command, "--plain") as terminal:
                terminal.wait_for(f"{GREETING}\n", within=True)
                typing = Background()
                typing.run(terminal.type, self.lines.decode().replace("\n", "\r") + end)
                while terminal.process.poll() is None:
                    terminal.read(0.1)
                typing.join()
                self.assertEqual(terminal.wait(), 0)
                self.heard(server)
        for end in ("", "/quit\n") if LONG else ("",):
            with self.subTest(pipe=end), Program(*command, keep_input=True) as program:
                program.expect(GREETING)
                program.send(self.lines + end.encode())
                program.end_input()
                self.assertEqual(program.wait(), 0)
                self.heard(server)

    def heard(self, server: Server) -> None:
        """Fail unless all lines were relayed, in order, since this was asked last."""
        eventually(lambda: server.output.count(b"Connection closed\n") > self.closed)
        self.closed += 1
        said = re.findall(rb"^\d+:(\d+\.+)$", server.output[self.looked :], re.MULTILINE)
        self.looked = len(server.output)
        self.assertEqual(b"".join(line + b"\n" for line in said), self.lines)

    closed = looked = 0

    def test_plain(self) -> None:
        self.all_arrives(self.serve())

    def test_with_tls(self) -> None:
        server = self.serve("--tls-cert", test_tls.pem("good"))
        self.all_arrives(server, "--tls-ca", test_tls.trust())

    @needs_command("ssh", "openssh-client")
    @unittest.skipUnless(SSHD, "needs sshd: apt-get install openssh-server")
    def test_through_ssh(self) -> None:
        server = self.serve()
        folder = self.stack.enter_context(tempfile.TemporaryDirectory())
        machine = self.stack.enter_context(Machine(folder, prefix=self.here.prefix))
        self.stack.enter_context(mock.patch.dict(os.environ, machine.environment))
        self.all_arrives(server, "--ssh", "box")
