"""The command line `pocketdiff`: the table of its verbs, and its entry point."""

from __future__ import annotations

import logging
import sys
import warnings

import typer

from scripts.commands import end_on_signals, run_command
from scripts.verbs import (
    bench,
    clean,
    compare,
    devices,
    evaluate,
    export,
    generate,
    inspect,
    plan,
    push,
    quantize,
    report,
)

VERBS = (
    plan.plan,
    quantize.quantize,
    export.export,
    inspect.inspect,
    generate.generate,
    evaluate.evaluate,
    devices.devices,
    push.push,
    bench.bench,
    report.report,
    compare.compare,
    clean.clean,
)

app = typer.Typer(
    help="Text-diffusion language models on phones: quantize, lower, run, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for verb in VERBS:
    app.command()(verb)


def main() -> None:
    """The entry point."""
    end_on_signals()
    # Libraries warn of kernels that are for other processors, and of their own renamings.
    for library in ("torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a verb; what a user can cause becomes a sentence on stderr. Returns the exit code."""
    return run_command(lambda: app(arguments, prog_name="pocketdiff"), "pocketdiff")


if __name__ == "__main__":
    main()
