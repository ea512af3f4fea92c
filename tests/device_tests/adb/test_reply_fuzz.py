"""Thousands of malformed replies: each ends in a result or a DeviceError, in time, in bounds.

The direct transport talks to a device in memory that answers from a script: packets of a right
conversation, damaged, or none at all. The shell's reply is also read in isolation (hypothesis).
"""

from __future__ import annotations

import io
import itertools
import json
import random
import signal
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from adb_shell.exceptions import TcpTimeoutException
from adb_shell.transport.base_transport import BaseTransport
from hypothesis import example, given, settings
from hypothesis import strategies as st

from device_tests.adb import link as adb_link
from device_tests.adb import shell_stream
from device_tests.adb.direct import DirectOpener, parse_banner
from device_tests.adb.link import MAX_PACKET_BYTES, Authorisation, load_key
from device_tests.adb.shell_reply import ShellReply, parse_stat
from device_tests.adb.transport import RemoteStat, ShellResult, Transport
from device_tests.errors import DeviceGone, ProtocolError
from export.contract.runner_protocol import parse_event, parse_result
from quantize.errors import DeviceError
from tests.support.protocol_examples import EXAMPLES, RESULT

CASES_PER_CALL = 1500
CASE_LIMIT_S = 20
"""A case takes about a millisecond; one that takes so long hangs."""
MEMORY_LIMIT_BYTES = 8 * MAX_PACKET_BYTES
BANNER = b"device::ro.product.model=M;features=shell_v2,cmd"


class Hang(BaseException):
    """A case did not end; not an Exception, so that nothing swallows it."""


@contextmanager
def ends_in_time(case: object) -> Iterator[None]:
    def ring(_: int, __: FrameType | None) -> None:
        raise Hang(f"case {case!r} did not end in {CASE_LIMIT_S} s")

    earlier = signal.signal(signal.SIGALRM, ring)
    signal.alarm(CASE_LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


class Scripted(BaseTransport):
    """A connection whose device says `replies` whatever it hears, in pieces of at most `piece`
    bytes, then breaks off or falls silent."""

    def __init__(self, replies: bytes, piece: int = MAX_PACKET_BYTES, silent: bool = False) -> None:
        self._replies, self._at = replies, 0
        self._piece, self._silent = piece, silent
        self.heard = bytearray()

    def connect(self, transport_timeout_s: float | None) -> None:
        pass

    def close(self) -> None:
        pass

    def bulk_read(self, numbytes: int, transport_timeout_s: float | None) -> bytes:
        assert 0 < numbytes <= MAX_PACKET_BYTES, "asks for more than a packet can hold"
        assert transport_timeout_s is not None and transport_timeout_s > 0, "waits without end"
        data = self._replies[self._at : self._at + min(numbytes, self._piece)]
        self._at += len(data)
        if not data:
            raise TcpTimeoutException("silence") if self._silent else ConnectionResetError("end")
        return data

    def bulk_write(self, data: bytes, transport_timeout_s: float | None) -> int:
        self.heard += data[:100]
        return len(data)


def packet(command: bytes, arg0: int, arg1: int, data: bytes = b"") -> bytes:
    number = int.from_bytes(command, "little")
    return struct.pack("<6I", number, arg0, arg1, len(data), 0, number ^ 0xFFFFFFFF) + data


def frame(channel: int, data: bytes) -> bytes:
    return struct.pack("<BI", channel, len(data)) + data


GREETING = [packet(b"CNXN", 0x01000001, MAX_PACKET_BYTES, BANNER)]
AUTHORISATION = [packet(b"AUTH", 1, 0, bytes(20)), packet(b"AUTH", 1, 0, bytes(20)), *GREETING]


def conversation(*output: bytes, written: int = 0) -> list[bytes]:
    """What a device says to one command: taken, input taken, its output, the end."""
    return [
        packet(b"OKAY", 7, 1),
        *[packet(b"OKAY", 7, 1)] * (written + 1),
        *(packet(b"WRTE", 7, 1, piece) for piece in output),
        packet(b"CLSE", 7, 1),
    ]


SUCCESS = frame(3, b"\0")
Call = Callable[[Transport], object]
CALLS: dict[str, tuple[list[bytes], Call, object]] = {
    "shell": (
        conversation(frame(1, b"out\n") + frame(2, b"err")[:3], frame(2, b"err")[3:], SUCCESS),
        lambda t: t.shell("echo"),
        ShellResult(0, b"out\n", b"err"),
    ),
    "push": (
        conversation(frame(2, b"3 bytes copied\n"), SUCCESS, written=1),
        lambda t: t.push(io.BytesIO(b"abc"), "/f", 3),
        None,
    ),
    "pull": (
        conversation(frame(1, b"content"), frame(1, b"!") + SUCCESS),
        lambda t: t.pull("/f", io.BytesIO(), offset=1, length=5),
        5,
    ),
    "stat": (
        conversation(frame(1, b"5368709120 81a4 1700000000\n") + SUCCESS),
        lambda t: t.stat("/f"),
        RemoteStat(5368709120, 0o100644, 1700000000),
    ),
}


def connected(*connections: Scripted, keys: Path) -> Transport:
    queue = iter(connections)

    def connector() -> BaseTransport:
        try:
            return next(queue)
        except StopIteration:
            raise DeviceGone("no more connections in this case") from None

    opener = DirectOpener("fuzz", "tcp", connector, authorisation=Authorisation(keys, 1.0))
    opener.reconnect(10.0)
    return Transport(opener, stall_s=1.0)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a key, which is read once: checking it takes longer than a hundred cases."""
    folder = tmp_path_factory.mktemp("keys")
    key = load_key(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adb_link, "load_key", lambda _: key)
        yield folder


def damaged(packets: list[bytes], numbers: random.Random) -> bytes:
    """One to three damages of a right conversation."""
    packets = list(packets)
    for _ in range(numbers.randint(1, 3)):
        at = numbers.randrange(len(packets)) if packets else 0
        match numbers.randrange(9) if packets else 8:
            case 0:
                del packets[at]
            case 1:
                packets.insert(at, packets[at])
            case 2:
                other = numbers.randrange(len(packets))
                packets[at], packets[other] = packets[other], packets[at]
            case 3:  # a field of the header
                header = list(struct.unpack("<6I", packets[at][:24].ljust(24, b"\0")))
                header[numbers.randrange(6)] = numbers.choice(
                    [0, 1, 7, 0xFFFFFFFF, MAX_PACKET_BYTES + 1, numbers.getrandbits(32)]
                )
                packets[at] = struct.pack("<6I", *header) + packets[at][24:]
            case 4:  # a packet of another kind, ids and data as they are
                kind = numbers.choice([b"SYNC", b"CNXN", b"AUTH", b"OPEN", b"OKAY", b"CLSE"])
                number = int.from_bytes(kind, "little")
                packets[at] = (
                    kind + packets[at][4:20] + struct.pack("<I", number ^ 0xFFFFFFFF)
                ) + packets[at][24:]
            case 5:  # the data, under an honest header
                data = bytearray(packets[at][24:] or b"\0")
                data[numbers.randrange(len(data))] = numbers.getrandbits(8)
                fields = struct.unpack("<3I", packets[at][:12].ljust(12, b"\0"))
                packets[at] = packet(fields[0].to_bytes(4, "little"), *fields[1:], bytes(data))
            case 6:
                packets[at] = packets[at][: numbers.randrange(len(packets[at]) + 1)]
            case 7:
                stream = bytearray(b"".join(packets))
                if stream:
                    stream[numbers.randrange(len(stream))] ^= 1 << numbers.randrange(8)
                packets = [bytes(stream)]
            case _:
                packets.insert(at, numbers.randbytes(numbers.randrange(60)))
    return b"".join(packets)


@pytest.mark.parametrize("name", CALLS)
def test_right_conversation_in_the_smallest_pieces_gives_the_result(name: str, keys: Path) -> None:
    """Else the damaged ones would prove nothing."""
    packets, call, expected = CALLS[name]
    device = Scripted(b"".join(AUTHORISATION + packets), piece=1)
    assert call(connected(device, keys=keys)) == expected


@pytest.mark.parametrize("name", CALLS)
def test_damaged_conversation_ends_in_a_result_or_a_device_error(name: str, keys: Path) -> None:
    packets, call, _ = CALLS[name]
    ends: dict[str, int] = {}
    for seed in range(CASES_PER_CALL):
        numbers = random.Random(seed)
        replies = b"".join(GREETING) + damaged(packets, numbers)
        device = Scripted(
            replies, piece=numbers.choice([1, 5, MAX_PACKET_BYTES]), silent=numbers.random() < 0.5
        )
        with ends_in_time(seed):
            try:
                call(connected(device, keys=keys))
                end = "result"
            except DeviceError as error:
                end = type(error).__name__
                assert str(error) and "\n" not in str(error)
        ends[end] = ends.get(end, 0) + 1
    assert {"result", "ProtocolError", "DeviceGone"} <= ends.keys(), f"too tame: {ends}"


def test_damaged_greeting_ends_in_a_connection_or_a_device_error(keys: Path) -> None:
    ends: dict[str, int] = {}
    for seed in range(CASES_PER_CALL):
        numbers = random.Random(seed)
        replies = damaged(numbers.choice([GREETING, AUTHORISATION]), numbers)
        with ends_in_time(seed):
            try:
                connected(Scripted(replies, silent=numbers.random() < 0.5), keys=keys)
                end = "connection"
            except DeviceError as error:
                end = type(error).__name__
        ends[end] = ends.get(end, 0) + 1
    assert {"connection", "ProtocolError", "DeviceGone", "DeviceUnauthorized"} <= ends.keys(), ends


def test_noise_ends_in_a_device_error(keys: Path) -> None:
    """Random bytes, and random sequences of packets that are whole."""
    for seed in range(CASES_PER_CALL):
        numbers = random.Random(seed)
        if seed % 2:
            noise = numbers.randbytes(numbers.randrange(400))
        else:
            kinds = [b"SYNC", b"CNXN", b"AUTH", b"OPEN", b"OKAY", b"CLSE", b"WRTE"]
            ids = [0, 1, 2, 7]
            noise = b"".join(
                packet(
                    numbers.choice(kinds),
                    numbers.choice(ids),
                    numbers.choice(ids),
                    numbers.randbytes(numbers.choice([0, 0, 5, 20])),
                )
                for _ in range(numbers.randrange(30))
            )
        for replies in (noise, b"".join(GREETING) + noise):
            for _, call, _ in CALLS.values():
                with ends_in_time(seed):
                    try:
                        call(connected(Scripted(replies), keys=keys))
                    except DeviceError:
                        continue


def flood(count: int) -> Iterator[tuple[str, bytes, Call]]:
    """Devices that send more than they were asked for."""
    whole = packet(b"WRTE", 7, 1, bytes(MAX_PACKET_BYTES))
    opened = packet(b"OKAY", 7, 1)
    yield "data instead of OKAY", opened + whole * count, CALLS["push"][1]
    yield (
        "data for nobody",
        opened + packet(b"WRTE", 9, 9, bytes(MAX_PACKET_BYTES)) * count,
        (CALLS["shell"][1]),
    )
    header = frame(1, b"")[:1] + struct.pack("<I", 0xFFFFFFFF)
    yield (
        "endless output",
        opened * 2 + packet(b"WRTE", 7, 1, header) + whole * count,
        lambda t: t.shell("cat"),
    )
    yield (
        "endless errors of a pull",
        opened * 2 + packet(b"WRTE", 7, 1, b"\2" + header[1:]) + whole * count,
        CALLS["pull"][1],
    )


@pytest.mark.parametrize("case", [case[0] for case in flood(0)])
def test_flood_ends_in_bounded_memory(
    case: str, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell_stream, "MAX_OUTPUT_BYTES", 2 * MAX_PACKET_BYTES)
    for name, replies, call in flood(64):
        if name != case:
            continue
        transport = connected(Scripted(b"".join(GREETING) + replies), keys=keys)
        tracemalloc.start()
        with ends_in_time(name), pytest.raises(DeviceError):
            call(transport)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes < MEMORY_LIMIT_BYTES


def test_announced_length_costs_nothing_before_it_comes(keys: Path) -> None:
    """Of a packet: refused. Of a shell's frame: it may be 4 GiB, which come piece by piece."""
    greeting, opened = b"".join(GREETING), packet(b"OKAY", 7, 1)
    huge = (
        packet(b"WRTE", 7, 1)[:12] + struct.pack("<2I", 0xFFFFFFFF, 0) + packet(b"WRTE", 0, 0)[20:]
    )
    with pytest.raises(ProtocolError):
        connected(Scripted(greeting + opened + huge), keys=keys).shell("echo")
    announced = packet(b"WRTE", 7, 1, b"\1\xff\xff\xff\xff" + b"out")
    tracemalloc.start()
    with pytest.raises(DeviceGone):
        connected(Scripted(greeting + opened * 2 + announced), keys=keys).shell("echo")
    assert tracemalloc.get_traced_memory()[1] < MAX_PACKET_BYTES
    tracemalloc.stop()


# --- the shell's reply ---

FRAMES = st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=40)), max_size=8)


def read(pieces: list[bytes]) -> tuple[bytes, bytes, int | None]:
    reply, outputs = ShellReply(), {1: b"", 2: b""}
    for piece in pieces:
        for channel, data in reply.feed(piece):
            outputs[channel] += bytes(data)
    return outputs[1], outputs[2], reply.exit_code


def cut(data: bytes, at: list[int]) -> list[bytes]:
    borders = sorted({0, len(data), *(position % (len(data) + 1) for position in at)})
    return [data[a:b] for a, b in itertools.pairwise(borders)]


@settings(max_examples=1000, deadline=None)
@given(FRAMES, st.integers(0, 255), st.lists(st.integers(0, 500), max_size=20))
def test_reply_is_read_wherever_packets_cut_it(
    frames: list[tuple[int, bytes]], code: int, at: list[int]
) -> None:
    sent = b"".join(frame(*one) for one in frames) + frame(3, bytes([code]))
    expected = tuple(b"".join(data for to, data in frames if to == channel) for channel in (1, 2))
    assert read(cut(sent, at)) == (*expected, code)


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=10))
@example(b"\3\1\0\0\0\0more", [])
@example(b"\3\2\0\0\0\0\0", [])
@example(b"\1\xff\xff\xff\xff", [])
def test_any_reply_is_read_or_refused_the_same_wherever_it_is_cut(
    data: bytes, at: list[int]
) -> None:
    def outcome(pieces: list[bytes]) -> object:
        try:
            return read(pieces)
        except ProtocolError:
            return "refused"

    assert outcome(cut(data, at)) == outcome([data])


@pytest.mark.parametrize(
    "sent",
    [frame(3, b""), frame(3, b"\0\0"), frame(0, b"x"), frame(4, b""), frame(3, b"\0") + b"x"],
    ids=["no exit code", "two exit codes", "input", "end of input", "data after the end"],
)
def test_frame_that_no_adbd_sends_is_refused(sent: bytes) -> None:
    with pytest.raises(ProtocolError):
        read([frame(1, b"out") + sent])


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=80))
@example(b"1 2 3 4")
@example(b"-1 81a4 0")
@example(b"9" * 5000 + b" 0 0")
@example(b"1_0 81a4 0")
@example("\u0661 81a4 0".encode())
def test_any_stat_is_read_or_refused(stdout: bytes) -> None:
    try:
        assert parse_stat(stdout).size_bytes >= 0
    except ProtocolError:
        return


@settings(max_examples=1000, deadline=None)
@given(st.one_of(st.binary(max_size=80), st.binary(max_size=80).map(lambda b: b"device::" + b)))
def test_any_banner_is_read_or_refused(banner: bytes) -> None:
    try:
        properties, _ = parse_banner(banner)
        assert "features" not in properties
    except DeviceError:
        return


# --- what the runner says; more of it, and the sensors, in the tests of those parsers ---


def mutated(document: object, numbers: random.Random) -> object:
    """The document with one value, somewhere in it, replaced or left out."""
    hostile = [None, True, -1, 0, 2**70, 1.5, float("nan"), "", "x" * 5000, "\ud800", [], {}, [[]]]
    if isinstance(document, dict) and document and numbers.random() < 0.9:
        key = numbers.choice(list(document))
        if numbers.random() < 0.15:
            return {k: v for k, v in document.items() if k != key}
        return document | {key: mutated(document[key], numbers)}
    if isinstance(document, list) and document and numbers.random() < 0.9:
        at = numbers.randrange(len(document))
        return [*document[:at], mutated(document[at], numbers), *document[at + 1 :]]
    return numbers.choice(hostile)


@pytest.mark.parametrize("parse", [parse_event, parse_result])
def test_damaged_report_of_the_runner_is_read_or_refused(parse: Callable[[bytes], dict]) -> None:
    events = [{"event": kind, "t_ms": 1.0} | fields for kind, fields in EXAMPLES.items()]
    right = events if parse is parse_event else [RESULT]
    assert all(parse(json.dumps(document).encode()) for document in right)
    refused = 0
    for seed in range(CASES_PER_CALL):
        numbers = random.Random(seed)
        content = bytearray(json.dumps(mutated(numbers.choice(right), numbers)).encode())
        if seed % 3 == 0:
            content = content[: numbers.randrange(len(content))]
        elif seed % 3 == 1:
            content[numbers.randrange(len(content))] = numbers.getrandbits(8)
        with ends_in_time(seed):
            try:
                assert isinstance(parse(bytes(content)), dict)
            except DeviceError:
                refused += 1
    assert refused > CASES_PER_CALL // 3


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"event":' * 100_000,
        b'{"event":"step","t_ms":1e999}',
        b"1" * 100_000,
        b'{"event":"\\ud800","t_ms":0}',
        b'{"event":"text","t_ms":' + b"9" * 5000 + b"}",
    ],
    ids=["deep list", "deep object", "infinite", "long number", "surrogate", "long time"],
)
def test_hostile_json_of_the_runner_is_refused(content: bytes) -> None:
    for parse in (parse_event, parse_result):
        with ends_in_time(content[:20]), pytest.raises(DeviceError):
            parse(content)
