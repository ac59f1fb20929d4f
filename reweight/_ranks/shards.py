"""Models sharded by FSDP2 (``fully_shard``): other parameters in place, and their tangents.

Between passes a parameter is a DTensor, of which this rank holds a shard; the hooks of
``fully_shard`` gather it when its module runs and let go of it afterwards. So other parameters are
put in place as shards, and the gathered parameters get their tangents while they are there.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from reweight._ranks.collectives import is_sharded, local
from reweight._structure import Structure, structure_of


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, or a plain one as it is."""
    result: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return result


def num_copies(tensor: Any) -> int:
    """How many ranks hold the same shard as this one; 0 of a plain tensor."""
    if not is_sharded(tensor):
        return 0
    mesh = tensor.device_mesh
    sizes = [mesh.size(d) for d, place in enumerate(tensor.placements) if place.is_replicate()]
    return math.prod(sizes)


def shard_like(tensor: Any, part: Any) -> Any:
    """This rank's shard of what is sharded as the tensor is; numbers and plain ones as they are."""
    if not is_sharded(tensor) or not isinstance(part, Tensor) or part.dim() == 0:
        return part
    return type(tensor).from_local(
        part,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def sharded_modules(model: nn.Module) -> list[Any]:
    """Those on which ``fully_shard`` was called."""
    return _sharded(structure_of(model)) if "torch.distributed.fsdp" in sys.modules else []


def _sharded(structure: Structure) -> list[Any]:
    loaded = sys.modules.get("torch.distributed.fsdp")
    if loaded is None:
        return []
    return [module for module in structure.modules if isinstance(module, loaded.FSDPModule)]


@contextmanager
def begin_anew(model: nn.Module) -> Iterator[None]:
    """If what is within fails, what FSDP keeps of it, gathered parameters first, is let go of."""
    try:
        yield
    except BaseException:
        _let_go(model)
        raise


def _let_go(model: nn.Module) -> None:
    for parameter in _state_of_parameters(model):
        if hasattr(parameter, "_unsharded_param"):
            parameter._unsharded_param.grad = None
    modules = sharded_modules(model)
    inner = {each for module in modules for each in module.modules() if each is not module}
    for module in modules:
        if module not in inner and hasattr(module, "reset_iter_state"):  # not in 2.6
            module.reset_iter_state()


def require_reduced(model: nn.Module) -> None:
    """Raise ValueError if a backward would not leave all gradients, of all ranks, in ``.grad``."""
    groups = list(_groups(model))
    reduced = all(group.reduce_grads for group in groups)
    for parameter in (parameter for group in groups for parameter in group.fsdp_params):
        gathered = getattr(parameter, "_unsharded_param", None)
        waits = gathered is not None and gathered.grad is not None
        reduced = reduced and not waits and parameter.unsharded_accumulated_grad is None
    if not reduced:
        raise ValueError(
            "`model` must reduce its gradients in every backward around an update of the "
            "reweighter. Leave set_requires_gradient_sync(False) away: gradients are then "
            "accumulated as shards."
        )


def _groups(model: nn.Module) -> Iterator[Any]:
    """What FSDP knows of the parameters that it gathers together; it has no public name."""
    for module in sharded_modules(model):
        state = module._get_fsdp_state()
        found = getattr(state, "_fsdp_param_groups", None)  # not in 2.6
        yield from found if found is not None else filter(None, [state._fsdp_param_group])


def _state_of_parameters(model: nn.Module) -> list[Any]:
    return [parameter for group in _groups(model) for parameter in group.fsdp_params]


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """All of them by name, as the optimizer holds them: what was gathered is let go of."""
    structure = structure_of(model)
    gathered = _sharded(structure)
    for module in gathered:
        module.reshard()
    return structure_of(model).parameters if gathered else structure.parameters


@contextmanager
def placed(
    model: nn.Module, parameters: Mapping[str, Tensor], tangents: Mapping[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Sharded parameters at these values by name, and with these tangents; bitwise back afterwards.

    Gives back the rest, dual where there is a tangent, which the caller has to put in place. As
    with plain tensors, the forward makes a graph only for shards that require a gradient.
    """
    rest = {
        name: forward_ad.make_dual(value, tangents[name]) if name in tangents else value
        for name, value in parameters.items()
        if not is_sharded(value)
    }
    if len(rest) == len(parameters):
        yield rest
        return
    ours = parameters_of(model)
    values = {name: local(value) for name, value in parameters.items() if name not in rest}
    shards = {name: local(ours[name]) for name in values}
    before = {
        name: shard.clone() for name, shard in shards.items() if not shard.is_set_to(values[name])
    }
    constants = {
        id(ours[name]): tangents.get(name) for name in values if not parameters[name].requires_grad
    }
    places = {
        (module, name): constants[id(parameter)]
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in constants
    }
    with ExitStack() as stack:
        for module in sharded_modules(model):
            stack.enter_context(_hooks(module, places))
        try:
            for name in before:
                shards[name].copy_(values[name])
            yield rest
        finally:
            parameters_of(model)
            for name, value in before.items():
                shards[name].copy_(value)


@contextmanager
def _hooks(module: Any, places: dict[tuple[nn.Module, str], Tensor | None]) -> Iterator[None]:
    """Gathered parameters in these places are constants, or dual numbers, while the module runs."""
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    unseen = ExitStack()  # what FSDP does itself is no part of the model, for modes that look on

    def before_gathering(*_: Any) -> None:
        unseen.enter_context(torch._C.DisableTorchFunction())

    def after_gathering(*_: Any) -> None:
        for inner in module.modules():
            for name, parameter in inner._parameters.items():
                if type(parameter) is not nn.Parameter or (inner, name) not in places:
                    continue
                value, tangent = parameter.detach(), places[inner, name]
                if tangent is not None:
                    with torch.no_grad():
                        direction = whole(tangent).to(value.dtype)
                    value = forward_ad.make_dual(value, direction)
                replaced.append((inner, name, parameter))
                inner._parameters[name] = value
        unseen.close()

    def before_letting_go(*_: Any) -> None:
        for inner, name, parameter in replaced:
            inner._parameters[name] = parameter
        replaced.clear()
        before_gathering()

    def after_letting_go(*_: Any) -> None:
        unseen.close()

    handles = [
        module.register_forward_pre_hook(before_gathering, prepend=True),
        module.register_forward_pre_hook(after_gathering),
        module.register_forward_hook(before_letting_go, prepend=True, always_call=True),
        module.register_forward_hook(after_letting_go, always_call=True),
    ]
    try:
        yield
    finally:
        unseen.close()
        for handle in handles:
            handle.remove()
