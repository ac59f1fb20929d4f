"""What logits and a target must be, said by the errors of what takes them."""

import pytest
import torch

from reweight import exit_cross_entropy
from reweight._targets import classes_of, exits_of


@pytest.mark.parametrize(
    ("logits", "target", "error", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), ValueError, r"`target` must lie in 0..2.*got 3"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), ValueError, r"got -1"),
        (torch.zeros(2, 3), torch.tensor([0, 1, 1]), ValueError, r"\[3, 'C'\], got \[2, 3\]"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), ValueError, "at least one sample"),
        ([torch.zeros(2, 3), torch.zeros(3, 3)], torch.tensor([0, 1]), ValueError, "exit 1"),
        ([], torch.tensor([0, 1]), TypeError, "Pass `exits=`"),
        ({"logits": 1}, torch.tensor([0, 1]), TypeError, r"got a dict\(logits=int\)"),
        (torch.zeros(()), torch.tensor([0]), ValueError, "exit 0"),
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
