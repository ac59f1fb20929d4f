"""U, the optimizer"s next step, made differentiable; these modules are for others."""

__all__ = ["accepted", "pseudo_update"]
