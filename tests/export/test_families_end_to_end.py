"""Gemma 4 and HRM-Text from a checkpoint to the tokens of an int4 bundle, as a user has them.

Tiny random weights, CPU only, each family lowered once. The seeds are of models whose greedy
choices are decisive: the second best logit is further away than int8 rounding moves one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from export.contract.bundle import Bundle
from export.exporter import export_bundle
from export.families import gemma4 as gemma4_family
from export.host.bundle_engine import open_engine
from export.host.eager import eager_engine
from export.models import stage_model
from export.models.staging import StagedModel
from quantize.checkpoint import open_checkpoint
from quantize.quantizer import quantize_checkpoint
from quantize.recipe import preset
from tests.support import gemma4_models, hrm_text_models
from tests.support.dense_checkpoints import END, PAD, VOCABULARY, write_tokenizer

CONTEXT, PREFILL, PROMPT, NEW_TOKENS = 48, 8, 21, 5

# Keys that are values, per-layer embeddings and a layer that reads the KV of the one before.
GEMMA4 = gemma4_models.TWO_LAYERS | {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size_per_layer_input": 32,
    "tie_word_embeddings": False,
    "eos_token_id": END,
    "pad_token_id": PAD,
}
# The MLP is wide so that a program's weights outweigh its instructions.
HRM_TEXT = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 1,
    "intermediate_size": 1024,
    "eos_token_id": END,
    "pad_token_id": PAD,
}


@dataclass(frozen=True)
class Made:
    """An int4 checkpoint and the bundle lowered from it."""

    int4: Path
    bundle: Bundle

    def eager(self) -> StagedModel:
        """The same int4 weights, not lowered."""
        return stage_model(open_checkpoint(self.int4), maximum_context=CONTEXT)


def make(reference: torch.nn.Module, folder: Path) -> Made:
    """Save, quantize by the default recipe, lower."""
    reference.save_pretrained(folder / "hf")
    write_tokenizer(folder / "hf", names_mask=False)
    quantize_checkpoint(folder / "hf", folder / "int4", preset())
    bundle = export_bundle(folder / "int4", folder / "bundle", maximum_context=CONTEXT)
    return Made(folder / "int4", bundle)


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Prefill in chunks of 8, so that a short prompt takes several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemma4_family, "PREFILL_LENGTH", PREFILL)
        reference = gemma4_models.random_model(GEMMA4, seed=5)
        return make(reference, tmp_path_factory.mktemp("gemma4"))


@pytest.fixture(scope="module")
def hrm_text(tmp_path_factory: pytest.TempPathFactory) -> Made:
    reference = hrm_text_models.random_model(seed=7, **HRM_TEXT)
    return make(reference, tmp_path_factory.mktemp("hrm_text"))


def prompt_of(length: int = PROMPT) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, END - 1, (length,), generator=generator).tolist()


@pytest.mark.slow
def test_gemma4_in_int4_gives_the_eager_tokens_with_its_prompt_in_chunks(gemma4: Made) -> None:
    """Against one call over the whole prompt: chunks of 8, 8, 4, then one token at a time."""
    decoding = gemma4.bundle.manifest.decoding
    assert decoding is not None and decoding.prefill_length == PREFILL < PROMPT
    whole = gemma4.eager()
    assert whole.decoding is not None and whole.decoding.prefill_length == CONTEXT
    expected = eager_engine(whole).session().generate(prompt_of(), NEW_TOKENS).tokens
    found = open_engine(gemma4.bundle).session().generate(prompt_of(), NEW_TOKENS).tokens
    assert found == expected and len(set(found)) > 3


@pytest.mark.slow
def test_hrm_text_in_int4_gives_the_eager_tokens_over_two_turns(hrm_text: Made) -> None:
    """The first prompt is bidirectional and so comes whole; the second is causal, over a cache."""
    decoding = hrm_text.bundle.manifest.decoding
    assert decoding is not None and decoding.bidirectional_prompt
    engines = eager_engine(hrm_text.eager()), open_engine(hrm_text.bundle)
    eager, lowered = (engine.session() for engine in engines)
    for length in (PROMPT, 5):
        expected = eager.generate(prompt_of(length), NEW_TOKENS).tokens
        assert lowered.generate(prompt_of(length), NEW_TOKENS).tokens == expected
        assert len(set(expected)) > 3


@pytest.mark.slow
def test_a_stack_of_hrm_text_is_stored_once_however_often_it_runs(hrm_text: Made) -> None:
    """The low stack runs 6 times a token and the high one twice; both files hold one stack."""
    manifest, checkpoint = hrm_text.bundle.manifest, open_checkpoint(hrm_text.int4)
    runs = [call.stage for call in manifest.schedule]
    assert (runs.count("low"), runs.count("high")) == (6, 2)
    for stage, tensors in {"low": "L_module", "high": "H_module"}.items():
        packed = sum(checkpoint.stored_bytes(n) for n in checkpoint.names() if tensors in n)
        size = hrm_text.bundle.files[f"{stage}.pte"].bytes
        assert packed < size < 2 * packed, (stage, packed, size)
    assert len(manifest.stages) == 4


GROWTH_WHEN_A_BUNDLE_IS_LOADED_AND_RUN = """
import json, sys
from export.contract.bundle import open_bundle
from export.host.process import peak_rss_bytes
from export.host.bundle_engine import open_engine

session = open_engine(open_bundle(sys.argv[1]), threads=1).session()  # everything is imported
session.generate([1, 2, 3], 1)
del session
before = peak_rss_bytes()
session = open_engine(open_bundle(sys.argv[2]), threads=1).session()
tokens = session.generate([1, 2, 3], 2).tokens
print(json.dumps({"bytes": peak_rss_bytes() - before, "tokens": tokens}))
"""


@pytest.mark.slow
def test_a_stack_of_hrm_text_is_in_memory_twice_however_often_it_runs(
    hrm_text: Made, tmp_path: Path
) -> None:
    """Once as its file has it, once as the backend packs it; 8 packed copies would be 5 times more.

    Stacks of 7 MB each, so that the weights outweigh buffers and the allocator's slack.
    """
    large = {"hidden_size": 512, "intermediate_size": 8192, "head_dim": 64}
    made = make(hrm_text_models.random_model(seed=3, **HRM_TEXT | large), tmp_path)
    checkpoint = open_checkpoint(made.int4)
    stacks = [
        sum(checkpoint.stored_bytes(n) for n in checkpoint.names() if tensors in n)
        for tensors in ("L_module", "H_module")
    ]
    assert min(stacks) > 7e6
    command = [sys.executable, "-c", GROWTH_WHEN_A_BUNDLE_IS_LOADED_AND_RUN]
    folders = [str(bundle.folder) for bundle in (hrm_text.bundle, made.bundle)]
    output = subprocess.run(command + folders, check=True, capture_output=True, text=True).stdout
    grown = json.loads(output.splitlines()[-1])
    assert len(grown["tokens"]) == 2
    # Both stacks as stored and as packed, and a half for caches, activations and the allocator.
    assert sum(stacks) < grown["bytes"] < 2.5 * sum(stacks), (stacks, grown)


@pytest.mark.slow
def test_what_a_bundle_says_of_itself(gemma4: Made, hrm_text: Made) -> None:
    for made, family in ((gemma4, "gemma4"), (hrm_text, "hrm_text")):
        manifest = made.bundle.manifest
        assert (manifest.model.family, manifest.style) == (family, "autoregressive")
        assert manifest.recipe is not None and json.dumps(manifest.recipe).count("int4-g32")
        # One quantized product each: a layer that fell out of the backend would be slow, not wrong.
        assert all("linear" not in "".join(s.delegation.portable) for s in manifest.stages)
