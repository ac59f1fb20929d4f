"""What logits and a target must be, said by the errors of what takes them."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from reweight import MetaReweightStep, SampleReweighter, exit_cross_entropy
from reweight._targets import classes_of, exits_of


@pytest.mark.parametrize(
    ("logits", "target", "error", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), ValueError, r"`target` must lie in 0..2.*got 3"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), ValueError, r"got -1"),
        (torch.zeros(2, 3), torch.tensor([0, 1, 1]), ValueError, r"\[3, 'C'\], got \[2, 3\]"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), ValueError, "at least one sample"),
        ([torch.zeros(2, 3), torch.zeros(3, 3)], torch.tensor([0, 1]), ValueError, "exit 2"),
        ([], torch.tensor([0, 1]), TypeError, "Pass `exits=`"),
        ({"logits": 1}, torch.tensor([0, 1]), TypeError, r"got a dict\(logits=int\)"),
        (torch.zeros(()), torch.tensor([0]), ValueError, "exit 1"),
        (
            torch.zeros(2, 3),
            torch.tensor([0.0, 1.0]),
            TypeError,
            r"int64 tensor, or .* got a tensor of",
        ),
        (torch.zeros(2, 3), [0, 1], TypeError, "got list"),
        (None, torch.tensor([0]), TypeError, "got NoneType"),
        (torch.zeros(0, 4, 3), torch.zeros(4).long(), ValueError, r"\[4, 'C'\], got \[0, 4, 3\]"),
        (torch.zeros(2, 3).long(), torch.tensor([0, 1]), TypeError, "floating point"),
    ],
)
def test_bad_input_is_named(logits, target, error, message) -> None:
    with pytest.raises(error, match=message):
        exit_cross_entropy(logits, target)


@pytest.mark.parametrize("form", ["list", "stacked", "single"])
@pytest.mark.parametrize("tokens", [False, True])
def test_exits_and_rows_whatever_the_form(form: str, tokens: bool) -> None:
    shape = (2, 3) if tokens else (6,)
    exits = [torch.randn(*shape, 5) for _ in range(1 if form == "single" else 2)]
    target = torch.randint(5, shape)
    target.view(-1)[4] = -100
    given = {"list": exits, "stacked": torch.stack(exits), "single": exits[0]}[form]
    assert all(map(torch.equal, exits_of("logits", given, target), exits))
    classes, valid, ignore = classes_of(target, -100, [5])
    assert torch.equal(classes, target.flatten())
    assert valid.tolist() == [True] * 4 + [False, True]
    assert ignore == -100
    classes, valid, ignore = classes_of(target.clamp(min=0), 7, [5])
    assert valid.all()
    assert ignore is None  # it is no class, so that no class needs to be told from it


class TestWhereTheClassesAre:
    """Second in PyTorch, last here."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("form", ["list", "stacked", "single"])
    def test_dense_logits_are_those_of_pytorch(self, form: str, dtype) -> None:
        exits = [torch.randn(4, 5, 3, 2, dtype=dtype) for _ in range(1 if form == "single" else 2)]
        target = torch.randint(5, (4, 3, 2))
        given = {"list": exits, "stacked": torch.stack(exits), "single": exits[0]}[form]
        found = exit_cross_entropy(given, target, class_dim=1).losses
        wanted = [cross_entropy(z, target, reduction="none").flatten() for z in exits]
        torch.testing.assert_close(found, torch.stack(wanted, 1))
        soft = torch.randn(4, 5, 3, 2, dtype=dtype).softmax(1)
        found = exit_cross_entropy(given, soft, class_dim=1).losses
        wanted = [cross_entropy(z, soft, reduction="none").flatten() for z in exits]
        torch.testing.assert_close(found, torch.stack(wanted, 1))

    def test_the_message_says_how(self) -> None:
        with pytest.raises(ValueError, match=r"class_dim=1, or logits\.movedim\(1, -1\)"):
            exit_cross_entropy(torch.randn(4, 5, 8, 8), torch.randint(5, (4, 8, 8)))

    def test_two_readings_are_refused(self) -> None:
        logits, target = torch.randn(2, 6, 6), torch.randint(6, (2, 6))
        with pytest.raises(ValueError, match="can be read in two ways"):
            exit_cross_entropy(logits, target)
        for class_dim, wanted in ((1, logits), (-1, logits.transpose(1, 2))):
            found = exit_cross_entropy(logits, target, class_dim=class_dim).losses[:, 0]
            expected = cross_entropy(wanted, target, reduction="none").flatten()
            torch.testing.assert_close(found, expected)

    def test_a_step_knows_it_after_its_first_batch(self) -> None:
        """Sequences that happen to be as long as there are classes end no training."""
        model = torch.nn.Linear(4, 6)
        step = MetaReweightStep(model, torch.optim.SGD(model.parameters(), lr=0.1), _one_exit())
        square = torch.randn(2, 6, 4), torch.randint(6, (2, 6))
        with pytest.raises(ValueError, match="can be read in two ways"):
            step.backward(square, square)
        longer = torch.randn(2, 7, 4), torch.randint(6, (2, 7))
        step.backward(longer, longer)
        found = step.backward(square, square).losses.losses
        wanted = exit_cross_entropy(model(square[0]), square[1], class_dim=-1).losses
        torch.testing.assert_close(found, wanted)


def _one_exit() -> SampleReweighter:
    return SampleReweighter(num_exits=1)


class TestProbabilities:
    @pytest.mark.parametrize(
        ("rows", "total"),
        [
            ([[1.0, 1, 0], [0, 1, 0]], "2"),
            ([[0.0, 0, 0], [0, 1, 0]], "0"),
            ([[2.0, -1, 0]] * 2, "1"),
        ],
        ids=["several labels", "none", "negative"],
    )
    def test_rows_that_are_none_are_refused(self, rows, total: str) -> None:
        message = rf"row that sums to {total}\. .*binary_cross_entropy_with_logits"
        with pytest.raises(ValueError, match=message):
            exit_cross_entropy(torch.zeros(2, 3), torch.tensor(rows))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_rounding_is_no_reason(self, dtype) -> None:
        soft = (3 * torch.randn(64, 1000)).softmax(1).to(dtype)
        assert exit_cross_entropy(torch.zeros(64, 1000), soft).losses.isfinite().all()

    def test_other_devices_are_not_asked(self) -> None:
        """Where the meta device would complain of a wait."""
        logits, soft = (torch.empty(2, 3, device="meta") for _ in "ab")
        assert exit_cross_entropy(logits, soft).losses.shape == (2, 1)
