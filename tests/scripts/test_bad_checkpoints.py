"""Damaged and foreign checkpoints through `quantize` and `export`: refused before any work."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from export.families import FAMILIES
from scripts.pocketdiff import run
from tests.support import dense_checkpoints
from tests.support.demo import DEMO_MODEL


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncate_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1_000_000)


def truncate_header(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100)


def edit_config(folder: Path, path: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    *section, leaf = path.split(".")
    target = config[section[0]] if section else config
    if value is None:
        del target[leaf]
    else:
        target[leaf] = value
    (folder / "config.json").write_text(json.dumps(config))


def other_architecture(folder: Path) -> None:
    edit_config(folder, "model_type", "mistral")


def remote_code(folder: Path) -> None:
    edit_config(folder, "model_type", "my_model")
    edit_config(folder, "auto_map", {"AutoModel": "modeling.MyModel"})
    (folder / "modeling.py").write_text("raise SystemExit('remote code was run')")


def config_without_experts(folder: Path) -> None:
    edit_config(folder, "text_config.num_experts", None)


def config_of_other_sizes(folder: Path) -> None:
    edit_config(folder, "text_config.intermediate_size", 256)


def config_cut_off(folder: Path) -> None:
    os.truncate(folder / "config.json", 200)


def larger_tokenizer(folder: Path) -> None:
    edit_config(folder, "text_config.vocab_size", 64)
    text = json.loads((folder / "tokenizer.json").read_text())
    text["model"]["vocab"]["extra"] = 64
    (folder / "tokenizer.json").write_text(json.dumps(text))


def unknown_sampler(folder: Path) -> None:
    path = folder / "generation_config.json"
    config = json.loads(path.read_text())
    config["sampler_config"]["_cls_name"] = "OtherSamplerConfig"
    path.write_text(json.dumps(config))


EXPORT_CASES: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "missing safetensors": (remove_weights, (), "safetensors"),
    "truncated safetensors": (truncate_weights, (), "model.safetensors"),
    "truncated safetensors header": (truncate_header, (), "model.safetensors"),
    "another architecture": (other_architecture, (), "'mistral'; supported: "),
    "remote code": (
        remote_code,
        (),
        "'my_model' and brings Python code (auto_map), which is never",
    ),
    "a config without experts": (config_without_experts, (), "text_config.num_experts = None"),
    "a config of other sizes": (config_of_other_sizes, (), "does not fit config.json"),
    "half a config": (config_cut_off, (), "config.json"),
    "a tokenizer of another model": (larger_tokenizer, (), "'extra' the id 64"),
    "an unknown sampler": (unknown_sampler, (), "'OtherSamplerConfig'"),
    "a context under one canvas": (lambda folder: None, ("--context", "19"), "19"),
    "a context over the model's": (lambda folder: None, ("--context", "1025"), "1025"),
    "an unknown backend": (lambda folder: None, ("--backend", "npu"), "'npu'"),
}


@pytest.mark.parametrize("case", EXPORT_CASES)
def test_export_refuses_with_one_sentence_and_leaves_nothing(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, options, says = EXPORT_CASES[case]
    folder = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    damage(folder)
    code = run(["export", str(folder), str(tmp_path / "bundle"), *options])
    out, err = capfd.readouterr()
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1 and err.startswith("pocketdiff: ") and says in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def no_mask_token(folder: Path) -> None:
    edit_config(folder, "mask_token_id", None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def tokenizer_of_a_larger_model(folder: Path) -> None:
    dense_checkpoints.write_tokenizer(folder, dense_checkpoints.VOCABULARY + 8)


def vocabulary_of_another_embedding(folder: Path) -> None:
    edit_config(folder, "vocab_size", 128)


def unknown_type(folder: Path) -> None:
    edit_config(folder, "model_type", "plaid")
    edit_config(folder, "auto_map", None)


def unknown_type_with_code(folder: Path) -> None:
    edit_config(folder, "model_type", "plaid")
    (folder / "modeling_sdar.py").write_text("raise SystemExit('remote code was run')")


ALL_TYPES = ", ".join(sorted(FAMILIES))

MASKED_CASES: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...], tuple[str, ...]]] = {
    "no mask token": (
        "sdar", no_mask_token, (),
        ("which token is the mask", "'<|MASK|>'", "add mask_token_id to config.json"),
    ),
    "a mask outside of the vocabulary": (
        "llada", lambda folder: edit_config(folder, "mask_token_id", 96), (),
        ("mask_token_id of config.json is 96", "has 96 tokens"),
    ),
    "a tokenizer of a larger model": (
        "Dream", tokenizer_of_a_larger_model, (),
        ("the id 103", "vocabulary ends at 95", "use the tokenizer that belongs to the model"),
    ),
    "a vocabulary of another embedding": (
        "qwen3", vocabulary_of_another_embedding, (),
        ("a vocabulary of 128 tokens", "has 96 rows", "from one checkpoint"),
    ),
    "a context of broken blocks": (
        "sdar", lambda folder: None, ("--context", "66"),
        ("maximum context 66", "blocks of 4", "give a multiple of 4"),
    ),
    "a context of broken blocks of 32": (
        "Fast_dLLM_Qwen", lambda folder: None, ("--context", "48"),
        ("maximum context 48", "give a multiple of 32"),
    ),
    "a block over the model's positions": (
        "a2d-qwen3", lambda folder: edit_config(folder, "block_size", 512), (),
        ("allows 256 positions", "block of 512"),
    ),
    "blocks or not": (
        "a2d-qwen3", lambda folder: None, (),
        ('"block_size": 32 for a bd3lm', '"block_size": 0 for an mdlm'),
    ),
    "an unknown model_type": ("sdar", unknown_type, (), (f"'plaid'; supported: {ALL_TYPES}",)),
    "an unknown model_type with code": (
        "sdar", unknown_type_with_code, (),
        ("'plaid' and brings Python code (auto_map), which is never run", ALL_TYPES),
    ),
}  # fmt: skip
"""Format, what is wrong with the folder, options, and what the sentence must say."""


@pytest.mark.parametrize("case", MASKED_CASES)
def test_export_of_a_dense_decoder_refuses_with_one_sentence_and_leaves_nothing(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model_type, damage, options, says = MASKED_CASES[case]
    folder = tmp_path / "model"
    dense_checkpoints.write(folder, model_type)
    damage(folder)
    code = run(["export", str(folder), str(tmp_path / "bundle"), *options])
    out, err = capfd.readouterr()
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1 and err.startswith("pocketdiff: "), err
    assert all(part in err for part in says), err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_code_in_a_checkpoint_of_a_known_type_is_named_and_not_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The released SDAR, Fast-dLLM, Dream and LLaDA folders all bring code for transformers."""
    folder = tmp_path / "model"
    dense_checkpoints.write(folder, "sdar", shape={"num_hidden_layers": 1})
    ran = tmp_path / "ran"
    for name in ("configuration_sdar.py", "modeling_sdar.py", "tokenization.py"):
        (folder / name).write_text(f"open({str(ran)!r}, 'w').close()")
    code = run(["export", str(folder), str(tmp_path / "bundle"), "--context", "64"])
    out, err = capfd.readouterr()
    assert code == 0, err
    assert "(auto_map): not needed, and not run" in " ".join(out.split())
    assert not ran.exists()
    assert not list((tmp_path / "bundle").glob("*.py"))


@pytest.mark.parametrize(
    "damage", [remove_weights, truncate_weights, truncate_header, config_cut_off]
)
def test_quantize_refuses_with_one_sentence_and_leaves_nothing(
    damage: Callable[[Path], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    damage(folder)
    code = run(["quantize", str(folder), str(tmp_path / "int4")])
    out, err = capfd.readouterr()
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1 and err.startswith("pocketdiff: "), err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
