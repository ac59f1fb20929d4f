"""The fused cross-entropy and its derivatives of every order; these modules are for others."""

__all__ = ["composite", "dispatch", "function", "linear"]
