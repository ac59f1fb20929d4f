"""Calls of ``torch.autograd.Function``, which no mode of PyTorch's sees."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import _SingleLevelFunction

from reweight._passes.operations import have_tangents, is_continuous


@contextmanager
def applied_by(handler: Callable[[Any, Callable[..., Any], Any], Any]) -> Iterator[None]:
    """Within, dual numbers go to ``handler(function, apply, args)`` in place of ``apply(*args)``.

    ``Function.apply`` finds the ``apply`` of its base class at every call, so that functions that
    were bound before are seen as well. Other threads' calls are left alone.
    """
    thread = threading.get_ident()

    def apply(function: Any, *args: Any, **kwargs: Any) -> Any:
        original = super(_SingleLevelFunction, function).apply
        if threading.get_ident() != thread:
            return original(*args, **kwargs)
        if not torch.is_grad_enabled():  # no tangent where there is no gradient
            args = tuple(each.detach() if is_continuous(each) else each for each in args)
        if not have_tangents(args):
            return original(*args, **kwargs)
        return handler(function, original, args)

    base: Any = _SingleLevelFunction  # which inherits ``apply`` itself
    base.apply = classmethod(apply)
    try:
        yield
    finally:
        del base.apply
