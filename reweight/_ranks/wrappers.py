"""What a model is wrapped in for several ranks."""

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from reweight._checks import kind
from reweight._ranks.collectives import is_sharded
from reweight._ranks.shards import parameters_of, sharded_modules


def unwrap(model: nn.Module) -> tuple[nn.Module, Any]:
    """The module inside DistributedDataParallel, or the model itself, and its process group.

    The group is that of DistributedDataParallel or of ``fully_shard``, None without either.

    Raises:
        TypeError: the model is spread over processes in another way.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {kind(model)}.")
    wrapper = getattr(model, "_orig_mod", model)  # of torch.compile
    inner, group = model, None
    if isinstance(wrapper, DistributedDataParallel):
        inner, group = wrapper.module, wrapper.process_group
    for module in inner.modules():
        name = type(module).__name__
        if name in _REFUSED and type(module).__module__.startswith("torch."):
            raise TypeError(
                f"`model` must not hold {name}, which forwards at other parameters would not "
                f"leave alone. {_REMEDY}"
            )
    parameters: dict[str, Any] = parameters_of(inner)
    sharded = {name: p for name, p in parameters.items() if is_sharded(p)}
    if not sharded:
        return inner, group
    mesh = next(iter(sharded.values())).device_mesh
    by_fsdp = inner is model and sharded_modules(inner)
    covers = mesh.ndim == 1 or mesh.size() == dist.get_world_size()
    for name, parameter in [*sharded.items(), *parameters.items()]:
        if name in sharded:
            # Of the dimensions of its mesh, fully_shard shards the last and copies over others.
            copied = all(placement.is_replicate() for placement in parameter.placements[:-1])
            fits = by_fsdp and covers and copied and parameter.device_mesh == mesh
        else:
            fits = not parameter.requires_grad  # or else nobody adds up its gradient
        if not fits:
            raise TypeError(
                "`model` must have all trainable parameters sharded by fully_shard over one mesh, "
                f"or none, got {name} as an exception. {_REMEDY}"
            )
    return inner, mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD


def is_unsettled(model: nn.Module) -> bool:
    """Whether a static graph is yet to be learnt, from one forward and its one backward."""
    wrapper = getattr(model, "_orig_mod", model)
    return bool(
        getattr(wrapper, "static_graph", False)
        and not getattr(wrapper, "_static_graph_delay_allreduce_enqueued", False)
    )


def averages(model: nn.Module) -> bool:
    """Whether a backward leaves gradients that are averaged over the ranks: not in ``no_sync``."""
    return getattr(getattr(model, "_orig_mod", model), "require_backward_grad_sync", True)


_REMEDY = (
    "Tensor parallelism and pipelines are not supported; wrap the whole model in "
    "torch.nn.parallel.DistributedDataParallel, or call fully_shard on it."
)
_REFUSED = ("DistributedDataParallel", "FullyShardedDataParallel", "Pipe")
