"""Every generator goes on from where it was, whatever was drawn in between or before."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from reweight._passes.random_state import RandomState

CPU = torch.device("cpu")


def draws(own: torch.Generator) -> list[object]:
    return [
        random.random(),
        np.random.rand(),
        np.random.randn(),
        torch.rand(2).tolist(),
        torch.rand(2, generator=own).tolist(),
    ]


def test_all_draw_the_same_again() -> None:
    own = torch.Generator().manual_seed(1)
    state = RandomState({CPU}, (own,))
    first = draws(own)
    state.restore()
    assert draws(own) == first
    state.restore()
    assert draws(own) == first


@pytest.mark.parametrize(
    "between",
    [
        lambda: None,
        np.random.rand,
        lambda: np.random.randn(1),  # NumPy keeps a second number back
        lambda: np.random.randn(2),
        lambda: np.random.seed(7),
    ],
    ids=["nothing", "a number", "a normal number", "two of them", "a seed"],
)
def test_numpys_state_is_that_of_now_and_not_of_the_last_look(
    between: Callable[[], object],
) -> None:
    RandomState({CPU}, ())
    between()
    state = RandomState({CPU}, ())
    first = np.random.randn(3).tolist()
    state.restore()
    assert np.random.randn(3).tolist() == first
