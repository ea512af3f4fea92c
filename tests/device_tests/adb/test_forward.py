"""Ports that lead to a device, by both ways, on the double and on the real adbd."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.support.adb_ways import Device


@pytest.fixture
def echo_port() -> Iterator[int]:
    """A server that sends back what it gets, until it gets nothing more."""

    def echo(client: socket.socket) -> None:
        with client:
            while data := client.recv(65536):
                client.sendall(data)

    def serve() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=echo, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def test_forwarded_port_carries_both_directions_of_several_connections(
    device: Device, echo_port: int
) -> None:
    data = os.urandom(500_000)
    with device.transport.forward(f"tcp:{echo_port}") as port:
        clients = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(3)]
        for client in clients:
            sender = threading.Thread(target=client.sendall, args=(data,), daemon=True)
            sender.start()
            got = b""
            while len(got) < len(data):
                got += client.recv(65536)
            assert got == data
            sender.join()
        assert device.transport.shell("echo meanwhile").stdout == b"meanwhile\n"
        for client in clients:
            client.close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_forwarded_port_closes_where_nobody_listens(device: Device) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = taken.getsockname()[1]
    with (
        device.transport.forward(f"tcp:{nobody}") as port,
        socket.create_connection(("127.0.0.1", port), timeout=20) as client,
    ):
        assert client.recv(1) == b""
