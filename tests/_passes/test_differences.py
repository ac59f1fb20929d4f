"""What finite differences must know of a forward."""

import pytest
import torch

from reweight._passes.differences import DifferenceWatch, differ, working_precision
from reweight._passes.ladder import Ladder

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16)}


def no_grad(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return x * 2


def constant(x: torch.Tensor) -> torch.Tensor:
    """As rotary embeddings are computed."""
    with torch.no_grad():
        angles = torch.arange(len(x)).to(x)
    return x * angles.sin()


@pytest.mark.parametrize(
    ("function", "cuts"),
    [
        (lambda x: x.sin() * 2, False),
        (lambda x: x.detach(), True),
        (lambda x: torch.detach(x), True),
        (lambda x: (x * 1).detach_(), True),
        (lambda x: x.data * 2, True),
        (no_grad, True),
        (constant, False),
    ],
)
def test_cuts_from_the_graph_that_move_are_noticed(function, cuts: bool) -> None:
    found = []
    for x in (torch.ones(2), torch.ones(2) + 1e-5):
        with DifferenceWatch(Ladder()) as watch:
            function(x.requires_grad_())
        found.append(watch.cuts)
    assert differ(*found) == cuts
    assert not differ(found[0], found[0])
    assert differ(found[0], [*found[0], torch.ones(())]), "another number of cuts"


def test_the_coarsest_number_on_the_way_is_noticed() -> None:
    x = torch.ones(2, dtype=torch.float64)
    with DifferenceWatch(Ladder()) as watch:
        x.sin()
        assert watch.precision == EPS[torch.float64]
        x.argmax()
        x.bfloat16().double()
    assert watch.precision == EPS[torch.bfloat16]


def test_the_precision_of_a_forward_is_that_of_its_parameters_or_of_autocast() -> None:
    double, single = torch.ones(2, dtype=torch.float64), torch.ones(2)
    assert working_precision({"a": double}) == EPS[torch.float64]
    assert working_precision({"a": double, "b": single}) == EPS[torch.float32]
    with torch.autocast("cpu", torch.bfloat16):
        assert working_precision({"a": double}) == EPS[torch.bfloat16]
