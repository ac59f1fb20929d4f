"""Custom autograd Functions are seen in a pass, whenever they were bound, and in no other place."""

import threading

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.autograd.function import _SingleLevelFunction

from cases import Double
from reweight._passes.custom_functions import applied_by
from reweight._passes.forward_mode import load_forward_mode

load_forward_mode()


double = Double.apply  # bound before, as many modules do


def test_calls_with_dual_numbers_are_handed_over() -> None:
    seen = []

    def handler(function, apply, args):
        seen.append((function, args[1:]))
        return apply(forward_ad.unpack_dual(args[0]).primal, *args[1:])

    with forward_ad.dual_level(), applied_by(handler):
        x = torch.ones(2)
        assert torch.equal(double(x), 2 * x)
        assert not seen
        dual = forward_ad.make_dual(x, x)
        assert torch.equal(double(dual), 2 * x)
        assert torch.equal(Double.apply(dual, 3), 3 * x)
    assert seen == [(Double, ()), (Double, (3,))]


def test_other_threads_and_what_comes_after_are_left_alone() -> None:
    found = []

    def call() -> None:
        with forward_ad.dual_level():
            try:
                double(forward_ad.make_dual(torch.ones(2), torch.ones(2)))
            except Exception as error:
                found.append(error)

    with applied_by(lambda *call: None):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert len(found) == 1, "PyTorch's own: the function has no jvp"
    assert "apply" not in vars(_SingleLevelFunction)
    with pytest.raises(ValueError, match="broken"), applied_by(lambda *call: None):
        raise ValueError("broken")
    assert "apply" not in vars(_SingleLevelFunction)
