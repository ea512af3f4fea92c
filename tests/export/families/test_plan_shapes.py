"""A plan's shapes against what they stand for: transformers' models, the exporter's modules, and
the parameter counts that were published. CPU only, no weights (meta tensors) or tiny ones."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from export.families import read_shape
from export.families.shapes import ModelShape, expected_distinct
from export.plan.layout import checkpoint_bytes, lay_out, scheme_of
from export.plan.presets import names, read_config, source
from quantize.errors import CheckpointError, InputError
from quantize.recipe import Scheme, preset
from tests.support import hf_reference

ROOT = Path(__file__).parents[3]
INT4 = preset("int4-g32")


def shape_of(name: str) -> ModelShape:
    return read_shape(read_config(name)[1])


# --- published figures -------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_every_preset_names_its_source_and_has_the_parameters_that_were_published(
    name: str,
) -> None:
    told, shape = source(name), shape_of(name)
    assert told.source and told.published
    if told.total is not None:  # published with two or three digits
        assert shape.total_parameters == pytest.approx(1e9 * told.total, rel=0.015)
    if told.active is not None:
        assert shape.active_parameters == pytest.approx(1e9 * told.active, rel=0.015)


def test_diffusion_gemma_has_its_25_2_billion_parameters_and_3_8_active_ones() -> None:
    shape = shape_of("diffusiongemma-26b-a4b")
    conditioning = sum(w.parameters for w in shape.weights if "self_conditioning" in w.name)
    # Without self-conditioning it is Gemma 4 26B-A4B, of which the same was published.
    assert f"{(shape.total_parameters - conditioning) / 1e9:.1f}" == "25.2"
    assert f"{shape.active_parameters / 1e9:.1f}" == "3.8"


@pytest.mark.parametrize(
    ("name", "changes", "count"),
    [
        # KoHRM-Text-1.4B's card states 1,384,120,320; it has a larger vocabulary and nothing else.
        # The start of the low state, 1,536 numbers, is no parameter there.
        ("hrm-text-1b", {"vocab_size": 131_072}, 1_384_120_320 + 1_536),
        # Qwen2.5-7B, whose layers Dream has: 7,615,616,512, the sum of its safetensors index.
        ("dream-7b", {}, 7_615_616_512),
        # Of the same index of Qwen3-0.6B: 596,049,920 with the tied table once.
        ("qwen3-0.6b", {}, 596_049_920),
        ("llada-8b", {}, 8_015_581_184),
    ],
)
def test_counts_that_were_published_to_the_last_digit(
    name: str, changes: dict[str, Any], count: int
) -> None:
    assert read_shape(read_config(name)[1] | changes).total_parameters == count


# --- transformers, without weights -------------------------------------------------------------

_MODELS = {
    "diffusiongemma-26b-a4b": ("DiffusionGemmaConfig", "DiffusionGemmaForBlockDiffusion"),
    "gemma-4-31b": ("Gemma4TextConfig", "Gemma4ForCausalLM"),
    "gemma-4-e2b": ("Gemma4TextConfig", "Gemma4ForCausalLM"),
    "gemma-4-e4b": ("Gemma4TextConfig", "Gemma4ForCausalLM"),
    "hrm-text-1b": ("HrmTextConfig", "HrmTextForCausalLM"),
    "qwen3-0.6b": ("Qwen3Config", "Qwen3ForCausalLM"),
    "sdar-4b": ("Qwen3Config", "Qwen3ForCausalLM"),
    "dream-7b": ("Qwen2Config", "Qwen2ForCausalLM"),
}


@pytest.mark.parametrize("name", _MODELS)
def test_a_preset_has_as_many_parameters_as_the_model_of_transformers(name: str) -> None:
    config_class, model_class = (getattr(transformers, part) for part in _MODELS[name])
    config = dict(read_config(name)[1])
    tied = config.get("tie_word_embeddings")
    if model_class is transformers.Gemma4ForCausalLM:
        config = config["text_config"]
    for key in ("model_type", "architectures"):
        config.pop(key, None)
    if name == "diffusiongemma-26b-a4b":
        config["vision_config"] = hf_reference.TINY_VISION
    with torch.device("meta"):
        model = model_class(config_class(**config))
    if tied:
        model.tie_weights()
    unread = ("vision_tower", "embed_vision")
    shared = _shared_kv(name)
    counted: dict[int, int] = {}
    for path, parameter in model.named_parameters():
        if any(part in path for part in unread):
            continue
        if any(path.endswith(part) for part in shared):
            continue  # transformers keeps K/V weights of layers that share, and never uses them
        counted[id(parameter)] = parameter.numel()  # the encoder's are the decoder's
    scalars = sum(b.numel() for n, b in model.named_buffers() if n.endswith("layer_scalar"))
    shape = shape_of(name)
    in_buffers = sum(w.parameters for w in shape.weights if w.name.endswith("layer_scalar"))
    assert sum(counted.values()) == shape.total_parameters - in_buffers
    assert not in_buffers or scalars == in_buffers


def _shared_kv(name: str) -> tuple[str, ...]:
    shape = shape_of(name)
    layers = [i for i, a in enumerate(shape.attentions) if not a.owns_cache]
    parts = ("k_proj.weight", "v_proj.weight", "k_norm.weight")
    return tuple(f"layers.{i}.self_attn.{part}" for i in layers for part in parts)


# --- the parts of a plan -----------------------------------------------------------------------


def test_distinct_experts_are_all_of_few_rows_and_nearly_all_of_a_canvas() -> None:
    assert expected_distinct(128, 8, 1) == pytest.approx(8)
    assert 127.9 < expected_distinct(128, 8, 256) < 128
    assert expected_distinct(4, 4, 3) == 4
    # Against drawing: the mean of many canvases of uniform routing.
    generator = torch.Generator().manual_seed(0)
    drawn = [
        len(torch.rand(16, 64, generator=generator).topk(4).indices.unique()) for _ in range(400)
    ]
    assert expected_distinct(64, 4, 16) == pytest.approx(sum(drawn) / len(drawn), rel=0.01)


def test_a_recipe_decides_the_bytes_of_each_weight() -> None:
    shape = shape_of("qwen3-0.6b")
    query = shape.weight("model.layers.0.self_attn.q_proj.weight")
    assert scheme_of(query, None) is None
    assert scheme_of(query, INT4) == Scheme(bits=4, group_size=32, smaller_groups=True)
    table = shape.weight("model.embed_tokens.weight")
    assert scheme_of(table, INT4).bits == 8
    # 440 M in 4.5 bits, 156 M in 8 and a scale for each of 151,936 rows, norms in bf16.
    norms = sum(w.parameters for w in shape.weights if w.use == "elementwise")
    linears = sum(w.parameters for w in shape.weights if w.use == "product")
    expected = linears * 4.5 / 8 + table.parameters + 4 * 151_936 + 2 * norms
    assert checkpoint_bytes(shape, INT4) == expected


def test_the_tied_table_is_stored_as_often_as_the_head_needs_it() -> None:
    uniform = lay_out(shape_of("diffusiongemma-26b-a4b"), INT4, context=4096)
    roles = [item.what for item in uniform.stored if item.weight.endswith("embed_tokens.weight")]
    assert roles == ["lookup", "logits", "lookup", "soft embedding"]
    causal = lay_out(shape_of("qwen3-0.6b"), INT4, context=2048)
    roles = [item.what for item in causal.stored if item.weight.endswith("embed_tokens.weight")]
    assert roles == ["lookup", "logits"]


def test_a_longer_context_costs_only_its_cache_and_its_scores() -> None:
    shape = shape_of("sdar-4b")
    short, long = (lay_out(shape, INT4, context=context, rows=4) for context in (1024, 2048))
    assert long.kv_bytes == 2 * short.kv_bytes
    assert long.weight_bytes("packed") == short.weight_bytes("packed")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"hidden_size": 0}, "hidden_size = 0"),
        ({"hidden_size": "1024"}, "hidden_size = '1024'"),
        ({"num_hidden_layers": None}, "num_hidden_layers = None"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_a_sentence(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_shape(read_config("qwen3-0.6b")[1] | changes)


def test_a_name_that_is_neither_preset_nor_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="presets are diffusiongemma-26b-a4b"):
        read_config("gemma-5")
    with pytest.raises(InputError, match=r"config\.json is missing"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="where an object was expected"):
        read_config(str(tmp_path))


def test_the_planner_imports_no_torch_and_is_done_at_once() -> None:
    code = (
        "import sys, time\n"
        "import export.plan.break_even, export.plan.budget\n"
        "from export.families import read_shape\n"
        "from export.plan.layout import lay_out\n"
        "from export.plan.presets import read_config\n"
        "from quantize.recipe import preset\n"
        "began = time.process_time()\n"
        "shape = read_shape(read_config('diffusiongemma-26b-a4b')[1])\n"
        "lay_out(shape, preset(), context=4096)\n"
        "print(time.process_time() - began)\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
    )
    began = time.process_time()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.0 and time.process_time() - began < 1.0
