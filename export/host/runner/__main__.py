"""The entry point of `python -m export.host.runner`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from export.host.runner.run import run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="runner", description="Run one request of the runner protocol (docs/runner.md)."
    )
    parser.add_argument("request", type=Path, help="request.json in the run's own folder")
    code = run(parser.parse_args().request)
    # All is on the disk. PyTorch takes most of a second to be taken down, which nobody waits for.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
