"""PyTorch's operations: ``op_db``, its custom operations, functions and higher-order operations."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from databases.called import Called, training_of
from databases.judge import Case
from databases.oracles import Training

MAX_SAMPLES = 4
COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}


def entries() -> Mapping[str, Any]:
    """The differentiable ones, by name."""
    from torch.testing._internal.autograd_function_db import autograd_function_db
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.custom_op_db import custom_op_db
    from torch.testing._internal.hop_db import hop_db

    found = {}
    for prefix, database in (
        ("", op_db),
        ("custom_op ", custom_op_db),
        ("autograd.Function ", autograd_function_db),
        ("higher-order ", hop_db),
    ):
        for op in database:
            if op.supports_autograd:
                variant = f" {op.variant_test_name}" if op.variant_test_name else ""
                found[f"{prefix}{op.name}{variant}"] = op
    return found


def cases(op: Any, dtype: torch.dtype) -> Iterator[Case]:
    """A few of its samples, spread over all that there are."""
    dtype = dtype if op.supports_dtype(dtype, "cpu") else COMPLEX[dtype]
    if not op.supports_dtype(dtype, "cpu"):
        return
    torch.manual_seed(0)
    samples = list(filter(_is_trainable, op.sample_inputs("cpu", dtype, requires_grad=True)))
    for index in spread(len(samples)):
        yield Case(f"sample {index}", partial(_training, op, samples[index]))


def spread(count: int) -> list[int]:
    """A few indices, from the first to the last."""
    last, gaps = count - 1, MAX_SAMPLES - 1
    return sorted({round(i * last / gaps) for i in range(MAX_SAMPLES)}) if count else []


def _is_trainable(sample: Any) -> bool:
    tensors = tree_leaves((sample.input, sample.args, sample.kwargs))
    return any(isinstance(t, Tensor) and t.requires_grad and t.numel() > 0 for t in tensors)


def _training(op: Any, sample: Any, dtype: torch.dtype) -> Training:
    def function(arguments: Any) -> Any:
        input, args, kwargs = arguments
        # As its own gradient tests call it: where there is a gradient, and only what has one.
        output = op.gradcheck_wrapper(op.op, input, *args, **kwargs)
        return sample.output_process_fn_grad(output)

    arguments = (sample.input, sample.args, sample.kwargs)
    return training_of(Called(function, arguments, lambda t: t.requires_grad), dtype)
