"""Random checkpoints: whole for transformers, laid out as the hub does, the same from one seed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file

from export.families import read_shape
from export.plan.presets import names, read_config
from quantize.checkpoint import open_checkpoint
from quantize.errors import CheckpointError, InputError, OutputError
from quantize.quantizer import quantize_checkpoint
from quantize.recipe import preset
from scripts.training import make_checkpoint, random_weights
from scripts.training.make_checkpoint import plan_checkpoint, write_checkpoint, write_shard
from tests.support import hf_reference


def _gemma_config() -> dict[str, Any]:
    config = hf_reference.tiny_config().to_dict()
    return json.loads(json.dumps(config | {"architectures": ["DiffusionGemmaForBlockDiffusion"]}))


def _dense_config() -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 96,
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": False, "initializer_range": 0.05, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    }  # fmt: skip


_MODELS = {
    "diffusion_gemma": (_gemma_config, transformers.DiffusionGemmaForBlockDiffusion),
    "qwen3": (_dense_config, transformers.Qwen3ForCausalLM),
}


def _bytes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    loaded = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for part in loaded for name, tensor in part.items()}


@pytest.mark.parametrize("layers", [None, 1, 2])
@pytest.mark.parametrize("kind", _MODELS)
def test_transformers_finds_every_weight_and_none_beyond(kind, layers, tmp_path):
    make_config, model_class = _MODELS[kind]
    checkpoint = plan_checkpoint(make_config(), layers=layers, max_shard_bytes=40_000)
    write_checkpoint(checkpoint, tmp_path / "out")
    assert len(checkpoint.shards) > 1
    model, info = model_class.from_pretrained(
        tmp_path / "out", output_loading_info=True, local_files_only=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], (problem, info[problem])
    text = getattr(model.config, "text_config", model.config)
    assert text.num_hidden_layers == (layers or 3)
    assert model.dtype == torch.bfloat16
    if kind == "diffusion_gemma":
        assert text.layer_types[-1] == "full_attention"
        # What transformers itself saves of it is what we wrote.
        model.save_pretrained(tmp_path / "saved")
        saved, ours = _tensors(tmp_path / "saved"), _tensors(tmp_path / "out")
        assert set(saved) == set(ours)
        assert all(torch.equal(saved[name], tensor) for name, tensor in ours.items())


def test_its_int4_checkpoint_can_be_made(tmp_path):
    write_checkpoint(plan_checkpoint(_gemma_config()), tmp_path / "out")
    report = quantize_checkpoint(tmp_path / "out", tmp_path / "int4", preset())
    # Normal weights in groups of 32 lose some 19 to 20 dB in 4 bits.
    linear = next(row for row in report.tensors if row.name.endswith("0.self_attn.q_proj.weight"))
    assert 17 < linear.snr_db < 22


@pytest.mark.parametrize("max_shard_bytes", [1, 5_000, 30_000, 10**9])
def test_files_are_those_of_the_hub_to_the_byte(tmp_path, max_shard_bytes):
    checkpoint = plan_checkpoint(_gemma_config(), max_shard_bytes=max_shard_bytes)
    write_checkpoint(checkpoint, tmp_path / "out")
    ours = _tensors(tmp_path / "out")
    for file in checkpoint.shards:
        part = load_file(tmp_path / "out" / file)
        save_file(part, tmp_path / "theirs", metadata={"format": "pt"})
        assert (tmp_path / "theirs").read_bytes() == (tmp_path / "out" / file).read_bytes()
    if len(checkpoint.shards) > 1:
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in ours.values())
        for name, file in index["weight_map"].items():
            assert name in load_file(tmp_path / "out" / file)
        assert set(index["weight_map"]) == set(ours)


def test_shards_are_split_where_the_hub_splits_them():
    shapes = {"a": 6, "b": 20, "c": 2, "d": 6, "e": 30, "f": 1, "g": 9, "h": 10}
    specs = {name: make_checkpoint.TensorSpec("BF16", (n,)) for name, n in shapes.items()}
    tensors = {name: torch.zeros(n, dtype=torch.bfloat16) for name, n in shapes.items()}
    for limit in range(1, 80):
        theirs = split_torch_state_dict_into_shards(tensors, max_shard_size=limit)
        ours = make_checkpoint._shards(specs, limit)
        assert {file: [*group] for file, group in ours.items()} == {
            file: group for file, group in theirs.filename_to_tensors.items()
        }, limit


def test_one_seed_gives_one_checkpoint_whatever_the_shards(tmp_path):
    for name, seed, size in (("a", 1, 10**9), ("b", 1, 10**9), ("c", 1, 9_000), ("d", 2, 10**9)):
        checkpoint = plan_checkpoint(_dense_config(), seed=seed, max_shard_bytes=size)
        write_checkpoint(checkpoint, tmp_path / name)
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")
    a, c, d = (_tensors(tmp_path / name) for name in "acd")
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 3
    assert all(torch.equal(a[name], c[name]) for name in a)
    assert not any(torch.equal(a[name], d[name]) for name in a)
    # Nor are any two weights of it the same.
    assert len({hashlib.sha256(t.view(torch.uint8).numpy()).digest() for t in a.values()}) == len(a)


def test_chunks_are_independent_and_normal():
    shape = (5, random_weights.CHUNK // 4)
    name = "model.layers.0.mlp.up_proj.weight"
    assert len(random_weights.chunks(shape[0] * shape[1])) == 2
    first, second = (random_weights.values(3, name, shape, i, std=0.02) for i in range(2))
    assert first.numel() + second.numel() == shape[0] * shape[1]
    assert not torch.equal(first[: second.numel()], second)
    values = first.double()
    # 4 M values: the mean is known to 1e-5, the deviation to 7e-6, and bf16 rounds by 2^-9.
    assert values.mean().abs() < 5e-5
    assert values.std() == pytest.approx(0.02, rel=2e-3)
    kurtosis = (values / values.std()).pow(4).mean()
    assert kurtosis == pytest.approx(3.0, abs=0.02)
    assert abs(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]) < 3e-3


@pytest.mark.parametrize(
    ("name", "shape", "mean", "std"),
    [
        ("model.layers.0.input_layernorm.weight", (10_000,), 1.0, 0.05),
        ("model.transformer.ln_f.weight", (10_000,), 1.0, 0.05),
        ("model.decoder.layers.0.router.scale", (10_000,), 1.0, 0.05),
        ("model.decoder.layers.0.layer_scalar", (1,), 1.0, 0.0),
        ("model.decoder.layers.0.router.proj.weight", (100, 100), 0.0, 1.0),
        ("model.layers.0.self_attn.q_proj.bias", (10_000,), 0.0, 0.03),
    ],
)
def test_each_kind_of_weight_has_its_usual_values(name, shape, mean, std):
    values = random_weights.values(0, name, shape, 0, std=0.03).double()
    assert values.mean() == pytest.approx(mean, abs=0.05 * (std or 1))
    if values.numel() > 1:
        assert values.std() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("model", names())
@pytest.mark.parametrize("layers", [1, 3])
def test_every_preset_can_be_cut(model, layers):
    config = read_config(model)[1]
    whole, cut = plan_checkpoint(config), plan_checkpoint(config, layers=layers)
    weights = {name: spec for specs in cut.shards.values() for name, spec in specs.items()}
    # HRM-Text has so many in each of its two stacks.
    assert read_shape(cut.config).num_layers == layers * (2 if model == "hrm-text-1b" else 1)
    assert cut.total_bytes < whole.total_bytes
    assert {w.name for w in read_shape(cut.config).weights} == set(weights)
    assert config == read_config(model)[1]  # not changed
    # The last layer is of the kind that the model ends with.
    kinds = [read_shape(c.config).attentions[-1] for c in (whole, cut)]
    assert kinds[0].kind == kinds[1].kind and kinds[0].head_dim == kinds[1].head_dim


def test_a_shard_alone_is_that_of_the_whole(tmp_path):
    checkpoint = plan_checkpoint(_gemma_config(), max_shard_bytes=40_000)
    write_checkpoint(checkpoint, tmp_path / "whole")
    whole = _bytes(tmp_path / "whole")
    for number, file in enumerate(checkpoint.shards, start=1):
        path = write_shard(checkpoint, tmp_path / "one", number)
        assert path.name == file
        files = _bytes(tmp_path / "one")
        assert files == {name: whole[name] for name in files}
        assert set(files) == {"config.json", "model.safetensors.index.json", file}
        path.unlink()
    with pytest.raises(OutputError, match="something else than shards of this checkpoint"):
        write_shard(plan_checkpoint(_dense_config()), tmp_path / "one", 1)
    with pytest.raises(InputError, match=f"from 1 to {len(checkpoint.shards)}"):
        write_shard(checkpoint, tmp_path / "one", len(checkpoint.shards) + 1)


def test_an_interrupted_checkpoint_is_gone_on_with_at_its_shard(tmp_path):
    checkpoint = plan_checkpoint(_dense_config(), max_shard_bytes=30_000)
    write_checkpoint(checkpoint, tmp_path / "whole")
    first = set(next(iter(checkpoint.shards.values())))

    def interrupt(done: int, total: int, name: str) -> None:
        if name not in first:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(checkpoint, tmp_path / "out", progress=interrupt)
    calls: list[tuple[int, int, str]] = []
    write_checkpoint(checkpoint, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert calls[0][2] == "done before" and not {call[2] for call in calls} & first
    assert calls[-1][0] == calls[-1][1] == checkpoint.total_bytes
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


@pytest.mark.parametrize("layers", [0, 4])
def test_layers_that_there_are_not_are_refused(layers):
    with pytest.raises(InputError, match=f"has 3 layers; give a number from 1 to 3, not {layers}"):
        plan_checkpoint(_dense_config(), layers=layers)


def test_a_vision_tower_of_other_weights_is_refused():
    config = _gemma_config()
    config["vision_config"]["use_clipped_linears"] = True
    with pytest.raises(CheckpointError, match="use_clipped_linears = True"):
        plan_checkpoint(config)


def test_the_program_writes_a_folder_with_the_models_generation_config(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(_dense_config()))
    (tmp_path / "model/generation_config.json").write_text('{"top_k": 5}')
    arguments = ["make_checkpoint", str(tmp_path / "model"), str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*arguments, "--layers", "2", "--seed", "7"])
    assert make_checkpoint.main() == 0
    assert "in 1 shards" in capsys.readouterr().out
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.generation_config == {"top_k": 5}
    assert checkpoint.config["num_hidden_layers"] == 2
    expected = plan_checkpoint(_dense_config(), layers=2, seed=7)
    write_checkpoint(expected, tmp_path / "same")
    assert _tensors(tmp_path / "out").keys() == _tensors(tmp_path / "same").keys()
    monkeypatch.setattr("sys.argv", ["make_checkpoint", "no-such-model", str(tmp_path / "x")])
    assert make_checkpoint.main() == 2
    assert "presets are" in capsys.readouterr().err
