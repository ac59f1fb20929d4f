"""What schemas say, and what operations on lists come to."""

import pytest
import torch

from reweight._optimizers.operations import aten, one_by_one, operation, tensors_in

LISTS = {
    "add": ([2, 2], {"alpha": -0.3}),
    "sub": ([2, 2], {"alpha": 0.3}),
    "addcmul": ([2, 2, 2], {"value": 0.3}),
    "addcdiv": ([2, 2, 2], {"value": -0.3}),
    "sqrt": ([2], {}),
    "lerp": ([2, 2, 0.1], {}),
    "mul": ([2, 0.37], {}),
    "div": ([2, [0.37, 0.4]], {}),
    "maximum": ([2, 0.5], {}),
    "minimum": ([2, 2], {}),
    "pow": ([2, 2.0], {}),
    "norm": ([2], {}),
    "reciprocal": ([2], {}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LISTS)
def test_lists_go_one_by_one(name: str, dtype: torch.dtype) -> None:
    pattern, options = LISTS[name]
    args = [
        [torch.rand(5, 3).to(dtype) + 0.1 for _ in range(each)] if isinstance(each, int) else each
        for each in pattern
    ]
    expected = getattr(torch, f"_foreach_{name}")(*args, **options)
    found = one_by_one(name, args, options)
    assert len(found) == 2
    assert all(map(torch.equal, found, expected))
    leaves = [t.clone().requires_grad_() for t in args[0]]
    results = one_by_one(name, [leaves, *args[1:]], options)
    assert all(result.requires_grad for result in results)


def test_a_tensor_may_stand_for_a_number() -> None:
    x, y, z = (torch.rand(3).double() + 0.1 for _ in range(3))
    number = torch.tensor(0.3).double().requires_grad_()
    for name, args in {"add": [x, y], "addcmul": [x, y, z], "addcdiv": [x, y, z]}.items():
        key = "alpha" if name == "add" else "value"
        (found,) = one_by_one(name, [[arg] for arg in args], {key: number})
        expected = getattr(torch, name)(*args, **{key: 0.3})
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)  # 0.3 came of float32
        assert found.requires_grad


def test_schemas_tell_views_writes_and_what_is_the_same_without() -> None:
    assert operation(aten.add_.Tensor).functional is aten.add.Tensor
    assert operation(aten.add_.Tensor).written == ((0, "self"),)
    assert operation(aten.mm.out).functional is aten.mm.default
    assert operation(aten.mm.out).is_out
    assert operation(aten.addmm_.default).functional is None  # it rounds otherwise
    assert operation(aten.t.default).is_view
    assert operation(aten.detach.default).is_view
    assert not operation(aten.add.Tensor).is_view
    assert operation(aten._foreach_add_.Scalar).is_list
    assert operation(aten._foreach_add_.Scalar).name == "add"


def test_tensors_are_found_in_lists_of_lists() -> None:
    one, two = torch.ones(1), torch.ones(2)
    assert list(tensors_in([one, 3, [[two], None]])) == [one, two]
