"""Speed of a push: our two transports against the real `adb` client, to the same device and file.

    python -m benchmarks.push
    python -m benchmarks.push --cable 200

Starts a local device (Debian's adbd, /data in memory) and an adb server of its own on a free port,
and pushes one random file in turn by every way, each round beginning with another one. `adb` is
the client that comes with adbutils, as it is and with compression off (-Z); ours write the whole
file in one call, in the 64 MiB chunks of `pocketdiff push`, or are all that `pocketdiff push` does
with a bundle of that file: chunks, SHA-256 on the device, `sync`, renaming. After the first round
each way's file is compared by SHA-256 on the device. --cable N: all of it goes through a relay that
lets N MiB pass in a second, as a cable would; loopback is faster than any.

stdout: a table for people; the last line is one JSON document.
"""

import argparse
import json
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import adbutils

from device_tests.adb import direct as adb_direct
from device_tests.adb import server as adb_server
from device_tests.adb.transport import Transport
from device_tests.bench.deploy import CHUNK_BYTES, deploy
from device_tests.bench.inventory import clean
from device_tests.local.adbd import CACHE_VARIABLE, cache_folder
from device_tests.local.device import LocalDevice
from device_tests.remote.shell import DEVICE_ROOT
from export.contract.bundle import Bundle, write_bundle
from export.contract.manifest import Manifest, ModelInfo, Sampler, SpecialTokens, Stage, TensorSpec
from export.host.process import processor_name

FILE = "head.pte"
REMOTE = "/data/local/tmp/benchmark_push"
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cable", type=int, metavar="MIB_PER_S", help="default: no limit")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = _random_bundle(Path(folder) / "bundle", arguments.mib * MIB)
        _private_server_environment(folder)
        device_folder = Path(folder) / "device"
        with LocalDevice(device_folder, data_bytes=(arguments.mib + 256) * MIB) as device:
            try:
                adb_server.start_server()
                with _cable(device.port, arguments.cable) as port:
                    seconds = _measure(port, bundle, arguments.rounds)
            finally:
                subprocess.run([adbutils.adb_path(), "kill-server"], check=False)
    _report(arguments, seconds)


def _random_bundle(folder: Path, size_bytes: int) -> Bundle:
    """A bundle whose only file, FILE, is random."""
    spec = (TensorSpec("x", "int64", (1,)),)
    manifest = Manifest(
        model=ModelInfo("random", "random", 29, 8, 6, 40),
        style="uniform_diffusion",
        sampler=Sampler("entropy_bound", {}),
        special_tokens=SpecialTokens(),
        stages=(Stage("head", "head", "portable", FILE, spec, spec),),
        versions={},
    )
    return write_bundle(folder, manifest, {FILE: os.urandom(size_bytes)})


def _private_server_environment(home: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ[CACHE_VARIABLE] = str(cache_folder())
    os.environ.pop("ADB_SERVER_SOCKET", None)
    os.environ.update(ANDROID_ADB_SERVER_PORT=str(port), HOME=home, ADB_USB="0", ADB_MDNS="0")


@contextmanager
def _cable(device_port: int, mib_per_s: int | None) -> Iterator[int]:
    """The port by which the device is reached: its own, or that of a relay in another process."""
    if mib_per_s is None:
        yield device_port
        return
    listener = socket.create_server(("127.0.0.1", 0))
    relay = multiprocessing.get_context("fork").Process(
        target=_relay, args=(listener, device_port, mib_per_s * MIB), daemon=True
    )
    relay.start()
    try:
        yield listener.getsockname()[1]
    finally:
        relay.terminate()
        relay.join()


def _relay(listener: socket.socket, device_port: int, bytes_per_s: int) -> None:
    while True:
        here, _ = listener.accept()
        there = socket.create_connection(("127.0.0.1", device_port))
        for source, sink in ((here, there), (there, here)):
            threading.Thread(target=_carry, args=(source, sink, bytes_per_s), daemon=True).start()


def _carry(source: socket.socket, sink: socket.socket, bytes_per_s: int) -> None:
    """One direction of one connection. What waited makes up for it by 10 ms at most."""
    buffer = memoryview(bytearray(MIB))
    free_at = 0.0
    while count := source.recv_into(buffer):
        free_at = max(free_at, time.monotonic() - 0.01) + count / bytes_per_s
        time.sleep(max(0.0, free_at - time.monotonic()))
        sink.sendall(buffer[:count])
    sink.shutdown(socket.SHUT_RDWR)


def _measure(port: int, bundle: Bundle, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round by way, to the device at a port of loopback."""
    source, digest = bundle.path(FILE), bundle.files[FILE].sha256
    serial = f"127.0.0.1:{port}"
    server = adb_server.open_server(serial)
    direct = adb_direct.open_tcp("127.0.0.1", port)
    adb = [adbutils.adb_path(), "-s", serial, "push"]
    ways: dict[str, Callable[[], None]] = {
        "adb push": lambda: _adb([*adb, str(source), REMOTE]),
        "adb push -Z": lambda: _adb([*adb, "-Z", str(source), REMOTE]),
        "server, one call": lambda: _push(server, source, None),
        "server, chunks": lambda: _push(server, source, CHUNK_BYTES),
        "direct, one call": lambda: _push(direct, source, None),
        "direct, chunks": lambda: _push(direct, source, CHUNK_BYTES),
        "server, deployed": lambda: deploy(server, bundle),
        "direct, deployed": lambda: deploy(direct, bundle),
    }
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            print(f"round {number + 1}: {name}", file=sys.stderr)
            server.shell(f"rm -f {REMOTE}")
            clean(server)
            begin = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - begin)
            if number == 0:
                where = f"{REMOTE} {DEVICE_ROOT}/bundles/*/{FILE}"
                there = server.shell(
                    f"cat {where} 2>/dev/null | sha256sum", timeout_s=300
                ).text.split()
                if there[:1] != [digest]:
                    raise SystemExit(f"{name}: the file on the device is another: {there}")
    direct.close()
    return seconds


def _adb(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _push(transport: Transport, source: Path, chunk_bytes: int | None) -> None:
    size = source.stat().st_size
    step = chunk_bytes or size
    with source.open("rb") as file:
        for offset in range(0, size, step):
            transport.push(file, REMOTE, min(step, size - offset), offset=offset)


def _report(arguments: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    cable = " on loopback"
    if arguments.cable is not None:
        cable = f" behind a cable of {arguments.cable} MiB/s"
    table = Table(
        title=f"{arguments.mib} MiB to one adbd{cable}, {arguments.rounds} rounds in turn",
        title_justify="left",
    )
    headings = ("way", "median MiB/s", "slowest", "fastest", "of adb push", "of adb push -Z")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {
        name: {base: medians[base] / median for base in ("adb push", "adb push -Z")}
        for name, median in medians.items()
    }
    for name, times in seconds.items():
        rates = [arguments.mib / value for value in (medians[name], max(times), min(times))]
        table.add_row(
            name,
            *(f"{rate:.0f}" for rate in rates),
            *(f"{ratio:.2f}" for ratio in ratios[name].values()),
        )
    console = Console(width=100)
    console.print(table)
    console.print("ratios: of the medians; more than 1 is faster than adb")
    conditions = {
        "mib": arguments.mib,
        "rounds": arguments.rounds,
        "cable_mib_per_s": arguments.cable,
        "chunk_mib": CHUNK_BYTES // MIB,
        "cores": os.cpu_count(),
        "processor": processor_name(),
        "load_average_at_end": os.getloadavg(),
        "python": platform.python_version(),
        "adbutils": version("adbutils"),
        "adb_shell": version("adb-shell"),
    }
    document = {
        "benchmark": "push",
        "conditions": conditions,
        "seconds": {name: [round(t, 4) for t in times] for name, times in seconds.items()},
        "ratios_of_medians": ratios,
    }
    print(json.dumps(document, separators=(",", ":")))


if __name__ == "__main__":
    main()
