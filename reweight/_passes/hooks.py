"""Hooks of parameters: one that changes the gradient is part of the step, one that looks is not."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from reweight._ranks.collectives import is_sharded, num_ranks
from reweight._structure import structure_of

Hook = Callable[[Tensor], Tensor | None]


class HookChangesError(Exception):
    """A hook has changed a gradient that was not known to, after a look-ahead without it."""


class GradientHooks:
    """The hooks that ``Tensor.register_hook`` has put on the parameters of a model.

    Loggers are to see the real gradient and no other. So the look-ahead leaves out every hook that
    has not been seen to change a gradient, the real backward watches, and if one does so for the
    first time, the step is made once more. Several ranks would have to agree on that: there the
    look-ahead calls them all.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._changing: set[int] = set()  # by the numbers of their handles, which are unique

    def _hooks(self) -> list[dict[int, Hook]]:
        parameters = structure_of(self._model).parameters.values()
        return [p._backward_hooks for p in parameters if p._backward_hooks]

    @property
    def exist(self) -> bool:
        """Whether there are any."""
        return bool(self._hooks())

    @contextmanager
    def left_out(self, *, will_be_watched: bool) -> Iterator[None]:
        """For a look-ahead, if the real backward after it will be watched."""
        if not will_be_watched or num_ranks() > 1:
            yield
            return
        with self._replaced(lambda key, hook: hook if key in self._changing else _look_away):
            yield

    @contextmanager
    def watched(self, *, was_left_out: bool) -> Iterator[None]:
        """For the real backward.

        Raises:
            HookChangesError: one that was left out changes a gradient.
        """
        before = len(self._changing)
        with self._replaced(self._watching):
            yield
        if was_left_out and len(self._changing) > before and num_ranks() == 1:
            raise HookChangesError

    @contextmanager
    def _replaced(self, by: Callable[[int, Hook], Hook]) -> Iterator[None]:
        own = [(hooks, dict(hooks)) for hooks in self._hooks()]
        for hooks, before in own:
            hooks.update({key: by(key, hook) for key, hook in before.items()})
        try:
            yield
        finally:
            for hooks, before in own:
                hooks.update({key: before[key] for key in before.keys() & hooks.keys()})

    def _watching(self, key: int, hook: Hook) -> Hook:
        if key in self._changing:
            return hook

        def watching(gradient: Tensor) -> Tensor | None:
            version = gradient._version
            result = hook(gradient)
            if (result is not None and result is not gradient) or gradient._version != version:
                self._changing.add(key)
            return result

        return watching


@torch.no_grad()
def through_hooks(
    parameters: Mapping[str, Tensor], tangents: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Back through the hooks that change a parameter's gradient before it reaches U, by name.

    They are taken as linear and symmetric, which masks, factors and projections are: so each is its
    own transpose. Those of a sharded parameter are not called in a backward either.
    """
    found = dict(tangents)
    for name, tangent in tangents.items():
        hooks = parameters[name]._backward_hooks
        if hooks and not is_sharded(parameters[name]):
            for hook in hooks.values():
                tangent = tangent.clone()  # it may be changed in place
                result = hook(tangent)
                tangent = tangent if result is None else result
            found[name] = tangent
    return found


def _look_away(gradient: Tensor) -> None:
    pass
