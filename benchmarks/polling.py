"""What looking at a run costs it: step time under polls of different periods, in turn.

    python -m benchmarks.polling BUNDLE [--rounds 5]

Runs BUNDLE on a local device, the same workload each time, and looks at the run every 10 s (no poll
falls into its measured part), every second (what `pocketdiff bench` does) and five times a second.
The figure is the median over rounds of the ratio of a run's median step time to that of the run of
the same round that was left alone.

stdout: a table for people; the last line is one JSON document.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path

from device_tests.adb.direct import open_tcp
from device_tests.bench.deploy import deploy
from device_tests.bench.measurement import bench
from device_tests.bench.plan import BenchPlan
from device_tests.bench.runner import choose_runner
from device_tests.local.device import LocalDevice
from device_tests.remote import conditions
from export.contract.bundle import open_bundle

PERIODS_S = (10.0, 1.0, 0.2)
MEASURED_S = 4.0
"""About how long the steps of a run should take, so that some polls fall among them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    bundle = open_bundle(arguments.bundle)
    step_ms: dict[float, list[float]] = {period: [] for period in PERIODS_S}
    with tempfile.TemporaryDirectory() as folder, LocalDevice(Path(folder) / "device") as device:
        transport = open_tcp("127.0.0.1", device.port)
        runner = choose_runner(conditions.read_device(transport).android_sdk)
        deployment = deploy(transport, bundle)

        def median_step_ms(poll_s: float, steps: int) -> float:
            plan = BenchPlan(
                passes={"speed": 1},
                threads=(arguments.threads,),
                force_steps=steps,
                poll_s=poll_s,
            )
            results = Path(folder) / f"{len(os.listdir(folder))}.jsonl"
            outcome = bench(transport, bundle, deployment, runner, plan, results)
            [record] = outcome.records
            if record["status"] != "ok":
                raise SystemExit(record["failure"]["sentence"])
            return record["metrics"]["step_ms"]

        steps = max(16, round(1000 * MEASURED_S / median_step_ms(1.0, 64)))
        for number in range(arguments.rounds):
            order = PERIODS_S if number % 2 == 0 else PERIODS_S[::-1]
            for period in order:
                step_ms[period].append(median_step_ms(period, steps))
        transport.close()
    alone = step_ms[PERIODS_S[0]]
    rows = []
    print(f"{bundle.manifest.model.name}, {steps} steps a run, {arguments.threads} threads, ")
    print(f"{platform.machine()}, {os.cpu_count()} cores, {arguments.rounds} rounds in turn\n")
    print(f"{'looked at every':>16} {'step, median ms':>16} {'ratio to alone':>15}")
    for period in PERIODS_S:
        ratios = [a / b for a, b in zip(step_ms[period], alone, strict=True)]
        row = {
            "poll_s": period,
            "step_ms": statistics.median(step_ms[period]),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        }
        rows.append(row)
        print(f"{period:>14g} s {row['step_ms']:>16.3f} {row['ratio']:>15.3f}")
    print(json.dumps({"bundle": bundle.manifest.model.name, "steps": steps, "rows": rows}))


if __name__ == "__main__":
    main()
