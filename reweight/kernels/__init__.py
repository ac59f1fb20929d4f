"""Fused kernels behind ``exit_cross_entropy``."""
