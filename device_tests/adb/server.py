"""Transport through an adb server that is already running, or was asked for by name.

The protocol to the server is the adbutils library's; the streams to the device's shell (protocol
version 2: exit code, stdout and stderr apart) are moved here, because they need a deadline for the
whole and both directions at once. Which device to open is decided in `selection`.
"""

from __future__ import annotations

import io
import math
import os
import re
import select
import shlex
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO

import adbutils
from adbutils import AdbClient, AdbConnection, AdbDevice, AdbError, AdbTimeout
from adbutils.errors import AdbConnectionError

from device_tests.adb.direct import ShellReply, parse_stat
from device_tests.adb.transport import Kind, Progress, RemoteStat, ShellResult
from device_tests.errors import (
    CommandFailed,
    CommandTimeout,
    DeviceGone,
    DeviceNotFound,
    DeviceUnauthorized,
    ProtocolError,
    StorageFull,
)
from quantize.errors import DeviceError

DEFAULT_PORT = 5037
STALL_S = 60.0
"""A transfer of which nothing moves for so long has failed."""
MAXIMUM_OUTPUT_BYTES = 64 * 2**20
"""What `shell` takes from one command; more is a device gone wrong."""

# shell_protocol.h of adb: a byte of these, the length in 4 bytes little endian, the data.
_STDIN, _STDOUT, _STDERR, _EXIT, _CLOSE_STDIN = range(5)
_RECEIVE_BYTES = 256 * 1024
_SENT_FRAME_BYTES = 256 * 1024
_COMMAND_BYTES = 0xFFFF  # the length of a request to the server is 4 hexadecimal digits
_TWO_STREAMS_FROM_BYTES = 8 * 2**20
_BLOCK_BYTES = 2**20
_LEAST_BLOCK_BYTES = 64 * 1024
_MORE_FOLLOWS = getattr(socket, "MSG_MORE", 0)  # Linux only, spares a packet
_MAXIMUM_SAID_BYTES = 64 * 1024
_MAXIMUM_HEAD_BYTES = 2**30  # toybox's head counts in an int
_PROBE_S = 3.0
_START_S = 30.0
_EXIT_ABSENT = 44


@dataclass(frozen=True)
class ServerAddress:
    """Where the adb server listens, or would."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class ServerDevice:
    """A line of `adb devices -l`; only in the state `device` can it be used."""

    serial: str
    state: str
    model: str = ""


def server_address() -> ServerAddress:
    """Where adb itself would look, from ADB_SERVER_SOCKET and ANDROID_ADB_SERVER_ADDRESS, _PORT.

    Raises ProtocolError for a value that is not an address over TCP.
    """
    host = os.environ.get("ANDROID_ADB_SERVER_ADDRESS") or "127.0.0.1"
    port = os.environ.get("ANDROID_ADB_SERVER_PORT") or str(DEFAULT_PORT)
    if chosen := os.environ.get("ADB_SERVER_SOCKET"):
        found = re.fullmatch(r"tcp:(?:(?P<host>.*):)?(?P<port>\d+)", chosen)
        if found is None:
            raise ProtocolError(
                f"ADB_SERVER_SOCKET is {chosen!r}; only tcp:PORT and tcp:HOST:PORT are understood"
            )
        host, port = found["host"] or "127.0.0.1", found["port"]
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ProtocolError(
            f"the port of the adb server is {port!r}; set it to a number up to 65535"
        )
    return ServerAddress("127.0.0.1" if host == "localhost" else host, int(port))


class _Connection(AdbConnection):
    """adbutils starts a server where none answers; this one never does."""

    def _safe_connect(self) -> socket.socket:
        return self._create_socket()


class _Client(AdbClient):
    def make_connection(self, timeout: float | None = None) -> AdbConnection:
        connection = _Connection(self.host, self.port)
        connection.conn.settimeout(timeout or _START_S)
        return connection


def _client(address: ServerAddress) -> _Client:
    return _Client(host=address.host, port=address.port)


def server_version(address: ServerAddress | None = None) -> int | None:
    """The protocol version of the running server (41 since 2018), None if none runs.

    Starts nothing. Raises ProtocolError if something else listens there.
    """
    address = address or server_address()
    try:
        with socket.create_connection((address.host, address.port), _PROBE_S):
            pass
        with _client(address).make_connection(_PROBE_S) as connection:
            connection.send_command("host:version")
            connection.check_okay()
            return int(connection.read_string_block(), 16)
    except (OSError, AdbConnectionError):
        return None
    except (AdbError, ValueError):
        raise ProtocolError(
            f"what listens at {address} does not answer as an adb server; set "
            "ANDROID_ADB_SERVER_PORT to the port of yours"
        ) from None


def start_server(address: ServerAddress | None = None) -> None:
    """Start a server where none runs; one of whatever version that runs is left alone.

    Takes the `adb` of the PATH, else the one that comes with adbutils. Raises DeviceNotFound.
    """
    address = address or server_address()
    if server_version(address) is not None:
        return
    program = shutil.which("adb") or adbutils.adb_path()
    with tempfile.TemporaryFile() as said:
        try:
            code = subprocess.run(
                [program, "-L", f"tcp:{address.port}", "start-server"],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                timeout=_START_S,
                check=False,
            ).returncode
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DeviceNotFound(f"an adb server could not be started: {error}") from error
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
    if code != 0 or server_version(address) is None:
        reason = lines[-1] if lines else f"exit code {code}"
        raise DeviceNotFound(f"an adb server could not be started at {address}: {reason}")


def server_devices(address: ServerAddress | None = None) -> list[ServerDevice]:
    """What the running server knows, in its order; nothing if none runs."""
    address = address or server_address()
    if server_version(address) is None:
        return []
    with _translated("the adb server", address), _client(address).make_connection() as connection:
        connection.send_command("host:devices-l")
        connection.check_okay()
        lines = connection.read_string_block().splitlines()
    return [found for line in lines if (found := _parse_device(line)) is not None]


def _parse_device(line: str) -> ServerDevice | None:
    """`serial  state key:value …`; a state may have several words (`no permissions …`)."""
    found = re.fullmatch(r"(\S+)\s+(.+?)((?:\s+[a-z_]+:\S*)*)\s*", line)
    if found is None:
        return None
    model = re.search(r"\smodel:(\S+)", found[3])
    return ServerDevice(found[1], found[2], model[1] if model else "")


def open_server(serial: str, address: ServerAddress | None = None) -> ServerTransport:
    """The device `serial` through the running server, which is told to connect to a HOST:PORT.

    Raises DeviceNotFound (no server, or it does not know the device), DeviceUnauthorized,
    DeviceGone (offline).
    """
    address = address or server_address()
    if server_version(address) is None:
        raise DeviceNotFound(
            f"no adb server runs at {address}; start one with `adb start-server`, or leave it out "
            "and use the device directly"
        )
    transport = ServerTransport(serial, address)
    if is_network_serial(serial) and transport.state() != "device":
        transport.network_connect()
    state = transport.state()
    if state is None:
        known = ", ".join(device.serial for device in server_devices(address)) or "none"
        raise DeviceNotFound(
            f"the adb server at {address} knows no device {serial!r} (it knows: {known}); check "
            "the cable and that USB debugging is on"
        )
    transport.check(state)
    return transport


def is_network_serial(serial: str) -> bool:
    """Whether a serial is an address, HOST:PORT, and not that of a device on a cable."""
    host, colon, port = serial.rpartition(":")
    return bool(colon and host) and port.isascii() and port.isdigit()


@contextmanager
def _translated(who: str, address: ServerAddress) -> Iterator[None]:
    """What adbutils and sockets raise, as this package's errors."""
    try:
        yield
    except AdbConnectionError as error:
        raise DeviceGone(
            f"the adb server at {address} does not answer any more ({error}); start it again"
        ) from error
    except (AdbTimeout, TimeoutError) as error:
        raise CommandTimeout(
            f"the adb server at {address} did not answer for {who} in time; look at "
            "`adb devices` and try again"
        ) from error
    except AdbError as error:
        said = str(error)
        if "unauthorized" in said or "authenticating" in said:
            raise DeviceUnauthorized(_UNAUTHORIZED.format(who=who)) from error
        if any(word in said for word in ("not found", "offline", "closed", "no devices")):
            raise DeviceGone(
                f"{who} is not connected to the adb server at {address}: {said}"
            ) from error
        raise ProtocolError(f"the adb server at {address} refused for {who}: {said!r}") from error
    except (OSError, EOFError) as error:
        raise DeviceGone(f"the connection to {who} broke: {error}") from error
    except ValueError as error:
        raise ProtocolError(
            f"the adb server at {address} gave an answer for {who} that is not understood: {error}"
        ) from error


_UNAUTHORIZED = (
    "{who} does not trust this computer yet; unlock its screen, accept the question about USB "
    "debugging, and try again"
)


class ServerTransport:
    """One device through one server; each call makes its own connections."""

    kind: Kind = "server"

    def __init__(self, serial: str, address: ServerAddress) -> None:
        self.serial = serial
        self.address = address
        self._who = f"device {serial!r}"
        self._shell_v2: bool | None = None

    # What the server knows.

    def state(self) -> str | None:
        """`device`, `offline`, `unauthorized`, …; None if the server does not know the device."""
        states = {device.serial: device.state for device in server_devices(self.address)}
        return states.get(self.serial)

    def check(self, state: str | None) -> None:
        """Raise what a state other than `device` means."""
        if state in ("unauthorized", "authorizing"):
            raise DeviceUnauthorized(_UNAUTHORIZED.format(who=self._who))
        if state != "device":
            raise DeviceGone(
                f"{self._who} is {state or 'absent'} for the adb server at {self.address}; pull "
                "the cable and put it back"
            )

    def network_connect(self) -> None:
        """Let the server connect to a HOST:PORT anew."""
        with _translated(self._who, self.address):
            client = _client(self.address)
            client.disconnect(self.serial)
            said = client.connect(self.serial, timeout=_START_S)
        if not said.startswith(("connected to", "already connected")):
            raise DeviceNotFound(f"the adb server cannot connect to {self.serial}: {said.strip()}")

    # The shell.

    def shell(self, command: str, *, timeout_s: float = 30.0) -> ShellResult:
        """See Transport."""
        output = {_STDOUT: bytearray(), _STDERR: bytearray()}

        def keep(kind: int, data: memoryview) -> None:
            output[kind] += data
            if len(output[kind]) > MAXIMUM_OUTPUT_BYTES:
                raise ProtocolError(
                    f"a command on {self._who} said more than {MAXIMUM_OUTPUT_BYTES} bytes: "
                    f"{_short(command)}; let it write into a file and pull that"
                )

        deadline = time.monotonic() + timeout_s
        with self._running(command, timeout_s) as stream:
            stream.deadline = deadline
            stream.send(_CLOSE_STDIN)
            code = stream.until_exit(keep)
        return ShellResult(code, bytes(output[_STDOUT]), bytes(output[_STDERR]))

    @contextmanager
    def _running(self, command: str, timeout_s: float = STALL_S) -> Iterator[_ShellStream]:
        encoded = command.encode()
        if len(encoded) + 16 > _COMMAND_BYTES or b"\0" in encoded:
            raise CommandFailed(
                f"a command of {len(encoded)} bytes cannot be sent to {self._who}; at most "
                f"{_COMMAND_BYTES - 16} bytes and no zero among them"
            )
        self._need_shell_v2()
        with _translated(self._who, self.address):
            connection = _client(self.address).make_connection(min(timeout_s, _START_S))
            try:
                # Not AdbDevice.open_transport, which asks for the server's version each time.
                connection.send_command(f"host:transport:{self.serial}")
                connection.check_okay()
                connection.send_command(f"shell,v2,raw:{command}")
                connection.check_okay()
                yield _ShellStream(connection.conn, self._who, _short(command))
            finally:
                # Not AdbConnection.close, which waits 10 ms each time.
                connection.conn.close()

    def _need_shell_v2(self) -> None:
        if self._shell_v2 is None:
            with _translated(self._who, self.address):
                device = AdbDevice(_client(self.address), self.serial)
                self._shell_v2 = "shell_v2" in device.get_features().split(",")
        if not self._shell_v2:
            raise ProtocolError(
                f"{self._who} has no shell with exit codes (shell_v2), which came with Android 7; "
                "use a newer device"
            )

    # Files.

    def push(
        self,
        source: BinaryIO,
        remote: str,
        length: int,
        *,
        offset: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """See Transport. A large part of a plain file travels in two streams side by side.

        The bytes go into the device's `dd` by the shell's protocol: `exec:` has a terminal's
        4 KiB buffer between, and sync can only write a file from its beginning.
        """
        advance = _Advance(progress)
        plain_file = isinstance(source, io.FileIO | io.BufferedReader | io.BufferedRandom)
        if plain_file and hasattr(os, "sendfile"):
            if isinstance(source, io.BufferedRandom):
                source.flush()
            start, descriptor = source.tell(), source.fileno()
            cut = length
            if length >= _TWO_STREAMS_FROM_BYTES:
                cut = length // 2 // _BLOCK_BYTES * _BLOCK_BYTES
            parts = [(0, cut), (cut, length - cut)] if cut < length else [(0, length)]

            def send(part: tuple[int, int]) -> None:
                at, count = part
                try:
                    chunks = _FileChunks(descriptor, start + at)
                    self._push_part(chunks, remote, count, offset + at, advance)
                except BaseException:
                    advance.stopped.set()
                    raise

            if len(parts) == 1:
                send(parts[0])
            else:
                with ThreadPoolExecutor(len(parts)) as pool:
                    futures = [pool.submit(send, part) for part in parts]
                    try:
                        errors = [future.exception() for future in futures]
                    except BaseException:
                        advance.stopped.set()
                        raise
                for error in sorted(
                    (e for e in errors if e is not None), key=lambda e: isinstance(e, _Stopped)
                ):
                    raise error
            source.seek(start + length)
        else:
            self._push_part(_ReadChunks(source), remote, length, offset, advance)

    def _push_part(
        self,
        chunks: _FileChunks | _ReadChunks,
        remote: str,
        length: int,
        offset: int,
        advance: _Advance,
    ) -> None:
        # The shell opens the file without shortening it. Where no block size divides the offset, a
        # dd of its own moves the position that the second one writes at. The last part keeps
        # taking input, so that what went wrong is heard.
        block = math.gcd(offset, _BLOCK_BYTES)
        write = f"dd bs={block} seek={offset // block} conv=notrunc"
        if block < _LEAST_BLOCK_BYTES:
            write = (
                f"dd bs=1 seek={offset} count=0 conv=notrunc 2>/dev/null && "
                f"dd bs={_BLOCK_BYTES} conv=notrunc"
            )
        command = f"{{ {write}; }} 1<>{shlex.quote(remote)} || {{ s=$?; cat >/dev/null; exit $s; }}"
        said = bytearray()

        def keep(kind: int, data: memoryview) -> None:
            said.extend(data[: _MAXIMUM_SAID_BYTES - len(said)])

        with self._running(command) as stream:
            left = length
            while left > 0 and not stream.readable():
                if advance.stopped.is_set():
                    raise _Stopped(f"the transfer to {self._who} was stopped")
                count = min(left, _SENT_FRAME_BYTES)
                stream.deadline = time.monotonic() + STALL_S
                chunks.send(stream, count)
                left -= count
                advance(count)
            stream.deadline = time.monotonic() + STALL_S
            stream.send(_CLOSE_STDIN)
            code = stream.until_exit(keep)
        if code == 0 and left == 0:
            return
        text = said.decode(errors="replace")
        lines = [
            line for line in text.splitlines() if not re.search(r"records (in|out)|copied", line)
        ]
        reason = lines[-1].strip() if lines else f"exit code {code}"
        if "No space left" in reason:
            raise StorageFull(f"{self._who} has no room left for {remote}: {reason}")
        raise CommandFailed(f"{remote} on {self._who} could not be written: {reason}")

    def pull(
        self,
        remote: str,
        destination: BinaryIO,
        *,
        offset: int = 0,
        length: int | None = None,
        progress: Progress | None = None,
    ) -> int:
        """See Transport."""
        advance = _Advance(progress)
        if length is None:
            self._pull_part(remote, destination, offset, None, advance)
        else:
            while advance.total < length:
                part = min(length - advance.total, _MAXIMUM_HEAD_BYTES)
                if self._pull_part(remote, destination, offset + advance.total, part, advance):
                    break
        return advance.total

    def _pull_part(
        self,
        remote: str,
        destination: BinaryIO,
        offset: int,
        length: int | None,
        advance: _Advance,
    ) -> bool:
        """Whether the file ended before `length` bytes."""
        take = "cat" if length is None else f"head -c {length}"
        command = f"{{ dd bs=1 skip={offset} count=0 2>/dev/null; {take}; }} <{shlex.quote(remote)}"
        before = advance.total
        said = bytearray()

        with self._running(command) as stream:

            def keep(kind: int, data: memoryview) -> None:
                if kind == _STDERR:
                    said.extend(data[: _MAXIMUM_SAID_BYTES - len(said)])
                    return
                if length is not None and advance.total - before + len(data) > length:
                    raise ProtocolError(f"{self._who} sent more of {remote} than was asked for")
                try:
                    destination.write(data)
                except OSError as error:
                    raise DeviceError(
                        f"what is pulled from {self._who} cannot be written here ({error}); make "
                        "room or choose another place"
                    ) from error
                advance(len(data))
                stream.deadline = time.monotonic() + STALL_S

            stream.deadline = time.monotonic() + STALL_S
            stream.send(_CLOSE_STDIN)
            code = stream.until_exit(keep)
        if code != 0:
            lines = said.decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit code {code}"
            raise CommandFailed(f"{remote} on {self._who} could not be read: {reason}")
        return length is not None and advance.total - before < length

    def stat(self, remote: str) -> RemoteStat | None:
        """See Transport."""
        path = shlex.quote(remote)
        done = self.shell(f"[ -e {path} ] || exit {_EXIT_ABSENT}; stat -L -c '%s %f %Y' {path}")
        if done.exit_code == _EXIT_ABSENT:
            return None
        if done.exit_code != 0:
            raise CommandFailed(
                f"{remote} on {self._who} cannot be looked at: {done.error_text.strip()}"
            )
        return parse_stat(done.stdout)

    # Ports, and the connection itself.

    @contextmanager
    def forward(self, remote: str) -> Iterator[int]:
        """See Transport."""
        answer = self._ask(f"forward:tcp:0;{remote}", block=True)
        if not re.fullmatch("[0-9]{1,5}", answer):
            raise ProtocolError(
                f"the adb server at {self.address} named {answer[:20]!r} as the port that leads to "
                f"{remote}; update adb"
            )
        port = int(answer)
        try:
            yield port
        finally:
            # With the server or the device the forward is gone, too.
            with suppress(DeviceGone, ProtocolError, CommandTimeout):
                self._ask(f"killforward:tcp:{port}", block=False)

    def _ask(self, request: str, *, block: bool) -> str:
        with (
            _translated(self._who, self.address),
            _client(self.address).make_connection() as connection,
        ):
            connection.send_command(f"host-serial:{self.serial}:{request}")
            connection.check_okay()
            connection.check_okay()
            return connection.read_string_block() if block else ""

    def reconnect(self, timeout_s: float) -> None:
        """See Transport."""
        give_up = time.monotonic() + timeout_s
        reason: Exception | None = None
        while True:
            try:
                if self.state() != "device" and is_network_serial(self.serial):
                    self.network_connect()
                self.check(self.state())
                left = max(1.0, min(10.0, give_up - time.monotonic()))
                if self.shell("true", timeout_s=left).exit_code == 0:
                    return
            except (DeviceGone, DeviceNotFound, ProtocolError, CommandTimeout) as error:
                reason = error
            if time.monotonic() > give_up:
                raise DeviceGone(
                    f"{self._who} did not come back within {timeout_s:.0f} s: {reason}"
                ) from reason
            time.sleep(0.2)

    def close(self) -> None:
        """Nothing is held between calls."""


class _Stopped(DeviceGone):
    """One of two streams, ended because the other had failed."""


class _Advance:
    """Adds up what several threads moved, and tells."""

    def __init__(self, progress: Progress | None) -> None:
        self.total = 0
        self.stopped = threading.Event()
        self._progress = progress
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self.total += count
            if self._progress is not None:
                self._progress(self.total)


class _ShellStream:
    """A running command in the shell protocol, version 2. `deadline` is of time.monotonic."""

    def __init__(self, connection: socket.socket, who: str, command: str) -> None:
        self.deadline = time.monotonic() + STALL_S
        self._socket = connection
        self._socket.setblocking(False)
        # Else the last few bytes wait 40 ms for an acknowledgement.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._who = who
        self._command = command

    def readable(self) -> bool:
        """Whether the device said something."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def send(self, kind: int, data: bytes = b"") -> None:
        """One whole frame."""
        view = memoryview(struct.pack("<BI", kind, len(data)) + data)
        while view:
            self._wait(write=True)
            view = view[self._socket.send(view) :]

    def send_file(self, descriptor: int, position: int, count: int) -> None:
        """One frame of stdin that the kernel takes from a file."""
        header = memoryview(struct.pack("<BI", _STDIN, count))
        while header:
            self._wait(write=True)
            header = header[self._socket.send(header, _MORE_FOLLOWS) :]
        while count > 0:
            self._wait(write=True)
            sent = os.sendfile(self._socket.fileno(), descriptor, position, count)
            if sent == 0:
                raise CommandFailed(f"the file to push ends before byte {position + count}")
            position += sent
            count -= sent

    def until_exit(self, keep: Callable[[int, memoryview], None]) -> int:
        """Hand stdout and stderr to `keep` until the command ends; its exit code."""
        reply = ShellReply()
        buffer = memoryview(bytearray(_RECEIVE_BYTES))
        while reply.exit_code is None:
            self._wait(write=False)
            got = self._socket.recv_into(buffer)
            if got == 0:
                raise DeviceGone(f"the connection to {self._who} broke during {self._command}")
            for kind, data in reply.feed(buffer[:got]):
                keep(kind, data)
        return reply.exit_code

    def _wait(self, *, write: bool) -> None:
        left = self.deadline - time.monotonic()
        mine = [self._socket]
        ready = select.select([] if write else mine, mine if write else [], [], max(0.0, left))
        if not any(ready):
            raise CommandTimeout(f"{self._who} took too long over {self._command}")


class _FileChunks:
    """Consecutive pieces of an open file, without moving its position."""

    def __init__(self, descriptor: int, position: int) -> None:
        self._descriptor = descriptor
        self._position = position

    def send(self, stream: _ShellStream, count: int) -> None:
        stream.send_file(self._descriptor, self._position, count)
        self._position += count


class _ReadChunks:
    """Consecutive pieces of whatever can be read."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source

    def send(self, stream: _ShellStream, count: int) -> None:
        data = bytearray()
        while len(data) < count:
            try:
                more = self._source.read(count - len(data))
            except OSError as error:
                raise DeviceError(
                    f"what is to be pushed cannot be read ({error}); check the file here"
                ) from error
            if not more:
                raise CommandFailed(f"the source to push ends {count - len(data)} bytes early")
            data += more
        stream.send(_STDIN, bytes(data))


def _short(command: str) -> str:
    return repr(command if len(command) <= 60 else command[:57] + "…")
