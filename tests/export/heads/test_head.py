"""The chunked head against plain full-vocabulary formulas. CPU only, no model."""

import math

import pytest
import torch
from scipy import stats
from torchao.quantization import IntxUnpackedToInt8Tensor

from export.backends import lower_stage
from export.contract.styles.uniform_diffusion import UniformDiffusionSettings
from export.heads.uniform_diffusion import DiffusionHead
from export.models.head_stages import uniform_diffusion_head_stage

HIDDEN = 32


def _table(vocabulary: int, generator: torch.Generator, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(vocabulary, HIDDEN, generator=generator) * scale


def _quantized(table: torch.Tensor, bits: int) -> IntxUnpackedToInt8Tensor:
    """As `quantize` stores them: int8 per row, or int4 in groups of 32 with bf16 scales."""
    if bits == 8:
        return IntxUnpackedToInt8Tensor.from_hp(table, (1, HIDDEN), torch.int8)
    four = IntxUnpackedToInt8Tensor.from_hp(table, (1, 32), torch.int4)
    return IntxUnpackedToInt8Tensor(
        qdata=four.qdata,
        scale=four.scale.to(torch.bfloat16),
        zero_point=four.zero_point,
        target_dtype=torch.int4,
        block_size=(1, 32),
        dtype=torch.float32,
        activation_quantization=None,
    )


def _inputs(
    positions: int,
    vocabulary: int,
    generator: torch.Generator,
    settings: UniformDiffusionSettings | None = None,
    step: int = 20,
) -> tuple[torch.Tensor, ...]:
    def tokens() -> torch.Tensor:
        return torch.randint(vocabulary, (1, positions), generator=generator)

    sharpness = torch.rand(1, positions, 1, generator=generator) * 3
    return (
        torch.randn(1, positions, HIDDEN, generator=generator) * sharpness,
        tokens(),
        tokens(),
        torch.tensor([1]),
        torch.tensor([step]),
        torch.from_numpy((settings or UniformDiffusionSettings()).as_array()),
        torch.rand(1, positions, generator=generator),
        tokens(),
        tokens(),
    )


class _Reference:
    """The same decision from a full canvas of logits, in float64, with sort and cumsum."""

    def __init__(self, table: torch.Tensor, soft_cap: float | None, inputs: tuple) -> None:
        hidden, _, previous, stable, step, settings, uniform, random_tokens, targets = inputs
        steps, t_min, t_max, bound, threshold, confidence = settings.double().tolist()
        logits = hidden[0].double() @ table.double().t()
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        logits = logits / (t_min + (t_max - t_min) * step.item() / steps)
        self.logits = logits
        self.probabilities = torch.softmax(logits, dim=1)
        distribution = torch.distributions.Categorical(logits=logits)
        self.entropy = distribution.entropy()
        self.argmax = logits.argmax(dim=1)
        cumulative = self.probabilities.cumsum(dim=1)
        self.sample = (cumulative <= uniform.double().t()).sum(dim=1).clamp(max=len(table) - 1)
        self.edge = (cumulative - uniform.double().t()).abs().amin(dim=1)
        ordered, order = torch.sort(self.entropy, stable=True)
        self.margin = (ordered.cumsum(0) - ordered - bound).abs().amin()
        self.accepted = torch.zeros(len(order), dtype=torch.bool)
        self.accepted[order] = ordered.cumsum(0) - ordered <= bound
        self.next_canvas = torch.where(self.accepted, self.sample, random_tokens[0])
        self.target_log_prob = torch.log_softmax(logits, 1).gather(1, targets.t())[:, 0]
        self.signal = self.probabilities @ table.double() * math.sqrt(table.shape[1])
        unchanged = torch.equal(self.argmax, previous[0])
        self.stable_steps = stable.item() + 1 if unchanged else 0
        self.finished = self.stable_steps >= threshold and self.entropy.mean() < confidence


def _check(outputs: tuple, expected: _Reference) -> None:
    next_canvas, argmax, entropy, accepted, stable, finished, log_prob, signal = outputs
    # fp32 logits up to 75 carry an error of 75 * 2^-24 = 4.5e-6, and a few such add up.
    torch.testing.assert_close(entropy[0].double(), expected.entropy, rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(log_prob[0].double(), expected.target_log_prob, rtol=1e-5, atol=5e-5)
    scale = expected.signal.abs().amax()
    torch.testing.assert_close(signal[0].double(), expected.signal, rtol=0, atol=2e-5 * scale)
    best_two = expected.logits.topk(2, dim=1).values
    clear = best_two[:, 0] - best_two[:, 1] > 1e-5  # saturated tanh makes ties in fp32
    assert torch.equal(argmax[0][clear], expected.argmax[clear])
    chosen = expected.logits.gather(1, argmax.t())[:, 0]
    torch.testing.assert_close(chosen, best_two[:, 0], rtol=0, atol=1e-5)
    assert expected.margin > 1e-4, "a near-tie of the acceptance bound: choose another seed"
    assert torch.equal(accepted[0].bool(), expected.accepted)
    clear = expected.edge > 1e-6  # a uniform number this close to a step of the CDF may fall beside
    assert clear.float().mean() > 0.5
    assert torch.equal(next_canvas[0][clear], expected.next_canvas[clear])
    assert stable.tolist() == [expected.stable_steps]
    assert bool(finished) == bool(expected.finished)


@pytest.mark.parametrize(
    ("vocabulary", "chunk_columns", "positions", "soft_cap"),
    [
        pytest.param(64, 4096, 8, 30.0, id="one chunk of the smallest vocabulary"),
        pytest.param(64, 1, 5, 30.0, id="chunks of the smallest width"),
        pytest.param(97, 24, 3, 30.0, id="a prime vocabulary in a few chunks"),
        pytest.param(1031, 40, 16, 30.0, id="groups of chunks of which the last is short"),
        pytest.param(4099, 128, 7, 5.0, id="a low cap that most logits reach"),
        pytest.param(5003, 2000, 6, 30.0, id="wide chunks with padding"),
        pytest.param(1031, 40, 16, None, id="no cap"),
        pytest.param(262_144, 4096, 12, 30.0, id="the released vocabulary"),
    ],
)
def test_fp32_equals_the_full_vocabulary(
    vocabulary: int, chunk_columns: int, positions: int, soft_cap: float | None
) -> None:
    generator = torch.Generator().manual_seed(vocabulary + positions)
    table = _table(vocabulary, generator)
    head = DiffusionHead(
        table, soft_cap=soft_cap, canvas_length=positions, chunk_columns=chunk_columns
    )
    for step in (48, 1):
        inputs = _inputs(positions, vocabulary, generator, step=step)
        _check(head(*inputs), _Reference(table, soft_cap, inputs))


@pytest.mark.parametrize("temperature", [0.1, 0.3, 5.0])
@pytest.mark.parametrize("offset", [-0.8, 0.0, 0.8])
def test_neither_overflows_nor_vanishes_at_any_temperature(
    temperature: float, offset: float
) -> None:
    """All logits of a position near -cap, around 0, or near +cap; exponents up to 300."""
    generator = torch.Generator().manual_seed(3)
    table = _table(700, generator) * 0.3
    table[:, 0] = 1.0
    settings = UniformDiffusionSettings(t_min=temperature, t_max=temperature)
    inputs = list(_inputs(6, 700, generator, settings))
    inputs[0][..., 0] = offset * 30
    expected = _Reference(table, 30.0, tuple(inputs))
    outputs = DiffusionHead(table, soft_cap=30.0, canvas_length=6, chunk_columns=64)(*inputs)
    # The error of an exponent grows with the exponent: 30 / temperature * 2^-24, times a few.
    tolerance = 1e-5 + 30 / temperature * 5e-7
    torch.testing.assert_close(
        outputs[2][0].double(), expected.entropy, rtol=1e-4, atol=tolerance * 2
    )
    torch.testing.assert_close(
        outputs[6][0].double(), expected.target_log_prob, rtol=1e-4, atol=tolerance * 2
    )
    chosen = expected.logits.gather(1, outputs[1].t())[:, 0]
    torch.testing.assert_close(chosen, expected.logits.amax(1), rtol=0, atol=tolerance)


def test_equal_logits_resolve_to_the_first_token_and_a_uniform_draw() -> None:
    head = DiffusionHead(torch.ones(101, HIDDEN), soft_cap=30.0, canvas_length=4, chunk_columns=8)
    inputs = list(uniform_diffusion_head_stage(head, 4, HIDDEN).example_inputs)
    inputs[5] = torch.from_numpy(UniformDiffusionSettings(entropy_bound=1000.0).as_array())
    inputs[6] = torch.tensor([[0.0, 0.2525, 0.7475, 1 - 2**-24]])
    outputs = head(*inputs)
    assert outputs[1].tolist() == [[0, 0, 0, 0]]
    assert outputs[0].tolist() == [[0, 25, 75, 100]]
    torch.testing.assert_close(outputs[2], torch.full((1, 4), math.log(101)))


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_draws_follow_the_softmax(bits: int | None) -> None:
    """Chi-square of 40,000 draws of one position against float64 probabilities."""
    generator = torch.Generator().manual_seed(11)
    positions, vocabulary = 4000, 83
    table = _table(vocabulary, generator, 0.4)
    if bits:
        table = _quantized(table, bits)
    plain = table.dequantize() if bits else table
    head = DiffusionHead(
        table,
        soft_cap=30.0,
        canvas_length=positions,
        chunk_columns=10,
    )
    settings = UniformDiffusionSettings(entropy_bound=1e9)
    counts = torch.zeros(vocabulary)
    hidden = torch.randn(1, 1, HIDDEN, generator=generator)
    for _ in range(10):
        inputs = list(_inputs(positions, vocabulary, generator, settings))
        inputs[0] = hidden.expand(1, positions, HIDDEN)
        counts += torch.bincount(head(*inputs)[0][0], minlength=vocabulary)
    probabilities = _Reference(plain, 30.0, tuple(inputs)).probabilities[0]
    order = probabilities.argsort(descending=True)
    expected = (probabilities * counts.sum())[order]
    kept = int((expected >= 5).sum())  # the usual condition; the rest is pooled
    observed = torch.cat([counts[order][:kept], counts[order][kept:].sum()[None]])
    expected = torch.cat([expected[:kept], expected[kept:].sum()[None]])
    assert stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_table_differs_only_by_the_rounding_of_activations(
    bits: int,
) -> None:
    generator = torch.Generator().manual_seed(5)
    vocabulary, positions = 1031, 16
    table = _quantized(_table(vocabulary, generator, 0.3), bits)
    head = DiffusionHead(
        table,
        soft_cap=30.0,
        canvas_length=positions,
        chunk_columns=40,
    )
    inputs = _inputs(positions, vocabulary, generator)
    expected = _Reference(table.dequantize(), 30.0, inputs)
    outputs = head(*inputs)
    # 8 bits of activation: logits off by about 1 % of their spread, here below 0.3.
    assert (outputs[6][0] - expected.target_log_prob).abs().max() < 0.3
    error = (outputs[7][0] - expected.signal).norm() / expected.signal.norm()
    assert error < 0.05


def test_rows_looked_up_again_carry_the_logits_of_the_walk() -> None:
    """A draw ends among logits computed a second time: they must be those of the block sums."""
    generator = torch.Generator().manual_seed(6)
    table = _quantized(_table(512, generator, 0.3), 8)
    head = DiffusionHead(table, soft_cap=30.0, canvas_length=9, chunk_columns=64)
    hidden = torch.randn(9, HIDDEN, generator=generator) / 30
    walked = torch.stack([head.values(hidden, k) for k in range(head.chunks)], dim=2)
    tokens = torch.arange(512).expand(9, 512)
    again = head.values_of(hidden, tokens)
    # An activation at the edge of two steps may be rounded otherwise: rare, and one step at most.
    difference = (walked.reshape(9, 512) - again).abs()
    assert difference.median() < 1e-7
    assert difference.max() < 2e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"table": torch.zeros(4)}, "shape .4,."),
        ({"soft_cap": -1.0}, "soft_cap is -1.0"),
        ({"canvas_length": 0}, "canvas_length is 0"),
        ({"chunk_columns": 0}, "chunk_columns is 0"),
    ],
)
def test_a_head_without_meaning_is_refused(arguments: dict, message: str) -> None:
    defaults = {"table": torch.zeros(64, HIDDEN), "soft_cap": 30.0, "canvas_length": 4}
    with pytest.raises(ValueError, match=message):
        DiffusionHead(**{**defaults, **arguments})


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_the_lowered_head_decides_as_the_eager_one(bits: int | None, tmp_path) -> None:
    import executorch.kernels.quantized  # noqa: F401  (registers the quantized lookup)
    from executorch.runtime import Runtime

    generator = torch.Generator().manual_seed(7)
    vocabulary, positions = 150, 12
    table = _table(vocabulary, generator, 0.3)
    if bits:
        table = _quantized(table, bits)
    head = DiffusionHead(table, soft_cap=30.0, canvas_length=positions, chunk_columns=80)
    path = tmp_path / "head.pte"
    lower_stage(uniform_diffusion_head_stage(head, positions, HIDDEN), "xnnpack").write(path)
    method = Runtime.get().load_program(path).load_method("forward")
    inputs = _inputs(positions, vocabulary, generator)
    for got, expected in zip(method.execute(inputs), head(*inputs), strict=True):
        if not expected.is_floating_point():
            assert torch.equal(got, expected)
        elif bits is None:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        else:  # one activation rounded otherwise moves a logit by at most a step
            torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
