"""TLS at both ends: the same chat, encrypted, for friends; one sentence, and no harm to the chat, for everyone else."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import os
import pathlib
import random
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Callable
from typing import Any
from unittest import mock

import mychatclient
import mychatserver
from tests import test_reference
from tests.support import (
    ASKED,
    CLIENT,
    LONG,
    LOOPBACK,
    PYTHON,
    SECONDS,
    SERVER,
    Background,
    Listener,
    Peer,
    Program,
    Server,
    Terminal,
    TestCase,
    as_heard,
    command_of,
    eventually,
    free_port,
    heard_line_by_line,
    home_made_server,
    needs_command,
    numbered_lines,
    unread,
)

MB = 1_000_000
GREETING = "Connected to chat server. Type 'exit' to leave."
FAREWELL = "Disconnected from server"
NEEDS_TLS = "* refused: this server speaks TLS: join with mychatclient.py --tls"
VERSIONS = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
HOSTS = "localhost", LOOPBACK
trustme: Any = None
with contextlib.suppress(ImportError):
    trustme = importlib.import_module("trustme")
folder = pathlib.Path()


def setUpModule() -> None:
    if not trustme and not shutil.which("openssl"):
        raise unittest.SkipTest("needs trustme: python -m pip install trustme")
    global folder
    folder = pathlib.Path(tempfile.mkdtemp())
    make("good", 2, *HOSTS)
    make("expired", -1, *HOSTS)
    make("named", 2, "chat.example")


def tearDownModule() -> None:
    shutil.rmtree(folder)


def make(name: str, days: int, *hosts: str) -> None:
    """Make a certificate with its key, valid until so many days from now, and a file with the one to trust for it."""
    pem, authority = folder / f"{name}.pem", folder / f"{name}.ca"
    if trustme:
        issuer = trustme.CA()
        end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days)
        issuer.issue_cert(*hosts, not_after=end).private_key_and_cert_chain_pem.write_to_path(pem)
        issuer.cert_pem.write_to_path(authority)
        return
    alternatives = ",".join(f"{'IP' if host == LOOPBACK else 'DNS'}:{host}" for host in hosts)
    (folder / "extensions").write_text(f"subjectAltName={alternatives}\n")
    curve = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
    openssl(f"req -new {curve} -subj /CN=chat -keyout key -out request")
    openssl(f"x509 -req -in request -signkey key -days {days} -extfile extensions -out {authority}")
    pem.write_bytes((folder / "key").read_bytes() + authority.read_bytes())


def openssl(arguments: str) -> None:
    subprocess.run(["openssl", *arguments.split()], cwd=folder, check=True, timeout=SECONDS, capture_output=True)


def pem(name: str) -> str:
    return str(folder / f"{name}.pem")


def trust(name: str = "good") -> str:
    return str(folder / f"{name}.ca")


def context(version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    """Return what trusts the good server, and speaks one version of TLS alone."""
    result = ssl.create_default_context(cafile=trust())
    if version:
        result.minimum_version = result.maximum_version = version
    return result


class Secured(socket.socket):
    """A connection behind TLS. One thread may read while another sends, which an SSLSocket must not be used for."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        # Guards the TLS object and its two buffers. Nothing waits while it is held.
        self._lock = threading.Lock()
        self._received, self._output = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._output, server_hostname="localhost")
        self._sending = threading.Lock()  # what is encrypted goes out in this order
        # Only who reads uses these.
        self._text = b""  # decrypted, not yet read
        self._ended = False  # by TLS's own end
        super().__init__(sock.family, sock.type, sock.proto, sock.detach())
        self.settimeout(SECONDS)

    def shake_hands(self) -> None:
        shaken = False
        while not shaken:
            with contextlib.suppress(ssl.SSLWantReadError):
                self._tls.do_handshake()
                shaken = True
            super().sendall(self._output.read())
            if not shaken:
                self._received.write(self._ciphertext())
        self._decrypt(b"")  # what came with the handshake's end

    def _ciphertext(self) -> bytes:
        data = super().recv(1 << 20)
        if not data:
            raise ConnectionResetError("cut off, without TLS's own end")
        return data

    def _decrypt(self, ciphertext: bytes) -> None:
        parts = [self._text]
        with self._lock:
            self._received.write(ciphertext)
            try:
                while part := self._tls.read(1 << 20):
                    parts.append(part)
                self._ended = True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLZeroReturnError:
                self._ended = True
            except ssl.SSLError:
                if not any(parts):  # else it is told at the next read
                    raise
        self._text = b"".join(parts)

    def recv(self, size: int, flags: int = 0) -> bytes:
        while not self._text and not self._ended:
            self._decrypt(self._ciphertext())
        text, self._text = self._text[:size], self._text[size:]
        return text

    def sendall(self, data: bytes, flags: int = 0) -> None:  # type: ignore[override]  # of all buffers, bytes alone
        with self._sending:
            for start in range(0, len(data), 65_536):
                super().sendall(self.encrypted(data[start : start + 65_536]))

    def encrypted(self, data: bytes) -> bytes:
        with self._lock:
            self._tls.write(data)
            return self._output.read()

    def shutdown(self, how: int) -> None:
        """End what is sent by TLS's own end; cut both directions off without one."""
        if how == socket.SHUT_RDWR:
            super().shutdown(how)
            return
        with self._sending:
            with self._lock, contextlib.suppress(ssl.SSLWantReadError):  # the other side's own end has not come
                self._tls.unwrap()
            super().sendall(self._output.read())


class TlsPeer(Peer):
    """A peer behind TLS."""

    def __init__(self, host: str, port: int, *, version: ssl.TLSVersion | None = None, **options: Any) -> None:
        super().__init__(host, port, **options)
        with contextlib.ExitStack() as unless_secure:
            unless_secure.enter_context(self.socket)
            secured = unless_secure.enter_context(Secured(self.socket, context(version)))
            secured.shake_hands()
            unless_secure.pop_all()
        self.socket = secured


class TlsServer(Server):
    """A server with TLS, whose peers have it too."""

    def __init__(self, *options: str, name: str = "good", **more: Any) -> None:
        super().__init__("--tls-cert", pem(name), *options, **more)

    def connect(self, host: str, **options: Any) -> Peer:
        return TlsPeer(host, self.port, **options)


def client(port: int, *options: str, host: str = LOOPBACK) -> Program:
    """Return a client in pipes."""
    return Program(*PYTHON, CLIENT, *options, host, str(port), keep_input=True)


class Certificates(TestCase):
    """What the server says of files that do not do, before it listens."""

    def fails(self, *options: str, sentence: str, status: int = 1) -> None:
        with Program(*PYTHON, SERVER, "--port", "0", *options) as program:
            self.assertEqual(program.wait(), status)
            self.assertEqual(program.output, b"")
            self.assertIn(sentence, program.errors())
            self.assertTrue(status == 2 or program.errors().count("\n") == 1, program.errors())

    def test_each_has_its_sentence(self) -> None:
        text, damaged, key_alone = (str(folder / name) for name in ("text", "damaged", "key_alone"))
        pathlib.Path(text).write_text("no PEM\n")
        whole = pathlib.Path(pem("good")).read_text()
        begin = whole.index("-----BEGIN CERTIFICATE")
        pathlib.Path(damaged).write_text(whole[: begin + 60] + "AAAA" + whole[begin + 60 :])
        pathlib.Path(key_alone).write_text(whole[:begin])
        for options, sentence in (
            (("--tls-cert", f"{text}.none"), f"Cannot use {text}.none: No such file or directory; --tls-cert needs"),
            (("--tls-cert", pem("good"), "--tls-key", "none"), f"Cannot use {pem('good')} with none: No such file"),
            (("--tls-cert", str(folder)), f"Cannot use {folder}: Is a directory; --tls-cert needs a certificate"),
            (("--tls-cert", text), f"Cannot use {text}: "),
            (("--tls-cert", key_alone), f"Cannot use {key_alone}: "),
            (("--tls-cert", trust()), f"Cannot use {trust()}: "),
            (("--tls-cert", trust(), "--tls-key", text), f"Cannot use {trust()} with {text}: "),
            (("--tls-cert", damaged), f"Cannot use {damaged}: "),
            (("--tls-cert", pem("good"), "--tls-key", pem("named")), "key values mismatch"),
        ):
            with self.subTest(options=options):
                self.fails(*options, sentence=sentence)

    def test_a_key_without_a_certificate_is_told_as_usage(self) -> None:
        self.fails("--tls-key", pem("good"), sentence="--tls-key goes with --tls-cert alone: give that, too", status=2)

    @needs_command("openssl", "openssl")
    def test_a_key_with_a_pass_phrase_is_not_asked_for(self) -> None:
        """Not even on a terminal."""
        openssl(f"pkey -in {pem('good')} -aes128 -passout pass:secret -out locked")
        locked = str(folder / "locked")
        with Terminal(*PYTHON, SERVER, "--tls-cert", pem("good"), "--tls-key", locked) as terminal:
            self.assertEqual(terminal.wait(), 1)
            self.assertIn(f"Cannot use {pem('good')} with {locked}: ", terminal.screen())
            self.assertIn("its key without a pass phrase", terminal.screen().replace("\n", ""))

    def test_a_python_without_ssl(self) -> None:
        """Has one sentence for who wants TLS, and needs none for who does not."""
        without = "import sys; sys.modules['ssl'] = None"
        for program_file, *options in ((SERVER, "--port", "0", "--tls-cert", pem("good")), (CLIENT, "--tls")):
            with Program(*command_of(program_file, setup=without), *options) as program:
                self.assertEqual(program.wait(), 1)
                self.assertRegex(program.errors(), r"^This Python has no ssl module, so no TLS: [^\n]*\n$")
        joining = command_of(CLIENT, setup=without)
        with Server(setup=without) as server, Program(*joining, LOOPBACK, str(server.port)) as program:
            self.assertEqual(program.wait(), 0)

    def test_without_tls_the_library_is_not_loaded(self) -> None:
        for module in ("mychatserver", "mychatclient"):
            check = f"import sys, {module}; sys.exit('ssl' in sys.modules)"
            status = subprocess.run([sys.executable, "-c", check], cwd=pathlib.Path(SERVER).parent, timeout=SECONDS)
            self.assertEqual(status.returncode, 0)

    def test_the_join_line_has_the_option(self) -> None:
        with TlsServer("--host", "0.0.0.0") as server:
            self.assertRegex(server.line(), r"^Others join with: python mychatclient.py --tls(-ca \S+)? \S|^No address")


class Reference(test_reference.ReferenceConversation):
    def test_the_reference_conversation(self) -> None:
        """All is the same to the letter, on the server and on three screens."""
        self.converse("--tls-ca", trust(), serving=("--tls-cert", pem("good")))


class Trust(TestCase):
    """Whom the client trusts: what is wrong, and what to do, is one sentence, and no word goes unencrypted."""

    def fails(self, port: int, *options: str, sentence: str, host: str = LOOPBACK, status: int = 1) -> None:
        with client(port, *options, host=host) as program:
            self.assertEqual(program.wait(), status)
            self.assertEqual(program.output, b"")
            self.assertIn(sentence, program.errors())
            self.assertTrue(status == 2 or program.errors().count("\n") == 1, program.errors())

    def test_unknown_expired_or_of_another_name(self) -> None:
        """Nobody of these is seen in the room."""
        for name, options, sentence in (
            ("good", ("--tls",), "is not trusted: give --tls-ca the PEM file of whoever runs that server."),
            ("good", ("--tls-ca", trust("named")), "is not trusted: give --tls-ca the PEM file"),
            ("expired", ("--tls-ca", trust("expired")), "has expired: whoever runs that server has to make a new one."),
            ("named", ("--tls-ca", trust("named")), "is for another name: join by a name or address that it has."),
        ):
            with self.subTest(name=name, options=options), TlsServer(name=name) as server:
                where = f"The certificate of {LOOPBACK} port {server.port} "
                self.fails(server.port, *options, sentence=where + sentence)
                self.assertEqual(server.stop(), 0)
                self.assertNotIn(b"New connection", server.output)

    def test_by_name_and_with_the_version_that_both_have(self) -> None:
        with TlsServer() as server, client(server.port, "--tls-ca", trust(), host="localhost") as program:
            program.expect(GREETING)
            for version in VERSIONS:
                with server.peer(version=version) as peer:
                    peer.say(f"{version}")
                    program.expect("", f"{peer.label}:{version}")
        self.assertEqual(mychatserver.tls_context(pem("good"), None).minimum_version, ssl.TLSVersion.TLSv1_2)
        self.assertEqual(mychatclient.tls_context(trust()).minimum_version, ssl.TLSVersion.TLSv1_2)

    def test_files_to_trust_that_do_not_do(self) -> None:
        text = folder / "not_pem"
        text.write_text("no PEM\n")
        port = free_port()  # nobody is asked
        for path, reason in (("none", "No such file or directory"), (str(text), "there is no certificate in it")):
            self.fails(port, "--tls-ca", path, sentence=f"Cannot read {path}: {reason}; give --tls-ca the server's PEM")

    def test_through_ssh_it_is_one_encryption_too_many(self) -> None:
        self.fails(
            1, "--tls", "--ssh", "box", sentence="--ssh goes with neither --tls, as it encrypts already", status=2
        )

    def test_a_server_without_tls(self) -> None:
        """This project's, and one that answers something else; neither is told a word."""
        with Server() as server:
            self.fails(server.port, "--tls", sentence=f"No TLS at {LOOPBACK} port {server.port}: leave --tls out")
            self.assertEqual(server.stop(), 0)

        def serve(connection: socket.socket) -> None:
            connection.sendall(b"220 mail.example ESMTP\r\n")
            with contextlib.suppress(ConnectionResetError):
                while data := connection.recv(1_000):
                    self.assertEqual(data[:2], b"\x16\x03")

        with home_made_server(serve) as port:
            self.fails(port, "--tls", sentence=f"No TLS at {LOOPBACK} port {port}: leave --tls out")

    def test_a_server_that_says_nothing(self) -> None:
        def serve(connection: socket.socket) -> None:
            while connection.recv(1_000):
                pass

        command = command_of(CLIENT, {"HANDSHAKE_SECONDS": 0.5})
        with home_made_server(serve) as port, Program(*command, "--tls", LOOPBACK, str(port)) as program:
            self.assertEqual(program.wait(), 1)
            self.assertRegex(program.errors(), rf"^No TLS at {LOOPBACK} port {port}: leave --tls out[^\n]*\n$")

    @needs_command("openssl", "openssl")
    def test_the_readmes_command_makes_a_certificate_that_does(self) -> None:
        readme = (pathlib.Path(SERVER).parent / "README.md").read_text()
        (command,) = (line for line in readme.splitlines() if line.startswith("    openssl req "))
        command = command.replace("chat.example.org", "localhost").replace("192.168.1.23", LOOPBACK)
        subprocess.run(command, shell=True, cwd=folder, check=True, timeout=SECONDS, capture_output=True)
        certificate, key = str(folder / "cert.pem"), str(folder / "key.pem")
        with Server("--host", "0.0.0.0", "--tls-cert", certificate, "--tls-key", key) as server:
            way = f"Others join with: python mychatclient.py --tls-ca {certificate}"
            server.expect(*(f"{way} {host} {server.port}" for host in HOSTS))
            for host in HOSTS:
                with client(server.port, "--tls-ca", certificate, host=host) as program:
                    program.expect(GREETING)
                    program.end_input()
                    self.assertEqual(program.wait(), 0)


class Door(TestCase):
    def test_whoever_is_in_the_room_has_no_place_at_the_door(self) -> None:
        """Or the oldest would have to go when as many have come as may wait."""
        with TlsServer(constants={"DOOR_PLACES": 2}) as server, contextlib.ExitStack() as stack:
            peers = [stack.enter_context(server.peer()) for _ in range(4)]
            peers[0].say("still here")
            for peer in peers[1:]:
                peer.expect(f"{peers[0].label}:still here")


class AtOnce(TestCase):
    def test_what_comes_with_the_last_word_of_the_handshake_is_heard(self) -> None:
        """A line, and TLS's own end, in one packet with it."""
        with TlsServer() as server, TlsPeer(LOOPBACK, server.port) as listener:
            listener.say("/who")
            self.assertTrue(listener.line().startswith(b"* 1 here"))
            received, output = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = context().wrap_bio(received, output, server_hostname="localhost")
            with socket.create_connection((LOOPBACK, server.port), SECONDS) as sock:
                label = sock.getsockname()[1]
                while True:
                    with contextlib.suppress(ssl.SSLWantReadError):
                        tls.do_handshake()
                        break
                    sock.sendall(output.read())
                    received.write(sock.recv(1 << 16))
                tls.write(b"all at once\n")
                with contextlib.suppress(ssl.SSLError):  # the server's own end has not come
                    tls.unwrap()
                sock.sendall(output.read())
                listener.expect(f"{label}:all at once")


class Plain(TestCase):
    """Who comes without TLS to a server that has it."""

    def test_is_told_once_and_closed(self) -> None:
        with TlsServer() as server, server.peer() as ann, server.peer() as bob:
            for words in ("hello\n", "GET / HTTP/1.0\r\n\r\n", "\x15\x03"):
                with Peer(LOOPBACK, server.port) as peer:
                    peer.send(words)
                    peer.expect(NEEDS_TLS)
                    peer.expect_end()
            with client(server.port) as program:
                program.send(b"hello\n")
                program.expect(GREETING, FAREWELL)
                self.assertEqual(program.wait(), 1)
                self.assertEqual(program.errors(), f"Connection lost: {mychatclient.NEEDS_TLS}\n")
            bob.say("fence")
            ann.expect(f"{bob.label}:fence")

    def test_who_only_listens_is_told_too(self) -> None:
        with TlsServer(constants={"HANDSHAKE_SECONDS": 0.5}) as server, Peer(LOOPBACK, server.port) as peer:
            peer.expect(NEEDS_TLS)
            peer.expect_end()


def hello() -> bytes:
    """Return what a client says first."""
    received, output = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context().wrap_bio(received, output, server_hostname="localhost").do_handshake()
    return output.read()


class Handshakes(TestCase):
    """Those that do not get through hold up nobody."""

    def test_a_byte_at_a_time_by_a_hundred_while_the_chat_runs(self) -> None:
        """The limit is one for the whole handshake, not for each byte."""
        text = hello()
        with TlsServer("--quiet", constants={"HANDSHAKE_SECONDS": 1.0}) as server, contextlib.ExitStack() as stack:
            ann, bob = (stack.enter_context(server.peer()) for _ in range(2))
            left = [stack.enter_context(Peer(LOOPBACK, server.port)) for _ in range(100)]
            for number in range(len(text)):
                for peer in list(left):
                    try:
                        peer.send(text[number : number + 1])
                    except OSError:  # closed
                        left.remove(peer)
                ann.say(f"{number}")
                bob.expect(f"{ann.label}:{number}")
                if not left:
                    break
                time.sleep(0.1)  # the pace is what is tested
            self.assertEqual(left, [])

    def test_hundreds_of_damaged_hellos(self) -> None:
        """However it is damaged, the server goes on, and keeps nothing of it."""
        dice = random.Random(8446)
        whole = hello()
        with TlsServer("--quiet") as server, server.peer() as ann, server.peer() as bob:
            threads = server.threads() if sys.platform == "linux" else 0
            for number in range(2_000 if LONG else 300):
                damaged = bytearray(whole)
                for _ in range(dice.choice((1, 1, 2, 5, 50))):
                    damaged[dice.randrange(1 if number % 2 else 9, len(damaged))] = dice.randrange(256)
                if number % 3 == 0:
                    del damaged[dice.randrange(len(damaged)) :]
                with Peer(LOOPBACK, server.port) as peer:
                    peer.send(bytes(damaged))
                    if number % 5:
                        peer.half_close()
                        peer.read_to_end()
            ann.say("still here")
            bob.expect(f"{ann.label}:still here")
            if threads:
                eventually(lambda: server.threads() == threads)

    def test_the_operator_kicks_whom_it_has_admitted_and_nobody_before(self) -> None:
        server = TlsServer("--operator", keep_input=True)
        with server, server.peer() as ann, Peer(LOOPBACK, server.port) as waiting:
            server.send(f"/kick {waiting.label}\n/kick {ann.label} go home\n".encode())
            server.expect(f"* nobody here is called '{waiting.label}'", f"* {ann.label} was kicked")
            self.assertEqual(ann.read_to_end(), b"* refused: kicked: go home\n")
            server.expect("Connection closed")

    def test_garbage_behind_a_good_handshake(self) -> None:
        """What was said before it is heard; it ends the connection of its sender alone, in mid-line as at a reset."""
        for version in VERSIONS:
            with self.subTest(version=version), TlsServer() as server, server.peer() as ann:
                with server.peer(version=version) as bob:
                    bob.send("before\nunfinished")
                    socket.socket.send(bob.socket, b"\x17\x03\x03\x00\x30" + b"garbage." * 6)  # perhaps in one read
                    ann.expect(f"{bob.label}:before")
                    with self.assertRaises(OSError):
                        while bob.socket.recv(1_000):
                            pass
                server.expect(f"{bob.label}:before", "Connection closed")
                with server.peer() as cid:
                    cid.say("fence")
                    ann.expect(f"{cid.label}:fence")

    def test_who_sends_much_without_any_text_in_it_is_let_go(self) -> None:
        """Half of a record counts alike."""
        with TlsServer(constants={"TLS_SILENT_BYTES": 1_000}) as server, server.peer() as bob:
            socket.socket.send(bob.socket, b"\x17\x03\x03\x40\x00" + bytes(1_000))
            server.expect("Connection closed")

    @needs_command("openssl", "openssl")
    def test_who_has_its_tls_answered_much_at_once_is_let_go(self) -> None:
        with TlsServer(constants={"TLS_OUTPUT_BYTES": 10}) as server:  # less than for one new key
            command = ("openssl", "s_client", "-connect", f"{LOOPBACK}:{server.port}", "-tls1_3")
            with Program(*command, keep_input=True) as program:
                program.send(b"K\n")
                eventually(lambda: "KEYUPDATE" in program.output.decode() + program.errors())
                server.line()
                program.send(b"K\n")  # when it comes the first is answered
                server.expect("Connection closed")

    @unittest.skipUnless(importlib.util.find_spec("cryptography"), "needs cryptography: python -m pip install trustme")
    def test_nothing_goes_out_in_plain_text_when_half_a_message_of_the_handshakes_kind_has_come(self) -> None:
        """It has hands shaken again, as far as the library tells: here it asks for new keys, RFC 8446, 4.6.3 and 5."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

        secrets = folder / "secrets"
        with TlsServer() as server, server.peer() as ann:
            with mock.patch.dict(os.environ, SSLKEYLOGFILE=str(secrets)):
                bob = server.peer(version=VERSIONS[1])
            found = re.search("^CLIENT_TRAFFIC_SECRET_0 \\S+ (\\S+)", secrets.read_text(), re.MULTILINE)
            assert found

            def derived(label: bytes, size: int) -> bytes:
                info = bytes([0, size, 6 + len(label)]) + b"tls13 " + label + b"\0"
                return HKDFExpand(hashes.SHA384(), size, info).derive(bytes.fromhex(found[1]))

            def record(number: int, content: bytes) -> bytes:
                head = b"\x17\x03\x03\0" + bytes([len(content) + 16])
                nonce = int.from_bytes(derived(b"iv", 12), "big") ^ number
                return head + AESGCM(derived(b"key", 32)).encrypt(nonce.to_bytes(12, "big"), content, head)

            with bob:
                socket.socket.send(bob.socket, record(0, b"ready\n\x17") + record(1, b"\x18\0\0\x01\x16"))
                ann.expect(f"{bob.label}:ready")
                ann.say("hidden")
                server.expect(f"{bob.label}:ready", f"{ann.label}:hidden")
                self.assertEqual(server.stop(), 0)
                received = b""
                while data := socket.socket.recv(bob.socket, 1_000):
                    received += data
                self.assertNotIn(b"hidden", received)

    @needs_command("openssl", "openssl")
    def test_new_keys_and_renegotiation_asked_for_by_openssl(self) -> None:
        """New keys are made, as often as asked for, in the middle of a flood; renegotiation is refused."""
        lines = numbered_lines(1_000)
        with TlsServer("--quiet") as server, server.peer() as ann:
            for version, letter, answer in (("-tls1_3", "K", "KEYUPDATE"), ("-tls1_2", "R", "RENEGOTIATING")):
                command = ("openssl", "s_client", "-connect", f"{LOOPBACK}:{server.port}", version)
                with Program(*command, keep_input=True) as program:
                    label = server.line().rpartition(" ")[2].rstrip(")")
                    for number in range(3):
                        program.send(f"{number}\n".encode())
                        ann.expect(f"{label}:{number}")
                        ann.send(lines)
                        program.send(f"{letter}\n".encode())
                        # Each time: of a command and a line in one read it would see the command alone.
                        eventually(
                            lambda: (program.output.decode() + program.errors()).split("\n").count(answer) > number  # noqa: B023
                        )
                        if letter == "R":
                            break
                        ann.send(lines)
                        eventually(lambda: program.output.endswith(as_heard(ann.label, lines)))
                    program.end_input()
                    server.expect("Connection closed")
            with server.peer() as bob:
                bob.say("still here")
                ann.expect(f"{bob.label}:still here")


class Records(TestCase):
    def test_a_message_without_newline_stays_one_line_however_little_of_a_record_is_read_at_once(self) -> None:
        """With --rate a handler reads 256 bytes: the rest of the record, decrypted already, is no silence."""
        with (
            TlsServer("--rate", "100", constants={"SILENCE_SECONDS": 0.3}) as server,
            server.peer() as ann,
            server.peer() as bob,
        ):
            bob.send("x" * 300)
            ann.expect(f"{bob.label}:{'x' * 300}")

    @unittest.skipUnless(sys.platform == "linux", "needs Linux: /proc tells of what is unread")
    def test_a_line_too_long_is_none_though_more_is_decrypted_at_once_than_was_read(self) -> None:
        with TlsServer() as server, server.peer() as ann, server.peer() as bob:
            assert isinstance(bob.socket, Secured)
            records = bob.socket.encrypted(b"fence\n" + b"x" * 70_000 + b"\n")
            socket.socket.sendall(bob.socket, records[:16_000])  # less than the first record
            eventually(lambda: not unread(server, bob))
            socket.socket.sendall(bob.socket, records[16_000:])
            bob.expect(mychatserver.LINE_TOO_LONG)
            bob.say("fence")
            ann.expect(*[f"{bob.label}:fence"] * 2)


class Flow(TestCase):
    """Who pours, who is slow, who leaves: as without TLS."""

    def setUp(self) -> None:
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        self.server = self.stack.enter_context(TlsServer("--quiet", constants={"FLOOR_SECONDS": 2}))
        self.background = Background()

    def peer(self, **options: Any) -> Peer:
        peer: Peer = self.stack.enter_context(self.server.peer(**options))
        return peer

    def test_twenty_talkers_line_by_line(self) -> None:
        """Each hears every line of every other once, whole and in order; half of them speak TLS 1.2."""
        peers = [self.peer(version=VERSIONS[number % 2]) for number in range(20)]
        heard_line_by_line(self, peers, self.background, 200)

    def test_a_slow_reader_in_a_flood_loses_nothing_and_one_that_stops_is_let_go(self) -> None:
        pourer, quick = self.peer(), self.peer()
        slow, stopped = self.peer(receive_buffer=65_536), self.peer(receive_buffer=8_192)
        before = self.server.memory() if sys.platform == "linux" else 0
        lines = numbered_lines(150_000)
        expected = as_heard(pourer.label, lines)
        self.background.run(pourer.send, lines)
        crawl = Listener(slow, self.background, MB, pace=400_000)
        listener = Listener(quick, self.background, len(expected))
        self.assertTrue(crawl.done.wait(SECONDS))
        crawl.check(expected[:MB])
        rest = Listener(slow, self.background, len(expected) - MB)
        self.server.expect("Connection closed")
        stopped.close()
        if before:
            self.assertLess(self.server.memory() - before, 40 * MB)
        self.background.join()
        rest.check(expected[MB:])
        listener.check(expected)

    def test_a_half_close_with_much_on_its_way_both_ways(self) -> None:
        """Who pours, then ends its side, is heard to its last line, and itself hears whole lines, and a clean end."""
        lines = numbered_lines(100_000)  # more than all buffers hold
        for version in VERSIONS:
            with self.subTest(version=version):
                ann, bob = (self.peer(version=version, receive_buffer=65_536) for _ in range(2))
                self.background.run(bob.send, lines)
                anns = Listener(bob, self.background, len(as_heard(ann.label, lines)))
                bobs: list[bytes] = []

                def hear(peer: Peer, parts: list[bytes]) -> None:
                    while data := peer.socket.recv(65_536):  # raises at an end that is not TLS's
                        parts.append(data)

                self.background.run(hear, ann, bobs)
                ann.send(lines)
                ann.half_close()
                self.background.join()
                anns.check(as_heard(ann.label, lines))
                heard = b"".join(bobs)
                self.assertTrue(as_heard(bob.label, lines).startswith(heard) and heard.endswith(b"\n"), len(heard))
                bob.close()  # or it would be a slow reader of what follows

    def test_what_was_queued_for_one_who_leaves_arrives_and_then_the_end(self) -> None:
        pourer, later = self.peer(), self.peer()
        leaver = self.peer(receive_buffer=8_192)
        lines = numbered_lines(30_000)
        expected = as_heard(pourer.label, lines)
        listener = Listener(later, self.background, len(expected))
        self.background.run(pourer.send, lines)
        self.assertTrue(listener.done.wait(SECONDS))
        leaver.send(b"exit\n" + numbered_lines(5_000))
        heard = b""
        while data := leaver.socket.recv(65_536):
            heard += data
        self.assertTrue(heard == expected, len(heard))

    def test_clients_in_pipes_go_at_full_speed(self) -> None:
        """And show what still comes after the end of their own input."""
        lines = numbered_lines(100_000)
        receiver, sender = (self.stack.enter_context(client(self.server.port, "--tls-ca", trust())) for _ in range(2))
        labels = {self.server.line().rpartition(" ")[2].rstrip(")") for _ in range(2)}
        self.background.run(sender.send, lines)
        receiver.wait_for_bytes(len(GREETING) + 1 + len(lines) + len("\n12345:") * 100_000)
        self.background.join()
        wanted = [as_heard(label, lines).replace(b"\n", b"\n\n")[:-1] for label in labels]
        self.assertTrue(receiver.output[len(GREETING) + 2 :] in wanted)
        for program in (sender, receiver):
            program.end_input()
            self.assertEqual(program.wait(), 0)
            self.assertTrue(program.output.endswith(f"\n{FAREWELL}\n".encode()))


class Locked(TestCase):
    """With a password, and with the places of those who have not finished the handshake."""

    def test_the_password_is_asked_for_inside(self) -> None:
        (folder / "password").write_text("secret\n")
        (folder / "wrong").write_text("wrong\n")
        known = ("--tls-ca", trust(), "--password-file")
        cheap = {"WRONG_SECONDS": 0.1}
        with TlsServer("--password-file", str(folder / "password"), constants=cheap) as server:
            with client(server.port, *known, str(folder / "wrong")) as program:
                self.assertEqual((program.wait(), program.output), (1, b""))
                self.assertIn("Wrong password: ", program.errors())
            with Program(*command_of(CLIENT, ASKED), *known[:2], LOOPBACK, str(server.port)) as program:
                self.assertEqual(program.wait(), 1)
                self.assertIn("A password is asked for", program.errors())
            with client(server.port, *known, str(folder / "password")) as ann:
                ann.expect(GREETING)
                with client(server.port, *known, str(folder / "password")) as bob:
                    bob.send(b"x" * 60_000 + b"\n" + b"Hi!\n" * 1_000)
                    bob.end_input()
                    self.assertEqual(bob.wait(), 0)
                    self.assertEqual(bob.output.decode(), f"{GREETING}\n{FAREWELL}\n")
                for text in ("x" * 60_000, *(["Hi!"] * 1_000)):
                    ann.expect("")
                    self.assertEqual(ann.line().partition(":")[2], text)
        with TlsServer() as server, client(server.port, *known, str(folder / "password")) as program:
            program.expect(GREETING)
            self.assertEqual(program.errors(), "")

    def test_who_has_not_finished_the_handshake_makes_room(self) -> None:
        with TlsServer(constants={"DOOR_PLACES": 1}) as server, Peer(LOOPBACK, server.port) as silent:
            silent.send(hello()[:9])
            with client(server.port, "--tls-ca", trust()) as program:
                program.expect(GREETING)
                silent.expect("* refused: too many are waiting to enter")
                silent.expect_end()


class Ends(TestCase):
    """TLS has an end of its own: TCP's alone, which anyone on the way could send, is a lost connection."""

    def test_truncation_at_the_server(self) -> None:
        """What is not ended by the peer itself is not relayed, as at a reset; what is, is."""
        with TlsServer() as server, server.peer() as ann:
            for version in VERSIONS:
                with server.peer(version=version) as bob:
                    bob.send("whole\nunfinished")
                    ann.expect(f"{bob.label}:whole")
                    bob.socket.shutdown(socket.SHUT_RDWR)
                with server.peer(version=version) as cid:
                    cid.send("whole\nlast")
                    cid.half_close()
                    ann.expect(f"{cid.label}:whole", f"{cid.label}:last")
                    self.assertEqual(cid.socket.recv(1), b"")

    def serve(
        self, version: ssl.TLSVersion, ends: Callable[[ssl.SSLSocket], object]
    ) -> Callable[[socket.socket], None]:
        """Return what speaks TLS as a server, says a line, hears another, and ends in that way."""
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(pem("good"))
        tls.minimum_version = tls.maximum_version = version

        def serve(connection: socket.socket) -> None:
            with tls.wrap_socket(connection, server_side=True) as secured:
                secured.sendall(b"1234:hello\n")
                self.assertEqual(secured.recv(100), b"hello\n")
                secured.sendall(b"1234:last\n")
                ends(secured)

        return serve

    def test_truncation_at_the_client(self) -> None:
        def say_end(secured: ssl.SSLSocket) -> None:
            with contextlib.suppress(OSError):  # it waits for the client's own end, and is told that there is none
                secured.unwrap()

        for version in VERSIONS:
            for ends, reason in (
                (lambda secured: None, "it was cut off, without TLS's own end; check the network"),
                (say_end, "the server closed the connection"),
            ):
                with (
                    self.subTest(version=version, reason=reason),
                    home_made_server(self.serve(version, ends)) as port,
                    client(port, "--tls-ca", trust()) as program,
                ):
                    program.expect(GREETING, "", "1234:hello")
                    program.send(b"hello\n")
                    program.expect("", "1234:last", FAREWELL)
                    self.assertEqual(program.wait(), 1)
                    self.assertRegex(program.errors(), f"^Connection lost: {reason}[^\n]*\n$")

    def test_truncation_after_exit_is_none_of_our_business(self) -> None:
        for ending in ("exit", "/quit"):
            with (
                home_made_server(self.serve(VERSIONS[1], lambda secured: secured.recv(100))) as port,
                client(port, "--tls-ca", trust()) as program,
            ):
                program.expect(GREETING, "", "1234:hello")
                program.send(b"hello\n")
                program.expect("", "1234:last")
                program.send(f"{ending}\n".encode())
                program.expect(FAREWELL)
                self.assertEqual((program.wait(), program.errors()), (0, ""))

    def test_when_a_send_fails_what_had_come_is_still_shown(self) -> None:
        lines = b"1234:last\n" * 10_000

        def ends(secured: ssl.SSLSocket) -> None:
            secured.sendall(lines)
            socket.socket.shutdown(secured, socket.SHUT_RDWR)

        with home_made_server(self.serve(VERSIONS[1], ends)) as port, client(port, "--tls-ca", trust()) as program:
            program.send(b"hello\n")
            program.expect(GREETING, "", "1234:hello", "", "1234:last")
            with contextlib.suppress(OSError):  # the client ends first, perhaps
                while True:
                    program.send(b"more\n" * 1_000)
            self.assertEqual(program.wait(), 1)
            self.assertEqual(program.output.count(b"1234:last\n"), 10_001)

    def test_garbage_behind_a_line_is_a_lost_connection_and_the_line_is_shown(self) -> None:
        def ends(secured: ssl.SSLSocket) -> None:
            secured.sendall(b"1234:really\n")
            socket.socket.send(secured, b"\x17\x03\x03\x00\x30" + b"garbage." * 6)

        with home_made_server(self.serve(VERSIONS[1], ends)) as port, client(port, "--tls-ca", trust()) as program:
            program.send(b"hello\n")
            program.expect(GREETING, "", "1234:hello", "", "1234:last", "", "1234:really", FAREWELL)
            self.assertEqual(program.wait(), 1)
            self.assertRegex(program.errors(), "^Connection lost: [^\n]+\n$")

    def test_why_tls_fails_between_the_handshake_and_the_chat(self) -> None:
        """When a server would ask for its password, or demands a certificate of the client."""
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(pem("good"))

        def cut(connection: socket.socket) -> None:
            tls.wrap_socket(connection, server_side=True).close()

        def garble(connection: socket.socket) -> None:
            with tls.wrap_socket(connection, server_side=True) as secured:
                socket.socket.send(secured, b"\x17\x03\x03\x00\x30" + b"garbage." * 6)
                with contextlib.suppress(OSError):
                    secured.recv(100)

        for serve, reason in (cut, "it was cut off, without TLS's own end"), (garble, "TLS failed: [A-Z_]+"):
            with (
                self.subTest(reason),
                home_made_server(serve) as port,
                Program(*command_of(CLIENT, ASKED), "--tls-ca", trust(), LOOPBACK, str(port)) as program,
            ):
                self.assertEqual(program.wait(), 1)
                self.assertRegex(program.errors(), f"^Cannot reach {LOOPBACK} port {port}: {reason}; check [^\n]+\n$")

    def test_what_comes_with_the_handshakes_end_is_shown_at_once(self) -> None:
        """In TLS 1.2 a server ends the handshake, and may speak in the same packet."""
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(pem("good"))
        tls.maximum_version = ssl.TLSVersion.TLSv1_2

        def serve(connection: socket.socket) -> None:
            received, output = ssl.MemoryBIO(), ssl.MemoryBIO()
            server = tls.wrap_bio(received, output, server_side=True)
            while True:
                received.write(connection.recv(65_536))
                try:
                    server.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    connection.sendall(output.read())
            server.write(b"1234:at once\n")
            connection.sendall(output.read())
            connection.recv(100)  # nothing more is said until the client has shown this

        with home_made_server(serve) as port, client(port, "--tls-ca", trust()) as program:
            program.expect(GREETING, "", "1234:at once")

    def test_who_sends_and_closes_at_once_is_heard(self) -> None:
        """Nothing of the handshake is left for it to read, or its close would be a reset, and undo what it has sent."""
        lines = numbered_lines(2_000)
        with TlsServer("--quiet") as server, server.peer() as ann:
            for _ in range(20):
                with TlsPeer(LOOPBACK, server.port) as peer:
                    peer.send(lines)
                    peer.half_close()
                ann.expect(*as_heard(peer.label, lines).split(b"\n")[:-1])

    def test_a_stop_is_a_clean_end(self) -> None:
        with TlsServer() as server, server.peer() as ann:
            ann.say("last")
            server.expect(f"{ann.label}:last")
            server.process.terminate()
            self.assertEqual(ann.socket.recv(1), b"")
            ann.close()
            self.assertEqual(server.wait(), 0)

    def test_a_client_in_a_terminal_comes_back(self) -> None:
        """A quiet server lets it in: that it says nothing is no reason to wait."""
        port = free_port()
        command = command_of(CLIENT, {"RECONNECT_SECONDS": 0.2})
        command += ("--no-color", "--reconnect", "--name", "ann", "--tls-ca", trust())
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(TlsServer("--port", str(port)))
            terminal = stack.enter_context(Terminal(*command, LOOPBACK, str(port)))
            terminal.wait_for("is now ann\n")
            terminal.type("half")
            eventually(lambda: terminal.drawn().endswith("half"))
            server.process.kill()
            server.process.wait()
            terminal.wait_for("\n* connection lost, trying again\nhalf")
            server = stack.enter_context(TlsServer("--port", str(port)))
            terminal.wait_for("* connected again\n", within=True)
            terminal.wait_for(" is now ann\nhalf")
            with server.peer() as bob:
                terminal.type(" done\r")
                bob.expect("ann:half done")
            terminal.type("exit\r")
            self.assertEqual(terminal.wait(), 0)
