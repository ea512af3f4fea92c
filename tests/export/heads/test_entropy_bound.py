"""The sampler's decisions against transformers' own classes. CPU only, no model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
    LinearTemperatureScheduleLogitsProcessor,
    StableAndConfidentStoppingCriteria,
)

from export.contract.styles.uniform_diffusion import UniformDiffusionSettings
from export.heads.samplers import entropy_bound


def settings_tensor(**chosen: float) -> torch.Tensor:
    """The head's input as the host makes it."""
    return torch.from_numpy(UniformDiffusionSettings(**chosen).as_array())


def _reference_acceptance(logits: torch.Tensor, bound: float) -> torch.Tensor:
    sampler = EntropyBoundSampler(
        EntropyBoundSamplerConfig(entropy_bound=bound), logits.shape[1], logits.shape[2], 1
    )
    zeros = torch.zeros(logits.shape[:2], dtype=torch.int64)
    return sampler.accept_canvas(zeros, zeros + 1, logits, 1).bool()


@pytest.mark.parametrize("seed", range(20))
def test_accepts_the_same_positions_as_transformers(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.rand(1, 40, 1, generator=generator) * 12
    logits = torch.randn(1, 40, 50, generator=generator) * sharpness
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    bound = float(torch.rand(1, generator=generator)) * 3 + 0.01
    got = entropy_bound.accept(entropy, torch.tensor([bound]))
    # The sums are taken in another order: a sum within 1e-5 of the bound may fall either way.
    ordered, _ = torch.sort(entropy.double())
    if ((ordered.cumsum(1) - ordered - bound).abs() > 1e-5).all():
        assert torch.equal(got, _reference_acceptance(logits, bound))


entropies = st.lists(st.floats(0, 5, width=32), min_size=1, max_size=24)


@given(values=entropies, bound=st.floats(0.015625, 4, width=32))
@settings(max_examples=60, deadline=None)
def test_what_is_accepted_is_a_prefix_of_the_order_within_the_bound(
    values: list[float], bound: float
) -> None:
    entropy = torch.tensor([values])
    accepted = entropy_bound.accept(entropy, torch.tensor([bound]))[0].tolist()
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    flags = [accepted[i] for i in order]
    assert flags[0], "the position of least entropy is always accepted"
    assert flags == sorted(flags, reverse=True), "no position is skipped"
    kept = [values[i] for i in order if accepted[i]]
    assert sum(kept) - max(kept) <= bound + 1e-4  # fp32 sums of at most 24 values below 5


def test_ties_go_to_the_lower_position() -> None:
    entropy = torch.full((1, 5), 0.5)
    accepted = entropy_bound.accept(entropy, torch.tensor([1.0]))
    assert accepted.tolist() == [[True, True, True, False, False]]


@pytest.mark.parametrize("step", [1, 17, 48])
def test_temperature_follows_the_steps_that_remain(step: int) -> None:
    chosen = settings_tensor(max_steps=48, t_min=0.3, t_max=0.9)
    processor = LinearTemperatureScheduleLogitsProcessor(0.3, 0.9, 48)
    got = entropy_bound.temperature(chosen, torch.tensor([step]))
    expected = 1 / processor(None, torch.ones(1), cur_step=step)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)  # a few fp32 roundings


@pytest.mark.parametrize("threshold", [0, 1, 2, 3])
def test_stops_at_the_same_step_as_transformers(threshold: int) -> None:
    """Six argmax canvases: A B B B C C, first with doubtful, then with confident entropies."""
    canvases = [torch.full((1, 4), token) for token in (1, 2, 2, 2, 3, 3)]
    for sharpness in (0.1, 30.0):
        stopper = StableAndConfidentStoppingCriteria(threshold, 0.005)
        previous, stable = torch.full((1, 4), -1), torch.zeros(1, dtype=torch.int64)
        chosen = settings_tensor(stability_threshold=threshold)
        for canvas in canvases:
            logits = torch.nn.functional.one_hot(canvas, 6).float() * sharpness
            entropy = torch.distributions.Categorical(logits=logits).entropy()
            decision = entropy_bound.decide(
                canvas, canvas, entropy, previous, stable, chosen, torch.zeros_like(canvas)
            )
            expected = bool(stopper(canvas, logits))
            assert bool(decision.finished) == expected
            previous, stable = canvas, decision.stable_steps


def test_what_is_not_accepted_becomes_a_random_token() -> None:
    entropy = torch.tensor([[3.0, 0.0, 2.0]])
    decision = entropy_bound.decide(
        sample=torch.tensor([[10, 11, 12]]),
        argmax=torch.tensor([[10, 11, 12]]),
        entropy=entropy,
        previous_argmax=torch.full((1, 3), -1),
        stable_steps=torch.tensor([4]),
        settings=settings_tensor(entropy_bound=0.5),
        random_tokens=torch.tensor([[90, 91, 92]]),
    )
    # 0.0 is first, 2.0 follows it with nothing before it, 3.0 has 2.0 before it: over the bound.
    assert decision.accepted.tolist() == [[0, 1, 1]]
    assert decision.next_canvas.tolist() == [[90, 11, 12]]
    assert decision.stable_steps.tolist() == [0], "the argmax canvas changed"


def test_settings_are_in_the_order_of_the_host() -> None:
    assert UniformDiffusionSettings.array_fields() == entropy_bound.SETTINGS
