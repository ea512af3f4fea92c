"""Damaged and foreign checkpoints through `quantize` and `export`: refused before any work."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.pocketdiff import run
from tests.conftest import DEMO_MODEL


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
    "remote code": (remote_code, (), "'my_model'; supported: "),
    "a config without experts": (config_without_experts, (), "text_config.num_experts = None"),
    "a config of other sizes": (config_of_other_sizes, (), "does not fit config.json"),
    "half a config": (config_cut_off, (), "config.json"),
    "a tokenizer of another model": (larger_tokenizer, (), "'extra' the id 64"),
    "an unknown sampler": (unknown_sampler, (), "'OtherSamplerConfig'"),
    "a context under one canvas": (lambda folder: None, ("--maximum-context", "19"), "19"),
    "a context over the model's": (lambda folder: None, ("--maximum-context", "1025"), "1025"),
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
