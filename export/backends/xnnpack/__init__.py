"""The backend XNNPACK: ExecuTorch programs for CPUs."""

from __future__ import annotations

from pathlib import Path

from export.backends import Backend, LoweredStage
from export.models.staging import StageModule

# What lowers imports ExecuTorch's exporter, which takes seconds: not before there is work for it.


class XnnpackBackend(Backend):
    """Lowers to XNNPACK's delegate, and exchanges weights in the program file."""

    def lower(self, stage: StageModule) -> LoweredStage:
        """See `Backend.lower`."""
        from export.backends.xnnpack.lowering import lower_stage

        return lower_stage(stage)

    def instantiate(self, stage: StageModule, folder: Path) -> LoweredStage:
        """See `Backend.instantiate`."""
        from export.backends.xnnpack.templates import instantiate

        return instantiate(stage, folder)


BACKEND = XnnpackBackend()
