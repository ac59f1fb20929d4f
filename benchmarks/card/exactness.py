"""Whether the step is exact on a device: forward mode held to double backward, in every precision.

A hypergradient is compared with that of double backward in float64 on the same device. Precisions
below float64 may be as far from it as double backward itself is in that precision, three times
over, or as the floor below says if that is more.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from nets import TINY_NETS, Batch, Net, images
from reweight import MeanObjective, MetaReweightStep, SampleReweighter
from small import MultiExitMLP

Row = dict[str, Any]

FLOORS = {"float64": 1e-9, "float32": 1e-4, "TF32": 2e-2, "bfloat16": 5e-2, "float16": 2e-2}
NUM_CLASSES, WIDTH = 4, 8


class Sequences(nn.Module):
    """Two layers over sequences [B, T, D], and an exit at the last token of each."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(2))
        self.exits = nn.ModuleList(nn.Linear(WIDTH, NUM_CLASSES) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, T, D] → 2 logits [B, C]."""
        logits = []
        for layer, head in zip(self.layers, self.exits, strict=True):
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
            logits.append(head(x[:, -1]))
        return logits


def sequences() -> Batch:
    return torch.randn(6, 5, WIDTH), torch.randint(NUM_CLASSES, (6,))


def encoder(dropout: float) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, dropout=dropout, batch_first=True)


def normalised() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh())


CHANNELS_LAST = "conv, channels_last"
CELLS = {"LSTM": nn.LSTM, "GRU": nn.GRU}
NETS: dict[str, Net] = {
    **TINY_NETS,
    CHANNELS_LAST: TINY_NETS["conv"],
    "perceptron": Net(
        lambda: MultiExitMLP((3, 8, 8), NUM_CLASSES), 4, partial(images, 12, NUM_CLASSES, 8)
    ),
    **{
        name: Net(
            lambda cell=cell: Sequences(partial(cell, WIDTH, WIDTH, batch_first=True)), 2, sequences
        )
        for name, cell in CELLS.items()
    },
    "encoder with dropout": Net(lambda: Sequences(partial(encoder, 0.2)), 2, sequences),
    "weight_norm": Net(lambda: Sequences(normalised), 2, sequences),
}
OPTIMIZERS: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "SGD, fused": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
    "AdamW": lambda p: AdamW(p, lr=0.01),
    "AdamW, foreach": lambda p: AdamW(p, lr=0.01, foreach=True),
    "AdamW, fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "AdamW, capturable": lambda p: AdamW(p, lr=0.01, capturable=True),
    "Adam, fused, capturable": lambda p: Adam(p, lr=0.01, fused=True, capturable=True),
    "NAdam, capturable": lambda p: NAdam(p, lr=0.01, capturable=True),
    "Muon": lambda p: torch.optim.Muon([x for x in p if x.dim() == 2], lr=0.01),
}


class Weights(nn.Module):
    """Weights that are parameters, whose gradient is the hypergradient itself."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, losses: object) -> Tensor:
        """[B, K]."""
        return self.weights


@dataclass(frozen=True)
class Setting:
    """How one hypergradient is come by.

    Attributes:
        device: where.
        dtype: of model and data.
        autocast: the precision of the products, or None.
        tf32: whether products of float32 may be rounded.
        estimator: as for the step.
        optimizer: one of ``OPTIMIZERS``.
    """

    device: str
    dtype: torch.dtype = torch.float64
    autocast: torch.dtype | None = None
    tf32: bool = False
    estimator: str = "forward"
    optimizer: str = "SGD"


def hypergradient(name: str, setting: Setting, *around: Any) -> Tensor:
    """∂L_meta/∂w [B, K] in float64 on the CPU, after the optimizer has taken three plain steps."""
    torch.manual_seed(0)
    net = NETS[name]
    model = net.build().double()
    train, meta = ((double(x), target) for x, target in (net.batch(), net.batch()))
    num_rows = train[1].numel()
    weights = Weights((torch.rand(num_rows, net.num_exits) + 0.5).to(setting.device, setting.dtype))
    model.to(setting.device, setting.dtype)
    if name == CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)
    train, meta = (placed(batch, setting) for batch in (train, meta))
    optimizer = OPTIMIZERS[setting.optimizer](list(model.parameters()))
    own, found = SGD(weights.parameters(), lr=0.0), []
    own.register_step_pre_hook(lambda *_: found.append(weights.weights.grad.clone()))
    scaler = None
    if setting.autocast is torch.float16:
        scaler = torch.amp.GradScaler(setting.device, init_scale=1024.0)
        scaler.scale(torch.zeros((), device=setting.device))  # makes the scale, as a loss would
    step = MetaReweightStep(
        model,
        optimizer,
        weights,
        reweighter_optimizer=own,
        objective=MeanObjective(),  # allotment jumps where confidences are rounded
        estimator=setting.estimator,
        scaler=scaler,
    )
    with ExitStack() as stack:
        for context in around:
            stack.enter_context(context)
        for _ in range(3):
            optimizer.zero_grad()
            with precision(setting):  # anew each time: it caches the weights as it has cast them
                logits = model(train[0])
            torch.stack([z.double().square().mean() for z in logits]).sum().backward()
            optimizer.step()
        optimizer.zero_grad()
        with precision(setting):
            step.backward(train, meta)
    return found[0].double().cpu()


def double(inputs: Tensor) -> Tensor:
    return inputs.double() if inputs.is_floating_point() else inputs


def placed(batch: Batch, setting: Setting) -> Batch:
    inputs, target = batch
    if inputs.is_floating_point():
        inputs = inputs.to(setting.dtype)
    return inputs.to(setting.device), target.to(setting.device)


def precision(setting: Setting) -> Any:
    """What products are rounded to."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = setting.tf32
    return torch.autocast(setting.device, setting.autocast) if setting.autocast else nullcontext()


@cache
def by_double_backward(name: str, setting: Setting) -> Tensor:
    """The same by the other way; cuDNN's recurrent layers have no second derivative."""
    around = [torch.backends.cudnn.flags(enabled=False)] if name in CELLS else []
    return hypergradient(name, replace(setting, estimator="unrolled"), *around)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def held(case: str, kind: str, found: Tensor, exact: Tensor, peer: Tensor | None = None) -> Row:
    """The row of one hypergradient beside the exact one, and beside double backward's."""
    row: Row = {"case": case, "precision": kind, "error": error(found, exact)}
    bound = FLOORS[kind]
    if peer is not None:
        row["double backward"] = error(peer, exact)
        bound = max(bound, 3 * row["double backward"])
    row["outcome"] = "exact" if row["error"] <= bound else "wrong"
    return row


def nets(device: str) -> Iterator[Callable[[], Row]]:
    """Forward mode of ten nets, in every precision."""
    base = Setting(device)
    settings = {
        "float64": base,
        "float32": replace(base, dtype=torch.float32),
        "TF32": replace(base, dtype=torch.float32, tf32=True),
        "bfloat16": replace(base, dtype=torch.float32, autocast=torch.bfloat16),
        "float16": replace(base, dtype=torch.float32, autocast=torch.float16),
    }

    def row(name: str, kind: str, setting: Setting) -> Row:
        found = hypergradient(name, setting)
        peer = by_double_backward(name, setting)
        # Masks are drawn anew in each precision.
        reference = setting if "dropout" in name else base
        exact = by_double_backward(name, reference)
        return held(name, kind, found, exact, peer)

    for kind, setting in settings.items():
        for name in NETS:
            if kind in ("float64", "float32") or name not in CELLS:
                yield partial(row, name, kind, setting)


def optimizers(device: str) -> Iterator[Callable[[], Row]]:
    """Each as it is spelt, beside double backward through its plain spelling."""

    def row(name: str) -> Row:
        setting = Setting(device, optimizer=name)
        found = hypergradient("perceptron", setting)
        plain = name.partition(",")[0]
        plain = replace(setting, optimizer=plain) if plain in OPTIMIZERS else setting
        exact = by_double_backward("perceptron", plain)
        return held(name, "float64", found, exact)

    for name in OPTIMIZERS:
        missing = name == "Muon" and not hasattr(torch.optim, "Muon")
        if not missing and not (device == "cpu" and "capturable" in name):
            yield partial(row, name)


def attention(device: str) -> Iterator[Callable[[], Row]]:
    """Fused kernels stay in the passes that need no forward mode."""

    def row(name: str, backend: SDPBackend, dtype: torch.dtype | None) -> Row:
        setting = Setting(device, dtype=torch.float32, autocast=dtype)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            found = hypergradient(name, setting, sdpa_kernel([backend]))
        fused = sum(event.count for event in profile.key_averages() if is_fused(event.key))
        exact = by_double_backward(name, Setting(device))
        case = f"{name}, {backend.name.lower()}"
        row = held(case, "bfloat16" if dtype else "float32", found, exact)
        layers = len(TINY_NETS[name].build().layers)
        row["passes"] = f"{fused / layers:g} of 5"  # three to warm up, the train and the meta batch
        return row

    for name in ("vit", "lm"):
        yield partial(row, name, SDPBackend.FLASH_ATTENTION, torch.bfloat16)
        if device == "cuda":
            yield partial(row, name, SDPBackend.EFFICIENT_ATTENTION, None)


def is_fused(operation: str) -> bool:
    parts = operation.partition("_scaled_dot_product")
    return bool(parts[1]) and "math" not in parts[2] and "backward" not in parts[2]


def waits(device: str) -> Iterator[Callable[[], Row]]:
    """No step waits for the device, from the third on."""

    def row(name: str, optimizer_name: str) -> Row:
        torch.manual_seed(0)
        setting = Setting(device, dtype=torch.float32)
        net = NETS[name]
        model = net.build().to(device)
        optimizer = OPTIMIZERS[optimizer_name](list(model.parameters()))
        step = MetaReweightStep(model, optimizer, SampleReweighter(net.num_exits).to(device))
        train, meta = placed(net.batch(), setting), placed(net.batch(), setting)
        for _ in range(2):
            step(train, meta)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                optimizer.zero_grad()
                step.backward(train, meta)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        watched = "no wait" if device == "cuda" else "not watched"
        return {"case": f"{name}, {optimizer_name}", "outcome": watched}

    for name in ("conv", "vit", "lm", "LSTM", "encoder with dropout"):
        for optimizer_name in ("SGD", "AdamW", "AdamW, fused"):
            yield partial(row, name, optimizer_name)


def rows(device: str, tiny: bool) -> Iterator[Callable[[], Row]]:
    """All of it; the small run takes a few of each."""
    for part in (nets, waits, optimizers, attention):
        cases = list(part(device))
        yield from (cases[0], cases[-1]) if tiny else cases
