"""A local port that leads to one on the device, each of its connections by a stream of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager

from device_tests.adb.opener import ByteStream, Deadline, Opener, TimedOut
from quantize.errors import DeviceError

OPEN_TIMEOUT_S = 10.0
_FOREVER_S = 7 * 24 * 3600.0
_LOCAL_BYTES = 65536


class Forwarder(AbstractContextManager["Forwarder"]):
    """A listener on loopback; each of its connections is carried to `remote` on the device."""

    def __init__(self, opener: Opener, remote: str) -> None:
        self._opener = opener
        self._service = remote.encode("utf-8", "replace")
        self._open: set[socket.socket | ByteStream] = set()
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
            _shut(self._listener)  # wakes accept
            for end in self._open:
                _shut(end)
        self._thread.join(timeout=5)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        """Both directions of one connection. An error is shown by closing it, as adb does."""
        deadline = Deadline(_FOREVER_S)
        with contextlib.suppress(DeviceError, TimedOut, OSError), self._kept(client):
            stream = self._opener.open_apart(self._service, Deadline(OPEN_TIMEOUT_S))
            with self._kept(stream):
                threading.Thread(target=_send_all, args=(client, stream), daemon=True).start()
                while data := stream.read(deadline):
                    client.sendall(data)

    @contextlib.contextmanager
    def _kept(self, end: socket.socket | ByteStream) -> Iterator[None]:
        """Closed after the block, or when all is ended."""
        with self._lock:
            if self._ended:
                _shut(end)
            self._open.add(end)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(end)
                _shut(end)


def _send_all(client: socket.socket, stream: ByteStream) -> None:
    """Local to device, until the local end closes; adb has no closing of one direction."""
    deadline = Deadline(_FOREVER_S)
    with contextlib.suppress(DeviceError, TimedOut, OSError):
        while data := client.recv(min(_LOCAL_BYTES, stream.best_write_bytes)):
            if not stream.write(data, deadline):
                break
    stream.close()


def _shut(end: socket.socket | ByteStream) -> None:
    if isinstance(end, socket.socket):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    end.close()
