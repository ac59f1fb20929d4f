"""What a step launches, moves and multiplies, over a plain step, on the path that a GPU takes.

Counted on the CPU below autograd, where each operation arrives once: a launch is an operation that
is no view and allocates no more than memory; its bytes are those of its inputs and outputs, each
read or written once; a product of two numbers is a multiply-add. The cross-entropy of all exits is
what its Triton kernels are, one launch forward, one backward, one in forward mode, optimizers are
those of a GPU (SGD ``foreach``, AdamW ``fused``, which counts its steps there), and nothing is
looked at that a GPU would be waited for. The roofline gives an operation the longest of the three:
its bytes at this bandwidth, its arithmetic at this rate, a launch; the last column has no launches,
as where batches are large.

    python benchmarks/counts.py                                # all nets; writes results/counts.txt
    python benchmarks/counts.py --nets vit --operations 20     # which operations it is that cost
    python benchmarks/counts.py --bandwidth 2e12 --rate 312e12 --launch 4e-6     # another card
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim import Adam
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contestants import CONTESTANTS
from nets import NETS, OPTIMIZERS, Net
from reweight import SampleReweighter
from reweight._kernels import function
from reweight._meta import guarded_step
from reweight._optimizers import entries

RESULTS = Path(__file__).parent / "results" / "counts.txt"
NAMES = ("plain", "ours, forward", "ours, lean", "ours, unrolled", "torchopt Meta*")

aten = torch.ops.aten
_NO_KERNEL = {"_unsafe_view", "_reshape_alias", "lift_fresh", "_local_scalar_dense", "set_"}
_PICKS = {"embedding", "gather", "index", "index_select"}  # read what they return


@dataclass
class Cost:
    """What a number of launches came to: of each operation, launches, bytes, multiply-adds."""

    launches: int = 0
    bytes: int = 0
    multiply_adds: int = 0
    each: Counter[tuple[str, int, int]] = field(default_factory=Counter)

    def add(self, name: str, num_bytes: int, multiply_adds: int) -> None:
        """One launch more."""
        self.launches += 1
        self.bytes += num_bytes
        self.multiply_adds += multiply_adds
        self.each[name, num_bytes, multiply_adds] += 1

    def seconds(self, bandwidth: float, rate: float, launch: float) -> float:
        """The roofline, of bytes and operations a second, and of the seconds of a launch."""
        return sum(
            count * max(num_bytes / bandwidth, 2 * products / rate, launch)
            for (_, num_bytes, products), count in self.each.items()
        )


class Counting(TorchDispatchMode):
    """Adds up what is run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.cost, self._pauses = Cost(), 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation and counts it."""
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not self._pauses and _is_kernel(func, name, result):
            inputs = _tensors((args, kwargs))
            outputs = _tensors(result) or _written(func, args)
            if _overwrites(name):  # what was there is not read
                inputs = inputs[1:]
            read = sum(map(_size, inputs))
            if name in _PICKS:
                read += sum(map(_size, outputs)) - _size(inputs[0])
            written = sum(map(_size, outputs))
            self.cost.add(name, read + written, multiply_adds(name, args, result))
        return result

    def as_one_launch(self, name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, counted as one launch that reads and writes everything once."""

        def run(_: str, *args: Any) -> Any:
            self._pauses += 1
            try:
                result = kernel("torch", *args)
            finally:
                self._pauses -= 1
            self.cost.add(name, sum(map(_size, _tensors((args, result)))), 0)
            return result

        return run


def _is_kernel(func: Any, name: str, result: Any) -> bool:
    is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
    allocates = "empty" in name
    # One of a list or of an optimizer, in place, returns nothing.
    works = bool(_tensors(result)) or name.startswith(("_foreach", "_fused"))
    return works and not (is_view or allocates or name in _NO_KERNEL)


def _written(func: Any, args: Sequence[Any]) -> list[Tensor]:
    pairs = zip(func._schema.arguments, args, strict=False)
    return _tensors([x for a, x in pairs if a.alias_info and a.alias_info.is_write])


def _overwrites(name: str) -> bool:
    return name in ("copy_", "zero_", "fill_", "normal_", "uniform_", "bernoulli_")


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _size(tensor: Tensor) -> int:
    """Bytes; what is expanded is there once."""
    extents = zip(tensor.shape, tensor.stride(), strict=True)
    numbers = math.prod(length for length, stride in extents if stride or length == 0)
    return numbers * tensor.element_size()


def multiply_adds(name: str, args: Sequence[Any], result: Any) -> int:
    """Of an operation; 0 of those that are no products."""
    if name in ("mm", "bmm"):
        return int(args[0].numel() * args[1].shape[-1])
    if name in ("addmm", "addmm_", "baddbmm", "baddbmm_"):
        return int(args[1].numel() * args[2].shape[-1])
    if name == "convolution":
        return int(result.numel() * args[1][0].numel()) if not args[6] else 0
    if name == "convolution_backward":
        each = int(args[0].numel() * args[2][0].numel())
        return each * sum(args[10][:2])
    if "scaled_dot_product" in name:
        backward = "backward" in name
        query, key, value = args[1:4] if backward else args[:3]
        scores = query.numel() // query.shape[-1] * key.shape[-2]
        of_each = query.shape[-1] + value.shape[-1]  # a product for the scores, one for the mixture
        # Backward the scores are made again, and each product has two.
        return int(scores * (2 * of_each + query.shape[-1] if backward else of_each))
    return 0


@contextmanager
def counting() -> Iterator[Cost]:
    """What is run within it, as a GPU would."""
    mode = Counting()
    kernels = [name for name in dir(function) if name.startswith("kernel_")]
    patches = [
        patch.object(function, name, mode.as_one_launch(name, getattr(function, name)))
        for name in kernels
    ]
    patches += [
        patch("reweight.losses.choose", lambda impl, *rest: "triton"),
        # What a GPU is not waited for, and as much as goes through it at once.
        patch("reweight._targets.is_traced", lambda: True),
        patch.object(guarded_step, "_step_if", guarded_step._step_and_undo),
        patch.object(entries, "is_elsewhere", lambda tensor: True),
    ]
    for each in patches:
        each.start()
    try:
        with mode:
            yield mode.cost
    finally:
        for each in patches:
            each.stop()


def cost_of(net: Net, optimizer_name: str, name: str) -> Cost:
    """That of a step of this contestant, after two that set things up."""
    torch.manual_seed(0)
    model = net.build()
    g = SampleReweighter(net.num_exits)
    optimizer = OPTIMIZERS[optimizer_name](model)
    g_optimizer = Adam(g.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)  # the default there
    for group in optimizer.param_groups:
        group["fused" if optimizer_name == "adamw" else "foreach"] = True
    step = CONTESTANTS[name](model, optimizer, g, g_optimizer)
    run = partial(step, net.batch(), net.batch())
    for _ in range(3):
        with counting() as cost:
            run()
    return cost


def table(
    nets: Sequence[str],
    optimizers: Sequence[str],
    names: Sequence[str],
    card: tuple[float, float, float],
) -> Iterator[str]:
    """Line by line."""
    bandwidth, rate, launch = card
    yield (
        f"PyTorch {torch.__version__}; plain step of the same optimizer = 1. Roofline: "
        f"{bandwidth:.3g} bytes and {rate:.3g} operations a second, {launch * 1e6:.3g} µs a launch"
    )
    yield f"{'net':>5}{'':>7}  {'step':<16}{'launches':>9}{'bytes':>7}{'multiply-adds':>15}" + (
        f"{'roofline':>10}{'without launches':>18}"
    )
    for net, optimizer in product(nets, optimizers):
        plain = cost_of(NETS[net], optimizer, "plain")
        yield (
            f"{net:>5}{optimizer:>7}  {'plain':<16}{plain.launches:>9}{plain.bytes / 1e9:>6.2f}G"
            f"{plain.multiply_adds / 1e9:>14.2f}G{plain.seconds(*card) * 1e3:>8.2f}ms"
            f"{plain.seconds(bandwidth, rate, 0) * 1e3:>16.2f}ms"
        )
        for name in names:
            if name == "plain":
                continue
            cost = cost_of(NETS[net], optimizer, name)
            ratios = (
                cost.launches / plain.launches,
                cost.bytes / plain.bytes,
                cost.multiply_adds / plain.multiply_adds,
                cost.seconds(*card) / plain.seconds(*card),
                cost.seconds(bandwidth, rate, 0) / plain.seconds(bandwidth, rate, 0),
            )
            yield f"{net:>5}{optimizer:>7}  {name:<16}" + "".join(
                f"{ratio:>{width}.2f}"
                for ratio, width in zip(ratios, (9, 7, 15, 10, 18), strict=True)
            )


def operations(net: str, optimizer: str, name: str, num: int) -> Iterator[str]:
    """Which operations a step consists of, by bytes, beside those of a plain step."""
    plain, cost = (cost_of(NETS[net], optimizer, each) for each in ("plain", name))
    sums: dict[str, list[int]] = {}
    for k, each in enumerate((cost, plain)):
        for (operation, num_bytes, _), count in each.each.items():
            row = sums.setdefault(operation, [0] * 4)
            row[k] += count
            row[2 + k] += count * num_bytes
    yield f"{net}, {optimizer}, {name}: launches and MB of it, and of a plain step"
    for operation, row in sorted(sums.items(), key=lambda item: -item[1][2])[:num]:
        yield f"  {operation:<48}{row[0]:>6}{row[2] / 1e6:>10.1f}{row[1]:>8}{row[3] / 1e6:>10.1f}"


def main() -> None:
    """Print the table, or what it consists of."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["conv", "vit", "lm"])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--steps", nargs="+", choices=CONTESTANTS, default=list(NAMES))
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes a second")
    parser.add_argument("--rate", type=float, default=989e12, help="bf16 operations a second")
    parser.add_argument("--launch", type=float, default=5e-6, help="seconds of a launch")
    parser.add_argument("--operations", type=int, metavar="N", help="the N costliest of each")
    settings = parser.parse_args()
    if settings.operations:
        for net, optimizer, name in product(settings.nets, settings.optimizers, settings.steps):
            if name != "plain":
                lines = operations(net, optimizer, name, settings.operations)
                print("\n".join(lines), flush=True)
        return
    card = settings.bandwidth, settings.rate, settings.launch
    lines = []
    for line in table(settings.nets, settings.optimizers, settings.steps, card):
        print(line, flush=True)
        lines.append(line)
    if vars(settings) == vars(parser.parse_args([])):
        RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
