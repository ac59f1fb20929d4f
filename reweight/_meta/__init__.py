"""The meta step as functions, from a first forward to a reweighter that has learned."""

__all__ = ["estimators", "examination", "learners", "lookahead", "problem"]
