"""What can go wrong between this machine and a device, each a sentence for the person."""

from __future__ import annotations

from quantize.errors import DeviceError


class DeviceNotFound(DeviceError):
    """No device answers, or several do and none was chosen."""


class DeviceUnauthorized(DeviceError):
    """The device does not trust this machine's key yet."""


class DeviceGone(DeviceError):
    """The connection broke; the device may come back, and what runs on it goes on."""


class CommandTimeout(DeviceError):
    """A command on the device did not end in its time."""


class ProtocolError(DeviceError):
    """The device, or the server between, answered what the protocol does not allow."""


class StorageFull(DeviceError):
    """The device has no room for what is to be written."""


class DeviceBusy(DeviceError):
    """Another benchmark has the device."""


class CommandFailed(DeviceError):
    """A command on the device ended with another exit code than 0."""


class AccessDenied(CommandFailed):
    """The user of adb's shell may not read or write a path."""
