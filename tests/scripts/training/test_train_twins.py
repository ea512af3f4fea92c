"""Training of the two models that differ in how they generate. CPU only, a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from export.host.eager import eager_engine
from export.models import stage_model
from quantize.checkpoint import open_checkpoint
from scripts.training import train_twins
from scripts.training.optimizer import Recipe
from scripts.training.puzzle_text import PAD, TURN_END, build_tokenizer
from scripts.training.train_twins import BLOCK, LENGTH, MASK, Kind
from tests.support.stopping_reporter import StoppingReporter

ROWS = 0.02


@pytest.fixture(scope="module")
def model():
    built = train_twins.build_model(0)
    with torch.no_grad():
        for value in built.parameters():
            value.copy_(value.to(torch.bfloat16))  # as a saved one is
    return built


@pytest.mark.slow
@pytest.mark.parametrize("kind", train_twins.KINDS_OF_MODEL)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(kind: Kind, tmp_path: Path) -> None:
    recipe = Recipe(steps=3, int4_from=0.5)
    whole, figures = train_twins.train(
        kind, recipe, tmp_path / "whole", StoppingReporter(), scale=ROWS
    )

    patch = pytest.MonkeyPatch()
    patch.setattr(train_twins, "STEPS_PER_SNAPSHOT", 1)
    with pytest.raises(KeyboardInterrupt):
        stopping = StoppingReporter(2, KeyboardInterrupt)
        train_twins.train(kind, recipe, tmp_path / "cut", stopping, scale=ROWS)
    patch.undo()
    resumed, again = train_twins.train(
        kind, recipe, tmp_path / "cut", StoppingReporter(), scale=ROWS, resume=True
    )
    assert again["training_tokens"] == figures["training_tokens"] > 0
    for (name, one), (_, other) in zip(
        whole.named_parameters(), resumed.named_parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


def test_both_kinds_have_one_shape_and_are_opened_by_the_exporter(model, tmp_path: Path) -> None:
    sessions = {}
    for kind in train_twins.KINDS_OF_MODEL:
        folder = tmp_path / kind
        train_twins.save_model(folder, kind, model)
        assert sum(file.stat().st_size for file in folder.iterdir()) < 8 * 2**20
        staged = stage_model(open_checkpoint(folder), maximum_context=LENGTH + BLOCK)
        sessions[kind] = eager_engine(staged).session()
        assert staged.style.startswith(kind)
    shapes = [
        {
            n: open_checkpoint(tmp_path / kind).shape(n)
            for n in open_checkpoint(tmp_path / kind).names()
        }
        for kind in train_twins.KINDS_OF_MODEL
    ]
    assert shapes[0] == shapes[1]
    for session in sessions.values():
        assert len(session.generate([2, 7, 9], 5).tokens) > 0


def test_the_training_pass_of_a_noisy_block_is_a_denoising_step_over_its_cache(
    model, tmp_path: Path
) -> None:
    """What the training's mask lets a noisy block see is what the loop's layers let it see."""
    tokens, _, _ = train_twins.rows_of(0, 0, build_tokenizer(), ROWS)
    tokens, first, block = tokens[:1, :LENGTH], 2, 3
    live = slice(block * BLOCK, (block + 1) * BLOCK)
    noisy = tokens.clone()
    noisy[:, live] = MASK
    with torch.no_grad():
        inputs = train_twins.two_copies(tokens, noisy[:, first * BLOCK :], first)
        logits = model(**inputs).logits[0, -LENGTH + first * BLOCK :]
    logits = logits[(block - first) * BLOCK :][:BLOCK]
    folder = tmp_path / "masked"
    train_twins.save_model(folder, "masked", model)
    saved = open_checkpoint(folder)
    staged = stage_model(saved, maximum_context=LENGTH)
    layers = staged.stages[0].module
    with torch.no_grad():
        start, b = torch.tensor([0]), torch.tensor([BLOCK])
        layers(tokens[:, : live.start], start, b)
        hidden = layers(noisy[:, live], torch.tensor([live.start]), b)
    ours = hidden[0] @ saved.get("model.embed_tokens.weight").T
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-4)


def test_only_the_answer_counts() -> None:
    tokens, lengths, ends = train_twins.rows_of(1, 5, build_tokenizer(), 0.05)
    for row, length, end in zip(tokens.tolist(), lengths.tolist(), ends.tolist(), strict=True):
        assert row[end - 1] == TURN_END and set(row[end:]) <= {PAD}
        assert TURN_END not in row[length : end - 1]


SHIPPED = Path(train_twins.__file__).parents[1] / "twin_models"


@pytest.mark.parametrize("kind", train_twins.KINDS_OF_MODEL)
def test_the_shipped_twins_solve_held_out_puzzles(kind: Kind) -> None:
    """At least 27 of 30, far above what an untrained or badly read model does (0)."""
    assert train_twins.evaluate(SHIPPED / kind, 10)["all"] in {f"{n}/30" for n in (27, 28, 29, 30)}


def test_the_shipped_twins_differ_in_their_weights_values_and_in_nothing_of_their_shape() -> None:
    one, other = (open_checkpoint(SHIPPED / kind) for kind in train_twins.KINDS_OF_MODEL)
    assert {n: one.shape(n) for n in one.names()} == {n: other.shape(n) for n in other.names()}
    for kind in train_twins.KINDS_OF_MODEL:
        files = list((SHIPPED / kind).iterdir())
        assert sum(file.stat().st_size for file in files) < 8 * 2**20
        written = json.loads((SHIPPED / kind / "config.json").read_text())
        assert written == train_twins.model_config(kind) | {"torch_dtype": "bfloat16"}
    tokenizers = [(SHIPPED / k / "tokenizer.json").read_bytes() for k in train_twins.KINDS_OF_MODEL]
    assert tokenizers[0] == tokenizers[1]
