"""HRM-Text's stages against transformers in fp32, and lowered: CPU only, tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchao.quantization import IntxUnpackedToInt8Tensor
from transformers import HrmTextForCausalLM

from export.backends import lower_stage
from export.contract.manifest import Call
from export.host.eager import eager_engine, eager_stages
from export.host.stages import LoadedStages
from export.models import stage_model
from export.models.staging import StagedModel, StageModule
from quantize.checkpoint import Checkpoint, open_checkpoint
from quantize.errors import CheckpointError
from quantize.quantizer import quantize_checkpoint
from quantize.recipe import Recipe, Rule, Scheme, preset
from tests.support.clear_choices import greedy as greedy_tokens
from tests.support.hrm_text_models import CASES, TINY, random_model

# fp32 reassociation over 8 runs of 2 layers stays near 5e-6 on normed states of scale 1 to 3.
TOLERANCE = 1e-4
CONTEXT, PROMPT = 48, 19


def save(model: HrmTextForCausalLM, folder: Path, **options: object) -> Checkpoint:
    model.save_pretrained(folder, **options)
    return open_checkpoint(folder)


def stage(checkpoint: Checkpoint, maximum_context: int = CONTEXT) -> StagedModel:
    return stage_model(checkpoint, maximum_context=maximum_context)


def run(stages: LoadedStages, tokens: Tensor, start: int, block_length: int) -> Tensor:
    return stages.layers(
        {
            "tokens": tokens,
            "start": torch.tensor([start]),
            "block_length": torch.tensor([block_length]),
        }
    )


def greedy(stages: LoadedStages, hidden: Tensor, row: int) -> dict[str, Tensor]:
    return stages.head(
        {
            "hidden": hidden,
            "row": torch.tensor([row]),
            "settings": torch.tensor([0.0, 1.0, 0.0]),
            "uniform": torch.tensor([0.5]),
        }
    )


def reference_states(model: HrmTextForCausalLM, pieces: list[Tensor], is_prefix: bool) -> Tensor:
    """Hidden states of pieces run one after the other through transformers' cache."""
    cache, states = None, []
    with torch.no_grad():
        for piece in pieces:
            first = cache is None
            output = model.model(
                input_ids=piece,
                token_type_ids=torch.ones_like(piece) if is_prefix and first else None,
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            states.append(output.last_hidden_state)
    return torch.cat(states, dim=1)


def prompt_and_answer(seed: int = 5) -> list[Tensor]:
    """A prompt, then single tokens, then three at once (a second turn)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (PROMPT, 1, 1, 1, 3, 1)
    return [torch.randint(0, TINY["vocab_size"], (1, n), generator=generator) for n in lengths]


def our_states(stages: LoadedStages, pieces: list[Tensor], is_prefix: bool) -> Tensor:
    start, states = 0, []
    for piece in pieces:
        states.append(run(stages, piece, start, CONTEXT if is_prefix and start == 0 else 1))
        start += piece.shape[1]
    return torch.cat(states, dim=1)


@pytest.mark.parametrize("case", CASES)
def test_states_and_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    reference = random_model(seed=3, **CASES[case])
    staged = stage(save(reference, tmp_path / "hf"))
    is_prefix = reference.config.prefix_lm
    assert staged.decoding.bidirectional_prompt == is_prefix
    pieces = prompt_and_answer()
    expected = reference_states(reference, pieces, is_prefix)
    stages = eager_stages(staged)
    ours = our_states(stages, pieces, is_prefix)
    assert (ours - expected).abs().max().item() <= TOLERANCE
    with torch.no_grad():
        logits = [reference.lm_head(states) for states in (ours, expected)]
    assert (logits[0] - logits[1]).abs().max().item() <= TOLERANCE
    for row in (0, PROMPT - 1, ours.shape[1] - 1):
        found = greedy(stages, ours, row)
        log_probs = torch.log_softmax(logits[1][0, row], dim=-1)
        assert found["token"].item() == log_probs.argmax().item()
        assert found["log_prob"].item() == pytest.approx(log_probs.max().item(), abs=TOLERANCE)


def test_prompt_mask_makes_a_difference(tmp_path: Path) -> None:
    """Otherwise the parity of the bidirectional prompt would say nothing."""
    reference = random_model(seed=3)
    stages = eager_stages(stage(save(reference, tmp_path / "hf")))
    pieces = prompt_and_answer()
    causal = our_states(stages, pieces, is_prefix=False)
    assert (causal - reference_states(reference, pieces, False)).abs().max() <= TOLERANCE
    assert (causal - our_states(stages, pieces, is_prefix=True)).abs().max() > 0.1


def test_a_causal_prompt_may_come_in_pieces(tmp_path: Path) -> None:
    reference = random_model(seed=4, prefix_lm=False)
    stages = eager_stages(stage(save(reference, tmp_path / "hf")))
    tokens = torch.cat(prompt_and_answer(), dim=1)
    whole = our_states(stages, [tokens], is_prefix=False)
    pieces = list(tokens.split(4, dim=1))
    assert (our_states(stages, pieces, is_prefix=False) - whole).abs().max() <= TOLERANCE


@pytest.mark.parametrize("case", ["released_cycles", "causal_prompt", "heads_wider_than_hidden"])
def test_greedy_generation_is_token_for_token_that_of_transformers(
    case: str, tmp_path: Path
) -> None:
    reference = random_model(seed=7, **CASES[case])
    session = eager_engine(stage(save(reference, tmp_path / "hf"))).session()
    prompt = prompt_and_answer(seed=9)[0]
    prefix = {"token_type_ids": torch.ones_like(prompt)} if reference.config.prefix_lm else {}
    expected = greedy_tokens(reference, prompt, 24, **prefix)
    result = session.generate(prompt[0].tolist(), max_new_tokens=24, seed=0)
    assert list(result.tokens) == expected
    assert len(set(result.tokens)) > 4  # not one token over and over


def test_every_weight_changes_the_result(tmp_path: Path) -> None:
    checkpoint = save(random_model(seed=1), tmp_path / "hf")
    staged = stage(checkpoint)
    stages = eager_stages(staged)
    pieces = prompt_and_answer()
    before = our_states(stages, pieces, True)
    for stage_module in staged.stages[:-1]:
        for name, parameter in stage_module.module.named_parameters():
            saved = parameter.clone()
            with torch.no_grad():
                parameter.add_(0.1 * torch.rand_like(parameter))
                changed = (our_states(stages, pieces, True) - before).abs().max().item()
                parameter.copy_(saved)
            assert changed > 1e-3, (stage_module.name, name)


def test_weights_load_by_fused_and_by_separate_names(tmp_path: Path) -> None:
    """Equal but for rounding: a fused product is cut into other tiles than separate ones, and so
    adds in another order on some processors."""
    reference = random_model(seed=2)
    fused = save(reference, tmp_path / "fused")
    apart = save(reference, tmp_path / "apart", save_original_format=False)
    assert any("gqkv_proj" in name for name in fused.names())
    assert not any("gqkv_proj" in name for name in apart.names())
    one, other = (
        our_states(eager_stages(stage(c)), prompt_and_answer(), True) for c in (fused, apart)
    )
    assert (one - other).abs().max() <= TOLERANCE


def test_config_without_layers_per_stack_means_those_of_one_stack(tmp_path: Path) -> None:
    """As transformers reads it: `num_layers_per_stack` is only in configs that it wrote."""
    reference = random_model(seed=2)
    checkpoint = save(reference, tmp_path / "hf")
    pieces = prompt_and_answer()
    expected = our_states(eager_stages(stage(checkpoint)), pieces, True)
    assert checkpoint.config["num_hidden_layers"] == 16
    del checkpoint.config["num_layers_per_stack"]
    checkpoint.config |= {"num_hidden_layers": 2, "embedding_scale": None}
    assert torch.equal(our_states(eager_stages(stage(checkpoint)), pieces, True), expected)


def test_schedule_and_cache_are_of_as_many_runs_as_a_pass_has(tmp_path: Path) -> None:
    staged = stage(save(random_model(H_cycles=2, L_cycles=3), tmp_path / "hf"))
    low = [Call("low", constants={"slot": slot}) for slot in range(6)]
    assert staged.schedule == (
        Call("embed"),
        *low[:3],
        Call("high", constants={"slot": 0}),
        *low[3:],
        Call("high", outputs={"high": "hidden"}, constants={"slot": 1}),
    )
    caches = sum(
        buffer.numel() * buffer.element_size()
        for stage_module in staged.stages
        for name, buffer in stage_module.module.named_buffers()
        if name.endswith("_cache")
    )
    slots, layers, heads, head_dim = 8, 2, 2, 16
    assert caches == slots * layers * 2 * heads * head_dim * 4 * CONTEXT
    assert any(f" {caches} bytes" in note for note in staged.notes)


def test_defaults_of_generation_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    save(random_model(), folder)
    assert stage(open_checkpoint(folder)).sampler.settings["temperature"] == 0.0
    stated = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "eos_token_id": [3, 4]}
    (folder / "generation_config.json").write_text(json.dumps(stated))
    staged = stage(open_checkpoint(folder))
    assert staged.sampler.settings == {"temperature": 0.7, "top_p": 0.9, "top_k": 0}
    assert staged.special_tokens.eos == (3, 4)


def test_int4_is_near_the_model_of_its_rounded_weights(tmp_path: Path) -> None:
    """What is left between them are the int8 activations, about 1 % a product."""
    reference = random_model(seed=6, hidden_size=64, intermediate_size=96, head_dim=32)
    save(reference, tmp_path / "hf")
    attention = Rule(("*.gqkv_proj.weight",), Scheme(smaller_groups=True))
    recipe = Recipe("int4", (attention, *preset().rules))
    quantize_checkpoint(tmp_path / "hf", tmp_path / "int4", recipe)
    checkpoint = open_checkpoint(tmp_path / "int4")
    staged = stage(checkpoint)
    for stack in staged.stages[1:3]:
        for name, parameter in stack.module.named_parameters():
            assert isinstance(parameter, IntxUnpackedToInt8Tensor), name
            assert parameter.activation_quantization == "int8_asym_per_token", name
    rounded = {}
    for name in checkpoint.names():
        weight = checkpoint.get(name)
        is_plain = not isinstance(weight, IntxUnpackedToInt8Tensor)
        rounded[name] = weight if is_plain else weight.dequantize()
    write_weights(tmp_path / "hf", rounded)
    pieces = prompt_and_answer()
    expected = our_states(eager_stages(stage(open_checkpoint(tmp_path / "hf"))), pieces, True)
    original = reference_states(reference, pieces, True)
    ours = our_states(eager_stages(staged), pieces, True)
    error = (ours - expected).pow(2).mean().sqrt().item()  # the states' root mean square is 1
    assert 0 < error < 0.1
    assert error < (ours - original).pow(2).mean().sqrt().item()
    session = eager_engine(staged).session()
    result = session.generate(pieces[0][0].tolist(), max_new_tokens=8, seed=0)
    assert len(result.tokens) == 8


def write_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({name: weight.contiguous() for name, weight in weights.items()},
              folder / "model.safetensors")  # fmt: skip


def load_program(path: Path):
    """A .pte as a function of tensors, loaded as export/host/bundle_engine.py does."""
    import executorch.kernels.quantized  # noqa: F401
    from executorch.extension.pybindings import _C

    program = _C._load_program(
        str(path), program_verification=_C.Verification.InternalConsistency, data_path=None
    )
    method = program.load_method("forward")
    return lambda *inputs, _keep_alive=program: method(list(inputs))[0]


@pytest.mark.slow
def test_lowered_stacks_equal_eager_ones_at_every_length(tmp_path: Path) -> None:
    """And weights are in a program once: the stacks differ only in how often they run."""
    reference = random_model(seed=8, num_hidden_layers=1)
    staged = stage(save(reference, tmp_path / "hf"), maximum_context=32)
    sizes = []
    for stage_module, slots in ((staged.stages[1], 6), (staged.stages[2], 2)):
        path = tmp_path / f"{stage_module.name}.pte"
        lower_stage(stage_module, "xnnpack").write(path)
        sizes.append(path.stat().st_size)
        assert differences(stage_module, load_program(path), slots) <= 1e-5
    weights = sum(p.numel() * 4 for p in staged.stages[1].module.parameters())
    assert sizes[0] >= weights
    assert abs(sizes[0] - sizes[1]) < weights / 10  # caches are not in the file either


def differences(stage_module: StageModule, program, slots: int) -> float:
    """The largest, over a prompt and decoding in the first and the last slot by turns."""
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    steps = [(0, 13, 32), (13, 1, 1), (14, 1, 1), (15, 5, 1), (0, 32, 32), (31, 1, 1)]
    for start, length, block_length in steps:
        for slot in (0, slots - 1):
            states = [
                torch.randn(1, length, TINY["hidden_size"], generator=generator) for _ in range(2)
            ]
            inputs = [*states, *(torch.tensor([n]) for n in (slot, start, block_length))]
            with torch.no_grad():
                expected = stage_module.module(*inputs)
            worst = max(worst, (program(*inputs) - expected).abs().max().item())
    return worst


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "hrm"}, "model_type 'hrm'"),
        ({"hidden_size": None}, "hidden_size = None"),
        ({"hidden_size": 64}, "does not fit config.json"),
        ({"vocab_size": 96}, "does not fit config.json"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"head_dim": 15}, "head_dim = 15"),
        ({"H_cycles": 0}, "H_cycles = 0"),
        ({"L_cycles": "3"}, "L_cycles = '3'"),
        ({"L_cycles": 4}, "num_hidden_layers = 16"),
        ({"num_hidden_layers": 2}, "num_hidden_layers = 2"),
        ({"num_layers_per_stack": 3, "num_hidden_layers": 24}, "layers.2"),
        ({"H_cycles": 10**7, "num_layers_per_stack": None}, "KV cache"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"embedding_scale": None, "initializer_range": 0}, "initializer_range"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn'"),
        ({"rope_parameters": None}, "rope_theta = None"),
        ({"max_position_embeddings": 40}, "maximum context 48"),
        ({"eos_token_id": "end"}, "'end'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_one_sentence(
    change: dict, sentence: str, tmp_path: Path
) -> None:
    checkpoint = save(random_model(), tmp_path / "hf")
    checkpoint.config |= change
    with pytest.raises(CheckpointError) as error:
        stage(checkpoint)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    checkpoint = save(random_model(), tmp_path / "hf")
    missing = "model.L_module.layers.1.attn.gqkv_proj.weight"
    write_weights(
        tmp_path / "hf", {n: checkpoint.get(n) for n in checkpoint.names() if n != missing}
    )
    with pytest.raises(CheckpointError, match=missing):
        stage(open_checkpoint(tmp_path / "hf"), maximum_context=8)
