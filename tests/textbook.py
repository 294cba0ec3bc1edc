"""The chat server of the textbooks, to measure against: a thread a client, small reads, a send to everyone else.

Run as a program: prints the port that it listens on, serves until it is ended. It neither cuts lines nor bounds
anything: who reads slowly holds up all others.
"""

from __future__ import annotations

import contextlib
import socket
import threading


def handle(sock: socket.socket, port: int, clients: list[socket.socket], lock: threading.Lock) -> None:
    """Give what one client sends to all others, until it leaves."""
    try:
        while data := sock.recv(1024):
            message = f"{port}:".encode() + data
            with lock:
                for client in clients:
                    if client is not sock:
                        client.sendall(message)
    except OSError:  # the client, or one that it talked to, is gone
        pass
    with lock:
        clients.remove(sock)
    sock.close()


def main() -> None:
    """Serve on a free port."""
    clients: list[socket.socket] = []
    lock = threading.Lock()
    with socket.create_server(("127.0.0.1", 0), backlog=65_535) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            sock, address = listener.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with lock:
                clients.append(sock)
            threading.Thread(target=handle, args=(sock, address[1], clients, lock), daemon=True).start()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
