"""Models that are run by PyTorch as their families build them, without being lowered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from export.host.engine import Engine, check_style, engine_of
from export.host.stages import LoadedStage, LoadedStages
from export.models.staging import StagedModel, StageModule


def eager_engine(staged: StagedModel) -> Engine:
    """The engine of a model; BundleError for what this program cannot run."""
    check_style(staged.info.name, staged.style, staged.info, staged.decoding)
    return engine_of(eager_stages(staged), staged.style, staged.sampler, staged.special_tokens)


def eager_stages(staged: StagedModel) -> LoadedStages:
    """All stages of a model, built now."""
    *layers, head = map(eager_stage, staged.stages)
    return LoadedStages(
        staged.info, layers, head, decoding=staged.decoding, schedule=staged.schedule
    )


def eager_stage(stage: StageModule) -> LoadedStage:
    """One stage, built now."""
    module = stage.load()

    def run(inputs: list[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            outputs = module(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return LoadedStage(stage.name, stage.input_names, stage.output_names, run)
