"""The matrix products of a dense decoder and its head, alone, through the backend that it uses.

What a denoising step cannot be faster than on a backend: the same quantized weights, 256 rows (or
as many as asked for), the rounding of the activations to int8 that each product needs, and nothing
else. `benchmarks.peer_llama_cpp` divides a whole step by it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from export.backends import lower_stage
from export.families.dense import DenseConfig
from export.heads.masked_diffusion import MaskedHead
from export.models.dense_decoder import build_layers
from export.models.dense_stages import head_table
from export.models.staging import StageModule
from quantize.checkpoint import open_checkpoint


class Products(nn.Module):
    """All linears of the layers in a chain, then the head's; of each a number is returned.

    A layer's products are chained as far as their shapes allow (query, output, gate, down), so that
    the backend can run them neither together nor not at all.
    """

    def __init__(self, layers: nn.ModuleList, head: nn.ModuleList) -> None:
        super().__init__()
        self.layers, self.head = layers, head

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, H] fp32 -> [1, products whose result goes nowhere else]."""
        kept = []
        for layer in self.layers:
            attention, mlp = layer.self_attn, layer.mlp
            kept += [attention.k_proj(x), attention.v_proj(x)]
            x = attention.o_proj(attention.q_proj(x))
            kept.append(mlp.up_proj(x))
            x = mlp.down_proj(mlp.gate_proj(x))
        kept += [product(x) for product in self.head]
        return torch.cat([value[:1, :1] for value in kept], dim=1)


def lower_products(int4: Path, rows: int, destination: Path) -> None:
    """Write the program of `rows` rows."""
    checkpoint = open_checkpoint(int4)
    config = DenseConfig.from_checkpoint_config(checkpoint.config)
    layers = build_layers(checkpoint, config, maximum_context=rows, prefill_length=rows)
    table = head_table(checkpoint, config)
    head = MaskedHead(table, mask_token=0, truncation=False)
    module = Products(layers.layers, head.vocabulary.logit_chunks).eval()
    stage = StageModule(
        name="products",
        role="layers",
        module=module,
        example_inputs=(torch.randn(rows, config.hidden_size),),
        input_names=("x",),
        output_names=("kept",),
    )
    lowered = lower_stage(stage, "xnnpack")
    partial = destination.with_suffix(".partial")
    lowered.write(partial)
    partial.rename(destination)
