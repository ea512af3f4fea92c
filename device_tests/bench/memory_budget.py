"""Whether a bundle can run in the memory that a device has free now, asked before it is sent.

The budget itself is `export.plan.budget`'s, from the bundle's own program files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from device_tests.adb.transport import Transport
from device_tests.remote.shell import run_checked
from export.contract.bundle import Bundle
from export.plan.budget import LINUX_RUNNER, Budget, budget_of_bundle
from quantize.errors import BundleError

AVAILABLE_COMMAND = "grep '^MemAvailable:' /proc/meminfo || :"


@dataclass(frozen=True)
class RunBudget:
    """The budget of one bundle on one device; `warning` is a sentence if a run cannot be expected
    to fit, None otherwise."""

    budget: Budget
    warning: str | None

    def to_json(self) -> dict[str, object]:
        """For the verbs' documents; bytes."""
        return {
            "needed_bytes": self.budget.total_bytes,
            "anonymous_bytes": self.budget.anonymous_bytes,
            "available_bytes": self.budget.available_bytes,
            "verdict": self.budget.verdict,
            "warning": self.warning,
        }


def available_bytes(transport: Transport) -> int | None:
    """What the device says a process can have without swapping (MemAvailable); None if it does not
    say. Raises a DeviceError if it cannot be asked."""
    return parse_available(run_checked(transport, AVAILABLE_COMMAND).text)


def parse_available(text: str) -> int | None:
    """The bytes in the answer to AVAILABLE_COMMAND."""
    found = re.fullmatch(r"MemAvailable:\s+(\d{1,15}) kB", text.strip(), re.ASCII)
    return int(found[1]) * 1024 if found else None


def run_budget(transport: Transport, bundle: Bundle) -> RunBudget | None:
    """The budget of a run there; None for programs whose files do not say how much they need."""
    try:
        budget = budget_of_bundle(bundle, None, available_bytes(transport), runtime=LINUX_RUNNER)
    except BundleError:
        return None  # not of the backend that this project lowers to; only a run shows it
    return RunBudget(budget, warning_of(budget, transport.serial))


def warning_of(budget: Budget, serial: str) -> str | None:
    """What to say before a run that may not fit."""
    if budget.verdict in (None, "fits"):
        return None
    ending = (
        "the run may be slow or be killed"
        if budget.verdict == "tight"
        else "the run can be expected to be killed"
    )
    return (
        f"memory on {serial}: {budget.verdict} ({budget.reason}); {ending}. Take a smaller recipe, "
        "or export with a shorter --context"
    )
