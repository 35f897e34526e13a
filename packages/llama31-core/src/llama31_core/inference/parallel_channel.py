"""Messages between the rank that schedules and the ranks that follow it: Python values over TCP, and an end for all
when one of them is gone.

The collectives of a model carry tensors whose shapes all ranks know; what a step is to compute is plain lists, which go
this way. The connection is authenticated by a key that only the ranks of one run have.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

_GONE = object()


def end_process(peer: str) -> None:
    """Say which peer is gone and end at once: the main thread may wait in a collective that nobody will join."""
    print(f"llama31-core: error: {peer} has ended; this rank ends too, the log of that one says why", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)


class Peer:
    """One connection. A thread reads it, so that an end is noticed whatever the process is doing.

    Args:
        connection: to the other rank.
        name: of it, for messages.
        on_lost: called with the name, in that thread, when the other side has ended without a farewell.
    """

    def __init__(self, connection: Connection[Any, Any], name: str, on_lost: Callable[[str], None] = end_process):
        self._connection = connection
        self._name = name
        self._on_lost = on_lost
        self._closing = threading.Event()
        self._has_farewell = False
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._targets: Sequence[Peer] = ()
        threading.Thread(target=self._read, name=f"from {name}", daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                break
            for target in self._targets:
                target.send(message)
            if not self._targets:
                self._messages.put(message)
            if message is None:
                return
        self._messages.put(_GONE)
        if not self._closing.is_set():
            self._on_lost(self._name)
        if not self._has_farewell:  # who was told to end leaves the others to be told, too
            for target in self._targets:
                target.close()

    def pass_on(self, targets: Sequence[Peer]) -> None:
        """Have everything that comes go to other peers, with no `receive`; when this one ends, so do they. To be said
        before anything can come, and nobody else may send to them meanwhile."""
        self._targets = targets

    def send(self, message: Any) -> None:
        """Send a value; None is the farewell."""
        if message is None:
            self._has_farewell = True
            self._closing.set()
        try:
            self._connection.send(message)
        except OSError:
            if not self._closing.is_set():
                self._on_lost(self._name)

    def receive(self) -> Any:
        """The next value; None is the farewell.

        Raises:
            EOFError: the other side has ended.
        """
        message = self._messages.get()
        if message is _GONE:
            self._messages.put(_GONE)
            raise EOFError(f"{self._name} has ended")
        return message

    def close(self) -> None:
        """End the connection."""
        self._closing.set()
        with suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as both_ways:
            both_ways.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads
        self._connection.close()


class Hub:
    """The side that others connect to.

    Args:
        host: the address to listen at.
        key: that connections must prove to know.
    """

    def __init__(self, host: str, key: bytes) -> None:
        self._listener = Listener((host, 0), backlog=128, authkey=key)
        self.port: int = self._listener.address[1]
        self.peers: dict[int, Peer] = {}

    def accept(self, ranks: Sequence[int], on_lost: Callable[[str], None] = end_process) -> None:
        """Wait until all these ranks have connected; who does not know the key is turned away."""
        while len(self.peers) < len(ranks):
            try:
                connection = self._listener.accept()
                rank = connection.recv()
            except (AuthenticationError, EOFError):
                continue  # a stranger
            self.peers[rank] = Peer(connection, f"rank {rank}", on_lost)
        self._listener.close()

    def close(self) -> None:
        """Say farewell to all."""
        for peer in self.peers.values():
            peer.send(None)


def connect(host: str, port: int, key: bytes, rank: int, on_lost: Callable[[str], None] = end_process) -> Peer:
    """The connection of a rank to the hub."""
    connection = Client((host, port), authkey=key)
    connection.send(rank)
    return Peer(connection, "rank 0", on_lost)
