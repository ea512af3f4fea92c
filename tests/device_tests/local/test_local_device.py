"""The local device: looks like a phone to adb, reboots, fills up, and leaves this machine alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from adb_shell.adb_device import AdbDeviceTcp

from device_tests.local import adbd, memory_limit
from device_tests.local.adbd import LocalDeviceUnavailable
from device_tests.local.device import KeptDevice, LocalDevice, kept
from device_tests.local.fixture import MakeLocalDevice

REPOSITORY = Path(__file__).parents[3]


def say(device: LocalDevice | KeptDevice, command: str) -> str:
    """What the device's shell prints, its two streams in one."""
    connection = AdbDeviceTcp("127.0.0.1", device.port)
    connection.connect(transport_timeout_s=30, read_timeout_s=30)
    try:
        return connection.shell(f"{command} 2>&1", transport_timeout_s=30, read_timeout_s=30)
    finally:
        connection.close()


def test_has_a_folder_for_files_and_its_own_processes(local_device: LocalDevice) -> None:
    say(local_device, "echo hello > /data/local/tmp/greeting")
    assert local_device.path("/data/local/tmp/greeting").read_text() == "hello\n"
    assert int(say(local_device, "ls -d /proc/[0-9]* | wc -l")) < 10


def test_shows_this_machine_read_only(local_device: LocalDevice, tmp_path: Path) -> None:
    code = f"{sys.executable} -c 'import export.contract.bundle as b; print(b.__file__)'"
    assert (
        say(local_device, f"cd {REPOSITORY} && {code}")
        .strip()
        .endswith("export/contract/bundle.py")
    )
    assert "Read-only file system" in say(local_device, f"touch {REPOSITORY}/probe")
    assert "Read-only file system" in say(local_device, "touch /probe-of-etc /etc/probe")
    assert not (REPOSITORY / "probe").exists()
    say(local_device, "touch /tmp/only-on-the-device /dev/shm/only-on-the-device")
    say(local_device, "rm -f /dev/zero /dev/full")
    assert Path("/dev/zero").is_char_device() and Path("/dev/full").is_char_device()
    disks = say(local_device, "find /dev -type b; ls /dev/mem /dev/kmsg").splitlines()
    assert len(disks) == 2 and all("No such file" in line for line in disks)
    assert not Path("/tmp/only-on-the-device").exists()
    assert not Path("/dev/shm/only-on-the-device").exists()


def test_has_terminals(local_device: LocalDevice) -> None:
    code = "import os; print(os.ttyname(os.openpty()[1]))"
    assert say(local_device, f"{sys.executable} -I -S -c '{code}'").startswith("/dev/pts/")


def test_listens_on_loopback_only(local_device: LocalDevice) -> None:
    listening = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            address, port = line.split()[1].split(":")
            if int(port, 16) == local_device.port and line.split()[3] == "0A":
                listening.append(address)
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}
    assert len(listening) == 1 and set(listening) <= loopback
    sockets = subprocess.run(["ss", "--vsock", "-l"], capture_output=True, text=True, check=False)
    assert str(local_device.port) not in sockets.stdout


def test_reboot_ends_processes_keeps_files_and_changes_the_boot_id(
    make_local_device: MakeLocalDevice,
) -> None:
    device = make_local_device()
    before = say(device, "cat /proc/sys/kernel/random/boot_id").strip()
    say(device, "echo kept > /data/local/tmp/file; setsid sh -c 'sleep 1000 &' >/dev/null")
    assert "sleep" in say(device, "cat /proc/[0-9]*/comm")
    port = device.port
    device.restart()
    assert device.port == port
    after = say(device, "cat /proc/sys/kernel/random/boot_id").strip()
    assert len(before) == len(after) == 36 and before != after
    assert say(device, "cat /data/local/tmp/file") == "kept\n"
    assert "sleep" not in say(device, "cat /proc/[0-9]*/comm")


def test_a_dead_detached_process_leaves_no_zombie(local_device: LocalDevice) -> None:
    """Else `kill -0` on its number would succeed for ever."""
    pid = int(say(local_device, "(setsid sleep 0.1 >/dev/null </dev/null & echo $!)"))
    give_up = time.monotonic() + 10
    while "gone" not in say(local_device, f"kill -0 {pid} || echo gone"):
        assert time.monotonic() < give_up, "the process is still there"


def test_a_small_data_fills_up(make_local_device: MakeLocalDevice) -> None:
    device = make_local_device(data_bytes=8 * 2**20)
    said = say(device, "dd if=/dev/zero of=/data/local/tmp/big bs=1048576 count=16")
    assert "No space left on device" in said
    assert say(device, "stat -c %s /data/local/tmp/big").strip() == str(8 * 2**20)


def test_files_of_this_machine_lie_over_the_kernels(
    make_local_device: MakeLocalDevice,
    tmp_path: Path,
) -> None:
    """Over a folder that sysfs has, and over one that it lacks."""
    zones, clock = tmp_path / "thermal", tmp_path / "clock"
    (zones / "thermal_zone0").mkdir(parents=True)
    (zones / "thermal_zone0/temp").write_text("41000\n")
    clock.write_text("1800000\n")
    missing = "/sys/devices/system/cpu/cpu0/pocketdiff_probe/scaling_cur_freq"
    device = make_local_device(binds={zones: "/sys/class/thermal", clock: missing})
    assert say(device, "cat /sys/class/thermal/*/temp") == "41000\n"
    assert say(device, f"cat {missing}") == "1800000\n"
    assert "Cpus_allowed" in say(device, "cat /proc/self/status")
    assert say(device, "ls /sys/devices/system/cpu/cpu0/topology").strip()
    (zones / "thermal_zone0/temp").write_text("52000\n")
    assert say(device, "cat /sys/class/thermal/*/temp") == "52000\n"


def test_two_devices_at_once(
    local_device: LocalDevice,
    make_local_device: MakeLocalDevice,
) -> None:
    other = make_local_device()
    assert other.port != local_device.port
    say(other, "touch /data/local/tmp/only-there")
    assert "only-there" not in say(local_device, "ls /data/local/tmp")
    with pytest.raises(LocalDeviceUnavailable, match="taken by another process"):
        make_local_device(port=other.port)


def refuses(port: int, within_s: float = 10.0) -> bool:
    """Whether nothing listens there any more."""
    give_up = time.monotonic() + within_s
    while time.monotonic() < give_up:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return True
        time.sleep(0.02)
    return False


@pytest.mark.usefixtures("local_adbd")
def test_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from device_tests.local.device import LocalDevice\n"
        f"print(LocalDevice({str(tmp_path)!r}).start().port, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=REPOSITORY)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        assert not refuses(port, within_s=0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert refuses(port)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """The command line of the local device."""
    return subprocess.run(
        [sys.executable, "-m", "scripts.local_device", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )


@pytest.mark.usefixtures("local_adbd")
def test_a_command_runs_beside_a_device_of_its_own() -> None:
    done = command("run", "--", "sh", "-c", "echo $ANDROID_SERIAL; exit 4")
    assert done.returncode == 4 and done.stdout.startswith("127.0.0.1:")
    assert refuses(int(done.stdout.strip().rpartition(":")[2]))


@pytest.mark.usefixtures("local_adbd")
def test_a_kept_device_is_found_again_and_stopped(tmp_path: Path) -> None:
    folder = ("--folder", str(tmp_path))
    started = command("start", *folder)
    device = kept(tmp_path)
    try:
        assert device is not None and started.stdout.strip() == device.serial
        assert say(device, "echo hello") == "hello\n"
        with pytest.raises(LocalDeviceUnavailable, match="another local device runs in"):
            LocalDevice(tmp_path).start()
        assert command("status", *folder).stdout.strip() == device.serial
    finally:
        stopped = command("stop", *folder)
    assert stopped.returncode == 0 and kept(tmp_path) is None and refuses(device.port)
    again = command("stop", *folder)
    assert again.returncode == 2 and "no local device runs" in again.stderr


def test_over_its_memory_the_kernel_kills_the_largest(
    make_local_device: MakeLocalDevice,
) -> None:
    try:
        device = make_local_device(memory_bytes=96 * 2**20)
    except LocalDeviceUnavailable as error:
        pytest.skip(str(error))
    count = "grep oom_kill /proc/vmstat | cut -d' ' -f2"
    before = int(say(device, count))
    code = "b = bytearray(1 << 30); print(len(b))"
    said = say(device, f"{sys.executable} -I -S -c '{code}'; echo exit $?")
    assert "exit 137" in said
    assert int(say(device, count)) > before
    device.stop()
    assert not list(memory_limit._memory_cgroup().glob("pocketdiff-*"))


def test_unsigned_packages_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not Path("/usr/bin/apt-get").exists():
        pytest.skip("this system has no apt")
    packages = tmp_path / "mirror/dists/any/main/binary-amd64"
    packages.mkdir(parents=True)
    (packages / "Packages").write_text("")
    (tmp_path / "mirror/dists/any/Release").write_text("Suite: any\nComponents: main\n")
    keyring = tmp_path / "none.gpg"
    keyring.write_bytes(b"")
    source = adbd._Source(f"file:{tmp_path}/mirror", "any", "main", str(keyring))
    monkeypatch.setattr(adbd, "_source", lambda: source)
    monkeypatch.setenv(adbd.CACHE_VARIABLE, str(tmp_path / "cache"))
    with pytest.raises(LocalDeviceUnavailable, match="not signed"):
        adbd.adbd()
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(adbd.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LocalDeviceUnavailable, match="has no apt"):
        adbd.adbd()
    with pytest.raises(LocalDeviceUnavailable, match="C compiler"):
        adbd._compile(tmp_path / "library.so")


@pytest.mark.usefixtures("local_adbd")
def test_a_kernel_that_forbids_namespaces_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forbidding = tmp_path / "bin/unshare"
    forbidding.parent.mkdir()
    forbidding.write_text("#!/bin/sh\necho 'unshare: Operation not permitted' >&2\nexit 1\n")
    forbidding.chmod(0o755)
    monkeypatch.setenv("PATH", f"{forbidding.parent}:{os.environ['PATH']}")
    with pytest.raises(LocalDeviceUnavailable, match=r"Operation not permitted.*user namespaces"):
        LocalDevice(tmp_path / "device").start()
