"""What went wrong, whichever way it came: the one error, and its sentence, for each fault."""

from __future__ import annotations

from device_tests.adb.opener import TimedOut
from device_tests.errors import (
    AccessDenied,
    CommandFailed,
    DeviceGone,
    DeviceUnauthorized,
    ProtocolError,
    StorageFull,
)
from quantize.errors import DeviceError

MAXIMUM_QUOTED_CHARACTERS = 200
"""What a message quotes of a device's answer or of a command, at most."""

# As strerror has them in glibc, musl and bionic: ENOSPC, EDQUOT; EACCES, EPERM, EROFS.
_STORAGE_FULL = ("no space left on device", "quota exceeded")
_ACCESS_DENIED = ("permission denied", "operation not permitted", "read-only file system")


def says_storage_full(text: str) -> bool:
    """Whether a device's message means that there is no room (or no quota) left."""
    folded = text.lower()
    return any(words in folded for words in _STORAGE_FULL)


def failed_command(what: str, said: bytes, serial: str) -> CommandFailed | StorageFull:
    """The error of a command that failed; `what` begins its sentence, `said` is its stderr."""
    text = said.decode("utf-8", "replace")
    # Without dd's statistics.
    lines = [line for line in text.splitlines() if "records " not in line and " copied" not in line]
    reason = next((excerpt(line) for line in lines if line.strip()), "no reason given")
    sentence = f"{what} on {serial} ({reason})"
    if says_storage_full(text):
        return StorageFull(f"{sentence}: make room there, for instance with `pocketdiff clean`")
    if any(words in text.lower() for words in _ACCESS_DENIED):
        return AccessDenied(
            f"{sentence}: adb's shell may not do that; choose a path under /data/local/tmp"
        )
    return CommandFailed(f"{sentence}: check the path")


def broken(error: Exception, serial: str) -> DeviceError | TimedOut:
    """The error for a connection's: of sockets, adb-shell or libusb."""
    names = {type(cause).__name__ for cause in (error, *error.args)}
    if isinstance(error, TimeoutError) or "USBErrorTimeout" in names:
        return TimedOut()
    if "USBErrorBusy" in names:
        return DeviceError(
            f"the USB interface of {serial} is held by another program, most likely the adb "
            "server: stop it with adb kill-server, or use the device through it"
        )
    if "USBErrorAccess" in names:
        return DeviceError(
            f"this user may not open {serial} on USB: install the udev rules for Android devices "
            "(Debian: android-sdk-platform-tools-common) and plug it in again"
        )
    return gone(serial, f"{type(error).__name__}: {excerpt(str(error))}")


def refused_by_server(said: str, serial: str, server: str) -> DeviceError:
    """The error for the reason with which the adb server refused a request."""
    if "unauthorized" in said or "authenticat" in said:
        return unauthorized(serial)
    if any(words in said for words in ("not found", "offline", "closed", "no devices")):
        return gone(serial, f"the adb server at {server}: {excerpt(said)}")
    return ProtocolError(
        f"the adb server at {server} refused for {serial}: {excerpt(said)!r}; update adb"
    )


def gone(serial: str, reason: str) -> DeviceGone:
    """A connection that broke, or is not there."""
    return DeviceGone(
        f"the connection to {serial} is broken ({reason}): check the cable or the network and that "
        "the device is on"
    )


def unauthorized(serial: str, detail: str = "") -> DeviceUnauthorized:
    """A device whose owner did not allow this machine, or not yet."""
    return DeviceUnauthorized(
        f'{serial} does not trust this machine{detail}: unlock its screen, press "Allow" under '
        '"Allow USB debugging?" and try again'
    )


def not_begun(serial: str, timeout_s: float) -> DeviceGone:
    """A device that did not even open a shell."""
    return DeviceGone(
        f"{serial} did not begin a command within {timeout_s:g} s: check the cable or the network "
        "and that the device is on"
    )


def stalled(what: str, serial: str, stall_s: float) -> DeviceGone:
    """A transfer of which nothing moved."""
    return DeviceGone(
        f"{serial} moved nothing for {stall_s:g} s while {what}: check the cable or the network "
        "and go on"
    )


def excerpt(text: str) -> str:
    """One printable line of what a device said, or of a command, shortened in the middle."""
    line = " ".join(text.split())
    line = "".join(character if character.isprintable() else "\ufffd" for character in line)
    if len(line) <= MAXIMUM_QUOTED_CHARACTERS:
        return line
    half = MAXIMUM_QUOTED_CHARACTERS // 2
    return f"{line[:half]} … {line[-half:]}"
