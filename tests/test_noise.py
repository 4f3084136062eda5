"""Normal numbers by seed and place, against numpy's uint32, and as numbers that are to look random."""

from statistics import NormalDist

import numpy as np
import pytest
import torch

from vir.data.noise import normal_noise

torch.set_num_threads(1)


def hashed(x):
    """lowbias32 in the unsigned numbers that it was made for."""
    x = x.astype(np.uint32)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    return x ^ x >> np.uint32(16)


def seeds(count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(-2**31, 2**31, count, dtype=np.int32))


def test_against_numpy_and_the_standard_library():
    some = torch.cat([torch.tensor([0, -1, 2**31 - 1, -2**31], dtype=torch.int32), seeds(3)])
    found = normal_noise(some, 3, 5, 7)
    assert found.shape == (7, 3, 5, 7) and found.dtype == torch.float32
    places = hashed(np.arange(3 * 5 * 7)).reshape(3, 5, 7)
    for seed, of_seed in zip(some.numpy().view(np.uint32), found):
        for bits, number in zip(hashed(places ^ seed).view(np.int32).flat, of_seed.flatten().tolist()):
            quantile = ((int(bits) >> 8) + 0.5) / 2**24 + 0.5
            assert number == pytest.approx(NormalDist().inv_cdf(quantile), rel=1e-5, abs=1e-6)  # erfinv in float32


def test_the_ends_are_finite():
    """Each of the 2^24 numbers there can be, by way of the largest and the smallest."""
    ends = torch.tensor([-2**23, -1, 0, 2**23 - 1]).add(0.5).mul(2**-23)
    found = ends.erfinv() * 2**0.5
    assert found.tolist() == pytest.approx([NormalDist().inv_cdf((end + 1) / 2) for end in ends.tolist()], rel=1e-5)
    assert found.abs().max() < 5.5 and (found != 0).all()


def test_moments_of_a_batch_and_of_each_sample():
    noise = normal_noise(seeds(32), 3, 64, 64).double()
    n = noise.numel()
    assert noise.isfinite().all() and noise.abs().max() < 5.5
    for moment, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(noise.pow(moment).mean() - expected) < 5 * (variance / n) ** 0.5, moment
    per_sample = noise.flatten(1)
    assert per_sample.mean(1).abs().max() < 5 / per_sample.shape[1] ** 0.5
    assert (per_sample.var(1) - 1).abs().max() < 5 * (2 / per_sample.shape[1]) ** 0.5


@pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["samples", "channels", "rows", "columns"])
@pytest.mark.parametrize("some", [seeds(32), torch.arange(32, dtype=torch.int32)], ids=["random_seeds", "0_1_2"])
def test_neighbours_do_not_know_of_each_other(axis, some):
    """In value and in size, which shows what a correlation of the values would not."""
    noise = normal_noise(some, 3, 64, 64).double()
    left, right = noise.narrow(axis, 0, noise.shape[axis] - 1), noise.narrow(axis, 1, noise.shape[axis] - 1)
    for products, variance in ((left * right, 1), ((left**2 - 1) * (right**2 - 1), 4)):
        assert abs(products.mean()) < 5 * (variance / products.numel()) ** 0.5


def test_a_sample_has_its_numbers_in_every_batch_and_another_seed_has_others():
    some = seeds(5)
    together = normal_noise(some, 3, 8, 6)
    for i in range(5):
        assert torch.equal(normal_noise(some[i:i + 1], 3, 8, 6)[0], together[i])
    assert len(together.unique()) > 0.99 * together.numel()
