"""Each check lets through what it should, and names the argument, what was expected, what came."""

import numpy as np
import pytest
import torch

from reweight import _checks


class Thing:
    pass


@pytest.mark.parametrize(
    ("check", "value"),
    [
        ("whole", 1),
        ("whole", np.int64(3)),
        ("number", -2.5),
        ("number", np.float32(1)),
        ("positive", 1e-9),
        ("scale", torch.ones(1)),
        ("scale", 0.5),
        ("share", 0),
        ("share", 1.0),
        ("flag", False),
    ],
)
def test_what_fits_passes(check: str, value: object) -> None:
    assert getattr(_checks, f"check_{check}")("name", value) is None


@pytest.mark.parametrize(
    ("check", "value", "error", "message"),
    [
        ("whole", 2.0, TypeError, r"`name` must be a whole number, got 2\.0\."),
        ("whole", True, TypeError, "a whole number, got True"),
        ("whole", 0, ValueError, "`name` must be at least 1, got 0"),
        ("number", "1", TypeError, "`name` must be a number, got '1'"),
        ("number", False, TypeError, "a number, got False"),
        ("number", torch.ones(1), TypeError, "a number, got tensor"),
        ("number", float("nan"), ValueError, "`name` must be finite, got nan"),
        ("number", float("inf"), ValueError, "finite, got inf"),
        ("positive", 0, ValueError, "`name` must be positive, got 0"),
        ("positive", float("inf"), ValueError, "finite"),
        ("positive", None, TypeError, "a number, got None"),
        ("scale", torch.ones(2), ValueError, r"`name` must be one number, got a tensor \[2\]"),
        ("scale", 0, ValueError, "`name` must be positive, got 0"),
        ("share", 1.5, ValueError, r"`name` must lie in \[0, 1\], got 1\.5"),
        ("share", -0.1, ValueError, "must lie in"),
        ("flag", 1, TypeError, "`name` must be True or False, got 1"),
    ],
)
def test_what_does_not_fit_is_named(check: str, value: object, error, message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(_checks, f"check_{check}")("name", value)


def test_a_choice_is_one_of_those_listed() -> None:
    _checks.check_choice("form", "tanh", ("tanh", "sigmoid"))
    with pytest.raises(ValueError, match="`form` must be one of tanh, sigmoid, got 'relu'"):
        _checks.check_choice("form", "relu", ("tanh", "sigmoid"))


def test_a_function_can_be_called_and_a_class_is_none() -> None:
    for value in (None, len, lambda x: x, torch.nn.Linear(1, 1)):
        _checks.check_function("loss", value, "x → y")
    with pytest.raises(TypeError, match=r"`loss` must be a function, x → y, got 3\.$"):
        _checks.check_function("loss", 3, "x → y")
    with pytest.raises(TypeError, match=r"got the class Thing\. Pass an instance: Thing\(\)\."):
        _checks.check_function("loss", Thing, "x → y")


def test_a_class_is_told_from_its_instances() -> None:
    assert _checks.kind(Thing()) == "Thing"
    assert _checks.kind(Thing) == "the class Thing"
