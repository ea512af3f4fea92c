"""A running command on a device: its input, its output as it comes, its exit code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from device_tests.adb import faults
from device_tests.adb.faults import excerpt
from device_tests.adb.opener import ByteStream, Deadline, Opener
from device_tests.adb.shell_reply import CLOSE_STDIN, FRAME, STDERR, STDIN, STDOUT, ShellReply
from device_tests.errors import CommandFailed, ProtocolError

MAX_OUTPUT_BYTES = 64 * 1024 * 1024
"""What is kept of a command's output; more belongs into a file and through `pull`."""


class ShellStream:
    """A running command; `exit_code` is None until `pieces` has ended."""

    def __init__(self, stream: ByteStream, command: str, serial: str) -> None:
        self._stream = stream
        self._command = command
        self._serial = serial
        self._reply = ShellReply()
        self.best_input_bytes = stream.best_write_bytes - FRAME.size
        self.has_output = stream.has_input

    @property
    def exit_code(self) -> int | None:
        """128 + n: killed by signal n."""
        return self._reply.exit_code

    def write(self, frame: memoryview, deadline: Deadline) -> bool:
        """Send a frame whose first FRAME.size bytes are free; False if no more is taken."""
        FRAME.pack_into(frame, 0, STDIN, len(frame) - FRAME.size)
        return self._stream.write(frame, deadline)

    def end_input(self, deadline: Deadline) -> None:
        """Let the command read the end of its input."""
        self._stream.write(CLOSE_STDIN, deadline)

    def pieces(self, deadline: Callable[[], Deadline]) -> Iterator[tuple[int, memoryview]]:
        """STDOUT or STDERR and what came there, up to the exit code.

        `deadline` is called for each wait.
        """
        while self.exit_code is None:
            data = self._stream.read(deadline())
            if not data:
                raise faults.gone(self._serial, f"no exit code of {excerpt(self._command)!r} came")
            yield from self._reply.feed(data)

    def collect(self, deadline: Callable[[], Deadline]) -> dict[int, bytearray]:
        """All that the command prints, by STDOUT and STDERR."""
        output = {STDOUT: bytearray(), STDERR: bytearray()}
        for channel, data in self.pieces(deadline):
            keep(output[channel], data)
        return output


@contextmanager
def running(opener: Opener, command: str, deadline: Deadline) -> Iterator[ShellStream]:
    """`command` begun by the device's shell; raises CommandFailed if it cannot be sent."""
    try:
        service = b"shell,v2,raw:" + command.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise CommandFailed(f"{excerpt(command)} cannot be written as UTF-8") from error
    if b"\0" in service:
        raise CommandFailed(f"{excerpt(command)} has a null character: no shell can run it")
    with opener.open(service, deadline) as stream:
        yield ShellStream(stream, command, opener.serial)


def keep(output: bytearray, data: memoryview) -> None:
    """Append to what a command printed; raises ProtocolError if it becomes too much."""
    if len(output) + len(data) > MAX_OUTPUT_BYTES:
        raise ProtocolError(
            f"a command printed more than {MAX_OUTPUT_BYTES} bytes: let it write a file and pull "
            "that"
        )
    output += data
