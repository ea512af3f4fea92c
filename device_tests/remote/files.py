"""Files on a device through its shell: sizes, SHA-256, free space, folders, removal.

What the files are for is not known here. The commands keep to what toybox, busybox and coreutils
share, and leave arithmetic to Python: numbers in Android's mksh have 32 bits.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence

from device_tests.adb.transport import ShellResult, Transport
from device_tests.errors import ProtocolError
from device_tests.remote.shell import excerpt, quote

Run = Callable[[str, float], ShellResult]
"""Runs a command with a time-out in seconds and raises unless it ends with 0."""

SLOWEST_BYTES_PER_S = 10 * 2**20
"""For time-outs only: no device hashes, copies or writes back to its storage slower than this."""

MAXIMUM_COMMAND_BYTES = 3000
"""The oldest adbd take 4096 bytes in a message, and a command must fit into one."""

SHA256SUM = "sha256sum"
OPENSSL = "openssl dgst -sha256 -r"
"""Uses the processor's instructions for it, where coreutils' `sha256sum` may be five times slower
(toybox, on Android, uses them too)."""

_BLOCK_BYTES = 2**20
_RANGES_PER_COMMAND = 16
_SHA256 = re.compile(r"([0-9a-f]{64})\b")
_KNOWN_TEXT = "pocketdiff"


def transfer_timeout_s(count_bytes: int) -> float:
    """How long a command may take that reads or writes `count_bytes`."""
    return 60.0 + count_bytes / SLOWEST_BYTES_PER_S


def sizes_bytes(run: Run, paths: Sequence[str]) -> list[int | None]:
    """The size of each path, None where there is no regular file or a symbolic link."""
    found: list[int | None] = []
    for batch in _batches(paths):
        command = (
            f"for f in {quote(*batch)}; do "
            '[ -f "$f" ] && [ ! -L "$f" ] && stat -c %s "$f" || echo -; done'
        )
        lines = run(command, 60.0).text.split()
        if len(lines) != len(batch):
            raise _unexpected(command, " ".join(lines))
        found += [None if line == "-" else _integer(command, line) for line in lines]
    return found


def hash_program(transport: Transport) -> str:
    """OPENSSL where the device has it and prints the right hash of a known text, else SHA256SUM.

    Both read standard input and print the hash first.
    """
    said = transport.shell(f"printf %s {_KNOWN_TEXT} | {OPENSSL}").text.strip()
    right = hashlib.sha256(_KNOWN_TEXT.encode()).hexdigest()
    return OPENSSL if said.split(" ")[0] == right else SHA256SUM


def sha256(run: Run, path: str, size_bytes: int, program: str) -> str | None:
    """The SHA-256 of a regular file of about `size_bytes`, None if there is none.

    program: what `hash_program` found.
    """
    # Read as standard input: no name is printed that could be escaped.
    command = f'f={quote(path)}; [ -f "$f" ] && [ ! -L "$f" ] && {program} < "$f" || echo -'
    text = run(command, transfer_timeout_s(size_bytes)).text.strip()
    return None if text == "-" else _digest(command, text)


def chunk_sha256s(
    run: Run, path: str, begin_bytes: int, end_bytes: int, chunk_bytes: int, program: str
) -> Iterator[str]:
    """The SHA-256 of each chunk of the file from `begin_bytes`, the last one up to its end.

    `begin_bytes` is a multiple of `chunk_bytes`; what lies at `end_bytes` and
    beyond must not be there yet, or be where a chunk ends.
    """
    block = math.gcd(chunk_bytes, _BLOCK_BYTES)
    first, last = begin_bytes // chunk_bytes, math.ceil(end_bytes / chunk_bytes)
    for start in range(first, last, _RANGES_PER_COMMAND):
        chunks = range(start, min(start + _RANGES_PER_COMMAND, last))
        skips = " ".join(str(chunk * (chunk_bytes // block)) for chunk in chunks)
        command = (
            f"for s in {skips}; do dd if={quote(path)} bs={block} skip=$s "
            f"count={chunk_bytes // block} 2>/dev/null | {program}; done"
        )
        lines = run(command, transfer_timeout_s(len(chunks) * chunk_bytes)).text.splitlines()
        if len(lines) != len(chunks):
            raise _unexpected(command, " ".join(lines))
        for line in lines:
            yield _digest(command, line)


def free_bytes(run: Run, folder: str) -> int:
    """What an ordinary user may still write where `folder` lies."""
    command = f"stat -f -c '%a %S' {quote(folder)}"
    text = run(command, 30.0).text
    words = text.split()
    if len(words) != 2:
        raise _unexpected(command, text)
    return _integer(command, words[0]) * _integer(command, words[1])


def names(run: Run, folder: str) -> list[str]:
    """What lies in `folder`, one name a line as `ls` says; empty if there is no such folder or
    it is a symbolic link."""
    path = quote(folder)
    command = f"if [ -d {path} ] && [ ! -L {path} ]; then ls -a {path}; fi"
    return [name for name in run(command, 30.0).text.splitlines() if name not in (".", "..")]


def make_folders(run: Run, paths: Sequence[str]) -> None:
    """Make folders, with those above, where they are not there."""
    for batch in _batches(paths):
        run(f"mkdir -p {quote(*batch)}", 30.0)


def remove(run: Run, paths: Sequence[str]) -> None:
    """Remove files, folders with all they hold, and symbolic links (not what they lead to)."""
    for batch in _batches(paths):
        run(f"rm -rf {quote(*batch)}", 600.0)


def occupied_bytes(run: Run, paths: Sequence[str]) -> int:
    """What the paths occupy in blocks, a file of several names once per command."""
    total = 0
    for batch in _batches(paths):
        command = f"du -sk {quote(*batch)}; true"  # something may have gone meanwhile
        for line in run(command, 600.0).text.splitlines():
            total += _integer(command, line.split(maxsplit=1)[0] if line.strip() else "") * 1024
    return total


def _batches(paths: Sequence[str]) -> Iterator[list[str]]:
    """The paths in groups that fit into one command."""
    batch: list[str] = []
    length = 0
    for path in paths:
        needed = len(quote(path).encode()) + 1
        if batch and length + needed > MAXIMUM_COMMAND_BYTES:
            yield batch
            batch, length = [], 0
        batch.append(path)
        length += needed
    if batch:
        yield batch


def _digest(command: str, text: str) -> str:
    if (match := _SHA256.match(text)) is None:
        raise _unexpected(command, text)
    return match.group(1)


def _integer(command: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise _unexpected(command, text)
    return int(text)


def _unexpected(command: str, text: str) -> ProtocolError:
    return ProtocolError(
        f"the device answered {excerpt(text)!r} to `{excerpt(command)}`; "
        "look whether its shell has these commands"
    )
