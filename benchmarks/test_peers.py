"""Each contestant of the benchmark trains what forward mode trains: model, buffers, reweighter.

pytest benchmarks/test_peers.py
"""

import copy

import pytest
import torch
from torch.nn.utils import parameters_to_vector
from torch.optim import SGD

from contestants import CONTESTANTS, UNSUPPORTED, plain
from nets import OPTIMIZERS, TINY_NETS
from peers import PEERS
from reweight import SampleReweighter

REFERENCE = "ours, forward"
EXACT = ("ours, lean", "ours, unrolled", "by hand", *PEERS)  # the others give something up


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("net_name", TINY_NETS)
@pytest.mark.parametrize("name", EXACT)
def test_trains_the_same(name: str, net_name: str, optimizer_name: str) -> None:
    if (name, optimizer_name) in UNSUPPORTED:
        pytest.skip(f"{name} does not know {optimizer_name}")
    if name == "published recipe" and optimizer_name != "sgd":
        pytest.skip("momentum SGD as published, whatever the optimizer")
    torch.manual_seed(0)
    net = TINY_NETS[net_name]
    train, meta = (
        tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in net.batch())
        for _ in range(2)
    )
    model = net.build().double()
    if name == "by hand" and any(True for _ in model.buffers()):
        pytest.skip("it lets the passes move them")
    optimizer = OPTIMIZERS[optimizer_name](model)
    optimizer.param_groups[0]["lr"] = 0.02  # a hypergradient worth comparing
    g = SampleReweighter(net.num_exits).double()
    for _ in range(3):  # moments that must be taken over
        plain(model, optimizer, g, optimizer)(train, meta)
    trained = []
    for contestant in (REFERENCE, name):
        twin, twin_optimizer, twin_g = copy.deepcopy((model, optimizer, g))
        # A step of plain gradient descent keeps the size of the hypergradient, which Adam hides.
        g_optimizer = SGD(twin_g.parameters(), lr=1.0)
        step = CONTESTANTS[contestant](twin, twin_optimizer, twin_g, g_optimizer)
        for _ in range(3):
            step(train, meta)
        learned = parameters_to_vector(twin_g.parameters()) - parameters_to_vector(g.parameters())
        trained.append((learned, torch.cat([t.flatten() for t in twin.state_dict().values()])))
    # As a whole: AdamW makes steps of the rounding where the gradient is 0 (a bias of keys).
    for expected, found in zip(*trained, strict=True):
        assert expected.norm() > 1e-6
        assert (found - expected).norm() < 1e-10 * expected.norm()
