"""Commands on a device, by both ways, on the double and on the real adbd."""

from __future__ import annotations

import threading

import pytest

from device_tests.adb import shell_stream
from device_tests.errors import CommandFailed, CommandTimeout, ProtocolError
from tests.support.adb_double import AdbDouble
from tests.support.adb_ways import Device, Way

MIB = 1024 * 1024


def test_shell_keeps_exit_code_and_outputs_apart(device: Device) -> None:
    result = device.transport.shell("printf 'a\\0\\r\\n\\377'; echo no >&2; exit 7")
    assert (result.exit_code, result.stdout, result.stderr) == (7, b"a\0\r\n\xff", b"no\n")


def test_shell_names_the_signal_by_the_exit_code(device: Device) -> None:
    assert device.transport.shell("kill -9 $$").exit_code == 137


def test_shell_has_no_input(device: Device) -> None:
    assert device.transport.shell("cat; echo end", timeout_s=10).stdout == b"end\n"


def test_shell_returns_long_output_whole(device: Device) -> None:
    result = device.transport.shell("seq 300000; seq 300000 >&2")
    expected = "".join(f"{i}\n" for i in range(1, 300001)).encode()
    assert result.stdout == expected and result.stderr == expected
    both = device.transport.shell("head -c 3000000 /dev/zero & head -c 3000000 /dev/zero >&2; wait")
    assert (len(both.stdout), len(both.stderr)) == (3000000, 3000000)


def test_shell_refuses_endless_output(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell_stream, "MAX_OUTPUT_BYTES", 100_000)
    with pytest.raises(ProtocolError, match="more than 100000 bytes"):
        device.transport.shell("cat /dev/zero")
    assert device.transport.shell("echo on").stdout == b"on\n"


def test_shell_reports_a_syntax_error_as_the_shell_does(device: Device) -> None:
    result = device.transport.shell("echo 'unfinished")
    assert result.exit_code != 0 and result.stderr


def test_shell_is_not_fooled_by_output_that_looks_like_a_reply(device: Device) -> None:
    """A frame `exit 0` printed by the command is just output."""
    result = device.transport.shell("printf '\\003\\001\\000\\000\\000\\000'; exit 5")
    assert (result.exit_code, result.stdout) == (5, b"\x03\x01\0\0\0\0")


def test_command_that_outlasts_its_time_leaves_the_transport_usable(device: Device) -> None:
    with pytest.raises(CommandTimeout, match=r"sleep 60 did not end within 0\.2 s"):
        device.transport.shell("echo begun; sleep 60", timeout_s=0.2)
    with pytest.raises(CommandTimeout):
        device.transport.shell("while true; do echo busy; sleep 0.01; done", timeout_s=0.3)
    assert device.transport.shell("echo on").stdout == b"on\n"


def test_command_that_outlasts_its_time_costs_no_connection(double: AdbDouble, way: Way) -> None:
    """Over USB opening another one would end what else goes on."""
    with way.open(double.port) as transport:
        for command in ("sleep 60", "echo on; sleep 60", "sleep 60 >&2"):
            with pytest.raises(CommandTimeout):
                transport.shell(command, timeout_s=0.1)
            assert transport.shell("echo on").stdout == b"on\n"
        assert double.connections == 1


def test_impossible_commands_are_refused(device: Device) -> None:
    with pytest.raises(CommandFailed, match="null character"):
        device.transport.shell("echo a\0b")
    with pytest.raises(CommandFailed, match="cannot be written as UTF-8"):
        device.transport.shell("echo \ud800")
    with pytest.raises(CommandFailed, match="longer than"):
        device.transport.shell("#" * (2 * MIB))
    assert device.transport.shell("true " + "x" * 60000).exit_code == 0


def test_threads_may_call_at_once(device: Device) -> None:
    results: dict[int, bytes] = {}

    def work(index: int) -> None:
        for _ in range(5):
            results[index] = device.transport.shell(f"seq {index} 3000").stdout

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        assert results[index] == "".join(f"{i}\n" for i in range(index, 3001)).encode()
