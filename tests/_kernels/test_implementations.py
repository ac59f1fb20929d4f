"""What is kept is not what a user gets; where exits lie is told the device once for each place."""

from importlib.util import find_spec

import pytest
import torch

from reweight._kernels.implementations import (
    configuration,
    is_plain,
    kernel_forward,
    prepare,
)

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux")


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_kept_for_the_derivatives_is_not_what_a_user_may_change(keep: bool) -> None:
    logits, target = [torch.randn(4, 3), torch.randn(4, 5)], torch.tensor([0, 1, 2, -1])
    _, confidence, _, _, scale, exponentials = kernel_forward(
        "torch", logits, target, -1, 0.0, keep
    )
    assert torch.equal(confidence, scale)
    assert confidence.data_ptr() != scale.data_ptr()
    assert len(exponentials) == (2 if keep else 0)


def test_plain_tensors_have_neither_tangents_nor_transforms() -> None:
    x = torch.randn(3)
    seen = []
    torch.func.vmap(lambda row: seen.append(is_plain(row)) or row)(x)
    with torch.autograd.forward_ad.dual_level():
        seen.append(is_plain(torch.autograd.forward_ad.make_dual(x, x)))
    assert is_plain(x)
    assert seen == [False, False]


@needs_triton
def test_a_table_is_made_once_for_each_place() -> None:
    logits = [torch.randn(4, 3), torch.randn(4, 5)]
    gradients = [torch.empty(4, 3), torch.empty(4, 5)]
    rows, table, _ = prepare(logits, gradients)
    assert all(ours is theirs for ours, theirs in zip(rows, logits, strict=True))
    expected = [
        [z.data_ptr(), d.data_ptr(), z.shape[1], z.stride(0)]
        for z, d in zip(logits, gradients, strict=True)
    ]
    assert table.tolist() == expected
    assert prepare(logits, gradients)[1] is table
    assert prepare(logits, [torch.empty(4, 3), gradients[1]])[1].tolist() != expected


@needs_triton
def test_columns_that_are_apart_are_brought_together() -> None:
    logits = [torch.randn(3, 4).t()]
    ((row,), table, _) = prepare(logits, [torch.empty(4, 3)])
    assert row.is_contiguous()
    assert table[0, 0] == row.data_ptr()
    assert torch.equal(row, logits[0])


@needs_triton
@pytest.mark.parametrize(
    ("shape", "first", "expected"),
    [((4, 8), 0, 16), ((4, 8), 1, 4), ((4, 6), 0, 8), ((4, 7), 0, 4)],
)
def test_the_widest_access_that_fits_all_rows(shape, first: int, expected: int) -> None:
    memory = torch.empty(64)
    logits = memory[first : first + 4 * shape[1]].view(shape)
    *_, options = prepare([logits], [torch.empty(shape)])
    assert options["ALIGNMENT"] == expected
    assert options["VECTOR"] == expected // 4


@needs_triton
@pytest.mark.parametrize("num_classes", [1, 10, 100, 1000, 32000, 128256])
def test_a_program_holds_no_more_than_its_registers(num_classes: int) -> None:
    options = configuration(num_classes, torch.bfloat16, 16)
    entries = options["ROWS"] * options["BLOCK"]
    assert entries <= 8192
    assert entries <= 32 * 32 * options["num_warps"]
