"""Dense outputs and graphs, as the packages that people use for them give them.

Skipped where a package is not installed: run with segmentation-models-pytorch 0.6.0, MONAI 1.6.1
and PyTorch Geometric 2.8.1.
"""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from reweight import MeanObjective, MetaReweightStep, SampleReweighter, exit_cross_entropy
from reweight.result import StepResult

DENSE = partial(exit_cross_entropy, class_dim=1)


def stepped(model: nn.Module, train, meta, num_exits: int = 1, **options) -> StepResult:
    """One step, exact by the check of both ways: float32 rounds to about 1e-6 here."""
    step = MetaReweightStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        SampleReweighter(num_exits, form="sigmoid"),
        objective=MeanObjective(),
        **options,
    )
    result = step(train, meta)
    assert result.hypergradient_norm > 0
    assert result.backward_difference < 1e-4
    return result


def test_a_network_of_segmentation_models() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    network = smp.Unet("resnet18", encoder_weights=None, classes=4)
    train, meta = ((torch.randn(2, 3, 32, 32), torch.randint(4, (2, 32, 32))) for _ in "ab")
    assert stepped(network, train, meta, loss=DENSE).weights.shape == (2 * 32 * 32, 1)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_supervised_depths_of_monai_are_exits(dims: int) -> None:
    """Its batches are dicts of tensors of a class of its own, its labels have a channel."""
    monai = pytest.importorskip("monai")
    torch.manual_seed(0)
    features = (4, 4, 4, 4, 4, 4)
    network = monai.networks.nets.BasicUNetPlusPlus(
        dims, out_channels=3, features=features, deep_supervision=True
    )

    def pair(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return batch["image"].as_tensor(), batch["label"].as_tensor().squeeze(1).long()

    shape = (2, 1, *[32] * dims)
    tensor = monai.data.MetaTensor
    batches = [
        {"image": tensor(torch.randn(shape)), "label": tensor(torch.randint(3, shape))}
        for _ in range(2)
    ]
    result = stepped(network, *map(pair, batches), num_exits=4, loss=DENSE)
    assert result.weights.shape == (2 * 32**dims, 4)


class TestPyTorchGeometric:
    def network(self, graphs: bool) -> nn.Module:
        geometric = pytest.importorskip("torch_geometric")
        torch.manual_seed(0)

        class Network(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = geometric.nn.GCNConv(5, 8)
                self.second = geometric.nn.SAGEConv(8, 8)
                self.exits = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])

            def forward(self, data) -> list[Tensor]:
                early = self.first(data.x, data.edge_index).relu()
                states = [early, self.second(early, data.edge_index).relu()]
                if graphs:
                    states = [geometric.nn.global_mean_pool(x, data.batch) for x in states]
                return [head(x) for head, x in zip(self.exits, states, strict=True)]

        return Network()

    def graph(self, num_labels: int):
        data = pytest.importorskip("torch_geometric.data")
        edges, labels = torch.randint(7, (2, 20)), torch.randint(3, (num_labels,))
        return data.Data(x=torch.randn(7, 5), edge_index=edges, y=labels)

    def test_graphs(self) -> None:
        network = self.network(graphs=True)
        loader = pytest.importorskip("torch_geometric.loader").DataLoader
        train, meta = loader([self.graph(1) for _ in range(8)], batch_size=4)
        result = stepped(network, (train, train.y), (meta, meta.y), num_exits=2)
        assert result.weights.shape == (4, 2)

    def test_nodes_of_one_graph(self) -> None:
        network, graph = self.network(graphs=False), self.graph(7)
        is_train = torch.arange(7) < 4
        train = graph, graph.y.masked_fill(~is_train, -100)
        meta = graph, graph.y.masked_fill(is_train, -100)
        result = stepped(network, train, meta, num_exits=2)
        assert result.losses.valid.tolist() == is_train.tolist()
