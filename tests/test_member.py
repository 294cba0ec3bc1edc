"""The server's parts without a server: what waits for a peer, and what one round of the room takes along."""

from __future__ import annotations

import tracemalloc

from tests.support import Background, Console, TestCase, eventually, new_client, new_room


class Outbox(TestCase):
    """What a peer that does not read is given."""

    def growth(self, size: int, pieces: list[bytes], clients: int = 1) -> int:
        """Give views of these pieces to clients whose peers do not read; return the bytes of memory this takes."""
        members = []
        for _ in range(clients):
            client, peer = new_client()
            self.addCleanup(peer.close)
            self.addCleanup(client.close)
            client.give([memoryview(bytes(1 << 20))])  # more than a socket takes
            members.append(client)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for piece in pieces:
            for client in members:
                self.assertGreater(client.give([memoryview(piece)]), 0)
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return grown - size

    def test_small_pieces_take_little_more_memory_than_their_bytes(self) -> None:
        """As objects of their own they would take twenty times as much."""
        self.assertLess(self.growth(200_000, [b"x" * 10] * 20_000), 200_000)

    def test_what_many_are_given_is_in_memory_once(self) -> None:
        self.assertLess(self.growth(0, [bytes(100_000) for _ in range(10)], clients=20), 100_000)


class Turn(TestCase):
    """Who has the turn relays for all."""

    def test_during_a_round_one_waits_for_the_turn_and_the_rest_put_down_what_they_say_and_go_on(self) -> None:
        """The next round takes it all along: one send a member."""
        console, background = Console(), Background()
        room = new_room(console)
        clients, peers = zip(*(new_client(port) for port in range(1, 32)))
        for client, peer in zip(clients, peers):
            self.addCleanup(peer.close)
            self.addCleanup(client.close)
            room.join(client)
        console.free.clear()
        talking = [background.run(room.relay, clients[0], b"first\n")]
        eventually(lambda: console.given)
        talking += [background.run(room.relay, client, b"x\n") for client in clients[1:]]
        eventually(lambda: sum(thread.is_alive() for thread in talking) == 2)
        console.free.set()
        background.join()
        first, rest = console.given
        self.assertEqual(first, b"1:first\n")
        self.assertEqual(sorted(rest.split()), sorted(b"%d:x" % port for port in range(2, 32)))
        for port, peer in enumerate(peers, 1):
            others = [line for line in (first, *rest.splitlines(True)) if not line.startswith(b"%d:" % port)]
            self.assertEqual(peer.recv(1 << 16), b"".join(others))
