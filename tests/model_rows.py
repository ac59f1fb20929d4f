"""The models that every way of training is tested on: a row of docs/compatibility.md each."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.optim import SGD, Adam
from torch.utils.checkpoint import checkpoint

from cases import NUM_CLASSES, MultiExit, Recurrent
from reweight._passes.ladder import Rung

WIDTH, TOKENS = 6, 4
EXACT, BY_BACKWARD = "exactly", "exactly, by its backward"
BY_DIFFERENCES = "to 1e-9, by differences of that operation"
DIFFERENCES = "by finite differences"
RUNGS = {
    EXACT: set(),
    BY_BACKWARD: {Rung.BACKWARD},
    BY_DIFFERENCES: {Rung.DOUBLE_DIFFERENCES},
}
NEWER = {
    "torch.cdist": ((2, 14), BY_BACKWARD),  # whose backward has a derivative
    "F.grid_sample": ((2, 15), EXACT),  # has forward mode
}
"""What newer releases of PyTorch have made better."""


class Last(nn.Module):
    """An exit on the last token, or on the features themselves."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x[:, -1] if x.dim() == 3 else x)


def net(*blocks: nn.Module) -> nn.Module:
    """Blocks with an exit after each of the last two."""
    return MultiExit(list(blocks), [Last(), Last()])


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


class Convolutions(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], channels_last: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), norm(4)
        self.out = nn.Linear(4 * WIDTH, WIDTH)
        if channels_last:
            self.conv.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(len(x), 1, 1, WIDTH)
        return self.out(self.norm(self.conv(x)).tanh().flatten(1))


class OwnGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.generator = linear(), torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * torch.rand(x.shape, generator=self.generator, dtype=x.dtype)

    def __deepcopy__(self, memo):
        with torch.random.fork_rng():
            twin = OwnGenerator()
        twin.body = copy.deepcopy(self.body, memo)
        twin.generator.set_state(self.generator.get_state())
        memo[id(self)] = twin
        return twin


class StochasticDepth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = linear()

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.rand(len(x), 1) < 0.7
        return x + keep * self.body(x)


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class Embedded(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, WIDTH, **options)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)


class Bag(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(9, WIDTH, **options)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.bag(tokens)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.3))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=self.use_reentrant).tanh()


class Calls(nn.Module):
    """A block with something in its forward."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.function = linear(), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.body(x))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.arange(len(x)) % TOKENS + 1
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.layer(packed)[0], batch_first=True, total_length=TOKENS)
        return out[..., :WIDTH] + out[..., WIDTH:]


class DroppingLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, dropout=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Experts(nn.Module):
    """Each row to the expert that a router without gradient chose."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.widen = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 8)
        self.weights, self.narrow = nn.Parameter(torch.randn(2, 8, 8)), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        chosen, order = self.router(x).argmax(1).sort()
        ends = torch.searchsorted(chosen, torch.arange(2), right=True).to(torch.int32)
        product = F.grouped_mm if x.dtype == torch.float32 else grouped_product
        rows = self.narrow(product(self.widen(x[order]), self.weights, offs=ends))
        return torch.zeros_like(x).index_copy(0, order, rows) * self.router(x).softmax(1)[:, :1]


def grouped_product(rows: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
    """What PyTorch has in float32 and lower precision alone."""
    parts = rows.tensor_split(offs.long()[:-1].cpu())
    return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.fake_quantize_per_tensor_affine(self.weight, 0.05, 0, -128, 127)
        return F.linear(torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -12, 12), weight).tanh()


class TiedPadding(nn.Module):
    """The row of the padding has a gradient after all, through another use of the weight."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, WIDTH, padding_idx=0, **options)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens).cumsum(1) @ self.embedding.weight[:WIDTH]


class Aligned(nn.Module):
    """An exit on the CTC losses of targets."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.body(x).log_softmax(-1).transpose(0, 1)
        lengths = torch.full((len(x),), TOKENS)
        targets = torch.arange(2 * WIDTH).view(WIDTH, 1, 2) % 4 + 1
        losses = [
            F.ctc_loss(scores, t.expand(len(x), 2), lengths, lengths // 2, reduction="none")
            for t in targets
        ]
        return torch.stack(losses, 1).tanh()


def sampled(x: Tensor) -> Tensor:
    image = x.view(len(x), 1, 2, 3)
    grid = x.view(len(x), 1, 3, 2).tanh()
    return torch.cat([F.grid_sample(image, grid, align_corners=True).flatten(1)] * 2, 1)


def distances(x: Tensor) -> Tensor:
    """To more rows than 25, where another kernel is used, and to fewer."""
    far = torch.linspace(-1, 1, 30 * WIDTH, dtype=x.dtype).view(30, WIDTH)
    return torch.cdist(x, far)[:, :WIDTH] + torch.cdist(x, far[:WIDTH].sin())


def segments(x: Tensor) -> Tensor:
    lengths = torch.tensor([2, 4])
    means = torch.segment_reduce(x.t().contiguous(), "mean", lengths=lengths, axis=0)
    return torch.cat([means.t()] * 3, 1) + x


def product_of_pairs(x: Tensor) -> Tensor:
    index = (torch.arange(WIDTH) // 2).expand_as(x)
    products = torch.zeros_like(x[:, :3]).scatter_reduce(1, index, x, "prod", include_self=False)
    return torch.cat([products, x[:, 3:]], 1)


def unpooled(x: Tensor) -> Tensor:
    values, places = F.max_pool1d(x.unsqueeze(1), 3, 1, return_indices=True)  # some come twice
    return F.max_unpool1d(values, places, 3, 1).squeeze(1) + x


def inverse(x: Tensor) -> Tensor:
    square = x.t() @ x + torch.eye(WIDTH, dtype=x.dtype)
    return x @ torch.cholesky_inverse(torch.linalg.cholesky(square))


def penalised(x: Tensor) -> Tensor:
    """The slope of what comes later, with a graph."""
    y = x.sin()
    (slope,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    return y + slope


def perturbed(x: Tensor) -> Tensor:
    """A step along a gradient, which is a constant to the backward."""
    (slope,) = torch.autograd.grad(x.sin().pow(2).sum(), x, retain_graph=True)
    return x + 0.3 * slope / slope.norm()


def branched(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))


@torch.library.custom_op("reweight_tests::square", mutates_args=())
def custom_square(x: Tensor) -> Tensor:
    return x * x


@torch.library.custom_op("reweight_tests::cube", mutates_args=())
def custom_cube(x: Tensor) -> Tensor:
    return x**3


@torch.library.custom_op("reweight_tests::cube_backward", mutates_args=())
def custom_cube_backward(x: Tensor, gradient: Tensor) -> Tensor:
    return 3 * x**2 * gradient


for _op, _backward in (
    (custom_square, lambda x, gradient: 2 * x * gradient),
    (custom_cube, custom_cube_backward),
):
    _op.register_autograd(
        lambda ctx, gradient, backward=_backward: backward(ctx.saved_tensors[0], gradient),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    )


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Exponential(torch.autograd.Function):
    """In place, and with a backward that has no derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        x.exp_()
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


def exponential(x: Tensor) -> Tensor:
    y = x * 1
    Exponential.apply(y)
    return y


def normalised_without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.norm()
    return x / scale * 3


def branch_without_gradient(x: Tensor) -> Tensor:
    return x + (x * 2 if torch.is_grad_enabled() else x * 5)


def out_of_sight(x: Tensor) -> Tensor:
    """As from an extension in C++ that PyTorch does not know."""
    with torch._C.DisableTorchFunction():
        return torch._weight_norm(x, x[:, :1])


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class MovingScale(nn.Module):
    """Reads a buffer and then moves it, one in place and one by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.body = linear()
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("count", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x) * self.scale.clone() / self.count.sqrt()
        self.scale.mul_(0.9).add_(0.1 * x.detach().abs().mean())
        self.count = self.count + 1
        return x


def compiled(backend: str, *blocks: nn.Module) -> nn.Module:
    torch.compiler.reset()
    return torch.compile(net(*blocks, linear()), backend=backend)


def with_unused() -> nn.Module:
    model = net(linear(), linear(), linear())
    model.unused = nn.Linear(2, 2)
    return model


def with_shared() -> nn.Module:
    shared = linear()
    return net(shared, linear(), shared)


def with_tied() -> nn.Module:
    model = net(linear(), linear(), linear())
    model.blocks[1][0].weight = model.blocks[0][0].weight
    return model


def with_frozen() -> nn.Module:
    model = net(linear(), linear(), linear())
    model.blocks[0].requires_grad_(False)
    return model


def in_eval(model: nn.Module) -> nn.Module:
    return model.eval()


def encoder(dropout: float) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=dropout, batch_first=True)


@dataclass(frozen=True)
class Row:
    build: Callable[[], nn.Module]
    how: str = EXACT
    inputs: str = "features"
    optimizer: Callable[..., torch.optim.Optimizer] = Adam
    cuts: bool = False  # so that differences see what gradients do not
    unrolls: bool = True  # double backward is there
    single: str = ""  # how in float32, if another way


ROWS = {
    "BatchNorm": Row(lambda: net(Convolutions(nn.BatchNorm2d), linear())),
    "BatchNorm in evaluation mode": Row(
        lambda: in_eval(net(Convolutions(nn.BatchNorm2d), linear()))
    ),
    "SyncBatchNorm in a single process": Row(
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(net(Convolutions(nn.BatchNorm2d), linear()))
    ),
    "GroupNorm": Row(lambda: net(Convolutions(lambda width: nn.GroupNorm(2, width)), linear())),
    "LayerNorm": Row(lambda: net(linear(), nn.LayerNorm(WIDTH))),
    "channels_last": Row(lambda: net(Convolutions(nn.BatchNorm2d, channels_last=True), linear())),
    "dropout": Row(lambda: net(linear(), nn.Sequential(linear(), nn.Dropout(0.5)))),
    "a torch.Generator of its own": Row(lambda: net(linear(), OwnGenerator())),
    "stochastic depth": Row(lambda: net(StochasticDepth(), StochasticDepth())),
    "nn.MultiheadAttention, fused": Row(
        lambda: net(SelfAttention(False), SelfAttention(False)), inputs="sequence"
    ),
    "nn.MultiheadAttention with weights": Row(
        lambda: net(SelfAttention(True), linear()), inputs="sequence"
    ),
    "nn.TransformerEncoderLayer, dropout": Row(
        lambda: net(encoder(0.2), encoder(0.2)), inputs="sequence"
    ),
    "nn.TransformerEncoderLayer, fused": Row(
        lambda: net(encoder(0.0), encoder(0.0)), inputs="sequence"
    ),
    "nn.TransformerEncoderLayer, fast path in evaluation mode": Row(
        lambda: in_eval(net(encoder(0.1), encoder(0.1))), inputs="sequence"
    ),
    "GRU": Row(lambda: net(Recurrent(nn.GRU, WIDTH), Recurrent(nn.GRU, WIDTH)), inputs="sequence"),
    "LSTM": Row(
        lambda: net(Recurrent(nn.LSTM, WIDTH), Recurrent(nn.LSTM, WIDTH)), inputs="sequence"
    ),
    "embedding with padding": Row(lambda: net(Embedded(padding_idx=0), linear()), inputs="tokens"),
    "embedding with sparse gradients": Row(
        lambda: net(Embedded(sparse=True), linear()), inputs="tokens", optimizer=SGD
    ),
    "embedding with sparse gradients and momentum": Row(
        lambda: net(Embedded(sparse=True), linear()),
        inputs="tokens",
        optimizer=partial(SGD, momentum=0.9),
    ),
    "LSTM of packed sequences": Row(
        lambda: net(Packed(), Packed()), BY_BACKWARD, inputs="sequence"
    ),
    "LSTM with dropout": Row(
        lambda: net(DroppingLSTM(), DroppingLSTM()), inputs="sequence", single=BY_BACKWARD
    ),
    "embedding with padding, tied": Row(
        lambda: net(TiedPadding(), linear()), inputs="tokens", cuts=True
    ),
    "nn.EmbeddingBag": Row(
        lambda: net(Bag(padding_idx=1), linear()), inputs="tokens", unrolls=False
    ),
    "nn.EmbeddingBag, mode max": Row(
        lambda: net(Bag(mode="max"), linear()), BY_DIFFERENCES, inputs="tokens", unrolls=False
    ),
    "weight_norm": Row(
        lambda: net(linear(), parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)))
    ),
    "F.grouped_mm": Row(lambda: net(linear(), Experts())),
    "F.ctc_loss": Row(lambda: net(Aligned(), linear()), BY_DIFFERENCES, "sequence", unrolls=False),
    "F.grid_sample": Row(lambda: net(linear(), Calls(sampled)), BY_BACKWARD),
    "torch.cdist": Row(lambda: net(linear(), Calls(distances)), BY_DIFFERENCES, unrolls=False),
    "torch.segment_reduce": Row(
        lambda: net(linear(), Calls(segments)), BY_DIFFERENCES, unrolls=False
    ),
    "scatter_reduce, products": Row(lambda: net(linear(), Calls(product_of_pairs)), BY_BACKWARD),
    "F.max_unpool1d": Row(lambda: net(linear(), Calls(unpooled)), BY_BACKWARD, cuts=True),
    "torch.cholesky_inverse": Row(lambda: net(linear(), Calls(inverse)), BY_BACKWARD),
    "fake quantisation": Row(lambda: net(Quantized(), Quantized()), BY_BACKWARD, cuts=True),
    "spectral_norm": Row(
        lambda: net(linear(), parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))), cuts=True
    ),
    "activation checkpointing, not reentrant": Row(lambda: net(Checkpointed(False), linear())),
    "activation checkpointing, reentrant": Row(
        lambda: net(linear(), Checkpointed(True)), cuts=True
    ),
    "torch.compile, eager": Row(lambda: compiled("eager", linear())),
    "torch.compile, aot_eager": Row(
        lambda: compiled("aot_eager", Convolutions(nn.BatchNorm2d), nn.Dropout(0.3))
    ),
    "torch.compile, a shared module": Row(lambda: compiled("aot_eager", *[linear()] * 2)),
    "torch.compile, torch.no_grad in the forward": Row(
        lambda: compiled("aot_eager", Calls(normalised_without_gradient)), cuts=True
    ),
    "a compiled function, aot_eager": Row(
        lambda: net(linear(), Calls(torch.compile(torch.sin, backend="aot_eager")))
    ),
    "tied parameters": Row(with_tied),
    "frozen parameters": Row(with_frozen),
    "shared modules": Row(with_shared),
    "unused parameters": Row(with_unused),
    "lazy modules": Row(lambda: net(linear(), nn.LazyLinear(WIDTH))),
    "buffers read and moved by the forward": Row(lambda: net(MovingScale(), linear())),
    "gradient scaling, x·s + (x·(1−s)).detach()": Row(
        lambda: net(linear(), Calls(lambda x: x * 0.3 + (x * 0.7).detach())), cuts=True
    ),
    "detach": Row(lambda: net(linear(), Calls(lambda x: x * x.detach())), cuts=True),
    "torch.no_grad in the forward": Row(
        lambda: net(Calls(normalised_without_gradient), linear()), cuts=True
    ),
    "a branch on torch.is_grad_enabled": Row(
        lambda: net(linear(), Calls(branch_without_gradient)), cuts=True
    ),
    "a gradient within the forward, a constant": Row(
        lambda: net(linear(), Calls(perturbed)), cuts=True
    ),
    "a gradient within the forward, with a graph": Row(
        lambda: net(linear(), Calls(penalised)), cuts=True
    ),
    "torch.cond": Row(lambda: net(linear(), Calls(branched))),
    "torch.library.custom_op": Row(
        lambda: net(linear(), Calls(lambda x: custom_square(x))), BY_BACKWARD
    ),
    "torch.library.custom_op, its backward another one": Row(
        lambda: net(linear(), Calls(lambda x: custom_cube(x))), BY_DIFFERENCES, unrolls=False
    ),
    "autograd.Function without jvp": Row(lambda: net(linear(), Calls(Square.apply)), BY_BACKWARD),
    "autograd.Function, straight-through": Row(
        lambda: net(linear(), Calls(StraightThrough.apply)), BY_BACKWARD, cuts=True
    ),
    "autograd.Function, in place, once differentiable": Row(
        lambda: net(linear(), Calls(exponential)), BY_DIFFERENCES, unrolls=False
    ),
    "an extension in C++ without forward mode": Row(
        lambda: net(linear(), Calls(out_of_sight)), DIFFERENCES
    ),
}


def batch(inputs: str, seed: int, num_samples: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(NUM_CLASSES, (num_samples,), generator=generator)
    if inputs == "tokens":
        return torch.randint(9, (num_samples, TOKENS), generator=generator), target
    shape = (num_samples, TOKENS, WIDTH) if inputs == "sequence" else (num_samples, WIDTH)
    return torch.randn(shape, generator=generator, dtype=torch.float64), target


def rungs(name: str, how: str) -> set[Rung]:
    """How the operations of that row get their tangents."""
    since, better = NEWER.get(name, ((99,), how))
    return RUNGS[better if torch.__version__ >= since else how]


UNCOMPILED = [name for name in ROWS if not name.startswith("torch.compile")]
"""What a step takes, but for those models that are others of these, compiled."""


def set_up(row: Row, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    model = row.build().to(dtype)
    train, meta = (
        (inputs.to(dtype) if inputs.is_floating_point() else inputs, target)
        for inputs, target in (batch(row.inputs, seed=1), batch(row.inputs, seed=2))
    )
    getattr(model, "_orig_mod", model)(train[0])  # lazy modules find their shapes
    optimizer = row.optimizer(model.parameters(), lr=0.01)
    return model, optimizer, train, meta
