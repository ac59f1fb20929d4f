"""U, the optimizer's next step, made differentiable; these modules are for others."""

__all__ = ["accepted", "entries", "pseudo_update"]
