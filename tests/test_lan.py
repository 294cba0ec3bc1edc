"""From the next machine: hosts in network namespaces of the test's own, and the packets of discovery on loopback."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import unittest
from collections.abc import Callable, Iterator
from unittest import mock

import mychatclient
import mychatserver
from tests.support import (
    CLIENT,
    LOOPBACK,
    NEEDS_IPV6,
    NEEDS_ROOT,
    SECONDS,
    SERVER,
    Background,
    Program,
    Server,
    TestCase,
    command_of,
    eventually,
    once,
)

IP = shutil.which("ip", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin") or ""
GREETING = "Connected to chat server. Type 'exit' to leave."
NOBODY = "No server answers on this network: check that one was started with --lan"
NUMBERS = itertools.count()

STORM = """
import os, socket, sys
sending = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
question = b"mychat?1 0123456789abcdef".ljust(128)
rubbish = [b"", b"x", os.urandom(128), question[:-1], question + b" ", os.urandom(1400)]
print("storming", flush=True)
while True:
    for data in rubbish:
        sending.sendto(data, (sys.argv[1], 12000))
"""
ASK_WITHOUT_END = """
import socket, sys
asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
asking.settimeout(0.005)  # 200 questions a second
answers = number = 0
while True:
    number += 1
    asking.sendto((b"mychat?1 %016x" % number).ljust(128), (sys.argv[1], 12000))
    try:
        asking.recv(200)
        answers += 1
    except OSError:  # time is up
        if answers:
            print("answered no more", flush=True)
            answers = 0
"""
TAKE_THE_PORT = """
import socket
taking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
taking.bind(("", 12000))
print("taken", flush=True)
taking.recv(1)
"""
WITHOUT_IPV6 = """
import errno, socket, sys, mychatserver
class Socket(socket.socket):
    def __init__(self, family=-1, *rest, **options):
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        super().__init__(family, *rest, **options)
socket.socket = Socket
sys.exit(mychatserver.main(["--lan", "--port", "0"]))
"""


class Host:
    """A host of the test's own: a network namespace, with nothing but loopback at first."""

    def __init__(self) -> None:
        self.name = f"mychat-{os.getpid()}-{next(NUMBERS)}"
        self.prefix = (IP, "netns", "exec", self.name)
        self._links = 0
        made = subprocess.run([IP, "netns", "add", self.name], stderr=subprocess.PIPE, text=True)
        if made.returncode:
            raise unittest.SkipTest(f"needs network namespaces: unshare -n true has to work; {made.stderr.strip()}")
        self.ip("link", "set", "lo", "up")

    def ip(self, *arguments: str) -> None:
        subprocess.run([IP, "-n", self.name, *arguments], check=True, timeout=SECONDS)

    def link(self, other: Host, mine: str, others: str) -> None:
        """Lay a cable to ``other``, with an address at each end, as 10.77.0.1/24."""
        names = [f"eth{host._links}" for host in (self, other)]
        self.ip("link", "add", names[0], "type", "veth", "peer", "name", names[1], "netns", other.name)
        for host, name, address in ((self, names[0], mine), (other, names[1], others)):
            host._links += 1
            host.ip("address", "add", address, "dev", name, *(("nodad",) if ":" in address else ("broadcast", "+")))
            host.ip("link", "set", name, "up")

    def drop(self, *what: str) -> None:
        """Drop what comes in, as a firewall does: ``from`` an address, perhaps of one ``ipproto``."""
        self.ip("rule", "add", "pref", "2", "lookup", "local")  # it is the first, which even what is for us would pass
        self.ip("rule", "del", "pref", "0")
        self.ip("rule", "add", "pref", "1", *what, "blackhole")

    def server(self, *options: str) -> Server:
        return Server("--lan", *options, prefix=self.prefix)

    def client(self, *arguments: str, **constants: object) -> Program:
        command = command_of(CLIENT, {"ASK_SECONDS": 0.1, **constants})  # which is long, here
        return Program(*command, *arguments, keep_input=True, prefix=self.prefix)

    def python(self, *arguments: str) -> Program:
        environment = {"PYTHONPATH": os.path.dirname(SERVER)}
        with mock.patch.dict(os.environ, environment):
            return Program(sys.executable, *arguments, keep_input=True, prefix=self.prefix)

    def remove(self) -> None:
        subprocess.run([IP, "netns", "delete", self.name], check=True, timeout=SECONDS)


def says(speaker: Program, text: str, listener: Program) -> None:
    """Fail unless the listener hears what the speaker says."""
    speaker.send(f"{text}\n".encode())
    listener.expect("")
    heard = listener.line()
    if not heard.endswith(f":{text}"):
        raise AssertionError(heard)


@unittest.skipUnless(sys.platform == "linux", "needs network namespaces: only Linux has them")
@unittest.skipUnless(IP, "needs ip: apt-get install iproute2")
@NEEDS_ROOT
class Hosts(TestCase):
    def setUp(self) -> None:
        self.here, self.there = self.host(), self.host()

    def host(self) -> Host:
        host = Host()
        self.addCleanup(host.remove)
        return host

    def cable(self) -> None:
        self.here.link(self.there, "10.77.0.1/24", "10.77.0.2/24")

    def joins(self, server: Server, *clients: Program) -> None:
        """Fail unless all are in the room and hear each other."""
        for client in clients:
            client.expect(GREETING)
        for _ in clients:
            while not server.line().startswith("New connection"):
                pass
        says(clients[0], "Hi!", clients[-1])

    def fails(self, client: Program, *patterns: str) -> str:
        """Fail unless the client ends with status 1, nothing on standard output, and this on standard error."""
        self.assertEqual(client.wait(), 1)
        self.assertEqual(client.output, b"")
        for pattern in patterns:
            self.assertRegex(client.errors(), pattern)
        return client.errors()

    @NEEDS_IPV6
    def test_the_printed_commands_join(self) -> None:
        """By --lan, by IPv4 and by IPv6, whichever is typed as the server printed it, with and without a way out."""
        for way_out in (False, True):
            with self.subTest(way_out=way_out):
                self.setUp()
                self.cable()
                self.here.link(self.there, "fd77::1/64", "fd77::2/64")
                if way_out:
                    self.here.ip("route", "add", "default", "via", "10.77.0.2")
                    self.here.ip("-6", "route", "add", "default", "via", "fd77::2")
                with self.here.server() as server:
                    commands = [server.line() for _ in range(3 if way_out else 2)]
                    addresses = [f"10.77.0.1 {server.port}", f"fd77::1 {server.port}"][: len(commands) - 1]
                    start = "Others join with: python mychatclient.py "
                    self.assertEqual(commands, [start + last for last in ("--lan", *addresses)])
                    with contextlib.ExitStack() as stack:
                        last_words = [command[len(start) :].split() for command in commands]
                        clients = [stack.enter_context(self.there.client(*words)) for words in last_words]
                        self.joins(server, *clients)
                    eventually(lambda: "without --lan the chat stays on this machine" in server.errors())

    def test_a_server_is_found_without_an_address_by_hosts_without_default_route(self) -> None:
        self.cable()
        with self.here.server() as server, self.there.client("--lan") as ann, self.here.client("--lan") as bob:
            self.joins(server, ann, bob)
            name = re.sub("[^0-9A-Za-z.-]", "-", socket.gethostname())[:63]
            self.assertEqual(ann.errors(), f"Joining the server on {name}: 10.77.0.1 port {server.port}.\n")
            ann.send(b"exit\n")
            self.assertEqual(ann.wait(), 0)

    def test_a_server_on_the_same_machine_is_found_without_any_network(self) -> None:
        with self.here.server() as server, self.here.client("--lan") as ann, self.here.client("--lan") as bob:
            self.joins(server, ann, bob)
            self.assertIn(f"{LOOPBACK} port {server.port}.\n", ann.errors())

    def test_a_server_that_is_not_on_the_default_routes_interface_is_found(self) -> None:
        third = self.host()
        self.there.link(third, "10.78.0.2/24", "10.78.0.3/24")
        self.there.ip("route", "add", "default", "via", "10.78.0.3")
        self.cable()
        with self.here.server() as server, self.there.client("--lan") as ann, self.there.client("--lan") as bob:
            self.joins(server, ann, bob)

    def test_one_server_on_two_interfaces_is_one(self) -> None:
        self.cable()
        self.here.link(self.there, "10.79.0.1/24", "10.79.0.2/24")
        with self.here.server() as server, self.there.client("--lan") as ann, self.there.client("--lan") as bob:
            self.joins(server, ann, bob)
            self.assertRegex(ann.errors(), rf"^Joining the server on [^\n]+: 10\.7[79]\.0\.1 port {server.port}\.\n$")

    def test_an_interface_that_comes_up_later_hears_too(self) -> None:
        with self.here.server() as server:
            self.cable()
            with self.there.client("--lan") as ann, self.there.client("--lan") as bob:
                self.joins(server, ann, bob)

    def test_several_servers_are_one_join_command_each(self) -> None:
        """Two on one machine, one on another: none is joined, and each printed command works."""
        self.cable()
        third = self.host()
        self.there.link(third, "10.78.0.2/24", "10.78.0.3/24")
        with self.here.server() as one, self.here.server() as two, third.server() as three:
            with self.there.client("--lan") as client:
                errors = self.fails(client, "^Several servers answer; join one of them:\n")
            found = re.findall(r"^[0-9A-Za-z.-]+: python mychatclient\.py (\S+) (\d+)$", errors, re.MULTILINE)
            ports = ((one.port, "10.77.0.1"), (two.port, "10.77.0.1"), (three.port, "10.78.0.3"))
            self.assertEqual(sorted(found), sorted((host, str(port)) for port, host in ports))
            self.assertEqual(errors.count("\n"), 4)
            for server, (_, host) in zip((one, two, three), ports):
                with (
                    self.there.client(host, str(server.port)) as ann,
                    self.there.client(host, str(server.port)) as bob,
                ):
                    self.joins(server, ann, bob)

    def test_no_server(self) -> None:
        """Nor one that listens on all addresses without being asked to be found; with a network, and without any."""
        with self.there.client("--lan") as client:
            self.assertEqual(self.fails(client, f"^{NOBODY}").count("\n"), 1)
        self.cable()
        with Server("--host", "0.0.0.0", prefix=self.here.prefix), self.there.client("--lan") as client:
            self.assertEqual(self.fails(client, f"^{NOBODY}").count("\n"), 1)

    def test_a_host_that_asks_without_end_keeps_nobody_from_finding_the_server(self) -> None:
        """Ten times as often as it is answered."""
        self.cable()
        rude = self.host()
        self.here.link(rude, "10.78.0.1/24", "10.78.0.2/24")
        with self.here.server() as server, rude.python("-c", ASK_WITHOUT_END, "10.78.0.1") as asking:
            asking.expect("answered no more")
            with self.there.client("--lan") as ann, self.there.client("--lan") as bob:
                self.joins(server, ann, bob)

    @once
    def test_a_storm_of_garbage_at_the_discovery_port_does_not_touch_the_chat(self) -> None:
        """The server stays off the processor, says nothing, and is found again when the storm is over."""
        self.cable()
        address = "10.77.0.1"
        with self.here.server() as server:
            arguments = (address, str(server.port))
            with self.there.client(*arguments) as ann, self.there.client(*arguments) as bob:
                self.joins(server, ann, bob)
                with self.there.python("-c", STORM, address) as storm:
                    storm.expect("storming")
                    _, before = server.work()
                    started = time.monotonic()
                    while time.monotonic() - started < 4:  # four ticks of the server's clock
                        says(ann, "still here", bob)
                        time.sleep(0.05)  # what the storm does in between is what is measured
                    _, after = server.work()
                self.assertLess(after - before, 1.5)
                says(bob, "and now", ann)
            with self.there.client("--lan") as cid, self.there.client("--lan") as dan:
                self.joins(server, cid, dan)
            self.assertEqual(server.stop(), 0)
            self.assertEqual(server.errors().count("\n"), 1)

    def test_a_firewall_that_drops(self) -> None:
        """The client says so in a sentence: the server's firewall by address, and its own by --lan."""
        self.cable()
        self.here.drop("from", "10.77.0.2")
        with self.here.server() as server:
            with self.there.client("10.77.0.1", str(server.port), CONNECT_SECONDS=0.5) as client:
                self.fails(client, rf"^No answer from 10\.77\.0\.1 port {server.port}: check the address; a firewall")
            self.there.drop("from", "10.77.0.1")  # which lets the question out, and no answer in
            with self.there.client("--lan") as client:
                self.fails(client, f"^{NOBODY}")

    def test_a_firewall_that_lets_only_questions_through(self) -> None:
        """Found, but not to be reached: the sentence says where."""
        self.cable()
        self.here.drop("from", "10.77.0.2", "ipproto", "tcp")
        with self.here.server() as server, self.there.client("--lan", CONNECT_SECONDS=0.5) as client:
            self.fails(client, "^Joining the server", rf"\nNo answer from 10\.77\.0\.1 port {server.port}: ")

    def test_a_kernel_without_ipv6(self) -> None:
        self.cable()
        with self.here.python("-c", WITHOUT_IPV6) as server:
            port = server.line().rpartition(":")[2]
            server.expect("Others join with: python mychatclient.py --lan")
            server.expect(f"Others join with: python mychatclient.py 10.77.0.1 {port}")
            with self.there.client("--lan") as client:
                client.expect(GREETING)
                self.assertRegex(server.line(), r"^New connection from : \('10\.77\.0\.2', \d+\)$")

    def test_a_machine_on_which_ipv6_is_switched_off(self) -> None:
        script = "for name in ('all', 'default'): open(f'/proc/sys/net/ipv6/conf/{name}/disable_ipv6', 'w').write('1')"
        for host in (self.here, self.there):
            with host.python("-c", script) as program:
                self.assertEqual(program.wait(), 0)
        self.cable()
        with self.here.server() as server, self.there.client("--lan") as ann, self.there.client("--lan") as bob:
            self.joins(server, ann, bob)

    def test_a_discovery_port_that_another_program_keeps(self) -> None:
        """One sentence, and the chat goes on without."""
        self.cable()
        with self.here.python("-c", TAKE_THE_PORT) as other:
            other.expect("taken")
            with self.here.server() as server:
                self.assertEqual(server.line(), f"Others join with: python mychatclient.py 10.77.0.1 {server.port}")
                eventually(
                    lambda: "--lan finds no server here: UDP port 12000: Address already in use" in server.errors()
                )
                arguments = ("10.77.0.1", str(server.port))
                with self.there.client(*arguments) as ann, self.there.client(*arguments) as bob:
                    self.joins(server, ann, bob)
                self.assertEqual(server.stop(), 0)

    def test_a_chat_port_that_is_taken(self) -> None:
        with self.here.server() as server, self.here.python(SERVER, "--lan", "--port", str(server.port)) as other:
            self.fails(other, f"^Port {server.port} is taken: a server may be running there already")

    def test_ctrl_c_while_looking_for_a_server(self) -> None:
        with self.there.python("-c", TAKE_THE_PORT) as other:  # hears the question, as a sign that it was asked
            other.expect("taken")
            with self.there.client("--lan") as client:
                self.assertEqual(other.wait(), 0)
                client.process.send_signal(signal.SIGINT)
                self.assertEqual((client.wait(), client.output, client.errors()), (130, b"", ""))


@contextlib.contextmanager
def discovery(host_name: str = "annas-laptop") -> Iterator[tuple[mychatserver.Discovery, socket.socket]]:
    """Give a discovery on a port of its own, and a socket to ask it by, on loopback."""
    with (
        mock.patch("socket.gethostname", return_value=host_name),
        mock.patch.object(mychatserver, "DISCOVERY_PORT", 0),
        mychatserver.Discovery(12_345) as answering,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking,
    ):
        asking.connect((LOOPBACK, answering.getsockname()[1]))
        yield answering, asking


def question(number: int) -> bytes:
    return b"mychat?1 %016x" % number + b" " * 103


class Questions(TestCase):
    def answers(self, asking: socket.socket) -> list[bytes]:
        """Return what has come: on loopback it is there when ``answer`` returns."""
        asking.setblocking(False)
        answers = []
        with contextlib.suppress(BlockingIOError):
            while True:
                answers.append(asking.recv(1_000))
        return answers

    def test_an_answer_tells_what_is_needed_and_is_no_longer_than_the_question(self) -> None:
        with discovery("x" * 100) as (answering, asking):
            asking.send(question(7))
            answering.answer()
            (answer,) = self.answers(asking)
            self.assertRegex(answer, rb"^mychat!1 0000000000000007 [0-9a-f]{16} 12345 x{63}$")
            self.assertLessEqual(len(answer), len(question(7)))

    def test_the_id_is_the_same_in_each_answer_and_another_in_each_server(self) -> None:
        ids = []
        for _ in range(2):
            with discovery() as (answering, asking):
                for number in range(2):
                    asking.send(question(number))
                    answering.answer()
                ids.append([answer.split(b" ")[2] for answer in self.answers(asking)])
        self.assertEqual([len(set(pair)) for pair in ids], [1, 1])
        self.assertNotEqual(ids[0], ids[1])

    def test_a_hosts_name_is_made_safe(self) -> None:
        for name, shown in (("Büro\x1b[2J PC\n", b"B-ro--2J-PC-"), ("", b"-"), ("a.local", b"a.local")):
            with self.subTest(name=name), discovery(name) as (answering, asking):
                asking.send(question(1))
                answering.answer()
                self.assertEqual(self.answers(asking)[0].split(b" ", 4)[4], shown)

    def test_what_is_no_question_is_not_answered(self) -> None:
        good = question(1)
        for data in (
            b"",
            b"x",
            good[:-1],
            good + b" ",
            good.rstrip(),
            good.replace(b"?1", b"?2"),
            good.replace(b"?1", b"!1"),
            good.upper(),
            good[:-1] + b"x",
            good.replace(b"0", b"g"),
            b" " * 128,
            bytes(128),
            bytes(60_000),
        ):
            with self.subTest(data=data[:30]), discovery() as (answering, asking):
                asking.send(data)
                self.assertTrue(answering.answer())
                self.assertEqual(self.answers(asking), [])
                asking.send(good)
                answering.answer()
                self.assertEqual(len(self.answers(asking)), 1)

    @unittest.skipUnless(sys.platform == "linux", "needs Linux: 127.0.0.2 is an address there")
    def test_twenty_answers_a_second_to_one_host_and_others_are_answered_too(self) -> None:
        with (
            discovery() as (answering, rude),
            mock.patch("time.monotonic") as clock,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as honest,
        ):
            honest.bind(("127.0.0.2", 0))
            honest.connect(rude.getpeername())
            for second in range(3):
                clock.return_value = 100.0 + second
                for number in range(200):
                    rude.send(question(number))
                    answering.answer()
                honest.send(question(7))
                answering.answer()
                self.assertEqual((len(self.answers(rude)), len(self.answers(honest))), (20, 1))

    def test_a_flood_is_left_alone_for_the_rest_of_its_second(self) -> None:
        with discovery() as (answering, asking), mock.patch("time.monotonic", return_value=100.0) as clock:
            for number in range(1, mychatserver.DATAGRAMS_A_SECOND + 1):
                asking.send(b"rubbish")
                self.assertEqual(answering.answer(), number < mychatserver.DATAGRAMS_A_SECOND)
            clock.return_value = 101.0
            asking.send(b"rubbish")
            self.assertTrue(answering.answer())

    def test_an_asker_that_has_gone_does_no_harm(self) -> None:
        with discovery() as (answering, asking):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
                gone.connect(asking.getpeername())
                gone.send(question(1))
            answering.answer()
            asking.send(question(2))
            answering.answer()
            self.assertEqual(len(self.answers(asking)), 1)


class Answers(TestCase):
    def found(self, answer: Callable[[bytes], list[bytes]]) -> list[tuple[str, str, int]]:
        """Return what a client finds when its questions are answered so, with the token given."""
        background = Background()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as answering:
            answering.bind((LOOPBACK, 0))
            answering.settimeout(SECONDS)

            def serve() -> None:
                while data := answering.recvfrom(1_000):
                    if data[0] == b"end":
                        return
                    self.assertEqual(len(data[0]), 128)
                    for reply in answer(data[0].split()[1]):
                        answering.sendto(reply, data[1])

            def ask(sock: socket.socket, question: bytes) -> None:
                sock.sendto(question.ljust(128), answering.getsockname())

            background.run(serve)
            with mock.patch.object(mychatclient, "ask", ask), mock.patch.object(mychatclient, "ASKS", (1, 2)):
                found = mychatclient.find_servers()
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ending:
                ending.sendto(b"end", answering.getsockname())
            background.join()
        return found

    def test_one_server_heard_twice_is_one(self) -> None:
        same = b" " + b"a" * 16 + b" 12000 anna"
        self.assertEqual(self.found(lambda token: [b"mychat!1 " + token + same] * 2), [("anna", LOOPBACK, 12000)])

    def test_the_servers_are_sorted_and_at_most_twenty(self) -> None:
        def many(token: bytes) -> list[bytes]:
            return [b"mychat!1 %s %016d %d anna" % (token, number, 2000 + number) for number in range(30)]

        found = self.found(many)
        self.assertEqual(len(found), 20)
        self.assertEqual(found, sorted(found))

    def test_what_is_no_answer_to_our_question_is_ignored(self) -> None:
        good = b"mychat!1 %s " + b"b" * 16 + b" 12000 anna"
        bad = (
            b"",
            b"\xff\xfe",
            good.replace(b"%s", b"0" * 16),
            good.replace(b"12000", b"0"),
            good.replace(b"12000", b"65536"),
            good.replace(b"12000", b"-1"),
            good.replace(b"anna", b"\x1b[2J"),
            good.replace(b"anna", b"an na"),
            good.replace(b"anna", b"x; rm -rf"),
            good.replace(b"anna", b"x" * 64),
            good.replace(b"!1", b"!2"),
            good + b"\n",
        )
        self.assertEqual(self.found(lambda token: [data.replace(b"%s", token) for data in bad]), [])
        answered = self.found(lambda token: [data.replace(b"%s", token) for data in (*bad, good)])
        self.assertEqual(answered, [("anna", LOOPBACK, 12000)])


class Arguments(TestCase):
    def test_what_does_not_go_together_is_told_as_usage(self) -> None:
        for program, options, sentence in (
            (SERVER, ("--lan", "--host", "0.0.0.0"), "not allowed with argument"),
            (CLIENT, ("--lan", LOOPBACK), "--lan finds host and port by itself"),
            (CLIENT, ("--lan", "12000"), "--lan finds host and port by itself"),
            (CLIENT, ("--lan", "--port", "12000"), "--lan finds host and port by itself"),
            (CLIENT, ("--lan", "--ssh", "ann@example"), "--lan finds host and port by itself"),
        ):
            with self.subTest(options=options), Program(sys.executable, program, *options) as running:
                self.assertEqual(running.wait(), 2)
                self.assertIn(sentence, running.errors())
                self.assertTrue(running.errors().startswith("usage: "))
