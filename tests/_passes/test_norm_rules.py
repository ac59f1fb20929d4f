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
