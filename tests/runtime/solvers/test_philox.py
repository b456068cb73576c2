"""Noise from a counter: published vectors, a normal distribution, and what it depends on."""

import numpy as np
import pytest

from blockcache.runtime.solvers.philox import philox, standard_normal

# Known answers of Random123 for philox4x32-10: counter, key, words.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_published_vectors(counter, key, words):
    made = philox(*([np.array([word], np.uint64) for word in side] for side in (counter, key)))
    assert [int(word[0]) for word in made] == words


def test_numbers_are_normal():
    """Of 2 million: the first four moments within five standard errors, and the tails' shares."""
    z = standard_normal(np.array([1, 2**64 - 1], np.uint64), 3, 10**6).astype(np.float64)
    count = z.size
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - expected) <= 5 * np.sqrt(variance / count)
    for level, share in ((1, 0.317311), (2, 0.0455003), (3, 0.0026998), (4, 6.334e-5)):
        found = (np.abs(z) > level).mean()
        assert abs(found - share) <= 5 * np.sqrt(share / count)


def test_neighbours_steps_and_seeds_are_uncorrelated():
    seeds = np.array([0, 1, 2**32], np.uint64)
    rows = np.concatenate([standard_normal(seeds, step, 10**5) for step in (0, 1)])
    lagged = [row[lag:-4] @ row[: -4 - lag] / 10**5 for row in rows for lag in (1, 2, 3)]
    between = np.corrcoef(rows)[np.triu_indices(len(rows), 1)]
    assert np.max(np.abs([*lagged, *between])) <= 5 / np.sqrt(10**5)


@pytest.mark.parametrize("count", [1, 3, 4, 777])
def test_an_image_has_the_same_noise_alone_in_a_batch_and_cropped(count):
    seeds = np.array([5, 9], np.uint64)
    both = standard_normal(seeds, 2, 1000)
    for row, seed in zip(both, seeds, strict=True):
        alone = standard_normal(np.array([seed]), 2, count)
        np.testing.assert_array_equal(alone[0], row[:count])
