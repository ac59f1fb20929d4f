"""Implementations of per-exit cross-entropy; only ``losses.py`` imports them."""
