"""Seeding makes a process that has drawn before draw what a new one does."""

import random

import numpy as np
import pytest
import torch

from fedhpc.federation import seeds

# ruff: noqa: NPY002  (the global generator is what Flower draws from)


def draws() -> list[float]:
    normal = [random.gauss(0, 1), float(np.random.normal()), float(torch.randn(()))]
    uniform = [random.random(), float(np.random.random()), float(torch.rand(()))]
    return [*normal, *uniform, *torch.randperm(20).tolist(), *np.random.permutation(20).tolist()]


@pytest.mark.parametrize("before", range(4))
def test_what_was_drawn_before_does_not_show_in_what_is_drawn_after_seeding(before: int) -> None:
    seeds.seed_all(7)
    expected = draws()
    for _ in range(before):  # of normal numbers two are made at a time, and one is kept
        random.gauss(0, 1)
        np.random.normal()
        torch.randn(())
    seeds.seed_all(7)
    assert draws() == expected
