"""Files that several tests share are made once a run, whichever of its processes comes first."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def run_folder(factory: pytest.TempPathFactory) -> Path:
    """The temporary folder that all processes of this run of pytest share."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder or file `name`, made by `make(path)` unless another process of the run has.

    `make` leaves it whole or raises; processes that ask at the same time wait for the first one.
    """
    path = run_folder(factory) / "made_once" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            making = path.parent / "making" / path.name  # names of models are those of folders
            making.parent.mkdir(exist_ok=True)
            make(making)
            making.rename(path)
    return path
