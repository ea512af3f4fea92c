"""The models that `benchmarks.plan_accuracy` measures: few wide layers, random weights.

    python -m benchmarks.plan_accuracy_models WORK [NAME ...]

Writes each as a checkpoint, quantizes it and lowers it to WORK/NAME.bundle, once.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Model:
    """A config of transformers, and what our exporter is told.

    kind: `qwen3`, `diffusion_gemma` or `hrm_text`. config: changes to the class's defaults.
    written: changes to the config.json that is written, such as another model_type of the same
    layers. context: positions of the KV cache. recipe: of the quantizer.
    """

    kind: str
    config: dict[str, Any]
    context: int
    written: dict[str, Any] | None = None
    recipe: str = "int4-g32"


_DENSE_SMALL = {
    "vocab_size": 32_768, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 6,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
_DENSE_LARGE = _DENSE_SMALL | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 3, "head_dim": 128,
}  # fmt: skip
_BLOCKS = {"model_type": "a2d-qwen3", "block_size": 32, "mask_token_id": 7, "eos_token_id": 1}
_CAUSAL = {"eos_token_id": 1}
_DIFFUSION_SMALL = {
    "vocab_size": 32_768, "max_position_embeddings": 4096, "sliding_window": 256,
    "hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 4,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 96, "global_head_dim": 192,
    "num_global_key_value_heads": 1, "num_experts": 8, "top_k_experts": 2,
    "moe_intermediate_size": 512, "final_logit_softcapping": 30.0,
}  # fmt: skip
_DIFFUSION_LARGE = _DIFFUSION_SMALL | {
    "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"], "moe_intermediate_size": 1024,
}  # fmt: skip
_HRM_SMALL = {
    "vocab_size": 32_768, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 3,
    "num_attention_heads": 16, "head_dim": 64, "max_position_embeddings": 1024, "prefix_lm": False,
    "H_cycles": 2, "L_cycles": 2, "eos_token_id": 1,
}  # fmt: skip
_HRM_LARGE = _HRM_SMALL | {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 2, "head_dim": 128,
}  # fmt: skip

MODELS = {
    "masked-small": Model("qwen3", _DENSE_SMALL, 512, _BLOCKS),
    "masked-large": Model("qwen3", _DENSE_LARGE, 1024, _BLOCKS),
    "uniform-small": Model("diffusion_gemma", _DIFFUSION_SMALL, 512),
    "uniform-large": Model("diffusion_gemma", _DIFFUSION_LARGE, 1024),
    "hrm-small": Model("hrm_text", _HRM_SMALL, 256),
    "hrm-large": Model("hrm_text", _HRM_LARGE, 512),
    "causal-small": Model("qwen3", _DENSE_SMALL, 512, _CAUSAL),
}
"""Two sizes of three families; `causal` is the autoregressive twin of `masked`."""

_CANVAS = {"uniform-small": 64, "uniform-large": 128}
_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 16, "patch_size": 4, "position_embedding_size": 8,
}  # fmt: skip


def bundle_of(work: Path, name: str) -> Path:
    """The bundle of a model of MODELS, made at the first time; minutes."""
    bundle, model = work / f"{name}.bundle", MODELS[name]
    if bundle.exists():
        return bundle
    checkpoint, int4 = work / f"{name}.checkpoint", work / f"{name}.int4"
    if not int4.exists():
        _say(f"writing and quantizing {name}")
        write_checkpoint(checkpoint, name)
        _pocketdiff("quantize", checkpoint, int4, "--recipe", model.recipe, "--overwrite")
        shutil.rmtree(checkpoint)
    _say(f"lowering {name}")
    _pocketdiff("export", int4, bundle, "--context", model.context)
    return bundle


def write_checkpoint(folder: Path, name: str) -> None:
    """Random bf16 weights as transformers initializes and writes them."""
    import torch
    import transformers

    model = MODELS[name]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    match model.kind:
        case "qwen3":
            config = transformers.Qwen3Config(**model.config)
            made: Any = transformers.Qwen3ForCausalLM(config)
        case "hrm_text":
            made = transformers.HrmTextForCausalLM(transformers.HrmTextConfig(**model.config))
        case _:
            config = transformers.DiffusionGemmaConfig(
                text_config=model.config, vision_config=_VISION, canvas_length=_CANVAS[name]
            )
            made = transformers.DiffusionGemmaForBlockDiffusion(config)
    made.save_pretrained(folder)
    path = folder / "config.json"
    written = json.loads(path.read_text()) | (model.written or {})
    path.write_text(json.dumps(written, indent=2))


def _pocketdiff(*words: object) -> None:
    command = [sys.executable, "-m", "scripts.pocketdiff", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for wanted in sys.argv[2:] or MODELS:
        bundle_of(folder, wanted)
