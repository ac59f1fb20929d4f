"""The meta step as functions, from a first forward to a reweighter that has learned."""

__all__ = ["direct", "estimators", "examination", "lookahead", "problem"]
