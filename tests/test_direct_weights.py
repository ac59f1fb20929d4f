"""Weights of a hypergradient, whatever it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from references import direct_weights_slowly
from reweight import DirectWeights, ExitLosses, SampleReweighter


def of(hypergradient: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    losses = ExitLosses(torch.ones_like(hypergradient), valid=valid)
    return DirectWeights(hypergradient.shape[1])(losses, hypergradient)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])  # with the learning rate of the model
def test_against_the_definition(dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    hypergradient = torch.randn(40, 5, dtype=dtype) ** 3
    hypergradient[:, 0] = torch.linspace(-1, 1, 40)  # as many help as do not, about alike
    hypergradient[:, 1] = hypergradient[:, 1].abs()  # no sample helps
    hypergradient[:, 2] = 0  # nothing is known
    hypergradient[1:, 3] = hypergradient[1:, 3].abs()  # one helps
    hypergradient[0, 3] = -1
    hypergradient[::3, 4] = 0  # rows that were not seen
    valid = torch.arange(40) < 33
    expected = direct_weights_slowly(hypergradient.double(), valid.tolist())
    weights = of(hypergradient * scale, valid)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)
    assert weights[:33, 0].mean().item() == pytest.approx(1, abs=1e-6)
    assert weights[:, 1:3].unique().tolist() == [0, 1]
    assert weights[0, 3].item() == pytest.approx(2 * 33**0.5, rel=1e-6)  # L2RW would give it 33


@settings(max_examples=100, deadline=None)
@given(
    arrays(
        "float64",
        st.tuples(st.integers(1, 30), st.integers(1, 4)),
        elements=st.floats(-1e3, 1e3, allow_subnormal=False),
    )
)
def test_a_step_is_never_wilder_than_that_of_a_quarter_of_the_batch(hypergradient) -> None:
    weights = of(torch.from_numpy(hypergradient))
    assert (weights >= 0).all()
    assert (weights.mean(0) <= 1 + 1e-9).all()
    assert (weights.square().mean(0) <= 4 + 1e-9).all()


def test_without_a_hypergradient_all_weights_are_one() -> None:
    losses = torch.rand(3, 2, requires_grad=True)
    assert torch.equal(DirectWeights(2)(losses), torch.ones(3, 2))
    assert not DirectWeights(2)(losses).requires_grad
    assert not list(DirectWeights(2).parameters())
    assert repr(DirectWeights(2)) == "DirectWeights(num_exits=2)"


@pytest.mark.parametrize("losses", [torch.rand(4, 2), torch.rand(3)])
def test_another_number_of_exits_is_named(losses) -> None:
    with pytest.raises(ValueError, match=r"\[samples, num_exits=3\], got \["):
        DirectWeights(3)(losses)
    with pytest.raises(ValueError, match="num_exits"):
        DirectWeights(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_of_a_prediction_are_direct_weights_of_it(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    raw = torch.randn(40, 3, dtype=dtype)
    raw[1:, 1] = -1 - raw[1:, 1].abs()  # one sample has all
    raw[0, 1] = 1
    reweighter = SampleReweighter(3, form="predicted").to(dtype)
    reweighter.network = torch.nn.Linear(3, 3, bias=False, dtype=dtype)
    with torch.no_grad():
        reweighter.network.weight.copy_(torch.eye(3))
    valid = torch.arange(40) < 33
    losses = ExitLosses(raw, valid=valid)
    weights = reweighter(losses).detach()[valid]
    torch.testing.assert_close(weights, DirectWeights(3)(losses, -(1 + raw) / 33)[valid])
    assert weights[0, 1].item() == pytest.approx(2 * 33**0.5)
