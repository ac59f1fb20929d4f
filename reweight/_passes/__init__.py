"""The user's model run again, without leaving a trace; these modules are for others."""

__all__ = ["aliases", "attention", "compiled", "differences", "forward", "forward_mode", "hooks",
    "ladder", "primal_cache", "random_state", "snapshots"]  # fmt: skip
