"""The rule of a norm whose value is known computes none, and the same tangent."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F

from reweight._passes.forward_mode import load_forward_mode
from reweight._passes.norm_rules import fitting, layer_norm

load_forward_mode()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("moving", [True, False])
def test_a_known_value_is_given_back(moving: bool, dtype) -> None:
    x, weight, bias = (torch.randn(s, dtype=dtype) for s in ((6, 3, 4), (4,), (4,)))
    value = F.layer_norm(x, (4,), weight, bias)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, torch.randn_like(t)) for t in (x, weight, bias)]
        affine = duals[1:] if moving else (weight, bias)
        found, expected = (
            forward_ad.unpack_dual(layer_norm(known, duals[0], (4,), *affine))
            for known in (value, None)
        )
    assert found.primal.data_ptr() == value.data_ptr()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_two_dtypes_do_not_fit() -> None:
    with forward_ad.dual_level():
        assert fitting(torch.ones(2), torch.ones(2, dtype=torch.float64)) is None
        assert fitting(torch.ones(2), torch.ones(3)) is None
        assert fitting(torch.ones(2), torch.ones(2)) is not None


@pytest.mark.parametrize("moving", [True, False])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_as_autocast_has_it_on_a_gpu(affine, known, moving, monkeypatch) -> None:
    """It runs in float32 there, whatever it gets, and here in what it gets."""
    plain = F.layer_norm

    def layer_norm_of_a_gpu(x, shape, *others):
        return plain(x.float(), shape, *others)

    x, dx = (torch.randn(6, 3, 4).bfloat16() for _ in range(2))
    parameters = [torch.randn(4), torch.randn(4)] if affine else [None, None]
    directions = [torch.randn(4) if affine and moving else None for _ in range(2)]
    value = layer_norm_of_a_gpu(x, (4,), *parameters)
    monkeypatch.setattr(F, "layer_norm", layer_norm_of_a_gpu)

    def duals(wide) -> list:
        pairs = zip([x, *parameters], [dx, *directions], strict=True)
        return [t if d is None else forward_ad.make_dual(wide(t), wide(d)) for t, d in pairs]

    with forward_ad.dual_level():
        with torch.autocast("cpu", torch.bfloat16):
            input, *others = duals(lambda t: t)
            result = layer_norm(value if known else None, input, (4,), *others)
        found = forward_ad.unpack_dual(result)
        input, *others = duals(torch.Tensor.double)
        others = [each if each is None else each.double() for each in others]
        exact = forward_ad.unpack_dual(plain(input, (4,), *others)).tangent
    assert torch.equal(found.primal, value)
    assert found.tangent.dtype == torch.float32
    torch.testing.assert_close(found.tangent.double(), exact, rtol=1e-4, atol=1e-5)  # rounding
