"""The quantizer: bit for bit torchao's own result on disk, and never half a folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
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
from quantize.errors import CheckpointError, OutputError, RecipeError
from quantize.quantizer import COPIED_FILES, quantize_checkpoint
from quantize.recipe import PRESETS, Recipe, Rule, Scheme, preset
from quantize.report import report_from_recipe_json
from tests.support.sharded import save_shards

_LINEAR = "model.layers.0.self_attn.q_proj.weight"
_EXPERTS = "model.layers.0.experts.down_proj"
_EMBEDDING = "model.embed_tokens.weight"
_NORM = "model.norm.weight"

_ALGORITHMS = {
    "minmax": IntxChooseQParamsAlgorithm.AFFINE,
    "hqq": IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
}


def _random(*shape: int, seed: int) -> torch.Tensor:
    """Weights with what is hard to quantize: outliers, a row of zeros, a row of one sign."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator) * 0.02
    rows = weight.view(-1, shape[-1])
    rows[0, 0] = 3.0
    rows[1] = 0.0
    rows[2] = rows[2].abs() + 0.01
    return weight


def _source(folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "made_up"}')
    save_file(tensors or _small(), folder / "model.safetensors")
    return folder


def _small() -> dict[str, torch.Tensor]:
    return {
        _LINEAR: _random(24, 128, seed=0),
        _EXPERTS: _random(4, 8, 128, seed=1),
        _EMBEDDING: _random(32, 128, seed=2),
        _NORM: torch.linspace(0.5, 1.5, 128).bfloat16(),
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
    tensors = _small()
    quantize_checkpoint(_source(tmp_path / "in"), tmp_path / "out", _everything(scheme))
    checkpoint = open_checkpoint(tmp_path / "out")
    linear = _torchao_linear(tensors[_LINEAR], scheme)
    _assert_identical(checkpoint.get(_LINEAR), linear.weight)
    for expert in range(4):
        reference = _torchao_linear(tensors[_EXPERTS][expert], scheme)
        _assert_identical(checkpoint.get(_EXPERTS, expert), reference.weight)
    # And so a linear computes the same, its activations quantized or not.
    x = _random(5, 128, seed=3)
    assert torch.equal(torch.nn.functional.linear(x, checkpoint.get(_LINEAR)), linear(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_embedding_loads_as_the_tensor_torchao_made(tmp_path, dtype):
    table = _random(40, 96, seed=4).to(dtype)
    source = _source(tmp_path / "in", {_EMBEDDING: table})
    quantize_checkpoint(source, tmp_path / "out", preset())
    embedding = torch.nn.Embedding.from_pretrained(table.float().clone())
    quantize_(
        embedding,
        IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)),
        filter_fn=lambda module, name: isinstance(module, torch.nn.Embedding),
    )
    _assert_identical(open_checkpoint(tmp_path / "out").get(_EMBEDDING), embedding.weight)


def test_a_whole_stack_of_experts_dequantizes_as_its_slices_do(tmp_path):
    quantize_checkpoint(_source(tmp_path / "in"), tmp_path / "out", preset())
    checkpoint = open_checkpoint(tmp_path / "out")
    slices = [checkpoint.get(_EXPERTS, expert).dequantize() for expert in range(4)]
    assert torch.equal(checkpoint.get(_EXPERTS).dequantize(), torch.stack(slices))


def test_rows_of_an_odd_width_survive_the_packing(tmp_path):
    weight = _random(5, 37, seed=5)
    scheme = Scheme(bits=4, group_size=None)
    source = _source(tmp_path / "in", {_LINEAR: weight})
    quantize_checkpoint(source, tmp_path / "out", _everything(scheme))
    reference = _torchao_linear(weight, scheme).weight
    _assert_identical(open_checkpoint(tmp_path / "out").get(_LINEAR), reference)


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(scale_algorithm="hqq")])
def test_a_large_matrix_read_in_pieces_gives_the_same_bits(tmp_path, monkeypatch, scheme):
    # Seven rows a piece, which does not divide 24.
    monkeypatch.setattr(rounding, "_PIECE_ELEMENTS", 7 * 128 + 5)
    quantize_checkpoint(_source(tmp_path / "in"), tmp_path / "out", _everything(scheme))
    reference = _torchao_linear(_small()[_LINEAR], scheme).weight
    _assert_identical(open_checkpoint(tmp_path / "out").get(_LINEAR), reference)


def test_four_bit_weights_take_four_bits_on_disk(tmp_path):
    quantize_checkpoint(_source(tmp_path / "in"), tmp_path / "out", preset())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        linear = file.get_slice(f"{_LINEAR}.qdata")
        assert (linear.get_dtype(), linear.get_shape()) == ("U8", [24, 64])
        experts = file.get_slice(f"{_EXPERTS}.qdata")
        assert (experts.get_dtype(), experts.get_shape()) == ("U8", [4, 8, 64])
        scales = file.get_slice(f"{_EXPERTS}.scale")
        assert (scales.get_dtype(), scales.get_shape()) == ("BF16", [4, 8, 4])
        rows = file.get_slice(f"{_EMBEDDING}.qdata")
        assert (rows.get_dtype(), rows.get_shape()) == ("I8", [32, 128])


def test_kept_weights_keep_every_bit(tmp_path):
    quantize_checkpoint(_source(tmp_path / "in"), tmp_path / "out", preset())
    checkpoint = open_checkpoint(tmp_path / "out")
    assert torch.equal(checkpoint.get_as_stored(_NORM), _small()[_NORM])
    assert checkpoint.get(_NORM).dtype == torch.float32


def _in_shards(folder: Path, shards: list[list[str]]) -> Path:
    """The small checkpoint with these weights in files `model-1-of-N.safetensors`, ..."""
    source = _source(folder)
    (source / "model.safetensors").unlink()
    files = {
        f"model-{number}-of-{len(shards)}.safetensors": {name: _small()[name] for name in names}
        for number, names in enumerate(shards, start=1)
    }
    save_shards(source, files)
    return source


@pytest.mark.parametrize(
    "shards",
    [
        [[_NORM], [_EMBEDDING], [_LINEAR], [_EXPERTS]],
        [[_EXPERTS, _NORM], [_EMBEDDING, _LINEAR]],
        [[_EXPERTS, _NORM, _EMBEDDING, _LINEAR]],
    ],
)
def test_every_shard_becomes_one_with_the_same_tensors(tmp_path, shards):
    quantize_checkpoint(_source(tmp_path / "in"), tmp_path / "one", preset())
    source = _in_shards(tmp_path / "shards", shards)
    quantize_checkpoint(source, tmp_path / "many", preset())
    files = {path.name for path in (tmp_path / "many").glob("*.safetensors")}
    assert files == {path.name for path in source.glob("*.safetensors")}
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    size = sum(open_checkpoint(tmp_path / "many").stored_bytes(name) for name in _small())
    assert index["metadata"] == {"total_size": size}
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    assert one.names() == many.names()
    for name in (_LINEAR, _EXPERTS, _EMBEDDING):
        _assert_identical(many.get(name), one.get(name))
    assert torch.equal(many.get(_NORM), one.get(_NORM))
    recipes = [
        json.loads((tmp_path / name / "recipe.json").read_text()) for name in ("one", "many")
    ]
    assert recipes[0] == recipes[1]


def test_a_shard_of_which_all_is_skipped_becomes_none(tmp_path):
    source = _in_shards(tmp_path / "in", [[_NORM], [_EXPERTS, _EMBEDDING, _LINEAR]])
    recipe = Recipe("mine", (Rule((_NORM,), "skip"), Rule(("*",), Scheme(bits=8))))
    quantize_checkpoint(source, tmp_path / "out", recipe)
    assert open_checkpoint(tmp_path / "out").names() == {_EXPERTS, _EMBEDDING, _LINEAR}
    assert not (tmp_path / "out/model-1-of-2.safetensors").exists()


def _digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_the_same_source_and_recipe_give_the_same_bytes(tmp_path):
    source = _source(tmp_path / "in")
    quantize_checkpoint(source, tmp_path / "a", preset())
    quantize_checkpoint(source, tmp_path / "b", preset())
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")


def test_configs_and_tokenizer_are_copied_and_nothing_else(tmp_path):
    source = _source(tmp_path / "in")
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
    report = quantize_checkpoint(_source(tmp_path / "in"), tmp_path / "out", preset())
    checkpoint = open_checkpoint(tmp_path / "out")
    rows = {row.name: row for row in report.tensors}
    assert set(rows) == checkpoint.names()
    for name, original in _small().items():
        row = rows[name]
        assert row.elements == original.numel()
        assert row.bytes_before == original.numel() * original.element_size()
        assert row.bytes_after == checkpoint.stored_bytes(name)
        assert row.bits_per_weight == pytest.approx(8 * row.bytes_after / row.elements)
        if name == _NORM:
            assert row.snr_db is None
            continue
        w = original.double()
        noise = (w - checkpoint.get(name).dequantize().double()).square().sum()
        # 1e-4 dB: the report adds up in fp32 along rows, this test in fp64.
        wanted = 10 * math.log10(w.square().sum() / noise)
        assert row.snr_db == pytest.approx(wanted, abs=1e-4)
    assert rows[_LINEAR].bits_per_weight == 4.5
    data = sum(row.bytes_after for row in report.tensors)
    header = 8 + int.from_bytes((tmp_path / "out/model.safetensors").read_bytes()[:8], "little")
    assert (tmp_path / "out/model.safetensors").stat().st_size == header + data


def test_layers_add_up_to_the_whole(tmp_path):
    report = quantize_checkpoint(_source(tmp_path / "in"), tmp_path / "out", preset())
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
    report = quantize_checkpoint(_source(tmp_path / "in"), tmp_path / "out", preset())
    assert report_from_recipe_json(open_checkpoint(tmp_path / "out").recipe) == report
    with pytest.raises(CheckpointError, match="no usable report"):
        report_from_recipe_json({"tensors": {"w": {}}})


def test_layer_ten_comes_after_layer_nine(tmp_path):
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": _random(4, 32, seed=n) for n in range(11)}
    report = quantize_checkpoint(_source(tmp_path / "in", tensors), tmp_path / "out", preset())
    assert [row.name for row in report.by_layer()] == [f"model.layers.{n}" for n in range(11)]


@pytest.mark.parametrize("group_size", [32, 64, 128, None])
def test_hqq_loses_less_than_minmax(tmp_path, group_size):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    source = _source(tmp_path / "in", {_LINEAR: weight})
    snr_db = {}
    for algorithm in ("minmax", "hqq"):
        scheme = Scheme(group_size=group_size, scale_algorithm=algorithm)
        report = quantize_checkpoint(source, tmp_path / algorithm, _everything(scheme))
        snr_db[algorithm] = report.total().snr_db
    assert snr_db["hqq"] > snr_db["minmax"] + 0.1


def test_finer_scales_lose_less(tmp_path):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    source = _source(tmp_path / "in", {_LINEAR: weight})
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


# What can go wrong. Nothing may be left beside the destination, nor half a folder under its name;
# what an interruption leaves is in test_resumed_quantizing.


def _left_over(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"in"}


def _fails(error: type[BaseException], tmp_path: Path, *args, **kwargs) -> str:
    before = _left_over(tmp_path)
    with pytest.raises(error) as caught:
        quantize_checkpoint(tmp_path / "in", *args, **kwargs)
    assert _left_over(tmp_path) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_existing_folder_is_not_overwritten_unasked(tmp_path):
    _source(tmp_path / "in")
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", preset())
    before = _digests(tmp_path / "out")
    message = _fails(OutputError, tmp_path, tmp_path / "out", preset("int4-g64"))
    assert "exists already" in message
    assert _digests(tmp_path / "out") == before


def test_an_earlier_result_is_overwritten_when_asked(tmp_path):
    _source(tmp_path / "in")
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", preset())
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", preset("int4-g64"), overwrite=True)
    assert open_checkpoint(tmp_path / "out").recipe["recipe"]["name"] == "int4-g64"
    assert _left_over(tmp_path) == {"out"}


def test_a_failed_overwrite_leaves_the_earlier_result(tmp_path):
    _source(tmp_path / "in")
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", preset())
    before = _digests(tmp_path / "out")

    def fail(done, total, name):
        raise OSError(5, "Input/output error")

    _fails(OutputError, tmp_path, tmp_path / "out", preset(), overwrite=True, progress=fail)
    assert _digests(tmp_path / "out") == before


def test_a_folder_of_other_files_is_never_overwritten(tmp_path):
    _source(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    message = _fails(OutputError, tmp_path, tmp_path / "out", preset(), overwrite=True)
    assert "did not write" in message
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    message = _fails(OutputError, tmp_path, tmp_path / "in", preset(), overwrite=True)
    assert "did not write" in message


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path):
    _source(tmp_path / "in")
    (tmp_path / "empty").mkdir()
    quantize_checkpoint(tmp_path / "in", tmp_path / "empty", preset())
    quantize_checkpoint(tmp_path / "in", tmp_path / "new" / "deep" / "out", preset())
    assert open_checkpoint(tmp_path / "empty").is_quantized
    assert open_checkpoint(tmp_path / "new" / "deep" / "out").is_quantized


@pytest.mark.parametrize("occupant", ["file", "dangling link"])
def test_a_destination_that_is_no_folder_is_refused(tmp_path, occupant):
    _source(tmp_path / "in")
    if occupant == "file":
        (tmp_path / "out").write_text("x")
    else:
        (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    message = _fails(OutputError, tmp_path, tmp_path / "out", preset(), overwrite=True)
    assert "is no folder" in message


def test_a_parent_that_cannot_hold_a_folder_is_named(tmp_path):
    _source(tmp_path / "in")
    (tmp_path / "file").write_text("x")
    message = _fails(OutputError, tmp_path, tmp_path / "file" / "out", preset())
    assert str(tmp_path / "file" / "out") in message


@pytest.mark.parametrize("room", ["for nothing", "for configs", "for less than the weights"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, room):
    source = _source(tmp_path / "in")
    (source / "tokenizer.json").write_text(json.dumps({"padding": "x" * 2000}))
    room_bytes = {"for nothing": 0, "for configs": 2100, "for less than the weights": 9000}[room]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel itself refuses to let any file grow beyond this size.
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, hard))
    try:
        with pytest.raises(OutputError) as caught:
            quantize_checkpoint(source, tmp_path / "out", preset())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    assert "does not fit on the disk" in message
    assert str(tmp_path / "out") in message
    assert _left_over(tmp_path) == set()


_PAGE = os.sysconf("SC_PAGE_SIZE")
_DISK_BYTES = 64 * _PAGE


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 64 pages, where this machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    "room",
    ["nothing", "the configs", "half of the weights", "the weights", "all but a page", "all"],
)
def test_a_really_full_disk_leaves_nothing(tmp_path, small_disk, room):
    source = _source(tmp_path / "in")
    quantize_checkpoint(source, tmp_path / "model", preset())
    config, weights, recipe = (
        -(-(tmp_path / "model" / name).stat().st_size // _PAGE)
        for name in ("config.json", "model.safetensors", "recipe.json")
    )
    config += 1  # the journal
    pages = {
        "nothing": 0,
        "the configs": config,
        "half of the weights": config + weights // 2,
        "the weights": config + weights,
        "all but a page": config + weights + recipe - 1,
        "all": config + weights + recipe,
    }[room]
    (small_disk / "other").write_bytes(b"x" * (_DISK_BYTES - pages * _PAGE))
    if room == "all":
        quantize_checkpoint(source, small_disk / "out", preset())
        assert open_checkpoint(small_disk / "out").is_quantized
        return
    with pytest.raises(OutputError, match="does not fit on the disk"):
        quantize_checkpoint(source, small_disk / "out", preset())
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def test_progress_counts_up_to_the_whole(tmp_path):
    calls = []
    quantize_checkpoint(
        _source(tmp_path / "in"),
        tmp_path / "out",
        preset(),
        progress=lambda done, total, name: calls.append((done, total, name)),
    )
    done = [call[0] for call in calls]
    assert done == sorted(done)
    total = sum(t.numel() * t.element_size() for t in _small().values())
    assert calls[-1][:2] == (total, total)
    assert {call[2] for call in calls} == set(_small())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [_LINEAR, _EXPERTS, _EMBEDDING])
def test_a_weight_that_is_not_finite_is_named(tmp_path, name, value):
    tensors = _small()
    tensors[name].view(-1)[-1] = value
    _source(tmp_path / "in", tensors)
    message = _fails(CheckpointError, tmp_path, tmp_path / "out", preset())
    assert f"{name} of" in message
    assert "not finite" in message


def test_weights_of_a_type_that_cannot_be_quantized_are_named(tmp_path):
    _source(tmp_path / "in", {_LINEAR: torch.zeros(4, 32, dtype=torch.float8_e4m3fn)})
    message = _fails(CheckpointError, tmp_path, tmp_path / "out", preset())
    assert "F8_E4M3" in message
    assert _LINEAR in message


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path):
    _source(tmp_path / "in")
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", preset())
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "again", preset())


def test_a_recipe_that_fits_no_weight_is_refused(tmp_path):
    _source(tmp_path / "in", {"transformer.h.0.attn.c_attn.weight": _random(4, 32, seed=0)})
    message = _fails(RecipeError, tmp_path, tmp_path / "out", preset())
    assert "int4-g32" in message


def test_a_row_that_no_group_divides_is_refused_before_any_work(tmp_path):
    _source(tmp_path / "in", {_LINEAR: _random(4, 48, seed=0)})
    message = _fails(RecipeError, tmp_path, tmp_path / "out", preset())
    assert _LINEAR in message
    assert "48" in message


def test_matrices_that_no_rule_names_are_kept_with_a_note(tmp_path):
    tensors = _small() | {"model.novel.mixer": _random(4, 32, seed=6)}
    report = quantize_checkpoint(_source(tmp_path / "in", tensors), tmp_path / "out", preset())
    assert any("model.novel.mixer" in note for note in report.notes)
    assert torch.equal(
        open_checkpoint(tmp_path / "out").get("model.novel.mixer"), tensors["model.novel.mixer"]
    )
