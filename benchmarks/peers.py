"""The same training by other means: a step each of the published recipe, torchopt and higher.

All differentiate the gradient itself (double backward) where ``reweight`` has a forward-mode pass,
and go forward again for the real step. Reweighter, losses and objective are ours, so that only the
mechanics differ, and each peer is spared what it need not pay: fused attention is given up in the
one pass that is differentiated twice, state is handed over by reference where that is safe.
``pytest benchmarks/test_peers.py`` asserts that they train the same.
"""

import copy
import importlib.util
from collections.abc import Callable, Iterable

import torch
import torchopt
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, Optimizer
from torchopt.transform.scale_by_adam import ScaleByAdamState
from torchopt.transform.trace import TraceState

from nets import Batch
from reweight import BudgetedObjective, SampleReweighter, exit_cross_entropy

Step = Callable[[Batch, Batch], object]
Build = Callable[[nn.Module, Optimizer, SampleReweighter, Optimizer], Step]


def pseudo_loss(model: Callable[..., list[Tensor]], batch: Batch, g: SampleReweighter) -> Tensor:
    """L_tr with the graph that the weights hang from, fit for a double backward."""
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        losses = exit_cross_entropy(model(batch[0]), batch[1]).losses
    return (g(losses.detach()) * losses).mean(0).sum()


def learn(logits: list[Tensor], target: Tensor, reweighter_optimizer: Optimizer) -> None:
    """Θg ← Θg − β ∂L_meta/∂Θg, from the logits of the updated model on the meta batch."""
    meta_loss = BudgetedObjective()(exit_cross_entropy(logits, target)).value
    parameters = [p for group in reweighter_optimizer.param_groups for p in group["params"]]
    for parameter, gradient in zip(
        parameters, torch.autograd.grad(meta_loss, parameters), strict=True
    ):
        parameter.grad = gradient
    reweighter_optimizer.step()


def real_step(model: nn.Module, optimizer: Optimizer, g: SampleReweighter, train: Batch) -> None:
    """A forward, and the step with the new weights."""
    optimizer.zero_grad()
    losses = exit_cross_entropy(model(train[0]), train[1]).losses
    with torch.no_grad():
        weights = g(losses)
    (weights * losses).mean(0).sum().backward()
    optimizer.step()


def published(
    model: nn.Module, optimizer: Optimizer, g: SampleReweighter, g_optimizer: Optimizer
) -> Step:
    """The recipe of L2W's code: a copy of the model takes a step of momentum SGD, by hand.

    For any other optimizer it is momentum SGD nonetheless, at that optimizer's learning rate.
    """

    def step(train: Batch, meta: Batch) -> None:
        pseudo = copy.deepcopy(model)
        named = {name: p for name, p in pseudo.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(
            pseudo_loss(pseudo, train, g),
            list(named.values()),
            create_graph=True,
            allow_unused=True,
        )
        group = optimizer.param_groups[0]
        moved = {}
        for (name, p), gradient, original in zip(
            named.items(), gradients, group["params"], strict=True
        ):
            if gradient is not None:
                descent = gradient + (group["weight_decay"] if type(optimizer) is SGD else 0) * p
                buffer = optimizer.state[original].get("momentum_buffer", torch.zeros_like(p))
                moved[name] = p - group["lr"] * (group.get("momentum", 0.9) * buffer + descent)
        learn(functional_call(pseudo, moved, (meta[0],)), meta[1], g_optimizer)
        real_step(model, optimizer, g, train)

    return step


def by_torchopt(
    model: nn.Module, optimizer: Optimizer, g: SampleReweighter, g_optimizer: Optimizer
) -> Step:
    """MetaSGD or MetaAdamW moves the model itself, which is then put back.

    Its state would be another than the real optimizer's, so it is handed over at every step.
    Buffers must be detached when the model is put aside, or BatchNorm's statistics keep what the
    meta step did to them.
    """
    group = optimizer.param_groups[0]
    meta_optimizer: torchopt.MetaOptimizer
    if isinstance(optimizer, SGD):
        meta_optimizer = torchopt.MetaSGD(
            model, group["lr"], group["momentum"], group["weight_decay"]
        )
    else:  # without eps_root embeddings not in the batch make NaN; this much changes nothing else
        meta_optimizer = torchopt.MetaAdamW(
            model, group["lr"], group["betas"], group["eps"], group["weight_decay"], eps_root=1e-30
        )
    parameters: Iterable[Tensor] = torchopt.pytree.tree_leaves(  # in an order of torchopt's own
        meta_optimizer.param_containers_groups[0]
    )
    _, *rest = initial = meta_optimizer.impl.init(tuple(parameters))
    # The first call of its momentum ignores the state, so it is spent here.
    meta_optimizer.impl.update(
        tuple(map(torch.zeros_like, parameters)), initial, params=parameters, inplace=False
    )

    def moments(name: str) -> list[Tensor]:
        return [optimizer.state[p].get(name, torch.zeros_like(p)) for p in parameters]

    def step(train: Batch, meta: Batch) -> None:
        if isinstance(optimizer, SGD):
            state = TraceState(moments("momentum_buffer"))
        else:
            # In float64, for it raises the betas to their power in the precision of the counts.
            counts = [
                torch.as_tensor(optimizer.state[p].get("step", 0.0)).double() for p in parameters
            ]
            state = ScaleByAdamState(moments("exp_avg"), moments("exp_avg_sq"), counts)
        meta_optimizer.load_state_dict([(state, *rest)])
        aside = torchopt.extract_state_dict(model, by="reference", detach_buffers=True)
        meta_optimizer.step(pseudo_loss(model, train, g))
        learn(model(meta[0]), meta[1], g_optimizer)
        torchopt.recover_state_dict(model, aside)
        meta_optimizer.load_state_dict([initial])  # or the graph lives on in the state
        real_step(model, optimizer, g, train)

    return step


def by_higher(
    model: nn.Module, optimizer: Optimizer, g: SampleReweighter, g_optimizer: Optimizer
) -> Step:
    """Higher patches a copy of the model and of the optimizer; 0.2.1 knows no AdamW."""
    import higher  # it may be missing

    def step(train: Batch, meta: Batch) -> None:
        with higher.innerloop_ctx(model, optimizer) as (patched, differentiable):
            differentiable.step(pseudo_loss(patched, train, g))
            learn(patched(meta[0]), meta[1], g_optimizer)
        real_step(model, optimizer, g, train)

    return step


PEERS: dict[str, Build] = {
    "published recipe": published,
    "torchopt Meta*": by_torchopt,
    **({"higher": by_higher} if importlib.util.find_spec("higher") else {}),
}
