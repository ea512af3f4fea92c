"""What `plan` says of a checkpoint folder against the stages that `export` builds from it.

For every family and format, by the files of transformers' tiny random models: CPU only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from export.families import FAMILIES
from export.families.shapes import ModelShape
from export.models import stage_model
from export.models.staging import StagedModel
from export.plan.answer import answer
from quantize.checkpoint import Checkpoint
from quantize.errors import CheckpointError
from tests.support import dense_checkpoints, hf_reference

GEMMA4 = {
    "vocab_size": 96, "vocab_size_per_layer_input": 96, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 32,
    "hidden_size_per_layer_input": 32, "use_double_wide_mlp": True, "sliding_window": 6,
    "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
HRM_TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip


def diffusion_gemma(folder: Path) -> None:
    hf_reference.save(hf_reference.random_model(hf_reference.tiny_config(), seed=0), folder)


def gemma4_text(**changes: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        config = transformers.Gemma4TextConfig(**GEMMA4 | changes)
        transformers.Gemma4ForCausalLM(config).save_pretrained(folder)

    return write


def gemma4(folder: Path) -> None:
    config = transformers.Gemma4Config(text_config=GEMMA4, vision_config=hf_reference.TINY_VISION)
    transformers.Gemma4ForConditionalGeneration(config).save_pretrained(folder)


def hrm_text(**changes: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        config = transformers.HrmTextConfig(**HRM_TEXT | changes)
        transformers.HrmTextForCausalLM(config).save_pretrained(folder)

    return write


def dense(kind: str, generation: dict[str, Any] | None = None, **changes: Any) -> Any:
    def write(folder: Path) -> None:
        dense_checkpoints.write(folder, kind, changes=changes)
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))

    return write


# Name of the folder -> what writes it, the context asked for (None: the family's default).
CASES: dict[str, tuple[Callable[[Path], None], int | None]] = {
    "diffusion_gemma": (diffusion_gemma, None),
    "diffusion_gemma-short": (diffusion_gemma, 48),
    "gemma4": (gemma4, None),
    "gemma4_text": (gemma4_text(), None),
    "gemma4_text-shared": (gemma4_text(num_kv_shared_layers=2), 40),
    "gemma4_text-keys-are-values": (
        gemma4_text(attention_k_eq_v=True, hidden_size_per_layer_input=0, attention_bias=True),
        None,
    ),
    "gemma4_text-own-head": (gemma4_text(tie_word_embeddings=False), None),
    "hrm_text": (hrm_text(prefix_lm=True), None),
    "hrm_text-causal": (hrm_text(prefix_lm=False, tie_word_embeddings=True), 32),
    **{f"{kind}-bd3lm": (dense(kind), None) for kind in sorted(dense_checkpoints.REFERENCE_OF)},
    "sdar-of-short-context": (dense("sdar"), 64),
    "qwen3-with-top-p": (dense("qwen3", {"do_sample": True, "top_p": 0.9}), None),
    "Dream-without-top-p": (dense("Dream", {"top_p": 1.0}), 200),
    "Dream-of-long-context": (dense("Dream", max_position_embeddings=4096), None),
    "llada-of-few-positions": (dense("llada"), 40),
    "Qwen3-0.6B-diffusion-mdlm-v0.1": (dense("a2d-qwen3"), None),
    "Qwen3-0.6B-diffusion-bd3lm-v0.1": (dense("a2d-qwen3"), None),
    "named-in-the-config": (dense("a2d-llama", _name_or_path="hub/x-mdlm-y"), None),
    "a2d-of-block-16": (dense("a2d-qwen2", block_size=16), 64),
    "mdlm-that-states-blocks": (dense("a2d-qwen2", block_size=8), None),
    "bd3lm-that-states-none": (dense("a2d-qwen2", block_size=0), None),
    "sdar-that-states-no-block": (dense("sdar", block_size=None), None),
    "sdar-of-block-64": (dense("sdar", block_size=64), None),
    "fast-dllm-of-a-long-block": (
        dense("Fast_dLLM_Qwen", bd_size=512, max_position_embeddings=4096),
        None,
    ),
    "fast-dllm-of-block-12": (dense("Fast_dLLM_Qwen", bd_size=12), None),
}


class RecordedCheckpoint(Checkpoint):
    """A checkpoint that records which weights are read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.read: set[str] = set()

    def get(self, name: str, index: int | None = None) -> Any:
        self.read.add(name)
        return super().get(name, index)


def test_every_model_type_has_a_case(tmp_path: Path) -> None:
    kinds = set()
    for name, (write, _) in CASES.items():
        write(tmp_path / name)
        kinds.add(json.loads((tmp_path / name / "config.json").read_text())["model_type"])
    assert kinds == set(FAMILIES)


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_of_what_is_exported(name: str, tmp_path: Path) -> None:
    write, context = CASES[name]
    folder = tmp_path / name
    write(folder)
    found = answer(str(folder), recipe=None, devices=["oneplus-12"], context=context)
    shape, checkpoint = found.shape, RecordedCheckpoint(folder)
    _check_against(shape, checkpoint)
    model = stage_model(checkpoint, maximum_context=context, experts="dense")
    info, decoding = model.info, model.decoding
    assert (shape.family, shape.style.name) == (info.family, model.style)
    assert (shape.vocabulary_size, shape.hidden_size) == (info.vocabulary_size, info.hidden_size)
    assert shape.canvas_length == info.canvas_length
    assert shape.default_context == found.layout.context == info.maximum_context
    assert shape.truncation == ("top_p" in model.sampler.settings)
    if decoding is None:
        assert shape.style.has_fixed_rows
    else:
        assert shape.prefill_length(info.maximum_context) == decoding.prefill_length
        assert shape.block_length == decoding.block_length
    calls = [call.stage for call in model.schedule]
    for weight in shape.weights:
        assert weight.runs == (calls.count(weight.kind) or 1)
    _check_memory(shape, model)
    model.stages[-1].load()
    assert checkpoint.read == {weight.name for weight in shape.weights}


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (dense("a2d-qwen3"), '"block_size": 32'),
        (dense("a2d-qwen3", _name_or_path="of-bd3lm-and-mdlm"), '"block_size": 0'),
        (dense("Dream", block_size=32), "a blockwise variant"),
        (dense("sdar", block_size=0), "block_size = 0"),
        (dense("a2d-llama", block_size=512), "block of 512"),
        (dense("Dream", {"alg": "origin"}), "'origin'; supported: 'entropy'"),
        (dense("qwen3", {"do_sample": True, "top_p": 7.0}), "top_p is 7.0"),
        (dense("qwen3", hidden_act="gelu"), "hidden_act = 'gelu'"),
        (gemma4_text(hidden_activation="silu"), "hidden_activation = 'silu'"),
        (hrm_text(hidden_act="gelu"), "hidden_act = 'gelu'"),
    ],
)
def test_what_is_not_exported_is_not_planned_either(
    write: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    write(tmp_path / "model")
    with pytest.raises(CheckpointError) as planned:
        answer(str(tmp_path / "model"), recipe=None, devices=["oneplus-12"])
    with pytest.raises(CheckpointError) as exported:
        stage_model(Checkpoint(tmp_path / "model"))
    assert said in str(planned.value) and str(planned.value) == str(exported.value)


def _check_against(shape: ModelShape, checkpoint: Checkpoint) -> None:
    """Every weight of the plan is in the checkpoint, in its shape; what the checkpoint has beyond
    is tied, unused or of another modality."""
    stored = checkpoint.names()
    for weight in shape.weights:
        assert tuple(checkpoint.shape(weight.name)) == weight.shape, weight.name
    planned = {weight.name for weight in shape.weights}
    others = ("vision", "encoder.language_model", "rotary_emb")
    beyond = {n for n in stored - planned if not any(part in n for part in others)}
    beyond -= {"lm_head.weight"} if shape.head_table == shape.embedding else set()
    assert not {name for name in beyond if not _is_shared(name, shape)}


def _is_shared(name: str, shape: ModelShape) -> bool:
    """Whether it is of a layer that reads another's K and V; transformers still writes it."""
    layers = [i for i, a in enumerate(shape.attentions) if not a.owns_cache]
    parts = ("k_proj", "v_proj", "k_norm", "v_norm")
    return any(f"layers.{i}.self_attn.{part}." in name for i in layers for part in parts)


def _check_memory(shape: ModelShape, model: StagedModel) -> None:
    """Caches to the byte, and as many numbers in the modules as the plan has weights."""
    caches = weights = 0
    for stage in model.stages[:-1]:
        module = stage.load()
        for name, buffer in module.named_buffers():
            if name.endswith(("key_cache", "value_cache")):
                caches += buffer.numel() * buffer.element_size()
            weights += buffer.numel() if name.endswith("layer_scalar") else 0
        weights += sum(parameter.numel() for parameter in module.parameters())
    assert shape.kv_bytes(model.info.maximum_context) == caches
    own_head = shape.weight(shape.head_table)
    expected = shape.total_parameters - (own_head.parameters if own_head.use == "product" else 0)
    assert weights == expected
