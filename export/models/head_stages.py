"""The stage "head" of each style, from the table of a model's head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from export.contract.styles.autoregressive import Autoregressive
from export.contract.styles.masked_diffusion import MaskedDiffusion
from export.contract.styles.uniform_diffusion import UniformDiffusion, UniformDiffusionSettings
from export.heads.autoregressive import AutoregressiveHead
from export.heads.masked_diffusion import MaskedHead
from export.models.staging import StageModule


def autoregressive_head_stage(
    table: Tensor,
    prefill_length: int,
    hidden_size: int,
    *,
    truncation: bool = True,
    soft_cap: float | None = None,
) -> StageModule:
    """The stage "head" of autoregressive decoding, for up to `prefill_length` rows of hidden."""
    return StageModule(
        name="head",
        role="head",
        module=AutoregressiveHead(table, truncation=truncation, soft_cap=soft_cap),
        example_inputs=(
            torch.zeros(1, prefill_length, hidden_size),
            torch.zeros(1, dtype=torch.int64),
            torch.tensor([0.0, 1.0, 0.0]),
            torch.full((1,), 0.5),
        ),
        input_names=Autoregressive.head_inputs,
        output_names=Autoregressive.head_outputs,
        dynamic={"hidden": {1: "tokens"}},
    )


def masked_head_stage(
    table: Tensor,
    prefill_length: int,
    canvas_length: int,
    hidden_size: int,
    *,
    mask_token: int,
    truncation: bool = True,
    soft_cap: float | None = None,
) -> StageModule:
    """The stage "head" of masked decoding: up to `canvas_length` + 1 of `prefill_length` rows."""
    rows = canvas_length + 1
    return StageModule(
        name="head",
        role="head",
        module=MaskedHead(table, mask_token=mask_token, truncation=truncation, soft_cap=soft_cap),
        example_inputs=(
            torch.zeros(1, prefill_length, hidden_size),
            torch.zeros(rows, dtype=torch.int64),
            torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0]),
            torch.ones(1, dtype=torch.int64),
            torch.full((rows,), 0.5),
        ),
        input_names=MaskedDiffusion.head_inputs,
        output_names=MaskedDiffusion.head_outputs,
        dynamic={"hidden": {1: "tokens"}, "rows": {0: "rows"}, "uniform": {0: "rows"}},
    )


def uniform_diffusion_head_stage(
    module: nn.Module | Callable[[], nn.Module], canvas_length: int, hidden_size: int
) -> StageModule:
    """The stage "head" of uniform diffusion around a `DiffusionHead`, or around what builds it."""
    tokens = torch.zeros(1, canvas_length, dtype=torch.int64)
    return StageModule(
        name="head",
        role="head",
        module=module,
        example_inputs=(
            torch.zeros(1, canvas_length, hidden_size),
            tokens,
            tokens - 1,
            torch.zeros(1, dtype=torch.int64),
            torch.ones(1, dtype=torch.int64),
            torch.from_numpy(UniformDiffusionSettings().as_array()),
            torch.full((1, canvas_length), 0.5),
            tokens.clone(),
            tokens.clone(),
        ),
        input_names=UniformDiffusion.head_inputs,
        output_names=UniformDiffusion.head_outputs,
    )
