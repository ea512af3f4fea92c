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
from quantize.packing import with_parts

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

    def work(self) -> tuple[float, int]:
        """Operations for one row, and bytes of weights in fp32."""
        numbers = sum(linear.weight.numel() for linear in self.linears)
        return 2.0 * numbers, 4 * numbers


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

    def work(self) -> tuple[float, int]:
        """Operations for one row; no weights."""
        return 4.0 * HEADS * KEYS * HEAD_DIM, 0


class Simple(nn.Module):
    """Elementwise operators one after the other, as in an activation."""

    def __init__(self, operators: int, width: int) -> None:
        super().__init__()
        self.operators, self.width = operators, width

    def forward(self, x: Tensor) -> Tensor:
        """[N, K] -> [N, K]; of every three operators one is a sigmoid."""
        start = x
        for _ in range(self.operators // 3):
            x = torch.sigmoid(x) * start + start
        return x

    def work(self) -> tuple[float, int]:
        """Operations for one row; no weights."""
        return float(self.operators * self.width), 0


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

    def work(self) -> tuple[float, int]:
        """No operations; bytes of rows, read and written when taken out of a cache and stacked."""
        return 0.0, 2 * 2 * 4 * COPIED_LAYERS * HEADS * KEYS * HEAD_DIM


def write_programs(folder: Path, tell: Callable[[str], None] = lambda _: None) -> None:
    """Lower all programs into `folder`, with a file that says what each is."""
    torch.manual_seed(0)
    rows = {"x": torch.zeros(MOST_ROWS, WIDTH)}
    narrow = {"x": torch.zeros(1, 16)}
    keys = torch.zeros(HEADS, KEYS, HEAD_DIM)
    mixing = {
        "query": torch.zeros(HEADS, MOST_ROWS, HEAD_DIM), "key": keys, "value": keys,
        "mask": torch.full((MOST_ROWS, KEYS), MASKED),
    }  # fmt: skip
    by_row = {"x": {0: "rows"}}
    by_query = {"query": {1: "rows"}, "mask": {0: "rows"}}
    programs: dict[str, tuple[Chain | Mixing | Simple | Copying, dict, dict]] = {
        "int4": (Chain(_linears(INT4_LAYERS, _int4)), rows, by_row),
        "int8": (Chain(_linears(INT8_LAYERS, _int8)), rows, by_row),
        "fp32": (Mixing(softmax=False), mixing, by_query),
        "attention": (Mixing(softmax=True), mixing, by_query),
        "simple": (Simple(SIMPLE_OPERATORS, WIDTH), rows, by_row),
        "small": (Simple(SMALL_OPERATORS, 16), narrow, {}),
        "call": (Simple(3, 16), narrow, {}),
        "bandwidth": (Chain(_plain_linears()), {"x": torch.zeros(1, FP32_WIDTH)}, {}),
        "copy": (Copying(), {"rows": torch.arange(KEYS)}, {}),
    }
    described = {}
    for name, (module, inputs, dynamic) in programs.items():
        tell(f"lowering {name}")
        stage = StageModule(
            name=name,
            role="layers",
            module=module.eval(),
            example_inputs=tuple(inputs.values()),
            input_names=tuple(inputs),
            output_names=("y",),
            dynamic=dynamic,
        )
        lower_stage(stage, "xnnpack").write(folder / f"{name}.pte")
        operations, moved = module.work()
        described[name] = {
            "file": f"{name}.pte",
            "operations_per_row": operations,
            "bytes": moved,
            "inputs": [
                {
                    "shape": list(tensor.shape),
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "rows_axis": next(iter(dynamic.get(input_name, {})), None),
                }
                for input_name, tensor in inputs.items()
            ],
        }
    (folder / PROGRAMS_FILE).write_text(json.dumps(described), encoding="utf-8")


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
    return with_parts(made, scale=made.scale.to(torch.bfloat16))  # as the recipes store them


def _int8(weight: Tensor) -> Tensor:
    return IntxUnpackedToInt8Tensor.from_hp(
        weight, (1, WIDTH), torch.int8, activation_quantization="int8_asym_per_token"
    )
