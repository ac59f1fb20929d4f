"""Nets that compute their exits one by one, so that one may stop between them."""

from typing import Any

from torch import Tensor, nn

__all__ = ["StagedNet"]


class StagedNet(nn.Module):
    """A net of K stages, each of which ends in an exit.

    Between the stages stands a state: a tensor, or a nest of lists and tuples of tensors, with the
    samples along the first dimension of each. Who takes rows out of all of them goes on with these
    samples alone. The state before the first stage is the input.

    A net defines ``exits``, K modules, and :meth:`advance`.
    """

    exits: nn.ModuleList

    def advance(self, k: int, state: Any) -> tuple[Tensor, Any]:
        """Stage k without its exit.

        Args:
            k: from 0.
            state: before the stage.

        Returns:
            What the exit reads, and the state after the stage. Where the later stages read that
            same tensor, the state holds the very object.
        """
        raise NotImplementedError

    def stage(self, k: int, state: Any) -> tuple[Tensor, Any]:
        """Stage k: the logits of its exit [B, C], and the state after it."""
        features, state = self.advance(k, state)
        return self.exits[k](features), state

    def forward(self, x: Tensor) -> list[Tensor]:
        """Inputs [B, ...] → K logits [B, C], computed exit by exit."""
        state: Any = x
        logits = []
        for k in range(len(self.exits)):
            exit_logits, state = self.stage(k, state)
            logits.append(exit_logits)
        return logits
