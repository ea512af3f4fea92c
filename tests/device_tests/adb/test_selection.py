"""Which device is taken and by which way, with a real server, none, and several devices."""

from __future__ import annotations

import pytest

from device_tests.adb import direct as adb_direct
from device_tests.adb import server as adb_server
from device_tests.adb.link import Authorisation
from device_tests.adb.selection import DeviceEntry, list_devices, open_device
from device_tests.adb.server import ServerAddress
from device_tests.errors import DeviceGone, DeviceNotFound
from device_tests.local.device import LocalDevice
from device_tests.local.fixture import MakeLocalDevice
from quantize.errors import DeviceError

pytestmark = pytest.mark.usefixtures("no_usb")


@pytest.fixture
def no_usb(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The serials on USB as the test wants them; none to begin with."""
    serials: list[str] = []
    monkeypatch.setattr(adb_direct, "list_usb", lambda: serials)
    return serials


def test_an_address_is_reached_directly_without_a_server(
    shared_device: LocalDevice,
    no_server: ServerAddress,
) -> None:
    transport = open_device(shared_device.serial)
    assert (transport.kind, transport.serial) == ("tcp", shared_device.serial)
    assert transport.shell("exit 3").exit_code == 3
    transport.close()
    assert adb_server.server_version() is None


def test_the_environment_names_the_device(
    shared_device: LocalDevice,
    no_server: ServerAddress,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ANDROID_SERIAL", shared_device.serial)
    transport = open_device(None)
    assert transport.serial == shared_device.serial
    transport.close()
    with pytest.raises(DeviceGone):  # the argument is stronger
        open_device("127.0.0.1:1")


def test_a_running_server_that_lacks_the_address_is_not_needed(
    shared_device: LocalDevice,
    private_server: ServerAddress,
) -> None:
    transport = open_device(shared_device.serial)
    assert transport.kind == "tcp"
    transport.close()
    assert list_devices() == []


def test_asking_for_the_server_starts_it_and_connects(
    shared_device: LocalDevice,
    no_server: ServerAddress,
) -> None:
    transport = open_device(shared_device.serial, via="server")
    assert transport.kind == "server" and transport.shell("exit 3").exit_code == 3
    assert list_devices() == [DeviceEntry(shared_device.serial, "device", "server")]
    # Now the server has it, so it is the only device, and auto goes through the server.
    assert open_device(None).kind == "server"
    assert open_device(shared_device.serial).kind == "server"
    assert open_device(None, via="server").serial == shared_device.serial
    direct = open_device(shared_device.serial, via="direct")
    assert direct.kind == "tcp" and direct.shell("exit 3").exit_code == 3
    direct.close()


def test_of_several_one_must_be_named(
    shared_device: LocalDevice,
    make_local_device: MakeLocalDevice,
    private_server: ServerAddress,
) -> None:
    other = make_local_device()
    for device in (shared_device, other):
        open_device(device.serial, via="server")
    with pytest.raises(DeviceNotFound, match="2 devices answer adb") as refused:
        open_device(None)
    assert shared_device.serial in str(refused.value) and other.serial in str(refused.value)
    chosen = open_device(other.serial)
    chosen.push((other.folder / "boot_id").open("rb"), "/data/local/tmp/which", 8)
    assert other.path("/data/local/tmp/which").exists()


@pytest.mark.usefixtures("no_server")
def test_no_device_at_all() -> None:
    for via in ("auto", "server"):
        with pytest.raises(DeviceNotFound, match="no device answers adb; plug one in"):
            open_device(None, via=via)


@pytest.mark.usefixtures("no_server")
def test_devices_on_usb_are_listed_without_a_server(no_usb: list[str]) -> None:
    no_usb += ["R58AAA", "R58BBB"]
    assert list_devices() == [
        DeviceEntry("R58AAA", "attached", "usb"),
        DeviceEntry("R58BBB", "attached", "usb"),
    ]
    with pytest.raises(DeviceNotFound, match=r"R58AAA \(attached\), R58BBB \(attached\)"):
        open_device(None)


@pytest.mark.usefixtures("no_server")
def test_why_usb_cannot_be_looked_at_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[str]:
        raise DeviceError("direct USB needs libusb")

    monkeypatch.setattr(adb_direct, "list_usb", broken)
    said: list[str] = []
    assert list_devices(say=said.append) == [] and said == ["direct USB needs libusb"]
    with pytest.raises(DeviceNotFound, match="needs libusb"):
        open_device(None)


@pytest.mark.usefixtures("private_server")
def test_a_server_in_the_way_of_usb_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object, **__: object) -> None:
        raise DeviceError("the USB interface is held by another program")

    monkeypatch.setattr(adb_direct, "open_usb", busy)
    with pytest.raises(DeviceNotFound, match="holds the USB interface; go through the server"):
        open_device("R58AAA", via="direct")
    with pytest.raises(DeviceNotFound, match="knows no device 'R58AAA'"):
        open_device("R58AAA")


@pytest.mark.usefixtures("no_server")
def test_the_direct_way_to_usb_gets_key_and_voice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr(
        adb_direct, "open_usb", lambda serial, **options: asked.update(options, serial=serial)
    )
    open_device("R58AAA", key_folder=tmp_path, say=print)  # type: ignore[arg-type]
    assert asked == {
        "serial": "R58AAA",
        "authorisation": Authorisation(tmp_path, on_needed=print),  # type: ignore[arg-type]
    }
