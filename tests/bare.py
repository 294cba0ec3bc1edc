"""A relay that does nothing else, to show what the load of the benchmark can bear: one thread, no lines, no labels.

Run as a program: prints the port that it listens on, serves until it is ended. What it reads goes to all others as it
is; a slow reader holds up everyone.
"""

from __future__ import annotations

import selectors
import socket


def main() -> None:
    """Serve on a free port."""
    clients: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0), backlog=65_535) as listener, selectors.DefaultSelector() as selector:
        print(listener.getsockname()[1], flush=True)
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is listener:
                    client, _ = listener.accept()
                    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    clients.append(client)
                    selector.register(client, selectors.EVENT_READ)
                elif data := sock.recv(65_536):
                    for client in clients:
                        if client is not sock:
                            client.sendall(data)
                else:
                    selector.unregister(sock)
                    clients.remove(sock)
                    sock.close()


if __name__ == "__main__":
    main()
