"""Integrations with training frameworks, each imported by name."""
