"""The random streams: numbers by key alone."""

import traceback

import numpy as np
import pytest
import torch

from vir import streams
from vir.training.loop import seed_devices

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


def test_a_step_draws_as_after_manual_seed_and_no_stack_is_kept_for_it(monkeypatch):
    torch.manual_seed(2**62 + 5)
    expected = torch.rand(4), torch.nn.functional.dropout(torch.ones(64))
    monkeypatch.setattr(traceback, "format_stack", None)  # what torch calls for each kind of device that is not in use
    seed_devices(2**62 + 5)
    drawn = torch.rand(4), torch.nn.functional.dropout(torch.ones(64))
    assert all(map(torch.equal, drawn, expected))
