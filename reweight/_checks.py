"""What an argument must be: each check raises an error that names it, what came and what to do."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

from torch import Tensor


def kind(value: Any) -> str:
    """What a value is, in words; a class is not one of its instances."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless the value of the argument is one of the choices."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")


def check_whole(name: str, value: Any) -> None:
    """Raise TypeError unless the value of the argument is a whole number, ValueError below 1."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a whole number, got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


def check_number(name: str, value: Any) -> None:
    """Raise TypeError unless the value of the argument is a number, ValueError if not finite."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}.")


def check_positive(name: str, value: Any) -> None:
    """The same, and ValueError unless it is positive."""
    check_number(name, value)
    if value <= 0:
        raise ValueError(f"`{name}` must be positive, got {value}.")


def check_scale(name: str, value: Any) -> None:
    """The same, or a tensor of one number, which is not looked at: that would wait for a device."""
    if not isinstance(value, Tensor):
        check_positive(name, value)
    elif value.numel() != 1:
        raise ValueError(f"`{name}` must be one number, got a tensor {list(value.shape)}.")


def check_share(name: str, value: Any) -> None:
    """The same as of a number, and ValueError unless it lies in [0, 1]."""
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` must lie in [0, 1], got {value}.")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless the value of the argument is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")


def check_function(name: str, value: Callable[..., Any] | None, signature: str) -> None:
    """Raise TypeError unless it can be called, or is None; a class would make, not compute."""
    if value is not None and (not callable(value) or isinstance(value, type)):
        remedy = f" Pass an instance: {value.__name__}()." if isinstance(value, type) else ""
        got = kind(value) if isinstance(value, type) else repr(value)
        raise TypeError(f"`{name}` must be a function, {signature}, got {got}.{remedy}")


@contextmanager
def noted(note: Callable[[], str]) -> Iterator[None]:
    """Adds to an error from within what the note says."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(note())
        raise
