"""The Triton kernels in Triton's interpreter against float64; `test_triton_kernels.py` runs this.

It needs a process of its own: the interpreter is chosen when the kernels are imported. By hand:
``TRITON_INTERPRET=1 pytest tests/triton_parity.py``, or without the variable on a GPU.
"""

import os

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", "3.2")
from triton.runtime.interpreter import InterpretedFunction

from reweight import exit_cross_entropy, linear_exit_cross_entropy
from reweight._kernels import implementations
from reweight._kernels.implementations import kernel_backward, kernel_forward, kernel_tangent
from reweight._passes.forward_mode import load_forward_mode

# NumPy warns where a GPU does not: about log 0 and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

IGNORED = -100
INF = float("inf")


@pytest.fixture(autouse=True)
def device():
    with torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"):
        yield


@pytest.fixture(autouse=True, scope="module")
def prepared_once():
    """The interpreter prepares Triton's language in every call of a function: half of its time.

    A function of a kernel needs that once; a kernel still prepares it for every launch.
    """
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1":
            own, prepared = InterpretedFunction.__call__, set()

            def call(self, *args, **kwargs):
                if self in prepared:
                    return self.rewrite()(*args, **kwargs)
                prepared.add(self)
                return own(self, *args, **kwargs)

            patch.setattr(InterpretedFunction, "__call__", call)
        yield


def truth(logits: list[Tensor], target: Tensor, label_smoothing: float, upstream: Tensor):
    """Losses, confidence, correctness and gradients by PyTorch in float64."""
    exits = [z.double().requires_grad_() for z in logits]
    options = {"reduction": "none", "label_smoothing": label_smoothing, "ignore_index": IGNORED}
    losses = torch.stack([F.cross_entropy(z, target, **options) for z in exits])
    gradients = torch.autograd.grad(losses, exits, upstream.double())
    ignored = target == IGNORED
    gradients = [d.masked_fill(ignored[:, None], 0) for d in gradients]  # PyTorch's may be NaN
    confidence = torch.stack([z.softmax(1).amax(1) for z in exits])
    correct = torch.stack([z.argmax(1) == target for z in exits])
    return losses.masked_fill(ignored, 0).detach(), confidence.detach(), correct, gradients


def check(logits: list[Tensor], target: Tensor, label_smoothing: float = 0.0) -> None:
    upstream = torch.randn(len(target), len(logits)).t()  # differs by row and exit
    losses, confidence, correct, peak, scale, _ = kernel_forward(
        "triton", logits, target, IGNORED, label_smoothing, False
    )
    assert torch.equal(scale.nan_to_num(), confidence.nan_to_num())
    assert scale.data_ptr() != confidence.data_ptr()
    gradients = kernel_backward(
        "triton", logits, target, IGNORED, label_smoothing, peak, scale, upstream, False
    )
    moved = [torch.randn(z.shape).to(z.dtype) for z in logits]
    products = kernel_tangent(
        "triton", logits, target, IGNORED, label_smoothing, peak, scale, moved
    )
    expected = truth(logits, target, label_smoothing, upstream)
    # Some ten float32 operations, each within 6e-8 of values whose size is that of the result.
    close = {"rtol": 1e-6, "atol": 1e-6, "equal_nan": True}
    torch.testing.assert_close(losses.double(), expected[0], **close)
    torch.testing.assert_close(confidence.double(), expected[1], **close)
    assert torch.equal(correct, expected[2])
    for dl, dz, dl_dz, g in zip(products, moved, expected[3], upstream, strict=True):
        terms = dl_dz * dz.double() / g.double()[:, None]
        size = terms.abs().sum(1) + 2 * dz.double().abs().amax(1)  # that of what is added up
        error = (dl - terms.sum(1)).abs()
        assert torch.equal(error.isnan(), size.isnan())
        assert (error.nan_to_num() <= 1e-6 * size.nan_to_num(1)).all()
    assert losses.dtype == confidence.dtype == peak.dtype == torch.float32
    for z, ours, theirs, g in zip(logits, gradients, expected[3], upstream, strict=True):
        assert ours.dtype == z.dtype
        # p - q, of size at most 1, is float32 and times g; then one rounding to the dtype of the
        # logits: half a unit in the last place, and half the spacing of the subnormal numbers. To
        # bfloat16 the interpreter truncates, where a GPU rounds to nearest: a whole unit.
        info = torch.finfo(z.dtype)
        unit = info.eps * (1 if z.dtype == torch.bfloat16 else 0.5)
        rounding = unit * (theirs.abs() + info.smallest_normal)
        error = (ours.double() - theirs).abs()
        assert torch.equal(error.isnan(), theirs.isnan())
        assert (error.nan_to_num() <= rounding.nan_to_num() + 5e-7 * g.abs()[:, None]).all()


def draw(sizes: tuple[int, ...], dtype=torch.float32, num_rows: int = 7):
    """Logits whose rows are sure, unsure and tied; a target that is ignored, first or last."""
    exits = [4 * torch.randn(num_rows, size) for size in sizes]
    target = torch.randint(min(sizes), (num_rows,))
    target[:3] = torch.tensor([min(sizes) - 1, IGNORED, 0])
    for z in exits:
        z[0, target[0]] = 10  # p - 1 is small where p is near 1: rounding p first would show
        z[3, :] = z[3].round()
        z[3, target[3] :] = z[3].max()  # ties: the target is the first, later the second of them
        z[4, target[4] // 2] = z[4, target[4]] = 20
    return [z.to(dtype) for z in exits], target


@pytest.fixture(params=["shipped", "small"])
def blocks(request, monkeypatch) -> None:
    """The configuration that ships, and one whose blocks are so small that rows cross them."""
    if request.param == "small":
        ship = implementations.configuration
        small = {"ROWS": 2, "BLOCK": 8}
        monkeypatch.setattr(implementations, "configuration", lambda *args: ship(*args) | small)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("sizes", [(5, 19), (16, 16), (1,), (24,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_float64(dtype, sizes, label_smoothing, blocks) -> None:
    check(*draw(sizes, dtype, num_rows=5), label_smoothing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_targets_may_lie_anywhere(dtype, blocks) -> None:
    (plain, *_), target = draw((16, 16), dtype, num_rows=5)
    apart = plain.new_zeros(5, 40)[:, 3:19].copy_(plain)
    transposed = plain.new_zeros(16, 5).t().copy_(plain)
    expanded = plain[:1].expand(5, 16)
    check([plain, apart, transposed, expanded], torch.cat([target[:1], target])[1:])
    check([plain.view(-1)[1:-15].view(4, 16)], target[1:])
    check([plain[::2]], target[::2])


def test_rows_beyond_two_to_the_31_elements() -> None:
    distance = 2**31 + 5
    rows = torch.empty(distance + 3, dtype=torch.bfloat16).as_strided((2, 3), (distance, 1))
    rows.copy_(torch.randn(2, 3))  # nothing else of these 4 GiB is ever touched
    check([rows], torch.tensor([1, 2]))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_large_logits_lose_nothing(label_smoothing, blocks) -> None:
    (z,), target = draw((21,), num_rows=5)
    check([z + 10_000, z - 10_000], target, label_smoothing)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_infinite_logits_are_those_of_pytorch(label_smoothing, blocks) -> None:
    (z,), target = draw((21,))
    first_block, everything, infinite, impossible = (z.clone() for _ in range(4))
    first_block[:, :9] = -INF
    everything[5] = -INF
    infinite[6, 3] = INF
    impossible[5, target[5]] = -INF
    target[4] = 20
    check([first_block, impossible], target, label_smoothing)
    # Without probabilities there is no prediction: only there argmax is no guide.
    logits = [everything, infinite]
    losses, confidence, correct, *_ = kernel_forward("triton", logits, target, IGNORED, 0.1, False)
    for row, k in [(5, 0), (6, 1)]:
        assert losses[k, row].isnan()
        assert confidence[k, row].isnan()
        assert not correct[k, row]


def test_nan_stays_in_its_row_and_out_of_ignored_rows(blocks) -> None:
    (z,), target = draw((21,))
    z[1, 2] = z[5, 20] = float("nan")
    losses, confidence, correct, peak, scale, _ = kernel_forward(
        "triton", [z], target, IGNORED, 0.1, False
    )
    (gradient,) = kernel_backward(
        "triton", [z], target, IGNORED, 0.1, peak, scale, torch.ones(1, 7), False
    )
    others = torch.arange(7) != 5
    assert losses[0, 5].isnan()
    assert confidence[0, 5].isnan()
    assert gradient[5].isnan().all()
    assert not correct[0, 5]
    assert not losses[0, others].isnan().any()
    assert not gradient[others].isnan().any()
    assert losses[0, 1] == 0
    assert not correct[0, 1]
    assert (gradient[1] == 0).all()
    (product,) = kernel_tangent(
        "triton", [z], target, IGNORED, 0.1, peak, scale, [torch.ones_like(z)]
    )
    assert product[5].isnan()
    assert not product[others].isnan().any()
    assert product[1] == 0


def test_a_target_out_of_range_gives_nan() -> None:
    losses, _, correct, *_ = kernel_forward(
        "triton", [torch.zeros(3, 2)], torch.tensor([2, -1, 1]), IGNORED, 0.0, False
    )
    assert losses.isnan().tolist() == [[True, True, False]]
    assert not correct.any()


@pytest.mark.parametrize("form", ["list", "stacked", "classes differ"])
def test_through_the_public_function(form) -> None:
    """First derivatives by the kernels, all others by plain operations."""
    exits = [torch.randn(7, c) for c in (5, 9 if form == "classes differ" else 5)]
    leaves = [z.requires_grad_() for z in exits]
    target = torch.tensor([0, 4, -100, 2, 1, 3, 0])
    logits = torch.stack(leaves) if form == "stacked" else leaves
    upstream = torch.rand(7, 2)
    load_forward_mode()
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(z.detach(), torch.randn_like(z)) for z in leaves]
        duals = torch.stack(duals) if form == "stacked" else duals
        moved = [
            forward_ad.unpack_dual(exit_cross_entropy(duals, target, impl=impl).losses).tangent
            for impl in ("triton", "reference")
        ]
        torch.testing.assert_close(*moved)
    ours = exit_cross_entropy(logits, target, impl="triton")
    theirs = exit_cross_entropy(logits, target, impl="reference")
    torch.testing.assert_close(ours.losses, theirs.losses)
    torch.testing.assert_close(ours.confidence, theirs.confidence)
    assert torch.equal(ours.correct, theirs.correct)
    for options in ({}, {"create_graph": True}):
        first, other = (
            torch.autograd.grad(each.losses, leaves, upstream, retain_graph=True, **options)
            for each in (ours, theirs)
        )
        torch.testing.assert_close(first, other)
    second, other = (
        torch.autograd.grad(sum(g.square().sum() for g in each), leaves) for each in (first, other)
    )
    torch.testing.assert_close(second, other)


def test_exits_of_one_head(monkeypatch) -> None:
    monkeypatch.setattr("reweight._kernels.linear.choose_linear", lambda hidden: "triton")
    hidden = [torch.randn(7, 4, requires_grad=True) for _ in range(2)]
    weight = torch.randn(9, 4, requires_grad=True)
    target = torch.tensor([0, 4, -100, 2, 1, 8, 0])
    ours = linear_exit_cross_entropy(hidden, weight, target).losses
    theirs = exit_cross_entropy([h @ weight.t() for h in hidden], target, impl="reference").losses
    torch.testing.assert_close(ours, theirs)
    upstream = torch.rand(7, 2)
    mine, other = (torch.autograd.grad(y, [*hidden, weight], upstream) for y in (ours, theirs))
    torch.testing.assert_close(mine, other)
