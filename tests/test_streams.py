"""The random streams: numbers by key alone."""

import numpy as np
import pytest

from vir import streams

USES = [streams.ERASE, streams.MIX, streams.NOISE, streams.SAMPLE, streams.DROPOUT]


def numbers(*key):
    return streams.generator(*key).integers(2**63, size=4).tolist()


def test_the_numbers_are_those_of_the_key_whatever_was_drawn_before():
    expected = numbers(1, 2, streams.MIX)
    np.random.default_rng(0).random(100)
    streams.generator(1, 2, streams.ERASE).random(100)
    assert numbers(1, 2, streams.MIX) == expected


def test_the_bits_are_philox_of_the_key():
    bits = np.random.Philox(np.random.SeedSequence((7, 63, streams.ERASE))).random_raw(5)
    assert streams.generator(7, 63, streams.ERASE).bit_generator.random_raw(5).tolist() == bits.tolist()


@pytest.mark.parametrize("key", [(0, 0), (1, 0), (0, 1), (5, 197)])
def test_no_use_shares_its_numbers_with_another_or_with_the_key_without_a_use(key):
    found = [numbers(*key, use) for use in USES] + [numbers(*key)]
    assert len({tuple(of_use) for of_use in found}) == len(USES) + 1


def test_a_use_of_0_would_be_the_key_without_one():
    """Why no use is 0: this is numpy's rule, which the order of an epoch would meet."""
    assert numbers(3, 4, 0) == numbers(3, 4)
    assert 0 not in USES
