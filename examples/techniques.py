"""Techniques for training multi-exit nets, each alone or with the others, and with reweighting.

Li et al., "Improved Techniques for Training Adaptive Deep Networks", ICCV 2019:

    net = GradientEquilibrium(net)              # how much each exit moves what it shares
    net = InlineCollaboration(net)              # each exit reads what the one before answered
    loss = OneForAllDistillation(gamma=0.1)     # each exit learns from what the last one answers

They train by ``loss(net(x), y).losses.mean(0).sum()`` as by ``MetaReweightStep(..., loss=loss)``.
As published there are two trainings: the net under gradient equilibrium; then, with its parameters
frozen and its BatchNorm in evaluation mode, the collaborating exits, distilled from its last exit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from reweight import ExitLosses, exit_cross_entropy
from staged import StagedNet

__all__ = ["GradientEquilibrium", "InlineCollaboration", "OneForAllDistillation", "scale_gradient"]


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """X itself, to the bit if it is finite; what flows back, or forward as a tangent, is scaled."""
    scaled = x * factor
    return x.detach() + (scaled - scaled.detach())


class GradientEquilibrium(StagedNet):
    """A net whose exits move the features they share by as much, however many exits read them.

    What flows back through exit k = 0..K-1 is scaled by 1/(K-k), and what flows back from later
    stages through the features that this exit reads by (K-k-1)/(K-k). Answers, parameters and the
    gradient of the exits' own parameters stay what they are.

    Args:
        net: to be wrapped; its parameters stay its own.
    """

    def __init__(self, net: StagedNet) -> None:
        super().__init__()
        self.net = net

    @property
    def exits(self) -> nn.ModuleList:  # type: ignore[override]
        """Those of the net, which are not saved twice."""
        return self.net.exits

    def advance(self, k: int, state: Any) -> tuple[Tensor, Any]:
        """As the net itself; the features carry their factor on each of their two ways."""
        features, state = self.net.advance(k, state)
        num_left = len(self.exits) - k
        passed = scale_gradient(features, (num_left - 1) / num_left)
        state = tree_map(lambda tensor: passed if tensor is features else tensor, state)
        return scale_gradient(features, 1 / num_left), state


class InlineCollaboration(StagedNet):
    """A net whose exits also read the logits of the exit before (inline subnetwork collaboration).

    The layers of each exit but the last are kept; a new linear layer reads what they put out, and
    beside it the logits of the exit before through a linear layer, BatchNorm and ReLU.

    Args:
        net: to be wrapped; each of its exits is a linear layer, or ends in one.
    """

    def __init__(self, net: StagedNet) -> None:
        super().__init__()
        self.net = net
        self.exits = nn.ModuleList()
        self.links = nn.ModuleList()
        for k, old in enumerate(net.exits):
            last = old[-1] if isinstance(old, nn.Sequential) else old
            if not isinstance(last, nn.Linear):
                raise TypeError(f"exit {k} must end in a linear layer, got {type(last).__name__}")
            width, num_classes = last.in_features, last.out_features
            if k > 0:
                self.links.append(
                    nn.Sequential(nn.Linear(num_classes, width), nn.BatchNorm1d(width), nn.ReLU())
                )
            self.exits.append(nn.Linear(2 * width if k else width, num_classes))

    def stage(self, k: int, state: Any) -> tuple[Tensor, Any]:
        """The state is that of the net, and the logits of the exit before."""
        inner, previous = state if k else (state, None)
        features, inner = self.net.advance(k, inner)
        exit = self.net.exits[k]
        if isinstance(exit, nn.Sequential):
            features = exit[:-1](features)
        if k:
            features = torch.cat([features, self.links[k - 1](previous)], dim=1)
        logits = self.exits[k](features)
        return logits, (inner, logits)


@dataclass(frozen=True)
class OneForAllDistillation:
    """Cross-entropy, and for every exit but the last also the divergence from the last.

        l[i,k] = (1 − γ)·CE(z_k, y) + γ·T²·KL(softmax(z_teacher / T) ‖ softmax(z_k / T)),  k < K
        l[i,K] = CE(z_K, y)

    Confidence and correctness are those of the logits. The teacher gets no gradient.

    Args:
        gamma: γ in [0, 1]. Default 0.1, as in the published script.
        temperature: T > 0. Default 1, as there.
    """

    gamma: float = 0.1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], got {self.gamma}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    def __call__(
        self, logits: Sequence[Tensor], target: Tensor, teacher: Tensor | None = None
    ) -> ExitLosses:
        """Logits, K times [B, C], and target [B] to losses [B, K].

        Args:
            logits: of the exits.
            target: class indices.
            teacher: logits [B, C] to learn from; those of the last exit if None.
        """
        plain = exit_cross_entropy(logits, target)
        teacher = (logits[-1] if teacher is None else teacher).detach()
        log_p = F.log_softmax(teacher / self.temperature, dim=1)
        divergences = []
        for student in logits[:-1]:
            log_q = F.log_softmax(student / self.temperature, dim=1)
            divergences.append((log_p.exp() * (log_p - log_q)).sum(1))
        if not divergences:
            return plain
        early = (1 - self.gamma) * plain.losses[:, :-1]
        early = early + self.gamma * self.temperature**2 * torch.stack(divergences, 1)
        return plain._replace(losses=torch.cat([early, plain.losses[:, -1:]], 1))
