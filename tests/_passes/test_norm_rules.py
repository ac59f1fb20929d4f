"""With what the graph holds of a norm, its rule computes no value, and the same tangent."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from reweight._passes.forward_mode import load_forward_mode
from reweight._passes.norm_rules import Known, batch_norm, fitting, layer_norm

load_forward_mode()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["batch_norm", "layer_norm"])
def test_statistics_of_the_graph_take_the_place_of_the_value(name: str, dtype) -> None:
    shape, size = ((6, 4, 3), (4,)) if name == "batch_norm" else ((6, 3, 4), (4,))
    x, weight, bias = (torch.randn(s, dtype=dtype) for s in (shape, size, size))
    leaf = x.clone().requires_grad_()
    if name == "batch_norm":
        value = F.batch_norm(leaf, None, None, weight, bias, training=True)
    else:
        value = F.layer_norm(leaf, size, weight, bias)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, torch.randn_like(t)) for t in (x, weight, bias)]

        def tangent(known: Known) -> Tensor:
            if name == "batch_norm":
                result = batch_norm(known, duals[0], None, None, *duals[1:], training=True)
            else:
                result = layer_norm(known, duals[0], size, *duals[1:])
            return forward_ad.unpack_dual(result).tangent

        # Its value is not looked at: only where it would lie.
        found = tangent(Known(torch.empty_like(value), value.grad_fn, waits=True))
        expected = tangent(Known())
    torch.testing.assert_close(found, expected)


def test_two_dtypes_do_not_fit() -> None:
    with forward_ad.dual_level():
        assert fitting(torch.ones(2), torch.ones(2, dtype=torch.float64)) is None
        assert fitting(torch.ones(2), torch.ones(3)) is None
        assert fitting(torch.ones(2), torch.ones(2)) is not None
