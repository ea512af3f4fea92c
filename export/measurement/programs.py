"""The programs that a device is measured with, lowered through the same backend as a model.

Each is one kind of work alone, over weights larger than a processor's caches where reading them is
the point. Who runs them and what follows is `export.measurement.measure`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from export.backends import lower_stage
from export.models.blocks import MASKED
from export.models.staging import StageModule

PROGRAMS_FILE = "programs.json"
WIDTH = 2048
MOST_ROWS = 256
GROUP = 32
INT4_LAYERS, INT8_LAYERS = 28, 14
"""Weights of 66 and 59 MB, more than the caches of any device in mind."""
FP32_WIDTH, FP32_LAYERS = 4096, 2
"""Weights of 134 MB, read by one row: nothing but their reading takes time."""
HEADS, HEAD_DIM, KEYS = 8, 64, 512
SIMPLE_OPERATORS = 24
SMALL_OPERATORS = 96
COPIED_LAYERS = 4


class Chain(nn.Module):
    """Linears one after the other."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> Tensor:
        """[N, K] -> [N, K]."""
        for linear in self.linears:
            x = linear(x)
        return x


class Mixing(nn.Module):
    """Scores of stacked queries against keys, and the values mixed by them."""

    def __init__(self, *, softmax: bool) -> None:
        super().__init__()
        self.softmax = softmax

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """[heads, N, D], [heads, L, D] twice, [N, L] -> [heads, N, D]."""
        scores = torch.bmm(query, key.transpose(1, 2))
        if self.softmax:
            scores = torch.softmax(scores + mask, dim=-1)
        return torch.bmm(scores, value)


class Simple(nn.Module):
    """Elementwise operators one after the other, as in an activation."""

    def __init__(self, operators: int) -> None:
        super().__init__()
        self.operators = operators

    def forward(self, x: Tensor) -> Tensor:
        """[N, K] -> [N, K]; of every three operators one is a sigmoid."""
        start = x
        for _ in range(self.operators // 3):
            x = torch.sigmoid(x) * start + start
        return x


class Copying(nn.Module):
    """Rows taken out of a cache by index, as HRM-Text's slots are."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(COPIED_LAYERS):
            cache = torch.zeros(HEADS, 4 * KEYS, HEAD_DIM)
            self.register_buffer(f"cache{i}", cache)

    def forward(self, rows: Tensor) -> Tensor:
        """[L] int64 -> [layers, heads, L, D]."""
        caches = [getattr(self, f"cache{i}") for i in range(COPIED_LAYERS)]
        return torch.stack([torch.index_select(cache, 1, rows) for cache in caches])


def write_programs(folder: Path, tell: Callable[[str], None] = lambda _: None) -> None:
    """Lower all programs into `folder`, with a file that says what each is."""
    torch.manual_seed(0)
    rows = torch.zeros(MOST_ROWS, WIDTH)
    heads = torch.zeros(HEADS, MOST_ROWS, HEAD_DIM)
    keys = torch.zeros(HEADS, KEYS, HEAD_DIM)
    mask = torch.zeros(MOST_ROWS, KEYS)
    by_rows = {"query": {1: "rows"}, "mask": {0: "rows"}}
    mixing = ("query", "key", "value", "mask")
    stages = {
        "int4": _stage("int4", Chain(_linears(INT4_LAYERS, _int4)), (rows,), {"x": {0: "rows"}}),
        "int8": _stage("int8", Chain(_linears(INT8_LAYERS, _int8)), (rows,), {"x": {0: "rows"}}),
        "fp32": _stage("fp32", Mixing(softmax=False), (heads, keys, keys, mask), by_rows, mixing),
        "attention": _stage(
            "attention", Mixing(softmax=True), (heads, keys, keys, mask + MASKED), by_rows, mixing
        ),
        "simple": _stage("simple", Simple(SIMPLE_OPERATORS), (rows,), {"x": {0: "rows"}}),
        "small": _stage("small", Simple(SMALL_OPERATORS), (torch.zeros(1, 16),), {}),
        "call": _stage("call", Simple(3), (torch.zeros(1, 16),), {}),
        "bandwidth": _stage(
            "bandwidth", Chain(_plain_linears()), (torch.zeros(1, FP32_WIDTH),), {}
        ),
        "copy": _stage("copy", Copying(), (torch.arange(KEYS),), {}),
    }
    described = {}
    for name, (stage, operations, moved) in stages.items():
        tell(f"lowering {name}")
        lower_stage(stage, "xnnpack").write(folder / f"{name}.pte")
        described[name] = {
            "file": f"{name}.pte",
            "operations_per_row": operations,
            "bytes": moved,
            "inputs": [
                {
                    "shape": list(tensor.shape),
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "rows_axis": next(iter(stage.dynamic.get(input_name, {})), None),
                }
                for input_name, tensor in zip(stage.input_names, stage.example_inputs, strict=True)
            ],
        }
    (folder / PROGRAMS_FILE).write_text(json.dumps(described), encoding="utf-8")


def _stage(
    name: str,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    dynamic: dict[str, dict[int, str]],
    input_names: tuple[str, ...] | None = None,
) -> tuple[StageModule, float, int]:
    """The stage, its operations for one row, and the bytes of weights (or rows) that it moves."""
    names = input_names or (("rows",) if name == "copy" else ("x",))
    stage = StageModule(
        name=name,
        role="layers",
        module=module.eval(),
        example_inputs=inputs,
        input_names=names,
        output_names=("y",),
        dynamic=dynamic,
    )
    if isinstance(module, Chain):
        weights = [linear.weight for linear in module.linears]
        operations = sum(2.0 * weight.shape[0] * weight.shape[1] for weight in weights)
        return stage, operations, sum(4 * weight.numel() for weight in weights)
    if isinstance(module, Mixing):
        return stage, 4.0 * HEADS * KEYS * HEAD_DIM, 0
    if isinstance(module, Copying):
        # Each row is read and written twice: taken out of its cache, then stacked.
        return stage, 0.0, 2 * 2 * 4 * COPIED_LAYERS * HEADS * KEYS * HEAD_DIM
    operators = module.operators
    return stage, float(operators * inputs[0].shape[-1]), 0


def _linears(count: int, quantized: Callable[[Tensor], Tensor]) -> list[nn.Linear]:
    made = []
    for _ in range(count):
        linear = nn.Linear(WIDTH, WIDTH, bias=False, device="meta")
        weight = torch.randn(WIDTH, WIDTH) * WIDTH**-0.5
        linear.weight = nn.Parameter(quantized(weight), requires_grad=False)
        made.append(linear)
    return made


def _plain_linears() -> list[nn.Linear]:
    made = []
    for _ in range(FP32_LAYERS):
        linear = nn.Linear(FP32_WIDTH, FP32_WIDTH, bias=False)
        linear.weight.requires_grad_(False)
        made.append(linear)
    return made


def _int4(weight: Tensor) -> Tensor:
    made = IntxUnpackedToInt8Tensor.from_hp(
        weight, (1, GROUP), torch.int4, activation_quantization="int8_asym_per_token"
    )
    return IntxUnpackedToInt8Tensor(
        qdata=made.qdata,
        scale=made.scale.to(torch.bfloat16),  # as the recipes store them
        zero_point=made.zero_point,
        target_dtype=made.target_dtype,
        block_size=made.block_size,
        dtype=made.dtype,
        activation_quantization=made.activation_quantization,
    )


def _int8(weight: Tensor) -> Tensor:
    return IntxUnpackedToInt8Tensor.from_hp(
        weight, (1, WIDTH), torch.int8, activation_quantization="int8_asym_per_token"
    )
