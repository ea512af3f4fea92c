"""Reading checkpoint folders: what is whole reads exactly, what is not says so in a sentence."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantize.checkpoint import open_checkpoint
from quantize.errors import CheckpointError
from quantize.files import safetensors_folder
from quantize.packing import pack_int4, unpack_int4
from quantize.quantizer import quantize_checkpoint
from quantize.recipe import preset
from tests.support.sharded import save_shards


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.layers.0.self_attn.q_proj.weight": torch.randn(6, 64, generator=generator),
        "model.layers.0.experts.down_proj": torch.randn(3, 4, 32, generator=generator).bfloat16(),
        "model.embed_tokens.weight": torch.randn(10, 7, generator=generator).half(),
        "model.norm.weight": torch.randn(7, generator=generator),
    }


def _write(folder: Path, *, shards: int = 1) -> dict[str, torch.Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors()
    (folder / "config.json").write_text('{"model_type": "made_up"}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    files = {
        f"model-{number + 1:05}-of-{shards:05}.safetensors": {
            name: tensors[name] for name in sorted(tensors)[number::shards]
        }
        for number in range(shards)
    }
    save_shards(folder, files)
    return tensors


def _message(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return _one_sentence(caught)


def _one_sentence(caught: pytest.ExceptionInfo) -> str:
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert "; " in message, "no hint what to do"
    return message


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_every_weight_reads_back_exactly_in_fp32(tmp_path, shards):
    tensors = _write(tmp_path, shards=shards)
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.is_quantized
    assert checkpoint.recipe is None
    assert checkpoint.config == {"model_type": "made_up"}
    assert checkpoint.generation_config == {}
    assert checkpoint.names() == set(tensors)
    for name, tensor in tensors.items():
        read = checkpoint.get(name)
        assert read.dtype == torch.float32
        # Exact: bfloat16 and float16 are subsets of float32.
        assert torch.equal(read, tensor.float())
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.stored_bytes(name) == tensor.numel() * tensor.element_size()
        assert torch.equal(checkpoint.get_as_stored(name), tensor)


def test_a_slice_of_a_three_dimensional_weight_is_one_expert(tmp_path):
    tensors = _write(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    name = "model.layers.0.experts.down_proj"
    for index in range(3):
        assert torch.equal(checkpoint.get(name, index), tensors[name][index].float())


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.0.experts.down_proj", 3),
        ("model.layers.0.experts.down_proj", -1),
        ("model.embed_tokens.weight", 0),
    ],
)
def test_a_slice_that_does_not_exist_is_refused(tmp_path, name, index):
    _write(tmp_path)
    with pytest.raises(CheckpointError, match=f"no slice {index}"):
        open_checkpoint(tmp_path).get(name, index)


def test_rows_of_a_weight_are_its_rows(tmp_path):
    tensors = _write(tmp_path)
    rows = open_checkpoint(tmp_path).get_rows("model.embed_tokens.weight", 2, 5)
    assert torch.equal(rows, tensors["model.embed_tokens.weight"][2:5].float())


def test_a_generation_config_is_read_when_there_is_one(tmp_path):
    _write(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"max_denoising_steps": 7}')
    assert open_checkpoint(tmp_path).generation_config == {"max_denoising_steps": 7}


def test_a_missing_folder_is_named(tmp_path):
    assert str(tmp_path / "nowhere") in _message(tmp_path / "nowhere")


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "is a file" in _message(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "config.json is missing"),
        ("", "not valid JSON"),
        ('{"model_type": ', "not valid JSON"),
        ("[1, 2]", "holds a JSON list"),
        ("[" * 100_000, "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
    ],
)
def test_a_missing_or_invalid_config_is_named(tmp_path, content, said):
    _write(tmp_path)
    config = tmp_path / "config.json"
    config.unlink()
    if isinstance(content, str):
        config.write_text(content)
    elif content is not None:
        config.write_bytes(content)
    assert said in _message(tmp_path)


def test_missing_weights_are_named(tmp_path):
    _write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "has no model.safetensors" in _message(tmp_path)


def test_pickled_weights_are_refused_and_never_loaded(tmp_path):
    _write(tmp_path)
    (tmp_path / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save(Trap(), tmp_path / "pytorch_model.bin")
    assert "pickle" in _message(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_shards_without_an_index_are_named(tmp_path):
    _write(tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "model-00001-of-00002.safetensors but neither" in _message(tmp_path)


def _truncation_points(data: bytes) -> dict[str, int]:
    header = struct.unpack("<Q", data[:8])[0]
    return {
        "empty": 0,
        "inside the length": 5,
        "behind the length": 8,
        "inside the header": 8 + header // 2,
        "behind the header": 8 + header,
        "inside the data": (8 + header + len(data)) // 2,
        "one byte short": len(data) - 1,
    }


@pytest.mark.parametrize("point", _truncation_points(struct.pack("<Q", 0) + b"x" * 9))
@pytest.mark.parametrize("shards", [1, 2])
def test_a_truncated_file_is_found_on_opening(tmp_path, point, shards):
    _write(tmp_path, shards=shards)
    file = max(tmp_path.glob("*.safetensors"))
    data = file.read_bytes()
    cut = _truncation_points(data)[point]
    assert cut < len(data)
    file.write_bytes(data[:cut])
    message = _message(tmp_path)
    assert "truncated or damaged" in message
    assert file.name in message
    assert f"({cut:,} bytes)" in message


def test_bytes_behind_the_end_are_found_on_opening(tmp_path):
    _write(tmp_path)
    with open(tmp_path / "model.safetensors", "ab") as file:
        file.write(b"more")
    assert "damaged" in _message(tmp_path)


def test_a_header_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    _write(tmp_path)
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}
    ).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    assert "damaged" in _message(tmp_path)


def test_an_index_that_names_an_absent_shard_is_refused(tmp_path):
    _write(tmp_path, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in _message(tmp_path)


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(tmp_path):
    _write(tmp_path, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["model.ghost.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(table))
    assert "model.ghost.weight" in _message(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        "../outside.safetensors",
        "sub/inside.safetensors",
        "..\\outside.safetensors",
        "/etc/passwd",
        "config.json",
        "nul\0.safetensors",
        7,
        None,
    ],
)
def test_an_index_cannot_reach_outside_its_folder(tmp_path, entry):
    folder = tmp_path / "checkpoint"
    tensors = _write(folder, shards=2)
    save_file(tensors, tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["model.norm.weight"] = entry
    index.write_text(json.dumps(table))
    message = _message(folder)
    assert repr(entry) in message
    assert "model.norm.weight" in message


@pytest.mark.parametrize("name", ["model.\nweight", "model.\x1b[2Jweight"])
def test_a_name_that_would_garble_a_message_is_refused(tmp_path, name):
    _write(tmp_path)
    save_file({name: torch.zeros(2)}, tmp_path / "model.safetensors")
    assert repr(name) in _message(tmp_path)


@pytest.mark.parametrize("table", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_without_a_table_is_refused(tmp_path, table):
    _write(tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(table)
    assert "no table weight_map" in _message(tmp_path)


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    _write(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no tensor model\.ghost") as caught:
        open_checkpoint(tmp_path).get("model.ghost")
    _one_sentence(caught)


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        (torch.zeros(2, 2, dtype=torch.float8_e4m3fn), "F8_E4M3"),
        (torch.zeros(2, 2, dtype=torch.int64), "I64"),
        (torch.zeros(2, 2, dtype=torch.float64), "F64"),
    ],
)
def test_an_unsupported_type_is_named(tmp_path, tensor, name):
    _write(tmp_path)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"stored as {name}") as caught:
        open_checkpoint(tmp_path).get("w")
    _one_sentence(caught)


@pytest.mark.parametrize("width", [1, 2, 7, 32])
def test_packed_nibbles_unpack_to_the_same_integers(width):
    every = torch.arange(-8, 8, dtype=torch.int8)
    values = every.repeat(3 * width).view(3, 16, width)
    packed = pack_int4(values)
    assert packed.shape == (3, 16, (width + 1) // 2)
    assert torch.equal(unpack_int4(packed, width), values)


# What follows damages int4 folders of our own.


@pytest.fixture
def quantized(tmp_path) -> Path:
    _write(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "int4", preset())
    return tmp_path / "int4"


def _edit_recipe(folder: Path, edit) -> None:
    path = folder / "recipe.json"
    recipe = json.loads(path.read_text())
    edit(recipe)
    path.write_text(json.dumps(recipe))


def test_a_quantized_folder_shows_the_original_names_and_shapes(quantized, tmp_path):
    source, checkpoint = open_checkpoint(tmp_path / "source"), open_checkpoint(quantized)
    assert checkpoint.is_quantized
    assert checkpoint.recipe["schema_version"] == 1
    assert checkpoint.names() == source.names()
    assert {n: checkpoint.shape(n) for n in source.names()} == {
        n: source.shape(n) for n in source.names()
    }


def test_another_tools_recipe_json_is_ignored(tmp_path):
    _write(tmp_path)
    (tmp_path / "recipe.json").write_text('{"stages": []}')
    assert not open_checkpoint(tmp_path).is_quantized


@pytest.mark.parametrize("version", [2, 99])
def test_a_newer_recipe_is_refused(quantized, version):
    _edit_recipe(quantized, lambda recipe: recipe.update(schema_version=version))
    message = _message(quantized)
    assert f"schema version {version}" in message
    assert "update the program" in message


@pytest.mark.parametrize("version", [None, "1", 0, True, 1.0])
def test_a_recipe_without_a_version_is_refused(quantized, version):
    _edit_recipe(quantized, lambda recipe: recipe.update(schema_version=version))
    assert repr(version) in _message(quantized)


@pytest.mark.parametrize("tensors", [None, [], {"model.norm.weight": 3}])
def test_a_recipe_without_a_table_of_tensors_is_refused(quantized, tensors):
    _edit_recipe(quantized, lambda recipe: recipe.update(tensors=tensors))
    assert "no table of tensors" in _message(quantized)


_LINEAR = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 2),
        ("bits", True),
        ("bits", "4"),
        ("bits", []),
        ("group_size", 0),
        ("group_size", -32),
        ("group_size", 48),
        ("group_size", "32"),
        ("activation", "run_this"),
        ("activation", None),
    ],
)
def test_a_scheme_that_cannot_be_is_refused(quantized, field, value):
    _edit_recipe(quantized, lambda r: r["tensors"][_LINEAR]["scheme"].update({field: value}))
    message = _message(quantized)
    assert repr(value) in message
    assert _LINEAR in message


@pytest.mark.parametrize("shape", [None, [], [6], [6, "64"], [6, 0], [-6, -64], [True, 64], "6x64"])
def test_a_shape_that_cannot_be_is_refused(quantized, shape):
    _edit_recipe(quantized, lambda recipe: recipe["tensors"][_LINEAR].update(shape=shape))
    assert repr(shape) in _message(quantized)


@pytest.mark.parametrize("shape", [[6, 128], [12, 64], [2, 3, 64]])
def test_integers_of_another_shape_than_the_recipes_are_refused(quantized, shape):
    _edit_recipe(quantized, lambda recipe: recipe["tensors"][_LINEAR].update(shape=shape))
    assert f"{_LINEAR}.qdata" in _message(quantized)


def test_scales_of_another_shape_than_the_recipes_are_refused(quantized):
    _edit_recipe(quantized, lambda r: r["tensors"][_LINEAR]["scheme"].update(group_size=64))
    message = _message(quantized)
    assert f"{_LINEAR}.scale" in message
    assert "[6, 2]" in message
    assert "[6, 1]" in message


@pytest.mark.parametrize("part", ["qdata", "scale"])
def test_a_quantized_weight_that_lacks_a_part_is_refused(quantized, part):
    file = quantized / "model.safetensors"
    tensors = _load(file)
    del tensors[f"{_LINEAR}.{part}"]
    save_file(tensors, file)
    assert f"{_LINEAR}.{part}" in _message(quantized)


def test_integers_of_another_type_are_refused(quantized):
    file = quantized / "model.safetensors"
    tensors = _load(file)
    tensors[f"{_LINEAR}.qdata"] = tensors[f"{_LINEAR}.qdata"].view(torch.int8)
    save_file(tensors, file)
    assert "is I8" in _message(quantized)


def test_scales_that_are_not_finite_are_refused(quantized):
    file = quantized / "model.safetensors"
    tensors = _load(file)
    tensors[f"{_LINEAR}.scale"][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="not finite") as caught:
        open_checkpoint(quantized).get(_LINEAR)
    _one_sentence(caught)


def _load(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    # From bytes, not mapped: the file is rewritten while the tensors live.
    return load(file.read_bytes())


# Reading without keeping.


def _resident_file_pages_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("this system has no RssFile")


@pytest.mark.parametrize("mapped_bytes", [2**20, 2**30])
def test_what_was_read_does_not_stay_in_memory(tmp_path, monkeypatch, mapped_bytes):
    monkeypatch.setattr(safetensors_folder, "_MAPPED_BYTES", mapped_bytes)
    tensors = {f"{n}": torch.full((2**20,), float(n)) for n in range(16)}
    even = {name: tensor for name, tensor in tensors.items() if int(name) % 2 == 0}
    odd = {name: tensor for name, tensor in tensors.items() if int(name) % 2}
    save_shards(tmp_path, {"a.safetensors": even, "b.safetensors": odd})
    folder = safetensors_folder.SafetensorsFolder(tmp_path)
    before = _resident_file_pages_bytes()
    kept = folder.read("3")
    for name, tensor in tensors.items():
        assert torch.equal(folder.read(name), tensor)
    # 64 MiB were read; what is kept, and the last of each file, may still be there.
    resident = _resident_file_pages_bytes() - before
    assert (resident < 32 * 2**20) == (mapped_bytes == 2**20), resident
    assert torch.equal(kept, tensors["3"])
