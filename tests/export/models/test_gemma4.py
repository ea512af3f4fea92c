"""Gemma 4's layers against transformers: CPU only, random weights in the released shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
)

from export.backends import lower_stage
from export.families import gemma4
from export.host.eager import eager_engine
from export.models import stage_model
from export.models.gemma4 import Gemma4Layers, build_layers
from export.models.staging import StagedModel, block_layers_stage
from quantize.checkpoint import open_checkpoint
from quantize.errors import CheckpointError
from quantize.quantizer import quantize_checkpoint
from quantize.recipe import Recipe, Rule, Scheme, preset
from tests.support.clear_choices import assert_clear, greedy
from tests.support.gemma4_models import (
    CASES,
    COMMON,
    EVERYTHING,
    LARGE,
    PHONE,
    TWO_LAYERS,
    VOCABULARY,
    WINDOW,
    random_model,
    randomize,
)
from tests.support.hf_reference import TINY_VISION

# fp32 reassociation over at most 6 layers of random weights stays near 1e-5 on logits of scale 3.
LOGIT_TOLERANCE = 1e-4
CONTEXT, PREFILL = 64, 8


def run(layers: Gemma4Layers, tokens: torch.Tensor, start: int, block: int = 1) -> torch.Tensor:
    """One call of the layers."""
    with torch.no_grad():
        return layers(tokens, torch.tensor([start]), torch.tensor([block]))


def run_in_pieces(layers: Gemma4Layers, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """Prefill `prompt` tokens in chunks of at most the prefill length, then one at a time."""
    ends = [*range(PREFILL, prompt, PREFILL), *range(prompt, tokens.shape[1] + 1)]
    starts = [0, *ends[:-1]]
    parts = [run(layers, tokens[:, a:b], a) for a, b in zip(starts, ends, strict=True)]
    return torch.cat(parts, dim=1)


def logits_of(model: Gemma4ForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
    """The reference's head on our hidden states: parity of the layers alone."""
    with torch.no_grad():
        logits = model.lm_head(hidden)
    cap = model.config.get_text_config().final_logit_softcapping
    return logits if cap is None else torch.tanh(logits / cap) * cap


def build(folder: Path) -> Gemma4Layers:
    """The layers of a checkpoint folder."""
    checkpoint = open_checkpoint(folder)
    config = gemma4.Gemma4Config.from_checkpoint_config(checkpoint.config)
    return build_layers(checkpoint, config, maximum_context=CONTEXT, prefill_length=PREFILL)


@pytest.mark.parametrize("case", CASES)
def test_chunked_prefill_and_decode_give_the_logits_of_transformers(
    case: str, tmp_path: Path
) -> None:
    reference = random_model(CASES[case])
    reference.save_pretrained(tmp_path)
    layers = build(tmp_path)
    tokens = torch.randint(0, VOCABULARY, (1, 40))
    with torch.no_grad():
        expected = reference(input_ids=tokens, use_cache=False).logits
    ours = logits_of(reference, run_in_pieces(layers, tokens, prompt=21))
    assert (ours - expected).abs().max().item() <= LOGIT_TOLERANCE


@pytest.mark.parametrize("case", ["large", "phone"])
def test_released_spelling_of_the_config_and_the_wrapped_checkpoint(
    case: str, tmp_path: Path
) -> None:
    """The published files state `global_head_dim` and no `per_layer_config`, and hold towers."""
    torch.manual_seed(7)
    config = Gemma4Config(text_config=CASES[case], vision_config=TINY_VISION)
    reference = randomize(Gemma4ForConditionalGeneration(config).eval())
    reference.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["text_config"]["per_layer_config"]
    saved["text_config"] |= {
        "global_head_dim": COMMON["global_head_dim"],
        "num_global_key_value_heads": CASES[case].get("num_global_key_value_heads"),
    }
    (tmp_path / "config.json").write_text(json.dumps(saved))
    layers, notes = build(tmp_path), staged(tmp_path).notes
    assert notes and [note for note in notes if "vision" in note] == list(notes)
    tokens = torch.randint(0, VOCABULARY, (1, 20))
    with torch.no_grad():
        expected = reference(input_ids=tokens, use_cache=False).logits
    ours = logits_of(reference, run_in_pieces(layers, tokens, prompt=11))
    assert (ours - expected).abs().max().item() <= LOGIT_TOLERANCE


@pytest.mark.parametrize("case", ["large", "phone"])
def test_greedy_generation_is_that_of_transformers(case: str, tmp_path: Path) -> None:
    """Through the head of the bundle, soft cap included, well past the window."""
    from export.heads.autoregressive import AutoregressiveHead

    # With a tied table the likeliest successor of a random model is the token itself.
    reference = random_model(CASES[case] | {"tie_word_embeddings": False}, seed=11)
    reference.save_pretrained(tmp_path)
    layers = build(tmp_path)
    head = AutoregressiveHead(
        open_checkpoint(tmp_path).get(layers.config.head_table),
        truncation=False,
        soft_cap=layers.config.soft_cap,
    )
    prompt = torch.randint(0, VOCABULARY, (1, 13))
    expected = reference.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=24,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    hidden = run_in_pieces(layers, prompt, prompt=13)
    chosen, log_probs = [], []
    for position in range(13, 13 + 24):
        with torch.no_grad():
            token, log_prob, _ = head(
                hidden,
                torch.tensor([hidden.shape[1] - 1]),
                torch.tensor([0.0, 1.0, 0.0]),
                torch.tensor([0.5]),
            )
        chosen.append(token.item())
        log_probs.append(log_prob.item())
        hidden = run(layers, token.view(1, 1), position)
    assert chosen == expected.sequences[0, 13:].tolist()
    assert len(set(chosen)) > 3  # a constant answer would not tell much
    first, second = torch.cat(expected.logits).topk(2).values.unbind(-1)
    assert_clear(first - second)
    peaks = [step.log_softmax(-1).amax().item() for step in expected.logits]
    assert torch.allclose(torch.tensor(log_probs), torch.tensor(peaks), atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("case", ["large", "phone"])
def test_a_session_gives_the_tokens_of_transformers_generate(case: str, tmp_path: Path) -> None:
    reference = random_model(CASES[case] | {"tie_word_embeddings": False}, seed=5)
    reference.save_pretrained(tmp_path)
    prompt = torch.randint(0, VOCABULARY, (1, 17))
    expected = greedy(reference, prompt, 20, attention_mask=torch.ones_like(prompt))
    found = eager_engine(staged(tmp_path)).session().generate(prompt[0].tolist(), 20)
    assert list(found.tokens) == expected


@pytest.mark.parametrize("case", ["large", "phone"])
def test_every_tensor_changes_the_result(case: str, tmp_path: Path) -> None:
    """A tensor that could be dropped without notice would make the parity tests blind to it."""
    random_model(CASES[case]).save_pretrained(tmp_path)
    layers = build(tmp_path)
    tokens = torch.randint(0, VOCABULARY, (1, PREFILL))
    before = run(layers, tokens, 0)
    tensors = dict(layers.named_parameters())
    del tensors[f"layers.{len(layers.layers) - 1}.layer_scalar"]  # the final norm divides it out
    for name, tensor in tensors.items():
        saved = tensor.clone()
        with torch.no_grad():
            tensor.add_(torch.rand_like(tensor))
            changed = (run(layers, tokens, 0) - before).abs().max().item()
            tensor.copy_(saved)
        assert changed > 1e-6, name


def test_layers_that_share_own_neither_weights_nor_cache(tmp_path: Path) -> None:
    random_model(PHONE).save_pretrained(tmp_path)
    layers = build(tmp_path)
    names = [name for name, _ in (*layers.named_parameters(), *layers.named_buffers())]
    owners = {name.split(".")[1] for name in names if ".k_proj" in name or ".key_cache" in name}
    assert owners == {"0", "1", "2"}
    assert [layer.source for layer in layers.config.layers] == [0, 1, 2, 1, 2, 1]


def test_a_row_sees_its_whole_block_and_all_blocks_before(tmp_path: Path) -> None:
    """The visibility that layers passes have in common, against an explicit mask."""
    random_model(LARGE).save_pretrained(tmp_path)
    layers = build(tmp_path)
    positions = torch.arange(10, 17)
    masks = layers._masks(positions, torch.tensor([4]))
    key, query = torch.arange(CONTEXT)[None], positions[:, None]
    seen = (key // 4 <= query // 4) & (key < 17)
    near = seen & (key > query - WINDOW)
    assert torch.equal(masks["full_attention", 4] == 0, seen.repeat(4, 1))
    assert torch.equal(masks["sliding_attention", 2] == 0, near.repeat(2, 1))


def test_stale_keys_beyond_the_rows_are_not_seen(tmp_path: Path) -> None:
    """With one block of everything, what an earlier and longer call left behind has no effect."""
    random_model(PHONE).save_pretrained(tmp_path)
    layers = build(tmp_path)
    tokens = torch.randint(0, VOCABULARY, (1, PREFILL))
    fresh = run(layers, tokens[:, :3], 0, block=CONTEXT)
    run(layers, tokens, 0, block=CONTEXT)
    assert torch.equal(run(layers, tokens[:, :3], 0, block=CONTEXT), fresh)


# The presets leave what only Gemma 4 has as it is; per-layer embeddings are most of its bytes.
RECIPE = Recipe(
    "gemma4",
    (
        Rule(("*embed_tokens_per_layer.weight",), Scheme(activation="none", smaller_groups=True)),
        Rule(
            (
                "*.per_layer_input_gate.weight",
                "*.per_layer_projection.weight",
                "*.per_layer_model_projection.weight",
            ),
            Scheme(smaller_groups=True),
        ),
        *preset().rules,
    ),
)


def quantized_pair(case: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """An int4 folder, and a plain one of the same values."""
    reference = random_model(case)
    reference.save_pretrained(folder / "plain")
    quantize_checkpoint(folder / "plain", folder / "int4", RECIPE)
    int4 = open_checkpoint(folder / "int4")
    with torch.no_grad():
        for name, tensor in reference.state_dict().items():
            value = int4.get("model.embed_tokens.weight" if "lm_head" in name else name)
            tensor.copy_(value.dequantize() if hasattr(value, "dequantize") else value)
    reference.save_pretrained(folder / "rounded")
    return folder / "int4", folder / "rounded"


def test_an_int4_checkpoint_computes_with_its_rounded_weights(tmp_path: Path) -> None:
    """Against the plain model of the rounded weights: what is left is the int8 activations."""
    int4, rounded = quantized_pair(PHONE, tmp_path)
    scheme = open_checkpoint(int4).recipe["tensors"]["model.embed_tokens_per_layer.weight"]
    assert scheme["scheme"]["bits"] == 4
    layers, plain = build(int4), build(rounded)
    tokens = torch.randint(0, VOCABULARY, (1, 20))
    ours = run_in_pieces(layers, tokens, prompt=11)
    expected = run_in_pieces(plain, tokens, prompt=11)
    # An int8 step is at most 1/255 of a row's range in each of some 40 products in series. Twelve
    # draws of the tokens were 0.044 to 0.078 off, the worst row 0.984 alike; which way a value
    # rounds differs between processors, so a bound in that range would hold on some of them only.
    assert (ours - expected).pow(2).mean().sqrt() <= 0.1 * expected.pow(2).mean().sqrt()
    worst = torch.cosine_similarity(ours[0], expected[0], dim=-1).min().item()
    assert worst > 0.97


def lowered(layers: Gemma4Layers, path: Path) -> Callable[..., torch.Tensor]:
    """The layers as an XNNPACK program that is loaded and can be called."""
    lower_stage(block_layers_stage(layers, PREFILL), "xnnpack").write(path)
    import executorch.kernels.quantized  # noqa: F401
    from executorch.extension.pybindings import _C

    program = _C._load_program(str(path))
    method = program.load_method("forward")

    def call(tokens: torch.Tensor, start: int, block: int = 1) -> torch.Tensor:
        assert program is not None  # it owns what the method reads
        return method([tokens, torch.tensor([start]), torch.tensor([block])])[0].clone()

    return call


# Calls of the layers one after another: first position, tokens, block length.
CALLS = ((0, PREFILL, 1), (PREFILL, 3, 1), (11, 1, 1), (12, 1, 1), (13, 5, 4), (16, 3, CONTEXT))


@pytest.mark.slow
def test_the_lowered_layers_equal_the_eager_ones_at_any_length(tmp_path: Path) -> None:
    random_model(EVERYTHING).save_pretrained(tmp_path / "hf")
    layers = build(tmp_path / "hf")
    program = lowered(layers, tmp_path / "layers.pte")
    eager = build(tmp_path / "hf")
    for start, count, block in CALLS:
        tokens = torch.randint(0, VOCABULARY, (1, count))
        difference = (program(tokens, start, block) - run(eager, tokens, start, block)).abs().max()
        assert difference.item() <= 2e-5, (start, count, block)


@pytest.mark.slow
def test_the_lowered_int4_layers_agree_with_the_eager_int4_ones(tmp_path: Path) -> None:
    """Quantiles, because a value beside a rounding boundary moves by a whole int8 step."""
    int4, _ = quantized_pair(TWO_LAYERS, tmp_path)
    program, eager = lowered(build(int4), tmp_path / "layers.pte"), build(int4)
    differences, values = [], []
    for start, count, block in CALLS:
        tokens = torch.randint(0, VOCABULARY, (1, count))
        expected = run(eager, tokens, start, block)
        differences.append((program(tokens, start, block) - expected).flatten())
        values.append(expected.flatten())
    scale = torch.cat(values).pow(2).mean().sqrt().item()
    difference = torch.cat(differences).abs() / scale
    assert difference.median().item() <= 1e-3
    assert difference.quantile(0.9).item() <= 0.02
    assert difference.max().item() <= 0.3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"enable_moe_block": True}, "mixtures of experts are not supported"),
        ({"hidden_size": None}, "hidden_size = None"),
        ({"hidden_size": 32}, "config.json says"),
        ({"hidden_activation": "silu"}, "hidden_activation = 'silu'"),
        ({"use_bidirectional_attention": "all"}, "'all'"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": [[]] * 6}, "layer_types"),
        ({"num_kv_shared_layers": 5}, "num_kv_shared_layers = 5 of 6"),
        ({"num_kv_shared_layers": 6}, "num_kv_shared_layers = 6 of 6"),
        ({"num_kv_shared_layers": -1}, "num_kv_shared_layers = -1"),
        ({"hidden_size_per_layer_input": -1}, "hidden_size_per_layer_input = -1"),
        ({"hidden_size_per_layer_input": None}, "hidden_size_per_layer_input = None"),
        ({"vocab_size_per_layer_input": 8}, "vocab_size_per_layer_input = 8"),
        ({"num_key_value_heads": 3}, "4 heads over 3 KV heads"),
        ({"per_layer_config": None}, "global_head_dim = None"),
        ({"per_layer_config": {"1": {"sliding_window": 4}}}, "per_layer_config"),
        ({"per_layer_config": {"1": {"head_dim": 0}}}, "per_layer_config.1.head_dim = 0"),
        ({"per_layer_config": {"1": {"head_dim": 32}}}, "one size for each kind"),
        ({"use_double_wide_mlp": 1}, "use_double_wide_mlp = 1"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping = 0.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
        ({"rope_parameters": {}}, "rope_parameters"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e4}}},
            "rope_parameters.full_attention",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(
    change: dict, sentence: str, tmp_path: Path
) -> None:
    random_model(PHONE).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.config.update(change)
    with pytest.raises(CheckpointError, match=r"config\.json") as error:
        config = gemma4.Gemma4Config.from_checkpoint_config(checkpoint.config)
        build_layers(checkpoint, config, maximum_context=CONTEXT, prefill_length=PREFILL)
    assert sentence in str(error.value)


def staged(folder: Path, maximum_context: int | None = CONTEXT) -> StagedModel:
    """The checkpoint's stages, through the table of families."""
    return stage_model(open_checkpoint(folder), maximum_context=maximum_context)


def test_the_stages_are_those_of_autoregressive_decoding(tmp_path: Path) -> None:
    reference = random_model(PHONE | {"eos_token_id": 5, "final_logit_softcapping": 2.0})
    reference.save_pretrained(tmp_path)
    generation = {"do_sample": True, "top_k": 64, "top_p": 0.95, "eos_token_id": [1, 5]}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    model = staged(tmp_path)
    assert (model.style, model.info.family, model.info.canvas_length) == (
        "autoregressive",
        "gemma4",
        1,
    )
    assert model.sampler.settings == {"temperature": 1.0, "top_p": 0.95, "top_k": 64}
    assert model.special_tokens.eos == (1, 5)
    assert model.decoding is not None and model.decoding.prefill_length == CONTEXT
    layers, head = model.stages
    assert layers.dynamic == {"tokens": {1: "tokens"}}
    assert head.dynamic == {"hidden": {1: "tokens"}}
    tokens = torch.randint(0, VOCABULARY, (1, 9))
    with torch.no_grad():
        expected = reference(input_ids=tokens).logits[0, -1].log_softmax(-1)
        hidden = layers.module(tokens, torch.tensor([0]), torch.tensor([1]))
        greedy = (torch.tensor([8]), torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.5]))
        token, log_prob, _ = head.module(hidden, *greedy)
    assert token.item() == expected.argmax().item()
    assert abs(log_prob.item() - expected.amax().item()) <= LOGIT_TOLERANCE  # the cap is in


@pytest.mark.parametrize("context", [0, 4097])
def test_a_context_that_cannot_be_is_refused(context: int, tmp_path: Path) -> None:
    random_model(LARGE).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"maximum context {context} "):
        staged(tmp_path, context)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"eos_token_id": "x"}, "eos_token_id"), ({"do_sample": True, "top_p": 7.0}, "top_p")],
)
def test_generation_defaults_that_cannot_be_used_are_refused(
    change: dict, sentence: str, tmp_path: Path
) -> None:
    random_model(LARGE).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(change))
    with pytest.raises(CheckpointError, match=sentence):
        staged(tmp_path)
