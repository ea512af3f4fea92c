"""What a device's shell answers: frames of the shell protocol, and what `stat` prints.

How the bytes came is not known here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from device_tests.errors import ProtocolError

STDIN, STDOUT, STDERR, EXIT, CLOSE_INPUT = range(5)
FRAME = struct.Struct("<BI")
CLOSE_STDIN = FRAME.pack(CLOSE_INPUT, 0)
_STAT = re.compile(rb"(\d{1,19}) ([0-9a-f]{1,8}) (-?\d{1,19})")


@dataclass(frozen=True)
class ShellResult:
    """What a command on the device said and how it ended; 128 + n: killed by signal n."""

    exit_code: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Standard output as text, what is not UTF-8 replaced."""
        return self.stdout.decode("utf-8", errors="replace")

    @property
    def error_text(self) -> str:
        """Standard error as text, what is not UTF-8 replaced."""
        return self.stderr.decode("utf-8", errors="replace")


@dataclass(frozen=True)
class RemoteStat:
    """A file or folder on the device; `size_bytes` is exact beyond 4 GiB, `mode` as in stat(2)."""

    size_bytes: int
    mode: int
    modified_s: int


class ShellReply:
    """Takes a `shell,v2` reply apart: frames of channel, length (32 bits), data.

    Data is handed on as it comes, so a frame's announced length costs no memory.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._header = bytearray()
        self._channel = -1
        self._left = 0

    def feed(self, data: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
        """Yield (1 stdout or 2 stderr, piece); raises ProtocolError. Read it to its end."""
        view = memoryview(data)
        while len(view):
            if self.exit_code is not None:
                raise ProtocolError(
                    f"the shell's reply goes on ({len(view)} bytes) after the exit code: the "
                    "device's adbd is not understood"
                )
            if not self._left:
                missing = FRAME.size - len(self._header)
                self._header += view[:missing]
                view = view[missing:]
                if len(self._header) < FRAME.size:
                    return
                self._channel, self._left = FRAME.unpack(self._header)
                self._header.clear()
                if self._channel not in (STDOUT, STDERR, EXIT) or (
                    self._channel == EXIT and self._left != 1
                ):
                    raise ProtocolError(
                        f"the shell's reply has a frame {self._channel} of {self._left} bytes, "
                        "which no adbd sends: the connection is damaged, repeat the call"
                    )
                continue
            piece = view[: self._left]
            view = view[self._left :]
            self._left -= len(piece)
            if self._channel == EXIT:
                self.exit_code = piece[0]
            else:
                yield self._channel, piece


def parse_stat(stdout: bytes) -> RemoteStat:
    """Read what `stat -c '%s %f %Y'` printed; raises ProtocolError."""
    found = _STAT.fullmatch(stdout.strip())
    if found is None:
        raise ProtocolError(
            f"stat on the device printed {stdout[:80]!r}, not a size, a mode and a time: its stat "
            "command is not understood"
        )
    size, mode, modified = found.groups()
    return RemoteStat(int(size), int(mode, 16), int(modified))
