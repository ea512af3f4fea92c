"""A double of an adb device for what the real adbd here cannot do: authentication and faults.

It speaks adb's packets on a loopback port, runs commands by `sh -c` on this machine, and knows
shell (v1 and v2), exec, sync (v1) and tcp. It is checked against the real adb client and adbd.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
import signal
import struct
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa, utils

HEADER = struct.Struct("<6I")
VERSION, MAX_DATA = 0x01000001, 256 * 1024
Authentication = Literal["none", "known", "ask", "refuse", "silent"]


@dataclass
class Faults:
    """What goes wrong; counts are bytes of both directions of one connection, each fires once."""

    cut_after: int | None = None
    """The connection ends."""
    stall_after: int | None = None
    """Nothing is answered any more on that connection."""
    corrupt_after: int | None = None
    """One bit of the next data that comes is turned."""
    malformed: bytes | None = None
    """Sent in place of the next packet after the greeting."""
    fired: list[str] = field(default_factory=list)


@dataclass
class AdbDouble:
    """One device; commands run in `folder`. Start it with `running`."""

    folder: Path
    authentication: Authentication = "none"
    known_keys: set[bytes] = field(default_factory=set)
    """Public keys as in `adbkey.pub`, their first word."""
    features: str = "shell_v2,cmd"
    model: str = "Double"
    version: int = VERSION
    faults: Faults = field(default_factory=Faults)
    port: int = 0
    asked: list[bytes] = field(default_factory=list)
    """Public keys that the person was asked about."""
    connections: int = 0
    _children: set[asyncio.subprocess.Process] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @contextmanager
    def running(self) -> Iterator[AdbDouble]:
        """Listen on a free loopback port, or on `port` if it is set, in a thread of its own."""
        started, stop = threading.Event(), self._stop
        errors: list[OSError] = []

        async def serve() -> None:
            try:
                server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
                self.port = server.sockets[0].getsockname()[1]
            except OSError as error:
                errors.append(error)
                return
            finally:
                started.set()
            while not stop.is_set():
                await asyncio.sleep(0.01)
            server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for child in self._children:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child._transport.close()  # its pipes may be full, then wait() would not end

        thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
        thread.start()
        started.wait()
        if errors:
            raise errors[0]
        self._thread = thread
        try:
            yield self
        finally:
            self.stop()

    def stop(self) -> None:
        """End it, with all its connections and commands."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        connection = _Connection(self, reader, writer)
        try:
            await connection.serve()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            for stream in list(connection.streams.values()):
                stream.task.cancel()
            writer.close()
            self._tasks.discard(task)

    def trusts(self, signature: bytes, token: bytes) -> bool:
        """Whether a known key made the signature (PKCS #1 v1.5, the token taken as a SHA-1)."""
        for key in self.known_keys:
            with contextlib.suppress(InvalidSignature):
                _public_key(key).verify(
                    signature, token, padding.PKCS1v15(), utils.Prehashed(hashes.SHA1())
                )
                return True
        return False


def _public_key(key: bytes) -> rsa.RSAPublicKey:
    """Android's structure: words, n0inv, modulus and R² little-endian, exponent."""
    _, _, modulus, _, exponent = struct.unpack("<II256s256sI", base64.b64decode(key))
    return rsa.RSAPublicNumbers(exponent, int.from_bytes(modulus, "little")).public_key()


class _Cut(ConnectionError):
    pass


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """`work` goes on until the block ends; a connection that breaks ends it quietly."""

    async def run() -> None:
        with contextlib.suppress(ConnectionError):
            await work

    task = asyncio.create_task(run())
    try:
        yield
    finally:
        task.cancel()


class _Stream:
    """One open service: what the host wrote, and the right to write."""

    def __init__(self, connection: _Connection, local: int, remote: int) -> None:
        self.connection, self.local, self.remote = connection, local, remote
        self.incoming: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.taken = asyncio.Semaphore(1)
        self.task: asyncio.Task[None]
        self._buffer = b""

    async def write(self, data: bytes) -> None:
        for at in range(0, len(data), self.connection.max_data):
            await self.taken.acquire()
            piece = data[at : at + self.connection.max_data]
            await self.connection.send(b"WRTE", self.local, self.remote, piece)

    async def read(self, count: int) -> bytes:
        """Exactly `count` bytes, or b"" at the end."""
        while len(self._buffer) < count:
            data = await self.incoming.get()
            if data is None:
                return b""
            self._buffer += data
            await self.connection.send(b"OKAY", self.local, self.remote)
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    async def pieces(self) -> AsyncIterator[bytes]:
        while (data := await self.incoming.get()) is not None:
            yield data
            await self.connection.send(b"OKAY", self.local, self.remote)


class _Connection:
    def __init__(
        self, device: AdbDouble, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.device, self.reader, self.writer = device, reader, writer
        self.streams: dict[int, _Stream] = {}
        self.max_data = MAX_DATA
        self.version = device.version
        self._ids = itertools.count(1)
        self._moved = 0
        self._greeted = False
        self._stalled = False

    async def serve(self) -> None:
        while True:
            command, arg0, arg1, data = await self._receive()
            if command == b"CNXN":
                self.version, self.max_data = min(arg0, self.device.version), min(arg1, MAX_DATA)
                await self._authenticate()
                banner = (
                    f"device::ro.product.name=double;ro.product.model={self.device.model};"
                    f"ro.product.device=double;features={self.device.features}"
                )
                await self.send(b"CNXN", self.device.version, MAX_DATA, banner.encode())
                self._greeted = True
            elif command == b"OPEN":
                self._open(arg0, data.rstrip(b"\0").decode("utf-8", "surrogateescape"))
            elif (stream := self.streams.get(arg1)) is None:
                if command == b"WRTE":
                    await self.send(b"CLSE", 0, arg0)
            elif command == b"WRTE":
                stream.incoming.put_nowait(data)
            elif command == b"OKAY":
                stream.taken.release()
            elif command == b"CLSE":
                stream.incoming.put_nowait(None)
                del self.streams[arg1]
                await self.send(b"CLSE", 0, arg0)

    async def _authenticate(self) -> None:
        if self.device.authentication == "none":
            return
        while True:
            token = os.urandom(20)
            await self.send(b"AUTH", 1, 0, token)
            command, kind, _, data = await self._receive()
            if command != b"AUTH":
                raise _Cut("not an AUTH")
            if kind == 2 and self.device.trusts(data, token):
                return
            if kind == 3:
                key = data.rstrip(b"\0").split()[0]
                self.device.asked.append(key)
                if self.device.authentication == "ask":  # the person presses "Allow"
                    self.device.known_keys.add(key)
                    return
                if self.device.authentication == "silent":  # nobody looks at the screen
                    await asyncio.Event().wait()
                raise _Cut("the person refused")

    async def _receive(self) -> tuple[bytes, int, int, bytes]:
        number, arg0, arg1, length, total, magic = HEADER.unpack(
            await self._read_exactly(HEADER.size)
        )
        data = await self._read_exactly(length)
        if number ^ 0xFFFFFFFF != magic or length > 1024 * 1024:
            raise _Cut("a malformed header")
        if self.version < VERSION and sum(data) & 0xFFFFFFFF != total:
            raise _Cut("a wrong checksum")
        if number == int.from_bytes(b"WRTE", "little") and self._fires("corrupt_after"):
            data = data[:-1] + bytes([data[-1] ^ 0x10])
        return number.to_bytes(4, "little"), arg0, arg1, data

    async def _read_exactly(self, count: int) -> bytes:
        data = await self.reader.readexactly(count)
        await self._count(count)
        return data

    async def send(self, command: bytes, arg0: int, arg1: int, data: bytes = b"") -> None:
        number = int.from_bytes(command, "little")
        total = sum(data) & 0xFFFFFFFF if self.version < VERSION else 0
        packet = HEADER.pack(number, arg0, arg1, len(data), total, number ^ 0xFFFFFFFF) + data
        if self._greeted and self.device.faults.malformed is not None:
            packet, self.device.faults.malformed = self.device.faults.malformed, None
            self.device.faults.fired.append("malformed")
        await self._count(len(packet))
        self.writer.write(packet)
        await self.writer.drain()

    def _fires(self, name: str) -> bool:
        limit = getattr(self.device.faults, name)
        if limit is None or self._moved < limit:
            return False
        setattr(self.device.faults, name, None)
        self.device.faults.fired.append(name)
        return True

    async def _count(self, count: int) -> None:
        self._moved += count
        if self._fires("cut_after"):
            self.writer.transport.abort()
            raise _Cut("cut")
        if self._stalled or self._fires("stall_after"):
            self._stalled = True
            await asyncio.Event().wait()

    def _open(self, host_id: int, service: str) -> None:
        """Start the service in a task; answer OKAY, or CLSE where there is no such service."""
        local = next(self._ids)
        stream = _Stream(self, local, host_id)
        name, _, argument = service.partition(":")
        name, *options = name.split(",")
        if name == "shell":  # its options go up to the command's colon
            run = self._shell_v2 if "v2" in options else self._shell_v1
        else:
            services: dict[str, Callable] = {
                "exec": self._shell_v1,
                "sync": self._sync,
                "tcp": self._tcp,
            }
            if name not in services:
                stream.task = asyncio.create_task(self.send(b"CLSE", 0, host_id))
                return
            run = services[name]
        self.streams[local] = stream
        stream.task = asyncio.create_task(self._run(stream, run, argument))

    async def _run(self, stream: _Stream, run: Callable, argument: str) -> None:
        if run != self._tcp:
            await self.send(b"OKAY", stream.local, stream.remote)
        try:
            await run(stream, argument)
        except ConnectionError:
            return
        if self.streams.pop(stream.local, None) is not None:
            await self.send(b"CLSE", stream.local, stream.remote)

    async def _start(self, command: str, stderr: int) -> asyncio.subprocess.Process:
        child = await asyncio.create_subprocess_exec(
            *("sh", "-c", command),
            cwd=self.device.folder,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
        self.device._children.add(child)
        return child

    async def _shell_v1(self, stream: _Stream, command: str) -> None:
        child = await self._start(command, asyncio.subprocess.STDOUT)

        async def feed() -> None:
            async for data in stream.pieces():
                child.stdin.write(data)
                await child.stdin.drain()
            child.stdin.close()

        async with _beside(feed()):
            while data := await child.stdout.read(65536):
                await stream.write(data)
            await child.wait()

    async def _shell_v2(self, stream: _Stream, command: str) -> None:
        child = await self._start(command, asyncio.subprocess.PIPE)

        async def feed() -> None:
            while header := await stream.read(5):
                channel, length = struct.unpack("<BI", header)
                data = await stream.read(length) if length else b""
                with contextlib.suppress(ConnectionError):
                    if channel == 0:
                        child.stdin.write(data)
                        await child.stdin.drain()
                    elif channel == 4:
                        child.stdin.close()

        async def copy(channel: int, pipe: asyncio.StreamReader) -> None:
            while data := await pipe.read(65536):
                await stream.write(struct.pack("<BI", channel, len(data)) + data)

        async with _beside(feed()):
            await asyncio.gather(copy(1, child.stdout), copy(2, child.stderr))
            code = await child.wait()
            await stream.write(struct.pack("<BIB", 3, 1, 128 - code if code < 0 else code))

    async def _sync(self, stream: _Stream, _: str) -> None:
        while head := await stream.read(8):
            name, length = head[:4], int.from_bytes(head[4:], "little")
            if name == b"QUIT":
                return
            argument = (await stream.read(length)).decode()
            if name == b"STAT":
                await _sync_stat(stream, argument)
            elif name == b"RECV":
                await _sync_recv(stream, argument)
            elif name == b"SEND":
                await _sync_send(stream, argument.rpartition(",")[0])
            else:
                await _sync_fail(stream, f"unknown request {name!r}")

    async def _tcp(self, stream: _Stream, port: str) -> None:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
        except OSError:
            del self.streams[stream.local]
            await self.send(b"CLSE", 0, stream.remote)
            return
        await self.send(b"OKAY", stream.local, stream.remote)

        async def feed() -> None:
            async for data in stream.pieces():
                writer.write(data)
                await writer.drain()
            writer.close()

        async with _beside(feed()):
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(65536):
                    await stream.write(data)
        writer.close()


async def _sync_fail(stream: _Stream, reason: str) -> None:
    await stream.write(b"FAIL" + struct.pack("<I", len(reason)) + reason.encode())


async def _sync_stat(stream: _Stream, path: str) -> None:
    mode = size = modified = 0
    with contextlib.suppress(OSError):
        found = os.lstat(path)
        mode, size, modified = found.st_mode, found.st_size & 0xFFFFFFFF, int(found.st_mtime)
    await stream.write(b"STAT" + struct.pack("<3I", mode, size, modified))


async def _sync_recv(stream: _Stream, path: str) -> None:
    try:
        with open(path, "rb") as file:
            while data := file.read(65536):
                await stream.write(b"DATA" + struct.pack("<I", len(data)) + data)
    except OSError as error:
        await _sync_fail(stream, str(error))
        return
    await stream.write(b"DONE" + bytes(4))


async def _sync_send(stream: _Stream, path: str) -> None:
    error = None
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "wb"))
        except OSError as failed:
            error = failed
        while (head := await stream.read(8))[:4] == b"DATA":
            data = await stream.read(int.from_bytes(head[4:], "little"))
            if error is None:
                file.write(data)
    if error is not None:
        await _sync_fail(stream, str(error))
    else:
        await stream.write(b"OKAY" + bytes(4))
