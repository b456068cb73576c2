"""Standard normal numbers from a counter, to the same bits as the kernels' (kernels/philox.cuh).

Philox 4x32-10 (Salmon et al. 2011), then Box and Muller. Nothing is drawn: the noise of an element
is a function of its image's seed, the step and its place, so that an image gets the same noise
alone and in a batch, on the host and on a device. Logarithm, sine and cosine are polynomials in
plain float32 operations, which round alike everywhere.
"""

from __future__ import annotations

from functools import reduce
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Words: TypeAlias = npt.NDArray[np.uint64]  # 32-bit words, in 64 bits so that products fit
Float32: TypeAlias = npt.NDArray[np.float32]

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
_LOW, _HIGH = np.uint64(0xFFFFFFFF), np.uint64(32)
# Coefficients from the highest power down.
_ATANH = (0.22222222, 0.28571429, 0.4, 0.66666667, 2.0)
_SINE = (2.7557319e-6, -1.9841270e-4, 8.3333333e-3, -0.16666667, 1.0)
_COSINE = (-2.7557319e-7, 2.4801587e-5, -1.3888889e-3, 4.1666667e-2, -0.5, 1.0)


def standard_normal(seeds: npt.NDArray[np.uint64], step: int, count: int) -> Float32:
    """Noise of one step.

    Args:
        seeds: uint64 [N], one an image.
        step: of the denoising loop.
        count: M, elements of one image.

    Returns:
        float32 [N, M].
    """
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    counter = [blocks & _LOW, blocks >> _HIGH, np.full_like(blocks, step), np.zeros_like(blocks)]
    key = [np.asarray(seeds)[:, None] & _LOW, np.asarray(seeds)[:, None] >> _HIGH]
    words = philox(counter, key)
    pairs = [_box_muller(words[0], words[1]), _box_muller(words[2], words[3])]
    four = np.stack([number for pair in pairs for number in pair], axis=-1)
    return np.ascontiguousarray(four.reshape(len(seeds), -1)[:, :count])


def philox(counter: list[Words], key: list[Words]) -> list[Words]:
    """Ten rounds: four words from a counter of four and a key of two, all of one shape."""
    for _ in range(10):
        first, second = _MULTIPLIERS[0] * counter[0], _MULTIPLIERS[1] * counter[2]
        counter = [
            (second >> _HIGH) ^ counter[1] ^ key[0],
            second & _LOW,
            (first >> _HIGH) ^ counter[3] ^ key[1],
            first & _LOW,
        ]
        key = [(word + step) & _LOW for word, step in zip(key, _KEY_STEPS, strict=True)]
    return counter


def _box_muller(length: Words, angle: Words) -> tuple[Float32, Float32]:
    """Radius from one word, angle from the other: its upper two bits are a quadrant."""
    u = _float32(length) * np.float32(2.0**-32) + np.float32(2.0**-33)
    radius = np.sqrt(np.float32(-2) * _log(u))
    turn = _float32(angle & np.uint64(0x3FFFFFFF)) * np.float32(2.0**-30) - np.float32(0.5)
    t = turn * np.float32(1.57079633)
    sine, cosine = t * _polynomial(_SINE, t * t), _polynomial(_COSINE, t * t)
    swaps, turns = (angle >> np.uint64(30)) & np.uint64(1) != 0, angle >> np.uint64(31) != 0
    x, y = np.where(swaps, -sine, cosine), np.where(swaps, cosine, sine)
    return radius * np.where(turns, -x, x), radius * np.where(turns, -y, y)


def _log(u: Float32) -> Float32:
    """log(u) of u in [2^-33, 1]: u = 2^e m, log m = 2 atanh((m - 1) / (m + 1))."""
    bits = u.view(np.uint32)
    half = ((bits & np.uint32(0x007FFFFF)) | np.uint32(0x3F000000)).view(np.float32)
    low = half < np.float32(0.70710678)
    m = np.where(low, np.float32(2) * half, half)
    e = ((bits >> np.uint32(23)).astype(np.int32) - np.where(low, 127, 126)).astype(np.float32)
    s = (m - np.float32(1)) / (m + np.float32(1))
    return np.asarray(e * np.float32(0.69314718) + s * _polynomial(_ATANH, s * s))


def _polynomial(coefficients: tuple[float, ...], q: Float32) -> Float32:
    """Horner's scheme in float32."""
    first, *rest = map(np.float32, coefficients)
    start = np.full_like(q, first)
    return reduce(lambda value, coefficient: coefficient + q * value, rest, start)


def _float32(words: Words) -> Float32:
    return words.astype(np.uint32).astype(np.float32)
