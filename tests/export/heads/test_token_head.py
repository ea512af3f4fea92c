"""The heads of autoregressive and masked decoding against plain formulas on full logits. CPU only.

The references sort, and hold everything; truncation is that of transformers.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torchao.quantization import IntxUnpackedToInt8Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from export.backends import lower_stage
from export.heads.autoregressive import AutoregressiveHead
from export.heads.masked_diffusion import MaskedHead
from export.heads.samplers import masked
from export.heads.samplers.truncation import truncate
from export.models.head_stages import autoregressive_head_stage, masked_head_stage
from export.models.staging import StageModule

HIDDEN = 32
MASK = 7


def _table(vocabulary: int, seed: int = 0, bits: int = 32) -> Tensor:
    """fp32, or as `quantize` stores them: int8 per row, int4 in groups of 32 with bf16 scales."""
    table = torch.randn(vocabulary, HIDDEN, generator=torch.Generator().manual_seed(seed)) * 0.5
    if bits == 8:
        return IntxUnpackedToInt8Tensor.from_hp(table, (1, HIDDEN), torch.int8)
    if bits == 4:
        four = IntxUnpackedToInt8Tensor.from_hp(table, (1, 32), torch.int4)
        four.scale = four.scale.to(torch.bfloat16)
        return four
    return table


def _plain(table: Tensor) -> Tensor:
    return table.dequantize() if isinstance(table, IntxUnpackedToInt8Tensor) else table


def _distribution(
    hidden: Tensor,
    table: Tensor,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    soft_cap: float | None = None,
    mask_token: int | None = None,
) -> Tensor:
    """Probabilities [M, V], float64, of hidden [M, H]."""
    logits = hidden.double() @ _plain(table).double().t()
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    if mask_token is not None:
        logits[:, mask_token] = -torch.inf
    logits = logits / (temperature or 1.0)
    if top_k:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1.0:
        logits = TopPLogitsWarper(top_p)(None, logits)
    return torch.softmax(logits, dim=1)


def _drawn(probabilities: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse CDF [M], and where no step of the CDF is so near that fp32 may fall beside it."""
    cumulative = probabilities.cumsum(dim=1)
    distance = (cumulative - uniform.double().unsqueeze(1)).abs().amin(dim=1)
    return (cumulative <= uniform.double().unsqueeze(1)).sum(dim=1), distance > 2e-6


def _accepted(score: Tensor, quota: int, threshold: float) -> list[int]:
    """By sorting, which is stable: of equal scores the lower index first."""
    first = sorted(range(len(score)), key=lambda i: -float(score[i]))[:quota]
    return [int(i in first or float(score[i]) > threshold) for i in range(len(score))]


def _check_masked(
    table: Tensor,
    settings: tuple[float, ...],
    *,
    truncation: bool,
    soft_cap: float | None = None,
    chunk_columns: int = 40,
    quota: int = 5,
    seed: int = 0,
) -> None:
    temperature, top_p, top_k, threshold, order = settings
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, 20, HIDDEN, generator=generator) * (
        torch.rand(20, 1, generator=generator) + 0.2
    )
    rows = torch.randperm(20, generator=generator)[:17]
    uniform = torch.rand(17, generator=generator)
    head = MaskedHead(
        table,
        mask_token=MASK,
        truncation=truncation,
        soft_cap=soft_cap,
        chunk_columns=chunk_columns,
    )
    token, accepted, score, entropy = head(
        hidden, rows, torch.tensor(settings), torch.tensor([quota]), uniform
    )
    probabilities = _distribution(
        hidden[0, rows], table, temperature, top_p, int(top_k), soft_cap, MASK
    )
    expected, clear = _drawn(probabilities, uniform)
    if temperature == 0.0:
        expected, clear = probabilities.argmax(dim=1), torch.ones(17, dtype=torch.bool)
    assert clear.sum() > 8
    assert torch.equal(token[clear], expected[clear])
    expected_entropy = torch.special.entr(probabilities).sum(dim=1)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=2e-5)
    two = probabilities.topk(2, dim=1).values
    by_order = (
        probabilities.gather(1, token.unsqueeze(1))[:, 0],
        -expected_entropy,
        two[:, 0] - two[:, 1],
    )
    torch.testing.assert_close(score.double(), by_order[int(order)], rtol=1e-5, atol=2e-5)
    assert accepted.tolist() == _accepted(score, quota, threshold)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("temperature", [0.0, 0.1, 0.7, 3.0])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("truncation", [True, False])
def test_masked_decisions_are_those_of_full_logits(
    order: int, temperature: float, soft_cap: float | None, truncation: bool
) -> None:
    _check_masked(
        _table(1031),
        (temperature, 1.0, 0.0, 0.4, float(order)),
        truncation=truncation,
        soft_cap=soft_cap,
    )


@pytest.mark.parametrize(
    ("vocabulary", "chunk_columns"),
    [
        pytest.param(64, 4096, id="one chunk"),
        pytest.param(64, 1, id="chunks of the smallest width"),
        pytest.param(97, 24, id="a prime vocabulary in a few chunks"),
        pytest.param(1031, 40, id="groups of chunks of which the last is short"),
        pytest.param(5003, 2000, id="wide chunks with padding"),
        pytest.param(40_009, 2048, id="many wide chunks"),
    ],
)
def test_no_size_of_the_vocabulary_or_of_the_chunks_matters(
    vocabulary: int, chunk_columns: int
) -> None:
    for truncation in (True, False):
        _check_masked(
            _table(vocabulary),
            (0.8, 1.0, 0.0, 0.4, 2.0),
            truncation=truncation,
            chunk_columns=chunk_columns,
            seed=vocabulary,
        )


@pytest.mark.parametrize(("top_p", "top_k"), [(0.9, 0), (1.0, 5), (0.6, 20), (0.01, 0), (1.0, 1)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_truncation_reaches_tokens_scores_and_entropy(
    temperature: float, top_p: float, top_k: int
) -> None:
    for order in (0.0, 1.0, 2.0):
        _check_masked(_table(1031), (temperature, top_p, float(top_k), 0.5, order), truncation=True)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("truncation", [True, False])
def test_a_quantized_table_in_a_head_is_that_table(bits: int, truncation: bool) -> None:
    """Eager products do not round activations; the rows looked up again do, by 8 bits."""
    table = _table(1031, bits=bits)
    head = MaskedHead(table, mask_token=MASK, truncation=truncation, chunk_columns=40)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(1, 40, HIDDEN, generator=generator)
    rows = torch.arange(40)
    settings = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0])
    token, _, score, entropy = head(
        hidden, rows, settings, torch.tensor([0]), torch.rand(40, generator=generator)
    )
    probabilities = _distribution(hidden[0], table, mask_token=MASK)
    # 8 bits of activation move a logit by about 1 % of the spread of logits.
    expected = torch.special.entr(probabilities).sum(dim=1)
    assert (entropy - expected).abs().max() < 0.2
    best = probabilities.amax(dim=1)
    chosen = probabilities.gather(1, token.unsqueeze(1))[:, 0]
    assert (chosen / best).min() > 0.85
    assert (score - best).abs().max() < 0.05


@pytest.mark.parametrize("truncation", [True, False])
def test_ties_go_to_the_first_token_and_draws_are_even(truncation: bool) -> None:
    head = MaskedHead(
        torch.ones(102, HIDDEN), mask_token=MASK, truncation=truncation, chunk_columns=8
    )
    uniform = torch.tensor([0.0, 0.2525, 0.7475, 1 - 2**-24])
    rows = torch.arange(4)
    hidden = torch.ones(1, 4, HIDDEN)
    inputs = (hidden, rows, torch.tensor([1.0, 1.0, 0.0, 2.0, 2.0]), torch.tensor([2]), uniform)
    token, accepted, score, entropy = head(*inputs)
    assert token.tolist() == [0, 26, 76, 101]  # 101 tokens, token 7 left out
    assert accepted.tolist() == [1, 1, 0, 0]
    assert score.abs().max() < 1e-6
    torch.testing.assert_close(entropy, torch.full((4,), math.log(101)))
    greedy = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0])
    assert head(hidden, rows, greedy, torch.tensor([0]), uniform)[0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("truncation", [True, False])
def test_the_mask_token_is_never_sampled_however_likely(truncation: bool) -> None:
    table = _table(97)
    hidden = (table[MASK] * 10).expand(1, 50, HIDDEN)
    head = MaskedHead(table, mask_token=MASK, truncation=truncation, chunk_columns=8)
    uniform = torch.linspace(0, 1 - 2**-24, 50)
    for temperature in (0.0, 1.0, 100.0):
        settings = torch.tensor([temperature, 1.0, 0.0, 2.0, 0.0])
        token = head(hidden, torch.arange(50), settings, torch.tensor([0]), uniform)[0]
        assert MASK not in token.tolist()
        assert int(token.max()) < 97


@pytest.mark.parametrize("temperature", [0.02, 1.0])
def test_logits_of_any_size_neither_overflow_nor_vanish(temperature: float) -> None:
    """The likeliest token is late, and hundreds of nats over the first chunk."""
    table = _table(1031)
    table[900] *= 20
    hidden = (table[900] / 20).expand(1, 3, HIDDEN).clone()
    hidden[:, 1] *= -30
    head = MaskedHead(table, mask_token=MASK, truncation=False, chunk_columns=40)
    settings = torch.tensor([temperature, 1.0, 0.0, 2.0, 0.0])
    rows = torch.arange(3)
    token, _, score, entropy = head(
        hidden, rows, settings, torch.tensor([0]), torch.full((3,), 0.5)
    )
    probabilities = _distribution(hidden[0], table, temperature, mask_token=MASK)
    expected, clear = _drawn(probabilities, torch.full((3,), 0.5))
    assert torch.equal(token[clear], expected[clear])
    assert torch.isfinite(score).all()
    # Logits of thousands carry an fp32 error of 1e-3.
    expected_entropy = torch.special.entr(probabilities).sum(dim=1)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("truncation", [True, False])
def test_draws_follow_the_softmax(truncation: bool) -> None:
    """Chi-square of 20,000 draws of one position against float64 probabilities."""
    generator = torch.Generator().manual_seed(11)
    table, count = _table(83), 20_000
    hidden = torch.randn(1, 1, HIDDEN, generator=generator)
    head = MaskedHead(table, mask_token=MASK, truncation=truncation, chunk_columns=8)
    head_inputs = (torch.zeros(count, dtype=torch.int64), torch.tensor([2.0, 1.0, 0.0, 2.0, 1.0]))
    uniform = torch.rand(count, generator=generator)
    found = head.vocabulary(
        hidden[0, head_inputs[0]],
        torch.tensor([[0.5]]),
        uniform.unsqueeze(1),
        *([torch.ones(1), torch.zeros(1)] if truncation else []),
    )
    observed = torch.bincount(found.sample[:, 0], minlength=83).double()
    expected = _distribution(hidden[0], table, 2.0, mask_token=MASK)[0] * count
    kept = expected >= 5
    observed = torch.cat([observed[kept], observed[~kept].sum()[None]])
    expected = torch.cat([expected[kept], expected[~kept].sum()[None]])
    assert stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("truncation", [True, False])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("vocabulary", [97, 4099])
def test_the_autoregressive_head_is_that_of_full_logits(
    vocabulary: int, soft_cap: float | None, truncation: bool
) -> None:
    table = _table(vocabulary)
    head = AutoregressiveHead(table, truncation=truncation, soft_cap=soft_cap)
    generator = torch.Generator().manual_seed(vocabulary)
    hidden = torch.randn(1, 9, HIDDEN, generator=generator)
    sets = [(0.0, 1.0, 0), (0.7, 1.0, 0), (0.1, 1.0, 0)]
    sets += [(1.0, 0.8, 0), (1.5, 1.0, 10), (1.0, 0.7, 30)] if truncation else []
    checked = 0
    for temperature, top_p, top_k in sets:
        for row in range(9):
            uniform = torch.rand(1, generator=generator)
            token, log_prob, entropy = head(
                hidden,
                torch.tensor([row]),
                torch.tensor([temperature, top_p, float(top_k)]),
                uniform,
            )
            x = hidden[0, row : row + 1]
            plain = _distribution(x, table, soft_cap=soft_cap)
            drawn = _distribution(x, table, temperature, top_p, top_k, soft_cap)
            expected, clear = _drawn(drawn, uniform)
            if temperature == 0.0:
                expected = drawn.argmax(dim=1)
            if bool(clear) or temperature == 0.0:
                assert torch.equal(token, expected)
                checked += 1
            expected_log = plain[0, token].log()
            torch.testing.assert_close(log_prob.double(), expected_log, rtol=1e-5, atol=2e-5)
            expected_entropy = torch.special.entr(plain).sum(dim=1)
            torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=2e-5)
    assert checked > 9 * len(sets) // 2


def test_the_autoregressive_head_resolves_ties_to_the_first_token() -> None:
    head = AutoregressiveHead(torch.ones(101, HIDDEN), truncation=True)
    for uniform, sample in ((0.0, 0), (0.5, 50), (1 - 2**-24, 100)):
        inputs = (torch.ones(1, 2, HIDDEN), torch.tensor([1]))
        greedy = head(*inputs, torch.tensor([0.0, 1.0, 0.0]), torch.tensor([uniform]))
        assert greedy[0].tolist() == [0]
        torch.testing.assert_close(greedy[1], torch.tensor([-math.log(101)]))
        drawn = head(*inputs, torch.tensor([1.0, 1.0, 0.0]), torch.tensor([uniform]))
        assert drawn[0].tolist() == [sample]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.3, 1.0, 4.0, 10.0]),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
    top_k=st.one_of(st.just(0), st.integers(1, 300)),
    vocabulary=st.integers(3, 300),
)
def test_truncation_keeps_what_transformers_keeps(
    seed: int, scale: float, top_p: float, top_k: int, vocabulary: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, vocabulary, generator=generator) * scale
    weights = torch.exp(logits - logits.amax(dim=1, keepdim=True))
    kept = truncate(
        weights, torch.tensor([top_p]), torch.tensor([float(top_k)]), torch.ones(1, vocabulary)
    )
    expected = logits.double()
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1.0:
        expected = TopPLogitsWarper(top_p)(None, expected)
    for row in range(4):
        differing = (kept[row] > 0) != torch.isfinite(expected[row])
        differing &= weights[row] > 1e-12  # what has no mass is kept or not without effect
        # Tokens 2e-6 nats apart stay together, and fp32 may see a mass just under top_p.
        edge = weights[row][torch.isfinite(expected[row])].amin()
        near = (weights[row] / edge).log().abs() < 1e-4
        mass = torch.softmax(expected[row], 0).sort().values.cumsum(0)
        at_the_edge = top_p < 1.0 and _mass_is_near(logits[row], top_p, top_k)
        assert at_the_edge or not bool((differing & ~near).any()), mass
    assert torch.equal(kept[kept > 0], weights[kept > 0])


def _mass_is_near(logits: Tensor, top_p: float, top_k: int) -> bool:
    """Whether some number of likeliest tokens has a mass of `top_p` but for fp32's rounding."""
    ordered = logits.double().sort(descending=True).values[: top_k or None]
    return bool(((torch.softmax(ordered, 0).cumsum(0) - top_p).abs() < 1e-6).any())


def test_ties_are_truncated_together() -> None:
    weights = torch.tensor([[1.0, 0.5, 0.5, 0.25, 0.5]])
    ones = torch.ones(1, 5)
    off = torch.ones(1)
    kept = truncate(weights, off, torch.tensor([2.0]), ones)
    assert kept.tolist() == [[1.0, 0.5, 0.5, 0.0, 0.5]]
    assert torch.equal(truncate(weights, off, torch.zeros(1), ones), weights)
    assert truncate(weights, torch.tensor([0.3]), torch.zeros(1), ones).count_nonzero() == 1


@settings(max_examples=100, deadline=None)
@given(
    scores=st.lists(st.sampled_from([-2.0, -0.5, 0.125, 0.25, 0.5, 0.75, 1.0]), min_size=1),
    quota=st.integers(0, 12),
    threshold=st.sampled_from([-3.0, 0.125, 0.5, 2.0]),
)
def test_acceptance_is_by_rank_or_by_threshold(
    scores: list[float], quota: int, threshold: float
) -> None:
    score = torch.tensor(scores)
    accepted = masked.accept(score, torch.tensor([quota]), torch.tensor([threshold]))
    assert accepted.int().tolist() == _accepted(score, quota, threshold)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"table": torch.zeros(4)}, "shape .4,."),
        ({"soft_cap": -1.0}, "soft_cap is -1.0"),
        ({"mask_token": 64}, "mask_token is 64"),
        ({"chunk_columns": 0}, "chunk_columns is 0"),
    ],
)
def test_a_head_without_meaning_is_refused(arguments: dict, message: str) -> None:
    defaults = {"table": torch.zeros(64, HIDDEN), "mask_token": 3}
    with pytest.raises(ValueError, match=message):
        MaskedHead(**{**defaults, **arguments})


def _run(stage: StageModule, tmp_path, inputs: list[tuple[Tensor, ...]]) -> list[list[Tensor]]:
    import executorch.kernels.quantized  # noqa: F401  (registers the quantized lookup)
    from executorch.runtime import Runtime

    lowered = lower_stage(stage, "xnnpack")
    lowered.write(tmp_path / "head.pte")
    method = Runtime.get().load_program(tmp_path / "head.pte").load_method("forward")
    return [[output.clone() for output in method.execute(given)] for given in inputs]


def _compare(got: list[Tensor], expected: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_lowered_autoregressive_head_is_the_eager_one(tmp_path, monkeypatch) -> None:
    """With fewer halvings than usual, in both: lowering takes as long as they are many."""
    monkeypatch.setattr("export.heads.samplers.truncation.STEPS", 3)
    stage = autoregressive_head_stage(_table(150), 8, HIDDEN, truncation=True, soft_cap=20.0)
    generator = torch.Generator().manual_seed(5)
    inputs = [
        (
            torch.randn(1, count, HIDDEN, generator=generator),
            torch.tensor([count - 1]),
            torch.tensor([temperature, top_p, top_k]),
            torch.rand(1, generator=generator),
        )
        for count in (8, 3, 1)
        for temperature, top_p, top_k in ((0.0, 1.0, 0.0), (0.7, 1.0, 0.0), (0.7, 0.8, 20.0))
    ]
    for given_inputs, got in zip(inputs, _run(stage, tmp_path, inputs), strict=True):
        _compare(got, stage.module(*given_inputs))


@pytest.mark.slow
def test_the_lowered_masked_head_is_the_eager_one(tmp_path) -> None:
    stage = masked_head_stage(_table(150), 8, 6, HIDDEN, mask_token=MASK, truncation=False)
    generator = torch.Generator().manual_seed(6)
    inputs = [
        (
            torch.randn(1, count, HIDDEN, generator=generator),
            torch.randperm(count, generator=generator)[:rows],
            torch.tensor([temperature, 1.0, 0.0, 0.5, float(order)]),
            torch.tensor([2]),
            torch.rand(rows, generator=generator),
        )
        for count, rows in ((8, 7), (3, 2), (1, 1))
        for temperature, order in ((0.0, 0), (0.7, 1), (0.7, 2))
    ]
    for given_inputs, got in zip(inputs, _run(stage, tmp_path, inputs), strict=True):
        _compare(got, stage.module(*given_inputs))
