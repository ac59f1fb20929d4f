"""Each exit as a program of its own, with the parameters that it needs and no others.

A program is what ``torch.export.save`` writes, and what AOTInductor, ONNX and ExecuTorch read.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

__all__ = ["export_exits"]


def export_exits(model: nn.Module, inputs: Tensor) -> list[ExportedProgram]:
    """One program for each exit: inputs [B, ...] to the logits of this exit, for any B.

    What the exit does not read is not in its program: later stages, other exits, features that
    only later stages read, and their parameters.

    Args:
        model: returns the logits of K exits as a list or tuple; in evaluation mode.
        inputs: an example of at least two samples; their other dimensions stay fixed.

    Raises:
        ValueError: the model is in training mode, or there are fewer than two samples.
    """
    if model.training:
        raise ValueError("model must be in evaluation mode: call model.eval() first")
    if len(inputs) < 2:
        raise ValueError(f"inputs must hold two samples or more, got shape {list(inputs.shape)}")
    with torch.no_grad():
        num_exits = len(model(inputs))
    return [_export(_pruned(_export(_OneExit(model, k), inputs)), inputs) for k in range(num_exits)]


class _OneExit(nn.Module):
    def __init__(self, model: nn.Module, k: int) -> None:
        super().__init__()
        self.model, self.k = model, k

    def forward(self, x: Tensor) -> Any:
        return self.model(x)[self.k]


def _export(model: nn.Module, inputs: Tensor) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (inputs,), dynamic_shapes=({0: Dim("batch")},))


def _pruned(program: ExportedProgram) -> GraphModule:
    """Its computation as a module without what the result does not depend on."""
    module = program.module()
    assert isinstance(module, GraphModule)
    module.graph.eliminate_dead_code()
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, _ in tensors:
        if name not in used:
            owner, _, attribute = name.rpartition(".")
            delattr(module.get_submodule(owner), attribute)
    module.recompile()
    return module
