"""The trainer restates the architecture exactly, resumes exactly, and writes a loadable folder."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from export.host.puzzles import KINDS, generate
from quantize.errors import UserError
from scripts.training import demo_network, loop, puzzle_text, rounding, train_demo
from scripts.training.optimizer import Recipe
from tests.support.stopping_reporter import StoppingReporter


@pytest.fixture(scope="module")
def tokenizer():
    return puzzle_text.build_tokenizer()


def test_the_forward_pass_equals_transformers_on_every_puzzle_kind():
    # fp32 sums in another order (dense experts, fused projections): a few 1e-6 on logits of 30.
    assert demo_network.check_against_transformers(demo_network.initial_weights(3)) < 1e-4


def test_prompts_are_rendered_exactly_as_the_chat_template_does(tmp_path):
    from transformers import AutoTokenizer

    puzzle_text.write_companions(tmp_path)
    shipped = AutoTokenizer.from_pretrained(tmp_path)
    for kind in KINDS:
        prompt = generate(kind, 1, seed=1)[0].prompt
        messages = [{"role": "user", "content": prompt}]
        text = shipped.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert text == puzzle_text.render(prompt)


def test_known_words_are_one_token_and_unknown_characters_do_not_vanish(tokenizer):
    assert tokenizer.get_vocab_size() == 64
    assert tokenizer.encode("sort 90").tokens == ["sort", " ", "9", "0"]
    assert tokenizer.encode("so é").tokens == ["s", "o", " ", "<unk>"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_fits_the_canvas_and_survives_decoding(kind, tokenizer):
    puzzles = generate(kind, 50, seed=2)
    prompts, lengths, clean = puzzle_text.tensors(puzzles, tokenizer)
    assert lengths.max() <= puzzle_text.PROMPT_LENGTH == prompts.shape[1]
    assert tokenizer.decode_batch(clean.tolist()) == [puzzle.answer for puzzle in puzzles]
    assert (clean == puzzle_text.TURN_END).sum(1).eq(1).all()


def test_all_prompts_of_a_kind_have_one_length(tokenizer):
    for kind in KINDS:
        _, lengths, _ = puzzle_text.tensors(generate(kind, 50, seed=3), tokenizer)
        assert lengths.unique().numel() == 1


def test_a_batch_depends_on_seed_and_step_only(tokenizer):
    first, again = (train_demo.training_batch(5, 7, tokenizer) for _ in range(2))
    other = train_demo.training_batch(5, 8, tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_corruption_keeps_some_canvases_whole_in_part_and_drowns_others(tokenizer):
    _, _, noisy, clean, temperature = train_demo.training_batch(0, 0, tokenizer)
    kept = (noisy == clean).float().mean(1)
    drowned = temperature > 0.7999  # noise level 1
    assert 0.25 < drowned.float().mean() < 0.55
    # A uniform token hits the clean one by chance one time in 64.
    assert kept[drowned].mean() < 0.05
    assert kept[~drowned].mean() > 0.4


def test_fake_int4_is_torchaos_symmetric_grouped_rounding():
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    layer = torch.nn.Linear(128, 64, bias=False)
    weight = layer.weight.detach().clone()
    quantize_(
        layer,
        IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=PerGroup(32), scale_dtype=torch.bfloat16
        ),
    )
    ours = rounding.fake_int(weight, 4, 32)
    step = weight.unflatten(-1, (-1, 32)).abs().amax() / 7.5
    # The scale is rounded to bf16 before or after dividing by it, so a few values near a tie round
    # the other way. An unrelated rounding would be 0.25 steps off on average.
    assert (ours - layer.weight.dequantize()).abs().mean() < 0.03 * step


def test_fake_quantization_lets_gradients_through_unchanged():
    weight = torch.randn(4, 64, requires_grad=True)
    rounding.fake_int(weight, 4, 32).sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch):
    monkeypatch.setattr(puzzle_text, "ROWS_PER_STEP", {"sudoku": 4, "add": 4, "sort": 4})
    monkeypatch.setattr(train_demo, "STEPS_PER_SNAPSHOT", 2)

    def run(folder, stop_after, resume):
        recipe = Recipe(steps=6, warmup_steps=2)
        reporter = StoppingReporter(stop_after, KeyboardInterrupt)
        return train_demo.train(recipe, folder, reporter, resume=resume, compiled=False)

    whole, figures = run(tmp_path / "whole", None, False)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", 5, False)
    resumed, _ = run(tmp_path / "broken", None, True)
    assert figures["steps"] == 6
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_a_run_is_not_resumed_with_another_seed(tmp_path):
    torch.save({"recipe": {"seed": 1}}, tmp_path / loop.STATE_FILE)
    with pytest.raises(UserError, match="seed 1, not 2"):
        train_demo.train(Recipe(seed=2), tmp_path, StoppingReporter(), resume=True, compiled=False)


def test_an_earlier_run_is_not_overwritten_without_being_asked(tmp_path, monkeypatch, capsys):
    (tmp_path / "m.training").mkdir()
    (tmp_path / "m.training" / loop.STATE_FILE).touch()
    monkeypatch.setattr("sys.argv", ["train_demo", str(tmp_path / "m")])
    assert train_demo.main() == 2
    assert "--resume" in capsys.readouterr().err


def test_int8_activations_are_torchaos_per_token_rounding():
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    x = torch.randn(16, 64) * 3 + 1
    scale, zero = choose_qparams_affine(x, MappingType.ASYMMETRIC, (1, 64), torch.int8)
    levels = quantize_affine(x, (1, 64), scale, zero, torch.int8)
    theirs = dequantize_affine(levels, (1, 64), scale, zero, torch.int8)
    # The same rule and the same fp32 arithmetic; only the order of two roundings differs.
    assert (rounding.fake_int8_per_token(x) - theirs).abs().max() < 0.51 * scale.max()


def test_the_shipped_checkpoint_solves_held_out_puzzles():
    """The claim of the model card, on a sample small enough for every run of the tests."""
    from safetensors.torch import load_file

    folder = Path(train_demo.__file__).parents[1] / "demo_model"
    stored = load_file(folder / "model.safetensors")
    names = demo_network.initial_weights(0)
    weights = {name: stored[demo_network.hf_name(name)].float() for name in names}
    for int4 in (False, True):
        results = train_demo.evaluate(weights, 40, int4=int4)
        assert all(result["exact"] >= 38 for result in results.values()), (int4, results)


def test_the_written_folder_loads_in_transformers_with_the_trained_weights(tmp_path):
    from transformers import DiffusionGemmaForBlockDiffusion

    weights = demo_network.initial_weights(1)
    weights["encoder.layers.0.layer_scalar"] = torch.tensor([0.75])
    train_demo.save_model(tmp_path / "model", weights)
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path / "model", dtype=torch.float32)
    state = model.state_dict()
    for name, value in weights.items():
        assert torch.equal(state[demo_network.hf_name(name)], value.bfloat16().float()), name
    assert model.generation_config.eos_token_id == [puzzle_text.EOS, puzzle_text.TURN_END]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["text_config"]["num_experts"] == 8
    assert not (tmp_path / "model.partial").exists()
