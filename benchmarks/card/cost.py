"""What a step costs on a device, in plain steps: ours and the peers', eager and compiled.

Sizes are chosen by the work of a plain step: 1.9, 0.2, 4.3 and 2.3 TFLOP of conv, MSDNet, ViT and
language model, 10 to 20 ms in bfloat16 on an H200 (MSDNet's are its 900 launches), and a quarter
of the samples in float32, whose products are ten times slower. A row's contestants take about 125
plain steps to warm up and to be weighed, and 40 a round: 2.5 s and 0.8 s. Twelve rows of that, and
what the compiler makes in the rest of the time, conv and ViT first.
"""

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.optim import Adam

from card.timing import MOST, Run, Step, medians_by_turns, warm
from contestants import CONTESTANTS, UNSUPPORTED
from msdnet import MSDNet
from nets import OPTIMIZERS, TINY_NETS, Batch, LanguageModel, Net, ViT, images, texts
from peers import PEERS
from reweight import SampleReweighter
from small import MultiExitConvNet

Row = dict[str, Any]

CARD_NETS = {  # as large as one trains them on a card
    "conv": Net(lambda: MultiExitConvNet((3, 32, 32), 10, 5, 64), 5, partial(images, 1024)),
    "vit": Net(lambda: ViT(384, 12), 6, partial(images, 512)),
    "lm": Net(lambda: LanguageModel(32000, 256, 512, 8), 4, partial(texts, 16, 32000, 256)),
    "msdnet": Net(lambda: MSDNet(100), 5, partial(images, 512, 100)),
}
PART = 4  # of the samples, in float32
OURS = [f"ours, {mode}" for mode in ("forward", "lean", "lagged", "interval 10")]
SECONDS = {"sgd": 5.0, "adamw": 3.5}  # of a row


def cost(
    run: Run,
    name: str,
    net: Net,
    optimizer_name: str,
    contestants: list[str],
    dtype: torch.dtype | None,
    compiled: bool,
) -> Row:
    """Time and memory of each contestant over the plain step's, in one run."""
    gc.collect()  # what the row before has left on the device
    if run.device == "cuda":
        torch.cuda.empty_cache()
    if compiled:
        torch.compiler.reset()
    limit = float("inf") if compiled or run.tiny else SECONDS[optimizer_name]
    until = min(run.deadline, time.monotonic() + limit)
    with torch.device(run.device):
        batches = [net.batch() for _ in range(2)]
    if dtype is None and not run.tiny:
        batches = [(x[: len(x) // PART], y[: len(y) // PART]) for x, y in batches]
    builds = {
        c: partial(step_of, run.device, net, optimizer_name, c, batches, dtype, compiled)
        for c in contestants
    }
    with logged() as messages:
        steps, memory, reasons = warm(builds, run.device, until)
    if "plain" not in steps:
        raise RuntimeError(reasons["plain"])
    seconds, num_rounds = medians_by_turns(steps, run.device, until, 1 if run.tiny else MOST)
    seconds = {c: each / calls_of(c) for c, each in seconds.items()}
    plain, base = seconds.pop("plain"), memory.pop("plain")
    row: Row = {
        "case": f"{name}, {optimizer_name}" + (", compiled" if compiled else ""),
        "precision": "float32" if dtype is None else str(dtype).removeprefix("torch."),
        "outcome": "measured",
        "samples": len(batches[0][0]),
        "plain ms": plain * 1e3,
        **{contestant: each / plain for contestant, each in seconds.items()},
    }
    if base:
        row["plain MiB"] = base / 2**20
        row |= {f"{c}, memory": m / base for c, m in memory.items() if m}
    if dtype is None:
        row["TF32"] = tf32()
    if messages:
        row["logged"] = messages
    return {**row, "rounds": num_rounds, **reasons}


class Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.messages.append(record.getMessage())


@contextmanager
def logged() -> Iterator[list[str]]:
    """What the library warns of, each once: that it runs uncompiled, for one."""
    handler = Messages()
    logging.getLogger("reweight").addHandler(handler)
    try:
        yield handler.messages
    finally:
        logging.getLogger("reweight").removeHandler(handler)


def calls_of(contestant: str) -> int:
    """How many calls are one step here: a whole interval, of which one call updates."""
    return 10 if "interval 10" in contestant else 1


def tf32() -> str:
    """Which products of float32 are rounded to TF32, as PyTorch has it."""
    kinds = {"convolutions": torch.backends.cudnn, "matrices": torch.backends.cuda.matmul}
    return ", ".join(f"{k} {'on' if of.allow_tf32 else 'off'}" for k, of in kinds.items())


def step_of(
    device: str,
    net: Net,
    optimizer_name: str,
    contestant: str,
    batches: list[Batch],
    dtype: torch.dtype | None,
    compiled: bool,
) -> Step:
    """One step of it, or one interval, with a model of its own."""
    torch.manual_seed(0)
    with torch.device(device):  # where the parameters are drawn in no time
        model, g = net.build(), SampleReweighter(net.num_exits)
    optimizer = OPTIMIZERS[optimizer_name](model)
    g_optimizer = Adam(g.parameters(), lr=1e-4)
    if compiled:
        model = torch.compile(model)  # type: ignore[assignment] # it is typed as a function
    step = CONTESTANTS[contestant](model, optimizer, g, g_optimizer)

    def run() -> None:
        for _ in range(calls_of(contestant)):
            with torch.autocast(device, dtype) if dtype else nullcontext():
                step(*batches)

    return run


def rows(run: Run) -> Iterator[Callable[[], Row]]:
    """SGD in bfloat16 and float32, AdamW, the compiled ones; the small run has some of each."""
    nets = {name: TINY_NETS[name] for name in CARD_NETS} if run.tiny else CARD_NETS

    def eager(optimizer_name: str, dtype: torch.dtype | None) -> Iterator[Callable[[], Row]]:
        known = [peer for peer in PEERS if (peer, optimizer_name) not in UNSUPPORTED]
        chosen = ["plain", *(OURS if optimizer_name == "sgd" else OURS[:1]), *known]
        chosen = chosen[:2] if run.tiny and dtype is None else chosen
        for name, net in nets.items():
            yield partial(cost, run, name, net, optimizer_name, chosen, dtype, False)

    def compiled(dtype: torch.dtype | None, *names: str) -> Iterator[Callable[[], Row]]:
        for name in names:
            chosen = ["plain", *OURS[:1]]
            yield partial(cost, run, name, nets[name], "sgd", chosen, dtype, True)

    half = torch.bfloat16
    yield from eager("sgd", half)
    yield from eager("sgd", None)
    yield from eager("adamw", half)
    yield from compiled(None, "conv")
    if not run.tiny:
        yield from compiled(half, "vit", "conv", "lm", "msdnet")
        yield from compiled(None, "vit", "lm", "msdnet")
        yield from eager("adamw", None)
