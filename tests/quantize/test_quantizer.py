"""The quantizer: bit for bit torchao's own result on disk, and never half a folder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    quantize_,
)
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

from quantize import rounding
from quantize.checkpoint import open_checkpoint
from quantize.errors import CheckpointError
from quantize.quantizer import COPIED_FILES, quantize_checkpoint
from quantize.recipe import PRESETS, Recipe, Rule, Scheme, preset
from quantize.report import report_from_recipe_json
from tests.support.digests import digests
from tests.support.sharded import save_shards
from tests.support.small_checkpoint import (
    EMBEDDING,
    EXPERTS,
    LINEAR,
    NORM,
    random_weight,
    small_tensors,
    write_source,
)

_ALGORITHMS = {
    "minmax": IntxChooseQParamsAlgorithm.AFFINE,
    "hqq": IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
}


def _everything(scheme: Scheme) -> Recipe:
    return Recipe("test", (Rule(("*norm*",), "keep"), Rule(("*",), scheme)))


def _torchao_linear(weight: torch.Tensor, scheme: Scheme) -> torch.nn.Linear:
    """torchao's own call, spelled out from its documentation and not from our quantizer."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(weight.float().clone(), requires_grad=False)
    granularity = PerGroup(scheme.group_size) if scheme.group_size else PerAxis(0)
    weight_dtype = torch.int4 if scheme.bits == 4 else torch.int8
    scale_dtype = torch.bfloat16 if scheme.scale_dtype == "bfloat16" else torch.float32
    algorithm = _ALGORITHMS[scheme.scale_algorithm]
    if scheme.activation == "none":
        config = IntxWeightOnlyConfig(
            weight_dtype=weight_dtype,
            granularity=granularity,
            scale_dtype=scale_dtype,
            intx_choose_qparams_algorithm=algorithm,
        )
    else:
        config = Int8DynamicActivationIntxWeightConfig(
            weight_dtype=weight_dtype,
            weight_granularity=granularity,
            weight_scale_dtype=scale_dtype,
            intx_choose_qparams_algorithm=algorithm,
        )
    quantize_(linear, config)
    return linear


def _assert_identical(seen: torch.Tensor, wanted: torch.Tensor) -> None:
    wanted = wanted.data
    assert type(seen) is type(wanted)
    for part in ("qdata", "scale", "zero_point"):
        a, b = getattr(seen, part), getattr(wanted, part)
        assert a.dtype == b.dtype, part
        # Every bit: equality alone would take -0.0 for 0.0.
        assert a.shape == b.shape, part
        assert torch.equal(
            a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
        ), part
    assert seen.dtype == wanted.dtype
    assert seen.shape == wanted.shape
    assert tuple(seen.block_size) == tuple(wanted.block_size)
    assert seen.target_dtype == wanted.target_dtype
    assert seen.activation_quantization == wanted.activation_quantization


_SCHEMES = [
    Scheme(bits, group_size, activation, algorithm, scale_dtype)
    for bits in (4, 8)
    for group_size in (32, 64, 128, None)
    for activation in ("int8_dynamic", "none")
    for algorithm in ("minmax", "hqq")
    for scale_dtype in ("bfloat16", "float32")
]


@pytest.mark.parametrize("scheme", _SCHEMES, ids=lambda s: f"{s.label} {s.scale_dtype}")
def test_a_quantized_weight_loads_as_the_tensor_torchao_made(tmp_path, scheme):
    tensors = small_tensors()
    quantize_checkpoint(write_source(tmp_path / "in"), tmp_path / "out", _everything(scheme))
    checkpoint = open_checkpoint(tmp_path / "out")
    linear = _torchao_linear(tensors[LINEAR], scheme)
    _assert_identical(checkpoint.get(LINEAR), linear.weight)
    for expert in range(4):
        reference = _torchao_linear(tensors[EXPERTS][expert], scheme)
        _assert_identical(checkpoint.get(EXPERTS, expert), reference.weight)
    # And so a linear computes the same, its activations quantized or not.
    x = random_weight(5, 128, seed=3)
    assert torch.equal(torch.nn.functional.linear(x, checkpoint.get(LINEAR)), linear(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_embedding_loads_as_the_tensor_torchao_made(tmp_path, dtype):
    table = random_weight(40, 96, seed=4).to(dtype)
    source = write_source(tmp_path / "in", {EMBEDDING: table})
    quantize_checkpoint(source, tmp_path / "out", preset())
    embedding = torch.nn.Embedding.from_pretrained(table.float().clone())
    quantize_(
        embedding,
        IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)),
        filter_fn=lambda module, name: isinstance(module, torch.nn.Embedding),
    )
    _assert_identical(open_checkpoint(tmp_path / "out").get(EMBEDDING), embedding.weight)


def test_a_whole_stack_of_experts_dequantizes_as_its_slices_do(tmp_path):
    quantize_checkpoint(write_source(tmp_path / "in"), tmp_path / "out", preset())
    checkpoint = open_checkpoint(tmp_path / "out")
    slices = [checkpoint.get(EXPERTS, expert).dequantize() for expert in range(4)]
    assert torch.equal(checkpoint.get(EXPERTS).dequantize(), torch.stack(slices))


def test_rows_of_an_odd_width_survive_the_packing(tmp_path):
    weight = random_weight(5, 37, seed=5)
    scheme = Scheme(bits=4, group_size=None)
    source = write_source(tmp_path / "in", {LINEAR: weight})
    quantize_checkpoint(source, tmp_path / "out", _everything(scheme))
    reference = _torchao_linear(weight, scheme).weight
    _assert_identical(open_checkpoint(tmp_path / "out").get(LINEAR), reference)


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(scale_algorithm="hqq")])
def test_a_large_matrix_read_in_pieces_gives_the_same_bits(tmp_path, monkeypatch, scheme):
    # Seven rows a piece, which does not divide 24.
    monkeypatch.setattr(rounding, "_PIECE_ELEMENTS", 7 * 128 + 5)
    quantize_checkpoint(write_source(tmp_path / "in"), tmp_path / "out", _everything(scheme))
    reference = _torchao_linear(small_tensors()[LINEAR], scheme).weight
    _assert_identical(open_checkpoint(tmp_path / "out").get(LINEAR), reference)


def test_four_bit_weights_take_four_bits_on_disk(tmp_path):
    quantize_checkpoint(write_source(tmp_path / "in"), tmp_path / "out", preset())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        linear = file.get_slice(f"{LINEAR}.qdata")
        assert (linear.get_dtype(), linear.get_shape()) == ("U8", [24, 64])
        experts = file.get_slice(f"{EXPERTS}.qdata")
        assert (experts.get_dtype(), experts.get_shape()) == ("U8", [4, 8, 64])
        scales = file.get_slice(f"{EXPERTS}.scale")
        assert (scales.get_dtype(), scales.get_shape()) == ("BF16", [4, 8, 4])
        rows = file.get_slice(f"{EMBEDDING}.qdata")
        assert (rows.get_dtype(), rows.get_shape()) == ("I8", [32, 128])


def test_kept_weights_keep_every_bit(tmp_path):
    quantize_checkpoint(write_source(tmp_path / "in"), tmp_path / "out", preset())
    checkpoint = open_checkpoint(tmp_path / "out")
    assert torch.equal(checkpoint.get_as_stored(NORM), small_tensors()[NORM])
    assert checkpoint.get(NORM).dtype == torch.float32


def _in_shards(folder: Path, shards: list[list[str]]) -> Path:
    """The small checkpoint with these weights in files `model-1-of-N.safetensors`, ..."""
    source = write_source(folder)
    (source / "model.safetensors").unlink()
    files = {
        f"model-{number}-of-{len(shards)}.safetensors": {
            name: small_tensors()[name] for name in names
        }
        for number, names in enumerate(shards, start=1)
    }
    save_shards(source, files)
    return source


@pytest.mark.parametrize(
    "shards",
    [
        [[NORM], [EMBEDDING], [LINEAR], [EXPERTS]],
        [[EXPERTS, NORM], [EMBEDDING, LINEAR]],
        [[EXPERTS, NORM, EMBEDDING, LINEAR]],
    ],
)
def test_every_shard_becomes_one_with_the_same_tensors(tmp_path, shards):
    quantize_checkpoint(write_source(tmp_path / "in"), tmp_path / "one", preset())
    source = _in_shards(tmp_path / "shards", shards)
    quantize_checkpoint(source, tmp_path / "many", preset())
    files = {path.name for path in (tmp_path / "many").glob("*.safetensors")}
    assert files == {path.name for path in source.glob("*.safetensors")}
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    size = sum(open_checkpoint(tmp_path / "many").stored_bytes(name) for name in small_tensors())
    assert index["metadata"] == {"total_size": size}
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    assert one.names() == many.names()
    for name in (LINEAR, EXPERTS, EMBEDDING):
        _assert_identical(many.get(name), one.get(name))
    assert torch.equal(many.get(NORM), one.get(NORM))
    recipes = [
        json.loads((tmp_path / name / "recipe.json").read_text()) for name in ("one", "many")
    ]
    assert recipes[0] == recipes[1]


def test_a_shard_of_which_all_is_skipped_becomes_none(tmp_path):
    source = _in_shards(tmp_path / "in", [[NORM], [EXPERTS, EMBEDDING, LINEAR]])
    recipe = Recipe("mine", (Rule((NORM,), "skip"), Rule(("*",), Scheme(bits=8))))
    quantize_checkpoint(source, tmp_path / "out", recipe)
    assert open_checkpoint(tmp_path / "out").names() == {EXPERTS, EMBEDDING, LINEAR}
    assert not (tmp_path / "out/model-1-of-2.safetensors").exists()


def test_the_same_source_and_recipe_give_the_same_bytes(tmp_path):
    source = write_source(tmp_path / "in")
    quantize_checkpoint(source, tmp_path / "a", preset())
    quantize_checkpoint(source, tmp_path / "b", preset())
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_configs_and_tokenizer_are_copied_and_nothing_else(tmp_path):
    source = write_source(tmp_path / "in")
    for name in COPIED_FILES:
        (source / name).write_text(json.dumps({"this is": name}))
    (source / "modeling_custom.py").write_text("raise SystemExit")
    quantize_checkpoint(source, tmp_path / "out", preset())
    for name in COPIED_FILES:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {*COPIED_FILES, "recipe.json", "model.safetensors"}


# The report.


def test_the_report_measures_what_is_on_disk(tmp_path):
    report = quantize_checkpoint(write_source(tmp_path / "in"), tmp_path / "out", preset())
    checkpoint = open_checkpoint(tmp_path / "out")
    rows = {row.name: row for row in report.tensors}
    assert set(rows) == checkpoint.names()
    for name, original in small_tensors().items():
        row = rows[name]
        assert row.elements == original.numel()
        assert row.bytes_before == original.numel() * original.element_size()
        assert row.bytes_after == checkpoint.stored_bytes(name)
        assert row.bits_per_weight == pytest.approx(8 * row.bytes_after / row.elements)
        if name == NORM:
            assert row.snr_db is None
            continue
        w = original.double()
        noise = (w - checkpoint.get(name).dequantize().double()).square().sum()
        # 1e-4 dB: the report adds up in fp32 along rows, this test in fp64.
        wanted = 10 * math.log10(w.square().sum() / noise)
        assert row.snr_db == pytest.approx(wanted, abs=1e-4)
    assert rows[LINEAR].bits_per_weight == 4.5
    data = sum(row.bytes_after for row in report.tensors)
    header = 8 + int.from_bytes((tmp_path / "out/model.safetensors").read_bytes()[:8], "little")
    assert (tmp_path / "out/model.safetensors").stat().st_size == header + data


def test_layers_add_up_to_the_whole(tmp_path):
    report = quantize_checkpoint(write_source(tmp_path / "in"), tmp_path / "out", preset())
    layers = report.by_layer()
    assert [row.name for row in layers] == [
        "model.embed_tokens",
        "model.layers.0",
        "model.norm",
    ]
    assert sum(row.bytes_after for row in layers) == report.total().bytes_after
    assert sum(row.bytes_before for row in layers) == report.total().bytes_before
    layer = layers[1]
    parts = [row for row in report.tensors if row.name.startswith("model.layers.0.")]
    assert min(p.snr_db for p in parts) <= layer.snr_db <= max(p.snr_db for p in parts)


def test_the_report_is_stored_in_the_recipe(tmp_path):
    report = quantize_checkpoint(write_source(tmp_path / "in"), tmp_path / "out", preset())
    assert report_from_recipe_json(open_checkpoint(tmp_path / "out").recipe) == report
    with pytest.raises(CheckpointError, match="no usable report"):
        report_from_recipe_json({"tensors": {"w": {}}})


def test_layer_ten_comes_after_layer_nine(tmp_path):
    tensors = {
        f"model.layers.{n}.mlp.up_proj.weight": random_weight(4, 32, seed=n) for n in range(11)
    }
    report = quantize_checkpoint(write_source(tmp_path / "in", tensors), tmp_path / "out", preset())
    assert [row.name for row in report.by_layer()] == [f"model.layers.{n}" for n in range(11)]


@pytest.mark.parametrize("group_size", [32, 64, 128, None])
def test_hqq_loses_less_than_minmax(tmp_path, group_size):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    source = write_source(tmp_path / "in", {LINEAR: weight})
    snr_db = {}
    for algorithm in ("minmax", "hqq"):
        scheme = Scheme(group_size=group_size, scale_algorithm=algorithm)
        report = quantize_checkpoint(source, tmp_path / algorithm, _everything(scheme))
        snr_db[algorithm] = report.total().snr_db
    assert snr_db["hqq"] > snr_db["minmax"] + 0.1


def test_finer_scales_lose_less(tmp_path):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    source = write_source(tmp_path / "in", {LINEAR: weight})
    snr_db = [
        quantize_checkpoint(source, tmp_path / str(size), _everything(Scheme(group_size=size)))
        .total()
        .snr_db
        for size in (None, 128, 64, 32)
    ]
    assert snr_db == sorted(snr_db)


# The architecture itself, as transformers saves it.


@pytest.mark.parametrize("recipe", PRESETS)
def test_every_linear_and_expert_of_diffusion_gemma_is_quantized(tmp_path, recipe):
    from tests.support.hf_reference import random_model, tiny_config

    model = random_model(tiny_config(), seed=0)
    model.save_pretrained(tmp_path / "in")
    report = quantize_checkpoint(tmp_path / "in", tmp_path / "out", preset(recipe))
    schemes = {row.name: row.scheme for row in report.tensors}

    stored = {n for n in open_checkpoint(tmp_path / "in").names() if "vision" not in n}
    assert set(schemes) == stored
    linears = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "router" not in name
    } | {name for name in model.state_dict() if ".experts." in name}
    quantized = {name for name, scheme in schemes.items() if scheme != "kept"}
    embedding = "model.decoder.embed_tokens.weight"
    assert quantized == (linears & stored) | {embedding}
    assert all("int8 act" in schemes[name] for name in quantized - {embedding})
    assert "model.decoder.layers.0.layer_scalar" in stored - quantized
    assert "model.encoder.language_model.layers.0.layer_scalar" in stored - quantized
    assert any("vision_tower" in note for note in report.notes)
    fallback = [note for note in report.notes if "instead of" in note]
    # The tiny model's widths are 32, 64, 96 and 128: 64 and 128 do not divide all of them.
    assert bool(fallback) == (recipe in ("int4-g64", "int4-g128"))


def test_progress_counts_up_to_the_whole(tmp_path):
    calls = []
    quantize_checkpoint(
        write_source(tmp_path / "in"),
        tmp_path / "out",
        preset(),
        progress=lambda done, total, name: calls.append((done, total, name)),
    )
    done = [call[0] for call in calls]
    assert done == sorted(done)
    total = sum(t.numel() * t.element_size() for t in small_tensors().values())
    assert calls[-1][:2] == (total, total)
    assert {call[2] for call in calls} == set(small_tensors())
