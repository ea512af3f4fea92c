"""Philox4x32-10, the counter-based generator behind every random number of a bundle's sampler.

A host in any language reproduces a generation from its seed with these few lines: the numbers
depend on where they are used (canvas, step, position) and on nothing that ran before. What they
are used for is the sampler's business. Test vectors for other languages: `philox_vectors.json`.

Source: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC11), and
the reference implementation Random123 (`philox.h`, `kat_vectors`).
"""

from __future__ import annotations

import numpy as np

STREAM_UNIFORM = 0
"""Stream of the sampling uniforms, one per canvas position."""

STREAM_TOKEN = 1
"""Stream of the uniformly random tokens: the initial canvas (step 0) and the renoising."""

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counter: np.ndarray, key: np.ndarray, rounds: int = 10) -> np.ndarray:
    """Encrypt counters `[..., 4]` under keys `[..., 2]` (both uint32) into words `[..., 4]` uint32.

    The leading dimensions broadcast against each other.
    """
    counter = np.asarray(counter, dtype=np.uint64)
    key = np.asarray(key, dtype=np.uint64)
    c0, c1, c2, c3 = (counter[..., i] for i in range(4))
    k0, k1 = key[..., 0], key[..., 1]
    for _ in range(rounds):
        product0 = _MULTIPLIERS[0] * c0
        product1 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0 = (k0 + _WEYL[0]) & _LOW
        k1 = (k1 + _WEYL[1]) & _LOW
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def words(seed: int, canvas: int, step: int, stream: int, count: int) -> np.ndarray:
    """The first `count` 32-bit words of one stream at one denoising step, `[count]` uint32.

    `canvas` counts canvases since the session began; `step` is 0 for the initial canvas and then
    counts denoising steps up from 1. Position p is word p % 4 of the block p // 4.
    Raises ValueError for a seed that is not an unsigned 64-bit integer.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"the seed is {seed}, expected an integer from 0 to 2**64 - 1")
    blocks = -(-count // 4)
    counter = np.empty((blocks, 4), dtype=np.uint64)
    counter[:, 0] = np.arange(blocks)
    counter[:, 1] = step
    counter[:, 2] = canvas
    counter[:, 3] = stream
    key = np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint64)
    return philox4x32(counter, key).reshape(-1)[:count]


def uniforms(seed: int, canvas: int, step: int, count: int) -> np.ndarray:
    """The sampling uniforms of one step, `[count]` float32 in [0, 1): 24 bits, exact in fp32."""
    drawn = words(seed, canvas, step, STREAM_UNIFORM, count)
    return (drawn >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def random_tokens(
    seed: int, canvas: int, step: int, count: int, vocabulary_size: int
) -> np.ndarray:
    """The uniformly random tokens of one step, `[count]` int64 in [0, vocabulary_size).

    Lemire's multiply-shift without rejection: a token's probability is off by at most 2**-32.
    """
    drawn = words(seed, canvas, step, STREAM_TOKEN, count).astype(np.uint64)
    return ((drawn * np.uint64(vocabulary_size)) >> _SHIFT).astype(np.int64)
