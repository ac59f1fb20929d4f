"""Small problems for a device, and their hypergradients: ours, double backward's, one by one."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from nets import TINY_NETS, Batch, LanguageModel, Net, ViT, images, texts
from reweight import MeanObjective, MetaReweightStep, exit_cross_entropy
from small import MultiExitMLP

NUM_CLASSES, WIDTH = 4, 16  # with two heads: those of 8 and more are what fused kernels take


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
    "vit": Net(lambda: ViT(32, 4, NUM_CLASSES), 2, partial(images, 6, NUM_CLASSES)),
    "lm": Net(lambda: LanguageModel(12, 5, 32, 4), 2, partial(texts, 4, 12, 5)),
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


@dataclass(frozen=True)
class Problem:
    """A model that has taken three plain steps, and what it is to be reweighted on."""

    model: nn.Module
    optimizer: Optimizer
    weights: Weights
    train: Batch
    meta: Batch


def problem_of(name: str, setting: Setting) -> Problem:
    """The same numbers on every device, but for dropout's masks."""
    torch.manual_seed(0)
    net = NETS[name]
    model = net.build().double()
    train, meta = ((double(x), target) for x, target in (net.batch(), net.batch()))
    weights = torch.rand(train[1].numel(), net.num_exits) + 0.5
    model.to(setting.device, setting.dtype)
    if name == CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)
    train, meta = (placed(batch, setting.device, setting.dtype) for batch in (train, meta))
    optimizer = OPTIMIZERS[setting.optimizer](list(model.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        with precision(setting):  # anew each time: it caches the weights as it has cast them
            logits = model(train[0])
        torch.stack([z.double().square().mean() for z in logits]).sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    own = Weights(weights.to(setting.device, setting.dtype))
    torch.manual_seed(1)  # of the masks, which the train batch draws before the meta batch does
    return Problem(model, optimizer, own, train, meta)


def hypergradient(name: str, setting: Setting, *around: AbstractContextManager[Any]) -> Tensor:
    """∂L_meta/∂w [B, K] of a step, in float64 on the CPU.

    Args:
        name: of the net.
        setting: how.
        around: what the step runs within.
    """
    problem = problem_of(name, setting)
    own, found = SGD(problem.weights.parameters(), lr=0.0), list[Tensor]()
    own.register_step_pre_hook(lambda *_: found.append(problem.weights.weights.grad.clone()))
    scaler = None
    if setting.autocast is torch.float16:
        scaler = torch.amp.GradScaler(setting.device, init_scale=1024.0)
        scaler.scale(torch.zeros((), device=setting.device))  # makes the scale, as a loss would
    step = MetaReweightStep(
        problem.model,
        problem.optimizer,
        problem.weights,
        reweighter_optimizer=own,
        objective=MeanObjective(),  # allotment jumps where confidences are rounded
        estimator=setting.estimator,
        scaler=scaler,
    )
    with ExitStack() as stack:
        for context in (*around, precision(setting)):
            stack.enter_context(context)
        step.backward(problem.train, problem.meta)
    return found[0].double().cpu()


def one_by_one(name: str, setting: Setting, *around: AbstractContextManager[Any]) -> Tensor:
    """The same by first derivatives alone, a backward for each loss: whatever the kernels draw.

    For momentum SGD, whose step moves by −lr times the gradient.
    """
    problem = problem_of(name, setting)
    named, group = dict(problem.model.named_parameters()), problem.optimizer.param_groups[0]
    parameters, weights = list(named.values()), problem.weights.weights.detach()

    def losses_of(at: dict[str, Tensor], batch: Batch) -> Any:
        with precision(setting):
            return exit_cross_entropy(functional_call(problem.model, at, (batch[0],)), batch[1])

    with ExitStack() as stack:
        for context in around:
            stack.enter_context(context)
        losses = losses_of(named, problem.train)
        shares = losses.sample_shares()
        total = (shares * weights * losses.losses).sum()
        gradients = torch.autograd.grad(total, parameters, retain_graph=True)
        moved = {}
        for (key, p), gradient in zip(named.items(), gradients, strict=True):
            buffer = problem.optimizer.state[p]["momentum_buffer"]
            descent = group["lr"] * (group["momentum"] * buffer + gradient)
            moved[key] = (p.detach() - descent).requires_grad_()
        value = MeanObjective()(losses_of(moved, problem.meta)).value
        cotangents = torch.autograd.grad(value, list(moved.values()))
        slopes = torch.zeros_like(losses.losses)
        for row, exit_ in torch.cartesian_prod(*map(torch.arange, slopes.shape)).tolist():
            one = losses.losses[row, exit_]
            of_one = torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True)
            slopes[row, exit_] = sum(
                (c * g).sum() for c, g in zip(cotangents, of_one, strict=True) if g is not None
            )
    return (-group["lr"] * shares * slopes).double().cpu()


def double(inputs: Tensor) -> Tensor:
    return inputs.double() if inputs.is_floating_point() else inputs


def placed(batch: Batch, device: str, dtype: torch.dtype | None = None) -> Batch:
    inputs, target = batch
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    return inputs.to(device), target.to(device)


def precision(setting: Setting) -> Any:
    """What products are rounded to; sums in one order, so that runs can be compared."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = setting.tf32
    return torch.autocast(setting.device, setting.autocast) if setting.autocast else nullcontext()


@cache
def by_double_backward(name: str, setting: Setting) -> Tensor:
    """The same by the other way; cuDNN's recurrent layers have no second derivative."""
    around = [torch.backends.cudnn.flags(enabled=False)] if name in CELLS else []
    return hypergradient(name, replace(setting, estimator="unrolled"), *around)
