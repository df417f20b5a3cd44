"""A network in front of PostgreSQL that goes dead: what crosses it then is neither answered nor refused."""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from urllib.parse import urlsplit, urlunsplit

_ATTACH_FILTER = 26  # SO_ATTACH_FILTER, which Python does not name
# One BPF instruction: return 0, so the kernel drops every segment that comes in and acknowledges none.
_DROP = struct.pack("HBBI", 0x06, 0, 0, 0)


class Wire:
    """Passes bytes on to a server. Linux only."""

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        Thread(target=self._accept, daemon=True).start()

    def url(self, query: str) -> str:
        """The server's URL by way of this wire."""
        login = self._parts.netloc.rpartition("@")[0]
        netloc = f"{login}@127.0.0.1:{self._listener.getsockname()[1]}"
        return urlunsplit(self._parts._replace(netloc=netloc, query=query))

    def cut(self) -> None:
        """The clients there are hear nothing any more, not even that the connection ended; new ones get through."""
        pairs, self._pairs = self._pairs, []
        program = ctypes.create_string_buffer(_DROP)
        for client, server in pairs:
            option = struct.pack("HxxxxxxP", 1, ctypes.addressof(program))
            client.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, option)
            server.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((self._parts.hostname, self._parts.port))
                self._pairs.append((client, server))
                for pair in ((client, server), (server, client)):
                    Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        # The end of one that was cut is kept to ourselves.
        if any(source in pair for pair in self._pairs):
            with suppress(OSError):
                sink.shutdown(socket.SHUT_WR)


@contextmanager
def wire(url: str) -> Iterator[Wire]:
    """A wire to the server of `url`, as long as the block lasts."""
    made = Wire(url)
    try:
        yield made
    finally:
        made.close()
