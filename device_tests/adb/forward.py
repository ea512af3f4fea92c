"""A local port that leads to one on the device, each of its connections over a link of its own.

How a link is made is not known here.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from adb_shell import constants

from device_tests.adb.link import Deadline, Link, Stream, TimedOut
from quantize.errors import DeviceError

OPEN_TIMEOUT_S = 10.0


class Forwarder(AbstractContextManager["Forwarder"]):
    """A listener on loopback; each connection gets a link and a stream of its own."""

    def __init__(self, connected: Callable[[], Link], remote: str) -> None:
        self._connected = connected
        self._service = remote.encode("utf-8", "replace")
        self._open: set[socket.socket | Link] = set()
        self._lock = threading.Lock()
        self._ended = False
        try:
            self._listener = socket.create_server(("127.0.0.1", 0))
        except OSError as error:
            raise DeviceError(f"no local port is to be had ({error}): close other programs") from (
                error
            )
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._ended = True
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
            self._listener.close()
            for end in list(self._open):
                _shut(end)
        self._thread.join(timeout=5)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _keep(self, end: socket.socket | Link) -> bool:
        with self._lock:
            if self._ended:
                _shut(end)
                return False
            self._open.add(end)
            return True

    def _carry(self, client: socket.socket) -> None:
        """Both directions of one connection. An error can only be told by closing it."""
        ends: list[socket.socket | Link] = [client]
        try:
            if not self._keep(client):
                return
            link = self._connected()
            ends.append(link)
            if not self._keep(link):
                return
            stream = _DuplexStream(link, self._service)
            sender = threading.Thread(target=stream.send_all, args=(client,), daemon=True)
            sender.start()
            stream.receive_all(client)
        except (DeviceError, TimedOut, OSError):
            return
        finally:
            for end in ends:
                _shut(end)
            with self._lock:
                self._open.difference_update(ends)


class _DuplexStream(Stream):
    """A stream of which one thread reads while another writes."""

    _FOREVER_S = 7 * 24 * 3600.0

    def __init__(self, link: Link, service: bytes) -> None:
        super().__init__(link, service, Deadline(OPEN_TIMEOUT_S))
        self._taken = threading.Semaphore(0)
        self._stop = False

    def send_all(self, client: socket.socket) -> None:
        """Local to device, until the local end closes; then the stream is closed as adb does."""
        deadline = Deadline(self._FOREVER_S)
        with contextlib.suppress(DeviceError, TimedOut, OSError):
            while data := client.recv(min(65536, self.link.max_packet_bytes)):
                self.link.send(constants.WRTE, self._local, self._remote, data, deadline)
                self._taken.acquire()
                if self._stop:
                    return
            self.close(deadline)
        _shut(client)

    def receive_all(self, client: socket.socket) -> None:
        """Device to local, until the device closes."""
        deadline = Deadline(self._FOREVER_S)
        try:
            while True:
                packet = self._next(deadline)
                if packet.command == constants.CLSE:
                    return
                if packet.command == constants.OKAY:
                    self._taken.release()
                    continue
                client.sendall(packet.data)
                self.link.send(constants.OKAY, self._local, self._remote, b"", deadline)
        finally:
            self._stop = True
            self._taken.release()


def _shut(end: socket.socket | Link) -> None:
    if isinstance(end, Link):
        end.close()
        return
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
