"""Optimizers of kinds that torch.optim has none of, and an oracle for any: the class run anew."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim

Make = Callable[[list[nn.Parameter]], optim.Optimizer]
SHAPES = [(4, 3), (4,), (3, 5), (1,)]


class Taken:
    """Parameters and their optimizer after some steps: the same whenever it is made."""

    def __init__(self, make: Make, dtype: torch.dtype = torch.float64, num_steps: int = 3) -> None:
        generator = torch.Generator().manual_seed(0)

        def drawn(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.parameters = [nn.Parameter(drawn(shape)) for shape in SHAPES]
        self.optimizer = make(self.parameters)
        torch.manual_seed(1)
        for _ in range(num_steps):
            self.step([0.1 * drawn(shape) for shape in SHAPES])
        self.gradients = [0.1 * drawn(shape) for shape in SHAPES]
        torch.manual_seed(2)

    def step(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """θ after the class's own step."""
        for p, g in zip(self.parameters, gradients, strict=True):
            p.grad = g.clone()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return [p.detach().clone() for p in self.parameters]

    @property
    def named(self) -> dict[str, Tensor]:
        """As the model has them."""
        return {str(i): p for i, p in enumerate(self.parameters)}

    def leaves(self) -> dict[str, Tensor]:
        """The gradients of the next step."""
        return {str(i): g.clone().requires_grad_() for i, g in enumerate(self.gradients)}


def slope_of(make: Make, c: Sequence[Tensor], u: Sequence[Tensor], h: float = 1e-5, **how) -> float:
    """⟨c, ∂θ̂/∂g·u⟩ by differences of the class's own step, each of an optimizer made anew."""

    def at(sign: int) -> float:
        taken = Taken(make, **how)
        new = taken.step([g + sign * h * d for g, d in zip(taken.gradients, u, strict=True)])
        return sum((a * b).sum().item() for a, b in zip(c, new, strict=True))

    return (at(1) - at(-1)) / (2 * h)


class TrustRatio(optim.Optimizer):
    """Numbers out of tensors: ‖θ‖/‖g‖ by ``item``, in all the ways that a number is used."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                ratio = (p.norm() / (1 + p.grad.norm())).item()
                if ratio > 10:
                    continue
                ratio = max(ratio, 1e-3)
                p.add_(p.grad, alpha=-group["lr"] * ratio)
                p.addcmul_(p.grad, p.grad, value=-0.1 * ratio)
                p.sub_(p.grad.mul(ratio**2)).mul_(1 - 0.01 * ratio)
                torch._foreach_add_([p], [p.grad], alpha=-0.1 / ratio)
                torch._foreach_mul_([p], 1 - 0.1 * ratio)


class GlobalNorm(optim.Optimizer):
    """Its groups depend on each other."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        held = [(g["lr"], p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for _, p in held]).norm()
        for lr, p in held:
            p.sub_(lr * p.grad / norm)


class ScheduleFree(optim.Optimizer):
    """Trains at an average of two sequences; a step belongs to its training mode."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "train_mode": True, "k": 0})

    def eval(self) -> None:
        self._to(0.5, False)

    def train(self) -> None:
        self._to(-1.0, True)

    @torch.no_grad()
    def _to(self, weight: float, mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != mode:
                for p in group["params"]:
                    p.lerp_(self.state[p]["z"], weight)
            group["train_mode"] = mode

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("Not in train mode: call optimizer.train() before.")
            group["k"] += 1
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["z"] = p.clone()
                p.lerp_(end=state["z"], weight=1 / group["k"])
                p.add_(p.grad, alpha=group["lr"] * (0.9 * (1 - 1 / group["k"]) - 1))
                state["z"].sub_(p.grad, alpha=group["lr"])


class Lookahead(optim.Optimizer):
    """Another optimizer inside, whose parameters go back half of the way at every other step."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer, self.count = optimizer, 0
        super().__init__([p for g in optimizer.param_groups for p in g["params"]], {})
        self.param_groups = optimizer.param_groups
        self.slow = {p: p.detach().clone() for g in self.param_groups for p in g["params"]}

    def step(self) -> None:
        self.optimizer.step()
        self.count += 1
        if self.count % 2 == 0:
            for p, slow in self.slow.items():
                slow.add_(p.data - slow, alpha=0.5)
                p.data.copy_(slow)


class Projected(optim.Optimizer):
    """Moments in a subspace that the gradient itself gives, as GaLore has them."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state, g = self.state[p], p.grad
                if p.dim() == 2:
                    state.setdefault("basis", torch.linalg.svd(g)[0][:, :2])
                    g = state["basis"].T @ g
                state.setdefault("square", torch.zeros_like(g)).mul_(0.9).addcmul_(g, g, value=0.1)
                g = g / (state["square"].sqrt() + 1e-3)
                p.sub_(group["lr"] * (state["basis"] @ g if p.dim() == 2 else g))


class MuonAndAdam(optim.Optimizer):
    """Matrices are orthogonalized in bfloat16, the rest goes by Adam: two algorithms in a class."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        params = list(params)
        matrices = {"params": [p for p in params if p.dim() == 2], "matrices": True}
        rest = {"params": [p for p in params if p.dim() != 2], "matrices": False}
        super().__init__([matrices, rest], {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if group["matrices"]:
                    buffer = state.setdefault("buffer", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 0.1)
                    x = buffer.bfloat16()
                    x = x / (x.norm() + 1e-7)
                    for _ in range(3):
                        a = x @ x.mT
                        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                    p.add_(x.type_as(p), alpha=-group["lr"])
                else:
                    mean = state.setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                    square = state.setdefault("square", torch.zeros_like(p))
                    square.lerp_(p.grad.square(), 0.05)
                    p.sub_(group["lr"] * mean / (square.sqrt() + 1e-8))


class Noisy(optim.Optimizer):
    """Draws from PyTorch's generator and from one of its own."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.generator = torch.Generator().manual_seed(3)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                noise = torch.randn_like(p)
                noise += torch.randn(p.shape, generator=self.generator, dtype=p.dtype)
                p.sub_(group["lr"] * (p.grad * noise.sigmoid() + noise))


class ByMemory(optim.Optimizer):
    """Everything that operations on memory can be: views, ``.data``, ``out=``, foreach, ids."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.kept: dict[int, Tensor] = {}
        self.calls = [0]

    def step(self) -> None:
        self.calls[0] += 1
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            with torch.no_grad():
                for p in held:
                    kept = self.kept.setdefault(id(p), torch.zeros(2, p.numel(), dtype=p.dtype))
                    row = kept[self.calls[0] % 2]  # a view
                    row.copy_(p.grad.detach().view(-1))
                    kept.t()[0].mul_(0.5)  # a column, through a transposed view
                    mean = torch.empty(0, dtype=p.dtype)
                    torch.add(kept[0], kept[1], out=mean)  # which gets its shape
                    new = p.data.clone()
                    new.view(-1)[::2].sub_(mean[::2], alpha=group["lr"])
                    new.view(-1)[:1].zero_().add_(mean[:1].detach().tanh())
                    p.data = new  # other memory
                grads = [p.grad for p in held]
                torch._foreach_sub_(held, torch._foreach_mul(grads, torch.tensor(0.01)))
                torch._foreach_addcdiv_(held, grads, [g.square() + 1 for g in grads], value=-0.1)


class Sam(optim.Optimizer):
    """Two passes: up to where the loss is worst near by, and from there down by the base."""

    def __init__(self, params: Any, base: type[optim.Optimizer], **options: Any) -> None:
        super().__init__(params, {"rho": 0.05, **options})
        self.base_optimizer = base(self.param_groups, **options)

    @torch.no_grad()
    def first_step(self) -> None:
        held = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        for p in held:
            self.state[p]["before"] = p.clone()
            p.add_(p.grad * (self.param_groups[0]["rho"] / norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.copy_(self.state[p].pop("before"))
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure: Callable[[], float] | None = None) -> None:
        assert closure is not None, "SAM needs a closure."


def two_groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """With rates of their own."""
    return [{"params": parameters[:2], "lr": 0.05}, {"params": parameters[2:]}]


STEPS: dict[str, Make] = {
    "trust ratio": TrustRatio,
    "global norm over two groups": lambda parameters: GlobalNorm(two_groups(parameters)),
    "schedule-free": ScheduleFree,
    "lookahead": lambda parameters: Lookahead(optim.Adam(two_groups(parameters), lr=0.01)),
    "projected": Projected,
    "muon and adam": MuonAndAdam,
    "noisy": Noisy,
    "by memory": ByMemory,
}
