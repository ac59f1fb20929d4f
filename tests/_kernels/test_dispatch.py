"""Which implementation of cross-entropy computes what."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from reweight import exit_cross_entropy
from reweight._kernels import dispatch
from reweight._kernels.dispatch import choose, choose_linear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"impl": "fast"}, "`impl` must be one of"),
        ({"impl": "torch", "target": torch.rand(4, 3)}, "'auto' or 'reference'"),
        (
            {"impl": "triton", "label_smoothing": 0.1, "class_weight": torch.ones(3)},
            "'auto' or 'reference'",
        ),
        ({"impl": "triton", "logits": torch.zeros(4, 3).double()}, "one dtype"),
        ({"impl": "triton"}, "on one GPU"),
    ],
)
def test_implementations_say_what_they_cannot_do(options, message) -> None:
    arguments = {"logits": torch.zeros(4, 3), "target": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        exit_cross_entropy(**(arguments | options))


EXITS = [torch.randn(4, 3), torch.randn(4, 3)]
LARGE = [torch.randn(4, 2**14), torch.randn(4, 2**14)]
CLASSES, PROBABILITIES = torch.tensor([0, 1, 2, 0]), torch.full((4, 3), 1 / 3)
WEIGHT = torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("auto", LARGE, CLASSES, 0.0, None), "torch"),
        (("auto", LARGE, CLASSES, 0.1, None), "torch"),
        (("auto", LARGE, CLASSES, 0.0, torch.ones(2**14)), "torch"),
        (("auto", EXITS, CLASSES, 0.0, None), "reference"),  # calls cost more than what they do
        (("auto", [*EXITS, torch.randn(4, 5)], CLASSES, 0.0, None), "torch"),
        (("torch", EXITS, CLASSES, 0.1, None), "torch"),
        (("reference", EXITS, CLASSES, 0.0, None), "reference"),
        # What the kernels do not compute.
        (("auto", EXITS, PROBABILITIES, 0.0, None), "reference"),
        (("auto", EXITS, CLASSES, 0.1, WEIGHT), "reference"),
    ],
)
def test_kernels_are_chosen_where_they_fit(arguments, expected: str) -> None:
    assert choose(*arguments) == expected


def test_who_looks_on_gets_plain_operations() -> None:
    """Compilers, tracers and transforms: of a kernel they would see nothing, or too little."""
    seen = []

    def look(z: torch.Tensor) -> torch.Tensor:
        seen.append(choose("auto", [z], CLASSES, 0.0, None))
        return z

    for run in (
        torch.func.grad(lambda z: look(z).sum()),
        make_fx(look),
        make_fx(look, tracing_mode="fake"),
    ):
        run(LARGE[0])
    assert seen == ["reference"] * 3
    look(LARGE[0])
    assert seen[-1] == "torch"


def test_linear_takes_triton_only_on_a_gpu(monkeypatch) -> None:
    assert choose_linear(EXITS) == "torch"
    elsewhere = [z.to("meta") for z in EXITS]
    for fits, expected in ((True, "triton"), (False, "torch")):
        monkeypatch.setattr(dispatch, "_fits_triton", lambda hidden, fits=fits: fits)
        assert choose_linear(elsewhere) == expected
        assert choose_linear(EXITS) == "torch"
