"""The grid that the tests of the meta step run over: models × optimizers × numbers of exits."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchopt
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)

NUM_CLASSES = 4
Batch = tuple[Tensor, Tensor]


class MultiExit(nn.Module):
    """Blocks in a row, an exit after each of the last ``num_exits``."""

    def __init__(self, blocks: list[nn.Module], exits: list[nn.Module]) -> None:
        super().__init__()
        self.blocks, self.exits = nn.ModuleList(blocks), nn.ModuleList(exits)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        ends = features[len(features) - len(self.exits) :]
        return [exit(end) for exit, end in zip(self.exits, ends, strict=True)]


class Recurrent(nn.Module):
    def __init__(self, layer: type[nn.RNNBase] = nn.GRU, width: int = 5) -> None:
        super().__init__()
        self.layer = layer(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class LastToken(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x[:, -1])


class Fixed(nn.Module):
    """Weights that are parameters, whose gradient is the hypergradient itself."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights.clone())

    def forward(self, losses: object) -> Tensor:
        return self.weights


class Double(torch.autograd.Function):
    """Has no forward mode."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float = 2) -> Tensor:
        return factor * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return 2 * gradient, None


class HalvedBackward(torch.autograd.Function):
    """The backward is not the derivative of the forward, but half of it; it can be switched off."""

    on = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, cotangent: Tensor) -> Tensor:
        return cotangent * (0.5 if HalvedBackward.on else 1)

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return tangent.clone()


def mlp(num_exits: int) -> MultiExit:
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)]
    return MultiExit(blocks, [nn.Linear(6, NUM_CLASSES) for _ in range(num_exits)])


def conv_batch_norm(num_exits: int) -> MultiExit:
    def block(width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(width, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())

    def head() -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, NUM_CLASSES))

    return MultiExit([block(2), block(4), block(4)], [head() for _ in range(num_exits)])


def transformer_dropout(num_exits: int) -> MultiExit:
    blocks = [nn.TransformerEncoderLayer(8, 2, 8, dropout=0.2, batch_first=True) for _ in range(3)]
    return MultiExit(blocks, [LastToken(8) for _ in range(num_exits)])


def recurrent(num_exits: int) -> MultiExit:
    return MultiExit([Recurrent() for _ in range(3)], [LastToken(5) for _ in range(num_exits)])


def tied(num_exits: int) -> MultiExit:
    model = mlp(num_exits)
    model.blocks[2][0].weight = model.blocks[1][0].weight
    for exit in model.exits:
        exit.weight = model.exits[0].weight
    return model


def frozen_trunk(num_exits: int) -> MultiExit:
    model = mlp(num_exits)
    model.blocks[:2].requires_grad_(False)
    return model


@dataclass(frozen=True)
class Model:
    build: Callable[[int], MultiExit]
    input_shape: tuple[int, ...]


MODELS = {
    "mlp": Model(mlp, (6,)),
    "conv_batch_norm": Model(conv_batch_norm, (2, 5, 5)),
    "transformer_dropout": Model(transformer_dropout, (3, 8)),
    "recurrent": Model(recurrent, (3, 5)),
    "tied": Model(tied, (6,)),
    "frozen_trunk": Model(frozen_trunk, (6,)),
}


def two_groups(model: nn.Module) -> list[dict[str, object]]:
    """Weights decay, biases do not and learn faster: two groups with different settings."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "lr": 0.2},
    ]


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: SGD(model.parameters(), lr=0.1),
    "sgd_nesterov_two_groups": lambda model: SGD(
        two_groups(model), lr=0.1, momentum=0.9, nesterov=True
    ),
    "adam": lambda model: Adam(model.parameters(), lr=0.01, weight_decay=0.01),
    "adamw": lambda model: AdamW(two_groups(model), lr=0.01, weight_decay=0.1),
}

UPDATE_RULES: dict[str, Callable[[nn.Module], Optimizer]] = {
    **OPTIMIZERS,
    "sgd_momentum": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd_dampening": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.3),
    "sgd_maximize": lambda model: SGD(
        model.parameters(), lr=0.01, momentum=0.5, weight_decay=0.1, maximize=True
    ),
    "sgd_tensor_lr": lambda model: SGD(
        model.parameters(), lr=torch.tensor(0.1).double(), momentum=0.9
    ),
    "sgd_foreach": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True),
    "adam_eps_betas": lambda model: Adam(
        model.parameters(), lr=0.01, betas=(0.8, 0.9), eps=1e-3, maximize=True
    ),
    "adam_amsgrad": lambda model: Adam(two_groups(model), lr=0.01, amsgrad=True),
    "adam_fused": lambda model: Adam(model.parameters(), lr=0.01, fused=True),
    "adamw_foreach": lambda model: AdamW(model.parameters(), lr=0.01, foreach=True),
    "adamw_amsgrad": lambda model: AdamW(model.parameters(), lr=0.01, amsgrad=True),
    "adamw_tensor_lr": lambda model: AdamW(model.parameters(), lr=torch.tensor(0.01).double()),
    "adam_tensor_betas": lambda model: Adam(
        model.parameters(), betas=(torch.tensor(0.9).double(), torch.tensor(0.99).double())
    ),
    "rmsprop": lambda model: RMSprop(model.parameters(), lr=0.01, weight_decay=0.1),
    "rmsprop_centered_momentum": lambda model: RMSprop(
        two_groups(model), lr=0.01, centered=True, momentum=0.9
    ),
    "adagrad": lambda model: Adagrad(model.parameters(), lr=0.1, weight_decay=0.1),
    "adagrad_lr_decay": lambda model: Adagrad(
        two_groups(model), lr=0.1, lr_decay=0.1, initial_accumulator_value=0.3
    ),
    "adadelta": lambda model: Adadelta(two_groups(model), lr=1.0),
    "radam": lambda model: RAdam(two_groups(model), lr=0.01),
    "radam_decoupled": lambda model: RAdam(
        model.parameters(), lr=0.01, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "radam_rectified": lambda model: RAdam(model.parameters(), lr=0.01, betas=(0.5, 0.999)),
    "adamax": lambda model: Adamax(two_groups(model), lr=0.01),
    "nadam": lambda model: NAdam(two_groups(model), lr=0.01),
    "nadam_decoupled": lambda model: NAdam(
        model.parameters(), lr=0.01, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "asgd": lambda model: ASGD(two_groups(model), lr=0.1),
}
"""Every rule, with and without what changes it; the first steps of RAdam are not rectified."""

TORCHOPT: dict[str, Callable[[tuple[Tensor, ...]], torchopt.Optimizer]] = {
    "sgd": lambda parameters: torchopt.SGD(parameters, lr=0.1),
    "sgd_dampening": lambda parameters: torchopt.SGD(
        parameters, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1
    ),
    "sgd_nesterov": lambda parameters: torchopt.SGD(
        parameters, lr=0.1, momentum=0.9, nesterov=True
    ),
    "adamw": lambda parameters: torchopt.AdamW(parameters, lr=0.01),
    "rmsprop_momentum": lambda parameters: torchopt.RMSProp(parameters, lr=0.01, momentum=0.9),
    "adagrad": lambda parameters: torchopt.Adagrad(parameters, lr=0.1),
    "adamax": lambda parameters: torchopt.AdaMax(parameters, lr=0.01),
}


def _exists(make: Callable[[nn.Module], Optimizer]) -> bool:
    try:
        make(nn.Linear(2, 2))
    except (TypeError, RuntimeError):  # an option that this PyTorch does not know yet
        return False
    return True


UPDATE_RULES = {name: make for name, make in UPDATE_RULES.items() if _exists(make)}


def make_model(name: str, num_exits: int = 3, seed: int = 0) -> MultiExit:
    torch.manual_seed(seed)
    return MODELS[name].build(num_exits).double()


def make_batch(name: str, num_samples: int = 7, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_samples, *MODELS[name].input_shape)
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(NUM_CLASSES, (num_samples,), generator=generator)


def warm_up(model: nn.Module, optimizer: Optimizer, batch: Batch, num_steps: int = 3) -> None:
    """A few conventional steps, so that moments and buffers hold something."""
    for _ in range(num_steps):
        optimizer.zero_grad()
        conventional_loss(model(batch[0]), batch[1]).backward()
        optimizer.step()
    optimizer.zero_grad()


def warmed(
    name: str,
    make_optimizer: Callable[[nn.Module], Optimizer],
    num_exits: int = 3,
    *,
    seed: int = 1,
    num_steps: int = 3,
) -> tuple[MultiExit, Optimizer]:
    """A model and its optimizer after a few conventional steps on the batch of this seed."""
    model = make_model(name, num_exits)
    optimizer = make_optimizer(model)
    warm_up(model, optimizer, make_batch(name, seed=seed), num_steps)
    return model, optimizer


def conventional_loss(logits: list[Tensor], target: Tensor) -> Tensor:
    """What training without weights minimises: Σ_k mean_i l[i,k]."""
    return torch.stack([nn.functional.cross_entropy(z, target) for z in logits]).sum()


TRANSFORMER = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
"""The size of a model of transformers."""

EXITS = {"one_exit": 1, "three_exits": 3}


def make_logits(form: str, dtype=torch.float64):
    """Logits in one of the forms a model may give them, the matrix of each exit, and targets."""
    shape = (2, 3) if "tokens" in form else (6,)
    num_exits = 1 if "single" in form else 3
    exits = [torch.randn(*shape, 5, dtype=dtype, requires_grad=True) for _ in range(num_exits)]
    target = torch.randint(5, shape)
    if form == "single" or form == "single_tokens":
        return exits[0], exits, target
    return (torch.stack(exits) if "stacked" in form else exits), exits, target


def gradients_of(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Those of the conventional loss, by name, where there is one."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = conventional_loss(model(batch[0]), batch[1])
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: g for n, g in zip(names, gradients, strict=True) if g is not None}
