"""Commands for a device's shell: quoted, checked, their failures put in one sentence.

Written for the smaller of both worlds: toybox with mksh (Android 8 and later), coreutils with dash.
"""

from __future__ import annotations

import shlex

from device_tests.adb.faults import excerpt, says_storage_full
from device_tests.adb.transport import ShellResult, Transport
from device_tests.errors import CommandFailed, StorageFull

DEVICE_ROOT = "/data/local/tmp/pocketdiff"
"""Everything of ours on a device lies here; the user `shell` may write and execute in it."""


def quote(*words: str) -> str:
    """The words as the shell takes them unchanged, with spaces between.

    Give absolute paths: a file name that begins with `-` would be read as an option.
    """
    return " ".join(shlex.quote(word) for word in words)


def run_checked(transport: Transport, command: str, timeout_s: float = 30.0) -> ShellResult:
    """Run `command` on the device and insist on the exit code 0.

    Raises StorageFull if the device said that it has no room, CommandFailed for any other exit
    code, and what `Transport.shell` raises.
    """
    result = transport.shell(command, timeout_s=timeout_s)
    if result.exit_code != 0:
        raise failure(transport, command, result)
    return result


def failure(transport: Transport, command: str, result: ShellResult) -> CommandFailed | StorageFull:
    """The error that says how `command` failed; for callers that look at exit codes themselves."""
    said = excerpt(result.error_text) or excerpt(result.text)
    if says_storage_full(result.error_text + result.text):
        return StorageFull(
            f"the device {transport.serial} has no room left ({said}); delete something there, "
            "or remove earlier bundles with `pocketdiff clean`"
        )
    code = result.exit_code
    how = f"was killed by signal {code - 128}" if 128 < code < 193 else f"ended with {code}"
    return CommandFailed(
        f"a command on the device {transport.serial} {how} ({said or 'it said nothing'}): "
        f"{excerpt(command)}; look there with `adb -s {transport.serial} shell`"
    )
